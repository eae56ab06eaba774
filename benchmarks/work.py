"""What is measured: the standard works, the systems that do them, and the texts that every system is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["grpo", "rloo", "ppo", "sft", "dpo", "rollout"]
Precision = Literal["fp32", "bf16"]

STEPS = 64
"""Of an epoch; none does as many."""
KL_COEF = 0.04
"""Weight of the KL to the reference in every work that trains on rewards."""
LEARNING_RATE = 1e-6
"""So small that the model, and with it the work, stays the same over all steps."""
TRL_PPO_OVER_GRPO = 24.8 / 15.3
"""TRL 1.12's PPO, its last, against TRL 1.16's GRPO with its defaults, measured on W1 on one machine."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One piece of work, the same for every system that does it."""

    name: str
    title: str
    kind: Kind
    prompts: int
    """Distinct prompts of a step (with a pair each for DPO), or texts of an SFT step."""
    group: int
    """Completions per prompt; 1 for SFT, 2 for DPO."""
    prompt_tokens: int
    """Tokens of every prompt; 0 for SFT."""
    lengths: tuple[int, ...]
    """New tokens of each row, the eos that is forced in included; for SFT the tokens of each text."""
    model: str = "main"
    """The model that --model names (main), or the name of a random one in ``benchmarks.models.SIZES``."""

    def __post_init__(self) -> None:
        if len(self.lengths) != self.rows:
            raise ValueError(f"{self.name}: {len(self.lengths)} lengths for {self.rows} rows")

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def tokens(self) -> int:
        """New tokens of a step; all tokens for SFT."""
        return sum(self.lengths)

    @property
    def max_new_tokens(self) -> int:
        return max(self.lengths)

    @property
    def equal_lengths(self) -> bool:
        """Whether min_new_tokens alone gives the lengths; else an eos is forced into every row."""
        return len(set(self.lengths)) == 1

    def flops(self, body: int, head: int) -> float:
        """Floating-point operations in matrix products that a step needs at least; attention scores are left out.

        Two per weight and token forward, six with the backward pass. Every distinct prompt counts once per pass, the
        vocabulary projection only where a token is predicted.

        Args:
            body, head: weights in the linear layers of the transformer, and in the vocabulary projection.
        """
        if self.kind == "sft":
            return 6.0 * (body * self.tokens + head * (self.tokens - self.rows))
        trunk = 2.0 * body * (self.prompts * self.prompt_tokens + self.tokens)
        forward = trunk + 2.0 * head * self.tokens
        if self.kind == "rollout":
            return forward
        if self.kind == "dpo":
            return 4 * forward  # reference and update
        # Rollout, reference, update; PPO's reward model and values have no vocabulary projection.
        return 5 * forward + (2 * trunk if self.kind == "ppo" else 0)


def uneven(count: int) -> tuple[int, ...]:
    """``count`` lengths uniform in 4 to 64, in one fixed order that mixes long and short in every group."""
    return tuple(4 + round(60 * (7 * index % count) / max(1, count - 1)) for index in range(count))


def _even(name: str, title: str, kind: Kind, shape: tuple[int, int, int, int], model: str = "main") -> Work:
    prompts, group, prompt_tokens, new = shape
    return Work(
        name=name,
        title=title,
        kind=kind,
        prompts=prompts,
        group=group,
        prompt_tokens=prompt_tokens,
        lengths=(new,) * (prompts * group),
        model=model,
    )


_ALL = (
    _even("rollout", "rollout: 8 prompts of 16 x 4 x 64 new tokens", "rollout", (8, 4, 16, 64)),
    _even("grpo-w1", "GRPO W1: 4 prompts of 16 x 4 x 48 new tokens", "grpo", (4, 4, 16, 48)),
    Work(
        name="grpo-w2",
        title="GRPO W2: W1 with 4 to 64 new tokens",
        kind="grpo",
        prompts=4,
        group=4,
        prompt_tokens=16,
        lengths=uneven(16),
    ),
    _even("grpo-w3", "GRPO W3: 4 prompts of 256 x 8 x 48 new tokens", "grpo", (4, 8, 256, 48)),
    _even("rloo-w1", "RLOO W1: 4 prompts of 16 x 4 x 48 new tokens", "rloo", (4, 4, 16, 48)),
    _even("ppo-w1", "PPO W1: 16 prompts of 16 x 48 new tokens, reward model", "ppo", (16, 1, 16, 48)),
    _even("sft", "SFT: 16 texts of 64 tokens", "sft", (16, 1, 0, 64)),
    _even("dpo", "DPO: 8 prompts of 16 with a pair of 48 tokens each", "dpo", (8, 2, 16, 48)),
    _even("grpo-w1-3m", "GRPO W1 with a random model of 3 M parameters", "grpo", (4, 4, 16, 48), "3M"),
)
WORKS = {work.name: work for work in _ALL}


@dataclass(frozen=True, kw_only=True)
class System:
    """Something that can do works: a library in one of its precisions."""

    name: str
    module: str
    """Module of this package that runs it."""
    precision: Precision
    ours: bool
    kinds: tuple[Kind, ...]
    checkpointing: bool = False
    """Whether activations are recomputed in the backward pass (TRL's default)."""
    compiled: bool = False
    """Whether we sample with ``sampling.compile``."""
    default: bool = True
    """Whether it is measured unless --systems says otherwise."""


_TRAINING: tuple[Kind, ...] = ("grpo", "rloo", "sft", "dpo")
_SYSTEMS = (
    System(name="tropism-fp32", module="ours", precision="fp32", ours=True, kinds=(*_TRAINING, "ppo", "rollout")),
    System(
        name="tropism-compiled",
        module="ours",
        precision="fp32",
        ours=True,
        kinds=("grpo", "rloo", "ppo", "rollout"),
        compiled=True,
    ),
    System(name="tropism-bf16", module="ours", precision="bf16", ours=True, kinds=(*_TRAINING, "ppo", "rollout")),
    System(name="trl-fp32", module="trl_peer", precision="fp32", ours=False, kinds=_TRAINING),
    System(name="trl-defaults", module="trl_peer", precision="bf16", ours=False, kinds=_TRAINING, checkpointing=True),
    System(name="trl-bf16", module="trl_peer", precision="bf16", ours=False, kinds=_TRAINING, default=False),
    System(name="hf-fp32", module="hf_peer", precision="fp32", ours=False, kinds=("rollout",)),
    System(name="hf-bf16", module="hf_peer", precision="bf16", ours=False, kinds=("rollout",)),
    System(name="vllm-bf16", module="vllm_peer", precision="bf16", ours=False, kinds=("rollout",)),
)
SYSTEMS = {system.name: system for system in _SYSTEMS}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker process is told to do."""

    task: str
    """Module of this package that does it."""
    device: str
    """cpu or cuda."""
    threads: int
    scratch: str
    """A folder for whatever the worker writes."""
    model: str
    """Folder of the model."""
    precision: Precision = "fp32"
    checkpointing: bool = False
    compiled: bool = False
    work: Work | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Job:
        values: dict[str, Any] = json.loads(line)
        if values["work"] is not None:
            values["work"]["lengths"] = tuple(values["work"]["lengths"])
            values["work"] = Work(**values["work"])
        return cls(**values)

    @property
    def its_work(self) -> Work:
        assert self.work is not None, f"the task {self.task} needs a work"
        return self.work


def reward(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that costs nothing and differs within a group."""
    return [float(len(completion) % 7) for completion in completions]


# Texts ---------------------------------------------------------------------------------------------------------------

PASSAGE = """The film that we saw last night in the old theatre by the river was really quite a surprise to all of us.
It begins with a young woman who comes home after many years and finds that the house of her father has been sold to a
man she does not know. She walks through the small town, talks with people who remember her, and slowly learns why he
left without a word. Nothing in the story is loud, and yet every scene has its weight: the long road in the rain, the
empty kitchen, the letter on the table that nobody wants to open. The music is simple and never tells you what to feel.
Some of my friends thought that it was too slow, and one of them fell asleep before the end, but I could have watched it
for another hour. What I liked best was the way in which the light changes from morning to evening, so that you always
know what time of the day it is. When we came out it was late, the streets were quiet, and we stood for a while on the
bridge and talked about our own fathers and the houses in which we grew up."""


def texts_of(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """``count`` different texts, each of exactly ``tokens`` tokens as the tokenizer encodes them by default.

    Raises:
        ValueError: no such texts were found.
    """
    # The random models' tokenizer knows the words w0, w1, ... alone.
    words = PASSAGE.split() if "w0" not in tokenizer.get_vocab() else [f"w{(11 * i) % 50}" for i in range(50)]
    found: dict[str, None] = {}
    for start in range(len(words)):
        cycle = words[start:] + words[:start]
        for used in range(max(1, tokens // 3), tokens + 1):
            text = " ".join((cycle * (used // len(cycle) + 1))[:used])
            length = len(tokenizer(text)["input_ids"])
            if length == tokens:
                found[text] = None
            if length >= tokens:
                break
        if len(found) == count:
            return list(found)
    raise ValueError(f"found {len(found)} texts of exactly {tokens} tokens; {count} are needed")


def pairs_of(tokenizer: Any, work: Work, count: int) -> list[dict[str, str]]:
    """``count`` different pairs of the lengths of a work, the eos that every system appends included.

    So many that no step sees a pair twice: what the reference says of it is computed in that step.

    Raises:
        ValueError: no such pairs were found.
    """
    prompts = texts_of(tokenizer, work.prompts, work.prompt_tokens)
    fitting = [
        " " + text
        for text in texts_of(tokenizer, max(16, 4 * work.prompts), work.max_new_tokens - 1)
        if all(
            len(tokenizer(f"{prompt} {text}")["input_ids"]) == work.prompt_tokens + work.max_new_tokens - 1
            for prompt in prompts
        )
    ]
    pairs = [
        {"prompt": prompt, "chosen": fitting[first], "rejected": fitting[(first + gap) % len(fitting)]}
        for gap in range(1, len(fitting))
        for first in range(len(fitting))
        for prompt in prompts
    ]
    if len(pairs) < count:
        raise ValueError(
            f"found {len(pairs)} pairs of {work.prompt_tokens} + {work.max_new_tokens} tokens, not {count}"
        )
    return pairs[:count]
