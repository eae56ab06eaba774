"""A conditioned model's folder: what it holds, that it loads equal, and what is wrong with a damaged one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tropism
from tiny_models import tiny_model, tiny_tokenizer
from tropism.algorithms import RewardConditioned
from tropism.errors import ConfigError, ModelError
from tropism.generation import TextPolicy, make_conditioner, slots_for
from tropism.models.conditioning_files import FACTS, MARK, SLOTS
from tropism.models.loading import load_model
from tropism.models.lora import LoRA, add_lora
from tropism.models.policy import Policy
from tropism.targets.config import Conditioning, Mechanism
from tropism.types import pad_rows

MECHANISMS: tuple[Mechanism, ...] = ("linear", "add", "replace", "token", "text")
REWARDS = [(0.0, 5.0), (0.5, 9.0), (0.75, 2.0), (1.0, 30.0)]
TARGETS: list[Any] = [{"mood": 0.9, "length": 7}, {"mood": 0.1}, {"length": 20}, {}]


def conditioned(mechanism: Mechanism, *, family: str = "gpt2", adapter: bool = False) -> TextPolicy:
    """A tiny model that has learned something about two rewards."""
    loaded = load_model((tiny_model(family), tiny_tokenizer(add_bos=True)))
    config = Conditioning(mechanism=mechanism, targets=("mood", "length"), bins=3, scaler="quantile")
    conditioner = make_conditioner(config, loaded)
    conditioner.fit(REWARDS)
    slots = None
    generator = torch.Generator().manual_seed(9)
    if mechanism != "text":
        slots = slots_for(config, loaded)
        slots.start(loaded.model.get_input_embeddings(), seed=3, ones=False)
        with torch.no_grad():
            for parameter in slots.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model: Any = add_lora(loaded.model, LoRA(rank=2), seed=0) if adapter else loaded.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return TextPolicy(Policy(model, conditioning=slots), loaded, conditioner=conditioner)


@torch.no_grad()
def logits(model: TextPolicy) -> Tensor:
    """[4, V] after a prompt, per target."""
    assert model.conditioner is not None
    text = tuple(model.tokenizer("a cat")["input_ids"])
    rows = [model.conditioner.apply(text, model.conditioner.prefix(asked)) for asked in TARGETS]
    ids = pad_rows(rows, left=True)
    starts = torch.tensor([ids.shape[1] - len(row) for row in rows])[:, None]
    positions = torch.arange(ids.shape[1])[None]
    hidden = model.policy.hidden_states(ids, positions >= starts, (positions - starts).clamp(min=0))
    return model.policy.logits(hidden[:, -1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    conditioned("linear").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_saved_model_loads_equal(mechanism: Mechanism, adapter: bool, tmp_path: Path) -> None:
    model = conditioned(mechanism, adapter=adapter)
    wanted = logits(model)
    assert len({tuple(row) for row in wanted.round(decimals=3).tolist()}) == 4, "targets are told apart"
    model.save_pretrained(tmp_path / "model")
    loaded = TextPolicy.from_pretrained(str(tmp_path / "model"))
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=1e-5)
    assert loaded.conditioner is not None and model.conditioner is not None
    assert loaded.conditioner.to_dict() == model.conditioner.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert (SLOTS in names) == (mechanism != "text")
    for name in sorted(names - {"tokenizer_config.json"}):  # says whether the tokenizer came from a folder
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_folder_names_its_mechanism_and_is_a_plain_model_beside(mechanism: Mechanism, tmp_path: Path) -> None:
    model = conditioned(mechanism)
    model.save_pretrained(tmp_path / "model")
    facts = json.loads((tmp_path / "model" / FACTS).read_text())
    assert facts["mechanism"] == mechanism and facts["targets"] == ["mood", "length"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config[MARK] == mechanism
    assert not hasattr(model.policy.config, MARK), "the live model stays as it was"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[5, 9, 11]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.policy.model(ids).logits, rtol=0, atol=1e-5)
    if mechanism != "text":
        tensors = load_file(tmp_path / "model" / SLOTS)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def test_a_plain_model_has_no_conditioner(tmp_path: Path) -> None:
    model = TextPolicy.load((tiny_model("gpt2"), tiny_tokenizer()))
    assert model.conditioner is None and model.policy.conditioning is None
    model.save_pretrained(tmp_path / "plain")
    assert TextPolicy.load(tmp_path / "plain").conditioner is None
    assert not (tmp_path / "plain" / FACTS).exists()


def test_a_model_object_without_its_slots_is_refused(saved: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(ModelError, match=r"slots that are no part of the model object: give the folder"):
        load_model((plain, tiny_tokenizer()))
    delattr(plain.config, MARK)
    assert load_model((plain, tiny_tokenizer())).conditioning is None


# ---- damage ----------------------------------------------------------------------------------------------------------


def of_facts(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / FACTS).read_text())
        change(facts)
        (folder / FACTS).write_text(json.dumps(facts))

    return damage


def of_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SLOTS)
        change(tensors)
        save_file(tensors, folder / SLOTS)

    return damage


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:50])


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no facts": (remove(FACTS), f"{FACTS} is missing; copy the whole folder"),
    "no slots": (remove(SLOTS), f"{SLOTS} is missing; copy the whole folder"),
    "cut facts": (cut(FACTS), FACTS),
    "cut slots": (cut(SLOTS), f"{SLOTS} is damaged"),
    "a list": (lambda folder: (folder / FACTS).write_text("[]"), FACTS),
    "no mechanism": (of_facts(lambda facts: facts.pop("mechanism")), f"{FACTS} is damaged"),
    "another mechanism": (of_facts(lambda facts: facts.update(mechanism="add")), f"{FACTS} is damaged"),
    "no names": (of_facts(lambda facts: facts.pop("targets")), f"{FACTS} is damaged"),
    "empty names": (of_facts(lambda facts: facts.update(targets=[])), f"{FACTS} is damaged"),
    "a name too few": (of_facts(lambda facts: facts.update(targets=["mood"])), "does not fit its model"),
    "bins in words": (of_facts(lambda facts: facts.update(bins="many")), f"{FACTS} is damaged"),
    "a scaler too few": (of_facts(lambda facts: facts["scalers"].pop()), "does not fit its model"),
    "an unknown scaler": (of_facts(lambda facts: facts["scalers"][0].update(name="x")), "does not fit its model"),
    "no ranges": (of_facts(lambda facts: facts.update(seen=None)), "does not fit its model"),
    "short ranges": (of_facts(lambda facts: facts.update(seen=[[0.0], [1.0]])), "does not fit its model"),
    "ranges in words": (of_facts(lambda facts: facts.update(seen=["low", "high"])), "does not fit its model"),
    "a default of no reward": (of_facts(lambda facts: facts.update(default={"x": 1})), "does not fit its model"),
    "no weight": (of_tensors(lambda tensors: tensors.pop("weight")), "does not fit its model"),
    "another shape": (of_tensors(lambda t: t.update(weight=t["weight"][:1].clone())), "does not fit its model"),
    "not finite": (of_tensors(lambda t: t["bias"].fill_(float("nan"))), "does not fit its model"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_a_clear_error(kind: str, saved: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    shutil.copytree(saved, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ModelError, match=message) as caught:
        TextPolicy.load(tmp_path / "model")
    assert "model" in str(caught.value)


def test_slots_that_lead_out_of_the_folder_are_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / SLOTS).rename(tmp_path / "elsewhere")
    (tmp_path / "model" / SLOTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="leads outside its folder"):
        TextPolicy.load(tmp_path / "model")


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_pushing_uploads_what_save_pretrained_writes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
            calls.append(("create", (repository, private, exist_ok)))

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
            content = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
            calls.append(("upload", (repo_id, content)))
            return SimpleNamespace(repo_url="https://hub/user/model")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = TextPolicy.load(saved)
    assert model.push_to_hub("user/model", private=True, token="given") == "https://hub/user/model"
    assert [name for name, _ in calls] == ["token", "create", "upload"]
    assert calls[0][1] == "given" and calls[1][1] == ("user/model", True, True)
    repository, content = calls[2][1]
    assert repository == "user/model"
    assert content.keys() == {path.name for path in saved.iterdir()}
    for name in (FACTS, SLOTS, "config.json", "model.safetensors"):
        assert content[name] == (saved / name).read_bytes()


# ---- training goes on ------------------------------------------------------------------------------------------------

RECORDS = [{"prompt": "a cat", "completion": f" sat{'.' * n}", "mood": n / 4, "length": 5.0 + n} for n in range(5)]


def train_on(saved: Path, run: Path, **changes: Any) -> tropism.Result:
    algorithm = RewardConditioned(
        **{"targets": ("mood", "length"), "bins": 3, "scaler": "quantile", **changes.pop("algorithm", {})}
    )
    return tropism.train(
        model=str(saved),
        data=RECORDS,
        run=str(run),
        total_steps=1,
        prompts_per_step=2,
        **{"algorithm": algorithm, "trainer": tropism.TrainerConfig(progress=False, learning_rate=1e-3), **changes},
    )


def test_training_goes_on_from_a_saved_model(saved: Path, tmp_path: Path) -> None:
    before = TextPolicy.load(saved)
    still = train_on(saved, tmp_path / "still", trainer=tropism.TrainerConfig(progress=False, learning_rate=1e-30))
    torch.testing.assert_close(logits(still.policy), logits(before), rtol=0, atol=1e-6)
    assert before.conditioner is not None and still.policy.conditioner is not None
    assert still.policy.conditioner.scalers == before.conditioner.scalers, "the scale is the one the slots know"
    moved = train_on(saved, tmp_path / "moved")
    assert float((logits(moved.policy) - logits(before)).abs().max()) > 1e-3
    torch.testing.assert_close(logits(TextPolicy.load(tmp_path / "moved")), logits(moved.policy), rtol=0, atol=1e-5)
    again = train_on(tmp_path / "moved" / "model", tmp_path / "again")
    assert again.metrics["loss/nll"] > 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mechanism": "add"}, "mechanism 'linear', and algorithm.mechanism is 'add'"),
        ({"targets": ("mood",)}, "targets"),
        ({"targets": ("length", "mood")}, "targets"),
        ({"scaler": "standard"}, "scaler 'quantile'"),
        ({"mechanism": "add"}, "mechanism .linear."),
    ],
    ids=str,
)
def test_a_saved_model_is_told_as_it_was(change: Any, named: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"was trained with.*{named}"):
        train_on(saved, tmp_path / "run", algorithm=change)
    assert not (tmp_path / "run").exists()


def test_another_method_on_it_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"asked for rewards \(linear\), and sft would train it without"):
        tropism.train(
            model=str(saved), algorithm=tropism.SFT(), data=["a cat."], run=str(tmp_path / "run"), total_steps=1
        )
    assert not (tmp_path / "run").exists()


def test_slots_that_do_not_fit_are_named_before_training(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    DAMAGE["no weight"][0](tmp_path / "model")
    with pytest.raises(ModelError, match="does not fit its model"):
        train_on(tmp_path / "model", tmp_path / "run")
