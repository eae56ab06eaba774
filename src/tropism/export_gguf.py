"""A GGUF file of an export, by llama.cpp's own converter: the one program that follows both formats.

That converter is a script in llama.cpp's repository, and no package holds it: ``gguf`` writes such files but knows no
family of models. So it is called where it is installed, and nothing stands in for it where it is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tropism.errors import ConfigError, ModelError, TropismError
from tropism.foreign.gguf_header import read_gguf_header
from tropism.redaction import redact

TYPES = ("f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0", "auto")
"""Kinds of weights that the converter writes; ``llama-quantize`` makes smaller ones of these."""
DEFAULT = "f16"
SCRIPT = "convert_hf_to_gguf.py"
INSTALL = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install -r "
    "llama.cpp/requirements/requirements-convert_hf_to_gguf.txt, and give --gguf-converter llama.cpp/" + SCRIPT
)
_SHOWN = 5
"""Lines of the converter's last words that an error shows."""


def find_converter(given: str | Path | None = None) -> Path:
    """The converter that is installed.

    Args:
        given: its path, or llama.cpp's folder; None looks for it on PATH.

    Raises:
        ConfigError: there is none; says how to install it.
    """
    if given is not None:
        path = Path(given).expanduser()
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"there is no converter {path}; it is llama.cpp's {SCRIPT}: {INSTALL}")
        return path
    found = shutil.which(SCRIPT) or _on_path(SCRIPT)
    if found is None:
        raise ConfigError(
            f"--gguf needs llama.cpp's {SCRIPT}, which is not on PATH, and which no Python package holds: {INSTALL}"
        )
    return Path(found)


def _on_path(name: str) -> str | None:
    """A script on PATH that is not marked as a program, as in a plain checkout."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        if folder and (Path(folder) / name).is_file():
            return str(Path(folder) / name)
    return None


def check_type(kind: str) -> str:
    """A kind of weights as it was given.

    Raises:
        ConfigError: the converter has no such kind.
    """
    if kind not in TYPES:
        raise ConfigError(
            f"--gguf {kind!r:.40} is no kind of weights that {SCRIPT} writes: give one of {', '.join(TYPES)} "
            "(llama.cpp's llama-quantize makes Q4_K_M and the like of an f16 file)"
        )
    return kind


def write_gguf(folder: Path, kind: str, converter: Path) -> Path:
    """Convert a plain model folder; the file is put into it, under its name only once it is whole.

    Args:
        kind: one of ``TYPES``. converter: ``find_converter()``.

    Raises:
        ModelError: the converter fails, or what it wrote is no GGUF file; the folder stays as it was.
    """
    check_type(kind)
    path = folder / f"{folder.resolve().name}-{kind}.gguf"
    unfinished = folder / f".{path.name}.writing"
    command = [*_started(converter), str(folder), "--outfile", str(unfinished), "--outtype", kind]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if ended.returncode != 0:
            words = (ended.stderr.strip() or ended.stdout.strip() or "it said nothing").splitlines()[-_SHOWN:]
            raise ModelError(_failed(folder, converter, f"ended with {ended.returncode}: " + " / ".join(words)))
        if not unfinished.is_file():
            raise ModelError(_failed(folder, converter, "wrote no file"))
        try:
            read_gguf_header(unfinished)
        except TropismError as error:
            raise ModelError(_failed(folder, converter, f"wrote something else: {error}")) from error
        unfinished.replace(path)
    except OSError as error:
        raise ModelError(_failed(folder, converter, f"could not be run: {error.strerror or error}")) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _started(converter: Path) -> Sequence[str]:
    """How to run it: a script of Python by this Python, which has the libraries that it needs."""
    return [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]


def _failed(folder: Path, converter: Path, what: str) -> str:
    return redact(f"no GGUF file was made: {converter} {what}. The plain folder {folder} is whole")
