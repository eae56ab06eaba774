"""Base models in 8 or 4 bits under an adapter: exact passes, training, resuming, export; and what is refused."""

from __future__ import annotations

import importlib.util
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from tiny_models import SEQ2SEQ, tiny_model, tiny_tokenizer
from tiny_runs import (
    PROMPTS,
    Setting,
    assemble,
    assert_same,
    execute,
    logged,
    make_recipe,
    sample,
    stop_after,
    weights_of,
)
from tropism.algorithms import RewardModeling
from tropism.commands import evaluate
from tropism.comparing.cell import _trained as trained_model
from tropism.config import Recipe
from tropism.errors import ConfigError, ModelError
from tropism.export import export_model
from tropism.models import quantization
from tropism.models.loading import ModelConfig, load_model
from tropism.models.lora import LoRA
from tropism.models.modules import AutoLanguageModel
from tropism.models.quantization import check_family, is_packed, skeleton_of, unpacked_weight
from tropism.models.saving import save_adapter, save_plain
from tropism.training.checkpoint import list_checkpoints, read_checkpoint
from tropism.training.config import CheckpointConfig
from tropism.training.interrupt import Interrupted

BITS = ("8bit", "4bit")
GRPO_LORA = Setting("grpo", True, "llama")

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason='needs bitsandbytes (pip install "tropism[bitsandbytes]")'
)
both = pytest.mark.parametrize("bits", BITS)


def folder_of(family: str, path: Path, **config: Any) -> str:
    """A tiny model in a folder, with rows of 64 and more numbers, as blocks of 4-bit weights have."""
    seq2seq = {"d_model": 64, "d_kv": 16, "d_ff": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    sizes = {"gpt2": {"n_embd": 64}, "t5": seq2seq, "bart": seq2seq}
    usual = {"hidden_size": 64, "intermediate_size": 128}
    model = tiny_model(family, seed=3, **{**sizes.get(family, usual), **config})
    save_plain(model, tiny_tokenizer(add_eos=family in SEQ2SEQ), path)
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return folder_of("llama", tmp_path_factory.mktemp("llama") / "model")


def quantized(name: str, bits: Any) -> ModelConfig:
    return ModelConfig(name=name, device="cpu", quantization=bits)


# What is refused, without bitsandbytes -------------------------------------------------------------------------------


def test_other_names_are_refused() -> None:
    with pytest.raises(ModelError, match=r"quantization is 'int4'; choose 8bit or 4bit"):
        ModelConfig(name="x", quantization="int4")  # type: ignore[arg-type]


@both
@pytest.mark.parametrize("changes", [{"lora": None}, {"lora": None, "train_layers": 1}], ids=["all", "last"])
def test_packed_weights_are_not_trained(bits: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """At the recipe, so before anything is read: there is no such folder."""
    with pytest.raises(ConfigError, match=rf"quantization is {bits}, and packed weights cannot be trained.*set lora"):
        make_recipe(GRPO_LORA, tmp_path / "run", model=quantized("no/such-model", bits), **changes)


def test_an_adapter_on_packed_weights_needs_no_other(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    make_recipe(GRPO_LORA, tmp_path / "run", model=quantized(str(tmp_path), "4bit"), lora=None)


def test_a_recipe_in_yaml(tmp_path: Path) -> None:
    values = {"model": {"name": "x/y", "quantization": "4bit"}, "algorithm": "grpo", "data": "d.txt", "reward": "vader"}
    with pytest.raises(ConfigError, match="set lora"):
        Recipe.from_mapping(values)
    recipe = Recipe.from_mapping({**values, "lora": {}})
    assert recipe.model.quantization == "4bit" and "quantization: 4bit" in recipe.to_yaml()
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        Recipe.from_mapping({**values, "lora": {}, "model": {"name": "x/y", "quantization": "2bit"}})


def test_reward_models_take_none(tmp_path: Path) -> None:
    setting = Setting("reward-model", True, "llama")
    with pytest.raises(ConfigError, match=r"reward-model takes no model\.quantization"):
        make_recipe(setting, tmp_path / "run", model=quantized("x", "8bit"), algorithm=RewardModeling())


def test_the_missing_package_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'not installed; pip install "tropism\[bitsandbytes\]"'):
        load_model(quantized("no/such-model", "4bit"))


@pytest.mark.parametrize("name", ["demo", "some/model.gguf"])
def test_gguf_files_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="GGUF file: give the model's folder or hub id"):
        load_model(quantized(name, "4bit"))


def test_devices_without_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ModelError, match="not for mps"):
        quantization.check_quantizable("x/y", Path("x/y"), torch.device("mps"))


def test_families_without_linear_layers_are_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = MixtralConfig(**sizes, vocab_size=37, num_key_value_heads=2, num_local_experts=4)
    with pytest.raises(ModelError, match="in no linear layer"):
        check_family(experts, skeleton_of(experts, AutoModelForCausalLM), "a model")
    llama = tiny_model("llama").config
    check_family(llama, skeleton_of(llama, AutoModelForCausalLM), "a model")
    llama.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ModelError, match="quantised already"):
        check_family(llama, skeleton_of(llama, AutoModelForCausalLM), "a model")


# What it computes ----------------------------------------------------------------------------------------------------


@needs_bitsandbytes
@both
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma2"])
def test_a_layer_multiplies_with_the_numbers_it_stands_for(bits: str, family: str, tmp_path: Path) -> None:
    name = folder_of(family, tmp_path / "model")
    packed: Any = load_model(quantized(name, bits)).model
    whole: Any = load_model(ModelConfig(name=name, device="cpu")).model
    names = [name for name, module in packed.named_modules() if is_packed(module)]
    assert len(names) == (8 if family == "gpt2" else 14)
    assert not is_packed(packed.get_output_embeddings())
    for name in names:
        layer, weight = packed.get_submodule(name), whole.get_submodule(name).weight.detach()
        weight = weight.T if family == "gpt2" else weight
        stands_for = unpacked_weight(layer)
        # 8 bits: half of 1/127 of a row's largest. 4 bits: NF4's widest gap is 0.304 of a block's largest.
        most = 0.0042 if bits == "8bit" else 0.17
        assert float((stands_for - weight).abs().max() / weight.abs().max()) < most
        x = torch.randn(3, 5, weight.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
        into = torch.randn(3, 5, weight.shape[0], generator=torch.Generator().manual_seed(1))
        bias = 0.0 if layer.bias is None else layer.bias
        out = layer(x)
        torch.testing.assert_close(out, torch.einsum("bti,oi->bto", x, stands_for) + bias, rtol=1e-5, atol=1e-5)
        (gradient,) = torch.autograd.grad(out, x, into)
        torch.testing.assert_close(gradient, torch.einsum("bto,oi->bti", into, stands_for), rtol=1e-5, atol=1e-5)


@needs_bitsandbytes
@both
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_sampling_and_training_agree(bits: str, family: str, tmp_path: Path) -> None:
    """Whatever the neighbours and the padding."""
    name = folder_of(family, tmp_path / "model")
    assembly = assemble(replace(GRPO_LORA, family=family), tmp_path / "run", model=quantized(name, bits))
    assembly.check()
    with torch.no_grad():
        for parameter in assembly.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    rollouts = sample(assembly, group=3)
    together = assembly.scorer.logprobs(rollouts, temperature=1.0)
    rows = [rollouts.select(torch.tensor([row])) for row in range(len(rollouts))]
    alone = [assembly.scorer.logprobs(row, temperature=1.0)[0] for row in rows]  # as wide as the row is long
    torch.testing.assert_close(together, rollouts.logprobs, rtol=0, atol=1e-5)
    for found, expected in zip(alone, rollouts.logprobs, strict=True):
        torch.testing.assert_close(found, expected[: len(found)], rtol=0, atol=1e-5)


@needs_bitsandbytes
@both
def test_three_steps_of_grpo(bits: str, llama: str, tmp_path: Path) -> None:
    """Only the adapter learns, the reference is the packed model without it, and the export is a plain model."""
    assembly = assemble(GRPO_LORA, tmp_path / "run", model=quantized(llama, bits), total_steps=3)
    before = weights_of(assembly)
    execute(assembly, export=True)
    after = weights_of(assembly)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".lora_" in name for name in changed)
    updates = logged(tmp_path / "run", "update")
    assert all(update["optim/grad_norm"] > 0 for update in updates)
    assert_plain_and_equal(assembly, tmp_path / "run" / "model")


def assert_plain_and_equal(assembly: Any, folder: Path) -> None:
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    kind: Any = AutoLanguageModel.of(AutoConfig.from_pretrained(str(folder)))
    plain = kind.from_pretrained(str(folder), dtype=torch.float32).eval()
    assert not any(is_packed(module) for module in plain.modules())
    ids = torch.tensor([[5, 9, 11, 4, 30, 7]])
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if plain.config.is_encoder_decoder else {})}
    with torch.no_grad():
        expected = assembly.policy.language_model(**given).logits
        torch.testing.assert_close(plain(**given).logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@needs_bitsandbytes
@both
@pytest.mark.parametrize(("family", "target"), [("gpt2", "c_attn"), ("t5", "q"), ("bart", "q_proj")])
def test_other_families_and_layers_without_an_adapter_are_exported(
    bits: str, family: str, target: str, tmp_path: Path
) -> None:
    """GPT-2's layers are transposed; T5 keeps one of a block's layers in float32."""
    name = folder_of(family, tmp_path / "model")
    lora = LoRA(rank=4, targets=(target,))
    setting = replace(GRPO_LORA, family=family)
    assembly = assemble(setting, tmp_path / "run", model=quantized(name, bits), lora=lora)
    assert_plain_and_equal(execute(assembly, export=True), tmp_path / "run" / "model")


@needs_bitsandbytes
@both
def test_a_checkpoint_is_exported_too(bits: str, llama: str, tmp_path: Path) -> None:
    """The export compares it with its adapter on the packed weights."""
    kept = {"checkpoints": CheckpointConfig(every=1)}
    assembly = assemble(GRPO_LORA, tmp_path / "run", model=quantized(llama, bits), trainer=kept)
    execute(assembly, export=True)
    export_model(tmp_path / "run", tmp_path / "first", step=1)
    export_model(tmp_path / "run", tmp_path / "last")
    assert_plain_and_equal(assembly, tmp_path / "last")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "last"))
    assert first.keys() == last.keys() and not all(torch.equal(first[name], last[name]) for name in first)


@needs_bitsandbytes
@both
def test_what_is_measured_is_what_was_exported(
    bits: str, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tropism evaluate` and the cells of a comparison load the exported weights as they are, and the base packed."""
    run = tmp_path / "run"
    changes = {"model": quantized(llama, bits), "total_steps": 1, "eval_data": PROMPTS[:2]}
    execute(assemble(GRPO_LORA, run, **changes), export=True)
    recipe = make_recipe(GRPO_LORA, run, **changes)
    exported, measured = load_file(run / "model" / "model.safetensors"), list[Any]()
    monkeypatch.setattr(
        evaluate, "_score", lambda loaded, base, *_: measured.append(loaded) or {"prompt": [], "base": base}
    )
    tables = evaluate.tables_of(recipe, evaluate.Options(source=str(run)))
    assert len(measured) == 2 and all(
        any(map(is_packed, one.model.modules())) for one in (measured[0], tables["base"]["base"])
    )
    for loaded in (measured[1], trained_model(recipe, run)):
        state = loaded.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in exported.items())


@needs_bitsandbytes
@both
def test_training_goes_on_from_an_adapter(bits: str, llama: str, tmp_path: Path) -> None:
    """The reference is what training began from, a second adapter on the same packed weights."""
    first = execute(assemble(GRPO_LORA, tmp_path / "first", model=quantized(llama, bits)))
    save_adapter(first.policy.model, tmp_path / "adapter")
    second = assemble(GRPO_LORA, tmp_path / "second", model=quantized(str(tmp_path / "adapter"), bits), lora=None)
    rollouts = sample(second)
    torch.testing.assert_close(rollouts.logprobs, sample(first).logprobs, rtol=0, atol=1e-5)
    assert second.reference_scorer is not None
    started = second.reference_scorer.logprobs(rollouts, temperature=1.0)
    execute(second)
    again = second.reference_scorer.logprobs(rollouts, temperature=1.0)
    torch.testing.assert_close(again, started, rtol=0, atol=0)
    assert not torch.equal(second.scorer.logprobs(rollouts, temperature=1.0), started)


@needs_bitsandbytes
@both
def test_an_interrupted_run_is_resumed_bit_for_bit(bits: str, llama: str, tmp_path: Path) -> None:
    """A checkpoint holds the adapter alone; the packed weights come from the model's files."""
    model = quantized(llama, bits)
    whole = execute(assemble(GRPO_LORA, tmp_path / "whole", model=model))
    first = assemble(GRPO_LORA, tmp_path / "first", model=model)
    stop_after(first, 5, signal.SIGTERM)
    with pytest.raises(Interrupted):
        execute(first)
    saved = read_checkpoint(list_checkpoints(tmp_path / "first" / "checkpoints")[-1])
    assert all(".lora_" in name for name in saved.tensors["policy"])
    second = execute(assemble(GRPO_LORA, tmp_path / "first", model=model, resume=True))
    assert_same(weights_of(second), weights_of(whole))
    assert logged(tmp_path / "first", "update") == logged(tmp_path / "whole", "update")


@needs_bitsandbytes
@both
def test_the_memory_estimate_counts_packed_weights(bits: str, llama: str, tmp_path: Path) -> None:
    whole, packed = (
        assemble(GRPO_LORA, tmp_path / str(model.quantization), model=model).memory.estimate
        for model in (ModelConfig(name=llama, device="cpu"), quantized(llama, bits))
    )
    # Of 2 blocks: 4 matrices for attention (64 x 64, and 32 x 64 for keys and values), 3 of the feed-forward part.
    numbers = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    size = 1 if bits == "8bit" else 0.5
    assert whole.lasting["weights"] - packed.lasting["weights"] == round(numbers * (4 - size))
    assert packed.phases["saving"] == whole.phases["saving"]


@needs_bitsandbytes
def test_a_model_that_was_packed_elsewhere_is_not_trained_whole(llama: str, tmp_path: Path) -> None:
    loaded = load_model(quantized(llama, "8bit"))
    with pytest.raises(ConfigError, match=r"has quantised weights, and packed weights cannot be trained"):
        assemble(GRPO_LORA, tmp_path / "run", model=loaded, lora=None)


@needs_bitsandbytes
def test_a_cpu_is_said_to_be_slow(llama: str, caplog: pytest.LogCaptureFixture) -> None:
    load_model(quantized(llama, "4bit"))
    assert "slow on a CPU" in caplog.text
