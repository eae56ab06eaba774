"""Training the last blocks trains those and what follows them, and costs nothing below."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import BartConfig, BartForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tiny_models import FAMILIES, tiny_config, tiny_model
from tropism.errors import ModelError
from tropism.models.freezing import is_tied, train_last_layers, transformer_blocks
from tropism.models.heads import ValueHead
from tropism.models.modules import disable_dropout
from tropism.models.policy import Policy

NORM = ("weight", "bias")
TOPS: dict[str, tuple[str, set[str]]] = {
    "gpt2": ("transformer.h", {f"transformer.ln_f.{part}" for part in NORM}),
    "llama": ("model.layers", {"model.norm.weight", "lm_head.weight"}),
    "mistral": ("model.layers", {"model.norm.weight", "lm_head.weight"}),
    "qwen2": ("model.layers", {"model.norm.weight"}),
    "qwen3": ("model.layers", {"model.norm.weight", "lm_head.weight"}),
    "gemma2": ("model.layers", {"model.norm.weight"}),
    "gemma3": ("model.layers", {"model.norm.weight"}),
    "gpt_neox": ("gpt_neox.layers", {*(f"gpt_neox.final_layer_norm.{part}" for part in NORM), "lm_head.weight"}),
    "opt": (
        "model.decoder.layers",
        {*(f"model.decoder.final_layer_norm.{part}" for part in NORM), "model.decoder.project_out.weight"},
    ),
    "bloom": ("transformer.h", {f"transformer.ln_f.{part}" for part in NORM}),
    "phi": ("model.layers", {*(f"model.final_layernorm.{part}" for part in NORM), "lm_head.weight", "lm_head.bias"}),
    "falcon": ("transformer.h", {f"transformer.ln_f.{part}" for part in NORM}),
    "falcon_alibi": ("transformer.h", {f"transformer.ln_f.{part}" for part in NORM}),
}
"""Family -> the name of its blocks, and what is trained beside the last of them."""

ROWS: dict[str, Tensor] = {
    "prompt_ids": torch.tensor([[0, 5, 9], [12, 13, 30]]),
    "prompt_lengths": torch.tensor([2, 3]),
    "completion_ids": torch.tensor([[8, 2, 0], [3, 20, 31]]),
    "completion_lengths": torch.tensor([2, 3]),
}


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Of a loss on log-probs and values, in train mode."""
    policy.train()
    output = policy(**ROWS, want={"logprobs", "values"})
    (output.need("logprobs").sum() + output.need("values").square().sum()).backward()
    policy.eval()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def policy_of(family: str) -> Policy:
    torch.manual_seed(1)
    model = FAMILIES[family]()
    disable_dropout(model)
    return Policy(model, value_head=ValueHead(16 if family == "opt" else 32))


@pytest.mark.parametrize("family", TOPS)
def test_what_is_trained(family: str) -> None:
    blocks, top = TOPS[family]
    model = FAMILIES[family]()
    last = {name for name, _ in model.named_parameters() if name.startswith(f"{blocks}.1.")}
    first = {name for name, _ in model.named_parameters() if name.startswith(f"{blocks}.0.")}
    assert first and last
    train_last_layers(model, 1)
    assert trained(model) == last | top
    train_last_layers(model, 2)
    assert trained(model) == first | last | top
    train_last_layers(model, 1)
    assert trained(model) == last | top
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_family_of_the_tests_is_here() -> None:
    assert TOPS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", TOPS)
def test_gradients_are_those_of_full_training_and_the_value_head_has_its_own(family: str) -> None:
    whole, part = policy_of(family), policy_of(family)
    train_last_layers(part.model, 1)  # type: ignore[arg-type]
    expected, found = gradients(whole), gradients(part)
    names = {f"model.{name}" for name in trained(part.model)} | {f"value_head.{n}" for n in trained(whole.value_head)}  # type: ignore[arg-type]
    assert found.keys() == names
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("family", TOPS)
def test_autograd_records_nothing_below_the_first_trained_block(family: str) -> None:
    policy = policy_of(family)
    train_last_layers(policy.model, 1)  # type: ignore[arg-type]
    blocks = transformer_blocks(policy.model)  # type: ignore[arg-type]
    saved, below = 0, -1
    entering: list[Tensor] = []

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += 1
        return tensor

    def enter(_: nn.Module, positional: Any, named: dict[str, Any]) -> None:
        nonlocal below
        below = saved
        entering.append(positional[0] if positional else named["hidden_states"])

    blocks[1].register_forward_pre_hook(enter, with_kwargs=True)
    policy.train()
    with saved_tensors_hooks(count, lambda tensor: tensor):
        output = policy(**ROWS).need("logprobs")
    assert below == 0
    assert saved > 0 and output.requires_grad
    assert len(entering) == 1
    assert not entering[0].requires_grad


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_gradient_checkpointing_repeats_only_trained_blocks(family: str) -> None:
    plain, saving = policy_of(family), policy_of(family)
    checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    saving.model.gradient_checkpointing_enable(**checkpointing)  # type: ignore[operator]
    for policy in (plain, saving):
        train_last_layers(policy.model, 1)  # type: ignore[arg-type]
    calls = [0, 0]

    def counted(index: int) -> Callable[..., None]:
        def call(*_: Any) -> None:
            calls[index] += 1

        return call

    for index, block in enumerate(transformer_blocks(saving.model)):  # type: ignore[arg-type]
        # The checkpoint begins below the block's own hooks.
        next(m for m in block.modules() if isinstance(m, nn.LayerNorm | LlamaRMSNorm)).register_forward_pre_hook(
            counted(index)
        )
    expected, found = gradients(plain), gradients(saving)
    assert calls == [1, 2]
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-5), name


def test_reentrant_checkpointing_is_refused() -> None:
    model = FAMILIES["llama"]()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ModelError, match="use_reentrant"):
        train_last_layers(model, 1)


@pytest.mark.parametrize("layers", [-1, 3, 30])
def test_a_number_of_blocks_that_is_not_there(layers: int) -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(ModelError, match=f"train_layers is {layers}, and LlamaForCausalLM has 2 transformer blocks"):
        train_last_layers(model, layers)
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_tying_decides_about_the_output_embedding() -> None:
    tied, untied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (True, False))
    for model in (tied, untied):
        train_last_layers(model, 1)
    assert not tied.get_output_embeddings().weight.requires_grad
    assert untied.get_output_embeddings().weight.requires_grad
    assert not untied.get_input_embeddings().weight.requires_grad


@pytest.mark.parametrize("family", TOPS)
def test_pitfall_18_the_head_alone_is_a_matrix_of_its_own(family: str) -> None:
    model = FAMILIES[family]()
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        logits, embedded = model(input_ids=ids).logits, model.get_input_embeddings().weight.clone()
    _, top = TOPS[family]
    train_last_layers(model, 0)
    assert trained(model) == top | {"lm_head.weight"}
    assert not is_tied(model) and model.config.tie_word_embeddings is False
    assert torch.equal(model(input_ids=ids).logits, logits)
    model(input_ids=ids).logits.square().sum().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    model.tie_weights()
    assert torch.equal(model.get_input_embeddings().weight, embedded)
    assert not torch.equal(model.get_output_embeddings().weight, embedded)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_head_cannot_be_untied_where_the_family_reads_more_from_it(family: str) -> None:
    with pytest.raises(ModelError, match="on which more depends"):
        train_last_layers(tiny_model(family), 0)


def test_nothing_left_to_train_is_refused() -> None:
    model: Any = tiny_model("gpt2")
    model.transformer.ln_f = nn.Identity()
    model.lm_head = nn.Linear(32, 37, bias=False)
    model.lm_head.weight = model.transformer.wpe.weight
    with pytest.raises(ModelError, match="train_layers is 0, and nothing of GPT2LMHeadModel is left to train"):
        train_last_layers(model, 0)


def test_the_log_says_once_what_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tropism")
    train_last_layers(tiny_model("gpt2"), 1)
    # A block: 2 norms of 64, attention 32 x 96 + 96 + 32 x 32 + 32, feed-forward 32 x 128 + 128 + 128 x 32 + 32.
    # The model: embeddings 37 x 32 and 64 x 32, two blocks, a norm of 64.
    assert [record.message for record in caplog.records] == [
        "trained: the last 1 of 2 blocks transformer.h (12,704 weights), transformer.ln_f (64 weights); together "
        "12,768 of 28,704 weights, the others stay frozen. The output embedding is tied to the input embedding, and "
        "stays frozen with it"
    ]


def test_of_an_encoder_decoder_the_top_is_that_of_the_decoder() -> None:
    config = BartConfig(
        vocab_size=37, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    train_last_layers(model, 1)
    assert trained(model) == {n for n, _ in model.named_parameters() if n.startswith("model.decoder.layers.1.")}


def test_a_weight_that_a_lower_block_uses_too_stays_frozen() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    train_last_layers(model, 1)
    assert not trained(model.model.layers[1].mlp)
    assert trained(model.model.layers[1].self_attn)


def test_lists_inside_the_blocks_are_not_the_blocks() -> None:
    model: Any = tiny_model("llama")
    model.model.layers[0].experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert transformer_blocks(model) is model.model.layers


def test_blocks_that_cannot_be_told_are_refused() -> None:
    two: Any = tiny_model("llama")
    two.model.more = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(ModelError, match=r"2 lists \(layers, more\)"):
        train_last_layers(two, 1)
    none: Any = tiny_model("llama")
    none.config = tiny_config("llama", num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: 0 lists have as many modules .* \(5\)"):
        train_last_layers(none, 1)
