"""tropism evaluate RUN --steerability, on a tiny run with two rewards."""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tropism.algorithms.conditioned import RewardConditioned
from tropism.cli import main
from tropism.commands.steerability import checked_targets, reward_column, sweep, target_name, told, verdict
from tropism.errors import ConfigError
from tropism.evaluation.statistics import Interval
from tropism.evaluation.steerability import Samples, Steerability, TrainingRewards, steerability
from tropism.ops.slots import read_slots
from tropism.rewards import RewardConfig, registry
from tropism.targets.conditioner import Conditioner
from tropism.targets.config import Conditioning
from tropism.training.rollout_maker import RolloutMaker
from tropism.types import Prompt, Rollouts

Captured = pytest.CaptureFixture[str]
UNIT = TrainingRewards.of(np.linspace(0, 1, 101))


def early_letters(completions: list[str]) -> list[float]:
    return [sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text)) for text in completions]


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a few updates that was told two rewards, and its plain model beside it."""
    folder = tmp_path_factory.mktemp("conditioned")
    before = dict(registry._registered)
    for name, reward in (("early-letters", early_letters), ("vowel-count", vowels)):
        tropism.register(name)(reward)
    tiny_model("llama", seed=3).save_pretrained(folder / "plain")
    tiny_tokenizer().save_pretrained(folder / "plain")
    (folder / "prompts.txt").write_text("a cat\nthe big dog\noh\nwe ran\nno\nis it so\n")
    (folder / "held_out.txt").write_text("a dog\nthe cat sat\nso\nwe sat\n")
    tropism.train(
        model=str(folder / "plain"),
        algorithm=RewardConditioned(samples_per_prompt=4, targets=("early", "vowels")),
        data=str(folder / "prompts.txt"),
        eval_data=str(folder / "held_out.txt"),
        reward={"early": ("early-letters", 1.0), "vowels": ("vowel-count", 0.5)},
        run=str(folder / "run"),
        total_steps=3,
        prompts_per_step=8,
        sampling=tropism.Sampling(max_new_tokens=6),
        trainer=tropism.TrainerConfig(learning_rate=3e-2, progress=False, preflight=False),
    )
    yield folder / "run"
    registry._registered.clear()
    registry._registered.update(before)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tropism.evaluation.steerability_files.rendered", lambda figure, kind: kind.encode())


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def log_probs(model: Any, before: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """[T] of the completion ``ids`` behind the embeddings ``before`` [L, H]."""
    embeds = torch.cat([before, model.get_input_embeddings()(torch.tensor(ids))])
    logits = model(inputs_embeds=embeds[None]).logits[0, len(before) - 1 : -1]
    return torch.stack([row.log_softmax(-1)[token] for row, token in zip(logits, ids, strict=True)])


# ---- the whole command -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_sweep_of_one_of_two_rewards(
    run: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL: the trained model behind its slots against the base model behind the plain prompt, by hand."""
    monkeypatch.setenv("COLUMNS", "200")
    sampled: list[Rollouts] = []
    sample = RolloutMaker.sample

    def remembered(*args: Any, **kwargs: Any) -> Rollouts:
        sampled.append(sample(*args, **kwargs))
        return sampled[-1]

    monkeypatch.setattr(RolloutMaker, "sample", remembered)
    command = ["evaluate", str(run), "--steerability", "--target-name", "vowels", "--targets", "2", "0", "1", "90"]
    assert main([*command, "--samples-per-prompt", "2"]) == 0
    shown = capsys.readouterr().out
    assert "vowels: 4 prompts" in shown and "90 (beyond)" in shown and "Spearman, means of targets" in shown
    assert re.search(r"Asked for 90, above all that it was trained on, it gives [\d.]+", shown)
    rows = read(run / "steerability" / "steerability.csv")
    assert [float(row["target"]) for row in rows] == [0, 1, 2, 90] and [row["n"] for row in rows] == ["8"] * 4
    high = read(run / "steerability" / "high_reward_completions.csv")
    assert [row["prompt"] for row in high] == [p for p in ("a dog", "the cat sat", "so", "we sat") for _ in range(2)]
    assert [float(row["actual_reward"]) for row in high] == vowels([row["completion"] for row in high])
    assert {row["target_reward"] for row in high} == {"2.0"}
    drawn = read(run / "steerability" / "sampled_completions.csv")
    facts = json.loads((run / "model" / "conditioning.json").read_text())
    seen = facts["seen"][1]
    assert all(seen[0] <= float(row["target_reward"]) <= seen[-1] for row in drawn) and len(drawn) == 4
    assert len({row["target_reward"] for row in drawn}) == 4

    base, trained = (AutoModelForCausalLM.from_pretrained(run / name) for name in ("../plain", "model"))
    slots = load_file(run / "model" / "conditioning.safetensors")
    embedding = trained.get_input_embeddings()
    tokenizer = tiny_tokenizer()
    scaler = facts["scalers"][1]
    for row, rollouts in zip(rows, sampled[1:], strict=True):
        scaled = (float(row["target"]) - scaler["mean"]) / scaler["std"]
        kl = []
        for index, text in enumerate(row["prompt"] for row in high):
            ids = rollouts.completion_ids[index, : rollouts.completion_lengths[index]].tolist()
            prompt = torch.tensor(tokenizer(text)["input_ids"])
            asked = [slots["open"][0], scaled * slots["weight"][1] + slots["bias"][1]]
            told_so = torch.cat([torch.stack(asked), embedding(prompt)])
            with torch.no_grad():
                ratio = log_probs(trained, told_so, ids) - log_probs(base, base.get_input_embeddings()(prompt), ids)
            kl.append(float(ratio.sum()))
        assert float(row["mean_kl"]) == pytest.approx(np.mean(kl), abs=1e-3)
    assert not torch.equal(sampled[1].completion_ids, sampled[2].completion_ids)  # randomness of their own


@pytest.mark.usefixtures("undrawn")
def test_default_targets_and_repeated_sweeps(run: Path, tmp_path: Path, capsys: Captured) -> None:
    contents = []
    for name in ("one", "other"):
        command = ["evaluate", str(run), "--steerability", "--target-name", "early", "--n", "3", "--seed", "4"]
        assert main([*command, "--out", str(tmp_path / name)]) == 0
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1] and len(contents[0]) == 13
    rows = read(tmp_path / "one" / "steerability.csv")
    assert [row["in_range"] for row in rows] == ["false", *["true"] * 11, "false"]
    assert [row["n"] for row in rows] == ["3"] * 13
    seen = json.loads((run / "model" / "conditioning.json").read_text())["seen"][0]
    assert float(rows[1]["target"]) == pytest.approx(seen[5]) and float(rows[-2]["target"]) == pytest.approx(seen[95])
    assert float(rows[0]["target"]) < seen[0] and float(rows[-1]["target"]) > seen[-1]
    assert "outside of the rewards seen" not in capsys.readouterr().err  # beyond on purpose


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{run}", "--steerability"], "the model knows several rewards, early, vowels"),
        (["{run}", "--steerability", "--target-name", "vowel"], "the model knows no reward 'vowel'"),
        (["{run}", "--steerability", "--target-name", "early", "--targets", "70", "80"], "at least two numbers within"),
        (["{run}", "--steerability", "--target-name", "early", "--samples-per-prompt", "0"], "at least 1, got 0"),
        (["{run}", "--steerability", "--target-name", "early", "--out", "scores.json"], "name a folder"),
        (["{run}", "--steerability", "--target-name", "early", "--reward", "vader"], "no term 'early'"),
        (["{run}", "--targets", "1", "2"], "--targets belongs to --steerability"),
        (["{run}", "--target-name", "early"], "--target-name belongs to --steerability"),
        (["{run}", "--samples-per-prompt", "3"], "--samples-per-prompt belongs to --steerability"),
        (["{plain}", "--steerability", "--reward", "vader", "--data", "{prompts}"], "not trained to be asked"),
    ],
)
def test_errors(arguments: list[str], named: str, run: Path, capsys: Captured) -> None:
    places = {"run": run, "plain": run.parent / "plain", "prompts": run.parent / "prompts.txt"}
    assert main(["evaluate", *(word.format(**places) for word in arguments)]) == 2
    assert named in capsys.readouterr().err
    assert not (run.parent / "plain" / "steerability").exists()


# ---- the parts -------------------------------------------------------------------------------------------------------


def conditioner(*names: str) -> Conditioner:
    made = Conditioner(Conditioning(targets=names))
    made.fit([[float(value)] * len(names) for value in range(5)])
    return made


def test_only_the_named_reward_is_asked_for_and_beyond_the_range_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompts = [Prompt(text="a", ids=(5, 6)), Prompt(text="b", ids=(7,))]
    with caplog.at_level(logging.WARNING):
        asked = told(prompts, [2.0, 99.0], conditioner("warmth", "length"), "length")
    assert not caplog.records
    assert [prompt.text for prompt in asked] == ["a", "b"] and [prompt.ids[2:] for prompt in asked] == [(5, 6), (7,)]
    rewards, values, absent = read_slots(torch.tensor([i for prompt in asked for i in prompt.ids[:2]]))
    assert rewards.tolist() == [0, 1, 0, 1] and absent.tolist() == [True, False, True, False]
    assert values[1] == 0.0 and values[3] == pytest.approx(97 / np.sqrt(2.5))  # mean 2, sample deviation of 0..4


def test_names_and_columns() -> None:
    assert target_name(None, conditioner("reward")) == "reward"
    assert target_name("length", conditioner("warmth", "length")) == "length"
    several = RewardConfig.of({"warmth": ("vader", 1.0), "brief": ("length", 1.0)})
    assert reward_column("reward", several, only=True) == "reward"
    assert reward_column("brief", several, only=False) == "reward/brief"
    assert reward_column("sentiment", RewardConfig.of("vader"), only=True) == "reward"  # by which a file was labelled
    with pytest.raises(ConfigError, match=r"no term 'sentiment'.*warmth, brief"):
        reward_column("sentiment", several, only=True)
    with pytest.raises(ConfigError, match="no term 'sentiment'"):
        reward_column("sentiment", RewardConfig.of("vader"), only=False)


def test_targets_are_checked() -> None:
    assert checked_targets([0.9, -3.0, 0.1], UNIT) == [-3.0, 0.1, 0.9]
    assert len(checked_targets([], UNIT)) == 13
    for given, named in (([0.1, float("nan")], "finite"), ([0.5, 0.5], "twice"), ([0.5, 7.0], "0 to 1")):
        with pytest.raises(ConfigError, match=named):
            checked_targets(given, UNIT)


def test_sweep_asks_every_prompt_at_every_target_with_a_collect_of_its_own() -> None:
    calls: list[tuple[list[float], int, int]] = []

    def complete(asked: Sequence[float], n: int, collect: int) -> dict[str, list[Any]]:
        calls.append((list(asked), n, collect))
        rows = [(prompt, target) for prompt, target in enumerate(asked) for _ in range(n)]
        return {
            "prompt": [f"p{prompt}" for prompt, _ in rows],
            "completion": [f"c{collect}" for _ in rows],
            "reward": [0.0] * len(rows),
            "reward/x": [10 * prompt + target for prompt, target in rows],
            "sequence_kl": [float(collect)] * len(rows),
        }

    training = TrainingRewards.of([2.0, 3.0, 6.0])
    samples, drawn = sweep(complete, [2.5, 5.0], training, prompts=3, n=2, column="reward/x", seed=0)
    assert [call[1:] for call in calls] == [(1, 1), (2, 2), (2, 3)]
    assert [call[0] for call in calls[1:]] == [[2.5] * 3, [5.0] * 3]
    assert samples.prompt_indices.tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert samples.targets.tolist() == [2.5] * 6 + [5.0] * 6
    assert samples.achieved.tolist() == [10 * p + t for t in (2.5, 5.0) for p in (0, 0, 1, 1, 2, 2)]
    assert samples.sequence_kl.tolist() == [2.0] * 6 + [3.0] * 6 and samples.prompts[2] == "p1"
    assert drawn.targets.tolist() == calls[0][0] and drawn.completions == ("c1",) * 3


def test_drawn_targets_are_uniform_over_the_training_range_and_keyed() -> None:
    def drawn(seed: int) -> np.ndarray[Any, Any]:
        def complete(asked: Sequence[float], n: int, collect: int) -> dict[str, list[Any]]:
            return {name: [0.0] * len(asked) for name in ("prompt", "completion", "reward", "sequence_kl")}

        training = TrainingRewards.of([-2.0, 0.0, 6.0])
        return sweep(complete, [0.0], training, prompts=4000, n=1, column="reward", seed=seed)[1].targets

    one = drawn(0)
    assert np.array_equal(one, drawn(0)) and not np.array_equal(one, drawn(1))
    shares = np.histogram(one, bins=8, range=(-2, 6))[0] / 4000
    assert shares.sum() == 1.0 and shares == pytest.approx(np.full(8, 1 / 8), abs=0.025)


# ---- the verdict -----------------------------------------------------------------------------------------------------


def result_of(follow: float, *, noise: float = 0.05, prompts: int = 20, reach: float = 9.0) -> Steerability:
    rng = np.random.default_rng(0)
    rows = [
        (p, t, 0.5 + follow * float(np.clip(t - 0.5, -reach, reach)) + rng.normal(0, noise))
        for p in range(prompts)
        for t in (-1.0, 0.0, 0.5, 1.0, 2.0)
    ]
    prompt, target, achieved = (np.array(column) for column in zip(*rows, strict=True))
    samples = Samples(
        prompts=("p",) * len(rows),
        completions=("c",) * len(rows),
        prompt_indices=prompt,
        targets=target,
        achieved=achieved,
        sequence_kl=np.ones(len(rows)),
    )
    return steerability(samples, TrainingRewards.of([0.0] * 50 + [1.0] * 50), resamples=200)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (result_of(0.9), "It follows: asked for 1 instead of 0, the mean warmth rises by 0."),
        (result_of(0.3), "It follows, but weakly: asked for 1 instead of 0, the mean warmth rises by 0."),
        (result_of(-0.5), "It goes the wrong way: asked for 1 instead of 0, the mean warmth falls by 0."),
        (result_of(0.0, noise=1.0), "It cannot be said to follow"),
        (result_of(0.9, prompts=1), "It cannot be said to follow"),
        (replace(result_of(0.9), slope=Interval(0.1, -0.1, 0.3)), "It cannot be said to follow"),
        (replace(result_of(0.9), gap=Interval(0.1, -0.1, 0.3)), "It follows: "),
    ],
)
def test_verdict_about_following(result: Steerability, said: str) -> None:
    assert verdict("warmth", result)[0].startswith(said)


def test_verdict_about_order_thin_data_and_beyond() -> None:
    moving, stuck = (" ".join(verdict("warmth", result_of(0.9, reach=reach))) for reach in (9.0, 0.5))
    assert "more is given where more is asked for (Spearman 1.00)" in moving
    assert "the order is not always" in " ".join(verdict("warmth", result_of(-0.5)))
    assert re.search(r"Asked for 2, above all that it was trained on, it gives 1\.\d+: it goes on moving, by", moving)
    assert re.search(r"Asked for -1, below all .*: it goes on moving, by", moving)
    assert re.search(r"Asked for 2, above all .*: no further than at 1", stuck)
    assert re.search(r"Asked for 2, .*: it turns back, by", " ".join(verdict("warmth", result_of(-0.5))))
    result = result_of(0.9)
    unsure = replace(result.beyond[1], further=Interval(-0.1, -0.3, 0.1))
    assert "no further than at 1" in verdict("warmth", replace(result, beyond=(unsure,)))[3]
    assert "(under 1.5%) lie near 0.5: a bad fit there" in moving
