"""The source's own tests of its two trainers, as whole runs of a model of its test size.

27 tokens, a context of 8, 2 layers of width 7 with one head; queries of 2 tokens, responses of 3, batches of 8, 8
episodes. The rest of its suite has its counterparts where the parts are:

    core: exact_div, ceil_div     tests/algorithms/test_ppo.py, tests/recipes/test_lm_human_preferences.py
    core: cumulative_max          tests/data/test_label_files.py (pads inside of a row)
    core: top-k, top-p            tests/rollouts/test_distribution.py
    core: whiten, GAE, controller tests/ops/test_advantages.py, tests/algorithms/test_ppo.py
    hyperparams: typed overrides  tests/test_schema.py, tests/test_cli.py
    model: incremental, padding   tests/rollouts/test_kv_cache.py, tests/models/test_reward_model.py
    sample: scores                tests/rollouts/test_engine.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from tiny_models import tiny_model
from tiny_runs import execute, logged
from tropism.algorithms import PPO, Critic, KLControl, MissingEos, RewardModeling
from tropism.build import assembly_for
from tropism.config import Recipe
from tropism.data.config import DataConfig, Preparation
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling, Truncation
from tropism.training.config import OptimizerConfig, TrainerConfig
from tropism.training.normalisation import Normalisation

LETTERS = "abcdefghijklmnopqrstuvwxyz."
QUERY, RESPONSE, BATCH = 2, 3, 8
DRAWN = random.Random(1)
BOOKS = ["".join(DRAWN.choices(LETTERS, k=40)) for _ in range(16)]
"""The source's data set for tests: random texts of 40 characters."""
DEFAULTS = PPO(
    group_size=1,
    kl_coef=0.2,
    num_epochs=4,
    gamma=1.0,
    lam=0.95,
    clip_low=0.2,
    clip_high=0.2,
    critic=Critic(coef=0.1, clip=0.2, rate=1.0),
    whiten_rewards=True,
)
"""Of the source's class, not of a task."""


def source_pair() -> Any:
    """The source's test model and a tokenizer without any special token."""
    core = Tokenizer(WordLevel({letter: index for index, letter in enumerate(LETTERS)}, unk_token="."))
    core.pre_tokenizer = Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)
    size = {"vocab_size": len(LETTERS), "n_positions": 8, "n_layer": 2, "n_embd": 7, "n_head": 1}
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return tiny_model("gpt2", seed=1, **size, **none), tokenizer


def recipe(run: Path, algorithm: Any, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "model": source_pair(),
        "algorithm": algorithm,
        "run": str(run),
        "total_steps": 1,  # 8 episodes
        "prompts_per_step": BATCH,
        "sampling": Sampling(max_new_tokens=RESPONSE),
        "trainer": TrainerConfig(
            learning_rate=1e-3,
            schedule="linear",
            max_grad_norm=None,
            optimizer=OptimizerConfig(eps=1e-5, weight_decay=0.0),
            progress=False,
        ),
    }
    return Recipe(**{**fields, **changes})


def executed(made: Recipe) -> Any:
    return execute(assembly_for(made)(made), export=True)


def books(folder: Path, **settings: Any) -> DataConfig:
    path = folder / "books.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in BOOKS))
    return DataConfig(path=str(path), prompt_column="text", prepare=Preparation(length=QUERY, **settings))


# Reward ---------------------------------------------------------------------------------------------------------------


def labels(folder: Path, kind: str) -> str:
    """A label file of 24 records in the source's format, with its padding in every other query and response."""

    def ids(length: int, row: int) -> list[int]:
        found = [DRAWN.randrange(len(LETTERS)) for _ in range(length)]
        return [*found[:-1], 50259] if row % 2 else found

    records = []
    for row in range(24):
        record: dict[str, Any] = {"query": ids(QUERY, row)}
        if kind == "rating":
            record |= {"sample": ids(RESPONSE, row), "score": float(row % 5)}
        else:
            record |= {f"sample{k}": ids(RESPONSE, row + k) for k in range(4 if kind == "choice" else 2)}
            record |= {"best": row % 4} if kind == "choice" else {"difference": float(row % 5 - 2)}
        records.append(record)
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(records))
    return str(path)


def trained_reward(folder: Path, kind: str = "choice", **changes: Any) -> Any:
    fields = {"data": labels(folder, kind), "total_steps": 3, **changes}  # one epoch
    return executed(recipe(folder / f"reward-{kind}", RewardModeling(), **fields))


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a reward model with a scale."""
    folder = tmp_path_factory.mktemp("reward")
    settings = Normalisation(samples=64, data=books(folder), before=False)
    return Path(trained_reward(folder, normalise=settings).folder.path)


@pytest.mark.parametrize("kind", ["choice", "rating", "difference"])
def test_basic_scalar_rating_and_scalar_compare(kind: str, tmp_path: Path) -> None:
    assembly = trained_reward(tmp_path, kind)
    updates = logged(tmp_path / f"reward-{kind}", "update")
    # lr (1 - start / num_train), before the step.
    assert [row["optim/lr"] for row in updates] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3])
    assert all(row["optim/grad_norm"] > 0 and f"loss/{kind}" in row for row in updates)
    assert assembly.trainer.counts.samples == 24
    with torch.no_grad():
        head = assembly.policy.head.weight
        assert head.shape == (1, 7)
        assert abs(float(head.std()) - 8**-0.5) < 0.3  # N(0, 1 / (n_embd + 1)), hardly trained yet
        assert abs(assembly.policy.gain.item() - 1) < 0.01


def test_normalize_before(tmp_path: Path) -> None:
    """To the scale of the ratings 0 to 4, each about as often: mean 1.92 and deviation 1.41."""
    settings = Normalisation(samples=1024, check=1024, data=books(tmp_path), after=False)
    trained_reward(tmp_path, "rating", normalise=settings)
    found = json.loads((tmp_path / "reward-rating" / "environment.json").read_text())
    assert "normalised_after" not in found
    scores = [row % 5 for row in range(24)]
    mean = sum(scores) / 24
    assert found["normalised_before"]["mean"] == pytest.approx(mean, abs=0.15)
    deviation = (sum((score - mean) ** 2 for score in scores) / 24) ** 0.5
    assert found["normalised_before"]["std"] == pytest.approx(deviation, rel=0.1)


def test_normalize_both(tmp_path: Path) -> None:
    """1,024 samples, and as many fresh ones to check with."""
    settings = Normalisation(samples=1024, check=1024, data=books(tmp_path))
    assembly = trained_reward(tmp_path, normalise=settings)
    found = json.loads((tmp_path / "reward-choice" / "environment.json").read_text())
    for when in ("normalised_before", "normalised_after"):
        assert found[when]["mean"] == pytest.approx(0.0, abs=0.1) and found[when]["mean"] != 0.0
        assert found[when]["std"] == pytest.approx(1.0, abs=0.1) and found[when]["samples"] == 1024
    assert found["normalised_after"]["gain"] == assembly.policy.gain.item()


def test_save_of_a_reward_model(reward: Path, tmp_path: Path) -> None:
    """The folder is a plain classifier, whose pads, before a response or behind it, change no score."""
    model = AutoModelForSequenceClassification.from_pretrained(reward / "model")
    facts = json.loads((reward / "model" / "reward_model.json").read_text())
    assert facts["gain"] != 1.0 and facts["normalised"]["samples"] == 64
    pad = model.config.pad_token_id
    assert pad == len(LETTERS)
    with torch.no_grad():
        plain = model(input_ids=torch.tensor([[0, 1, 2, 3]])).logits
        padded = model(
            input_ids=torch.tensor([[0, 1, 2, 3, pad, pad]]), attention_mask=torch.tensor([[1] * 4 + [0] * 2])
        )
    torch.testing.assert_close(padded.logits, plain)
    assembly = executed(
        recipe(tmp_path / "on", RewardModeling(), model=str(reward / "model"), data=labels(tmp_path, "choice"))
    )
    assert assembly.trainer.counts.updates == 1


# Policy ---------------------------------------------------------------------------------------------------------------


def trained_policy(folder: Path, reward: Path, algorithm: PPO = DEFAULTS, **changes: Any) -> Any:
    fields = {"data": books(folder), "reward": RewardConfig.of({"rm": {"use": str(reward)}}), **changes}
    return executed(recipe(folder / "policy", algorithm, **fields))


def rollouts_of(folder: Path) -> dict[str, list[Any]]:
    table: dict[str, list[Any]] = pq.read_table(folder / "policy/rollouts/step-000001.parquet").to_pydict()
    return table


def test_defaults(reward: Path, tmp_path: Path) -> None:
    assembly = trained_policy(tmp_path, reward)
    assert (assembly.trainer.counts.samples, assembly.trainer.counts.updates) == (8, 4)
    (collect,), updates = logged(tmp_path / "policy", "collect"), logged(tmp_path / "policy", "update")
    assert collect["policy/kl_coef_used"] == 0.2
    assert collect["policy/sequence_kl"] == pytest.approx(0.0, abs=1e-6)
    assert collect["rollout/length_mean"] == RESPONSE  # nothing ends a response before
    assert {"loss/policy", "loss/value", "policy/approx_kl", "policy/clip_fraction"} <= updates[0].keys()
    assert [row["optim/lr"] for row in updates] == [1e-3] * 4  # per update of the source, which is a step of ours
    texts = rollouts_of(tmp_path)
    assert {len(prompt) for prompt in texts["prompt"]} == {QUERY}
    assert len(set(texts["reward/rm"])) > 1


def test_truncation(reward: Path, tmp_path: Path) -> None:
    """All three tokens are sampled and trained, and rewards see the text up to the first of some token.

    That -1 replaces the score of a response without one, test_ppo_pitfalls says.
    """
    sampling = Sampling(max_new_tokens=RESPONSE, truncation=Truncation(token="k", after=1, beyond="train"))
    algorithm = PPO(**{**vars(DEFAULTS), "missing_eos": MissingEos(score=-1.0), "whiten_rewards": False})
    assembly = trained_policy(tmp_path, reward, algorithm, sampling=sampling, prompts_per_step=64)
    assert assembly.trainer.counts.tokens == 64 * RESPONSE
    texts = rollouts_of(tmp_path)
    ends = [reason == "stop" for reason in texts["finish_reason"]]
    assert any(ends) and not all(ends) and {len(text) for text in texts["completion"]} == {2, 3}
    for text, end in zip(texts["completion"], ends, strict=True):
        assert ("k" in text[1:]) == end and (not end or text.index("k", 1) == len(text) - 1)
        assert end or len(text) == RESPONSE


def test_affixing(reward: Path, tmp_path: Path) -> None:
    """The policy reads prefix, query and suffix, the reward model query and response alone."""
    prepared = books(tmp_path, prefix="x", suffix="yz")
    assembly = trained_policy(tmp_path, reward, data=prepared)
    texts = rollouts_of(tmp_path)
    for prompt in assembly.prompts:
        assert len(prompt.ids) == QUERY + 3
        assert (prompt.ids[0], *prompt.ids[-2:]) == (LETTERS.index("x"), LETTERS.index("y"), LETTERS.index("z"))
    assert {len(prompt) for prompt in texts["prompt"]} == {QUERY}
    model = AutoModelForSequenceClassification.from_pretrained(reward / "model")
    offset = json.loads((reward / "model" / "config.json").read_text())["tropism_reward_offset"]
    pairs = list(zip(texts["prompt"], texts["completion"], strict=True))
    rows = torch.tensor([[LETTERS.index(letter) for letter in prompt + text] for prompt, text in pairs])
    with torch.no_grad():
        scores = model(input_ids=rows).logits[:, 0] + offset
    assert texts["reward/rm"] == pytest.approx(scores.tolist(), abs=1e-5)


def test_adaptive_kl(reward: Path, tmp_path: Path) -> None:
    """The first KL is 0 but for rounding, so that the coefficient falls as fast as it may: by 0.2 * 8 / 100."""
    algorithm = PPO(**{**vars(DEFAULTS), "kl": KLControl(target=3.0, horizon=100)})
    trained_policy(tmp_path, reward, algorithm, total_steps=2)
    first, second = logged(tmp_path / "policy", "collect")
    assert first["policy/kl_coef_used"] == 0.2
    assert second["policy/kl_coef_used"] == pytest.approx(0.2 * (1 - 0.2 * 8 / 100), rel=1e-9)


def test_save_of_a_policy(reward: Path, tmp_path: Path) -> None:
    assembly = trained_policy(tmp_path, reward)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy" / "model")
    ids = torch.tensor([[0, 5, 9, 26, 13]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, assembly.policy.model(input_ids=ids).logits)
        untrained = source_pair()[0](input_ids=ids).logits
    assert float((loaded(input_ids=ids).logits - untrained).abs().max()) > 1e-3
    assert (tmp_path / "policy" / "recipe.yaml").is_file()


def test_reward_training(tmp_path: Path) -> None:
    """A reward model, then a policy on it, each on the scale and with the samples of the other."""
    settings = Normalisation(samples=256, data=books(tmp_path))
    trained = trained_reward(tmp_path, normalise=settings)
    trained_policy(tmp_path, trained.folder.path, total_steps=2)
    rewards = [row["reward/mean"] for row in logged(tmp_path / "policy", "collect")]
    assert len(rewards) == 2 and all(abs(reward) < 1.5 for reward in rewards)  # of 8 samples each, deviation 1


# The state of a run ---------------------------------------------------------------------------------------------------


def test_pitfall_41_update_0_is_made_and_a_resumed_run_goes_on_with_everything(reward: Path, tmp_path: Path) -> None:
    """Seed 5 skips update 0 of fresh runs, takes up a coefficient only if it is not 0, and neither data nor randomness.

    tests/invariants/test_resume.py says the same of every method, after any update, bit for bit.
    """
    algorithm = PPO(**{**vars(DEFAULTS), "kl": KLControl(target=3.0, horizon=100)})
    more = {"total_steps": 3, "reward": RewardConfig.of({"rm": {"use": str(reward)}}), "data": books(tmp_path)}
    for name, stops in (("policy", False), ("stopped", True)):
        made = recipe(tmp_path / name, algorithm, **more)
        assembly = assembly_for(made)(made)
        if stops:
            assembly.run.export = _interrupt
            made_first = assembly.trainer.after_update
            counted: list[int] = []

            def after_update(metrics: Any, ended: bool, first: Any = made_first, counted: Any = counted) -> bool:
                counted.append(1)
                result: bool = first(metrics, ended)
                if len(counted) == 5:
                    raise RuntimeError("the machine fails")
                return result

            assembly.trainer.after_update = after_update
            with pytest.raises(RuntimeError):
                execute(assembly)
            made = recipe(tmp_path / name, algorithm, **more)
            assembly = assembly_for(made)(made, resume=True)
        execute(assembly)
    whole, resumed = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("policy", "stopped"))
    assert whole == resumed
    steps = [(row["step"], row["updates"]) for row in logged(tmp_path / "stopped", "update")]
    assert steps == [(1 + n // 4, 1 + n) for n in range(12)]
    assert [row["step"] for row in logged(tmp_path / "stopped", "collect")] == [1, 2, 3]


def _interrupt() -> None:
    raise AssertionError("exported before it was whole")
