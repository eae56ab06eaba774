"""No pickle is read or written, except that foreign .bin weights are read as tensors alone; nothing evaluates text."""

from __future__ import annotations

import ast
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import tropism
from tiny_models import FAMILIES, tiny_tokenizer
from tropism.errors import ModelError
from tropism.models.loading import load_model

ROOT = Path(tropism.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

PICKLERS = {
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "klepto",
    "marshal",
    "pandas",
    "pickle",
    "pickletools",
    "shelve",
}
"""Modules that pickle, or read pickles without being asked."""

MAY_PICKLE = {
    # A reward function and its values on their way through a pipe to a process that this library started; no file.
    "rewards/frames.py": {"cloudpickle"},
    "rewards/workers.py": {"cloudpickle"},
}

MAY_RUN = {
    # Code of the user's own machine that the user allowed.
    "rewards/resolve.py": {"exec", "compile", "importlib.import_module"},
    # llama.cpp's converter, which the user has installed or named.
    "export_gguf.py": {"subprocess"},
    # The machine's C compiler, on a file of this library, where a recipe asks for compiled kernels.
    "models/kernels.py": {"subprocess"},
    # Processes of this library's own: one that renders chat templates, those that call rewards, and runs of a sweep.
    "foreign/templates.py": {"subprocess"},
    "rewards/workers.py": {"subprocess"},
    "sweeps/work.py": {"subprocess"},
    # Names that stand in these files themselves, imported when they are first used.
    "__init__.py": {"import_module"},
    "attribution/__init__.py": {"import_module"},
    "cli.py": {"import_module"},
    "rewards/registry.py": {"importlib.import_module"},
}
"""File -> what it may run, start or import by name."""

RUNNERS = {"eval", "exec", "compile", "__import__"}
MODULES_THAT_RUN = {"subprocess", "multiprocessing", "pty", "code", "codeop", "runpy"}
CALLS_THAT_RUN = re.compile(r"os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*|fork\w*)|(importlib\.)?import_module")


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def imported(tree: ast.AST) -> Iterator[str]:
    """First parts of the names of all imported modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def runs(tree: ast.AST) -> set[str]:
    """What a file runs, starts or imports by name."""
    found = set(imported(tree)) & MODULES_THAT_RUN
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in RUNNERS or CALLS_THAT_RUN.fullmatch(name):
                found.add(name)
    return found


def pickles(tree: ast.AST) -> set[str]:
    """What a file pickles with."""
    found = set(imported(tree)) & PICKLERS
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in ("torch.load", "torch.save") or name.endswith((".read_pickle", ".to_pickle")):
                found.add(name)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg == "allow_pickle" or (keyword.arg == "weights_only" and value is not True):
                    found.add(f"{name}({keyword.arg})")
    return found


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_pickles_nothing_and_evaluates_nothing(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert pickles(parsed(path)) == MAY_PICKLE.get(name, set())
    assert runs(parsed(path)) == MAY_RUN.get(name, set())


def test_the_search_finds_what_it_is_for() -> None:
    for text, expected in {
        "import pickle": {"pickle"},
        "from joblib import load": {"joblib"},
        "import torch; torch.load(x)": {"torch.load"},
        "import numpy; numpy.load(x, allow_pickle=True)": {"numpy.load(allow_pickle)"},
        "f(x, weights_only=False)": {"f(weights_only)"},
    }.items():
        assert pickles(ast.parse(text)) == expected
    for text in ("eval(x)", "exec(x)", "import os; os.system(x)", "import subprocess", "__import__(x)"):
        assert runs(ast.parse(text))


# Foreign .bin files.


class Payload:
    """Unpickles by creating a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.witness), "w")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model whose weights are pickled, as models were before safetensors."""
    model = FAMILIES["llama"]()
    model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "tiny" / "pytorch_model.bin")
    return tmp_path / "tiny"


def test_pickled_weights_are_read(folder: Path) -> None:
    expected = FAMILIES["llama"]().state_dict()
    found = load_model(str(folder)).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_does_not_run(folder: Path, zipped: bool) -> None:
    witness = folder.parent / "ran"
    weights: dict[str, Any] = {**FAMILIES["llama"]().state_dict(), "extra": Payload(witness)}
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin .*more than plain tensors.*safetensors"):
        load_model(str(folder))
    assert not witness.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert witness.exists()  # the attack works


def test_other_pickles_in_a_folder_are_never_opened(folder: Path) -> None:
    witness = folder.parent / "ran"
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "scaler.pt",
        "adapter_model.bin",
    ):
        (folder / name).write_bytes(pickle.dumps(Payload(witness)))
    (folder / "global_step1").mkdir()
    (folder / "global_step1" / ".metadata").write_bytes(pickle.dumps(Payload(witness)))
    load_model(str(folder))
    assert not witness.exists()


def test_archives_that_unpack_to_more_than_they_are_get_refused(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    assert (folder / "pytorch_model.bin").stat().st_size < 10**6
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a compressed archive"):
        load_model(str(folder))
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        for number in range(3):
            archive.writestr(f"archive/data/{number}", bytes(1000))
        for entry in archive.filelist:  # three names for the same bytes
            entry.header_offset = 0
            entry.file_size = entry.compress_size = 1200
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is damaged or hostile: it unpacks to more"):
        load_model(str(folder))


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"garbage" * 100, b"\x80\x02.", bytes(10**6)])
def test_garbage_is_named(folder: Path, content: bytes) -> None:
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        load_model(str(folder))


def test_pickled_adapters_are_read_as_tensors_alone(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted: Any = get_peft_model(base, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapter = folder.parent / "adapter"
    adapted.save_pretrained(str(adapter), safe_serialization=False)
    assert [path.name for path in adapter.glob("*.bin")] == ["adapter_model.bin"]
    loaded = load_model(str(adapter)).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in adapted.state_dict().items() if "lora" in name)
    witness = folder.parent / "ran"
    torch.save({"base_model.model.x.lora_A.weight": Payload(witness)}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter .*more than plain tensors"):
        load_model(str(adapter))
    assert not witness.exists()
