"""What pad, bos and eos are called has no influence on what is learned; completions of no or one token do no harm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from tiny_models import BOS_ID, CHARACTERS, EOS_ID, PAD_ID, SPECIAL_TOKENS, VOCABULARY, tiny_model, tiny_tokenizer
from tiny_runs import METHODS, ON_POLICY, PROMPTS, TEXTS, Setting, assemble, assert_same, execute, logged, weights_of
from tropism.build import Assembly
from tropism.data.config import DataConfig
from tropism.errors import ConfigError, DataError, ModelError
from tropism.models.loading import load_model
from tropism.models.special_tokens import special_tokens
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling
from tropism.rollouts.protocol import FilterContext
from tropism.training.sources import Collected

TOKENS = (*SPECIAL_TOKENS, *CHARACTERS)


def even_tokens(completion_ids: list[list[int]]) -> list[float]:
    """The share of tokens with an even id: a reward that no name of a special token can change."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def tokenizer_with(*, pad: str | None = "<pad>", bos: str | None = "<bos>", adds_bos: bool = False) -> Any:
    """The tiny tokenizer, which names other tokens as its special ones."""
    tokenizer = tiny_tokenizer(pad=False, bos=False)
    if bos is not None:
        tokenizer.bos_token = bos
    if pad is not None:
        tokenizer.pad_token = pad
    if adds_bos:
        assert bos is not None
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, TOKENS.index(bos))]
        )
    return tokenizer


def run(method: str, folder: Path, tokenizer: Any, *, model: Any = None, **changes: Any) -> Assembly:
    """A whole tiny run of a method."""
    changes.setdefault("reward", RewardConfig.of(even_tokens) if method != "sft" else None)
    setting = Setting(method, changes.pop("adapter", False), "llama")
    model = tiny_model("llama", seed=3) if model is None else model
    return execute(assemble(setting, folder, model=(model, tokenizer), **changes))


def losses(folder: Path) -> list[dict[str, float]]:
    """Every loss of every update, and the norm of its gradient."""
    kept = ("loss/", "optim/grad_norm", "policy/")
    return [{k: v for k, v in row.items() if k.startswith(kept)} for row in logged(folder, "update")]


# ---- names of special tokens ---------------------------------------------------------------------------------------

QUIRKS: dict[str, dict[str, Any]] = {
    "pad is eos": {"pad": "<eos>"},
    "no pad": {"pad": None},
    "pad is bos": {"pad": "<bos>"},
    "bos is eos": {"bos": "<eos>"},
    "bos is eos is pad": {"bos": "<eos>", "pad": "<eos>"},
    "no bos": {"bos": None},
    "pad is a token of the text": {"pad": "<user>"},
}
MARKED = [f"{text}<user>no<pad>" for text in TEXTS]
"""Texts with the token that one of the quirks pads with, and with the ordinary pad."""
ENDED = [f"{prompt}<user><eos>" for prompt in PROMPTS]
"""Prompts that end with the eos."""


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_names_of_special_tokens_change_no_loss(method: str, tmp_path: Path) -> None:
    changes = {"data": MARKED if method == "sft" else ENDED, "total_steps": 2 if method == "sft" else 1}
    run(method, tmp_path / "distinct", tokenizer_with(), **changes)
    expected = losses(tmp_path / "distinct")
    assert len(expected) == (2 if method == "sft" else 4) and all(row["optim/grad_norm"] > 0 for row in expected)
    for name, quirk in QUIRKS.items():
        run(method, tmp_path / name, tokenizer_with(**quirk), **changes)
        assert losses(tmp_path / name) == expected, name


@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_bos_that_is_the_eos_is_read_as_any_bos(method: str, tmp_path: Path) -> None:
    """The two tokens have the same embedding here, and only an adapter is trained, so nothing else may differ."""
    found = []
    for bos in ("<bos>", "<eos>"):
        model: Any = tiny_model("llama", seed=3)
        with torch.no_grad():
            model.get_input_embeddings().weight[BOS_ID] = model.get_input_embeddings().weight[EOS_ID]
        assembly = run(method, tmp_path / bos, tokenizer_with(bos=bos, adds_bos=True), model=model, adapter=True)
        source: Any = assembly.trainer.source
        items: Any = assembly.prompts if method == "grpo" else source.stream.items
        first = [item.ids[0] if method == "grpo" else item.prompt_ids[0] for item in items]
        assert first == [TOKENS.index(bos)] * len(first)
        found.append(losses(tmp_path / bos))
    assert found[0] == found[1]


def test_the_eos_of_every_demonstration_is_counted_and_learned(tmp_path: Path) -> None:
    """12 steps on one text, and the model stops after it, also where eos is the pad or the bos."""
    for name, quirk in QUIRKS.items():
        assembly = run(
            "sft",
            tmp_path / name,
            tokenizer_with(**quirk),
            data=["ab", "ab"],
            total_steps=12,
            prompts_per_step=2,
            trainer={"learning_rate": 1e-2},
        )
        assert assembly.trainer.counts.tokens == 12 * 2 * 2  # b and the eos of each text; the first token is read only
        a, b = TOKENS.index("a"), TOKENS.index("b")
        with torch.no_grad():
            logits = assembly.policy.model(input_ids=torch.tensor([[a, b]])).logits[0, -1]
        assert int(logits.argmax()) == EOS_ID, name


def test_several_eos_ids_end_completions_as_stop_tokens_do(tmp_path: Path) -> None:
    other = TOKENS.index("e")
    model = tiny_model("llama", seed=3)
    model.generation_config.eos_token_id = [EOS_ID, other]
    run("grpo", tmp_path / "several", tokenizer_with(), model=model)
    sampling = Sampling(max_new_tokens=6, stop_token_ids=(other,))
    run("grpo", tmp_path / "stop", tokenizer_with(), sampling=sampling)
    assert losses(tmp_path / "several") == losses(tmp_path / "stop")
    reasons, ids = {}, {}
    for name in ("several", "stop"):
        table = pq.read_table(tmp_path / name / "rollouts" / "step-000001.parquet").to_pydict()
        reasons[name], ids[name] = table["finish_reason"], table["completion_ids"]
    assert ids["several"] == ids["stop"]
    ended = [reason for reason, row in zip(reasons["several"], ids["several"], strict=True) if row[-1] == other]
    assert ended and set(ended) == {"eos"}


def test_without_any_eos_completions_end_by_length_and_demonstrations_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama", seed=3)
    model.generation_config.eos_token_id = None
    tokenizer = tiny_tokenizer(eos=False, pad=False)
    run("grpo", tmp_path / "grpo", tokenizer, model=model)
    assert "declares no eos token" in caplog.text
    table = pq.read_table(tmp_path / "grpo" / "rollouts" / "step-000001.parquet").to_pydict()
    assert set(table["finish_reason"]) == {"length"} and all(len(ids) == 6 for ids in table["completion_ids"])
    assert all(math.isfinite(value) for row in losses(tmp_path / "grpo") for value in row.values())
    with pytest.raises(DataError, match=r"no eos token.*set tokenizer\.eos_token"):
        run("sft", tmp_path / "sft", tokenizer, model=model)


def test_no_special_id_reaches_a_mask(tmp_path: Path) -> None:
    """A completion of pads, and one with bos and eos inside its prompt, count all their tokens."""
    assembly = assemble(Setting("sft", False, "llama"), tmp_path / "run", data=["<pad><pad><pad>", "<eos>a<bos>"])
    lengths = sorted(len(one.completion_ids) for one in assembly.trainer.source.stream.items)  # type: ignore[attr-defined]
    assert lengths == [3, 3]
    batch = next(iter(assembly.trainer.source.collect(assembly.policy)))
    assert batch.loss_mask.sum(1).tolist() == [3] * 4


# ---- the same ids everywhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds_bos", [False, True])
def test_rollout_training_and_reward_see_the_same_ids(adds_bos: bool, tmp_path: Path) -> None:
    seen: list[list[int]] = []
    collected: list[Collected] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(completion_ids)
        return even_tokens(completion_ids)

    tokenizer = tokenizer_with(adds_bos=adds_bos)
    assembly = assemble(
        Setting("grpo", False, "llama"),
        tmp_path / "run",
        model=(tiny_model("llama", seed=3), tokenizer),
        data=["a cat", "<bos>a cat", "oh<bos>", "no"],
        reward=RewardConfig.of(reward),
        total_steps=1,
    )
    source: Any = assembly.trainer.source
    keep = source.on_collect

    def on_collect(one: Collected) -> None:
        collected.append(one)
        keep(one)

    source.on_collect = on_collect
    assembly.check()
    seen.clear()  # what the checks before training scored
    assembly.run.export = lambda: None
    assembly.run.execute(1, resumed=None)
    (one,) = collected
    by_text = {str(prompt.text): list(prompt.ids) for prompt in assembly.prompts}
    letters = [TOKENS.index(letter) for letter in "a cat"]
    assert by_text["a cat"] == ([BOS_ID] if adds_bos else []) + letters
    assert by_text["<bos>a cat"] == [BOS_ID, *letters]  # never two
    table = pq.read_table(tmp_path / "run" / "rollouts" / "step-000001.parquet").to_pydict()
    for row, prompt in enumerate(one.inputs.prompts):
        prompt_length, length = int(one.rollouts.prompt_lengths[row]), int(one.rollouts.completion_lengths[row])
        ids = one.rollouts.completion_ids[row, :length].tolist()
        assert one.rollouts.prompt_ids[row, -prompt_length:].tolist() == by_text[str(prompt)]
        assert one.batch.prompt_ids[row, -prompt_length:].tolist() == by_text[str(prompt)]
        assert one.batch.completion_ids[row, :length].tolist() == ids == seen[row] == table["completion_ids"][row]


def test_the_scores_of_sampling_are_those_of_a_plain_forward_over_those_ids(tmp_path: Path) -> None:
    collected: list[Collected] = []
    assembly = assemble(Setting("grpo", False, "llama"), tmp_path / "run", data=["<eos>", "a<eos>", "<pad>b", "<bos>"])
    assembly.trainer.source.on_collect = collected.append  # type: ignore[attr-defined]
    assembly.run.begin()
    next(iter(assembly.trainer.source.collect(assembly.policy)))
    rollouts = collected[0].rollouts
    for row in range(len(rollouts)):
        p, t = int(rollouts.prompt_lengths[row]), int(rollouts.completion_lengths[row])
        ids = torch.cat([rollouts.prompt_ids[row, -p:], rollouts.completion_ids[row, :t]])[None]
        with torch.no_grad():
            scores = assembly.policy.model(input_ids=ids).logits[0, p - 1 : -1].log_softmax(-1)
        expected = scores.gather(-1, rollouts.completion_ids[row, :t, None]).squeeze(-1)
        torch.testing.assert_close(rollouts.logprobs[row, :t], expected, rtol=0, atol=1e-5)


# ---- vocabulary and context ----------------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embeddings_is_refused() -> None:
    model = tiny_model("llama", vocab_size=VOCABULARY - 1)
    with pytest.raises(ModelError, match=f"has {VOCABULARY} tokens but the model has embeddings for {VOCABULARY - 1}"):
        load_model((model, tiny_tokenizer()))
    tokenizer = tiny_tokenizer()
    load_model((tiny_model("llama"), tokenizer))
    tokenizer.add_tokens(["<think>"])
    with pytest.raises(ModelError, match=f"tokenizer has {VOCABULARY + 1} tokens .* resize the model's embeddings"):
        load_model((tiny_model("llama"), tokenizer))


def test_ids_with_gaps_count_by_the_highest() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    vocabulary = {**tokenizer.get_vocab(), "z": VOCABULARY + 5}
    tokenizer.get_vocab = lambda: vocabulary  # type: ignore[method-assign]
    assert len(tokenizer) == VOCABULARY
    with pytest.raises(ModelError, match=f"tokenizer has {VOCABULARY + 6} tokens"):
        special_tokens(model, tokenizer)


def test_eos_ids_beyond_the_vocabulary_are_refused_and_negative_ones_mean_none() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = VOCABULARY
    with pytest.raises(
        ModelError, match=rf"eos token {VOCABULARY}, .* correct eos_token_id in generation_config\.json"
    ):
        load_model((model, tiny_tokenizer()))
    model.generation_config.eos_token_id = -1
    assert load_model((model, tiny_tokenizer())).tokens.eos_ids == (EOS_ID,)


def test_token_ids_beyond_the_vocabulary_are_refused_before_the_first_step(tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=4, stop_token_ids=(VOCABULARY,))
    with pytest.raises(ConfigError, match=r"sampling\.stop_token_ids names a token beyond .* 0 to 36"):
        run("grpo", tmp_path / "run", tokenizer_with(), sampling=sampling)
    assembly = assemble(Setting("grpo", False, "llama"), tmp_path / "run")
    assembly.prompts = [replace(prompt, ids=(*prompt.ids, VOCABULARY)) for prompt in assembly.prompts]
    with pytest.raises(ConfigError, match="prompt 0 names a token beyond the model's vocabulary"):
        assembly.check()
    assert not (tmp_path / "run").exists()


def test_overlong_prompts_are_refused_or_cut_by_choice_before_the_first_step(tmp_path: Path) -> None:
    """The context is 64 tokens, of which the completion may take 6."""
    path = tmp_path / "prompts.txt"
    path.write_text("ab\n" + "a" * 30 + "b" * 58 + "\n")
    with pytest.raises(DataError, match=r"txt:2: the prompt has 88 tokens, but at most 58 fit.*data\.overlong"):
        run("grpo", tmp_path / "refused", tokenizer_with(), data=DataConfig(path=str(path)))
    assert not (tmp_path / "refused").exists()
    for adds_bos in (False, True):
        data = DataConfig(path=str(path), overlong="truncate_left")
        folder = tmp_path / f"cut-{adds_bos}"
        assembly = run("grpo", folder, tokenizer_with(adds_bos=adds_bos), data=data, prompts_per_step=2)
        cut = assembly.prompts[1].ids
        assert len(cut) == 58 and cut[0] == (BOS_ID if adds_bos else TOKENS.index("b"))
        assert set(cut[1:]) == {TOKENS.index("b")}
    with pytest.raises(ConfigError, match="max_new_tokens=64 leaves no room for a prompt in the model's context of 64"):
        run("grpo", tmp_path / "none", tokenizer_with(), sampling=Sampling(max_new_tokens=64))


# ---- completions of no or one token --------------------------------------------------------------------------------


def force(assembly: Assembly, token_of: Callable[[list[int], int], int | None]) -> None:
    """Let the sampler take the token that ``token_of(ids so far, prompt length)`` names, where it names one."""

    def change(logits: Tensor, context: FilterContext) -> Tensor:
        logits = logits.clone()
        for row, (ids, length) in enumerate(zip(context.ids, context.prompt_lengths, strict=True)):
            token = token_of(list(ids), length)
            if token is not None:
                keep = logits[row, token].clone()
                logits[row] = -torch.inf
                logits[row, token] = keep
        return logits

    generate = assembly.maker.sampler.generate
    forced: Any = lambda *args, **options: generate(*args, **{**options, "filters": [change]})  # noqa: E731
    assembly.maker.sampler.generate = forced  # type: ignore[method-assign]


def warnings_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_finite(assembly: Assembly, folder: Path) -> None:
    assert all(bool(torch.isfinite(value).all()) for value in weights_of(assembly).values())
    assert all(math.isfinite(value) for row in losses(folder) for value in row.values())


@pytest.mark.parametrize("method", ON_POLICY)
def test_completions_that_are_the_eos_alone_are_counted_and_harmless(method: str, tmp_path: Path) -> None:
    assembly = assemble(Setting(method, False, "llama"), tmp_path / "run", reward=RewardConfig.of(even_tokens))
    force(assembly, lambda ids, length: EOS_ID)
    execute(assembly)
    assert_finite(assembly, tmp_path / "run")
    for row in logged(tmp_path / "run", "collect"):
        assert row["rollout/empty_fraction"] == row["rollout/length_mean"] == row["rollout/eos_fraction"] == 1.0
    assert any("empty or one token" in row["message"] for row in warnings_of(tmp_path / "run"))
    table = pq.read_table(tmp_path / "run" / "rollouts" / "step-000001.parquet").to_pydict()
    assert set(table["completion"]) == {""} and {tuple(ids) for ids in table["completion_ids"]} == {(EOS_ID,)}


@pytest.mark.parametrize("method", ON_POLICY)
def test_empty_completions_beside_others_are_harmless(method: str, tmp_path: Path) -> None:
    assembly = assemble(Setting(method, False, "llama"), tmp_path / "run", reward=RewardConfig.of(even_tokens))
    force(assembly, lambda ids, length: EOS_ID if length % 2 else None)  # by the length of the prompt
    execute(assembly)
    assert_finite(assembly, tmp_path / "run")
    fractions = [row["rollout/empty_fraction"] for row in logged(tmp_path / "run", "collect")]
    assert all(0 < fraction < 1 for fraction in fractions)


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if config.reads != "comparisons"])
def test_one_token_completions_are_finite(method: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"sampling": Sampling(max_new_tokens=1)}
    if method == "sft":
        changes = {"data": [{"prompt": "a", "completion": ""}, {"prompt": "b<eos>", "completion": ""}]}
    assembly = run(method, tmp_path / "run", tokenizer_with(pad="<eos>"), **changes)
    assert_finite(assembly, tmp_path / "run")
    rows = logged(tmp_path / "run", "update")
    assert rows and all(row["optim/skipped"] == 0.0 for row in rows)
    if method == "sft":
        assert assembly.trainer.counts.tokens == 4 * 4  # the eos of four demonstrations in each of four steps


def test_truncation_of_every_completion_is_warned_of_at_the_first_step(tmp_path: Path) -> None:
    run("grpo", tmp_path / "run", tokenizer_with(), sampling=Sampling(max_new_tokens=3, min_new_tokens=3))
    assert [row["rollout/truncated_fraction"] for row in logged(tmp_path / "run", "collect")] == [1.0, 1.0]
    (first, *_) = warnings_of(tmp_path / "run")
    assert first["step"] == 1 and "every completion was cut by the length limit" in first["message"]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_groups_of_equal_rewards_make_no_update_and_are_warned_of_after_ten_steps(method: str, tmp_path: Path) -> None:
    algorithm = replace(METHODS[method], kl_coef=0.0, num_epochs=1, minibatch_size=None)  # type: ignore[call-arg]
    setting = Setting(method, False, "llama")
    reward = RewardConfig.of(lambda completions: [0.5] * len(completions))
    assembly = assemble(setting, tmp_path / "run", algorithm=algorithm, reward=reward, total_steps=11)
    before = weights_of(assembly)
    execute(assembly)
    assert_same(before, weights_of(assembly))
    assert [row["reward/zero_variance_groups"] for row in logged(tmp_path / "run", "collect")] == [1.0] * 11
    steps = {row["step"]: row["message"] for row in warnings_of(tmp_path / "run") if "10 steps" in row["message"]}
    assert list(steps) == [10]


def test_constants_of_the_tiny_tokenizer() -> None:
    """What the tests above take for granted."""
    assert [TOKENS.index(token) for token in ("<pad>", "<bos>", "<eos>")] == [PAD_ID, BOS_ID, EOS_ID]
