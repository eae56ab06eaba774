"""The training loop of the TextRL facade: PFRL's ``train_agent_with_evaluation``, its arguments, files and order."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tropism.envs.textrl_agent import TextRLAgent
from tropism.errors import ConfigError
from tropism.storage import append_whole, write_whole, writing

SCORES = "scores.txt"
COLUMNS = ("steps", "episodes", "elapsed", "mean", "median", "stdev", "max", "min")

StepHook = Callable[[Any, TextRLAgent, int], None]


def play(
    env: Any, agent: TextRLAgent, n_steps: int | None, n_episodes: int | None, max_episode_len: int | None
) -> list[float]:
    """Returns of evaluation episodes, each the sum over steps and samples.

    Args:
        n_steps: play so many steps; an episode that they leave open counts only where it is the first. n_episodes: or
            so many episodes. max_episode_len: leave an episode after so many steps; None: never.
    """
    scores: list[float] = []
    steps = 0
    with agent.eval_mode():
        while len(scores) < n_episodes if n_episodes is not None else steps < (n_steps or 0):
            obs, total, length, ended = env.reset(), 0.0, 0, False
            while not ended and (n_steps is None or steps < n_steps):
                obs, reward, done, _ = env.step(agent.act(obs))
                total, length, steps = total + float(reward.sum()), length + 1, steps + 1
                ended = done or length == max_episode_len
                agent.observe(obs, reward, done, ended)
            if ended or not scores:
                scores.append(total)
    return scores


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The arguments of ``train_agent_with_evaluation`` beside agent and environment. Steps are the environment's."""

    steps: int
    """To train: a token of each sample."""
    eval_n_steps: int | None
    """Steps of an evaluation, or None."""
    eval_n_episodes: int | None
    """Episodes of an evaluation, or None; exactly one of the two is None."""
    eval_interval: int
    """Evaluate at the first end of an episode after so many steps."""
    outdir: Path
    """The folder for everything that is written."""
    checkpoint_freq: int | None = None
    """Save after so many steps; None: never."""
    train_max_episode_len: int | None = None
    """Leave training episodes after so many steps; None: never."""
    step_offset: int = 0
    """The step to count from, of training that goes on."""
    eval_max_episode_len: int | None = None
    """Leave evaluation episodes after so many steps; None: as in training."""
    successful_score: float | None = None
    """Stop once the best mean return is at least this; None: never."""
    step_hooks: tuple[StepHook, ...] = ()
    """Called after every step with (env, agent, step)."""
    evaluation_hooks: tuple[Callable[..., None], ...] = ()
    """Called after every evaluation, by name: env, agent, evaluator, step, eval_stats, agent_stats, env_stats."""
    save_best_so_far_agent: bool = True
    """Whether ``best/`` is written."""
    eval_during_episode: bool = False
    """Evaluate in the middle of episodes, too, which needs an ``eval_env`` of its own."""

    def __post_init__(self) -> None:
        if (self.eval_n_steps is None) == (self.eval_n_episodes is None):
            raise ConfigError("give either eval_n_steps or eval_n_episodes, and None for the other")
        for name in ("steps", "eval_n_steps", "eval_n_episodes", "eval_interval", "checkpoint_freq"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


class Evaluator:
    """Plays episodes from time to time, writes ``scores.txt``, and keeps the best agent."""

    def __init__(self, agent: TextRLAgent, env: Any, schedule: Schedule, log: logging.Logger) -> None:
        self.agent, self.env, self.schedule, self.log = agent, env, schedule, log
        self.outdir = schedule.outdir
        self.previous = schedule.step_offset - schedule.step_offset % schedule.eval_interval
        """The step of the last evaluation, rounded down to a multiple of the interval."""
        self.max_score = self._best_before()
        """The best mean return so far; of training that goes on, that of ``best/``."""
        self.tensorboard: Any = None
        self.started = time.monotonic()

    def _best_before(self) -> float:
        """The largest mean in ``scores.txt``, where training goes on and its best agent is there."""
        path = self.outdir / SCORES
        if self.schedule.step_offset == 0 or not path.exists() or not (self.outdir / "best").is_dir():
            return -math.inf
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        column = rows[0].index("mean") if rows and "mean" in rows[0] else None
        if column is None:
            raise ConfigError(f"{path} has no column 'mean'; take it away, or choose another outdir")
        try:
            return max((float(row[column]) for row in rows[1:] if len(row) > column), default=-math.inf)
        except ValueError as error:
            raise ConfigError(
                f"{path} holds a mean that is no number ({error}); mend it, or choose another outdir"
            ) from error

    def write_header(self) -> None:
        """Begin ``scores.txt``; training that goes on at a step adds to one that is there."""
        path = self.outdir / SCORES
        if self.schedule.step_offset > 0 and path.exists():
            return
        names = [name for name, _ in self.agent.get_statistics()]
        write_whole(path, ("\t".join((*COLUMNS, *names)) + "\n").encode())

    def evaluate_if_necessary(self, t: int, episodes: int) -> float | None:
        """The mean return, where an evaluation is due; None elsewhere."""
        if t < self.previous + self.schedule.eval_interval:
            return None
        mean = self.evaluate(t, episodes)
        self.previous = t - t % self.schedule.eval_interval
        return mean

    def evaluate(self, t: int, episodes: int) -> float:
        """Play, write a row, call the hooks, and save the agent where it is the best so far."""
        plan = self.schedule
        longest = plan.eval_max_episode_len or plan.train_max_episode_len
        with self.agent.learner.processes.interrupts.abandonable():
            scores = play(self.env, self.agent, plan.eval_n_steps, plan.eval_n_episodes, longest)
        numbers = {
            "mean": statistics.fmean(scores),
            "median": statistics.median(scores),
            "stdev": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "max": max(scores),
            "min": min(scores),
        }
        agent_stats = self.agent.get_statistics()
        elapsed = time.monotonic() - self.started
        row = (t, episodes, elapsed, *numbers.values(), *(value for _, value in agent_stats))
        append_whole(self.outdir / SCORES, ("\t".join(map(str, row)) + "\n").encode())
        if self.tensorboard is not None:
            for name, value in (*((f"eval/{k}", v) for k, v in numbers.items()), *agent_stats):
                self.tensorboard.add_scalar(name if "/" in name else f"extras/{name}", value, t)
            self.tensorboard.flush()
        for hook in plan.evaluation_hooks:
            hook(
                env=self.env,
                agent=self.agent,
                evaluator=self,
                step=t,
                eval_stats=numbers,
                agent_stats=agent_stats,
                env_stats=[],
            )
        mean = numbers["mean"]
        if mean > self.max_score:
            self.log.info("the best score so far is %s (it was %s)", mean, self.max_score)
            self.max_score = mean
            if plan.save_best_so_far_agent:
                self.agent.save(self.outdir / "best")
        return mean


def train_agent_with_evaluation(
    agent: TextRLAgent,
    env: Any,
    steps: int,
    eval_n_steps: int | None,
    eval_n_episodes: int | None,
    eval_interval: int,
    outdir: str | Path,
    checkpoint_freq: int | None = None,
    train_max_episode_len: int | None = None,
    step_offset: int = 0,
    eval_max_episode_len: int | None = None,
    eval_env: Any = None,
    successful_score: float | None = None,
    step_hooks: Sequence[StepHook] = (),
    evaluation_hooks: Sequence[Callable[..., None]] = (),
    save_best_so_far_agent: bool = True,
    use_tensorboard: bool = False,
    eval_during_episode: bool = False,
    logger: logging.Logger | None = None,
) -> tuple[TextRLAgent, list[dict[str, Any]]]:
    """Train, evaluating from time to time. ``Schedule`` says what the arguments are; ``eval_env`` is where evaluation
    plays (None: ``env``), ``use_tensorboard`` writes evaluations for TensorBoard, too, ``logger`` is told the progress.

    ``outdir`` gets ``scores.txt`` (a row per evaluation), ``best/`` (the agent of the best mean return),
    ``<step>_checkpoint/``, ``<step>_finish/`` at the end, and ``<step>_except/`` where an error or Ctrl-C ends it.

    Returns:
        The agent, and per evaluation its statistics with ``eval_score``.

    Raises:
        ConfigError: arguments that contradict each other.
        Exception: whatever the environment, the reward or the update raised; the agent has been saved.
    """
    given = locals()
    fields_given = {f.name: given[f.name] for f in fields(Schedule)}
    hooks = {"step_hooks": tuple(step_hooks), "evaluation_hooks": tuple(evaluation_hooks)}
    schedule = Schedule(**{**fields_given, **hooks, "outdir": Path(outdir)})
    if eval_during_episode and (eval_env is None or eval_env is env):
        raise ConfigError(
            "eval_during_episode would reset the environment in the middle of a training episode; give an eval_env "
            "that is another environment"
        )
    loop = _Loop(agent, env, env if eval_env is None else eval_env, schedule, logger or logging.getLogger("tropism"))
    loop.run(use_tensorboard=use_tensorboard)
    return agent, loop.history


class _Loop:
    """The loop itself, in PFRL's order."""

    def __init__(self, agent: TextRLAgent, env: Any, eval_env: Any, schedule: Schedule, log: logging.Logger) -> None:
        self.agent, self.env, self.schedule, self.log = agent, env, schedule, log
        self.evaluator = Evaluator(agent, eval_env, schedule, log)
        self.history: list[dict[str, Any]] = []
        self.t, self.episodes = schedule.step_offset, 0

    def run(self, *, use_tensorboard: bool) -> None:
        """Everything from the first file to the last."""
        outdir = self.schedule.outdir
        with writing(outdir):
            outdir.mkdir(parents=True, exist_ok=True)
        if use_tensorboard:
            self.evaluator.tensorboard = _writer(outdir)
        self.evaluator.write_header()
        for each in (self.env, self.evaluator.env):
            self.agent.watch(each)
        self.agent.forget_episode()
        self.agent.t = self.t
        interrupts = self.agent.learner.processes.interrupts
        interrupts.rescue = lambda: self._save("except")
        try:
            with interrupts.listening():
                self._play()
        except (Exception, KeyboardInterrupt):
            self.agent.forget_episode()
            self._save("except")
            raise
        finally:
            interrupts.rescue, interrupts.received = None, None
            if self.evaluator.tensorboard is not None:
                self.evaluator.tensorboard.close()
        self._save("finish")

    def _play(self) -> None:
        """Episodes until the steps are done or the score is reached."""
        abandonable, plan = self.agent.learner.processes.interrupts.abandonable, self.schedule
        obs, total, length = None, 0.0, 0
        while self.t < plan.steps:
            with abandonable():
                if obs is None:
                    obs, total, length = self.env.reset(), 0.0, 0
                obs, reward, done, _ = self.env.step(self.agent.act(obs))
            self.t, length, total = self.t + 1, length + 1, total + float(reward.sum())
            # What the last step leaves open ends there, so that it is learned from, and what follows can begin.
            ended = done or length == plan.train_max_episode_len or self.t == plan.steps
            self.agent.observe(obs, reward, done, ended)
            for hook in plan.step_hooks:
                hook(self.env, self.agent, self.t)
            if ended:
                self.episodes += 1
                self._tell(total)
                obs = None
            if ended or plan.eval_during_episode:
                self._evaluate()
                if plan.successful_score is not None and self.evaluator.max_score >= plan.successful_score:
                    return
            if plan.checkpoint_freq and self.t % plan.checkpoint_freq == 0:
                self._save("checkpoint")

    def _evaluate(self) -> None:
        score = self.evaluator.evaluate_if_necessary(self.t, self.episodes)
        if score is not None:
            self.history.append({**dict(self.agent.get_statistics()), "eval_score": score})

    def _save(self, kind: str) -> None:
        self.agent.save(self.schedule.outdir / f"{self.t}_{kind}")

    def _tell(self, total: float) -> None:
        outdir = self.schedule.outdir
        self.log.info("outdir:%s step:%s episode:%s R:%s", outdir, self.t, self.episodes, total)
        self.log.info("statistics:%s", self.agent.get_statistics())


def _writer(outdir: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise ConfigError('use_tensorboard needs the package tensorboard; pip install "tropism[trackers]"') from missing
    return SummaryWriter(log_dir=str(outdir))
