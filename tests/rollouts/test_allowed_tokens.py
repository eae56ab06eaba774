"""Allowed transitions: what is sampled, and every refusal of a file."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_models import EOS_ID, tiny_model, tiny_tokenizer
from tropism.data.prompts import make_prompts
from tropism.errors import ConfigError
from tropism.generation import TextPolicy
from tropism.models.policy import Policy
from tropism.rollouts.allowed_tokens import AllowedTokens, read_allowed_tokens
from tropism.rollouts.config import Sampling
from tropism.rollouts.randomness import StreamKey
from valued_policies import text_policy, valued_policy

WAYS = {"a": ["b", "c"], "b": ["c", "<eos>"], "c": ["a", "d"], "d": []}


def written(folder: Path, content: Any) -> str:
    path = folder / "ways.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture
def model() -> TextPolicy:
    return text_policy(Policy(tiny_model("llama", seed=2)))


def test_only_allowed_transitions_are_sampled(model: TextPolicy, tmp_path: Path) -> None:
    ways = written(tmp_path, WAYS)
    texts = model.generate(["a", "c", "b"], n=40, max_new_tokens=8, allowed_tokens=ways)
    seen = set()
    for row, text in enumerate(texts):
        whole = "acb"[row // 40] + text
        for before, after in pairwise(whole):
            assert after in WAYS[before]
            seen.add(before + after)
        assert len(text) == 8 or whole[-1] in "bd"  # where a text may end
    assert seen == {"ab", "ac", "bc", "ca", "cd"}
    assert any(len(set(text)) > 2 for text in texts)


def test_logprobs_stay_those_of_the_model(model: TextPolicy, tmp_path: Path) -> None:
    prompts = make_prompts(["d"], model.tokenizer)
    sampling = Sampling(max_new_tokens=4, allowed_tokens=written(tmp_path, WAYS))
    rollouts = model.sampler.generate(model.policy, prompts, sampling, key=StreamKey(seed=0, purpose="checks"))
    assert rollouts.completion_ids.tolist() == [[EOS_ID]]
    assert float(rollouts.behaviour_logprobs[0, 0]) == 0.0 and float(rollouts.logprobs[0, 0]) < -0.1
    with torch.no_grad():
        expected = model.policy(**rollouts.inputs).logprobs
    torch.testing.assert_close(rollouts.logprobs, expected, rtol=0, atol=1e-5)


def test_beside_guidance_by_values(tmp_path: Path) -> None:
    """Guidance comes first; what is forbidden stays so whatever it is worth."""
    model = text_policy(valued_policy())
    ways = written(tmp_path, {"a": ["b", "c"], "b": ["a"], "c": ["a"]})
    texts = model.generate("a", n=20, max_new_tokens=6, allowed_tokens=ways, beta=1000.0)
    assert set("".join(texts)) <= set("abc") and all(len(text) == 6 for text in texts)


def test_a_token_that_is_named_as_a_follower_alone_can_only_end(tmp_path: Path) -> None:
    tokens = read_allowed_tokens(written(tmp_path, {"a": ["b"]}), tiny_tokenizer(), (EOS_ID,), 37)
    (a, b) = tiny_tokenizer()("ab")["input_ids"]
    assert {token: ids.tolist() for token, ids in tokens.followers.items()} == {a: [b], b: [EOS_ID]}


def test_a_prompt_that_ends_with_another_token_is_refused(model: TextPolicy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="says nothing of what may follow the token with the id"):
        model.generate("x", allowed_tokens=written(tmp_path, WAYS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": ["b"], "b": ["kk"]}, "entry 0 of 'b': 'kk' is no token of the model's tokenizer"),
        ({"ab": ["b"]}, "a key: 'ab' is no token"),
        ({"<eoss>": []}, "did you mean '<eos>'?"),
        ({"a": ["b", 3]}, "entry 1 of 'a' is 3, not the text of a token"),
        ({"a": "b"}, "'a' has 'b'; give the list of tokens that may follow it"),
        ({"a": {"b": 1}}, "give the list of tokens"),
        ({}, "must hold an object {token: [tokens that may follow it]}"),
        ([["a", "b"]], "must hold an object"),
        ('{"a": ["b"], "a": ["c"]}', "the key 'a' occurs twice"),
        ('{"a": [', "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
    ],
)
def test_refusals(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_allowed_tokens(written(tmp_path, content), tiny_tokenizer(), (EOS_ID,), 37)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.json cannot be read: No such file"):
        read_allowed_tokens(tmp_path / "none.json", tiny_tokenizer(), (EOS_ID,), 37)


def test_two_texts_of_one_token_are_refused(pieces: Any, tmp_path: Path) -> None:
    """A token as the tokenizer lists it, and the plain text that is this very token."""
    vocabulary = pieces.get_vocab()
    token = next(t for t in vocabulary if len(t) > 3 and t[0] == "\u2581" and t[1:] not in vocabulary)
    tokens = read_allowed_tokens(written(tmp_path, {token: [token[1:]]}), pieces, (1,), 512)
    assert {key: ids.tolist() for key, ids in tokens.followers.items()} == {vocabulary[token]: [vocabulary[token]]}
    with pytest.raises(ConfigError, match="two keys are the token with the id"):
        read_allowed_tokens(written(tmp_path, {token: [], token[1:]: []}), pieces, (1,), 512)


def test_a_dead_end_without_an_eos_is_refused() -> None:
    with pytest.raises(ConfigError, match="lets nothing follow the token with the id 6, and the model has no eos"):
        AllowedTokens({5: [6], 6: []}, ())


def test_a_token_beyond_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'a' has the id 5, beyond the model's vocabulary"):
        read_allowed_tokens(written(tmp_path, {"a": ["a"]}), tiny_tokenizer(), (EOS_ID,), 4)
