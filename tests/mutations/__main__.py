"""Do the tests notice mistakes? ``python tests/mutations [PART OF A NAME ...]`` makes each and runs its tests.

Each is made in a copy of ``src``; the checkout stays as it is. Exit code 1 where a mistake went unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from mistakes import MISTAKES, Mistake

ROOT = Path(__file__).resolve().parents[2]
TESTS_FAILED = 1
"""pytest's exit code where tests ran and some failed; all others (nothing collected, interrupted) prove nothing."""


def broken(mistake: Mistake, folder: Path) -> None:
    """A copy of the source with the mistake, as ``folder/tropism``."""
    shutil.copytree(ROOT / "src" / "tropism", folder / "tropism", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "tropism" / mistake.file
    text = path.read_text(encoding="utf-8")
    if text.count(mistake.right) != 1:
        raise SystemExit(f"{mistake.name}: its text stands {text.count(mistake.right)} times in {mistake.file}")
    path.write_text(text.replace(mistake.right, mistake.wrong), encoding="utf-8")


def noticed(mistake: Mistake) -> tuple[bool, str]:
    """Whether one of its tests fails on the mistake, and the first that does (or what pytest said instead)."""
    with tempfile.TemporaryDirectory() as folder:
        broken(mistake, Path(folder))
        environment = os.environ | {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        imported = [sys.executable, "-c", "import tropism; print(tropism.__file__)"]
        where = subprocess.run(imported, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert Path(where.strip()).is_relative_to(Path(folder).resolve()), f"{where} is not the copy"
        paths = [str(ROOT / "tests" / test) for test in mistake.tests]
        options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *paths],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    failures = [line.partition(" - ")[0] for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = failures[0] if failures else (ran.stdout + ran.stderr).strip().rpartition("\n")[2]
    return ran.returncode == TESTS_FAILED, said


def main(words: list[str]) -> int:
    """Make every mistake whose name holds one of the words (all without words), two at a time, and report."""
    chosen = [m for m in MISTAKES if not words or any(word in m.name for word in words)]
    if not chosen:
        raise SystemExit(f"no mistake is called like {' or '.join(words)}")
    began, missed = time.perf_counter(), 0
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) // 2)) as pool:
        for mistake, (found, said) in zip(chosen, pool.map(noticed, chosen), strict=True):
            missed += not found
            print(f"{'noticed' if found else 'MISSED '}  {mistake.name}: {said}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mistakes noticed in {time.perf_counter() - began:.0f} s")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
