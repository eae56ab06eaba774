"""Preferences of a recipe: no prompt is on both sides, held-out prompts are answered, and everything is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_models import tiny_model, tiny_tokenizer
from tiny_runs import LIKED, PAIRED, Setting, assemble, early_letters, execute, logged
from tropism.cli import main
from tropism.data.config import DataConfig
from tropism.errors import DataError
from tropism.recipe_data import prompts_of
from tropism.rewards import RewardConfig

RECORDS: dict[str, list[dict[str, Any]]] = {
    # Each prompt twice, and of pairs three completions of one.
    "dpo": [
        *PAIRED,
        *({**item, "chosen": item["chosen"] + " so."} for item in PAIRED),
        {"prompt": "we", "completions": [" ran.", " sat.", " did."], "choice": 2},
    ],
    "kto": [*LIKED, *({**item, "completion": item["completion"] + " so."} for item in LIKED)],
}
CHATS = [
    {
        side: [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": item[side]}]
        for side in ("chosen", "rejected")
    }
    for item in PAIRED
]


def split(method: str, folder: Path, records: list[dict[str, Any]], fraction: float, **changes: Any) -> Any:
    path = folder / "data.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    data = DataConfig(path=str(path), eval_fraction=fraction)
    return assemble(Setting(method, False, "llama"), folder / "run", data=data, **changes)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_no_prompt_is_on_both_sides(method: str, tmp_path: Path) -> None:
    assembly = split(method, tmp_path, RECORDS[method], 0.3, reward=RewardConfig.of(early_letters))
    learned = {item.prompt_ids for item in assembly.trainer.source.stream.items}
    preferences, answered = assembly.run.evaluations
    items = preferences.held_out.pairs if method == "dpo" else preferences.held_out.opinions
    kept = {item.prompt_ids for item in items}
    assert kept and learned and not kept & learned
    assert len(learned) + len(kept) == 6 + (method == "dpo")
    # Every held-out prompt is answered once, and has the ids that it is learned with.
    assert sorted(prompt.ids for prompt in answered.prompts) == sorted(kept)
    assert len(assembly.identity["held_out"]) == 2


def test_pairs_without_a_prompt_stay_together_by_their_record(tmp_path: Path) -> None:
    records = [
        {"completions": [f"{text}.", f"{text}!", f"{text}?"], "choice": place % 3}
        for place, text in enumerate(("it is", "no", "we ran", "oh"))
    ]
    assembly = split("dpo", tmp_path, records, 0.5)
    (evaluation,) = assembly.run.evaluations
    learned = {pair.chosen_ids for pair in assembly.trainer.source.stream.items}
    kept = {pair.chosen_ids for pair in evaluation.held_out.pairs}
    assert len(learned) == len(kept) == 2 and not learned & kept


@pytest.mark.parametrize("held_out", ["fraction", "file", "nothing"])
def test_prompts_that_only_the_completions_hold_are_answered(held_out: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "reward": RewardConfig.of(lambda completion_ids: [float(len(ids)) for ids in completion_ids]),
        "model": (tiny_model("llama", seed=3), tiny_tokenizer(chat=True)),
    }
    if held_out == "file":
        changes["eval_data"] = CHATS[:2]
    assembly = split("dpo", tmp_path, CHATS, 0.3 if held_out == "fraction" else 0.0, **changes)
    assert len(assembly.run.evaluations) == (0 if held_out == "nothing" else 2)
    assert len(assembly.prompts) == (6 if held_out == "nothing" else 2)
    assert all(prompt.text == [{"role": "user", "content": prompt.text[0]["content"]}] for prompt in assembly.prompts)
    execute(assembly)
    if held_out != "nothing":
        rows = logged(tmp_path / "run", "evaluation")
        assert {"eval/loss", "eval/accuracy", "eval/margin", "eval/reward", "eval/sequence_kl"} <= rows[-1].keys()
        # As `tropism evaluate RUN` does, which has not read the pairs before.
        _, prompts = prompts_of(assembly.recipe, assembly.loaded.tokenizer, context_length=None)
        assert [prompt.ids for prompt in prompts] == [prompt.ids for prompt in assembly.prompts]


def test_what_is_held_out_may_leave_one_kind_of_opinion(tmp_path: Path) -> None:
    records = [{"prompt": "oh", "completion": " no!", "label": False}, *(r for r in LIKED if r["label"])]

    def parted() -> None:
        for seed in range(10):  # one of which holds out the only other kind
            split("kto", tmp_path, records, 0.25, seed=seed)

    with pytest.raises(DataError, match=r"labels to train on are true"):
        parted()


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_inspect_and_dry_run_show_preferences(
    method: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(record) for record in RECORDS[method]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {stories}\nalgorithm: {method}\ndata: {{path: {tmp_path}/data.jsonl, eval_fraction: 0.3}}\n"
        f"run: {tmp_path}/run\nprompts_per_step: 2\n"
    )
    assert main(["inspect", str(recipe), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    kind = "pairs" if method == "dpo" else "opinions"
    assert f"{kind} to train on" in shown and "held out" in shown
    if method == "dpo":
        assert "row 0, chosen" in shown and "row 0, rejected" in shown
    else:
        assert "row 0, not liked" in shown or "row 0, liked" in shown
    assert main(["train", str(recipe), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"{kind} per step: 2" in shown and "Everything checked" in shown and "reference" in shown
