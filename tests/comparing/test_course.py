"""Comparisons of a tiny model from their beginning to ``cell.json`` and ``samples.parquet``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_comparisons import HELD_OUT, Processes, cell, here, make_course, samples, write_files
from tiny_models import tiny_tokenizer
from tropism.errors import ConfigError


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    return write_files(tmp_path)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return here(monkeypatch)


CHOICE = {"choice": {"share": 0.4, "targets": [0.5], "guidance": [0, 1]}}


def test_every_method_gets_the_same_and_says_what_it_spent(recipe: dict[str, Any], processes: Processes) -> None:
    """A budget of 48: steps of 4 prompts x 2 completions, and a pool of 48 of 6 prompts."""
    methods: dict[str, Any] = {
        "sft": {"epochs": 1},
        "grpo": {"group_size": 2},
        "conditioned": {},
        "ilql": {"sampling": {"beta": 2.0}},
        "dpo": {},
        "kto": {},
        "best-of-n": {"n": 3},
    }
    out = Path("out")
    assert make_course(recipe, methods, out=out, **CHOICE).run() == {}
    spent = {name: cell(out, f"{name}-seed0") for name in ("base", *methods)}
    assert {name: one["completions"] for name, one in spent.items()} == {
        "base": 0,
        "sft": 48,
        "grpo": 48,
        "conditioned": 28 + 2 * 9,  # 40 % of 48 for two pairs, and what is left of the rest in groups of four
        "ilql": 48,
        "dpo": 48,
        "kto": 48,
        "best-of-n": 0,
    }
    assert spent["sft"]["updates"] == 6  # the better 24, four a step
    assert spent["grpo"]["updates"] == 6 and spent["grpo"]["pool_seconds"] == 0
    assert spent["sft"]["seconds"] > spent["sft"]["pool_seconds"] > 0
    pool = [json.loads(line) for line in (out / "pools" / "seed0.jsonl").read_text().splitlines()]
    assert spent["sft"]["tokens"] == sum(row["tokens"] for row in pool)
    choices = spent["conditioned"]["choices"]
    assert [(one["target"], one["guidance"], one["completions"]) for one in choices] == [(0.5, 0, 9), (0.5, 1, 9)]
    best = max(choices, key=lambda one: float(one["reward"]))
    assert spent["conditioned"]["settings"] == {"target": 0.5, "guidance": best["guidance"]}
    assert spent["ilql"]["settings"] == {"beta": 2.0} and spent["best-of-n"]["settings"] == {"n": 3}
    assert spent["ilql"]["kl_estimator"] == "k1 of the guided distribution"
    assert spent["best-of-n"]["completions_per_answer"] == 3
    assert spent["best-of-n"]["kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    for name in spent:
        table = samples(out, f"{name}-seed0")
        assert table["prompt"] == [prompt for prompt in HELD_OUT for _ in range(2)]
        assert table["prompt_index"] == [0, 0, 1, 1, 2, 2] and table["sample"] == [0, 1] * 3
        assert all(map(math.isnan, table["sequence_kl"])) == (name == "best-of-n")
    assert samples(out, "base-seed0")["sequence_kl"] == pytest.approx([0.0] * 6, abs=1e-5)
    assert any(abs(kl) > 1e-4 for kl in samples(out, "sft-seed0")["sequence_kl"])


def test_the_log_prob_of_the_base_is_that_of_its_own_forward(recipe: dict[str, Any], processes: Processes) -> None:
    """At temperature 0.5, too, perplexity is of the base as it is."""
    recipe["sampling"]["temperature"] = 0.5
    out = Path("out")
    make_course(recipe, "best-of-n", out=out, best_of=2).run()
    table, tokenizer = samples(out, "base-seed0"), tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    for prompt, completion, logprob, length, ended in zip(
        *(table[name] for name in ("prompt", "completion", "base_logprob", "length", "finish_reason")), strict=True
    ):
        before, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + completion)["input_ids"]
        ids += [tokenizer.eos_token_id] if ended == "eos" else []
        if len(ids) - len(before) != length:
            continue  # a completion whose text has other tokens than it was sampled with
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(before), len(ids))
        assert logprob == pytest.approx(sum(float(scores[place - 1, ids[place]]) for place in places), abs=1e-3)


def test_filters_are_part_of_what_the_kl_is_of(recipe: dict[str, Any], processes: Processes) -> None:
    """Of one token left over p is 1, so that the KL is minus the base's log-prob, also for the base itself."""
    recipe["sampling"]["top_k"] = 1
    out = Path("out")
    assert make_course(recipe, "best-of-n", out=out, best_of=2).run() == {}
    assert cell(out, "base-seed0")["kl_estimator"] == "k1 of the filtered distribution"
    table = samples(out, "base-seed0")
    assert table["sequence_kl"] == pytest.approx([-logprob for logprob in table["base_logprob"]], abs=1e-4)
    assert min(table["sequence_kl"]) > 0.1


def test_the_log_prob_of_the_base_is_of_the_tokens_that_are_counted(
    recipe: dict[str, Any], processes: Processes
) -> None:
    """What stands behind the end is trained, but not counted: the same completions have the log-prob of those that
    end there."""
    tables = []
    for beyond in ("train", "mask"):
        recipe["sampling"] |= {"max_new_tokens": 8, "truncation": {"token": ".", "beyond": beyond}}
        make_course(recipe, "best-of-n", out=Path(beyond), best_of=2).run()
        tables.append(samples(Path(beyond), "base-seed0"))
    assert tables[0]["completion"] == tables[1]["completion"] and min(tables[0]["length"]) < 8
    assert tables[0]["base_logprob"] == pytest.approx(tables[1]["base_logprob"], abs=1e-4)


def test_pairs_that_coincide_share_the_whole_choice(recipe: dict[str, Any], processes: Processes) -> None:
    """Rewards 0 and 1 alone: all three quantiles are 1, and 9 pairs become 3 of three times as many completions."""
    Path("rewards.py").write_text("def early(completions):\n    return [float(len(one) % 2) for one in completions]\n")
    out = Path("out")
    assert make_course(recipe, "conditioned", out=out, completions=240, choice={"share": 0.4}).run() == {}
    told = cell(out, "conditioned-seed0")
    assert [one["completions"] for one in told["choices"]] == [30, 30, 30]  # int(0.4 * 240) // 9 * 9 = 90
    assert told["completions"] == 148 + 90  # the pool holds the most groups of four of the other 150


def test_all_methods_leave_room_for_what_one_of_them_takes(recipe: dict[str, Any], processes: Processes) -> None:
    """A held-out prompt that is cut at the context is cut alike for all, by the one slot of a method."""
    recipe["eval_data"] = {"path": "held-out.txt", "overlong": "truncate_left"}
    Path("held-out.txt").write_text("a dog sat " * 40)
    out = Path("out")
    assert make_course(recipe, "conditioned,sft", out=out, **CHOICE).run() == {}
    texts = {cell_path.name: samples(out, cell_path.name)["base_logprob"] for cell_path in out.glob("cells/*")}
    assert len(texts) == 3
    told = [json.loads((out / "cells" / name / "job.json").read_text())["taken"] for name in texts]
    assert told == [1, 1, 1]


def test_a_damaged_cell_is_done_again(recipe: dict[str, Any], processes: Processes) -> None:
    out = Path("out")
    make_course(recipe, "best-of-n", out=out, best_of=2).run()
    before = samples(out, "base-seed0")
    path = out / "cells" / "base-seed0" / "samples.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    processes.commands.clear()
    assert make_course(recipe, "best-of-n", out=out, best_of=2).run() == {}
    assert samples(out, "base-seed0") == before and len(processes.commands) == 1


def test_a_finished_cell_is_not_computed_again(recipe: dict[str, Any], processes: Processes) -> None:
    """And methods and seeds may come in."""
    out = Path("out")
    methods: dict[str, Any] = {"sft": {"epochs": 1}}
    make_course(recipe, methods, out=out).run()
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/samples.parquet")}
    processes.commands.clear()
    methods |= {"rft": {"group_size": 4, "improve_steps": 1}}
    make_course(recipe, methods, out=out, seeds=[0, 1]).run()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and len(before) == 2
    told = {json.loads(path.read_text())["seed"] for path in out.glob("cells/*/cell.json")}
    assert told == {0, 1} and len(processes.commands) == 5  # base, pool and sft of seed 1, and rft twice
    plan = (out / "compare.yaml").read_text()
    assert "rft" in plan and "sft" in plan


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"completions": 64}, "budget was another: compare.completions was 48 and is 64"),
        ({"samples_per_prompt": 3}, "compare.samples_per_prompt was 2 and is 3"),
        ({"methods": {"sft": {"epochs": 3}}}, "compare.methods.sft was"),
        ({"prompts": "a new prompt"}, "training prompts were others"),
        ({"held": "another"}, "held-out prompts were others"),
        ({"code": "# other\n"}, r"code of the reward \(early\) were others"),
        ({"module": "judging"}, r"code of the metrics \(ends\) were others"),
        ({"judge": "judge/config.json"}, r"weights of reward and metrics \(metric ends: folder/config.json\) were"),
        ({"weights": 1}, r"weights of the model \(model.safetensors\) were others"),
        ({"sampling": {"max_new_tokens": 4}}, "recipe.sampling.max_new_tokens was 5 and is 4"),
    ],
)
def test_what_has_changed_is_refused_by_its_name(
    recipe: dict[str, Any],
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    named: str,
) -> None:
    """Sizes and times of files do not tell: the weights keep both here."""
    out = Path("out")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    Path("judging.py").write_text("def ends(completions, folder):\n    return [1.0] * len(completions)\n")
    Path("judge").mkdir()
    Path("judge/config.json").write_text("{}")
    recipe["metrics"] = {"ends": {"use": "judging:ends", "args": {"folder": "judge"}}}
    make_course(recipe, "best-of-n,sft", out=out, best_of=2)._open().release()
    settings: dict[str, Any] = {"best_of": 2}
    methods: Any = change.pop("methods", "best-of-n,sft")
    if "prompts" in change:
        Path("prompts.txt").write_text(change["prompts"])
    elif "held" in change:
        Path("held-out.txt").write_text(change["held"])
    elif "code" in change:
        Path("rewards.py").write_text(Path("rewards.py").read_text() + change["code"])
    elif "module" in change:  # which nothing has imported
        Path("judging.py").write_text(Path("judging.py").read_text() + "# other\n")
    elif "judge" in change:
        touch_weights(Path(change["judge"]))
    elif "weights" in change:
        touch_weights(Path("model/model.safetensors"))
    elif "sampling" in change:
        recipe["sampling"] = change["sampling"]
    else:
        settings |= change
    with pytest.raises(ConfigError, match=named) as error:
        make_course(recipe, methods, out=out, **settings).run()
    assert "--out" in str(error.value)


def touch_weights(path: Path) -> None:
    """Change the last byte, and nothing that ``stat`` shows but the time of the change itself."""
    import os

    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_one_failure_loses_none_of_the_others(recipe: dict[str, Any], processes: Processes) -> None:
    """A rate that makes weights infinite; the same command tries again, and takes up what it finds."""
    out = Path("out")
    methods = {"grpo": {"group_size": 2, "learning_rate": 1e30}, "sft": {"epochs": 1}}
    failed = make_course(recipe, methods, out=out).run()
    assert list(failed) == ["grpo-seed0"]
    lost = cell(out, "grpo-seed0")
    assert "finite" in lost["failure"] and not (out / "cells" / "grpo-seed0" / "samples.parquet").exists()
    assert cell(out, "sft-seed0")["failure"] is None
    processes.commands.clear()
    assert list(make_course(recipe, methods, out=out).run()) == ["grpo-seed0"]
    assert len(processes.commands) == 1


def test_a_pool_that_fails_is_the_reason_of_all_that_learn_from_it(
    recipe: dict[str, Any], processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge fails on a training prompt, so held-out ones can be measured; then it is well again."""
    out = Path("out")
    monkeypatch.setenv("TEST_FAIL_AT", "big dog")
    course = make_course(recipe, "sft,kto,best-of-n", out=out, best_of=2)
    assert list(course.run()) == ["sft-seed0", "kto-seed0"]
    for name in ("sft", "kto"):
        assert "the judge is ill" in cell(out, f"{name}-seed0")["failure"]
    assert cell(out, "best-of-n-seed0")["failure"] is None
    monkeypatch.delenv("TEST_FAIL_AT")
    assert make_course(recipe, "sft,kto,best-of-n", out=out, best_of=2).run() == {}
    assert cell(out, "sft-seed0")["failure"] is None


def test_a_part_of_the_data_is_held_out_alike_for_all_seeds(recipe: dict[str, Any], processes: Processes) -> None:
    """The seed of a run parts its data; a comparison has one part for all, so no cell trains on held-out prompts."""
    recipe |= {"eval_data": None, "data": {"path": "prompts.txt", "eval_fraction": 0.4}}
    out = Path("out")
    make_course(recipe, {"grpo": {"group_size": 2}}, out=out, seeds=2, completions=16).run()
    recipe["trainer"]["evaluation"] = {"every": 1}
    make_course(recipe, {"grpo": {"group_size": 2}}, out=Path("watched"), completions=16).run()
    watched = pq.read_table(next(Path("watched").glob("cells/grpo-seed0/run/evaluations/*.parquet"))).to_pydict()
    assert set(watched["prompt"]) == set(samples(Path("watched"), "base-seed0")["prompt"])
    held = {tuple(samples(out, f"{name}-seed{seed}")["prompt"]) for name in ("base", "grpo") for seed in (0, 1)}
    assert len(held) == 1
    trained = set()
    for path in out.glob("cells/grpo-*/run/rollouts/*.parquet"):
        trained |= set(pq.read_table(path).to_pydict()["prompt"])
    assert trained and not trained & set(next(iter(held)))


def test_data_with_completions_gives_its_prompts(recipe: dict[str, Any], processes: Processes) -> None:
    rows = [{"prompt": f"{word} cat", "completion": " sat.", "reward": 7.0} for word in ("a", "the", "my", "no")]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe["data"] = "pairs.jsonl"
    out = Path("out")
    assert make_course(recipe, "sft,ilql,conditioned", out=out, **CHOICE).run() == {}
    learned = [json.loads(line) for line in (out / "cells/ilql-seed0/data.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in learned} == {row["prompt"] for row in rows}
    assert all(row["reward"] <= 1 for row in learned)
    assert len({row["completion"] for row in learned}) > 10
