"""What is evaluated beside texts that are learned, and what the checks before training sample from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_tokenizer
from tiny_runs import SCORED, Setting, assemble, early_letters
from tropism.data.config import DataConfig
from tropism.data.prompts import make_prompts
from tropism.errors import ConfigError
from tropism.models.kernels import decode_kernels
from tropism.rewards import RewardConfig
from tropism.rollouts.config import Sampling

OFFLINE = Setting("conditioned", adapter=False, family="llama")
LONG = {
    "prompt": "the big dog ran and ran and ran and ran and ran and ran and ran",
    "completion": " on.",
    "reward": 2.0,
}


def with_reward(folder: Path, records: list[dict[str, Any]], fraction: float, **changes: Any) -> Any:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    data = DataConfig(path=str(path), eval_fraction=fraction)
    return assemble(OFFLINE, folder / "run", data=data, reward=RewardConfig.of(early_letters), **changes)


def test_the_checks_sample_held_out_prompts_which_are_not_learned(tmp_path: Path) -> None:
    more = [{**record, "completion": " is.", "reward": index} for index, record in enumerate(SCORED)]
    assembly = with_reward(tmp_path, [*SCORED, *more], 0.34)
    assert [len(evaluation) for evaluation in assembly.run.evaluations] == [4, 2]  # texts, and their prompts
    learned = {text.prompt_ids for text in assembly.trainer.source.stream.items}
    assert len(learned) == 4 and not learned & {prompt.ids for prompt in assembly.prompts}
    assert assembly.run.evaluations[1].prompts == assembly.prompts and len(assembly.identity["held_out"]) == 2
    assembly.check()


def test_with_nothing_held_out_the_reward_is_tried_on_a_text_that_leaves_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = len(make_prompts([LONG["prompt"]], tiny_tokenizer())[0].ids)
    monkeypatch.setattr("tropism.models.policy.Policy.context_length", long + 6)
    assembly = with_reward(tmp_path, [*SCORED, LONG], 0.0)
    assert [prompt.text for prompt in assembly.prompts] == [record["prompt"] for record in SCORED]
    assert assembly.run.evaluations == [] and len(assembly.trainer.source.stream.items) == 7
    assembly.check()
    assembly = with_reward(tmp_path, [LONG, {**LONG, "reward": 1.0}], 0.0)
    with caplog.at_level(logging.WARNING):
        assembly.check()
    assert "no text leaves room for a completion beside it" in caplog.text


def test_kernels_that_cannot_be_compiled_are_told_of_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", "no-such-compiler")
    decode_kernels.cache_clear()
    try:
        setting, sampling = Setting("grpo", adapter=False, family="llama"), Sampling(max_new_tokens=4, compile=True)
        with pytest.raises(ConfigError, match=r"sampling\.compile needs a C compiler"):
            assemble(setting, tmp_path / "run", sampling=sampling)
        assert not (tmp_path / "run" / "rollouts").exists()
    finally:
        decode_kernels.cache_clear()
