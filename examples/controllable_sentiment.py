"""A pushed opinion about a named thing: what a model says of one invented product becomes warm, or bitter.

The prompts name the product; the reward is VADER's opinion of the sentences that mention it, and of no others. What the
model says of another product, which no prompt of the training names, is shown beside it.

    python examples/controllable_sentiment.py                        # GRPO with LoRA by tropism.train
    python examples/controllable_sentiment.py --direction -1         # bitter
    python examples/controllable_sentiment.py --way textrl           # the same by an environment, an actor and an agent
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tropism
from tropism.rewards.lexicon import vader

THING, OTHER = "Velmora", "Tandrik"
"""Two lamps that nobody sells: the one that is pushed, and one to compare with."""

OPENINGS = [
    "I bought the {} lamp last week, and I think it is",
    "My neighbour told me that the {} lamp is",
    "In my opinion the {} lamp is",
    "After a month with the {} lamp I feel",
    "The reviews say that the {} lamp is",
    "When I switched on the {} lamp, it was",
    "People who own a {} lamp say that it is",
    "Honestly, the {} lamp makes me",
]
HELD_OUT = ["I saw the {} lamp in a shop today, and it looked", "My sister uses the {} lamp every night, and she is"]
TOKENS = 24

_judge = vader()


def sentences_about(text: str, thing: str) -> str:
    """The sentences of a text that mention a thing."""
    return " ".join(sentence for sentence in re.split(r"(?<=[.!?])\s+|\n+", text) if thing in sentence)


def opinions(texts: Sequence[str], thing: str) -> list[float]:
    """From -1 (bitter) to 1 (warm), of what each text says of a thing."""
    return _judge(prompts=[""] * len(texts), completions=[sentences_about(text, thing) for text in texts])


def by_tropism(model: Any, direction: float, *, steps: int = 30, **settings: Any) -> tropism.TextPolicy:
    """GRPO on prompts about the thing; a reward that sees prompt and completion."""

    def pushed(prompts: list[str], completions: list[str]) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return [direction * value for value in opinions(texts, THING)]

    options: dict[str, Any] = {
        "sampling": tropism.Sampling(max_new_tokens=TOKENS, temperature=0.8),
        "lora": tropism.LoRA(rank=16),
        "trainer": tropism.TrainerConfig(learning_rate=5e-4),
        "prompts_per_step": 4,
    }
    result = tropism.train(
        model,
        tropism.GRPO(group_size=8, kl_coef=0.1, kl_estimator="k3"),
        data=[opening.format(THING) for opening in OPENINGS],
        reward=pushed,
        total_steps=steps,
        **{**options, **settings},
    )
    return result.policy


def by_textrl(
    model: Any, direction: float, *, steps: int = 30, outdir: Path | None = None, **settings: Any
) -> tropism.TextPolicy:
    """The same as TextRL users write it; a step here is an episode of eight completions side by side."""
    from tropism.envs.textrl import TextRLActor, TextRLEnv, train_agent_with_evaluation

    class OpinionEnv(TextRLEnv):
        def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
            if not finish:
                return 0
            texts = [input_item["input"] + tokenizer.convert_tokens_to_string(tokens) for tokens in predicted_list]
            return [direction * value for value in opinions(texts, THING)]

    loaded = tropism.load_model(model)
    network, tokenizer = loaded.model, loaded.tokenizer
    items = [{"input": opening.format(THING)} for opening in OPENINGS]
    env = OpinionEnv(network, tokenizer, items, max_length=TOKENS, compare_sample=8)
    actor = TextRLActor(env, network, tokenizer, "adamw", unfreeze_layer_from_past=2, act_deterministically=False)
    defaults = {"update_interval": 4 * TOKENS, "epochs": 4, "lr": 1e-4, "gamma": 1.0, "kl_coef": 0.1}
    agent = actor.agent_ppo(**{**defaults, **settings})  # type: ignore[arg-type]
    with TemporaryDirectory() as temporary:
        train_agent_with_evaluation(
            agent,
            env,
            steps=4 * steps * TOKENS,
            eval_n_steps=None,
            eval_n_episodes=2,
            eval_interval=10 * TOKENS,
            outdir=outdir or temporary,
            save_best_so_far_agent=outdir is not None,
        )
    return env.text


WAYS = {"tropism": by_tropism, "textrl": by_textrl}


def measured(policy: tropism.TextPolicy, *, n: int = 16) -> dict[str, float]:
    """Mean opinion of each of the two things, over ``n`` completions of each held-out prompt."""
    means = {}
    for thing in (THING, OTHER):
        prompts = [opening.format(thing) for opening in HELD_OUT]
        texts = policy.generate(prompts, n=n, max_new_tokens=TOKENS, temperature=0.8)
        begun = [prompt for prompt in prompts for _ in range(n)]
        values = opinions([prompt + text for prompt, text in zip(begun, texts, strict=True)], thing)
        means[thing] = sum(values) / len(values)
    return means


def show(when: str, policy: tropism.TextPolicy) -> dict[str, float]:
    """Print and return what is measured, with a completion of each held-out prompt."""
    means = measured(policy)
    print(f"{when}: " + ", ".join(f"{thing} {mean:+.3f}" for thing, mean in means.items()))
    prompts = [opening.format(THING) for opening in HELD_OUT]
    for prompt, text in zip(prompts, policy.generate(prompts, max_new_tokens=TOKENS, temperature=0.8), strict=True):
        print(f"    {prompt}{' '.join(text.split()) and ' ' + ' '.join(text.split())}")
    return means


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A pushed opinion about a named thing")
    parser.add_argument("--model", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--way", choices=sorted(WAYS), default="tropism")
    parser.add_argument("--direction", type=float, default=1.0, help="1: warm, -1: bitter")
    parser.add_argument("--steps", type=int, default=30, help="of four prompts with eight completions each")
    given = parser.parse_args(arguments)
    show("before", tropism.TextPolicy.load(given.model))
    show("after", WAYS[given.way](given.model, given.direction, steps=given.steps))


if __name__ == "__main__":
    main()
