"""``train_agent_with_evaluation``: its files, its order, its ends, and the examples of TextRL's README."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tiny_textrl import ITEMS, LettersEnv, make_actor, make_env, play_episode
from tropism.envs.textrl import TextRLActor, TextRLEnv, train_agent_with_evaluation
from tropism.errors import ConfigError


class StepEnv(TextRLEnv):
    """Every token is worth 1, so that an episode's return counts its tokens."""

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        return 1


def trained(outdir: Path, kind: Any = LettersEnv, **changes: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """An agent and its environment after some training, with quick settings."""
    env = make_env(kind, max_length=changes.pop("max_length", 4))
    agent = make_actor(env, act_deterministically=False).agent_ppo(update_interval=4, epochs=1)
    settings: dict[str, Any] = {
        "steps": 20, "eval_n_steps": None, "eval_n_episodes": 2, "eval_interval": 6, "outdir": outdir
    }  # fmt: skip
    _, history = train_agent_with_evaluation(agent, env, **{**settings, **changes})
    return agent, env, history


def rows_of(outdir: Path) -> list[dict[str, str]]:
    lines = [line.split("\t") for line in (outdir / "scores.txt").read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


# Files ----------------------------------------------------------------------------------------------------------------


def test_what_is_written(tmp_path: Path) -> None:
    out = tmp_path / "somewhere" / "new"
    agent, env, history = trained(out, checkpoint_freq=8)
    assert {path.name for path in out.iterdir()} == {"scores.txt", "best", "8_checkpoint", "16_checkpoint", "20_finish"}
    header = (out / "scores.txt").read_text().splitlines()[0].split("\t")
    assert header[:8] == ["steps", "episodes", "elapsed", "mean", "median", "stdev", "max", "min"]
    assert header[8:] == [name for name, _ in agent.get_statistics()]
    rows = rows_of(out)
    assert len(rows) == len(history) >= 2
    for row, entry in zip(rows, history, strict=True):
        assert float(row["mean"]) == entry["eval_score"]
        assert float(row["min"]) <= float(row["median"]) <= float(row["max"])
        spread = float(row["max"]) - float(row["min"])
        assert float(row["stdev"]) == pytest.approx(spread / math.sqrt(2))  # of two
    agent.load(out / "best")  # as the README does
    assert len(make_actor(env).predict("a cat")) == 2


def test_evaluation_comes_at_the_first_end_of_an_episode_after_the_interval(tmp_path: Path) -> None:
    ends: list[int] = []
    env = make_env(max_length=4)
    agent = make_actor(env).agent_ppo(update_interval=100)

    def note(env: Any, agent: Any, step: int) -> None:
        if all(reason is not None for reason in env.finish_reasons):
            ends.append(step)

    train_agent_with_evaluation(agent, env, 40, None, 1, 7, tmp_path, step_hooks=[note])
    found = [int(row["steps"]) for row in rows_of(tmp_path)]
    expected, due = [], 7
    for step in [*ends, 40] if ends[-1] != 40 else ends:
        if step >= due:
            expected.append(step)
            due = step - step % 7 + 7
    assert found == expected and len(found) >= 3


def test_returns_are_sums_over_steps_and_samples(tmp_path: Path) -> None:
    trained(tmp_path, StepEnv, eval_n_episodes=None, eval_n_steps=4, max_length=4)
    for row in rows_of(tmp_path):
        assert 2 <= float(row["max"]) <= 8  # at most 4 tokens of 2 samples
    env = make_env(StepEnv, max_length=6)
    agent = make_actor(env).agent_ppo(update_interval=1000)
    train_agent_with_evaluation(agent, env, 3, 2, None, 1, tmp_path / "cut", train_max_episode_len=3)
    assert [float(row["mean"]) <= 4 for row in rows_of(tmp_path / "cut")]


def test_episodes_are_left_after_so_many_steps(tmp_path: Path) -> None:
    env = make_env(StepEnv, max_length=10)
    agent = make_actor(env).agent_ppo(update_interval=1000)
    train_agent_with_evaluation(agent, env, 12, None, 1, 100, tmp_path, train_max_episode_len=3)
    assert all(episode.steps <= 3 for episode in agent.learner.episodes)
    assert sum(episode.steps for episode in agent.learner.episodes) == 12


def test_what_the_last_step_leaves_open_is_learned_from(tmp_path: Path) -> None:
    env = make_env(StepEnv, max_length=30)
    agent = make_actor(env).agent_ppo(update_interval=2, epochs=1)
    train_agent_with_evaluation(agent, env, 2, None, 1, 100, tmp_path)
    assert agent.learner.trainer.counts.updates == 1
    play_episode(agent, env, most=1)  # a new episode can begin


def test_the_best_agent_is_kept(tmp_path: Path) -> None:
    bests: list[float] = []

    def hook(*, evaluator: Any, eval_stats: Any, **others: Any) -> None:
        assert set(others) == {"env", "agent", "step", "agent_stats", "env_stats"}
        bests.append(max(evaluator.max_score, eval_stats["mean"]))

    trained(tmp_path, steps=40, evaluation_hooks=[hook])
    assert bests == sorted(bests) and len(bests) >= 3
    best = max(float(row["mean"]) for row in rows_of(tmp_path))
    assert bests[-1] == best
    trained(tmp_path / "none", save_best_so_far_agent=False)
    assert not (tmp_path / "none" / "best").exists()


def test_training_stops_at_a_successful_score(tmp_path: Path) -> None:
    _, _, history = trained(tmp_path, StepEnv, successful_score=1.0)
    assert len(history) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("_finish")] != ["20_finish"]


def test_another_environment_may_evaluate_in_the_middle_of_episodes(tmp_path: Path) -> None:
    env = make_env(StepEnv, max_length=8)
    other = StepEnv(env.model, env.tokenizer, ITEMS, max_length=2)
    agent = make_actor(env).agent_ppo(update_interval=1000)
    _, history = train_agent_with_evaluation(
        agent, env, 8, None, 1, 2, tmp_path, eval_env=other, eval_during_episode=True, train_max_episode_len=8
    )
    assert [int(row["steps"]) for row in rows_of(tmp_path)] == [2, 4, 6, 8]
    assert len(history) == 4 and env.episode <= 8 and other.episode == 4
    assert all(episode.steps > 2 or not any(episode.cut) for episode in agent.learner.episodes)


def test_training_that_goes_on_counts_from_its_offset(tmp_path: Path) -> None:
    agent, env, _ = trained(tmp_path)
    before = len(rows_of(tmp_path))
    train_agent_with_evaluation(agent, env, 30, None, 1, 6, tmp_path, step_offset=20)
    assert len(rows_of(tmp_path)) > before and agent.t == 30
    assert (tmp_path / "30_finish").is_dir()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trained(tmp_path, steps=8, use_tensorboard=True)
    assert list(tmp_path.glob("events.out.tfevents.*"))


# Ends -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_saves_and_is_raised_again(tmp_path: Path, error: type[BaseException]) -> None:
    def hook(env: Any, agent: Any, step: int) -> None:
        if step == 5:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        trained(tmp_path, step_hooks=[hook])
    assert (tmp_path / "5_except" / "config.json").is_file()
    assert not (tmp_path / "5_finish").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_between_two_updates(tmp_path: Path, number: int) -> None:
    def hook(env: Any, agent: Any, step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, step_hooks=[hook])
    assert (tmp_path / "5_except" / "textrl.json").is_file()
    assert signal.getsignal(number) is before


def test_a_failing_reward_saves_too(tmp_path: Path) -> None:
    class Failing(LettersEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            raise ZeroDivisionError("by zero")

    with pytest.raises(ValueError, match="by zero"):
        trained(tmp_path, Failing)
    assert (tmp_path / "0_except").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_n_steps": 5}, "either eval_n_steps or eval_n_episodes"),
        ({"eval_n_episodes": None}, "either eval_n_steps or eval_n_episodes"),
        ({"eval_interval": 0}, "at least 1"),
        ({"checkpoint_freq": 0}, "at least 1"),
        ({"eval_during_episode": True}, "eval_env"),
    ],
)
def test_arguments_that_contradict_each_other(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


# The README -----------------------------------------------------------------------------------------------------------


class MyRLEnv(TextRLEnv):
    """README, example 1, with the reward that it describes: one at the end, for all samples."""

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        reward = 0
        if finish:
            reward = 1
        return reward


def readme_example(family: str, outdir: Path, *, steps: int, epochs: int, **changes: Any) -> tuple[Any, Any]:
    """Examples 1 and "gpt2", word for word but for the class of the environment and the model."""
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    observaton_list = [["explain how attention work"]]
    env = MyRLEnv(model, tokenizer, observation_input=observaton_list, max_length=20, compare_sample=2)
    actor = TextRLActor(
        env, model, tokenizer, act_deterministically=False, temperature=1, compare_sample=2, top_p=1.0,
        repetition_penalty=2, **changes,
    )  # fmt: skip
    agent = actor.agent_ppo(update_interval=2, minibatch_size=2, epochs=epochs)
    assert len(actor.predict(observaton_list[0])) == 2
    train_agent_with_evaluation(
        agent, env, steps=steps, eval_n_steps=None, eval_n_episodes=1, eval_interval=2, outdir=str(outdir)
    )
    assert len(actor.predict(observaton_list[0])) == 2
    agent.load(str(outdir / "best"))
    assert len(actor.predict("input text")) == 2
    return agent, env


@pytest.mark.parametrize(("family", "top_k"), [("gpt2", 10), ("bloom", 0)])
def test_examples_of_the_readme(tmp_path: Path, family: str, top_k: int) -> None:
    agent, _ = readme_example(family, tmp_path, steps=12, epochs=2, top_k=top_k)
    assert agent.t == 12 and rows_of(tmp_path)
    assert all(float(row["mean"]) == 2.0 for row in rows_of(tmp_path))


@pytest.mark.slow
def test_the_example_of_the_readme_with_its_own_numbers(tmp_path: Path) -> None:
    agent, _ = readme_example("gpt2", tmp_path, steps=100, epochs=10, top_k=10)
    assert agent.t == 100 and agent.learner.trainer.counts.updates >= 400
    assert all(bool(p.isfinite().all()) for p in agent.learner.policy.parameters())


def test_the_manual_loop_of_the_readme() -> None:
    model, tokenizer = tiny_model("bloom"), tiny_tokenizer()
    env = MyRLEnv(model, tokenizer, observation_input=[["testing sent"], ["testing sent two"]], max_length=8)
    actor = TextRLActor(env, model, tokenizer)
    agent = actor.agent_ppo(update_interval=10, minibatch_size=2000, epochs=20)
    n_episodes = 4
    max_episode_len = 200
    returns = []
    for i in range(1, n_episodes + 1):
        obs = env.reset()
        R = 0  # noqa: N806
        t = 0
        while True:
            action = agent.act(obs)
            obs, reward, done, _pred = env.step(action)
            R += reward  # noqa: N806
            t += 1
            reset = t == max_episode_len
            agent.observe(obs, reward, done, reset)
            if done or reset:
                break
        returns.append(R)
        if i % 2 == 0:
            assert len(agent.get_statistics()) == 6
    assert [row.tolist() for row in returns] == [[1.0, 1.0]] * n_episodes
    assert agent.learner.trainer.counts.updates > 0


def test_training_that_goes_on_keeps_the_best_agent_of_before(tmp_path: Path) -> None:
    class Paying(TextRLEnv):
        worth = 5.0

        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            return self.worth * finish

    trained(tmp_path, Paying, steps=12)
    kept = json.loads((tmp_path / "best" / "textrl.json").read_text())["steps"]
    Paying.worth = 1.0
    trained(tmp_path, Paying, steps=24, step_offset=12)
    assert json.loads((tmp_path / "best" / "textrl.json").read_text())["steps"] == kept
    Paying.worth = 9.0
    trained(tmp_path, Paying, steps=36, step_offset=24)
    assert json.loads((tmp_path / "best" / "textrl.json").read_text())["steps"] > 24


def test_training_that_goes_on_tells_of_a_damaged_score(tmp_path: Path) -> None:
    trained(tmp_path, steps=12)
    scores = tmp_path / "scores.txt"
    header, *rows = scores.read_text().splitlines()
    damaged = rows[0].split("\t")
    damaged[header.split("\t").index("mean")] = "0.4x"
    scores.write_text("\n".join([header, "\t".join(damaged)]) + "\n")
    with pytest.raises(ConfigError, match=r"scores\.txt holds a mean that is no number .*0\.4x.*another outdir"):
        trained(tmp_path, steps=24, step_offset=12)
