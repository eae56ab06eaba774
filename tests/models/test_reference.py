"""The reference is the policy before training: bit for bit, for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from tiny_models import FAMILIES, tiny_model
from tropism.errors import ModelError
from tropism.models.freezing import train_last_layers
from tropism.models.heads import ValueHead
from tropism.models.lora import LoRA, add_lora, add_reference_adapter
from tropism.models.policy import Policy
from tropism.models.reference import Reference
from tropism.types import Tokens, pad_rows

PROMPTS = ((5, 9, 30), (6,), (12, 13))
COMPLETIONS = ((8, 2), (3, 20, 31, 9), (7,))
BATCH = Tokens(
    prompt_ids=pad_rows(PROMPTS, left=True),
    prompt_lengths=torch.tensor([3, 1, 2]),
    completion_ids=pad_rows(COMPLETIONS),
    completion_lengths=torch.tensor([2, 4, 1]),
)


def logprobs(policy: Policy) -> Tensor:
    result = policy(**BATCH.inputs, temperature=0.8).logprobs
    assert isinstance(result, Tensor)
    return result


@torch.no_grad()
def reference_logprobs(reference: Reference) -> Tensor:
    with reference.active() as model:
        return logprobs(model)


def train(policy: Policy, steps: int = 3) -> None:
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        output = policy(**BATCH.inputs, want={"logprobs"})
        (-output.logprobs.sum()).backward()
        optimizer.step()


def scramble(named: Iterable[tuple[str, nn.Parameter]], part: str) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in named:
            if part in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def full(family: str) -> Policy:
    return Policy(FAMILIES[family](), value_head=ValueHead(32))


def fresh_adapter(family: str) -> Policy:
    return Policy(add_lora(FAMILIES[family](), LoRA(rank=4), seed=0), value_head=ValueHead(32))


def trained_adapter(family: str) -> Policy:
    model = add_lora(FAMILIES[family](), LoRA(rank=4), seed=0)
    scramble(model.named_parameters(), "lora_B")
    add_reference_adapter(model)
    return Policy(model, value_head=ValueHead(32))


STARTS: dict[str, Callable[[str], Policy]] = {
    "copy": full,
    "disabled": fresh_adapter,
    "adapter": trained_adapter,
}


def trainable(policy: Policy) -> set[str]:
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", STARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_policy_exactly_at_first_and_stays_while_the_policy_moves(family: str, kind: str) -> None:
    policy = STARTS[kind](family)
    reference = Reference(policy)
    assert reference.kind == kind
    start = logprobs(policy).detach()
    assert torch.equal(reference_logprobs(reference), start)
    trains = trainable(policy)
    train(policy)
    assert (logprobs(policy) - start).abs().max() > 0.1
    assert torch.equal(reference_logprobs(reference), start)
    assert trainable(policy) == trains


@pytest.mark.parametrize("kind", STARTS)
def test_the_policy_is_itself_again_after_the_block_even_after_an_error(kind: str) -> None:
    policy = STARTS[kind]("llama")
    reference = Reference(policy)
    train(policy)
    moved, trains = logprobs(policy).detach(), trainable(policy)

    def fail_inside() -> None:
        with reference.active():
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(logprobs(policy), moved)
    assert trainable(policy) == trains
    with reference.active() as model, torch.no_grad():
        logprobs(model)
        with reference.active() as again:
            logprobs(again)
    assert torch.equal(logprobs(policy), moved)
    assert trainable(policy) == trains


@pytest.mark.parametrize("kind", STARTS)
def test_training_works_after_the_reference_was_asked_and_moves_only_what_trains(kind: str) -> None:
    """The gradient of a policy that alternates with its reference is that of one that has none."""
    alone, beside = STARTS[kind]("qwen3"), STARTS[kind]("qwen3")
    reference = Reference(beside)
    train(alone, steps=2)
    for _ in range(2):
        reference_logprobs(reference)
    train(beside, steps=2)
    for (name, mine), (_, other) in zip(alone.named_parameters(), beside.named_parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_tied_embeddings_are_copied_as_one_and_stay() -> None:
    policy = Policy(tiny_model("qwen2"))
    embedding = policy.language_model.get_input_embeddings().weight
    assert embedding is policy.language_model.get_output_embeddings().weight
    reference = Reference(policy)
    copied = reference.frozen.language_model
    assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight
    assert copied.get_input_embeddings().weight is not embedding
    before, start = embedding.detach().clone(), reference_logprobs(reference)
    train(policy)
    assert not torch.equal(embedding, before)
    assert torch.equal(copied.get_input_embeddings().weight, before)
    assert torch.equal(reference_logprobs(reference), start)


def test_a_copy_trains_nothing_and_has_no_head() -> None:
    reference = Reference(full("gpt2"))
    assert not any(parameter.requires_grad for parameter in reference.frozen.parameters())
    assert reference.frozen.value_head is None
    assert reference.frozen.chunk_size == reference.policy.chunk_size


def test_an_adapter_that_training_started_from_is_not_the_base_model() -> None:
    policy = trained_adapter("llama")
    with policy.model.disable_adapter(), torch.no_grad():  # type: ignore[operator]
        base = logprobs(policy)
    assert (reference_logprobs(Reference(policy)) - base).abs().max() > 0.1


def last_block(family: str) -> Policy:
    policy = full(family)
    train_last_layers(policy.model, 1)  # type: ignore[arg-type]
    return policy


def storages(model: nn.Module) -> dict[int, int]:
    """Address and bytes of every memory block that holds a parameter or buffer."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_layers_are_shared_and_the_copied_ones_stay(family: str) -> None:
    policy = last_block(family)
    reference = Reference(policy)
    assert reference.kind == "copy"
    copied = dict(reference.frozen.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        assert (copied[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
        assert not copied[name].requires_grad
    buffers = dict(reference.frozen.model.named_buffers())
    assert all(buffers[name] is buffer for name, buffer in policy.model.named_buffers())
    start, trains = logprobs(policy).detach(), trainable(policy)
    assert torch.equal(reference_logprobs(reference), start)
    train(policy)
    assert (logprobs(policy) - start).abs().max() > 0.05
    assert torch.equal(reference_logprobs(reference), start)
    assert trainable(policy) == trains


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_of_a_copy_is_that_of_the_trained_weights(family: str) -> None:
    for policy in (full(family), last_block(family)):
        reference = Reference(policy)
        own = storages(reference.frozen.model).items() - storages(policy.model).items()
        assert sum(size for _, size in own) == sum(4 * p.numel() for p in policy.model.parameters() if p.requires_grad)


def test_weights_that_are_shared_cannot_be_trained_later() -> None:
    policy = last_block("llama")
    reference = Reference(policy)
    policy.model.requires_grad_(True)
    with pytest.raises(ModelError, match="make the reference after choosing what is trained"):
        reference_logprobs(reference)
