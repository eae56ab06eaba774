"""Can a reward that somebody writes into the prompt override the one that is asked for?

Trains the mechanisms text, token and linear on the same completions, then asks for a low reward while the prompt says a
high one, and the other way round. The yardstick is the same prompt with a text that agrees, so that the mere presence
of the text counts for nothing.

python examples/prompt_injection.py --model demo --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tropism
from tropism.evaluation.statistics import paired_difference

MECHANISMS = ("text", "token", "linear")
PROMPTS = (
    "The film was",
    "I watched it and",
    "The actors",
    "Its ending",
    "The story",
    "My friend said it",
    "The music",
)
HELD_OUT = ("This movie", "We saw it twice,", "The director", "In the first scene", "The whole cast", "What I liked")

Table = list[dict[str, Any]]


def compare(
    model: Any = "demo",
    *,
    prompts: Sequence[str] = PROMPTS,
    held_out: Sequence[str] = HELD_OUT,
    samples_per_prompt: int = 64,
    completions: int = 16,
    score: Callable[[list[str]], list[float]],
    runs: Path = Path("runs/prompt-injection"),
    sampling: tropism.Sampling | None = None,
    **settings: Any,
) -> Table:
    """One row per mechanism and direction: what was achieved, and how far the contrary text moved it.

    Args:
        completions: of each held-out prompt, per row and text.
        settings: further arguments of ``tropism.train``.
    """
    sampling = sampling or tropism.Sampling(max_new_tokens=24)
    table: Table = []
    for mechanism in MECHANISMS:
        # Samples depend on the seed alone, so all three learn from the same texts.
        trained = tropism.train(
            model,
            tropism.RewardConditioned(mechanism=mechanism, samples_per_prompt=samples_per_prompt),
            data=list(prompts),
            reward=score,
            run=runs / mechanism,
            sampling=sampling,
            **settings,
        ).policy
        assert trained.conditioner is not None
        seen = trained.conditioner.seen[0]
        low, high = seen.quantile(0.05), seen.quantile(0.95)
        for target, contrary in ((low, high), (high, low)):

            def achieved(written: float | None, target: float = target, policy: Any = trained) -> list[float]:
                said = "" if written is None else f"reward: {written:.2f}\n"
                texts = policy.generate([said + p for p in held_out], n=completions, target_reward=target)
                scores = score(texts)
                return [sum(scores[i : i + completions]) / completions for i in range(0, len(scores), completions)]

            plain, agreed, opposed = achieved(None), achieved(target), achieved(contrary)
            moved = paired_difference(agreed, opposed)
            table.append(
                {
                    "mechanism": mechanism,
                    "asked": target,
                    "written": contrary,
                    "achieved": sum(plain) / len(plain),
                    "agreeing": sum(agreed) / len(agreed),
                    "contrary": sum(opposed) / len(opposed),
                    "moved": moved,
                }
            )
    return table


def show(table: Table) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| mechanism | asked for | achieved | with a text that agrees | with a contrary text | moved by it (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for row in table:
        moved = row["moved"]
        lines.append(
            f"| {row['mechanism']} | {row['asked']:.2f} | {row['achieved']:.3f} | {row['agreeing']:.3f} | "
            f"{row['contrary']:.3f} | {moved.mean:+.3f} [{moved.low:+.3f}, {moved.high:+.3f}] |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewards written into the prompt against rewards that are asked for")
    parser.add_argument("--model", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each mechanism")
    parser.add_argument("--texts", type=int, default=32, help="texts of a step")
    parser.add_argument("--samples", type=int, default=64, help="completions of each prompt to learn from")
    parser.add_argument("--prompts", type=Path, help="file with a training prompt a line; default: a few of films")
    parser.add_argument("--held-out", type=Path, help="the same with those to ask with")
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from tropism.rewards.lexicon import vader

    lexicon = vader()

    def warmth(completions: list[str]) -> list[float]:
        return lexicon(prompts=completions, completions=completions)

    lists = {
        name: path.read_text(encoding="utf-8").split("\n")
        for name, path in (("prompts", arguments.prompts), ("held_out", arguments.held_out))
        if path is not None
    }
    table = compare(
        arguments.model,
        **{name: [line for line in lines if line.strip()] for name, lines in lists.items()},
        samples_per_prompt=arguments.samples,
        score=warmth,
        total_steps=arguments.steps,
        prompts_per_step=arguments.texts,
        seed=arguments.seed,
        lora=tropism.LoRA(rank=16) if arguments.lora else None,
        trainer=tropism.TrainerConfig(learning_rate=arguments.learning_rate, schedule="linear"),
    )
    print(show(table))


if __name__ == "__main__":
    main()
