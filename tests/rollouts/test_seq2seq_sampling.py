"""The sampler on encoder-decoders: the same tokens whatever the batch, and those of transformers' own generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from slow_sampling import greedy, keyed, log_softmax
from tiny_models import BOS_ID, CHARACTERS, EOS_ID, PAD_ID, SEQ2SEQ, SPECIAL_TOKENS, tiny_model, tiny_tokenizer
from tropism.errors import ConfigError
from tropism.models.heads import ValueHead
from tropism.models.loading import load_model
from tropism.models.policy import Policy
from tropism.rollouts.config import Sampling
from tropism.rollouts.encoded_cache import EncodedCache
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.guidance import RewardGuidance
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.texts import tell_decoder_prefix
from tropism.types import Prompt, Rollouts

KEY = StreamKey(seed=11, collect=3)

# Lengths differ widely; two prompts are equal; some hold pad, bos and eos.
PROMPTS = (
    (5, 9, 30, 8, 11, 7, 14, 2),
    (6, 2),
    (12, 13, 2),
    (6, 2),
    (20, 0, 22, 2, 24, 25, 1, 27, 28, 29, 30),
    (17, 9, 0),
)


@cache
def policy_of(family: str) -> Policy:
    """One shared tiny policy per family; nobody may change it."""
    return Policy(tiny_model(family))


def sample(policy: Any, rows: Sequence[Sequence[int]] = PROMPTS, n: int = 1, **settings: Any) -> Rollouts:
    arguments = {name: settings.pop(name) for name in ("first_index", "filters", "streams") if name in settings}
    sampler = EmbeddedSampler(settings.pop("tokenizer", None), settings.pop("eos", (EOS_ID,)))
    prompts = [Prompt(text="", ids=tuple(row)) for row in rows]
    return sampler.generate(policy, prompts, Sampling(**settings), n, key=KEY, **arguments)


def completions(rollouts: Rollouts) -> list[list[int]]:
    rows = zip(rollouts.completion_ids, rollouts.completion_lengths, strict=True)
    return [row[:length].tolist() for row, length in rows]


def sampled_logprobs(rollouts: Rollouts) -> list[list[float]]:
    rows = zip(rollouts.logprobs, rollouts.completion_lengths, strict=True)
    return [row[:length].tolist() for row, length in rows]


@torch.no_grad()
def slow_completion(
    model: Any, prompt: Sequence[int], choose: Callable[[list[float], int], int], *, new: int
) -> tuple[list[int], list[float]]:
    """Tokens and their log-probs, by a full forward pass through both halves for each token."""
    ids: list[int] = []
    logprobs: list[float] = []
    start = model.config.decoder_start_token_id
    while len(ids) < new and (not ids or ids[-1] != EOS_ID):
        given = {"input_ids": torch.tensor([list(prompt)]), "decoder_input_ids": torch.tensor([[start, *ids]])}
        row = log_softmax(model(**given, use_cache=False).logits[0, -1].double().tolist())
        ids.append(choose(row, len(ids)))
        logprobs.append(row[ids[-1]])
    return ids, logprobs


class Counting:
    """A policy that notes how many rows each pass was given."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.encoded: list[tuple[int, int]] = []
        self.decoded: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    @contextmanager
    def for_sampling(self, *, compiled: bool = False) -> Iterator[Any]:
        with self.policy.for_sampling(compiled=compiled) as model:
            self.model = model
            yield self

    @property
    def cache_dtype(self) -> Any:
        return self.model.cache_dtype

    def encode(self, ids: Tensor, *rest: Any) -> Tensor:
        self.encoded.append((ids.shape[0], ids.shape[1]))
        return self.model.encode(ids, *rest)

    def hidden_states(self, *given: Any) -> Tensor:
        return self.model.hidden_states(*given)

    def decode(self, ids: Tensor, cache: Any) -> Tensor:
        self.decoded.append(ids.shape[0])
        return self.model.decode(ids, cache)

    def values(self, hidden: Tensor) -> Tensor | None:
        return self.model.values(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_greedy_with_a_cache_is_greedy_by_full_forward_passes(family: str) -> None:
    policy = policy_of(family)
    rollouts = sample(policy, temperature=0, max_new_tokens=7, batch_size=4)
    for index, prompt in enumerate(PROMPTS):
        ids, logprobs = slow_completion(policy.model, prompt, greedy, new=7)
        assert completions(rollouts)[index] == ids
        assert sampled_logprobs(rollouts)[index] == pytest.approx(logprobs, abs=1e-5, rel=3e-6)
        assert rollouts.finish_reasons[index] == ("eos" if ids[-1] == EOS_ID else "length")


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_greedy_is_what_transformers_generates(family: str) -> None:
    """With a repetition penalty, too: there it is about what the decoder has read, its start token included."""
    policy, penalty = policy_of(family), 1.7
    ours = completions(sample(policy, temperature=0, max_new_tokens=7, repetition_penalty=penalty))
    for prompt, ids in zip(PROMPTS, ours, strict=True):
        given = torch.tensor([list(prompt)])
        mask = torch.ones_like(given)
        own: Any = policy.model
        made = own.generate(
            given, attention_mask=mask, max_new_tokens=7, do_sample=False, num_beams=1, repetition_penalty=penalty
        )
        assert made[0, 1 : 1 + len(ids)].tolist() == ids


@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "pegasus"])
def test_a_sample_depends_on_its_key_alone(family: str, batch_size: int) -> None:
    """Rows enter while others are in the middle of theirs, so that those of a batch differ in length."""
    policy = policy_of(family)
    rollouts = sample(policy, n=2, max_new_tokens=6, batch_size=batch_size)
    for index, ids in enumerate(completions(rollouts)):
        expected, logprobs = slow_completion(policy.model, PROMPTS[index // 2], keyed(11, index, collect=3), new=6)
        assert ids == expected
        assert sampled_logprobs(rollouts)[index] == pytest.approx(logprobs, abs=1e-5, rel=3e-6)


@pytest.mark.parametrize("family", SEQ2SEQ)
@torch.no_grad()
def test_logprobs_and_values_are_those_of_the_training_forward(family: str) -> None:
    head = ValueHead(32)
    torch.nn.init.normal_(head.linear.weight, generator=torch.Generator().manual_seed(1))
    policy = Policy(tiny_model(family), value_head=head)
    rollouts = sample(policy, n=3, max_new_tokens=9, batch_size=4, temperature=1.3, stop_token_ids=(33, 34, 35, 36))
    assert len(set(rollouts.completion_lengths.tolist())) > 1
    found = policy(**rollouts.inputs, temperature=1.3, want={"logprobs", "values"})
    real = rollouts.completion_mask
    assert float((found.logprobs - rollouts.logprobs)[real].abs().max()) < 1e-5
    assert rollouts.values is not None
    assert float((found.values - rollouts.values)[real].abs().max()) < 1e-4


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_prompt_is_encoded_once_and_ended_rows_are_not_decoded(family: str) -> None:
    counting = Counting(policy_of(family))
    # Every token of the upper half ends a completion, so that rows leave at different times.
    rollouts = sample(counting, n=4, max_new_tokens=8, batch_size=5, stop_token_ids=tuple(range(18, 37)))
    assert sum(rows for rows, _ in counting.encoded) == len(set(PROMPTS))
    # The last token of a row is never decoded, and nothing is computed for rows that have ended.
    assert sum(counting.decoded) == int((rollouts.completion_lengths - 1).sum())
    assert max(counting.decoded) <= 5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_cache_keeps_prompts_beside_their_rows(family: str) -> None:
    """Also where rows are moved into the places of others and longer prompts come after shorter ones."""
    policy = policy_of(family)
    rows = [(5, 2), (20, 21, 22, 23, 24, 25, 26, 2), (6, 7, 2), (9, 2), (30, 29, 28, 27, 2), (8, 2)] * 2
    ends = {"stop_token_ids": tuple(range(20, 37)), "max_new_tokens": 8}
    together = sample(policy, rows, batch_size=3, **ends)
    for index, row in enumerate(rows):
        alone = sample(policy, [row], first_index=index, **ends)
        assert completions(alone)[0] == completions(together)[index]
        assert sampled_logprobs(alone)[0] == pytest.approx(sampled_logprobs(together)[index], abs=1e-5, rel=3e-6)


def test_an_empty_cache_shows_nothing() -> None:
    none = torch.zeros(0, dtype=torch.long)
    cache = EncodedCache(layers=2, slots=3, columns=4, prompt_columns=5, starts=none, prompt_starts=none)
    states, mask = cache.encoder_states()
    assert (cache.rows, cache.cursor) == (0, 0)
    assert mask.shape[0] == states.shape[0] == 0


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_forced_first_token_stands_before_the_completion(family: str) -> None:
    model = tiny_model(family)
    model.generation_config.forced_bos_token_id = 33
    policy = Policy(model)
    ours = completions(sample(policy, temperature=0, max_new_tokens=6))
    for prompt, ids in zip(PROMPTS, ours, strict=True):
        own: Any = model
        given = torch.tensor([list(prompt)])
        made = own.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=7, do_sample=False)[0].tolist()
        assert made[1] == 33 and made[2 : 2 + len(ids)] == ids


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_guidance_by_another_prompt(family: str) -> None:
    """Two streams: the encoder reads a prompt of its own in each, and both decoders the same tokens."""
    policy = policy_of(family)
    own: Any = policy.model
    others = [(7, 7, 2), (8, 2), (9, 2), (10, 2), (11, 2), (12, 13, 14, 2)]
    guided = sample(
        policy,
        temperature=0,
        max_new_tokens=4,
        batch_size=4,
        filters=[RewardGuidance(1.5)],
        streams=[[o] for o in others],
    )
    start = own.config.decoder_start_token_id
    for prompt, other, ids in zip(PROMPTS, others, completions(guided), strict=True):
        for index, token in enumerate(ids):
            decoded = torch.tensor([[start, *ids[:index]]])
            ours, theirs = (
                own(input_ids=torch.tensor([list(read)]), decoder_input_ids=decoded).logits[0, -1].log_softmax(-1)
                for read in (prompt, other)
            )
            assert int((ours + 1.5 * (ours - theirs)).argmax()) == token


def test_stop_strings_and_texts_are_of_the_completion_alone() -> None:
    """The prompt ends with the first half of a stop string, and the tokens of completions are decoded by themselves."""
    tokenizer = tiny_tokenizer()
    loaded = load_model((tiny_model("t5"), tokenizer))
    ids = {character: len(SPECIAL_TOKENS) + place for place, character in enumerate(CHARACTERS)}
    forced = [ids["b"], ids["c"], ids["a"], ids["b"], ids["d"]]

    def spell(logits: Tensor, context: Any) -> Tensor:
        wanted = torch.full_like(logits, -math.inf)
        for row, (read, begin) in enumerate(zip(context.ids, context.prompt_lengths, strict=True)):
            wanted[row, forced[len(read) - begin]] = 0.0
        return wanted

    prompt = (ids["a"], EOS_ID)
    made = sample(Policy(loaded.model), [prompt], tokenizer=tokenizer, filters=[spell], stop=("ab",), max_new_tokens=5)
    assert completions(made) == [forced[:4]] and made.finish_reasons == ("stop",)
    seen = Transcriber(tokenizer, ("ab",))(made, [Prompt(text="a", ids=prompt)])
    assert seen.completions == ["bc"]


class Pieces:
    """A tokenizer of the sentencepiece kind: a text begins without the space of its first word."""

    all_special_ids = ()

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join((" the", " cat", "s")[token] for token in ids).removeprefix(" ")


def test_a_completion_is_a_text_of_its_own() -> None:
    """Behind a prompt of a causal model it begins with a space."""
    tokenizer, prompt = Pieces(), Prompt(text="the", ids=(0,))
    assert Transcriber(tokenizer).completion(prompt, [1, 2]) == " cats"
    tell_decoder_prefix(tokenizer, (0,))
    assert Transcriber(tokenizer).completion(prompt, [1, 2]) == "cats"


def test_stop_strings_are_looked_for_in_that_text() -> None:
    def spell(logits: Tensor, context: Any) -> Tensor:
        wanted = torch.full_like(logits, -math.inf)
        wanted[:, 1 if len(context.ids[0]) == context.prompt_lengths[0] else 2] = 0.0
        return wanted

    settings: dict[str, Any] = {"filters": [spell], "stop": (" cat",), "max_new_tokens": 3, "eos": ()}
    made = sample(policy_of("t5"), [(0,)], tokenizer=Pieces(), **settings)
    assert completions(made) == [[1, 2, 2]] and made.finish_reasons == ("length",)


def test_each_half_has_a_limit_of_its_own() -> None:
    policy = policy_of("bart")
    long = [(5,) * 63 + (EOS_ID,)]
    rollouts = sample(policy, long, max_new_tokens=63, min_new_tokens=63)
    assert rollouts.completion_lengths.tolist() == [63]
    with pytest.raises(ConfigError, match=r"prompt 0 has 65 tokens, and the encoder reads 64 at most"):
        sample(policy, [(5,) * 65], max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"max_new_tokens=64 and the 1 tokens that the decoder begins with exceed"):
        sample(policy, [(5,)], max_new_tokens=64)
    assert sample(policy_of("t5"), [(5,) * 80], max_new_tokens=70, min_new_tokens=70).completion_lengths.tolist() == [
        70
    ]


def test_ends_that_come_early_are_forbidden() -> None:
    rollouts = sample(policy_of("bart"), n=3, min_new_tokens=4, max_new_tokens=5, stop_token_ids=(PAD_ID, BOS_ID))
    assert int(rollouts.completion_lengths.min()) >= 4
