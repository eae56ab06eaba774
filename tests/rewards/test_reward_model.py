"""Trained reward models as rewards: the same scores as in training, found by their folders."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tiny_models import BOS_ID, CHARACTERS, EOS_ID, tiny_model, tiny_tokenizer
from tiny_reward_models import ENCODERS, FACTS, NORMAL, padded, tiny_encoder, tiny_reward_model
from tiny_runs import Setting, assemble, execute, logged
from tropism.errors import ConfigError, ModelError
from tropism.models.reward_files import save_reward_model
from tropism.models.reward_model import RewardModel
from tropism.models.saving import save_plain
from tropism.recipe_identity import reward_sources
from tropism.rewards import RewardConfig, RewardHarness, RewardTerm, reward_model, terms
from tropism.rewards.registry import make_reward
from tropism.rewards.resolve import resolve_reward
from tropism.types import RewardInputs

Make = Callable[..., RewardInputs]
PROMPTS = ["the cat", "oh", "is it so, my friend?", ""]
COMPLETIONS = [" sat on a mat.", " no!", "", "we ran and ran and ran."]
GRPO = Setting("grpo", False, "llama")


def save(folder: Path, family: str = "llama", *, seed: int = 0, **facts: Any) -> RewardModel:
    """A reward model with gain and bias in a folder; and the live model."""
    model, tokenizer = tiny_reward_model(family, seed=seed, gain=2.5, bias=-0.75)
    save_reward_model(model, tokenizer, folder, replace(FACTS, **{"normalised": NORMAL, **facts}))
    return model


def save_run(run: Path, **facts: Any) -> RewardModel:
    model = save(run / "model", **facts)
    (run / "recipe.yaml").write_text("algorithm: {name: reward-model}\n")
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "my-rm"
    save_run(folder)
    return folder


def ids_of(text: str) -> list[int]:
    """Of the tiny tokenizer: five special tokens, then the characters."""
    return [5 + CHARACTERS.index(letter) for letter in text]


@torch.no_grad()
def live_scores(model: RewardModel, texts: list[str], *, framed: bool = False) -> list[float]:
    rows = [[BOS_ID, *ids_of(text), EOS_ID] if framed else ids_of(text) for text in texts]
    found: list[float] = model(*padded(rows)).tolist()
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_scores_are_those_of_training(family: str, batch_size: int, tmp_path: Path) -> None:
    """Of texts of different lengths in one batch; the head of a BERT has a bias, that of a decoder none."""
    model = save(tmp_path / "model", family)
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = live_scores(model, texts, framed=family in ENCODERS)
    assert len({round(score, 3) for score in expected}) == 4
    for folder in (tmp_path / "model", tmp_path):
        reward = make_reward("reward-model", {"model": str(folder), "batch_size": batch_size, "device": "cpu"})
        assert reward(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad", ["none", "eos"])
def test_scores_where_the_body_has_no_pad_of_its_own(pad: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(pad=False)
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    model, tokenizer = tiny_reward_model("llama", gain=0.5, bias=3.0, tokenizer=tokenizer)
    save_reward_model(model, tokenizer, tmp_path, FACTS)
    reward = make_reward("reward-model", {"model": str(tmp_path), "device": "cpu"})
    texts = ["a cat", "no", "is it so<eos>"]
    rows = [ids_of("a cat"), ids_of("no"), [*ids_of("is it so"), EOS_ID]]
    with torch.no_grad():
        expected = model(*padded(rows)).tolist()
    assert reward(prompts=[""] * 3, completions=texts) == pytest.approx(expected, abs=1e-5)


def test_it_reads_what_it_was_trained_to_read(tmp_path: Path) -> None:
    model = save(tmp_path / "model", text="completion", max_length=6)
    reward = make_reward("reward-model", {"model": str(tmp_path / "model"), "device": "cpu"})
    expected = live_scores(model, ["we ran", "no"])  # the end of a long completion is cut, as in training
    assert reward(prompts=["oh ", "oh "], completions=["we ran and ran.", "no"]) == pytest.approx(expected, abs=1e-5)
    model = save(tmp_path / "both", max_length=6)
    reward = make_reward("reward-model", {"model": str(tmp_path / "both"), "device": "cpu"})
    expected = live_scores(model, ["at ran", "we ran"])  # a long prompt loses its beginning first
    got = reward(prompts=["a cat", "the dog"], completions=[" ran", "we ran and ran."])
    assert got == pytest.approx(expected, abs=1e-5)


# Found by a path ------------------------------------------------------------------------------------------------------


def test_a_path_in_place_of_a_name(run: Path, make_inputs: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    inputs = make_inputs(["a cat", "no"], ids=[[1], [1]])
    path = f"{run.parent.name}/my-rm"
    whole = RewardHarness(RewardConfig.of(path)).score(inputs)
    assert list(whole.terms) == ["my-rm"] and len(set(whole.per_completion.tolist())) == 2
    forms: list[Any] = [
        Path(path),
        {"use": path},
        {"use": f"./{path}/"},
        {"use": f"{path}/model"},
        {"use": str(run.absolute())},
        {"terms": {"my-rm": {"use": path, "args": {"batch_size": 1, "device": "cpu"}}}},
        {"my-rm": path},
        {"my-rm": Path(path)},
    ]
    for form in forms:
        found = RewardHarness(RewardConfig.of(form)).score(inputs)
        assert list(found.terms) == ["my-rm"]
        torch.testing.assert_close(found.per_completion, whole.per_completion, atol=1e-5, rtol=0)
    for form in ({"use": path, "weight": 0.5}, {"good": (path, 0.5)}, {"good": RewardTerm(use=path, weight=0.5)}):
        found = RewardHarness(RewardConfig.of(form)).score(inputs)
        torch.testing.assert_close(found.per_completion, 0.5 * whole.per_completion, atol=1e-5, rtol=0)
    monkeypatch.chdir(run.parent)
    for form in ("my-rm", Path("my-rm")):  # a folder that is there needs no "/", unless it is named like a reward
        found = RewardHarness(RewardConfig.of(form)).score(inputs)
        torch.testing.assert_close(found.per_completion, whole.per_completion, atol=1e-5, rtol=0)
    (run.parent / "length").mkdir()
    with pytest.raises(ConfigError, match=r"reward 'length'"):
        RewardHarness(RewardConfig.of("length"))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/my-rm", "my-rm"),
        ("runs/my-rm/", "my-rm"),
        ("/data/runs/my rm 0.5!", "my-rm-0-5"),
        ("runs/my-rm/model", "my-rm"),
        ("./wärme", "wärme"),
        ("runs/mean", "my_mean"),
        ("../..", "reward_model"),
        ("runs/rm.v2", "rm-v2"),
    ],
)
def test_the_name_of_a_path(path: str, name: str) -> None:
    assert list(RewardConfig.of(path).terms) == [name]


def test_other_strings_are_what_they_were(tmp_path: Path) -> None:
    assert RewardTerm(use="some/where.py:judge").name == "judge"
    with pytest.raises(ConfigError, match=r"--allow-code"):
        resolve_reward(RewardTerm(use=f"{tmp_path}/judge.py:judge"))
    with pytest.raises(ConfigError, match=r"unknown reward 'a/judge.py'.*file.py:function"):
        resolve_reward(RewardTerm(use="a/judge.py"))
    with pytest.raises(ConfigError, match=r"unknown reward 'reward-modle'. Did you mean 'reward-model'"):
        resolve_reward(RewardTerm(use="reward-modle"))
    with pytest.raises(ConfigError, match=r"reward term name 'runs/rm': .*without '/'"):
        RewardConfig.of({"runs/rm": "vader"})


def test_folders_that_are_no_reward_model(tmp_path: Path, run: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            resolve_reward(RewardTerm(use=str(path)))
        with pytest.raises(ConfigError) as named:
            make_reward("reward-model", {"model": str(path)})
        assert str(named.value) == str(caught.value)
        return str(caught.value)

    near = refused(run.parent / "my-rn")
    assert f"there is no folder {run.parent}/my-rn" in near and f"did you mean {run}?" in near and "seen from" in near
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text("algorithm: {name: reward-model}\n")
    assert f"has no model yet; finish it with `tropism train --resume {tmp_path}/unfinished`" in refused(
        tmp_path / "unfinished"
    )
    save_plain(tiny_model("llama"), tiny_tokenizer(), tmp_path / "policy" / "model")
    (tmp_path / "policy" / "recipe.yaml").write_text("algorithm: {name: grpo}\n")
    for path in (tmp_path / "policy", tmp_path / "policy" / "model"):
        text = refused(path)
        assert "was not trained as a reward model (it has no reward_model.json)" in text
        assert f"{{use: classifier, args: {{model: {tmp_path}/policy/model}}}}" in text
    (tmp_path / "empty").mkdir()
    assert "holds no model; give the run folder of a reward model" in refused(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is a file; a reward model is given by its run folder" in refused(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"args.model: .* names the reward model already"):
        resolve_reward(RewardTerm(use=str(run), args={"model": "other"}))
    with pytest.raises(ConfigError, match=r"takes no argument 'label'"):
        resolve_reward(RewardTerm(use=str(run), args={"label": 0}))
    with pytest.raises(ConfigError, match=r"batch_size: expected at least 1"):
        resolve_reward(RewardTerm(use=str(run), args={"batch_size": 0}))


def test_a_damaged_folder(tmp_path: Path) -> None:
    save(tmp_path / "model")
    (tmp_path / "model" / "reward_model.json").write_text("{}")
    with pytest.raises(ModelError, match=r"reward_model.json is damaged"):
        RewardHarness(RewardConfig.of(str(tmp_path / "model")))
    save_plain(tiny_encoder("bert", labels=3), tiny_tokenizer(), tmp_path / "three")
    FACTS.write(tmp_path / "three")
    with pytest.raises(ConfigError, match=r"the classifier has several"):
        RewardHarness(RewardConfig.of(str(tmp_path / "three")))


# In a run -------------------------------------------------------------------------------------------------------------


def test_pitfall_49_a_reward_model_without_a_scale_is_told(
    tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A penalty of -1 for completions without an end means something beside scores of mean 0 and deviation 1 alone."""
    save_run(tmp_path / "raw", normalised=None)
    caplog.set_level(logging.WARNING, logger="tropism")
    execute(assemble(GRPO, tmp_path / "run", reward=RewardConfig.of(str(tmp_path / "raw"))))
    told = [record.message for record in caplog.records if "never normalised" in record.message]
    assert len(told) == 1
    for part in (str(tmp_path / "raw"), "no known scale", "missing_eos.score", "kl_coef", "normalise: {samples: 256}"):
        assert part in told[0]
    caplog.clear()
    for config in (
        str(run),  # it was normalised
        {
            "terms": {
                "raw": {"use": str(tmp_path / "raw"), "weight": 0},
                "length": {"use": "length", "args": {"target": 3}},
            }
        },
    ):
        RewardHarness(RewardConfig.of(config))
    assert "normalised" not in caplog.text
    for form in ({"use": "reward-model", "args": {"model": str(tmp_path / "raw")}}, str(tmp_path / "raw" / "model")):
        caplog.clear()
        RewardHarness(RewardConfig.of(form))
        assert caplog.text.count("never normalised") == 1


def test_a_run_with_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The recipe keeps the path as it was given, and going on with another model is told."""
    monkeypatch.chdir(tmp_path)
    save_run(Path("runs/my-rm"))
    reward = RewardConfig.of({"use": "runs/my-rm", "args": {"device": "cpu"}})
    execute(assemble(GRPO, Path("runs/policy"), reward=reward))
    recipe = yaml.safe_load(Path("runs/policy/recipe.yaml").read_text())
    assert recipe["reward"]["terms"]["my-rm"]["use"] == "runs/my-rm"
    assert RewardConfig.of(recipe["reward"]) == reward
    assert all("reward/my-rm" in line for line in logged(Path("runs/policy"), "collect"))
    execute(assemble(GRPO, Path("runs/policy"), reward=reward, resume=True, total_steps=3))
    assert "the model of the reward" not in capsys.readouterr().err
    save_run(Path("runs/my-rm"), seed=9)
    execute(assemble(GRPO, Path("runs/policy"), reward=reward, resume=True, total_steps=4))
    assert "the model of the reward 'my-rm' has changed" in capsys.readouterr().err
    environment = json.loads(Path("runs/policy/environment.json").read_text())
    assert [["model of the reward" in line for line in entry["differs"]] for entry in environment["resumed"]] == [
        [False],
        [False, True],
    ]


def test_its_files_have_a_fingerprint(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "rm")
    by_path = RewardConfig.of({"rm": str(tmp_path / "rm")})
    by_name = RewardConfig.of({"rm": {"use": "reward-model", "args": {"model": str(tmp_path / "rm")}}})
    first = reward_sources(by_path)
    assert first == reward_sources(by_name) == reward_sources(RewardConfig.of({"rm": str(run)}))
    weights = tmp_path / "rm" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for place in (len(content) // 2, len(content) - 1):
        content[place] ^= 1
        weights.write_bytes(content)
        assert reward_sources(by_path) not in (first, {})
        content[place] ^= 1
    monkeypatch.setattr(reward_model, "_WHOLE_BYTES", 4096)
    monkeypatch.setattr(reward_model, "_BLOCK", 512)
    weights.write_bytes(content)
    sampled = reward_sources(by_path)
    assert sampled == reward_sources(by_path) != first
    content[-1] ^= 1
    weights.write_bytes(content)
    assert reward_sources(by_path) != sampled


def test_in_a_worker_process(run: Path, make_inputs: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(["a cat", "no"], ids=[[1], [1]])
    here = RewardHarness(RewardConfig.of(str(run))).score(inputs)
    monkeypatch.setattr(terms, "resolve_reward", None)  # the model is loaded there alone
    harness = RewardHarness(RewardConfig.of({"use": str(run), "timeout": 60}))
    try:
        there = harness.score(inputs)
    finally:
        harness.close()
    torch.testing.assert_close(there.per_completion, here.per_completion, atol=1e-5, rtol=0)


def test_a_cache_knows_one_model_from_another(tmp_path: Path, make_inputs: Make) -> None:
    inputs = make_inputs(["a cat", "no"], ids=[[1], [1]])
    save_run(tmp_path / "rm")
    config = RewardConfig.of({"use": str(tmp_path / "rm"), "cache": str(tmp_path / "cache.db")})

    def scored() -> tuple[list[float], float]:
        batch = RewardHarness(config).score(inputs)
        return batch.per_completion.tolist(), batch.metrics.get("throughput/cached/rm", 0.0)

    first, cached = scored()
    assert cached == 0 and scored() == (first, 2.0)
    save_run(tmp_path / "rm", seed=5)
    second, cached = scored()
    assert cached == 0 and second != first
