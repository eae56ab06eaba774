"""Model folders for the benchmarks: the demo model as a plain folder, random models by size, a reward model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.gate import Gate
from benchmarks.work import Job

SIZES: dict[str, dict[str, int]] = {
    "0.05M": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 512},
    "0.3M": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 2048},
    "3M": {"hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 6, "vocab_size": 4096},
    "30M": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192},
    "135M": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
"""Random Llama models with about that many parameters; the intermediate size is 8/3 of the hidden size."""

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")


def cache_folder() -> Path:
    """Where model folders are kept between runs, outside of the repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tropism" / "bench"


def run(job: Job, gate: Gate) -> None:
    """Make sure that the model ``job.model`` is there as a folder; say where, and how many weights it multiplies by."""
    folder = str(model_folder(job.model))
    body, head = matmul_weights(folder)
    gate.ready(folder=folder, body_weights=body, head_weights=head)


def model_folder(name: str) -> Path:
    """The folder of the demo model, of a random model of ``SIZES``, or the one that ``name`` is."""
    folder = cache_folder() / name
    if name != "demo" and name not in SIZES:
        return Path(name)
    if (folder / "config.json").is_file():
        return folder
    from tropism.models.loading import ModelConfig, load_model
    from tropism.models.saving import save_plain

    if name == "demo":
        loaded = load_model(ModelConfig(name="demo", device="cpu", dtype="float32"))
        save_plain(loaded.model, loaded.tokenizer, folder)
    else:
        save_plain(*random_model(name), folder)
    return folder


def random_model(size: str) -> tuple[Any, Any]:
    """A random Llama model and a tokenizer whose words w0, w1, ... are its tokens, one to one."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape: dict[str, Any] = SIZES[size]
    config = LlamaConfig(
        **shape,
        intermediate_size=shape["hidden_size"] * 8 // 3 // 32 * 32 or 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32), word_tokenizer(shape["vocab_size"])


def word_tokenizer(size: int) -> Any:
    """A tokenizer of ``size`` tokens, each a word of its own: pad, eos, unk, then w0, w1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(size - len(SPECIAL_TOKENS)))]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def matmul_weights(folder: str) -> tuple[int, int]:
    """Weights in the linear layers of the transformer, and in its vocabulary projection, from its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    body = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings)
    return body, model.get_output_embeddings().weight.numel()
