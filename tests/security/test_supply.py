"""What is installed: floors below which there are known holes, and hashes of everything that is pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("requirements.lock", "requirements-cuda.lock")


def pins_of(path: Path) -> dict[str, str]:
    """Name -> version of every ``name==version`` line."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(), flags=re.M)
    return {canonicalize_name(name): version for name, version in found}


def hashes_of(path: Path) -> dict[str, list[str]]:
    """Name -> hashes of a lock file."""
    entries = re.split(r"^(?=[A-Za-z0-9])", path.read_text(), flags=re.M)
    named = {
        canonicalize_name(entry.partition("==")[0]): entry for entry in entries if "==" in entry.partition("\n")[0]
    }
    return {name: re.findall(r"--hash=(\S+)", entry) for name, entry in named.items()}


def test_floors_of_the_libraries_with_known_holes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    for name, hole, mended in (("torch", "2.9.1", "2.10.0"), ("transformers", "5.2.0", "5.3.0")):
        assert not floors[name].contains(hole) and floors[name].contains(mended)


def test_every_pin_is_locked_with_its_hashes() -> None:
    pins, locked = pins_of(ROOT / "constraints.txt"), pins_of(ROOT / "requirements.lock")
    assert pins and locked == pins
    assert hashes_of(ROOT / "requirements.lock").keys() == pins.keys()


def test_the_cuda_libraries_of_torch_are_locked_apart() -> None:
    locked = pins_of(ROOT / "requirements-cuda.lock")
    assert any(name.startswith("nvidia-") for name in locked) and "triton" in locked
    assert not locked.keys() & pins_of(ROOT / "constraints.txt").keys()


@pytest.mark.parametrize("name", LOCKS)
def test_every_hash_is_a_sha256(name: str) -> None:
    for package, hashes in hashes_of(ROOT / name).items():
        assert hashes, f"{package} has no hash"
        assert len(set(hashes)) == len(hashes)
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in hashes), package


@pytest.mark.parametrize("name", [*LOCKS, "constraints.txt"])
def test_pins_come_from_the_default_index(name: str) -> None:
    """A lock that named an index, a file or a local version would not install elsewhere."""
    text = (ROOT / name).read_text()
    settings = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links|\+cpu|\+cu\d", settings)
