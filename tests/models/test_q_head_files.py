"""Q heads on the disk: beside a plain model folder, loaded with it, and every refusal of files that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tiny_runs import TEXTS, Setting, assemble, execute, make_recipe
from tropism.algorithms import SFT
from tropism.build import run_recipe
from tropism.errors import ConfigError, ModelError
from tropism.generation import TextPolicy
from tropism.models.loading import load_model
from tropism.models.lora import LoRA
from tropism.models.q_head_files import FACTS, MARK, WEIGHTS
from tropism.rollouts.config import Sampling

SETTING = Setting("ilql", False, "llama")
STEEP: dict[str, Any] = {"trainer": {"learning_rate": 2e-2}}
"""So that after four steps values differ from 0."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of ILQL."""
    algorithm = SETTING.with_algorithm(alpha=0.5)
    return run_recipe(make_recipe(SETTING, tmp_path_factory.mktemp("ilql") / "run", algorithm=algorithm, **STEEP))


@pytest.fixture
def folder(trained: Any, tmp_path: Path) -> Path:
    """A copy of its model that a test may damage."""
    return Path(shutil.copytree(trained.path / "model", tmp_path / "model"))


def test_a_run_is_loaded_with_its_heads(trained: Any) -> None:
    loaded = TextPolicy.load(trained.path, device="cpu")
    for beta in (0.0, 50.0):
        asked: dict[str, Any] = {"n": 8, "max_new_tokens": 6, "beta": beta}
        assert loaded.generate("a cat", **asked) == trained.policy.generate("a cat", **asked)
    assert loaded.generate("a cat", n=8, max_new_tokens=6) != loaded.generate("a cat", n=8, max_new_tokens=6, beta=50)
    own, saved = (policy.policy.q_heads.state_dict() for policy in (trained.policy, loaded))
    assert own.keys() == saved.keys() and all(torch.equal(own[name], saved[name]) for name in own)
    assert float(own["targets.0.outer.weight"].abs().max()) > 0
    assert not torch.equal(own["targets.0.outer.weight"], own["q.0.outer.weight"])


def test_the_folder_is_a_plain_one(trained: Any) -> None:
    names = {path.name for path in (trained.path / "model").iterdir()}
    assert {FACTS, WEIGHTS, "model.safetensors", "config.json"} <= names
    plain = AutoModelForCausalLM.from_pretrained(trained.path / "model")
    ids = torch.tensor([[5, 9, 11]])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, trained.policy.policy.model(input_ids=ids).logits)
    facts = json.loads((trained.path / "model" / FACTS).read_text())
    assert facts == {"q_heads": 2, "hidden_size": 32, "vocabulary": 37}


def test_one_head_comes_back_as_one(tmp_path: Path) -> None:
    algorithm = SETTING.with_algorithm(two_qs=False)
    run_recipe(make_recipe(SETTING, tmp_path / "run", algorithm=algorithm, **STEEP))
    loaded = TextPolicy.load(tmp_path / "run", device="cpu")
    assert loaded.policy.q_heads is not None and len(loaded.policy.q_heads.q) == 1


def test_an_adapter_is_exported_merged_with_its_heads(tmp_path: Path) -> None:
    setting = Setting("ilql", True, "gpt2")
    result = run_recipe(make_recipe(setting, tmp_path / "run", lora=LoRA(rank=4), **STEEP))
    loaded = TextPolicy.load(tmp_path / "run", device="cpu")
    asked: dict[str, Any] = {"max_new_tokens": 6, "beta": 5.0, "temperature": 0.0}
    assert loaded.generate("a cat", **asked) == result.policy.generate("a cat", **asked)


def test_save_pretrained_writes_them(trained: Any, tmp_path: Path) -> None:
    trained.policy.save_pretrained(tmp_path / "copy")
    again = TextPolicy.load(tmp_path / "copy", device="cpu")
    assert again.generate("oh", beta=9.0, max_new_tokens=5) == trained.policy.generate("oh", beta=9.0, max_new_tokens=5)


def test_training_goes_on_with_the_heads_that_are_there(trained: Any, tmp_path: Path) -> None:
    assembly = assemble(SETTING, tmp_path / "run", model=str(trained.path / "model"))
    own, started = trained.policy.policy.q_heads.state_dict(), assembly.policy.q_heads
    assert started is not None
    assert all(torch.equal(value, own[name]) for name, value in started.state_dict().items())
    assert not any(p.requires_grad for p in started.targets.parameters())
    algorithm = SETTING.with_algorithm(two_qs=False)
    with pytest.raises(ConfigError, match=r"was trained with 2 Q heads, and algorithm.two_qs asks for 1"):
        assemble(SETTING, tmp_path / "other", model=str(trained.path / "model"), algorithm=algorithm)


def test_another_method_goes_on_without_them(trained: Any, tmp_path: Path) -> None:
    setting = Setting("sft", False, "llama")
    model = str(trained.path / "model")
    execute(assemble(setting, tmp_path / "run", model=model, algorithm=SFT(), data=TEXTS), export=True)
    assert not (tmp_path / "run" / "model" / WEIGHTS).exists()
    loaded = TextPolicy.load(tmp_path / "run", device="cpu")
    assert loaded.policy.q_heads is None
    with pytest.raises(ConfigError, match="this model has none"):
        loaded.generate("a cat", beta=1.0, max_new_tokens=3)


def test_beta_is_refused_where_a_method_trains_no_heads(trained: Any, tmp_path: Path) -> None:
    setting = Setting("grpo", False, "llama")
    with pytest.raises(ConfigError, match=r"sampling.beta is 2"):
        assemble(setting, tmp_path / "run", sampling=Sampling(max_new_tokens=4, beta=2.0))


@pytest.mark.parametrize("name", [FACTS, WEIGHTS])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=f"says that it has Q heads, but {name} is missing"):
        TextPolicy.load(folder, device="cpu")


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"q_heads": 1, "hidden_size": 32, "vocabulary": 37},
        {"q_heads": 2, "hidden_size": "32", "vocabulary": 37},
        {"q_heads": 2, "hidden_size": True, "vocabulary": 37},
        {"q_heads": 2, "hidden_size": 32, "vocabulary": -1},
    ],
)
def test_damaged_facts_are_refused(facts: dict[str, Any], folder: Path) -> None:
    (folder / FACTS).write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"q_heads.json is damaged"):
        TextPolicy.load(folder, device="cpu")


def test_heads_of_another_model_are_refused(folder: Path) -> None:
    (folder / FACTS).write_text(json.dumps({"q_heads": 2, "hidden_size": 16, "vocabulary": 37}))
    with pytest.raises(ModelError, match="values 37 tokens from 16 numbers, but its model has 37 tokens and 32"):
        TextPolicy.load(folder, device="cpu")


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if not name.startswith("targets.1")}, folder / WEIGHTS)
    with pytest.raises(ModelError, match="does not hold 2 Q heads with their targets"):
        TextPolicy.load(folder, device="cpu")
    save_file({**tensors, "value.outer.bias": torch.tensor([float("nan")])}, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"value.outer.bias in .* is not finite"):
        TextPolicy.load(folder, device="cpu")


def test_a_file_that_is_no_safetensors_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ModelError):
        TextPolicy.load(folder, device="cpu")


def test_a_strange_mark_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config[MARK] == 2
    (folder / "config.json").write_text(json.dumps({**config, MARK: 7}))
    with pytest.raises(ModelError, match="is damaged"):
        load_model(str(folder))
