"""The sampler against slow loops: the same tokens whatever the batch, and the model's own log-probs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from decode_steps import needs_compiler
from slow_sampling import (
    PROMPTS,
    greedy,
    keyed,
    log_softmax,
    own_logits,
    policy_of,
    slow_completion,
    slow_draw,
    slow_uniform,
)
from tiny_models import BOS_ID, EOS_ID, FAMILIES, tiny_model
from tropism.errors import ConfigError, NumericsError
from tropism.models.heads import ValueHead
from tropism.models.policy import Policy
from tropism.rollouts import engine
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.types import Prompt, Rollouts

KEY = StreamKey(seed=11, collect=3)


def prompts(rows: Sequence[Sequence[int]] = PROMPTS) -> list[Prompt]:
    return [Prompt(text="", ids=tuple(row)) for row in rows]


def sample(policy: Any, rows: Sequence[Sequence[int]] = PROMPTS, n: int = 1, **settings: Any) -> Rollouts:
    arguments = {name: settings.pop(name) for name in ("first_index", "filters", "streams") if name in settings}
    eos = settings.pop("eos", (EOS_ID,))
    key = settings.pop("key", KEY)
    sampler = EmbeddedSampler(None, eos)
    return sampler.generate(policy, prompts(rows), Sampling(**settings), n, key=key, **arguments)


def completions(rollouts: Rollouts) -> list[list[int]]:
    rows = zip(rollouts.completion_ids, rollouts.completion_lengths, strict=True)
    return [row[:length].tolist() for row, length in rows]


def sampled_logprobs(rollouts: Rollouts) -> list[list[float]]:
    rows = zip(rollouts.logprobs, rollouts.completion_lengths, strict=True)
    return [row[:length].tolist() for row, length in rows]


class Counting:
    """A policy that notes how many rows each forward pass was given, and where the KV slabs lie."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.config, self.device, self.context_length = policy.config, policy.device, policy.context_length
        self.takes_slots, self.decoder_prefix = policy.takes_slots, policy.decoder_prefix
        self.prefills: list[tuple[int, int]] = []
        self.decoded: list[int] = []
        self.slabs: set[tuple[int, ...]] = set()

    @contextmanager
    def for_sampling(self, *, compiled: bool = False) -> Iterator[Any]:
        with self.policy.for_sampling(compiled=compiled) as model:
            self.model, self.cache_dtype = model, model.cache_dtype
            yield self

    def hidden_states(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        self.prefills.append((ids.shape[0], ids.shape[1]))
        return self.model.hidden_states(ids, mask, positions, cache)

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        self.decoded.append(ids.shape[0])
        self.slabs.add(tuple(pointer for slab in cache.slabs for pointer in (slab.keys.data_ptr(), slab.columns)))
        return self.model.decode(ids, cache)

    def values(self, hidden: Tensor) -> Tensor | None:
        return self.model.values(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_a_cache_is_greedy_by_full_forward_passes(family: str) -> None:
    policy = policy_of(family)
    rollouts = sample(policy, temperature=0, max_new_tokens=6, batch_size=4)
    for index, prompt in enumerate(PROMPTS):
        ids, logprobs = slow_completion(policy.model, prompt, greedy, new=6)
        assert completions(rollouts)[index] == ids
        assert sampled_logprobs(rollouts)[index] == pytest.approx(logprobs, abs=1e-5)
        assert rollouts.finish_reasons[index] == ("eos" if ids[-1] == EOS_ID else "length")
    assert not rollouts.behaviour_logprobs.any()
    assert rollouts.temperature == 1.0


@pytest.fixture(params=[False, True], ids=["", "compiled"])
def compiled(request: pytest.FixtureRequest) -> bool:
    if request.param:
        needs_compiler()
    return bool(request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_a_slow_loop_with_the_same_uniforms(family: str, compiled: bool) -> None:
    """Rows leave and enter here: 12 rows, 5 places. Prompts and completions exceed the sliding windows."""
    policy = policy_of(family)
    rollouts = sample(policy, n=2, temperature=0.8, max_new_tokens=8, batch_size=5, first_index=7, compile=compiled)
    for row, ids in enumerate(completions(rollouts)):
        prompt = PROMPTS[row // 2]
        slow_ids, logprobs = slow_completion(
            policy.model,
            prompt,
            keyed(11, 7 + row, collect=3),
            new=8,
            temperature=0.8,
        )
        assert ids == slow_ids
        assert sampled_logprobs(rollouts)[row] == pytest.approx(logprobs, abs=1e-5)
    assert torch.equal(rollouts.logprobs, rollouts.behaviour_logprobs)
    assert rollouts.prompt_lengths.tolist() == [len(p) for p in PROMPTS for _ in range(2)]
    padded = zip(rollouts.prompt_ids, rollouts.prompt_lengths, strict=True)
    assert [row[len(row) - n :].tolist() for row, n in padded] == [list(p) for p in PROMPTS for _ in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_forward_gives_the_logprobs_of_sampling(family: str, compiled: bool) -> None:
    policy = policy_of(family)
    rollouts = sample(policy, n=2, temperature=1.3, top_k=9, max_new_tokens=8, batch_size=3, compile=compiled)
    with torch.no_grad():
        logprobs = policy(**rollouts.inputs, temperature=rollouts.temperature).logprobs
    torch.testing.assert_close(logprobs, rollouts.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma3", "bloom"])
def test_a_sample_depends_on_no_neighbour_order_padding_batch_size_or_n(family: str, compiled: bool) -> None:
    policy = policy_of(family)
    whole = completions(sample(policy, n=2, max_new_tokens=8, compile=compiled))
    assert len({tuple(ids) for ids in whole}) > len(PROMPTS)
    for batch_size in (1, 2, 3, 5):
        assert completions(sample(policy, n=2, max_new_tokens=8, compile=compiled, batch_size=batch_size)) == whole
    for row in range(len(whole)):
        alone = sample(policy, [PROMPTS[row // 2]], first_index=row, max_new_tokens=8, compile=compiled)
        assert completions(alone) == [whole[row]]
    single = [ids for prompt in PROMPTS for ids in [prompt] * 2]
    assert completions(sample(policy, single, max_new_tokens=8, compile=compiled)) == whole
    # Long neighbours add padding to the short prompts, and the last samples keep their index.
    half = sample(policy, PROMPTS[3:], n=2, first_index=6, max_new_tokens=8, compile=compiled)
    assert completions(half) == whole[6:]
    long = sample(policy, [*PROMPTS, tuple(range(3, 33))], n=2, max_new_tokens=8, compile=compiled)
    assert completions(long)[:-2] == whole


def test_seed_purpose_collect_and_index_each_change_the_samples() -> None:
    policy = policy_of("llama")
    keys = [
        StreamKey(seed=0),
        StreamKey(seed=1),
        StreamKey(seed=0, purpose="evaluation"),
        StreamKey(seed=0, collect=1),
    ]
    found = {str(completions(sample(policy, n=2, key=key, max_new_tokens=6))) for key in keys}
    found.add(str(completions(sample(policy, n=2, key=keys[0], first_index=100, max_new_tokens=6))))
    assert len(found) == 5
    again = sample(policy, n=2, key=StreamKey(seed=0), max_new_tokens=6)
    assert str(completions(again)) in found


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "bloom"])
@pytest.mark.parametrize("slack", [1, 2, 5])
def test_rows_stay_exact_when_the_cache_is_full_and_shifts(
    family: str, slack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 1 and of 20 tokens take turns in two places of a cache without room to spare."""
    monkeypatch.setattr(engine, "SLACK", slack)
    policy = policy_of(family)
    rows = [(6,), tuple(range(4, 24)), (8, 9), (30,), tuple(range(10, 29)), (12, 3, 4, 5), (9,), (31, 5)]
    rollouts = sample(policy, rows, max_new_tokens=7, batch_size=2, eos=(EOS_ID, 7, 9, 11, 30))
    assert len(set(rollouts.completion_lengths.tolist())) > 2
    for row, prompt in enumerate(rows):
        alone = sample(policy, [prompt], max_new_tokens=7, first_index=row, eos=(EOS_ID, 7, 9, 11, 30))
        assert completions(alone) == [completions(rollouts)[row]]
        assert sampled_logprobs(alone)[0] == pytest.approx(sampled_logprobs(rollouts)[row], abs=1e-5)


def test_equal_prompts_share_one_prefill_also_across_batches() -> None:
    counting = Counting(policy_of("llama"))
    sample(counting, [(5, 6, 7), (8, 9), (5, 6, 7)], n=4, max_new_tokens=5, batch_size=3)
    assert counting.prefills == [(1, 3), (1, 2)]
    counting = Counting(policy_of("llama"))
    sample(counting, [(5, 6, 7), (8, 9), (5, 6, 7)], n=4, max_new_tokens=5, batch_size=12)
    assert counting.prefills == [(2, 3)]


def test_no_row_is_computed_again_after_its_end_and_the_cache_is_allocated_once() -> None:
    counting = Counting(policy_of("phi"))
    rollouts = sample(counting, n=4, max_new_tokens=12, batch_size=8)
    lengths = rollouts.completion_lengths.tolist()
    assert min(lengths) < 12
    # Each token but the last of a completion is fed to one decode step; the prefill gives the first.
    assert sum(counting.decoded) == sum(length - 1 for length in lengths)
    assert max(counting.decoded) <= 8
    assert len(counting.slabs) == 1


def test_one_place_decodes_rows_one_after_another() -> None:
    counting = Counting(policy_of("llama"))
    sample(counting, n=1, max_new_tokens=4, batch_size=1)
    assert set(counting.decoded) == {1}
    assert [rows for rows, _ in counting.prefills] == [1] * 5  # two of the six prompts are equal


def test_min_new_tokens_forbids_eos_and_stop_tokens_early_and_nothing_else() -> None:
    policy = policy_of("llama")
    plain = sample(policy, n=8, max_new_tokens=6, stop_token_ids=(9, 14))
    assert (plain.completion_lengths < 4).any()
    rollouts = sample(policy, n=8, max_new_tokens=6, min_new_tokens=4, stop_token_ids=(9, 14))
    assert (rollouts.completion_lengths >= 4).all()
    assert not torch.isin(rollouts.completion_ids[:, :3], torch.tensor([EOS_ID, 9, 14])).any()
    assert {"stop", "length"} <= set(rollouts.finish_reasons)
    for row, ids in enumerate(completions(rollouts)):
        for t in range(3):
            logprobs = log_softmax(own_logits(policy.model, [*PROMPTS[row // 8], *ids[:t]])[-1].tolist())
            allowed = [2.718281828459045**x if v not in (EOS_ID, 9, 14) else 0.0 for v, x in enumerate(logprobs)]
            assert ids[t] == slow_draw(allowed, slow_uniform(11, "training", 3, row, t))
            assert float(rollouts.logprobs[row, t]) == pytest.approx(logprobs[ids[t]], abs=1e-5)
            behaviour = torch.tensor(allowed[ids[t]] / sum(allowed)).log()
            assert float(rollouts.behaviour_logprobs[row, t]) == pytest.approx(float(behaviour), abs=1e-5)


def test_logprobs_are_tempered_and_unfiltered_and_behaviour_logprobs_those_sampled_from() -> None:
    policy = policy_of("gpt2")
    rollouts = sample(policy, max_new_tokens=6, temperature=0.7, top_k=4, repetition_penalty=1.5)
    for row, ids in enumerate(completions(rollouts)):
        seen = list(PROMPTS[row])
        for t, token in enumerate(ids):
            raw = own_logits(policy.model, seen)[-1].tolist()
            assert float(rollouts.logprobs[row, t]) == pytest.approx(log_softmax(raw, 0.7)[token], abs=1e-5)
            penalised = [(x / 1.5 if x > 0 else x * 1.5) if v in seen else x for v, x in enumerate(raw)]
            kept = sorted(range(37), key=lambda v: -penalised[v])[:4]
            assert token in kept
            among = log_softmax([penalised[v] for v in kept], 0.7)[kept.index(token)]
            assert float(rollouts.behaviour_logprobs[row, t]) == pytest.approx(among, abs=1e-5)
            seen.append(token)


def test_the_first_of_several_ends_wins_and_max_new_tokens_one_works() -> None:
    policy = policy_of("bloom")
    rollouts = sample(policy, n=6, max_new_tokens=1, stop_token_ids=(EOS_ID,))
    assert rollouts.completion_lengths.tolist() == [1] * 36
    for ids, reason in zip(completions(rollouts), rollouts.finish_reasons, strict=True):
        assert reason == ("eos" if ids[-1] == EOS_ID else "length")
    assert rollouts.truncated.tolist() == [reason == "length" for reason in rollouts.finish_reasons]


def test_a_prompt_of_special_tokens_ends_nothing_early() -> None:
    policy = policy_of("llama")
    rows = [(EOS_ID, 5, 6), (EOS_ID,), (0, 0, BOS_ID), (5, EOS_ID, EOS_ID)]
    rollouts = sample(policy, rows, n=3, max_new_tokens=6)
    for row, ids in enumerate(completions(rollouts)):
        slow_ids, _ = slow_completion(policy.model, rows[row // 3], keyed(11, row, collect=3), new=6)
        assert ids == slow_ids


def test_without_an_eos_only_the_length_ends_a_completion() -> None:
    rollouts = sample(policy_of("llama"), n=4, max_new_tokens=9, eos=())
    assert set(rollouts.finish_reasons) == {"length"}
    assert (rollouts.completion_ids == EOS_ID).any()


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "no prompts"),
        ([()], {}, "prompt 0 has no tokens"),
        ([(5,), tuple([5] * 60)], {"max_new_tokens": 5}, "prompt 1 has 60 tokens; with max_new_tokens=5 .* of 64"),
        ([(5,)], {"n": 0}, "n is 0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(rows: list[tuple[int, ...]], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(policy_of("llama"), rows, **settings)


def test_a_row_may_fill_the_context_exactly() -> None:
    for family in ("gpt2", "llama", "opt"):
        policy = policy_of(family)
        prompt = tuple(3 + i % 30 for i in range(60))
        rollouts = sample(policy, [prompt, (5,)], max_new_tokens=4, eos=())
        assert (
            completions(rollouts)[0]
            == slow_completion(policy.model, prompt, keyed(11, 0, collect=3), new=4, eos=None)[0]
        )


def test_logits_that_are_not_numbers_are_an_error_not_a_token() -> None:
    policy = Policy(tiny_model("llama"))
    with torch.no_grad():
        policy.language_model.model.norm.weight[0] = torch.nan
    for temperature in (1.0, 0.0):
        with pytest.raises(NumericsError, match="not finite"):
            sample(policy, max_new_tokens=3, temperature=temperature)


def test_a_filter_that_forbids_every_token_is_an_error() -> None:
    for temperature in (1.0, 0.0):
        with pytest.raises(NumericsError, match="keep at least one token"):
            sample(
                policy_of("llama"),
                max_new_tokens=3,
                temperature=temperature,
                filters=[lambda logits, _: torch.full_like(logits, -torch.inf)],
            )


def test_the_order_of_rows_in_the_batch_does_not_hang_on_memory_addresses() -> None:
    """Rows enter in the order they wait, so that equal runs compute equal batches, bit for bit."""
    seen: list[list[list[list[int]]]] = []
    for _ in range(2):
        batches: list[list[list[int]]] = []

        def note(logits: Tensor, context: Any, batches: list[list[list[int]]] = batches) -> Tensor:
            batches.append([list(ids) for ids in context.ids])
            return logits

        filler = [torch.zeros(size) for size in range(len(seen) * 50)]
        sample(policy_of("llama"), n=3, max_new_tokens=6, batch_size=4, filters=[note])
        del filler
        seen.append(batches)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_values_of_the_critic_are_those_of_the_training_forward(family: str) -> None:
    policy = Policy(tiny_model(family), value_head=ValueHead(32))
    assert policy.value_head is not None
    torch.nn.init.normal_(policy.value_head.linear.weight, generator=torch.Generator().manual_seed(0))
    rollouts = sample(policy, max_new_tokens=6, batch_size=3)
    with torch.no_grad():
        own = policy(**rollouts.inputs, want={"values"}).need("values")
    assert rollouts.values is not None and rollouts.values.abs().max() > 0.1
    torch.testing.assert_close(rollouts.values, own, rtol=1e-4, atol=1e-5)
    assert sample(policy_of(family), max_new_tokens=2).values is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_weights_in_half_precision_sample_without_autocast(family: str, dtype: torch.dtype) -> None:
    """On any CPU; log-probs are near those that the same weights give in fp32."""
    policy = Policy(tiny_model(family).to(dtype))
    rollouts = sample(policy, n=2, max_new_tokens=5, eos=())
    model = policy.language_model.float()
    for prompt, ids, sampled in zip(
        [row for row in PROMPTS for _ in range(2)], completions(rollouts), sampled_logprobs(rollouts), strict=True
    ):
        logits = own_logits(model, [*prompt, *ids])[len(prompt) - 1 : -1]
        exact = [log_softmax(row.tolist())[token] for row, token in zip(logits, ids, strict=True)]
        assert sampled == pytest.approx(exact, abs=0.1)
