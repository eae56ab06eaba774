"""What the original of reward-conditioned training got wrong, each as a test. The pitfalls are in the docstrings."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import tropism
from slots_by_hand import completion_by_hand, policy_with
from slow_sampling import greedy, log_softmax, own_logits
from tiny_models import BOS_ID, EOS_ID, FAMILIES, tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS, SCORED, Setting, assemble, early_letters, execute, logged
from tropism.algorithms import RewardConditioned
from tropism.build import run_recipe
from tropism.cli import main
from tropism.errors import ConfigError
from tropism.generation import TextPolicy
from tropism.models import sampling_model
from tropism.models.layout import join
from tropism.ops.slots import slot_id
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.training.config import TrainerConfig
from tropism.types import Prompt, pad_rows

OFFLINE = Setting("conditioned", False, "gpt2")


def saved_tiny(folder: Path, family: str = "gpt2", **tokenizer: Any) -> str:
    tiny_model(family, seed=3).save_pretrained(folder)
    tiny_tokenizer(**tokenizer).save_pretrained(folder)
    return str(folder)


def positions_of(model: Any) -> list[Tensor]:
    """Every tensor of positions that the learned position embedding of a GPT-2 is asked for from now on."""
    seen: list[Tensor] = []
    embedding: nn.Module = model.transformer.wpe
    embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    return seen


@pytest.mark.parametrize("mechanism", ["add", "linear", "token", "text"])
def test_pitfall_01_the_saved_model_names_the_mechanism_it_was_trained_with(mechanism: Any, tmp_path: Path) -> None:
    """README describes "add", code ships "linear"; results come from "add". -> name the mechanism in the saved
    config."""
    algorithm = RewardConditioned(mechanism=mechanism)
    execute(assemble(OFFLINE, tmp_path / "run", algorithm=algorithm, total_steps=1), export=True)
    folder = tmp_path / "run" / "model"
    assert json.loads((folder / "config.json").read_text())["reward_conditioning"] == mechanism
    assert json.loads((folder / "conditioning.json").read_text())["mechanism"] == mechanism
    assert f"mechanism: {mechanism}" in (tmp_path / "run" / "recipe.yaml").read_text()
    loaded = TextPolicy.load(folder)
    assert loaded.conditioner is not None and loaded.conditioner.config.mechanism == mechanism


def test_pitfall_02_decoding_goes_on_at_the_position_after_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode position off by one: cached != uncached generation.

    The original's cached positions were [0...6], [6], [7] for a slot and six tokens.
    """
    monkeypatch.setattr(sampling_model, "FUSED", {})
    policy = policy_with("gpt2")
    seen = positions_of(policy.model)
    prompt = Prompt(text="", ids=(slot_id(0, 0.5), 5, 9, 30, 8, 11, 7))
    sampling = Sampling(max_new_tokens=4, min_new_tokens=4, temperature=0)
    rollouts = EmbeddedSampler(None, (EOS_ID,)).generate(policy, [prompt], sampling, 1, key=StreamKey(seed=0))
    assert [positions.flatten().tolist() for positions in seen] == [[*range(7)], [7], [8], [9]]
    ids, logprobs = completion_by_hand(policy, (0.5,), prompt.ids[1:], greedy, new=4)
    assert rollouts.completion_ids[0].tolist()[: len(ids)] == ids
    torch.testing.assert_close(rollouts.logprobs[0, : len(ids)], torch.tensor(logprobs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_pitfall_03_pads_consume_no_position_in_training(padding: Any) -> None:
    """Training with position_ids None: left pads consume positions; generation uses mask-based positions ->
    train/inference skew, worse the shorter the text."""
    policy = policy_with("gpt2")
    policy.padding, policy.rows.works = padding, False
    seen = positions_of(policy.model)
    prompts = [(slot_id(0, 0.5), 5, 9, 30, 8, 11, 7), (slot_id(0, 1.0), 6)]
    tokens = {
        "prompt_ids": pad_rows(prompts, left=True),
        "prompt_lengths": torch.tensor([7, 2]),
        "completion_ids": torch.tensor([[9, 8, 2], [4, 0, 0]]),
        "completion_lengths": torch.tensor([3, 1]),
    }
    policy(**tokens)
    _, mask, _, _ = join(**tokens, padding=padding)
    (positions,) = seen
    assert positions[0, mask[0]].tolist() == [*range(10)]
    assert positions[1, mask[1]].tolist() == [0, 1, 2]


def test_pitfall_04_the_slot_stands_right_before_the_first_real_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward embedding placed before the left pads, not at "the first unmasked token"."""
    policy = policy_with("gpt2")
    assert policy.conditioning is not None
    entered: list[tuple[Tensor, Tensor | None]] = []
    body = policy.body.forward

    def watched(**given: Any) -> Any:
        entered.append((given["input_ids"], given.get("attention_mask")))
        return body(**given)

    monkeypatch.setattr(policy.body, "forward", watched)
    prompts = [Prompt(text="", ids=(slot_id(0, 0.5), 5, 9, 30, 8)), Prompt(text="", ids=(slot_id(0, 1.0), 6))]
    EmbeddedSampler(None, (EOS_ID,)).generate(policy, prompts, Sampling(max_new_tokens=1), 1, key=StreamKey(seed=0))
    ids, mask = next((ids, mask) for ids, mask in entered if ids.shape == (2, 5) and mask is not None)
    assert (ids < 0).long().argmax(1).tolist() == mask.argmax(1).tolist() == [0, 3]
    assert ids[1].tolist() == [0, 0, 0, slot_id(0, 1.0), 6]
    assert mask[1].tolist() == [0, 0, 0, 1, 1]


def test_pitfall_05_what_is_too_long_loses_its_end_and_keeps_its_beginning(tmp_path: Path) -> None:
    """truncation_side left drops the prompt/beginning (and in "add" keep-front drops the EOS).

    Here the end goes, eos included, since the text does not end there; a prompt that alone fills the context is left
    out, and in generation is an error.
    """
    records = [
        {"prompt": "ab", "completion": "cdefghij", "reward": 0.1},
        {"prompt": "ab", "completion": "c", "reward": 0.2},
        {"prompt": "abcdefghijk", "completion": "c", "reward": 0.3},
    ]
    algorithm = RewardConditioned(max_length=6, target_dropout=0.0, scaler="none")
    assembly = assemble(OFFLINE, tmp_path / "run", algorithm=algorithm, data=records, prompts_per_step=2)
    (batch,) = assembly.trainer.source.collect(None)
    rows = {
        (*prompt[-n:], *completion[:m])
        for prompt, n, completion, m in zip(
            batch.prompt_ids.tolist(),
            batch.prompt_lengths.tolist(),
            batch.completion_ids.tolist(),
            batch.completion_lengths.tolist(),
            strict=True,
        )
    }
    a, b, c, d, e = range(5, 10)
    assert rows == {(slot_id(0, 0.1), a, b, c, d, e), (slot_id(0, 0.2), a, b, c, EOS_ID)}


def test_pitfall_06_the_model_learns_to_stop_where_pad_is_eos(tmp_path: Path) -> None:
    """add_eos_at_end is a no-op for GPT-2, and pad==eos + LM collator masks EOS labels anyway -> model never learns to
    stop; completions always run to max_new_tokens."""
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    recipe_changes: dict[str, Any] = {
        "model": (tiny_model("gpt2", seed=3), tokenizer),
        "trainer": {"learning_rate": 1e-2},
        "total_steps": 25,
    }
    assembly = assemble(OFFLINE, tmp_path / "run", **recipe_changes)
    (batch,) = assembly.trainer.source.collect(None)
    last = batch.completion_ids.gather(1, batch.completion_lengths[:, None] - 1)
    assert last.flatten().tolist() == [EOS_ID] * 4
    assert bool(batch.loss_mask.gather(1, batch.completion_lengths[:, None] - 1).all())
    assembly = assemble(OFFLINE, tmp_path / "run", **recipe_changes)
    result = TextPolicy(execute(assembly).policy, assembly.loaded, conditioner=assembly.conditioner)
    completions = result.generate([str(record["prompt"]) for record in SCORED], target_reward=0.5, max_new_tokens=40)
    assert all(len(text) < 40 for text in completions)


def test_pitfall_07_the_completion_is_learned_and_the_completion_is_rewarded(tmp_path: Path) -> None:
    """Loss on prompt tokens though reward concerns the completion; reward computed on the full text."""
    assert RewardConditioned().prompt_loss_weight == 0.0
    seen: list[tuple[str, str]] = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return early_letters(completions)

    algorithm = RewardConditioned(samples_per_prompt=2)
    assembly = assemble(OFFLINE, tmp_path / "run", algorithm=algorithm, data=PROMPTS, reward=RewardConfig.of(reward))
    assembly.run.begin()
    (batch,) = assembly.trainer.source.collect(None)
    assert torch.equal(batch.loss_mask, batch.completion_mask)
    decode = assembly.loaded.tokenizer.decode
    rows = zip(batch.completion_ids, batch.completion_lengths, strict=True)
    texts = {decode(row[:length], skip_special_tokens=True) for row, length in rows}
    completions = {completion for _, completion in seen}
    assert texts <= completions
    assert {prompt for prompt, _ in seen} == set(PROMPTS)
    assert not any(completion.startswith(prompt) for prompt, completion in seen if len(prompt) > 2)


def test_pitfall_08_evaluation_runs_from_the_saved_model_in_the_rewards_own_units(tmp_path: Path) -> None:
    """evaluate main() loads AutoTokenizer, not a decision tokenizer -> ValueError; test computes torch.allclose without
    assert; sampled CSV stores scaled targets under target_reward; completion cut by len(prompt) characters (breaks when
    decode != encode input)."""
    model = saved_tiny(tmp_path / "base")
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(record) + "\n" for record in SCORED))
    (tmp_path / "held-out.txt").write_text("a cat\nA CAT\n")
    tropism.train(
        model=model,
        algorithm=RewardConditioned(scaler="times_1000"),
        data=str(tmp_path / "scored.jsonl"),
        reward=RewardConfig.of({"terms": {"reward": {"use": "length", "args": {"goal": "maximise"}}}}),
        eval_data=str(tmp_path / "held-out.txt"),
        run=str(tmp_path / "run"),
        total_steps=1,
        prompts_per_step=2,
        sampling=Sampling(max_new_tokens=4),
        trainer=TrainerConfig(progress=False),
    )
    assert main(["evaluate", str(tmp_path / "run"), "--steerability", "--targets", "0.1", "0.7"]) == 0
    folder = tmp_path / "run" / "steerability"
    for name, low, high in (("high_reward", 0.7, 0.7), ("low_reward", 0.1, 0.1), ("sampled", -0.4, 1.3)):
        with (folder / f"{name}_completions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows and all(low - 1e-6 <= float(row["target_reward"]) <= high + 1e-6 for row in rows)
    # "A CAT" is three unknown letters for this tokenizer, so that decoding it gives another text.
    loaded = TextPolicy.load(tmp_path / "run")
    text = "A CAT"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) != text
    ids = completion_by_hand(loaded.policy, (500.0,), loaded.tokenizer(text)["input_ids"], greedy, new=6)[0]
    written = loaded.tokenizer.decode([i for i in ids if i != EOS_ID], skip_special_tokens=True)
    assert loaded.generate(text, target_reward=0.5, temperature=0, max_new_tokens=6) == [written]


def test_pitfall_09_constant_rewards_are_refused_and_step_0_is_the_base_model(tmp_path: Path) -> None:
    """MinMax/standard divide by 0 on constant rewards. embed_return keeps nn.Linear's init: ~29x GPT-2's .02 init;
    initialise small or zero so that step 0 = the base model (given one more bos, whose KL is reported)."""
    constant = [{**record, "reward": 0.5} for record in SCORED]
    with pytest.raises(tropism.TropismError, match=r"all 6 .*rewards of 'reward' are 0.5"):
        assemble(OFFLINE, tmp_path / "constant", data=constant)
    assert not (tmp_path / "constant").exists()
    algorithm = RewardConditioned(samples_per_prompt=1)
    reward = RewardConfig.of(lambda completions: [0.5] * len(completions))
    with pytest.raises(ConfigError, match=r"all 6 training rewards of 'reward' are 0\.5"):
        execute(assemble(OFFLINE, tmp_path / "own", algorithm=algorithm, data=PROMPTS, reward=reward))

    run = assemble(OFFLINE, tmp_path / "run", reward=RewardConfig.of(early_letters), eval_data=PROMPTS, total_steps=1)
    assert run.maker is not None
    sampler: Any = run.maker.sampler
    generate, sampled = sampler.generate, []

    def catching(*arguments: Any, **named: Any) -> Any:
        rollouts = generate(*arguments, **named)
        sampled.extend([rollouts] * (named["key"].purpose == "evaluation"))
        return rollouts

    sampler.generate = catching
    execute(run)
    first = logged(tmp_path / "run", "evaluation")[0]
    table = pq.read_table(tmp_path / "run" / "evaluations" / "step-000000.parquet").to_pydict()
    base, tokenizer = tiny_model("gpt2", seed=3), tiny_tokenizer()
    wanted = []
    rows = zip(sampled[0].completion_ids.tolist(), sampled[0].completion_lengths.tolist(), strict=True)
    for prompt, (row, length) in zip(table["prompt"], rows, strict=True):
        before, ids = tokenizer(prompt)["input_ids"], row[:length]
        told, plain = (
            own_logits(base, [*start, *before, *ids])[len(start) + len(before) - 1 :] for start in ([BOS_ID], [])
        )
        wanted.append(
            sum(log_softmax(told[t].tolist())[i] - log_softmax(plain[t].tolist())[i] for t, i in enumerate(ids))
        )
    assert table["sequence_kl"] == pytest.approx(wanted, abs=1e-4)
    assert first["eval/sequence_kl"] == pytest.approx(sum(table["sequence_kl"]) / len(wanted), rel=1e-6)
    assert math.isfinite(first["eval/sequence_kl"])


@pytest.mark.parametrize("family", FAMILIES)
def test_pitfall_10_any_family_trains_saves_and_is_asked_with_plain_numbers(family: str, tmp_path: Path) -> None:
    """GPT-2 only; pinned to transformers 4.26 internals; model.to(device) with None; target_rewards silently must be
    float tensor on device."""
    recipe = assemble(Setting("conditioned", False, family), tmp_path / "run", total_steps=2).recipe
    result = run_recipe(recipe)
    assert logged(tmp_path / "run", "update")[-1]["optim/grad_norm"] > 0
    loaded = TextPolicy.load(tmp_path / "run")
    settings: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0}

    def letters(model: TextPolicy, asked: Any) -> list[str]:
        # Without spaces, which transformers' own tokenizer of a family may treat in another way than the tiny one.
        return [text.replace(" ", "") for text in model.generate(["cat", "oh"], target_reward=asked, **settings)]

    for asked in (1, 1.0, {"reward": 1}, [1, 1]):
        assert letters(loaded, asked) == letters(result.policy, 1.0)
