"""Whole runs on encoder-decoders: exports that transformers loads, references that stay, rewards that rise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from tiny_models import EOS_ID, PAD_ID, tiny_model, tiny_tokenizer
from tiny_runs import PROMPTS, SEQ2SEQ_SETTINGS, Setting, assemble, early_letters, execute, logged, make_recipe, sample
from tropism.build import run_recipe
from tropism.errors import ConfigError, DataError
from tropism.generation import TextPolicy
from tropism.models.reference import Reference
from tropism.models.saving import save_plain
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling

IDS = torch.tensor([[5, 9, 11, 7, 3, 30, 2, 8], [1, 2, 2, 36, 20, 6, 6, 4]])
ON_POLICY = [s for s in SEQ2SEQ_SETTINGS if s.method in ("ppo", "grpo", "rloo")]


@pytest.mark.parametrize("setting", SEQ2SEQ_SETTINGS, ids=str)
def test_exported_model_has_the_logits_of_the_trained_one(setting: Setting, tmp_path: Path) -> None:
    assembly = execute(assemble(setting, tmp_path / "run"), export=True)
    loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run" / "model", attn_implementation="eager")
    given = {"input_ids": IDS, "decoder_input_ids": IDS.flip(0)}
    with torch.no_grad():
        trained = assembly.policy.model(**given).logits
        exported = loaded(**given).logits
        original = tiny_model(setting.family, seed=3)(**given).logits
    assert float((trained - exported).abs().max()) < 1e-5 * float(trained.abs().max().clamp(min=1.0))
    assert float((trained - original).abs().max()) > 1e-3, "nothing was trained"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer("a cat")["input_ids"] == assembly.loaded.tokenizer("a cat")["input_ids"]


@pytest.mark.parametrize("setting", [s for s in SEQ2SEQ_SETTINGS if s.method in ("sft", "grpo", "quark")], ids=str)
def test_reference_never_moves(setting: Setting, tmp_path: Path) -> None:
    assembly = assemble(setting, tmp_path / "run")
    reference = assembly.reference or Reference(assembly.policy)
    rollouts = sample(assembly)
    with torch.no_grad(), reference.active() as model:
        before = model(**rollouts.inputs).logprobs
    execute(assembly)
    with torch.no_grad(), reference.active() as model:
        after = model(**rollouts.inputs).logprobs
    with torch.no_grad():
        own = assembly.policy(**rollouts.inputs).logprobs
    assert torch.equal(before, after)
    assert not torch.equal(own, after)


@pytest.mark.parametrize("setting", ON_POLICY, ids=str)
def test_reward_rises(setting: Setting, tmp_path: Path) -> None:
    recipe = make_recipe(
        setting,
        tmp_path / "run",
        algorithm=setting.with_algorithm(num_epochs=2, minibatch_size=None, group_size=8, kl_coef=0.01),
        reward=RewardConfig.of(early_letters),
        eval_data=PROMPTS * 8,
        total_steps=12,
        prompts_per_step=3,
        trainer={"learning_rate": 2e-2 if setting.adapter else 5e-3},
    )
    result = run_recipe(recipe)
    before, after = (row["eval/reward"] for row in logged(result.path, "evaluation"))
    assert after > before + 0.2
    again = TextPolicy.load(result.path)
    assert again.policy.encoder_decoder
    assert again.generate(PROMPTS, max_new_tokens=3, seed=4) == result.policy.generate(
        PROMPTS, max_new_tokens=3, seed=4
    )


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_demonstration_is_learned_by_heart_and_ended(family: str, tmp_path: Path) -> None:
    """Different prompts get their own answers, so what the encoder reads arrives; and the model learns its eos."""
    pairs = [{"prompt": "a cat", "completion": "dog"}, {"prompt": "we ran", "completion": "no!"}]
    recipe = make_recipe(
        Setting("sft", False, family),
        tmp_path / "run",
        data=pairs,
        reward=None,
        total_steps=60,
        prompts_per_step=2,
        trainer={"learning_rate": 1e-2},
    )
    result = run_recipe(recipe)
    answers = result.policy.generate([pair["prompt"] for pair in pairs], temperature=0, max_new_tokens=8)
    assert answers == ["dog", "no!"]
    own: Any = AutoModelForSeq2SeqLM.from_pretrained(result.path / "model")
    tokenizer = AutoTokenizer.from_pretrained(result.path / "model")
    for pair in pairs:
        made = own.generate(**tokenizer(pair["prompt"], return_tensors="pt"), max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(made[0], skip_special_tokens=True) == pair["completion"]
        assert made[0, -1] == EOS_ID


@pytest.mark.parametrize("mechanism", ["linear", "add", "replace", "token", "text"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_conditioned_model_is_asked_in_its_encoder(family: str, mechanism: Any, tmp_path: Path) -> None:
    setting = Setting("conditioned", False, family)
    algorithm = setting.with_algorithm(mechanism=mechanism, bins=3, prompt_loss_weight=0.0)
    recipe = make_recipe(setting, tmp_path / "run", algorithm=algorithm, reward=None, total_steps=6)
    result = run_recipe(recipe)
    asked: dict[str, Any] = {"max_new_tokens": 6, "seed": 1, "n": 8}
    loaded = TextPolicy.load(result.path)
    low, high = (loaded.generate(PROMPTS, target_reward=target, **asked) for target in (-0.4, 1.3))
    assert low == result.policy.generate(PROMPTS, target_reward=-0.4, **asked)
    assert low != high


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_run_goes_on_from_a_folder(family: str, adapter: bool, tmp_path: Path) -> None:
    save_plain(tiny_model(family), tiny_tokenizer(add_eos=True), tmp_path / "model")
    recipe = make_recipe(Setting("grpo", adapter, family), tmp_path / "run", model=str(tmp_path / "model"))
    result = run_recipe(recipe)
    assert result.policy.policy.encoder_decoder


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "changes", "data", "message"),
    [
        ("sft", {}, ["a cat sat.", "no."], "texts without a prompt of their own, and an encoder-decoder needs one"),
        ("sft", {"completion_only": False}, None, "whose encoder predicts no tokens, so sft cannot learn the prompt"),
        ("conditioned", {"prompt_loss_weight": 0.5}, None, "so conditioned cannot learn the prompt"),
        ("ilql", {}, [{"turns": ["a", "b", "c", "d"], "reward": 1.0}], "reads one prompt and writes one output"),
        ("grpo", {}, [{"messages": [{"role": "user", "content": "hi"}]}], "an encoder-decoder, which no chat template"),
        ("dpo", {}, [{"prompt": "", "chosen": "a", "rejected": "b"}], "the prompt is empty, and an encoder-decoder"),
    ],
)
def test_what_an_encoder_decoder_cannot_do_is_named(
    method: str, changes: dict[str, Any], data: Any, message: str, tmp_path: Path
) -> None:
    setting = Setting(method, False, "t5")
    recipe = make_recipe(setting, tmp_path / "run")
    recipe = replace(recipe, algorithm=setting.with_algorithm(**changes), **({} if data is None else {"data": data}))
    with pytest.raises((ConfigError, DataError), match=message):
        run_recipe(recipe)
    assert not (tmp_path / "run").exists()


def test_limits_are_those_of_each_half(tmp_path: Path) -> None:
    """BART's 64 positions hold a prompt of 64 tokens beside a completion of 63; a causal model has 64 for both."""
    long = "abcdefg" * 9  # and an eos
    setting = Setting("grpo", False, "bart")
    changes = {"data": [long, "oh", "no", "we"], "sampling": Sampling(max_new_tokens=63, min_new_tokens=63)}
    assembly = execute(assemble(setting, tmp_path / "run", total_steps=1, **changes))
    assert max(len(prompt.ids) for prompt in assembly.prompts) == 64
    with pytest.raises(DataError, match="at most 64 fit"):
        assemble(setting, tmp_path / "other", data=[long + "a"], sampling=Sampling(max_new_tokens=4))
    with pytest.raises(ConfigError, match="max_new_tokens=64 leaves no room"):
        assemble(setting, tmp_path / "third", sampling=Sampling(max_new_tokens=64))


def test_pads_in_prompts_are_read(tmp_path: Path) -> None:
    """T5's decoder starts with the pad token, and a text may hold it: masks come from lengths."""
    assembly = assemble(Setting("sft", False, "t5"), tmp_path / "run")
    given = {
        "prompt_lengths": torch.tensor([3]),
        "completion_ids": torch.tensor([[PAD_ID, 7]]),
        "completion_lengths": torch.tensor([2]),
    }
    with torch.no_grad():
        with_pad = assembly.policy(prompt_ids=torch.tensor([[PAD_ID, 5, EOS_ID]]), **given).logprobs
        other = assembly.policy(prompt_ids=torch.tensor([[6, 5, EOS_ID]]), **given).logprobs
        shorter = assembly.policy(
            prompt_ids=torch.tensor([[PAD_ID, 5, EOS_ID]]), **{**given, "prompt_lengths": torch.tensor([2])}
        ).logprobs
    assert float((with_pad - other).abs().min()) > 1e-4
    assert float((with_pad - shorter).abs().min()) > 1e-4
