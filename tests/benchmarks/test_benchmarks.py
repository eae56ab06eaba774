"""The benchmarks measure what they say: equal work for every system, in turns, with numbers that add up."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gate import Gate, StoppedError
from benchmarks.models import SIZES, matmul_weights, random_model, word_tokenizer
from benchmarks.ours import ForcedLengths, logged_stages
from benchmarks.runner import Settings, Steps, WorkerError, run_work
from benchmarks.summary import add_ratios, summarise
from benchmarks.trl_peer import ForcedEnd
from benchmarks.work import STEPS, SYSTEMS, WORKS, Job, System, Work, pairs_of, texts_of
from transformers import AutoTokenizer

from benchmarks import ours, reward_model, runner, scaling, standard
from tropism.rollouts.protocol import FilterContext

SMALL = Work(
    name="small", title="small", kind="grpo", prompts=2, group=2, prompt_tokens=5, lengths=(2, 6, 3, 4), model="0.05M"
)
LIMITS = {"body_weights": 10, "head_weights": 3, "gemm_gflops": {"fp32": 2e-6, "bf16": 4e-6}}


# Work ----------------------------------------------------------------------------------------------------------------


def test_the_standard_works() -> None:
    """Rows, new tokens and the spread of W2's lengths are those of the standard."""
    sizes = {name: (work.rows, work.tokens) for name, work in WORKS.items()}
    assert sizes["rollout"] == (32, 32 * 64)
    assert sizes["grpo-w1"] == sizes["rloo-w1"] == sizes["ppo-w1"] == sizes["grpo-w1-3m"] == (16, 16 * 48)
    assert sizes["grpo-w3"] == (32, 32 * 48)
    assert sizes["sft"] == (16, 16 * 64)
    assert sizes["dpo"] == (16, 16 * 48)
    assert sorted(WORKS["grpo-w2"].lengths) == list(range(4, 65, 4))
    assert WORKS["grpo-w2"].lengths != tuple(sorted(WORKS["grpo-w2"].lengths))


def test_floating_point_operations_counted_by_hand() -> None:
    """2 prompts of 5, 15 new tokens, 10 weights in the trunk and 3 in the head: 2 x (10 x 25 + 3 x 15) forward."""
    forward = 590
    assert replace(SMALL, kind="rollout").flops(10, 3) == forward
    assert SMALL.flops(10, 3) == 5 * forward
    assert replace(SMALL, kind="ppo").flops(10, 3) == 5 * forward + 2 * 500
    assert replace(SMALL, kind="dpo").flops(10, 3) == 4 * forward
    texts = replace(SMALL, kind="sft", prompts=4, group=1, prompt_tokens=0)
    assert texts.flops(10, 3) == 6 * (10 * 15 + 3 * 11)


def test_pairs_are_of_the_lengths_of_their_work_and_no_step_sees_one_twice(tiny: Path) -> None:
    work, tokenizer = REAL["dpo"], AutoTokenizer.from_pretrained(tiny / "model")
    pairs = pairs_of(tokenizer, work, work.prompts * STEPS)
    assert len({tuple(pair.values()) for pair in pairs}) == work.prompts * STEPS
    for pair in pairs:
        assert pair["chosen"] != pair["rejected"]
        for text in (pair["chosen"], pair["rejected"]):
            assert len(tokenizer(pair["prompt"] + text)["input_ids"]) + 1 == work.prompt_tokens + 4


def test_a_job_survives_the_pipe() -> None:
    job = Job(task="ours", device="cpu", threads=1, scratch="/s", model="/m", work=SMALL)
    assert Job.from_json(job.to_json()) == job


def test_texts_have_exactly_the_tokens_asked_for() -> None:
    tokenizer = word_tokenizer(64)
    texts = texts_of(tokenizer, 4, 12)
    assert len(set(texts)) == 4
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [12] * 4
    assert tokenizer.unk_token_id not in tokenizer(texts)["input_ids"][0]
    with pytest.raises(ValueError, match="exactly 12 tokens"):
        texts_of(tokenizer, 1000, 12)


@pytest.mark.parametrize("size", ["0.3M", "3M"])
def test_random_models_have_about_the_size_of_their_name(size: str, tmp_path: Path) -> None:
    model, _ = random_model(size)
    wanted = 1e6 * float(size.rstrip("M"))
    assert 0.7 * wanted < sum(p.numel() for p in model.parameters()) < 1.3 * wanted
    model.save_pretrained(tmp_path)
    body, head = matmul_weights(str(tmp_path))
    # Everything is either a matrix of the trunk, the embedding (tied to the projection) or a norm.
    assert head == SIZES[size]["vocab_size"] * SIZES[size]["hidden_size"]
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert body + head + norms == sum(p.numel() for p in model.parameters())


# Lengths that are forced ---------------------------------------------------------------------------------------------


def finite(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_both_sides_force_the_same_ends() -> None:
    """Prompts of 5 tokens, lengths 2, 6, 3, 4: at new token 3 the rows still to end there have eos alone."""
    logits = torch.zeros(4, 7)
    ours = ForcedLengths(SimpleSampler(), SMALL, (1, 2))
    states: list[dict[str, Any]] = [{} for _ in range(4)]
    never = [0, 3, 4, 5, 6]
    for done in range(3):
        context = FilterContext(
            stream_logits=logits[:, None],
            hidden=torch.zeros(4, 1, 1),
            ids=[[9] * (5 + done)] * 4,
            prompt_lengths=[5] * 4,
            row_state=states,
        )
        theirs = ForcedEnd(SMALL, 5, torch.tensor([1, 2]))(torch.full((4, 5 + done), 9), logits)
        # TRL goes on with rows that have ended; what they get does not matter, here it is eos again.
        expected = [[1] if length <= done + 1 else never for length in SMALL.lengths]
        assert finite(ours(logits, context)) == finite(theirs) == expected
    assert logits.eq(0).all()


class SimpleSampler:
    capabilities = None


# Turns ---------------------------------------------------------------------------------------------------------------

FAKE = """
import json, sys, time
job = json.loads(sys.stdin.readline())
def say(**message): print(json.dumps(message), flush=True)
if job["task"] == "absent":
    say(event="unavailable", reason="not installed")
    sys.exit()
say(event="ready", load_seconds=0.5)
steps = 0
while sys.stdin.readline().strip() == "go":
    steps += 1
    if job["task"] == "dies" and steps == 3:
        sys.exit("out of luck")
    tokens = 7 if job["task"] == "wrong" else 15
    say(event="step", seconds=steps, stages={"update": 0.5 * steps}, tokens=tokens, peak_memory_gb=steps)
"""


def fake(name: str) -> System:
    return System(name=name, module=name, precision="fp32", ours=False, kinds=("grpo",))


def test_systems_take_turns_and_a_failure_loses_nothing_else(monkeypatch: Any, tmp_path: Path) -> None:
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: start([command[0], str(program)], **options))
    monkeypatch.setattr(runner, "REST", 0.0)
    said: list[str] = []
    settings = Settings(repeats=3, scratch=tmp_path, report=said.append)
    systems = [fake(name) for name in ("good", "dies", "absent", "wrong", "other")]
    results = run_work(SMALL, systems, "model", settings)
    assert [step["seconds"] for step in results["good"].clean] == [2, 3, 4]
    assert [step["seconds"] for step in results["dies"].clean] == [2]
    assert "out of luck" in str(results["dies"].error)
    assert results["absent"].error == "not installed"
    assert "7 tokens" in str(results["wrong"].error) and results["wrong"].first is None
    assert results["other"].error is None
    turns = [line.split()[1] for line in said if ": " in line and line.endswith(" s")]
    assert turns == ["good", "dies", "other", "good", "dies", "other", "good", "other", "good", "other"]


# Numbers -------------------------------------------------------------------------------------------------------------


def steps(*seconds: float) -> Steps:
    made = [{"seconds": s, "stages": {"update": s / 2}, "tokens": 15, "peak_memory_gb": s} for s in seconds]
    return Steps(load_seconds=9.0, first=made[0], clean=made[1:])


def test_the_summary_of_one_work_by_hand() -> None:
    """590 x 5 operations in 4 s at 2,000 a second are 2950 / 8000 of the limit."""
    work = summarise(SMALL, {"tropism-fp32": steps(6, 4, 3, 8), "trl-fp32": Steps(error="gone")}, LIMITS)
    entry = work["systems"]["tropism-fp32"]
    assert (entry["median"], entry["min"], entry["max"]) == (4, 3, 8)
    assert entry["first_over_steady"] == 1.5
    assert entry["stages"] == {"update": 2}
    assert entry["step_over_stages"] == 2
    assert entry["tokens_per_second"] == 15 / 4
    assert entry["peak_memory_gb"] == 8
    assert entry["share_of_gemm_limit"] == pytest.approx(2950 / 8000)
    assert work["systems"]["trl-fp32"] == {"error": "gone"}


def test_ratios_are_the_peers_best_step_over_our_median() -> None:
    results = {
        "tropism-fp32": steps(9, 4, 5, 9),
        "tropism-bf16": steps(9, 2),
        "trl-fp32": steps(1, 30, 20, 25),
        "trl-defaults": steps(1, 12, 16),
    }
    grpo = summarise(replace(SMALL, name="grpo-w1"), results, LIMITS)
    ppo = summarise(replace(SMALL, name="ppo-w1"), {"tropism-fp32": steps(9, 4)}, LIMITS)
    add_ratios({"grpo-w1": grpo, "ppo-w1": ppo})
    assert grpo["ratios"]["tropism-fp32"]["same_class"] == {"peer": "trl-fp32", "peer_seconds": 20, "ratio": 4}
    assert grpo["ratios"]["tropism-fp32"]["any_class"]["ratio"] == 12 / 5
    assert grpo["ratios"]["tropism-bf16"]["same_class"]["ratio"] == 6
    # 12 s of TRL's GRPO stand for 12 x 24.8 / 15.3 = 19.45 s of its PPO.
    assert ppo["ratios"]["tropism-fp32"]["same_class"]["ratio"] == pytest.approx(4.863, abs=1e-3)
    assert "24.8/15.3" in ppo["peer_note"] and grpo["peer_note"] is None


def test_ratios_are_absent_without_a_peer() -> None:
    work = summarise(SMALL, {"tropism-fp32": steps(9, 4)}, LIMITS)
    add_ratios({"small": work})
    assert work["ratios"] == {"tropism-fp32": {"same_class": None, "any_class": None}}


def test_stages_are_read_step_by_step(tmp_path: Path) -> None:
    log = tmp_path / "timings.jsonl"
    first = [{"kind": "collect", "step": 1, "time/rollout": 3.0}, {"kind": "update", "time/update": 1.0}]
    log.write_text("".join(json.dumps(line) + "\n" for line in first))
    stages = logged_stages(log)
    assert next(stages) == {"rollout": 3.0, "update": 1.0}
    with log.open("a") as file:
        file.write(json.dumps({"kind": "update", "time/update": 2.0, "time/step": 9.0}) + "\n")
    assert next(stages) == {"update": 2.0}


# Scaling -------------------------------------------------------------------------------------------------------------


def test_every_axis_passes_the_same_middle() -> None:
    assert all(scaling.Point() in line for line in scaling.points().values())
    assert Counter(scaling.in_order()).most_common(1)[0][1] == 1


def test_the_limit_of_few_rows_is_reading_the_weights() -> None:
    """One row: 64 steps x 13 weights x 4 bytes at 52e-9 GB/s take 64 s, the products far less."""
    machine = {**LIMITS, "gemm_gflops": {"fp32": 1.0}, "read_gb_per_s": 52e-9}
    limits = {"30M": machine}
    one = scaling.Point(rows=1)
    assert scaling.limit_tokens_per_second(one, "rollout", limits, "fp32") == pytest.approx(1.0)
    # 64 texts-tokens: 6 x (10 x 64 + 3 x 63) operations at 1e9 a second.
    assert scaling.limit_tokens_per_second(one, "sft", limits, "fp32") == pytest.approx(64 / (4974 / 1e9))


def test_plots_are_drawn_where_points_are_missing(tmp_path: Path) -> None:
    limits = {size: {**LIMITS, "gemm_gflops": {"fp32": 100.0}, "read_gb_per_s": 10.0} for size in scaling.SIZES}
    point = scaling.Point()
    work = point.work("rollout")
    measured = {work.name: summarise(work, {"tropism-fp32": steps(1, 2), "hf-fp32": steps(2, 3)}, limits["30M"])}
    result = {"precision": "fp32", "threads": 1, "limits": limits, "points": measured}
    paths = [scaling.plot(result, kind, tmp_path) for kind in scaling.KINDS]
    assert [path.name for path in paths] == ["scaling-rollout.png", "scaling-update.png"]
    assert all(path.stat().st_size > 1000 for path in paths)


# Whole ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and, beside it, a reward model made of it."""
    folder = tmp_path_factory.mktemp("bench")
    model, tokenizer = random_model("0.05M")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    job = Job(task="reward_model", device="cpu", threads=1, scratch=str(folder), model=str(folder / "model"))
    reward_model.run(job, Gate("cpu", StringIO(), StringIO()))
    return folder


EVEN = replace(SMALL, lengths=(4,) * 4)
REAL = {
    "grpo": SMALL,
    "rloo": replace(EVEN, kind="rloo"),
    "ppo": replace(EVEN, kind="ppo", prompts=4, group=1),
    "sft": replace(SMALL, kind="sft", prompts=4, group=1, prompt_tokens=0, lengths=(8,) * 4),
    "dpo": replace(EVEN, kind="dpo"),
    "rollout": replace(EVEN, kind="rollout"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", REAL)
def test_our_worker_does_every_kind_of_work(
    kind: str, precision: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps on a tiny random model, told to go twice through a pipe; then there is no more."""
    monkeypatch.setattr(ours, "keep_freed_memory", lambda: False)  # of the process, which here is that of all tests
    scratch = tiny / f"{kind}-{precision}"
    job = Job(
        task="ours",
        device="cpu",
        threads=1,
        scratch=str(scratch),
        model=str(tiny / "model"),
        precision=precision,
        work=REAL[kind],
    )
    answers = StringIO()
    with pytest.raises(StoppedError):
        ours.run(job, Gate("cpu", StringIO("go\ngo\n"), answers))
    ready, *found = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert ready["event"] == "ready"
    assert [step["tokens"] for step in found] == [REAL[kind].tokens] * 2
    expected = {"sft": {"update"}, "dpo": {"update"}, "rollout": {"rollout"}}.get(kind, {"rollout", "reward", "update"})
    for step in found:
        assert expected <= set(step["stages"])
        assert 0 < sum(step["stages"].values()) <= step["seconds"]
        assert step["peak_memory_gb"] > 0.05


@pytest.mark.slow
@pytest.mark.parity
def test_every_system_does_its_works(monkeypatch: Any, tmp_path: Path) -> None:
    """The whole program on a tiny random model: each system that is installed makes the tokens of the work."""
    pytest.importorskip("trl")
    from rich.console import Console

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    works = [replace(WORKS[name], model="0.05M") for name in ("rollout", "grpo-w2", "rloo-w1", "sft", "dpo")]
    settings = Settings(repeats=1, scratch=tmp_path, timeout=300.0, report=lambda line: None)
    out = tmp_path / "result.json"
    standard.measure(works, list(SYSTEMS), "0.05M", settings, out, Console(quiet=True))
    written = json.loads(out.read_text())
    for work in written["works"]:
        errors = {name: entry["error"] for name, entry in work["systems"].items() if entry["error"]}
        assert set(errors) <= {"vllm-bf16"}, errors
        assert all(ratio["same_class"]["ratio"] > 0 for ratio in work["ratios"].values())


def test_a_worker_that_cannot_begin_is_reported(tmp_path: Path) -> None:
    settings = Settings(scratch=tmp_path, timeout=60.0, report=print)
    with pytest.raises(WorkerError, match="no_such_task"):
        runner.ask(standard.job("no_such_task", "model", settings), timeout=60.0)
