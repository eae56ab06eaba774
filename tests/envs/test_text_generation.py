"""The token-level environment: what is observed, what a step costs, and where completions end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from conditioned_policies import conditioned_policy
from decode_steps import needs_compiler
from tiny_models import EOS_ID, VOCABULARY, tiny_model, tiny_tokenizer
from tropism import TextGenerationEnv, TextPolicy
from tropism.errors import ModelError
from tropism.models.sampling_model import SamplingModel
from tropism.rollouts.config import Sampling
from tropism.rollouts.distribution import truncate

pytest.importorskip("gymnasium")
checker = pytest.importorskip("gymnasium.utils.env_checker")

FAMILIES = ("llama", "gpt2", "gemma2", "bloom", "opt", "falcon_alibi", "t5", "bart")
A, B, C = 5, 6, 7
"""Token ids of the letters a, b and c."""


def count_a(completions: list[str]) -> list[float]:
    return [float(text.count("a")) for text in completions]


def make(family: str = "llama", items: Any = ("hello", "ab"), **options: Any) -> TextGenerationEnv:
    options.setdefault("reward", count_a)
    options.setdefault("max_new_tokens", 6)
    return TextGenerationEnv((tiny_model(family), tiny_tokenizer()), list(items), **options)


@torch.no_grad()
def read_again(env: TextGenerationEnv, model: PreTrainedModel, sample: int, layer: int = -1) -> tuple[Any, Any]:
    """Last hidden state and next-token logits of plain transformers, over the whole text and without a cache."""
    completion = env.completions[sample]
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id, *completion]
        inputs = {"input_ids": torch.tensor([env.prompt_ids]), "decoder_input_ids": torch.tensor([start])}
        given = model(**inputs, output_hidden_states=True, use_cache=False)
        return given.decoder_hidden_states[layer][0, -1], given.logits[0, -1]
    ids = torch.tensor([[*env.prompt_ids, *completion]])
    given = model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False)
    states = given.hidden_states[layer]
    if layer == -1:  # some families project it once more (OPT)
        states = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
    return states[0, -1], given.logits[0, -1]


def assert_observes(env: TextGenerationEnv, model: PreTrainedModel, observed: Any, layer: int = -1) -> None:
    rows = np.asarray(observed).reshape(env.compare_sample, -1)
    for sample in range(env.compare_sample):
        hidden, logits = read_again(env, model, sample, layer)
        np.testing.assert_allclose(rows[sample], hidden.numpy(), atol=1e-4)
        if env.finish_reasons[sample] is None:
            torch.testing.assert_close(env.logits()[sample], logits, atol=1e-4, rtol=1e-4)


# Observations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_observes_what_one_uncached_pass_over_the_text_would(family: str, compiled: bool) -> None:
    if compiled:
        needs_compiler()
    model, random = tiny_model(family), np.random.default_rng(0)
    env = TextGenerationEnv(
        (model, tiny_tokenizer()), ["hello", "ab"], count_a, max_new_tokens=7, compare_sample=3, compile=compiled
    )
    for item in (0, 1):
        observed, _ = env.reset(options={"item": item})
        assert_observes(env, model, observed)
        over = False
        while not over:
            action = random.integers(3, VOCABULARY, size=3)
            observed, _, terminated, truncated, _ = env.step(action)
            assert_observes(env, model, observed)
            over = terminated or truncated


@pytest.mark.parametrize("family", ["llama", "opt", "bart"])
@pytest.mark.parametrize("layer", [-2, -3])
def test_the_states_of_a_layer_below_are_those_of_transformers(family: str, layer: int) -> None:
    model = tiny_model(family)
    env = TextGenerationEnv((model, tiny_tokenizer()), ["hello"], count_a, max_new_tokens=5, layer=layer)
    observed, _ = env.reset()
    assert_observes(env, model, observed, layer)
    for token in (A, B, C):
        observed, *_ = env.step(token)
        assert_observes(env, model, observed, layer)
        assert observed in env.observation_space


@pytest.mark.parametrize("layer", [0, 1, -4])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ModelError, match=r"2 transformer blocks: choose -1 .* to -3"):
        make(layer=layer)


def test_ids_observe_prompt_and_completion() -> None:
    env = make(observation="ids", items=["ab"])
    assert env.reset()[0] == (A, B)
    observed, *_ = env.step(C)
    assert observed == (A, B, C)
    assert observed in env.observation_space
    env = make(observation="ids", items=["ab"], compare_sample=2)
    env.reset()
    observed, *_ = env.step([C, A])
    assert observed == ((A, B, C), (A, B, A))
    assert observed in env.observation_space


@pytest.mark.filterwarnings("error", "ignore:.*A Box observation space .*infinity", "ignore::DeprecationWarning")
@pytest.mark.parametrize("observation", ["hidden", "ids"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_gymnasium_finds_nothing_to_object_to(family: str, samples: int, observation: Any) -> None:
    env = make(family, observation=observation, compare_sample=samples, items=["hello", {"input": "ab", "by": "us"}])
    checker.check_env(env, skip_render_check=True)


@pytest.mark.parametrize("mechanism", [None, "linear", "text"])
def test_greedy_actions_write_what_generate_writes(mechanism: Any) -> None:
    """Also for a policy that can be asked for a reward: nothing is asked of it in particular."""
    plain = TextPolicy.load((tiny_model("llama"), tiny_tokenizer()))
    policy = plain if mechanism is None else conditioned_policy(mechanism=mechanism)
    env = TextGenerationEnv(policy, ["hello", "ab"], count_a, max_new_tokens=8, observation="ids")
    for item in (0, 1):
        observed, _ = env.reset(options={"item": item})
        assert len(env.prompt_ids) == len(observed) + (mechanism == "linear")  # its slot is no token
        over = False
        while not over:
            observed, _, terminated, truncated, info = env.step(env.logits()[0].argmax())
            assert observed in env.observation_space
            over = terminated or truncated
        assert info["predicted_str"] == policy.generate(env.item, max_new_tokens=8, temperature=0)


# What a step costs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Kind and number of tokens of every forward pass."""
    taken: list[tuple[str, int]] = []
    hidden_states, decode = SamplingModel.hidden_states, SamplingModel.decode

    def read(self: Any, ids: Any, mask: Any, *rest: Any) -> Any:
        if ids.shape[1] > 1 or not taken or taken[-1][0] != "entered":
            taken.append(("read", int(mask.sum())))
        return hidden_states(self, ids, mask, *rest)

    def step(self: Any, ids: Any, cache: Any) -> Any:
        taken.append(("entered", 0))
        out = decode(self, ids, cache)
        taken[-1] = ("decode", ids.numel())
        return out

    monkeypatch.setattr(SamplingModel, "hidden_states", read)
    monkeypatch.setattr(SamplingModel, "decode", step)
    return taken


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_is_one_decode_of_one_token_per_sample_that_goes_on(family: str, passes: list[Any]) -> None:
    env = make(family, items=["hello"], compare_sample=3, max_new_tokens=4)
    del passes[:]
    env.reset()
    assert passes == [("read", 5)]  # once for all three samples
    del passes[:]
    env.step([A, EOS_ID, A])
    env.logits()
    env.step([A, A, A])
    env.step([EOS_ID, A, A])
    env.step([A, A, A])
    assert passes == [("decode", 3), ("decode", 2), ("decode", 2), ("decode", 1)]
    del passes[:]
    env.reset()
    assert passes == [("read", 5)]


def test_pitfall_16_a_step_never_reads_the_text_again_and_the_token_acted_is_the_token_seen(passes: list[Any]) -> None:
    """The text of the tokens "a" and "b" would be encoded as the one token "ab", and with a bos before it."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "a": 3, "b": 4, "ab": 5}
    core = Tokenizer(BPE(vocabulary, [("a", "b")]))
    core.decoder = decoders.Fuse()
    core.add_special_tokens(["<bos>", "<eos>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>")
    assert tokenizer("ab")["input_ids"] == [5]
    model = tiny_model("llama")
    env = TextGenerationEnv((model, tokenizer), ["ab"], count_a, max_new_tokens=8)
    env.reset()
    del passes[:]
    for token in (3, 4, 3, 4, 5):
        observed, *_, info = env.step(token)
        assert_observes(env, model, observed)
    assert env.prompt_ids == [5]
    assert env.completions == [[3, 4, 3, 4, 5]] == info["predicted"]
    assert info["predicted_str"] == ["ababab"]
    assert passes == [("decode", 1)] * 5


# Where completions end -----------------------------------------------------------------------------------------------


def run(env: TextGenerationEnv, actions: Any) -> list[tuple[Any, ...]]:
    return [(float(reward), terminated, truncated) for _, reward, terminated, truncated, _ in map(env.step, actions)]


def test_the_length_limit_is_exact() -> None:
    env = make(max_new_tokens=3)
    env.reset()
    assert [(terminated, truncated) for _, terminated, truncated in run(env, [A, B, C])] == [
        (False, False),
        (False, False),
        (False, True),
    ]
    assert env.completions == [[A, B, C]]
    assert env.finish_reasons == ["length"]


def test_an_eos_as_the_last_token_that_fits_ends_by_itself() -> None:
    env = make(max_new_tokens=2)
    env.reset()
    assert [(terminated, truncated) for _, terminated, truncated in run(env, [A, EOS_ID])][-1] == (True, False)
    assert env.completions == [[A, EOS_ID]]
    assert env.finish_reasons == ["eos"]


@pytest.mark.parametrize("options", [{"stop": ".!"}, {"stop": (".!", "?")}, {"stop_token_ids": (34,)}])
def test_stop_strings_and_stop_tokens_end_a_completion(options: dict[str, Any]) -> None:
    dot, mark = tiny_tokenizer()(".!")["input_ids"]
    assert mark == 34
    env = make(**options)
    env.reset()
    *_, (_, terminated, truncated) = run(env, [A, dot, mark])
    assert (terminated, truncated) == (True, False)
    assert env.finish_reasons == ["stop"]
    assert env._info()["predicted_str"] == (["a"] if "stop" in options else ["a.!"])


def test_an_id_that_the_tokenizer_does_not_have_is_a_token_without_text() -> None:
    """Vocabularies of models are often padded."""
    model = tiny_model("llama", vocab_size=64)
    env = TextGenerationEnv((model, tiny_tokenizer()), ["hello"], count_a, max_new_tokens=4)
    env.reset()
    env.step(A)
    observed, *_, info = env.step(50)
    assert info["predicted"] == [[A, 50]]
    assert info["predicted_str"] == ["a"]
    assert_observes(env, model, observed)


def test_samples_end_apart_and_those_that_ended_ignore_their_actions() -> None:
    env = make(items=["hello"], compare_sample=2, max_new_tokens=3)
    env.reset()
    _, reward, terminated, truncated, info = env.step([EOS_ID, A])
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["ended"] == [True, False]
    observed, reward, *_, info = env.step([A, A])
    assert info["predicted"] == [[EOS_ID], [A, A]]
    assert info["rewards"] == [0.0, 0.0]
    observed, reward, terminated, truncated, info = env.step(torch.tensor([B, A]))
    assert (reward, terminated, truncated) == (3.0, False, True)  # one of them was cut
    assert info["rewards"] == [0.0, 3.0]
    assert env.finish_reasons == ["eos", "length"]
    assert_observes(env, tiny_model("llama"), observed)


def test_pitfall_14_samples_share_nothing_and_are_never_longer_than_the_limit() -> None:
    seen: list[Any] = []

    class Shaped(TextGenerationEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> list[float]:
            seen.append([list(tokens) for tokens in predicted_list])
            for tokens in predicted_list:
                tokens.append("mine")
            return [0.0, 0.0]

    model = (tiny_model("llama"), tiny_tokenizer())
    env = Shaped(model, ["hello"], max_new_tokens=3, compare_sample=2)
    _, info = env.reset()
    info["predicted"][0].append(99)
    for actions in ([A, B], [B, C], [C, A]):
        *_, info = env.step(actions)
        info["predicted"][0].append(99)
        env.completions[0].append(99)
    assert seen == [[["a"], ["b"]], [["a", "b"], ["b", "c"]], [["a", "b", "c"], ["b", "c", "a"]]]
    assert env.completions == [[A, B, C], [B, C, A]]


def test_pitfall_20_one_and_several_samples_filter_alike() -> None:
    """Logits are [samples, V] always, and the nucleus is that of each row, not of another axis."""
    for samples in (1, 3):
        env = make("llama", items=["hello"], compare_sample=samples)
        env.reset()
        env.step(A if samples == 1 else [A, B, C])
        logits = env.logits()
        assert logits.shape == (samples, VOCABULARY)
        kept = truncate(logits.clone(), Sampling(top_p=0.7)).isfinite()
        for row in range(samples):
            probabilities = torch.softmax(logits[row].double(), 0).tolist()
            nucleus, mass = set(), 0.0
            for token in sorted(range(VOCABULARY), key=lambda token: -probabilities[token]):
                if mass < 0.7:
                    nucleus.add(token)
                mass += probabilities[token]
            assert set(kept[row].nonzero().flatten().tolist()) == nucleus


# Seeds and weights ---------------------------------------------------------------------------------------------------


def test_equal_seeds_choose_equal_items() -> None:
    def chosen(env: TextGenerationEnv, seed: int | None) -> list[str]:
        env.reset(seed=seed)
        return [env.item, *(env.reset() and env.item for _ in range(12))]

    items = [letter * 2 for letter in "abcdefgh"]
    env = make(items=items)
    first = chosen(env, 3)
    assert len(set(first)) > 3
    assert chosen(env, 3) == first == chosen(make(items=items, seed=7), 3)
    assert chosen(env, 4) != first
    assert chosen(make(items=items, seed=3), None) == first
    assert chosen(make(items=items), None) == chosen(make(items=items, seed=0), None)


def move(model: PreTrainedModel, seed: int) -> None:
    """Training by hand: every weight changes a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "bart"])
def test_changed_weights_are_seen_between_and_within_episodes(family: str) -> None:
    model = tiny_model(family)
    env = TextGenerationEnv((model, tiny_tokenizer()), ["hello"], count_a, max_new_tokens=8, compare_sample=3)
    before, _ = env.reset()
    move(model, 1)
    after, _ = env.reset()
    assert np.abs(after - before).max() > 1e-2
    assert_observes(env, model, after)
    env.step([A, B, EOS_ID])
    env.step([B, B, B])
    move(model, 2)
    torch.testing.assert_close(env.logits()[1], read_again(env, model, 1)[1], atol=1e-4, rtol=1e-4)
    move(model, 3)
    observed, *_ = env.step([C, A, A])
    for sample in (0, 1):
        np.testing.assert_allclose(observed[sample], read_again(env, model, sample)[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("how", ["fused", "data"])
def test_a_new_episode_sees_changes_that_no_version_counter_tells_of(how: str) -> None:
    model = tiny_model("gpt2", n_embd=512)  # large enough to be packed
    env = TextGenerationEnv((model, tiny_tokenizer()), ["hello"], count_a, max_new_tokens=6)
    before, _ = env.reset()
    weights = [weight.requires_grad_() for weight in model.parameters()]
    generator = torch.Generator().manual_seed(1)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)
    if how == "fused":
        torch.optim.AdamW(weights, lr=0.02, fused=True).step()
    else:
        for weight in weights:
            weight.data.add_(weight.grad, alpha=0.02)
    after, _ = env.reset()
    assert np.abs(after - before).max() > 1e-2
    with torch.no_grad():
        assert_observes(env, model, after)
        observed, *_ = env.step(A)
        assert_observes(env, model, observed)


def test_adapters_switched_off_are_seen_too() -> None:
    base = tiny_model("llama")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    env = TextGenerationEnv((model, tiny_tokenizer()), ["hello"], count_a, max_new_tokens=6)
    env.reset()
    on, *_ = env.step(A)
    assert_observes(env, base, on)
    with model.disable_adapter():
        env.reset()
        off, *_ = env.step(A)
        assert_observes(env, base, off)
    assert np.abs(on - off).max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_model_trains_as_ever_while_an_episode_goes_on(family: str) -> None:
    model = tiny_model(family)
    env = TextGenerationEnv((model, tiny_tokenizer()), ["hello"], count_a, max_new_tokens=6)
    env.reset()
    env.step(A)
    assert not any("forward" in vars(module) for module in model.modules())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert not env.logits().requires_grad


def test_closing_gives_up_what_was_held_and_reset_begins_anew() -> None:
    env = make()
    first, _ = env.reset(options={"item": 0})
    env.close()
    assert env._completing.decoding._cache is None
    np.testing.assert_array_equal(env.reset(options={"item": 0})[0], first)
