"""GGUF files by a converter that is installed: what it is called with, and what is said where there is none."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import pytest

from tropism.errors import ConfigError, ModelError
from tropism.export_gguf import SCRIPT, check_type, find_converter, write_gguf

CONVERTER = """
import json, struct, sys
folder, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
json.dump([folder, options], open({log!r}, "w"))
{then}
"""
WRITE = 'open(options["--outfile"], "wb").write(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "warm"
    place.mkdir()
    (place / "config.json").write_text("{}")
    return place


def converter(where: Path, then: str = WRITE) -> Path:
    """A converter of that name which notes how it was called."""
    where.mkdir(exist_ok=True)
    path = where / SCRIPT
    path.write_text(CONVERTER.format(log=str(where / "called.json"), then=then))
    return path


def test_the_converter_is_given_the_plain_folder(folder: Path, tmp_path: Path) -> None:
    script = converter(tmp_path / "llama.cpp")
    path = write_gguf(folder, "q8_0", script)
    assert path == folder / "warm-q8_0.gguf" and path.read_bytes()[:4] == b"GGUF"
    called, options = json.loads((tmp_path / "llama.cpp" / "called.json").read_text())
    assert called == str(folder) and options["--outtype"] == "q8_0"
    assert Path(options["--outfile"]).parent == folder and options["--outfile"] != str(path), "whole, then named"
    assert sorted(one.name for one in folder.iterdir()) == ["config.json", "warm-q8_0.gguf"]


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ("sys.exit('Model Tiny is not supported')", r"ended with 1: Model Tiny is not supported"),
        ("pass", r"wrote no file"),
        ('open(options["--outfile"], "wb").write(b"PK")', r"wrote something else: .* is no GGUF file"),
        ("print('token hf_abcdefghijklmnopqrstuvwx'); sys.exit(3)", r"ended with 3: token \[redacted\]"),
    ],
)
def test_a_converter_that_fails_leaves_the_folder(then: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"no GGUF file was made: .*{message}.*The plain folder {folder} is whole"):
        write_gguf(folder, "f16", converter(tmp_path / "llama.cpp", then))
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_programs_that_are_no_python_are_run_as_they_are(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "convert"
    script.write_text(f"#!{sys.executable}\n" + CONVERTER.format(log=str(tmp_path / "called.json"), then=WRITE))
    with pytest.raises(ModelError, match="could not be run: Permission denied"):
        write_gguf(folder, "f16", script)
    script.chmod(0o755)
    assert write_gguf(folder, "f16", script).is_file()


def test_where_the_converter_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=rf"--gguf needs llama.cpp's {SCRIPT}.*git clone .*--gguf-converter"):
        find_converter()
    script = converter(tmp_path / "llama.cpp")
    assert find_converter(script) == find_converter(script.parent) == script
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "nothing"), str(script.parent)]))
    assert find_converter() == script, "a plain checkout, in which it is no program"
    with pytest.raises(ConfigError, match=r"there is no converter .*nowhere"):
        find_converter(tmp_path / "nowhere")


def test_kinds_of_weights() -> None:
    assert check_type("bf16") == "bf16"
    with pytest.raises(ConfigError, match=r"'q4_k_m' is no kind .* f32, f16, .*llama-quantize"):
        check_type("q4_k_m")


def test_the_fake_file_is_one_that_the_library_reads(folder: Path, tmp_path: Path) -> None:
    from tropism.foreign.gguf_header import read_gguf_header

    path = write_gguf(folder, "f16", converter(tmp_path / "llama.cpp"))
    assert read_gguf_header(path).weights.tensors == 0
    assert struct.unpack("<I", path.read_bytes()[4:8]) == (3,)
