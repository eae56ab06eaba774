"""PPO in one file, without a trainer: sample, score, make a batch, update.

Everything that the method is stands here, from ``tropism.ops``; the library lends the model, the sampler and the
reward. A test holds this loop to the same numbers as ``tropism.train(model, PPO(...), ...)``.

    python examples/ppo_loop.py --steps 30
    python examples/ppo_loop.py --model HuggingFaceTB/SmolLM2-135M --lora-rank 0 --learning-rate 1e-5
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from tropism import LoRA, Policy, Reference, RewardConfig, Sampling, load_model
from tropism.data.order import PromptStream
from tropism.data.prompts import make_prompts
from tropism.models.heads import ValueHead
from tropism.models.lora import add_lora
from tropism.ops import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_k1,
    masked_mean,
    masked_whiten,
    penalised_rewards,
)
from tropism.rewards import RewardHarness
from tropism.rollouts.engine import EmbeddedSampler
from tropism.rollouts.randomness import StreamKey
from tropism.rollouts.transcribe import Transcriber
from tropism.types import PolicyBatch, RewardBatch, Rollouts

PROMPTS = ["The film was", "I watched it twice and", "My opinion of the actors:", "When the lights went on, I"]


def train(
    model: Any,
    prompts: Sequence[str],
    reward: Any,
    *,
    steps: int = 30,
    seed: int = 0,
    prompts_per_step: int = 4,
    group_size: int = 4,
    num_epochs: int = 4,
    learning_rate: float = 2e-4,
    head_rate: float = 10.0,
    kl_coef: float = 0.02,
    gamma: float = 1.0,
    lam: float = 0.95,
    clip: float = 0.2,
    value_coef: float = 0.1,
    max_new_tokens: int = 32,
    lora: LoRA | None = None,
) -> tuple[Policy, list[dict[str, float]]]:
    """Turn ``model`` toward ``reward``; returns the policy and one row of numbers per step."""
    # The model, with a critic that starts at zero and learns faster than the model does.
    loaded = load_model(model)
    weights = loaded.model.requires_grad_(True) if lora is None else add_lora(loaded.model, lora, seed=seed)
    head = ValueHead(loaded.model.config.get_text_config().hidden_size).to(loaded.model.device)
    policy = Policy(weights, value_head=head)
    reference = Reference(policy)
    groups = [
        {"params": [p for p in weights.parameters() if p.requires_grad], "lr": learning_rate},
        {"params": list(head.parameters()), "lr": learning_rate * head_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    # The tools: prompts in a keyed order, a sampler, token ids back to text, the reward.
    stream = PromptStream(make_prompts(prompts, loaded.tokenizer), seed=seed)
    sampler = EmbeddedSampler(loaded.tokenizer, loaded.tokens.eos_ids)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    transcribe = Transcriber(loaded.tokenizer)
    harness = RewardHarness(RewardConfig.of(reward))

    history = []
    for step in range(steps):
        # Sample.
        chosen = [prompt for _, prompt in stream.take(prompts_per_step)]
        key = StreamKey(seed=seed, purpose="training", collect=step)
        rollouts = sampler.generate(policy, chosen, sampling, group_size, key=key)

        # Score: what the reward sees is text; numbers per completion (or per token) come back.
        rewards = harness.score(transcribe(rollouts, [prompt for prompt in chosen for _ in range(group_size)]))

        # Learn: several passes over the same completions, which is what the clip is for.
        batch = make_batch(policy, reference, rollouts, rewards, kl_coef=kl_coef, gamma=gamma, lam=lam)
        losses = [update(policy, optimizer, batch, clip=clip, value_coef=value_coef) for _ in range(num_epochs)]
        kl = (kl_k1(batch.old_logprobs, batch.ref_logprobs) * batch.completion_mask).sum(-1).mean()
        history.append({"reward": float(rewards.totals.mean()), "loss": losses[-1], "sequence_kl": float(kl)})
        print(f"step {step + 1}  reward {history[-1]['reward']:.3f}  KL {history[-1]['sequence_kl']:.2f} nats")
    return policy, history


@torch.no_grad()
def make_batch(
    policy: Policy,
    reference: Reference,
    rollouts: Rollouts,
    rewards: RewardBatch,
    *,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> PolicyBatch:
    """Everything the updates compare against.

    The reward of a completion stands at its last token, and every token pays for its share of the KL. What a token was
    worth beyond what the critic expected is its advantage (GAE); advantage plus value is the critic's target.
    """
    token_rewards = rewards.by_token(rollouts.completion_lengths, rollouts.completion_ids.shape[1]).to(policy.device)
    rollouts = rollouts.to(policy.device)
    mask = rollouts.completion_mask
    values = policy(**rollouts.inputs, want={"values"}).need("values")
    with reference.active() as model:
        ref_logprobs = model(**rollouts.inputs, temperature=rollouts.temperature).need("logprobs")
    token_rewards = penalised_rewards(token_rewards, kl_k1(rollouts.logprobs, ref_logprobs), mask, kl_coef=kl_coef)
    advantages = gae(token_rewards, values, mask, gamma=gamma, lam=lam)
    return PolicyBatch.of(
        rollouts,
        ref_logprobs=ref_logprobs,
        # Every update sees the whole batch, so its advantages can be whitened once for all of them.
        advantages=masked_whiten(advantages, mask),
        returns=(advantages + values) * mask,
        old_values=values,
    )


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, batch: PolicyBatch, *, clip: float, value_coef: float
) -> float:
    """One optimizer step on policy and critic; returns the loss, a mean over all tokens of the batch."""
    output = policy(**batch.inputs, temperature=batch.temperature, want={"logprobs", "values"})
    logprobs, values = output.need("logprobs"), output.need("values")
    surrogate = clipped_policy_loss(logprobs, batch.old_logprobs, batch.advantages, clip_low=clip, clip_high=clip)
    critic = clipped_value_loss(values, batch.old_values, batch.returns, clip=clip)
    loss = masked_mean(surrogate + value_coef * critic, batch.loss_mask)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description="PPO in one file")
    parser.add_argument("--model", default="demo", help="hub id, folder, .gguf file or demo")
    parser.add_argument("--reward", default="vader", help="name of a reward")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--kl-coef", type=float, default=0.02)
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
