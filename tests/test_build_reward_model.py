"""Whole tiny runs of reward models: their scale, their files, and what goes on after an interruption.

That a run which is resumed after any update is the uninterrupted one bit for bit, whatever the size of micro-batches,
tests/invariants says of all methods.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tiny_models import BOS_ID, CHARACTERS, EOS_ID, PAD_ID, tiny_model, tiny_tokenizer
from tiny_reward_models import encoder_tokenizer, tiny_encoder
from tiny_runs import JUDGED, PROMPTS, Setting, assemble, assert_same, execute, make_recipe, stop_after, weights_of
from tropism.api import train
from tropism.build import run_recipe
from tropism.data.prompts import make_prompts
from tropism.errors import ConfigError, ModelError
from tropism.models.loading import load_model
from tropism.models.policy import Policy
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.text_reward_model import TextRewardModel
from tropism.training.config import TrainerConfig
from tropism.training.interrupt import Interrupted
from tropism.training.normalisation import Normalisation

FULL = Setting("reward-model", False, "llama")
LORA = Setting("reward-model", True, "gpt2")
TEXTS = [(item["prompt"], text) for item in JUDGED for text in item["completions"]]
RATED = [
    {"prompt": item["prompt"], "completion": text, "rating": 3.0 + 2.0 * ((7 * row + 3 * place) % 5)}
    for row, item in enumerate(JUDGED)
    for place, text in enumerate(item["completions"])
]


def llama() -> Any:
    return tiny_model("llama", seed=3), tiny_tokenizer()


def bert() -> Any:
    return tiny_encoder("bert", seed=3), encoder_tokenizer()


def environment(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "environment.json").read_text())
    return facts


@torch.no_grad()
def logits_of_folder(folder: Path, texts: list[tuple[str, str]], *, framed: bool = False) -> list[float]:
    """Logits of the plain classifier in a folder plus the constant that it names, by ids written by hand."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    offset = json.loads((folder / "config.json").read_text())["tropism_reward_offset"]
    rows = [[5 + CHARACTERS.index(letter) for letter in prompt + text] for prompt, text in texts]
    rows = [[BOS_ID, *row, EOS_ID] for row in rows] if framed else rows
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    found: list[float] = (model(input_ids=ids, attention_mask=mask).logits[:, 0] + offset).tolist()
    return found


def completions_of(pair: Any, count: int) -> list[tuple[str, str]]:
    """Prompts and completions by a policy, with random numbers that no run uses."""
    loaded = load_model(pair)
    prompts = [*make_prompts(PROMPTS, loaded.tokenizer, max_length=None)] * (count // len(PROMPTS))
    sampler = EmbeddedSampler(loaded.tokenizer, loaded.tokens.eos_ids)
    key = StreamKey(seed=123, purpose="checks")
    rollouts = sampler.generate(Policy(loaded.model), prompts, Sampling(max_new_tokens=6), 1, key=key)
    lengths = rollouts.completion_lengths.tolist()
    rows = [row[:length] for row, length in zip(rollouts.completion_ids.tolist(), lengths, strict=True)]
    texts = ["".join(CHARACTERS[i - 5] for i in row if i >= 5) for row in rows]
    return [(str(prompt.text), text) for prompt, text in zip(prompts, texts, strict=True)]


# Scale ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [FULL, LORA], ids=str)
def test_fresh_samples_have_mean_0_and_deviation_1(setting: Setting, tmp_path: Path) -> None:
    """Measured outside of the library's own scoring: the exported folder, on other samples of the same policy."""
    run = tmp_path / "run"
    settings = Normalisation(samples=512, data=PROMPTS, check=256)
    assembly: Any = execute(assemble(setting, run, normalise=settings), export=True)
    scores = torch.tensor(logits_of_folder(run / "model", completions_of(tuned_from(setting), 510)))
    assert float(scores.mean()) == pytest.approx(0.0, abs=0.15)
    assert float(scores.std()) == pytest.approx(1.0, abs=0.1)

    facts = json.loads((run / "model" / "reward_model.json").read_text())
    noted = environment(run)
    gain, bias = assembly.policy.gain.item(), assembly.policy.bias.item()
    assert (facts["gain"], facts["bias"]) == (gain, bias) != (1.0, 0.0)
    assert facts["normalised"]["samples"] == 512 and facts["normalised"]["policy"] == "a model given from Python"
    for when, tolerance in (("normalised_before", 0.2), ("normalised_after", 0.15)):
        assert noted[when]["mean"] == pytest.approx(0.0, abs=tolerance) and noted[when]["mean"] != 0.0  # fresh ones
        assert noted[when]["std"] == pytest.approx(1.0, abs=tolerance)
    assert (noted["normalised_after"]["gain"], noted["normalised_after"]["bias"]) == (gain, bias)
    assert noted["normalised_before"]["gain"] != gain


def tuned_from(setting: Setting) -> Any:
    """The body that a setting's run starts from, as a policy."""
    return tiny_model(setting.family, seed=3), tiny_tokenizer()


def test_every_measurement_has_samples_of_its_own(tmp_path: Path) -> None:
    """Before and after training, and to check each; the same of them whenever they are drawn again."""
    assembly: Any = assemble(FULL, tmp_path / "run")
    samples = assembly.samples
    loaded = samples.load()
    drawn = [[tuple(row) for row in samples.rows(loaded, 12, collect=collect)] for collect in range(4)]
    assert [tuple(row) for row in samples.rows(samples.load(), 12, collect=2)] == drawn[2]
    assert all(len(rows) == 12 for rows in drawn)
    assert len({row for rows in drawn for row in rows}) > 40


def test_training_on_ratings_starts_on_their_scale(tmp_path: Path) -> None:
    """Also of differences, of which a score gets half: the scale of two scores that are subtracted."""
    ratings = [item["rating"] for item in RATED]
    mean = sum(ratings) / len(ratings)  # about 7
    deviation = (sum((rating - mean) ** 2 for rating in ratings) / len(ratings)) ** 0.5
    settings = Normalisation(samples=512, check=512, after=False)
    assembly: Any = assemble(FULL, tmp_path / "rating", data=RATED, normalise=settings)
    execute(assembly)
    found = environment(tmp_path / "rating")
    assert found["normalised_before"]["mean"] == pytest.approx(mean, abs=0.2 * deviation)
    assert found["normalised_before"]["std"] == pytest.approx(deviation, rel=0.15)
    assert "normalised_after" not in found and assembly.normalised is None
    assert assembly.policy.gain.item() != found["normalised_before"]["gain"]  # it is trained

    pairs = [
        {"prompt": item["prompt"], "completions": item["completions"][:2], "difference": value}
        for item, value in zip(JUDGED, (2.0, -6.0, 2.0, 10.0, 2.0, 2.0), strict=True)
    ]  # halves: 1, -3, 1, 5, 1, 1 of mean 1 and deviation sqrt(32 / 6)
    execute(assemble(FULL, tmp_path / "difference", data=pairs, normalise=settings))
    found = environment(tmp_path / "difference")["normalised_before"]
    assert found["mean"] == pytest.approx(1.0, abs=0.4) and found["std"] == pytest.approx((32 / 6) ** 0.5, rel=0.15)


def test_without_normalisation_the_scale_is_what_training_left(tmp_path: Path) -> None:
    result = run_recipe(make_recipe(FULL, tmp_path / "run", normalise=None))
    facts = result.reward_model.facts
    # A choice says nothing about a constant: what moves the bias is rounding.
    assert facts.normalised is None and abs(facts.bias) < 0.01
    assert facts.gain == pytest.approx(1.0, abs=0.1) and facts.gain != 1.0


def test_a_policy_on_scores_without_a_scale_is_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, settings, warned in (("none", None, True), ("after", Normalisation(samples=8, before=False), False)):
        execute(assemble(FULL, tmp_path / name, normalise=settings, total_steps=1), export=True)
        caplog.clear()
        reward = RewardConfig.of({"taste": {"use": str(tmp_path / name)}})
        assembly = assemble(Setting("ppo", False, "llama"), tmp_path / f"{name}-ppo", reward=reward)
        assembly.check()
        assert ("never normalised" in caplog.text or "not normalised" in caplog.text) == warned, caplog.text


# What is trained ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora", "bert"])
def test_the_exported_folder_scores_as_the_trained_model(kind: str, tmp_path: Path) -> None:
    """A decoder's head has no bias, an encoder's has one; an adapter is merged."""
    changes: dict[str, Any] = {}
    if kind == "bert":
        changes = {"model": bert(), "normalise": Normalisation(samples=8, policy=llama())}
    result = run_recipe(make_recipe(LORA if kind == "lora" else FULL, tmp_path / "run", **changes))
    folder = result.path / "model"
    prompts, completions = [prompt for prompt, _ in TEXTS], [text for _, text in TEXTS]
    scores = result.reward_model.score(prompts, completions)
    assert scores == pytest.approx(logits_of_folder(folder, TEXTS, framed=kind == "bert"), abs=1e-5)
    assert scores == pytest.approx(TextRewardModel.load(result.path).score(prompts, completions), abs=1e-5)
    offset = json.loads((folder / "config.json").read_text())["tropism_reward_offset"]
    assert (offset == 0.0) == (kind == "bert")
    assert result.metrics["choice/accuracy"] >= 0 and (result.path / "report.html").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_records_and_models_from_python_stay_as_they_were(tmp_path: Path) -> None:
    """A policy that is also the reward model's body is neither trained nor changed, nor is one that is named."""
    model, tokenizer = tiny_model("llama", seed=3), tiny_tokenizer(pad=False)
    policy, other = tiny_model("gpt2", seed=4), tiny_tokenizer()
    before = [{name: value.clone() for name, value in each.state_dict().items()} for each in (model, policy)]
    configs = [settings_of(each) for each in (model, policy)]
    data = json.loads(json.dumps(JUDGED))
    for name, named in (("own", None), ("other", (policy, other))):
        settings = Normalisation(samples=8, policy=named)
        execute(assemble(FULL, tmp_path / name, model=(model, tokenizer), data=data, normalise=settings), export=True)
    assert data == JUDGED
    assert len(tokenizer) == len(other) == model.config.vocab_size
    assert tokenizer.pad_token is None
    for each, weights, config in zip((model, policy), before, configs, strict=True):
        assert_same(dict(each.state_dict()), weights)
        assert settings_of(each) == config
    assert environment(tmp_path / "own")["normalised_after"] != environment(tmp_path / "other")["normalised_after"]


def settings_of(model: Any) -> dict[str, Any]:
    """Its configuration but for dropout, which is switched off in every model that samples."""
    return {name: value for name, value in model.config.to_dict().items() if "drop" not in name}


def test_the_result_knows_what_was_trained(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trainer": TrainerConfig(progress=False), "sampling": Sampling(max_new_tokens=6)}
    settings |= {"total_steps": 1, "prompts_per_step": 4, "normalise": Normalisation(samples=8)}
    result = train(llama(), "reward-model", data=JUDGED, run=tmp_path / "run", **settings)
    assert result.reward_model.facts.normalised is not None
    with pytest.raises(ConfigError, match=r"trained a reward model and no policy; take result\.reward_model"):
        _ = result.policy
    other = run_recipe(make_recipe(Setting("sft", False, "llama"), tmp_path / "sft", total_steps=1))
    with pytest.raises(ConfigError, match=r"trained a policy and no reward model; take result\.policy"):
        _ = other.reward_model


# Going on -------------------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    prompts, completions = [prompt for prompt, _ in TEXTS], [text for _, text in TEXTS]
    first = run_recipe(make_recipe(LORA, run)).reward_model.score(prompts, completions)
    written = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    again = run_recipe(make_recipe(LORA, run), resume=True)
    assert "is finished after step 4 of 4: nothing is left to do" in capsys.readouterr().err
    scores = again.reward_model.score(prompts, completions)
    assert scores == pytest.approx(logits_of_folder(run / "model", TEXTS), abs=1e-5)
    assert scores == pytest.approx(first, abs=1e-5)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == written
    assert again.metrics["score/mean"] == pytest.approx(json.loads(last_line(run))["score/mean"])


def last_line(run: Path) -> str:
    return (run / "metrics.jsonl").read_text().splitlines()[-1]


@pytest.mark.parametrize("moment", ["before the scale", "in the middle of it", "before the export"])
def test_an_end_between_the_last_checkpoint_and_the_export(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Any = execute(assemble(FULL, tmp_path / "whole"), export=True)
    run = tmp_path / "stopped"
    stopped: Any = assemble(FULL, run)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    if moment == "before the scale":
        stopped.run.conclude = stop
    elif moment == "in the middle of it":
        rescale, calls = stopped.policy.rescale, [0]

        def rescaled(**numbers: float) -> None:
            calls[0] += 1
            rescale(**numbers)
            if calls[0] == 3:  # once before and once after training come two of them
                raise KeyboardInterrupt

        monkeypatch.setattr(stopped.policy, "rescale", rescaled)
    else:
        stopped.run.export = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run.execute(4, resumed=None)
    assert not (run / "model").exists()
    resumed: Any = execute(assemble(FULL, run, resume=True), export=True)
    assert_same(weights_of(resumed), weights_of(whole))
    for name in ("model/model.safetensors", "model/reward_model.json", "metrics.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for when in ("normalised_before", "normalised_after"):
        assert environment(run)[when] == environment(tmp_path / "whole")[when]


def test_more_steps_go_on_from_the_scale_of_training(tmp_path: Path) -> None:
    """What normalisation sets after training is no part of what is trained on."""
    whole: Any = execute(assemble(FULL, tmp_path / "whole", total_steps=4), export=True)
    execute(assemble(FULL, tmp_path / "longer", total_steps=2), export=True)
    longer: Any = execute(assemble(FULL, tmp_path / "longer", total_steps=4, resume=True), export=True)
    assert_same(weights_of(whole), weights_of(longer))
    scales = (
        (folder / "model" / "reward_model.json").read_bytes() for folder in (tmp_path / "whole", tmp_path / "longer")
    )
    assert len(set(scales)) == 1


def test_a_signal_while_the_first_samples_are_drawn_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = EmbeddedSampler.generate

    def interrupting(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return generate(*arguments, **named)

    monkeypatch.setattr(EmbeddedSampler, "generate", interrupting)
    with pytest.raises(Interrupted):
        run_recipe(make_recipe(FULL, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    assert run_recipe(make_recipe(FULL, tmp_path / "run")).path == tmp_path / "run"


def test_another_policy_for_the_scale_is_refused_on_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"

    def settings(seed: int, prompts: list[str]) -> dict[str, Any]:
        policy = (tiny_model("llama", seed=seed), tiny_tokenizer())
        return {"normalise": Normalisation(samples=8, policy=policy, data=prompts)}

    stopped: Any = assemble(FULL, run, **settings(1, PROMPTS))
    stop_after(stopped, 2, signal.SIGTERM)
    with pytest.raises(Interrupted):
        execute(stopped)
    for changed in (settings(2, PROMPTS), settings(1, [*PROMPTS[:-1], "yes"])):
        with pytest.raises(
            ModelError, match="the policy that the scores are put on a scale with, or its prompts, are not"
        ):
            assemble(FULL, run, resume=True, **changed)
    more = {"normalise": replace(settings(1, PROMPTS)["normalise"], samples=9)}
    with pytest.raises(ConfigError, match=r"normalise\.samples: 8 -> 9"):
        assemble(FULL, run, resume=True, **more)
    capsys.readouterr()
    execute(assemble(FULL, run, resume=True, **settings(1, PROMPTS)))
    said = capsys.readouterr().err
    assert "normalised after training on 8" in said and "before" not in said  # which was done
