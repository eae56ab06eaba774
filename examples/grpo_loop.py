"""GRPO in one file, without a trainer: sample, score, make a batch, update.

Everything that the method is stands here, from ``tropism.ops``; the library lends the model, the sampler and the
reward. A test holds this loop to the same numbers as ``tropism.train(model, GRPO(...), ...)``.

    python examples/grpo_loop.py --steps 30
    python examples/grpo_loop.py --model HuggingFaceTB/SmolLM2-135M --lora-rank 0 --learning-rate 1e-5
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tropism import LoRA, Policy, Reference, RewardConfig, Sampling, load_model
from tropism.data.order import PromptStream
from tropism.data.prompts import make_prompts
from tropism.models.lora import add_lora
from tropism.ops import clipped_policy_loss, group_advantages, kl_k1, kl_k3, masked_mean
from tropism.rewards import RewardHarness
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.types import PolicyBatch, Rollouts

PROMPTS = ["The film was", "I watched it twice and", "My opinion of the actors:", "When the lights went on, I"]


def train(
    model: Any,
    prompts: Sequence[str],
    reward: Any,
    *,
    steps: int = 30,
    seed: int = 0,
    prompts_per_step: int = 2,
    group_size: int = 8,
    learning_rate: float = 7e-4,
    kl_coef: float = 0.15,
    clip: float = 0.2,
    max_new_tokens: int = 32,
    lora: LoRA | None = None,
) -> tuple[Policy, list[dict[str, float]]]:
    """Turn ``model`` toward ``reward``; returns the policy and one row of numbers per step."""
    # The model. A fresh adapter changes nothing yet, and switched off it is the reference.
    loaded = load_model(model)
    weights = loaded.model.requires_grad_(True) if lora is None else add_lora(loaded.model, lora, seed=seed)
    policy = Policy(weights)
    reference = Reference(policy)
    optimizer = torch.optim.AdamW(
        [p for p in policy.parameters() if p.requires_grad], lr=learning_rate, weight_decay=0.0
    )

    # The tools: prompts in a keyed order, a sampler, token ids back to text, the reward.
    stream = PromptStream(make_prompts(prompts, loaded.tokenizer), seed=seed)
    sampler = EmbeddedSampler(loaded.tokenizer, loaded.tokens.eos_ids)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    transcribe = Transcriber(loaded.tokenizer)
    harness = RewardHarness(RewardConfig.of(reward))

    history = []
    for step in range(steps):
        # Sample: every prompt is answered group_size times, the answers of one prompt side by side.
        chosen = [prompt for _, prompt in stream.take(prompts_per_step)]
        key = StreamKey(seed=seed, purpose="training", collect=step)
        rollouts = sampler.generate(policy, chosen, sampling, group_size, key=key).to(policy.device)

        # Score: what the reward sees is text; one number per completion comes back.
        texts = transcribe(rollouts.to("cpu"), [prompt for prompt in chosen for _ in range(group_size)])
        rewards = harness.score(texts).totals.to(policy.device)

        # Learn.
        batch = make_batch(reference, rollouts, rewards, group_size=group_size)
        loss = update(policy, optimizer, batch, clip=clip, kl_coef=kl_coef)
        kl = (kl_k1(batch.old_logprobs, batch.ref_logprobs) * batch.completion_mask).sum(-1).mean()
        history.append({"reward": float(rewards.mean()), "loss": loss, "sequence_kl": float(kl)})
        print(f"step {step + 1}  reward {history[-1]['reward']:.3f}  KL {history[-1]['sequence_kl']:.2f} nats")
    return policy, history


@torch.no_grad()
def make_batch(reference: Reference, rollouts: Rollouts, rewards: Tensor, *, group_size: int) -> PolicyBatch:
    """Everything the update compares against.

    A completion's advantage is its reward against its group, in standard deviations, and is the same at all its tokens.
    ``old_logprobs`` are those of the sampling itself.
    """
    advantages = group_advantages(rewards, group_size, scale="group")
    with reference.active() as model:
        ref_logprobs = model(**rollouts.inputs, temperature=rollouts.temperature).need("logprobs")
    return PolicyBatch.of(
        rollouts, ref_logprobs=ref_logprobs, advantages=advantages[:, None] * rollouts.completion_mask
    )


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: PolicyBatch, *, clip: float, kl_coef: float
) -> float:
    """One optimizer step; returns the loss, a mean over all tokens of the batch."""
    logprobs = policy(**batch.inputs, temperature=batch.temperature).need("logprobs")
    surrogate = clipped_policy_loss(logprobs, batch.old_logprobs, batch.advantages, clip_low=clip, clip_high=clip)
    penalty = kl_k3(logprobs, batch.ref_logprobs)
    loss = masked_mean(surrogate + kl_coef * penalty, batch.loss_mask)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO in one file")
    parser.add_argument("--model", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--reward", default="vader", help="name of a reward")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    parser.add_argument("--kl-coef", type=float, default=0.15)
    parser.add_argument("--lora-rank", type=int, default=16, help="0 trains all weights")
    arguments = parser.parse_args()
    train(
        arguments.model,
        PROMPTS,
        arguments.reward,
        steps=arguments.steps,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        kl_coef=arguments.kl_coef,
        lora=LoRA(rank=arguments.lora_rank) if arguments.lora_rank else None,
    )


if __name__ == "__main__":
    main()
