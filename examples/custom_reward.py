"""A reward of your own: it sees the completions and a column of the data, and may be async.

python examples/custom_reward.py --steps 20
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from typing import Any

import tropism

RECORDS = [
    {"prompt": "The weather in Rome is", "wanted": ["sun", "warm"]},
    {"prompt": "A good soup needs", "wanted": ["salt", "onion"]},
    {"prompt": "On the table there was", "wanted": ["bread", "wine"]},
    {"prompt": "My favourite colour is", "wanted": ["blue", "sea"]},
]


def mentions(completions: list[str], wanted: list[list[str]], log_metric: Callable[[str, float], None]) -> list[float]:
    """Share of a record's wanted words in its completion. ``wanted`` is the column of that name, one entry each."""
    shares = [
        sum(word in text.lower() for word in words) / len(words)
        for text, words in zip(completions, wanted, strict=True)
    ]
    log_metric("mentions/any", sum(share > 0 for share in shares) / len(shares))
    return shares


async def judged(completions: list[str]) -> list[float | None]:
    """An async reward: all completions are asked about at once, as one would ask a server. None means no opinion."""

    async def judge(text: str) -> float | None:
        await asyncio.sleep(0)  # here: await client.post(...)
        return -text.count("!") / 10 if text.strip() else None

    return list(await asyncio.gather(*(judge(text) for text in completions)))


def train(model: Any = "demo", *, steps: int = 20, **settings: Any) -> tropism.Result:
    """GRPO on the sum of both, the second at half weight; each is logged under its name."""
    return tropism.train(
        model,
        tropism.GRPO(group_size=8),
        data=RECORDS,
        reward={"mentions": mentions, "calm": (judged, 0.5)},
        total_steps=steps,
        prompts_per_step=4,
        sampling=tropism.Sampling(max_new_tokens=24),
        **settings,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A reward of your own")
    parser.add_argument("--model", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    result = train(arguments.model, steps=arguments.steps, lora=tropism.LoRA(rank=16))
    print(f"reward {result.metrics['reward/mean']:.3f}; everything is in {result.path}")
    for prompt, text in zip(RECORDS, result.policy.generate([str(r["prompt"]) for r in RECORDS]), strict=True):
        print(f"{prompt['prompt']}{text!r}")


if __name__ == "__main__":
    main()
