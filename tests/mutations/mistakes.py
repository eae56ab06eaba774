"""Deliberate mistakes in the numeric core, each of which the tests must notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One change of the source, and the tests among which at least one must fail on it."""

    name: str
    file: str
    """Below src/tropism."""
    right: str
    """Text that stands in the file exactly once."""
    wrong: str
    """What takes its place."""
    tests: tuple[str, ...]
    """Files or folders below tests."""


MISTAKES: tuple[Mistake, ...] = (
    # Divergences
    Mistake(
        "the sign of the KL",
        "ops/divergences.py",
        "return upcast(logprobs) - upcast(ref_logprobs)",
        "return upcast(ref_logprobs) - upcast(logprobs)",
        ("ops/test_divergences.py",),
    ),
    Mistake(
        "the sign of the log-ratio in k3",
        "ops/divergences.py",
        "log_ratio = (-kl_k1(logprobs, ref_logprobs))",
        "log_ratio = kl_k1(logprobs, ref_logprobs)",
        ("ops/test_divergences.py",),
    ),
    Mistake(
        "the KL raises the reward",
        "ops/rewards.py",
        "penalised = upcast(token_rewards) - kl_coef * upcast(kl)",
        "penalised = upcast(token_rewards) + kl_coef * upcast(kl)",
        ("ops/test_rewards.py",),
    ),
    Mistake(
        "the KL raises the reward of RLOO",
        "algorithms/rloo.py",
        "totals = rewards.totals - self.config.kl_coef * sequence_kl",
        "totals = rewards.totals + self.config.kl_coef * sequence_kl",
        ("algorithms/test_rloo_and_sft.py", "learning/test_exact_optimum.py"),
    ),
    Mistake(
        "the KL of GRPO has the other sign",
        "algorithms/grpo.py",
        'sums["kl"] = config.kl_coef * self._sum(',
        'sums["kl"] = -config.kl_coef * self._sum(',
        ("algorithms/test_grpo.py", "parity"),
    ),
    # Masks
    Mistake(
        "sums over padding",
        "ops/masking.py",
        "return torch.where(mask, values, values.new_zeros(())).sum()",
        "return values.sum()",
        ("ops/test_masking.py",),
    ),
    Mistake(
        "a mean over padding",
        "ops/masking.py",
        "return masked_sum(values, mask) / mask.sum().clamp_min(1)",
        "return masked_sum(values, mask) / mask.numel()",
        ("ops/test_masking.py",),
    ),
    Mistake(
        "a sum where a mean belongs",
        "ops/masking.py",
        "return masked_sum(values, mask) / mask.sum().clamp_min(1)",
        "return masked_sum(values, mask)",
        ("ops/test_masking.py",),
    ),
    Mistake(
        "unscored completions are learned from",
        "algorithms/ppo.py",
        "loss_mask = mask & rewards.scored[:, None]",
        "loss_mask = mask",
        ("invariants/test_refusals.py",),
    ),
    Mistake(
        "padding counts as tokens",
        "types.py",
        "return torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]",
        "return torch.arange(width, device=lengths.device)[None, :] <= lengths[:, None]",
        ("test_types.py",),
    ),
    Mistake(
        "attention sees the pads",
        "models/policy.py",
        "mask = (columns >= first_real[:, None]) & (columns < (first_real + total)[:, None])",
        "mask = torch.ones_like((columns >= first_real[:, None]) & (columns < (first_real + total)[:, None]))",
        ("models/test_policy.py",),
    ),
    Mistake(
        "rows see the pads of the cache",
        "rollouts/kv_cache.py",
        "[None, :] >= self.starts[:, None]",
        "[None, :] >= 0 * self.starts[:, None]",
        ("rollouts/test_kv_cache.py", "rollouts/test_engine.py"),
    ),
    Mistake(
        "the gradient of unscored rows is kept",
        "algorithms/grpo.py",
        "loss_mask = mask & rewards.scored[:, None]",
        "loss_mask = mask",
        ("invariants/test_refusals.py",),
    ),
    # Shifts and positions
    Mistake(
        "log-probs shifted by one token",
        "models/policy.py",
        "at_tokens = flat[place[rows, first[rows] + tokens - 1]]",
        "at_tokens = flat[place[rows, first[rows] + tokens]]",
        ("models/test_policy.py",),
    ),
    Mistake(
        "positions count pads",
        "models/policy.py",
        "positions = (columns - first_real[:, None]).clamp(min=0) * mask",
        "positions = columns.expand_as(mask) * mask",
        ("models/test_policy.py",),
    ),
    Mistake(
        "positions are a bare arange without padding, too",
        "models/rows.py",
        "positions=columns.expand(rows, -1).flatten()[source][None],",
        "positions=torch.arange(len(source), device=ids.device)[None],",
        ("models/test_rows.py",),
    ),
    Mistake(
        "the value after the last token is the one before it",
        "models/policy.py",
        "after = (first + completion_lengths - 1)[:, None]",
        "after = (first + completion_lengths - 2)[:, None]",
        ("models/test_policy.py",),
    ),
    # Rewards and advantages
    Mistake(
        "the score on the first token",
        "ops/rewards.py",
        "[None, :] == lengths[:, None] - 1",
        "[None, :] == 0 * lengths[:, None]",
        ("ops/test_rewards.py",),
    ),
    Mistake(
        "the reward on the first token of the completion",
        "types.py",
        "tokens[rows, lengths[rows] - 1]",
        "tokens[rows, 0 * lengths[rows]]",
        ("test_types.py",),
    ),
    Mistake(
        "GAE without the next value",
        "ops/advantages.py",
        "delta = rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = rewards[:, t] - values[:, t]",
        ("ops/test_advantages.py",),
    ),
    Mistake(
        "GAE forgets lambda",
        "ops/advantages.py",
        "delta + gamma * lam * advantage, advantage)",
        "delta + gamma * advantage, advantage)",
        ("ops/test_advantages.py",),
    ),
    Mistake(
        "returns without the values",
        "algorithms/ppo.py",
        "returns=(advantages + values) * mask,",
        "returns=advantages * mask,",
        ("algorithms/test_ppo.py", "learning/test_exact_optimum.py"),
    ),
    Mistake(
        "a completion is its own baseline",
        "ops/advantages.py",
        "* count / (count - 1).clamp_min(1)).flatten()",
        ").flatten()",
        ("ops/test_advantages.py",),
    ),
    Mistake(
        "group advantages over the whole batch",
        "ops/advantages.py",
        "deviations = masked_deviations(groups, scored_groups)\n    match scale:",
        "deviations = masked_deviations(groups.flatten(), scored_groups.flatten()).view_as(groups)\n    match scale:",
        ("ops/test_advantages.py",),
    ),
    Mistake(
        "the population's deviation in a group",
        "ops/advantages.py",
        "(scored.sum(-1, keepdim=True) - 1).clamp_min(1)",
        "scored.sum(-1, keepdim=True).clamp_min(1)",
        ("ops/test_advantages.py",),
    ),
    # Losses
    Mistake(
        "clipping takes the better of the two",
        "ops/policy_losses.py",
        "return torch.maximum(-advantages * ratio, -advantages * ratio.clamp",
        "return torch.minimum(-advantages * ratio, -advantages * ratio.clamp",
        ("ops/test_policy_losses.py",),
    ),
    Mistake(
        "the policy runs from its reward",
        "ops/policy_losses.py",
        "return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(",
        "return torch.maximum(advantages * ratio, advantages * ratio.clamp(",
        ("ops/test_policy_losses.py",),
    ),
    Mistake(
        "CISPO's weight has a gradient",
        "ops/policy_losses.py",
        "weight = _ratio(logprobs, old_logprobs, advantages).detach().clamp",
        "weight = _ratio(logprobs, old_logprobs, advantages).clamp",
        ("ops/test_policy_losses.py",),
    ),
    Mistake(
        "the value loss takes the smaller error",
        "ops/policy_losses.py",
        "return 0.5 * torch.maximum(error, (clipped - returns).square())",
        "return 0.5 * torch.minimum(error, (clipped - returns).square())",
        ("ops/test_policy_losses.py",),
    ),
    Mistake(
        "a mean where the trainer expects a sum",
        "algorithms/sft.py",
        '{"nll": -masked_sum(logprobs, batch.loss_mask)}',
        '{"nll": -masked_sum(logprobs, batch.loss_mask) / batch.loss_mask.sum().clamp(min=1)}',
        ("invariants/test_micro_batches.py",),
    ),
    Mistake(
        "each micro-batch is divided by its own size",
        "algorithms/grpo.py",
        "return masked_sum(values, batch.loss_mask)",
        "return masked_sum(values, batch.loss_mask) / batch.loss_mask.sum().clamp(min=1)",
        ("invariants/test_micro_batches.py",),
    ),
    Mistake(
        "the temperature is forgotten",
        "ops/vocabulary.py",
        "return logits if temperature == 1.0 else logits.div_(temperature)",
        "return logits",
        ("ops/test_vocabulary.py",),
    ),
    Mistake(
        "the gradient of log-softmax has the other sign",
        "ops/vocabulary.py",
        "to_logits.scatter_add_(-1, ids[part, None], scaled[part, None])",
        "to_logits.scatter_add_(-1, ids[part, None], -scaled[part, None])",
        ("ops/test_vocabulary.py",),
    ),
    # Quark
    Mistake(
        "Quark's KL is that of the reference from the policy",
        "models/policy.py",
        "return full_kl(logits, expected)",
        "return full_kl(expected, logits)",
        ("models/test_exact_kl.py",),
    ),
    Mistake(
        "Quark's entropy is a penalty",
        "algorithms/quark.py",
        "-config.entropy_coef * masked_sum(output.entropy, mask)",
        "config.entropy_coef * masked_sum(output.entropy, mask)",
        ("algorithms/test_quark_loss.py",),
    ),
    Mistake(
        "Quark's KL is a bonus",
        "algorithms/quark.py",
        "config.kl_coef * masked_sum(output.reference_kl, mask)",
        "-config.kl_coef * masked_sum(output.reference_kl, mask)",
        ("algorithms/test_quark_loss.py",),
    ),
    Mistake(
        "Quark's entropy has no gradient",
        "algorithms/quark.py",
        "entropy_gradient=config.entropy_coef > 0",
        "entropy_gradient=False",
        ("algorithms/test_quark_loss.py",),
    ),
    Mistake(
        "Quark's best quantile is told apart as the worst",
        "algorithms/quark.py",
        "float(self.config.quantiles - 1 - quantile)",
        "float(quantile)",
        ("algorithms/test_quark.py",),
    ),
    Mistake(
        "Quark's lowest rewards are the best",
        "algorithms/quark.py",
        "scores.argsort(descending=True, stable=True)",
        "scores.argsort(descending=False, stable=True)",
        ("algorithms/test_quark.py",),
    ),
    Mistake(
        "what Quark's quantiles leave over is spread over all",
        "algorithms/quark.py",
        "return (ranks // (len(scores) // count)).clamp(max=count - 1)",
        "return ranks * count // len(scores)",
        ("algorithms/test_quark.py",),
    ),
    Mistake(
        "Quark ranks what is new alone",
        "algorithms/quark.py",
        "self.quantiles = quantiles.tolist()",
        "self.quantiles += quantiles.tolist()[len(self.quantiles) :]",
        ("algorithms/test_quark.py",),
    ),
    Mistake(
        "Quark's reference sees the token",
        "algorithms/quark.py",
        "Tokens(**_prompts(plain), **completions)",
        "Tokens(**_prompts(told), **completions)",
        ("algorithms/test_quark.py", "algorithms/test_quark_loss.py"),
    ),
    Mistake(
        "Quark goes on sampling without a token",
        "algorithms/quark.py",
        "best = self._token(0) if self.conditioner.fitted else ()",
        "best: tuple[int, ...] = ()",
        ("algorithms/test_quark.py",),
    ),
    Mistake(
        "Quark's texts have the tokens of other texts",
        "algorithms/quark.py",
        "for ids, place in zip(plain, places, strict=True)",
        "for place, ids in enumerate(plain)",
        ("algorithms/test_quark.py",),
    ),
    Mistake(
        "Quark is evaluated on what is not its best",
        "targets/conditioner.py",
        "        if target is None:\n            target = self.default\n",
        "",
        ("algorithms/test_quark.py",),
    ),
    Mistake(
        "hidden states of a batch keep the columns of longer rows",
        "types.py",
        "value.dim() >= 2:",
        "value.dim() == 2:",
        ("test_types.py",),
    ),
    # Training
    Mistake(
        "the gradients of other processes are left out",
        "training/processes.py",
        "                dist.all_reduce(flat)",
        "                pass",
        ("distributed/test_two_processes.py",),
    ),
    Mistake(
        "sharded gradients are not scaled by the number of processes",
        "training/trainer.py",
        "scale = self.processes.count if self.sharded else 1",
        "scale = 1",
        ("distributed/test_sharded.py",),
    ),
    Mistake(
        "the KL controller turns the wrong way",
        "algorithms/kl_control.py",
        "sequence_kl / self.target - 1)",
        "1 - sequence_kl / self.target)",
        ("algorithms/test_ppo.py",),
    ),
    Mistake(
        "the reference learns, too",
        "models/reference.py",
        "return copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})",
        "return model",
        ("models/test_reference.py",),
    ),
    Mistake(
        "importance weights divide the wrong way",
        "ops/importance.py",
        "log_ratio = (upcast(logprobs) - upcast(behaviour_logprobs)).detach()",
        "log_ratio = (upcast(behaviour_logprobs) - upcast(logprobs)).detach()",
        ("ops/test_importance.py",),
    ),
    # Sampling
    Mistake(
        "samples depend on their neighbours",
        "rollouts/engine.py",
        "self.first_index + row.index for row in self.active",
        "place for place, row in enumerate(self.active)",
        ("rollouts/test_engine.py",),
    ),
    # Reward conditioning
    Mistake(
        "the reward stands behind the prompt",
        "targets/conditioner.py",
        "return (*prefix, *ids)",
        "return (*ids, *prefix)",
        ("targets/test_conditioner.py",),
    ),
    Mistake(
        "the reward is written before the bos",
        "targets/conditioner.py",
        "return (ids[0], *prefix, *ids[1:])",
        "return (*prefix, *ids)  # all",
        ("targets/test_conditioner.py",),
    ),
    Mistake(
        "a decode step repeats the last position",
        "models/sampling_model.py",
        "positions = (cache.cursor - cache.starts)[:, None]",
        "positions = (cache.cursor - cache.starts)[:, None] - 1",
        ("invariants/test_conditionme_pitfalls.py",),
    ),
    Mistake(
        "slots take each other's embeddings",
        "models/conditioning.py",
        "asked = values[:, None] * self.weight[rewards] + self.bias[rewards]",
        "asked = values[:, None] * self.weight[rewards] + self.bias[0 * rewards]",
        ("invariants/test_reward_slots.py",),
    ),
    Mistake(
        "a reward left open is told as 0",
        "models/conditioning.py",
        "return torch.where(absent[:, None], self.open[rewards], asked).to(base.dtype)",
        "return asked.to(base.dtype)",
        ("invariants/test_reward_slots.py",),
    ),
    Mistake(
        "prompt tokens count in full",
        "algorithms/conditioned.py",
        "[weight] * learned + [1.0] * len(text.completion_ids)",
        "[1.0] * learned + [1.0] * len(text.completion_ids)",
        ("algorithms/test_conditioned.py",),
    ),
    Mistake(
        "token weights are forgotten in the loss",
        "algorithms/conditioned.py",
        "-masked_sum(batch.token_weights * logprobs, batch.loss_mask)",
        "-masked_sum(logprobs, batch.loss_mask)",
        ("algorithms/test_conditioned.py",),
    ),
    Mistake(
        "targets are dropped the other way round",
        "algorithms/conditioned.py",
        "told = (uniforms >= self.config.target_dropout).tolist()",
        "told = (uniforms < self.config.target_dropout).tolist()",
        ("algorithms/test_conditioned.py",),
    ),
    Mistake(
        "the dropout of a text is the same in every epoch",
        "training/sources.py",
        "first = self.stream.position",
        "first = 0",
        ("training/test_pool.py",),
    ),
    Mistake(
        "the lower end of the pool is asked for",
        "algorithms/conditioned.py",
        "best = ranks.argsort(descending=True, stable=True)",
        "best = ranks.argsort(stable=True)",
        ("algorithms/test_conditioned.py",),
    ),
    Mistake(
        "targets that are asked for skip the scale",
        "targets/conditioner.py",
        "held = [None if v is None else s.scale_reward(v) for s, v",
        "held = [None if v is None else v for s, v",
        ("targets/test_conditioner.py",),
    ),
    Mistake(
        "a border belongs to the upper bin",
        "targets/conditioner.py",
        "return sum(value > edge for edge in edges)",
        "return sum(value >= edge for edge in edges)",
        ("targets/test_conditioner.py",),
    ),
    Mistake(
        "guidance pushes towards the other target",
        "rollouts/guidance.py",
        "return logits + self.strength * (asked - other)",
        "return logits + self.strength * (other - asked)",
        ("rollouts/test_guidance.py",),
    ),
)
