"""Embeddings of reward slots: where each mechanism starts, and which models can see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slots_by_hand import logits_by_hand, slot_vectors
from tiny_models import BOS_ID, EOS_ID, FAMILIES, tiny_model, tiny_tokenizer
from tropism.errors import ModelError
from tropism.generation import make_conditioner, slots_for
from tropism.models.conditioning import HIDDEN, RewardSlots, make_slots
from tropism.models.loading import load_model
from tropism.models.policy import Policy
from tropism.models.slot_checks import probe_slots
from tropism.ops.slots import slot_id
from tropism.targets.config import Conditioning, Mechanism

LAYER_NORM = ("gpt2", "gpt_neox", "opt", "bloom", "phi", "falcon", "falcon_alibi")
RMS_NORM = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def started(model: Any, mechanism: Mechanism, *, rewards: int = 2, seed: int = 0, ones: bool = False) -> RewardSlots:
    slots = make_slots(model, mechanism=mechanism, rewards=rewards, bins=5, base_id=BOS_ID)
    slots.start(model.get_input_embeddings(), seed=seed, ones=ones)
    return slots


def row_logits(policy: Policy, ids: list[int]) -> Tensor:
    """[V] after a row, as the policy computes it."""
    row = torch.tensor([ids])
    mask = torch.ones_like(row, dtype=torch.bool)
    with torch.no_grad():
        return policy.logits(policy.hidden_states(row, mask, torch.arange(len(ids))[None]))[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_starts_as_one_more_base_token_exactly(family: str) -> None:
    model = tiny_model(family)
    policy = Policy(model, conditioning=started(model, "linear"))
    text = [9, 30, 8, 11]
    plain = row_logits(policy, [BOS_ID, BOS_ID, *text])
    for values in ((0.7, -3.0), (None, 12.0), (None, None)):
        assert torch.equal(row_logits(policy, [slot_id(0, values[0]), slot_id(1, values[1]), *text]), plain)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_fixed_directions_have_the_length_of_an_embedding(family: str) -> None:
    model = tiny_model(family)
    embedding = model.get_input_embeddings()
    slots = started(model, "add")
    answers = embedding(torch.arange(37))
    lengths = slots.direction.norm(dim=-1)
    torch.testing.assert_close(lengths, answers.norm(dim=-1).mean().expand(2), rtol=1e-4, atol=0)
    assert abs(float(torch.cosine_similarity(slots.direction[0], slots.direction[1], dim=0))) < 0.7
    torch.testing.assert_close(slots.open, answers[BOS_ID].expand(2, -1))
    assert {name for name, _ in slots.named_parameters()} == {"open"}, "a direction is not trained"
    assert torch.equal(started(model, "add").direction, slots.direction)
    assert not torch.equal(started(model, "add", seed=1).direction, slots.direction)
    assert started(model, "replace", ones=True).direction.unique().tolist() == [1.0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_control_tokens_are_drawn_like_the_embeddings(family: str) -> None:
    model: Any = tiny_model(family)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.add_(0.3)
    table = started(model, "token", rewards=40).table.detach()
    answers = embedding(torch.arange(37)).detach()
    assert float(table.mean()) == pytest.approx(float(answers.mean()), rel=0.05)
    assert float(table.std()) == pytest.approx(float(answers.std()), rel=0.05)


@pytest.mark.parametrize("mechanism", ["token", "add", "replace"])
def test_a_base_token_of_zeros_gives_no_zeros(mechanism: Mechanism) -> None:
    """Rows of pads are zero in many models, and bos or eos may be the pad."""
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS_ID] = 0.0
    slots = started(model, mechanism)
    own = slots.table if mechanism == "token" else slots.direction
    assert bool((own.norm(dim=-1) > 0.5).all())


def test_the_base_token_is_bos_or_else_eos() -> None:
    for tokenizer, base in ((tiny_tokenizer(), BOS_ID), (tiny_tokenizer(bos=False), EOS_ID)):
        assert slots_for(Conditioning(), load_model((tiny_model("gpt2"), tokenizer))).base_id == base


def test_adding_follows_the_base_token_as_it_is_trained() -> None:
    model: Any = tiny_model("llama")
    slots = started(model, "add", rewards=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS_ID].add_(torch.randn(32, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        wanted = logits_by_hand(model, slot_vectors(slots, model, [0.5]), [7, 8])[-1]
    found = row_logits(Policy(model, conditioning=slots), [slot_id(0, 0.5), 7, 8])
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)


def test_slots_keep_their_precision_in_a_bf16_model() -> None:
    model: Any = tiny_model("llama")
    model.to(torch.bfloat16)
    slots = started(model, "linear")
    assert slots.weight.dtype == torch.float32
    answer = slots(torch.tensor([slot_id(0, 1.0)]), model.get_input_embeddings().weight[BOS_ID])
    assert answer.dtype == torch.bfloat16


def test_what_has_no_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="linear, add, replace, token"):
        RewardSlots("text", rewards=1, bins=2, base_id=1, size=4)

    class Strange(nn.Module):
        def get_input_embeddings(self) -> nn.Module:
            return nn.Identity()

    with pytest.raises(ModelError, match=r"Strange has no plain input embedding.*mechanism text"):
        make_slots(Strange(), mechanism="linear", rewards=1, bins=2, base_id=1)


# ---- the probe -------------------------------------------------------------------------------------------------------


def probed(
    family: str, mechanism: Mechanism, direction: str, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> None:
    if family == "opt":  # the tiny one has embeddings of another width than its layers, as only OPT-350m has
        changes = {"word_embed_proj_dim": 32, **changes}
    model: Any = tiny_model(family, **changes)
    loaded = load_model((model.to(dtype), tiny_tokenizer()))
    config = Conditioning(mechanism=mechanism, direction=direction)  # type: ignore[arg-type]
    slots = slots_for(config, loaded)
    slots.start(loaded.model.get_input_embeddings(), seed=0, ones=direction == "ones")
    probe_slots(Policy(loaded.model, conditioning=slots), make_conditioner(config, loaded))


@pytest.mark.parametrize("mechanism", ["add", "replace"])
@pytest.mark.parametrize("family", LAYER_NORM)
def test_one_in_every_dimension_is_refused_where_layernorm_removes_it(family: str, mechanism: Mechanism) -> None:
    with pytest.raises(ModelError, match=r"moves no logit.*LayerNorm.*algorithm\.direction to random"):
        probed(family, mechanism, "ones")


@pytest.mark.parametrize("mechanism", ["add", "replace"])
@pytest.mark.parametrize("family", RMS_NORM)
def test_one_in_every_dimension_works_with_rmsnorm(family: str, mechanism: Mechanism) -> None:
    probed(family, mechanism, "ones")


def test_one_in_every_dimension_is_something_else_behind_a_projection() -> None:
    probed("opt", "add", "ones", word_embed_proj_dim=16)


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_rounding_is_not_taken_for_an_effect(family: str) -> None:
    with pytest.raises(ModelError, match="moves no logit"):
        probed(family, "add", "ones", dtype=torch.bfloat16)
    probed(family, "add", "random", dtype=torch.bfloat16)


@pytest.mark.parametrize("mechanism", HIDDEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_directions_and_learned_slots_work_everywhere(family: str, mechanism: Mechanism) -> None:
    probed(family, mechanism, "random")


def test_every_family_of_the_tests_is_probed() -> None:
    assert {*LAYER_NORM, *RMS_NORM} == FAMILIES.keys()


def test_a_family_that_does_not_read_its_slots_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model((tiny_model("llama"), tiny_tokenizer()))
    config = Conditioning()
    slots = slots_for(config, loaded)
    slots.start(loaded.model.get_input_embeddings(), seed=0, ones=False)
    policy = Policy(loaded.model, conditioning=slots)
    inner = policy.hidden_states

    def blind(ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        kept = ids[:, int((ids[0] < 0).sum()) :]
        return inner(kept, torch.ones_like(kept, dtype=torch.bool), torch.arange(kept.shape[1])[None], cache)

    monkeypatch.setattr(policy, "hidden_states", blind)
    with pytest.raises(ModelError, match=r"is not supported with slots.*mechanism text"):
        probe_slots(policy, make_conditioner(config, loaded))


def test_plain_policies_are_not_probed() -> None:
    probe_slots(Policy(tiny_model("gpt2")), None)
