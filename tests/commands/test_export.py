"""tropism export, on runs of a few steps: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tropism
from conditioned_policies import conditioned_policy
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer
from tropism.algorithms.conditioned import RewardConditioned
from tropism.cli import main
from tropism.commands.asked_targets import parsed_targets
from tropism.errors import ConfigError
from tropism.export import export_at_target
from tropism.generation import TextPolicy, save_policy
from tropism.models.policy import Policy

Captured = pytest.CaptureFixture[str]

TEXTS = [
    {"prompt": prompt, "completion": completion, "warmth": warmth, "length": len(completion)}
    for prompt, completion, warmth in [
        ("a cat", " sat on a mat.", 0.1),
        ("the dog", " ran.", 0.4),
        ("oh", " no!", 0.0),
        ("is it so", ", my friend? it is.", 1.0),
        ("we", " ran and ran.", 0.6),
        ("no", ", no.", 0.2),
    ]
]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("tropism.export_checks.GREEDY", 1)


def loaded(folder: Path) -> Any:
    """As anybody loads it."""
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose model can be asked for two rewards, and has rows that no token has."""
    folder = tmp_path_factory.mktemp("runs") / "warm"
    tropism.train(
        model=(tiny_model("llama", vocab_size=VOCABULARY + 3), tiny_tokenizer()),
        algorithm=RewardConditioned(targets=("warmth", "length")),
        data=TEXTS,
        eval_data=TEXTS[:2],
        run=str(folder),
        total_steps=2,
        prompts_per_step=4,
        trainer=tropism.TrainerConfig(progress=False),
    )
    return folder


def test_a_run_at_a_target(run: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "warm at 0.9"
    words = ["export", str(run), "--target-reward", "warmth=0.9", "--target-reward", "length=12", "--out", str(out)]
    assert main(words) == 0
    captured = capsys.readouterr()
    shown = captured.out
    assert captured.err == ""
    assert "warmth: 0.9, built in (mechanism linear)" in shown and "length: 12, built in" in shown
    assert f"slot: row {VOCABULARY} of the vocabulary (padding), which the tokenizer calls <|warmth=0.9|>" in shown
    found = re.search(r"verified: on (\d+) texts logits differ by at most (\S+) \(allowed (\S+):", shown)
    assert found and int(found[1]) >= 6 and float(found[2]) <= float(found[3]) < 1e-3
    assert f"written: {out}" in shown

    tokenizer, model = AutoTokenizer.from_pretrained(out), loaded(out)
    row = tokenizer("a dog", return_tensors="pt")
    told = TextPolicy.load(run)
    assert told.conditioner is not None
    asked = told.conditioner.apply(
        told.tokenizer("a dog")["input_ids"], told.conditioner.prefix({"warmth": 0.9, "length": 12})
    )
    ids = torch.tensor([[*asked]])
    with torch.no_grad():
        hidden = told.policy.hidden_states(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(len(asked))[None])
        torch.testing.assert_close(model(**row).logits, told.policy.logits(hidden), atol=1e-5, rtol=1e-5)
        whole = model.generate(**row, max_new_tokens=6, do_sample=False)[0, row["input_ids"].shape[1] :]
    completion = told.generate("a dog", target_reward={"warmth": 0.9, "length": 12}, max_new_tokens=6, temperature=0)
    assert tokenizer.decode(whole, skip_special_tokens=True) == completion[0]


def test_what_a_stranger_finds(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--target-reward", "warmth=0.5", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training.png", "tropism_export.json",
    ]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**warmth 0.5, length left open**" in card and "mechanism `linear`" in card
    assert "\ntropism export warm --target-reward warmth=0.5 --out out\n" in card
    code = re.search(r"```python\n(.*?)```", card, flags=re.S)
    assert code
    exec(compile(code[1].replace('"out"', repr(str(tmp_path / "out"))), "card", "exec"), {})
    assert "reward_conditioning" not in (tmp_path / "out" / "config.json").read_text()
    facts = json.loads((tmp_path / "out" / "tropism_export.json").read_text())
    assert facts["targets"] == {"warmth": 0.5, "length": None}
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "weights can be read by whoever can read the rest"


def test_targets_beyond_the_training_rewards_warn(run: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(run), "--target-reward", "warmth=1.5", "--out", str(tmp_path / "out")]) == 0
    assert re.search(r"warning: the target 1\.5 of 'warmth' lies outside .* 0 to 1", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            r"needs a target: --target-reward NUMBER or NAME=NUMBER \(warmth was 0 to 1 in training",
        ),
        (["--target-reward", "0.9"], "the model knows 2 rewards; say which one 0.9 is of"),
        (["--target-reward", "warmt=0.9"], "did you mean 'warmth'"),
        (["--target-reward", "warmth=warm"], "'warmth=warm': give a number, or NAME=NUMBER"),
        (["--target-reward", "warmth=nan"], "'warmth=nan': give a number"),
        (["--target-reward", "warmth=1", "--target-reward", "warmth=0"], "gives warmth twice"),
        (["--target-reward", "1", "--target-reward", "warmth=0"], "a number without a name beside others"),
        (["--target-reward", "warmth=1", "--slot-token", "z"], "2 reward slots need as many tokens"),
        (["--target-reward", "warmth=1", "--slot-token", "z", "--slot-token", "z"], "named twice"),
    ],
)
def test_what_it_refuses(words: list[str], message: str, run: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["export", str(run), *words, "--out", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_targets_on_the_command_line() -> None:
    assert parsed_targets([], "--target-reward") is None
    assert parsed_targets(["-1.5"], "--target-reward") == -1.5
    assert parsed_targets(["a=1", "b=c=2e3"], "--target-reward") == {"a": 1.0, "b=c": 2000.0}
    with pytest.raises(ConfigError, match="'=3': give a number"):
        parsed_targets(["=3"], "--target-reward")


def test_negative_targets_are_no_options(tmp_path: Path, capsys: Captured) -> None:
    policy = conditioned_policy(vocab_size=VOCABULARY + 1)
    save_policy(policy.policy, policy.tokenizer, policy.conditioner, tmp_path / "model")
    words = ["export", str(tmp_path / "model"), "--target-reward", "-1.5", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "reward: -1.5, built in" in capsys.readouterr().out


def test_a_model_that_cannot_be_asked_is_written_as_it_is(tmp_path: Path, capsys: Captured) -> None:
    source = tmp_path / "model"
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(add_bos=True)
    save_policy(Policy(model), tokenizer, None, source)
    assert main(["export", str(source), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "verified: on 6 texts" in shown and "built in" not in shown and "slot:" not in shown
    plain = loaded(tmp_path / "out")
    assert plain.config.tie_word_embeddings is True
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a cat").input_ids == tokenizer("a cat").input_ids
    for option in (["--target-reward", "0.9"], ["--slot-token", "z"]):
        assert main(["export", str(source), *option, "--out", str(tmp_path / "other")]) == 2
        assert f"leave {option[0]} out" in capsys.readouterr().err


def test_only_earlier_exports_are_replaced(tmp_path: Path) -> None:
    policy = conditioned_policy(vocab_size=VOCABULARY + 1)
    (tmp_path / "out").mkdir()
    export_at_target(policy, 0.2, tmp_path / "out")
    export_at_target(policy, 0.8, tmp_path / "out")
    assert "<|reward=0.8|>" in (tmp_path / "out" / "tokenizer.json").read_text()
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("the only copy")
    for place in (taken, taken / "thesis.txt"):
        with pytest.raises(ConfigError, match="is there already and is no earlier export"):
            export_at_target(policy, 0.8, place)
    assert (taken / "thesis.txt").read_text() == "the only copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "taken"]


def test_half_precision_weights_are_not_rounded_twice(tmp_path: Path, capsys: Captured) -> None:
    policy = conditioned_policy(model=tiny_model("llama", vocab_size=VOCABULARY + 1).bfloat16())
    save_policy(policy.policy, policy.tokenizer, policy.conditioner, tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--target-reward", "0.5", "--out", str(tmp_path / "out")]) == 0
    assert "weights are bfloat16, so a slot's row is rounded to it" in capsys.readouterr().out
    model = loaded(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, policy.policy.language_model.lm_head.weight)


# Beside the folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A model folder without anything to be asked."""
    save_policy(Policy(tiny_model("gpt2")), tiny_tokenizer(), None, tmp_path / "model")
    return tmp_path / "model"


class Hub:
    """A hub that takes what it is given, or refuses it."""

    given: ClassVar[list[Any]] = []
    failure: ClassVar[Exception | None] = None

    def __init__(self, token: str | None = None) -> None:
        assert token is None, "tokens are never on a command line"

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        if self.failure is not None:
            raise self.failure
        self.given.append((repository, private, exist_ok))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self.given.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir()), commit_message))
        return SimpleNamespace(repo_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    fresh = type("FreshHub", (Hub,), {"given": []})
    monkeypatch.setattr("huggingface_hub.HfApi", fresh)
    return fresh


def test_an_export_is_uploaded(plain: Path, hub: type[Hub], tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    assert main(["export", str(plain), "--out", str(out), "--push-to-hub", "ada/warm", "--private"]) == 0
    assert hub.given[0] == ("ada/warm", True, True)
    assert hub.given[1][0] == "ada/warm" and hub.given[1][1] == sorted(path.name for path in out.iterdir())
    assert "README.md" in hub.given[1][1]
    assert "uploaded: https://hub/ada/warm" in capsys.readouterr().out


def test_a_hub_that_refuses_leaves_the_folder(plain: Path, hub: type[Hub], tmp_path: Path, capsys: Captured) -> None:
    hub.failure = ConnectionError("no route to host")
    assert main(["export", str(plain), "--out", str(tmp_path / "out"), "--push-to-hub", "ada/warm"]) == 2
    captured = capsys.readouterr()
    assert "written: " in captured.out
    assert captured.err.count("error: ") == 1 and "Traceback" not in captured.err
    assert "cannot be reached (no route to host)" in captured.err
    assert f"The folder stays as it is; upload it later with: hf upload ada/warm {tmp_path / 'out'}" in captured.err
    assert loaded(tmp_path / "out") is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to-hub", "warm"], "'warm' is no repository of the hub: give USER/NAME"),
        (["--private"], "--private is about the repository that --push-to-hub USER/NAME makes"),
        (["--gguf", "q4_k_m"], "'q4_k_m' is no kind of weights"),
        (["--gguf-converter", "x"], "--gguf-converter is for --gguf"),
        (["--step", "3"], "is no run folder"),
        (["--best"], "is no run folder .* leave --best out"),
        (["--keep-heads"], "this model has none; leave it out"),
        (["--base", "demo"], "--base is for checkpoints and adapters"),
    ],
)
def test_what_does_not_go_together(
    words: list[str], message: str, plain: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert main(["export", str(plain), "--out", str(tmp_path / "out"), *words]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out").exists()


def test_gguf_by_a_converter_on_the_path(
    plain: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs, out = tmp_path / "programs", tmp_path / "out"
    programs.mkdir()
    (programs / "convert_hf_to_gguf.py").write_text(
        "import struct, sys\n"
        "assert sys.argv[2] == '--outfile' and sys.argv[4:] == ['--outtype', 'f16'], sys.argv\n"
        "open(sys.argv[3], 'wb').write(b'GGUF' + struct.pack('<IQQ', 3, 0, 0))\n"
    )
    monkeypatch.setenv("PATH", str(programs))
    for words in (["--gguf", "--out", str(out)], ["--out", str(out), "--gguf"], ["--out", str(out), "--gguf", "f16"]):
        assert main(["export", str(plain), *words]) == 0
        assert f"written: {out / 'out-f16.gguf'} (by convert_hf_to_gguf.py" in capsys.readouterr().out
        assert "`out-f16.gguf` holds the same model for llama.cpp" in (out / "README.md").read_text()
    assert main(["export", "--gguf", str(plain), "--out", str(out)]) == 0, "the source may follow it"


def test_gguf_without_a_converter(
    plain: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert main(["export", str(plain), "--out", str(tmp_path / "out"), "--gguf", "--push-to-hub", "ada/warm"]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert f"the plain folder {tmp_path / 'out'} is whole, but no GGUF file was made of it" in message
    assert "git clone --depth 1 https://github.com/ggml-org/llama.cpp" in message
    assert loaded(tmp_path / "out") is not None


def test_help_says_what_it_does(capsys: Captured) -> None:
    assert main(["export", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("--step", "--best", "--base", "--keep-heads", "--gguf", "--push-to-hub", "--private", "--out PATH"):
        assert words in shown
