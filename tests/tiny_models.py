"""Tiny random language models of every supported family, and a tokenizer for them.

The weights are drawn wide, so that the logits of different tokens differ by several nats: a mistake of position, mask
or window then shows up as a large error instead of hiding below the tolerance. Sliding windows are 4 tokens short.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MBartConfig,
    MistralConfig,
    MT5Config,
    OPTConfig,
    PegasusConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

VOCABULARY = 37
"""Size of every tiny model's vocabulary and of the tokenizer's: 32 characters and 5 special tokens."""

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,!?'"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<user>", "<assistant>")

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
"""Ids of the special tokens, in the models' configurations and in the tokenizer alike."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of one of ``FAMILIES``, with ``overrides`` put over its fields."""
    kind, fields = _CONFIGS[family]
    return kind(**{**_COMMON, **fields, **overrides})


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model of ``family`` in eval mode; equal for equal seeds, whatever the global random state."""
    config = tiny_config(family, **overrides)
    # Falcon's eager attention adds the ALiBi bias twice.
    attention = "sdpa" if family == "falcon_alibi" else "eager"
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(config, dtype=torch.float32, attn_implementation=attention)
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    if getattr(config, "scale_decoder_outputs", None) is False:  # T5 v1.1, whose two embeddings are not tied
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.all_tied_weights_keys.pop("lm_head.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                # Norm weights stay near one (zero where a family adds the one itself), biases near zero.
                parameter.add_(0.1 * noise)
            elif _is_embedding(name):
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)
                if name.endswith("Attention.q.weight"):  # T5 keeps the scale of its scores in this weight
                    parameter.mul_(config.d_kv**-0.5)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(0.5 * torch.randn(model.final_logits_bias.shape, generator=generator))
    model.eval()
    return model


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "wte", "wpe", "shared"))


def tiny_tokenizer(
    *,
    bos: bool = True,
    eos: bool = True,
    pad: bool = True,
    add_bos: bool = False,
    add_eos: bool = False,
    chat: bool = False,
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character and ids below ``VOCABULARY``.

    Args:
        bos, eos, pad: whether the tokenizer declares that special token; the ids are the same either way.
        add_bos: put bos before every encoded text, as Llama's and Gemma's tokenizers do.
        add_eos: put eos behind every encoded text, as T5's tokenizer does (and BART's, with add_bos).
        chat: give it a chat template.
    """
    ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    core = Tokenizer(WordLevel(ids, unk_token="?"))
    core.pre_tokenizer = Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    if add_bos or add_eos:
        single = " ".join([*(["<bos>"] if add_bos else []), "$A", *(["<eos>"] if add_eos else [])])
        core.post_processor = TemplateProcessing(single=single, special_tokens=[("<bos>", BOS_ID), ("<eos>", EOS_ID)])
    declared = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="?",
        clean_up_tokenization_spaces=False,
        **{name: f"<{name[:3]}>" for name, wanted in declared.items() if wanted},
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "use_cache": True,
}

_ROTARY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

_FALCON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

_CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": (LlamaConfig, {**_ROTARY, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, {**_ROTARY, "sliding_window": 4}),
    "qwen2": (Qwen2Config, {**_ROTARY, "tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {**_ROTARY, "head_dim": 8}),
    "gemma2": (
        Gemma2Config,
        {
            **_ROTARY,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "final_logit_softcapping": 5.0,
            "attn_logit_softcapping": 10.0,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        {
            **_ROTARY,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_neox": (
        GPTNeoXConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "opt": (
        OPTConfig,
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 16,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": (BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "phi": (
        PhiConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "partial_rotary_factor": 0.5,
        },
    ),
    "falcon": (FalconConfig, {**_FALCON, "alibi": False}),
    "falcon_alibi": (FalconConfig, {**_FALCON, "alibi": True}),
}

_T5: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    # Few buckets, so that positions a few tokens apart differ, and far ones fall together.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": PAD_ID,
}

_BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": EOS_ID,
    "forced_eos_token_id": None,
}

_SEQ2SEQ: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "t5": (T5Config, _T5),
    "t5_v1_1": (T5Config, {**_T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
    "mt5": (MT5Config, {**_T5, "feed_forward_proj": "gated-gelu"}),
    "bart": (BartConfig, _BART),
    "mbart": (MBartConfig, {**_BART, "scale_embedding": True}),
    "pegasus": (PegasusConfig, {**_BART, "scale_embedding": True, "decoder_start_token_id": PAD_ID}),
}
_CONFIGS |= _SEQ2SEQ

SEQ2SEQ: tuple[str, ...] = tuple(_SEQ2SEQ)
"""Names of the families with an encoder and a decoder; ``tiny_model`` and ``tiny_config`` make them, too."""

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    family: partial(tiny_model, family) for family in _CONFIGS if family not in _SEQ2SEQ
}
"""Causal family -> a function that makes its tiny random model (also ``tiny_model(family, seed=..., **config)``)."""
