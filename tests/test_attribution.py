"""Attribution to prompts: functions known by hand, completeness, finite differences, every family's own log-probs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from conditioned_policies import conditioned_policy
from tiny_models import FAMILIES, SEQ2SEQ, tiny_model, tiny_tokenizer
from tropism.attribution import attribute_completion
from tropism.attribution.completions import CompletionLogprobs, attribute_ids, mean_embedding
from tropism.attribution.methods import (
    attribute,
    gradient_x_input,
    integrated_gradients,
    occlusion,
    replaced_embeddings,
)
from tropism.errors import ConfigError, ModelError
from tropism.generation import TextPolicy
from tropism.models.loading import load_model
from tropism.models.policy import Policy
from tropism.types import pad_rows

METHODS = ("integrated_gradients", "gradient_x_input", "occlusion")


class Known:
    """Numbers of tokens whose embeddings have one entry each: a weighted sum, and the square of the sum."""

    def __init__(self, values: list[float]) -> None:
        self.embeddings = torch.tensor(values)[:, None]
        self.mean_embedding = torch.tensor([0.5])
        self.weights = torch.tensor([2.0, -1.0, 4.0])[: len(values)]

    def __call__(self, embeddings: Tensor, kept: Tensor) -> Tensor:
        values = embeddings[..., 0]
        return torch.stack([(values * self.weights[kept]).sum(-1), values.sum(-1) ** 2], dim=-1)


# Functions known by hand ---------------------------------------------------------------------------------------------


def test_gradient_x_input_by_hand() -> None:
    """e = (1, 2, 3): weights times e; and 2 * 6 * e of the square."""
    found = gradient_x_input(Known([1.0, 2.0, 3.0]), each=True)
    assert found.values.tolist() == [[2.0, -2.0, 12.0], [12.0, 24.0, 36.0]]
    assert found.totals.tolist() == [12.0, 36.0]


def test_integrated_gradients_by_hand() -> None:
    """From 0 the square gives e_i * 6 (the mean of 2 * 6 a over a), from 0.5 (e_i - 0.5) * (6 + 1.5)."""
    known = Known([1.0, 2.0, 3.0])
    found = integrated_gradients(known, torch.zeros(1), each=True)
    assert found.values.tolist() == [pytest.approx([2.0, -2.0, 12.0]), pytest.approx([6.0, 12.0, 18.0])]
    assert found.baselines is not None and found.baselines.tolist() == [0.0, 0.0]
    found = integrated_gradients(known, known.mean_embedding, each=True)
    assert found.values[1].tolist() == pytest.approx([3.75, 11.25, 18.75])
    assert found.baselines is not None and found.baselines.tolist() == pytest.approx([2.5, 2.25])
    assert found.gap == pytest.approx(0.0, abs=1e-5)


def test_occlusion_by_hand() -> None:
    """Without each token the square is 25, 16 and 9."""
    found = occlusion(Known([1.0, 2.0, 3.0]), [0, 1, 2], each=True)
    assert found.values.tolist() == [[2.0, -2.0, 12.0], [11.0, 20.0, 27.0]]
    assert occlusion(Known([1.0, 2.0, 3.0]), [2], each=True).values[1].tolist() == [0.0, 0.0, 27.0]


@pytest.mark.parametrize("method", METHODS)
def test_several_numbers_are_added_up(method: Any) -> None:
    known = Known([1.0, 2.0, 3.0])
    apart = attribute(known, method, removable=[0, 1, 2], each=True)
    together = attribute(known, method, removable=[0, 1, 2])
    assert together.values.tolist() == [pytest.approx(apart.values.sum(0).tolist())]
    assert together.totals.tolist() == pytest.approx([48.0])


def test_a_path_that_is_not_smooth_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """A step has no gradient, so no sum of gradients finds what it adds."""

    class Step(Known):
        def __call__(self, embeddings: Tensor, kept: Tensor) -> Tensor:
            return (embeddings[..., 0].sum(-1, keepdim=True) > 3) + 0.0 * embeddings[..., 0].sum(-1, keepdim=True)

    with caplog.at_level(logging.WARNING, logger="tropism"):
        found = integrated_gradients(Step([1.0, 2.0, 3.0]), torch.zeros(1))
    assert found.gap == 1.0 and "miss the difference to their baseline by 1" in caplog.text


# Log-probs of completions --------------------------------------------------------------------------------------------


def text_policy(family: str, **config: Any) -> TextPolicy:
    two_sided = family in SEQ2SEQ
    loaded = load_model(
        (tiny_model(family, seed=3, **config), tiny_tokenizer(add_eos=two_sided, add_bos=not two_sided))
    )
    from tropism.models.policy import Policy

    return TextPolicy(Policy(loaded.model), loaded)


def own_logprobs(policy: TextPolicy, prompt: list[int], ids: list[int]) -> list[float]:
    """The policy's forward pass of training."""
    lengths = torch.tensor([len(prompt)]), torch.tensor([len(ids)])
    with torch.no_grad():
        out = policy.policy(pad_rows([prompt], left=True), lengths[0], pad_rows([ids]), lengths[1])
    assert out.logprobs is not None
    return [float(value) for value in out.logprobs[0]]


PROMPT = [1, 5, 8, 20, 11]
IDS = [9, 31, 12]


@pytest.mark.parametrize("family", [*FAMILIES, *SEQ2SEQ])
def test_every_family_explains_its_own_log_probs(family: str) -> None:
    policy = text_policy(family)
    expected = own_logprobs(policy, PROMPT, IDS)
    found = attribute_ids(policy, PROMPT, IDS, method="gradient_x_input", each_token=True)
    function = CompletionLogprobs(policy.policy, PROMPT, IDS)
    with torch.no_grad():
        values = function(function.embeddings[None], torch.arange(5)[None])[0]
    assert values.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.value == pytest.approx(sum(expected), abs=1e-4)
    assert found.matrix is not None and len(found.matrix) == 3
    columns = [sum(row[place] for row in found.matrix) for place in range(5)]
    assert columns == pytest.approx(list(found.scores), abs=1e-5)
    shorter = own_logprobs(policy, [1, 8, 20, 11], IDS)
    left_out = attribute_ids(policy, PROMPT, IDS, method="occlusion")
    assert left_out.scores[0] == 0 and left_out.parts[0] == "special"  # <bos>
    assert left_out.scores[1] == pytest.approx(sum(expected) - sum(shorter), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "t5", "bart"])
def test_gradient_x_input_is_the_slope_of_scaling_a_token(family: str) -> None:
    policy = text_policy(family).policy.double()
    function = CompletionLogprobs(policy, PROMPT, IDS)
    scores = gradient_x_input(function).values[0]
    kept, step = torch.arange(5)[None], 3e-3  # some norms compute in fp32 all the same
    for place in range(5):
        ends = []
        for sign in (1, -1):
            embeddings = function.embeddings.clone()
            embeddings[place] *= 1 + sign * step
            with torch.no_grad():
                ends.append(float(function(embeddings[None], kept).sum()))
        assert float(scores[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=5e-3, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5", "bart"])
def test_integrated_gradients_are_complete(family: str) -> None:
    policy = text_policy(family)
    found = attribute_ids(policy, PROMPT, IDS, each_token=True)
    assert found.baseline is not None and found.matrix is not None and found.gap is not None
    difference = found.value - found.baseline
    assert sum(found.scores) == pytest.approx(difference, abs=0.03 * abs(difference) + 1e-3)
    function = CompletionLogprobs(policy.policy, PROMPT, IDS)
    mean = policy.policy.input_embedding.weight.detach().mean(0)
    with torch.no_grad():
        start = function(mean.expand(1, 5, -1), torch.arange(5)[None])
    assert found.baseline == pytest.approx(float(start.sum()), abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mbart"])
def test_the_mean_embedding_is_that_of_what_the_model_reads(family: str) -> None:
    """Gemma and mBART scale what they look up."""
    embedding = text_policy(family).policy.input_embedding
    with torch.no_grad():
        answered = embedding(torch.arange(embedding.weight.shape[0])[None])[0]
    assert mean_embedding(embedding).tolist() == pytest.approx(answered.mean(0).tolist(), abs=1e-5)


def test_a_token_that_is_not_read_has_no_score() -> None:
    """With a window of 4 tokens and one layer, the completion's second token cannot see the first of the prompt."""
    policy = text_policy("mistral", num_hidden_layers=1, sliding_window=4)
    for method in METHODS[:2]:
        found = attribute_ids(policy, [1, 5, 8, 20, 11, 17], IDS[:1], method=method)
        assert list(found.scores[:2]) == pytest.approx([0.0, 0.0], abs=1e-9) and abs(found.scores[-1]) > 1e-4


def test_the_policy_is_as_it_was() -> None:
    policy = text_policy("llama")
    before = own_logprobs(policy, PROMPT, IDS)
    for method in METHODS:
        attribute_ids(policy, PROMPT, IDS, method=method)
    assert own_logprobs(policy, PROMPT, IDS) == before
    assert all(parameter.grad is None for parameter in policy.policy.parameters())
    assert "forward" not in vars(policy.policy.input_embedding)


# Text ----------------------------------------------------------------------------------------------------------------


def test_a_text_and_its_pieces() -> None:
    found = attribute_completion(text_policy("llama"), "a cat", " sat")
    assert found.pieces == ("<bos>", "a", " ", "c", "a", "t")
    assert found.parts == ("special", *["prompt"] * 5)
    assert (found.of, found.unit, found.matrix) == ("completion", "nats", None)


def test_each_token_of_the_completion_by_its_text() -> None:
    found = attribute_completion(text_policy("llama"), "a cat", " sat", method="gradient_x_input", each_token=True)
    assert found.rows == (" ", "s", "a", "t")


def test_a_completion_is_sampled_where_none_is_given() -> None:
    policy = text_policy("llama")
    one = attribute_completion(policy, "a cat", seed=4, max_new_tokens=5, method="gradient_x_input")
    other = attribute_completion(policy, "a cat", seed=4, max_new_tokens=5, method="gradient_x_input")
    assert one == other


def test_a_chat() -> None:
    loaded = load_model((tiny_model("llama"), tiny_tokenizer(chat=True)))
    policy = TextPolicy(Policy(loaded.model), loaded)
    found = attribute_completion(policy, [{"role": "user", "content": "hi"}], "so", method="occlusion")
    assert found.pieces == ("<user>", "h", "i", "<assistant>")
    assert found.parts == ("special", "prompt", "prompt", "special")


@pytest.mark.parametrize("mechanism", ["linear", "add", "token"])
def test_what_a_model_is_asked_for_has_a_score(mechanism: Any) -> None:
    policy = conditioned_policy("llama", mechanism)
    found = attribute_completion(policy, "a cat", " sat", target_reward=0.9)
    assert found.pieces.count("<target>") == 1 and found.parts[found.pieces.index("<target>")] == "special"
    assert abs(found.scores[found.pieces.index("<target>")]) > 1e-6
    assert found.baseline is not None
    assert sum(found.scores) == pytest.approx(found.value - found.baseline, rel=0.03)


# What cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradient"}, "Did you mean 'gradient_x_input'"),
        ({"baseline": "zeros"}, "Did you mean 'zero'"),
        ({"completion": ""}, "completion is empty"),
        ({"target_reward": 1.0}, "not trained to be asked"),
        ({"max_new_tokens": 3}, "nothing is sampled"),
        ({"completion": "a" * 200}, "context"),
    ],
)
def test_what_cannot_be_attributed(options: dict[str, Any], message: str) -> None:
    policy = text_policy("gpt2", max_position_embeddings=64)
    with pytest.raises(ConfigError, match=message):
        attribute_completion(policy, "a cat", options.pop("completion", " sat"), **options)


def test_a_prompt_of_one_token_cannot_lose_it() -> None:
    policy = text_policy("llama")
    with pytest.raises(ConfigError, match="no token that can be left out"):
        attribute_ids(policy, [5], IDS, method="occlusion")


def test_a_model_that_does_not_ask_its_embedding() -> None:
    embedding = torch.nn.Embedding(3, 2)
    with pytest.raises(ModelError, match="another way"), replaced_embeddings(embedding, torch.zeros(1, 1, 2)):
        pass
    assert "forward" not in vars(embedding)
