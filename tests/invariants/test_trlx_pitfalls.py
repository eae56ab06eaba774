"""What trlX got wrong, in whole tiny runs: each of its mistakes would fail a test here."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from given_numbers import Numbers, built
from slow_sampling import log_softmax, own_logits
from tiny_models import EOS_ID, tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS, Setting, assemble, execute, logged, sample, weights_of
from tropism.algorithms import PPO, KLControl
from tropism.algorithms.base import CollectStats
from tropism.data.prompts import make_prompts
from tropism.errors import ConfigError
from tropism.models.lora import LoRA
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.training.config import TrainerConfig
from tropism.training.optimizer import rate_factor
from tropism.training.sources import Collected
from tropism.types import RewardBatch, Rollouts

PPO_RUN = Setting("ppo", False, "gpt2")


def slow_logprobs(model: Any, prompt: list[int], completion: list[int]) -> list[float]:
    """Log-probs of the completion's tokens, from one plain pass over the unpadded row."""
    logits = own_logits(model, [*prompt, *completion])
    first = len(prompt) - 1
    return [log_softmax(logits[first + t].tolist())[token] for t, token in enumerate(completion)]


def rows_of(rollouts: Any) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row, without pads."""
    prompts, completions = rollouts.prompt_ids.tolist(), rollouts.completion_ids.tolist()
    lengths = zip(rollouts.prompt_lengths.tolist(), rollouts.completion_lengths.tolist(), strict=True)
    return [
        (prompt[len(prompt) - before :], completion[:after])
        for prompt, completion, (before, after) in zip(prompts, completions, lengths, strict=True)
    ]


def test_pitfall_29_one_update_of_the_coefficient_per_collect_over_completion_tokens_alone(tmp_path: Path) -> None:
    """trlX updated it once per inner epoch, from one KL that summed prompt tokens too, with the batch size."""
    kl = KLControl(target=0.5, horizon=100)
    config = PPO(group_size=2, num_epochs=2, minibatch_size=4, kl_coef=0.2, kl=kl)
    assembly = assemble(PPO_RUN, tmp_path / "run", algorithm=config, total_steps=3, trainer={"learning_rate": 1e-2})
    reference = tiny_model("gpt2", seed=3)
    seen: list[CollectStats] = []
    collected: list[tuple[list[tuple[list[int], list[int]]], list[list[float]]]] = []
    after_collect, on_collect = assembly.algorithm.after_collect, assembly.trainer.source.on_collect  # type: ignore[attr-defined]

    def collects(one: Collected) -> None:
        own = [slow_logprobs(assembly.policy.model, *row) for row in rows_of(one.rollouts)]
        collected.append((rows_of(one.rollouts), own))
        on_collect(one)

    def counted(stats: CollectStats) -> Any:
        seen.append(stats)
        return after_collect(stats)

    assembly.algorithm.after_collect = counted
    assembly.trainer.source.on_collect = collects  # type: ignore[attr-defined]
    execute(assembly)
    assert len(logged(tmp_path / "run", "update")) == 12 and len(seen) == 3
    coefficient = 0.2
    for stats, (rows, logprobs) in zip(seen, collected, strict=True):
        then = [slow_logprobs(reference, *row) for row in rows]
        kls = [sum(a - b for a, b in zip(*pair, strict=True)) for pair in zip(logprobs, then, strict=True)]
        assert stats.samples == len(rows) == 8
        assert stats.sequence_kl == pytest.approx(sum(kls) / 8, abs=1e-4)
        coefficient *= 1 + max(-0.2, min(0.2, sum(kls) / 8 / 0.5 - 1)) * 8 / 100
    assert assembly.algorithm.kl_coef == pytest.approx(coefficient, rel=1e-5) != 0.2


@pytest.mark.parametrize("pad", [EOS_ID, 0])
def test_pitfall_30_slices_end_where_completions_end(pad: int) -> None:
    """For lengths 3 and 5 trlX's ended at 4 or 5: the score then stood on a pad, whose KL was penalised as well."""
    ids = torch.tensor([[8, 9, EOS_ID, pad, pad], [9, 8, 9, 8, EOS_ID]])
    logprobs = torch.full((2, 5), -1.0)
    rollouts = Rollouts(
        prompt_ids=torch.tensor([[5, 6], [pad, 7]]),
        prompt_lengths=torch.tensor([2, 1]),
        completion_ids=ids,
        completion_lengths=torch.tensor([3, 5]),
        logprobs=logprobs,
        behaviour_logprobs=logprobs,
        finish_reasons=("eos", "eos"),
    )
    rewards = RewardBatch(per_completion=torch.tensor([2.0, -1.0]), per_token=None, scored=torch.tensor([True, True]))
    method: Any = built(PPO(kl_coef=0.5, gamma=0.0))  # what a token earns is its own reward alone
    reference = Numbers(torch.full((2, 5), -1.2))  # also of what follows the end
    zeros = Numbers(logprobs, torch.zeros(2, 5), torch.zeros(2))
    batch = method.make_batch(zeros, reference, rollouts, rewards)
    expected = torch.tensor([[-0.1, -0.1, 1.9, 0.0, 0.0], [-0.1, -0.1, -0.1, -0.1, -1.1]])
    torch.testing.assert_close(batch.returns * batch.completion_mask, expected)
    assert batch.completion_mask.sum(1).tolist() == batch.loss_mask.sum(1).tolist() == [3, 5]
    assert method.weight(batch)["policy"] == 8.0


@pytest.mark.parametrize("pad", ["<eos>", "<pad>"])
def test_pitfall_30_sampled_completions_end_with_their_eos(pad: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = pad
    assembly = assemble(PPO_RUN, tmp_path / "run", model=(tiny_model("gpt2", seed=3), tokenizer))
    rollouts = sample(assembly, group=24)
    ended = 0
    for (_, completion), reason in zip(rows_of(rollouts), rollouts.finish_reasons, strict=True):
        assert EOS_ID not in completion[:-1]
        assert (completion[-1] == EOS_ID) == (reason == "eos")
        ended += reason == "eos" and len(completion) < 6
    assert ended > 0


def test_pitfall_31_tokens_are_never_decoded_and_encoded_again(tmp_path: Path) -> None:
    """Special tokens inside of a completion are no text, so its text has other ids; what is trained has its own."""
    assembly = assemble(PPO_RUN, tmp_path / "run")
    collected: list[Collected] = []
    assembly.trainer.source.on_collect = collected.append  # type: ignore[attr-defined]
    (batch, *_) = list(assembly.trainer.source.collect(assembly.policy))
    one, tokenizer = collected[0], assembly.loaded.tokenizer
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in one.inputs.completions]
    trained = rows_of(one.batch)
    assert [completion for _, completion in trained] == [completion for _, completion in rows_of(one.rollouts)]
    assert [completion for _, completion in trained] == one.inputs.completion_ids
    assert texts != one.inputs.completion_ids, "every text means its own ids here: choose another seed"
    assert len(batch) == 4 and one.batch is not None
    for row, (prompt, completion) in enumerate(trained):
        found: Tensor = one.batch.old_logprobs[row, : len(completion)]
        slow = slow_logprobs(assembly.policy.model, prompt, completion)
        assert found.tolist() == pytest.approx(slow, abs=1e-5)


def test_pitfall_32_an_unknown_pad_token_masks_nothing(tmp_path: Path) -> None:
    """trlX's pad token was unknown to GPT-2, so it became the eos, and every eos of a prompt went unseen."""
    tokenizer = tiny_tokenizer(pad=False)
    tokenizer.unk_token = "<eos>"
    tokenizer.pad_token = "<eos>"
    model = tiny_model("gpt2", seed=3)
    assembly = assemble(PPO_RUN, tmp_path / "run", model=(model, tokenizer))
    texts = ["<eos>a cat", "the<eos>big dog", "oh<eos><eos>"]
    prompts = make_prompts(texts, tokenizer, max_length=None)
    assert all(EOS_ID in prompt.ids for prompt in prompts)
    rollouts = assembly.maker.sample(prompts)  # type: ignore[union-attr]
    scored = assembly.scorer.logprobs(rollouts, temperature=1.0)
    for row, (prompt, completion) in enumerate(rows_of(rollouts)):
        assert prompt == list(prompts[row].ids)
        slow = slow_logprobs(model, prompt, completion)
        assert rollouts.logprobs[row, : len(completion)].tolist() == pytest.approx(slow, abs=1e-5)
        assert scored[row, : len(completion)].tolist() == pytest.approx(slow, abs=1e-5)


TRAINED: dict[str, dict[str, Any]] = {
    "all weights": {},
    "the last layer": {"train_layers": 1},
    "an adapter": {"lora": LoRA(rank=2)},
}


@pytest.mark.parametrize("what", TRAINED)
def test_pitfall_33_the_reference_shares_nothing_that_is_trained(what: str, tmp_path: Path) -> None:
    """GPT-2's embeddings are tied: what trains them in the output must not move them in the reference."""
    assembly = assemble(PPO_RUN, tmp_path / "run", **TRAINED[what], trainer={"learning_rate": 1e-2})
    plain = tiny_model("gpt2", seed=3)
    assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    before = weights_of(assembly)
    execute(assembly)
    moved = [name for name, value in weights_of(assembly).items() if not torch.equal(value, before[name])]
    embeddings = [name for name in moved if "wte" in name or "lm_head" in name]
    assert moved and bool(embeddings) == (what == "all weights")
    rollouts = sample(assembly)
    assert assembly.reference_scorer is not None
    found = assembly.reference_scorer.logprobs(rollouts, temperature=1.0)
    for row, (prompt, completion) in enumerate(rows_of(rollouts)):
        slow = slow_logprobs(plain, prompt, completion)
        assert found[row, : len(completion)].tolist() == pytest.approx(slow, abs=1e-5)


def test_pitfall_34_the_scale_of_rewards_has_names_and_no_magic_string() -> None:
    with pytest.raises(ConfigError, match=r"scale: unknown value 'ignored'.*Known: none, reference, running"):
        RewardConfig.of({"terms": {"warm": "vader"}, "scale": "ignored"})
    assert RewardConfig.of("vader").scale == "none"


@pytest.mark.parametrize("scale", ["running", "reference"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:2]])
def test_pitfall_34_a_deviation_of_0_or_of_one_reward_divides_nothing(
    scale: str, prompts: list[str], tmp_path: Path
) -> None:
    def always(completions: list[str]) -> list[float]:
        return [3.0] * len(completions)

    reward = RewardConfig.of({"terms": {"always": {"use": always}}, "scale": scale})
    config = replace(PPO_RUN.algorithm, group_size=1, num_epochs=1, minibatch_size=None)
    settings: dict[str, Any] = {"algorithm": config, "data": prompts, "prompts_per_step": len(prompts)}
    execute(assemble(PPO_RUN, tmp_path / "run", reward=reward, **settings))
    assert [row["reward/mean"] for row in logged(tmp_path / "run", "collect")] == [3.0, 3.0]
    assert all(math.isfinite(row["loss/total"]) for row in logged(tmp_path / "run", "update"))


def test_pitfall_34_padding_counts_in_no_mean() -> None:
    """A log-ratio of log 2 at each of the tokens; what stands behind the end would be much more."""
    old = torch.zeros(2, 4)
    new = torch.full((2, 4), math.log(2.0))
    new[0, 2:] = 10.0
    rollouts = Rollouts(
        prompt_ids=torch.tensor([[5], [6]]),
        prompt_lengths=torch.tensor([1, 1]),
        completion_ids=torch.tensor([[8, EOS_ID, 0, 0], [9, 8, 9, 8]]),
        completion_lengths=torch.tensor([2, 4]),
        logprobs=old,
        behaviour_logprobs=old,
        finish_reasons=("eos", "length"),
    )
    rewards = RewardBatch(per_completion=torch.ones(2), per_token=None, scored=torch.tensor([True, True]))
    method: Any = built(PPO(kl_coef=0.0))
    batch = method.make_batch(Numbers(old, torch.zeros(2, 4)), None, rollouts, rewards)
    _, numbers = method.loss(Numbers(new, torch.zeros(2, 4)), batch)
    total, count = numbers["policy/approx_kl"]
    assert float(count) == 6
    assert float(total) / 6 == pytest.approx(1.0 - math.log(2.0), rel=1e-5)  # exp(d) - 1 - d of d = log 2


def test_pitfall_34_a_cosine_is_a_cosine() -> None:
    """trlX's had a period of 1e12 steps: a constant rate under another name."""
    config = TrainerConfig(schedule="cosine")
    rates = [rate_factor(config, step=done, total_steps=8) for done in (0, 4, 7)]
    assert rates == pytest.approx([1.0, 0.5, 0.5 * (1 + math.cos(math.pi * 7 / 8))])
    assert TrainerConfig().schedule == "constant"


@pytest.mark.parametrize("rows", [1, 3])
def test_pitfall_36b_micro_batches_change_neither_whitening_nor_sums(rows: int, tmp_path: Path) -> None:
    """Sums over all tokens of a step, divided once; each micro-batch had its own mean and its own whitening."""
    settings = {"whole": None, "split": rows}
    for name, size in settings.items():
        sampling = Sampling(max_new_tokens=6, stop=("e", "a"))  # completions of several lengths
        execute(assemble(PPO_RUN, tmp_path / name, sampling=sampling, trainer={"micro_batch_size": size}))
    whole, split = (logged(tmp_path / name, "update") for name in settings)
    assert len(whole) == len(split) == 8
    for one, other in zip(whole[:4], split[:4], strict=True):  # of one collect: later samples may differ by rounding
        for name in ("loss/policy", "loss/value", "optim/grad_norm", "policy/approx_kl"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)


BLOCKED = """
import sys
blocked = ("deepspeed", "ray", "wandb", "mlflow", "trackio", "tensorboard", "optuna")
for name in blocked:
    sys.modules[name] = None
import tropism
for name in tropism.__all__:
    getattr(tropism, name)
import tropism.cli
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_runs import Setting, assemble, execute
execute(assemble(Setting("ppo", False, "gpt2"), Path(sys.argv[2]), total_steps=1), export=True)
print([name for name in sys.modules if name.split(".")[0] in blocked and sys.modules[name] is not None])
"""


def test_pitfall_37_a_run_needs_no_tracker_scheduler_or_sharding_library(tmp_path: Path) -> None:
    tests = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", BLOCKED, tests, str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "run" / "model" / "config.json").is_file()
