"""The compiled kernels of decode steps on a CPU: built once per machine, kept in the user's cache folder.

``kernels.c`` is compiled by the machine's own C compiler for its own instructions. Where a layer is a few rows wide,
torch's products leave a quarter to a half of the cores unused, and small models spend most of a step on calls.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropism.errors import ConfigError

logger = logging.getLogger("tropism")

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
_SHOWN = 5
"""Lines of the compiler's last words that an error shows."""
_PROFILED: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: False)
"""Whether a profiler records. torch calls it private, so it may go away."""
INSTEAD = "or leave sampling.compile out: torch's own kernels need no compiler"


class Kernels:
    """The functions of ``kernels.c`` on tensors of 32-bit numbers on the CPU, without gradients.

    Args:
        library: the built file.
    """

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._pack = loaded.pack
        self._pack.argtypes, self._pack.restype = [pointer] * 2 + [integer] * 5, None
        self._product = loaded.product
        self._product.argtypes, self._product.restype = [pointer] * 5 + [integer] * 5, None
        self._rms_norm = loaded.rms_norm
        self._rms_norm.argtypes, self._rms_norm.restype = [pointer] * 3 + [integer] * 2 + [number, integer], None
        self._attend = loaded.attend
        self._attend.argtypes = [pointer] * 5 + [number] + [pointer] * 4 + [integer] * 7 + [number, integer]
        self._attend.restype = integer
        loaded.panel_columns.argtypes, loaded.panel_columns.restype = [], integer
        self.panel = int(loaded.panel_columns())

    def pack(self, weights: Sequence[Tensor]) -> Tensor:
        """Weights [out, in] of one shape -> panels [P, K, in, panel], those of the K weights in turns."""
        out, into = weights[0].shape
        packed = torch.empty(-(-out // self.panel), len(weights), into, self.panel)
        for place, weight in enumerate(weights):
            whole = weight.contiguous()
            self._pack(whole.data_ptr(), packed.data_ptr(), out, into, len(weights), place, torch.get_num_threads())
        return packed

    def pack_biases(self, biases: Sequence[Tensor]) -> Tensor:
        """Biases [out] -> [P, K, panel], as ``pack`` lays out the weights that they belong to."""
        return self.pack([bias[:, None] for bias in biases])[:, :, 0].contiguous()

    def product(
        self, x: Tensor, packed: Tensor, bias: Tensor | None, columns: int, residual: Tensor | None = None
    ) -> Tensor:
        """[N, in] -> [N, columns]: x W^T + b + residual.

        Args:
            packed: of one weight, or of two, W and V: then silu(x W^T + b) (x V^T + c), and no residual.
            bias: of ``pack_biases``. residual: [N, columns].
        """
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        rows, into = x.shape
        out = torch.empty(rows, columns)
        with _recorded("tropism::product"):
            self._product(
                x.data_ptr(),
                packed.data_ptr(),
                None if bias is None else bias.data_ptr(),
                None if residual is None else residual.data_ptr(),
                out.data_ptr(),
                *(rows, into, columns, packed.shape[1] - 1),
                torch.get_num_threads(),
            )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[N, n] -> x / sqrt(mean(x^2) + epsilon) weight."""
        x = x.contiguous()
        out = torch.empty_like(x)
        with _recorded("tropism::rms_norm"):
            self._rms_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, epsilon, torch.get_num_threads())
        return out

    def attend(
        self,
        joint: Tensor,
        angles: tuple[Tensor, Tensor],
        norms: tuple[Tensor | None, Tensor | None],
        epsilon: float,
        keys: Tensor,
        values: Tensor,
        starts: Tensor,
        *,
        cursor: int,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Attention of one new token per row over the columns of its row, whose keys and values it writes.

        Args:
            joint: [R, Q + 2 K, D], queries, keys and values of the new tokens side by side.
            angles: cosines and sines [R, D] of their positions. norms: of queries and keys [D], where the family has
                them, with ``epsilon``.
            keys, values: [slots, K, columns, D]. starts: [R] first column of each row; ``cursor`` is the new one.
            window: tokens that the layer sees; None sees all.

        Returns:
            [R, Q * D].
        """
        rows, _, size = joint.shape
        shared, columns = keys.shape[1:3]
        heads = joint.shape[1] - 2 * shared
        out = torch.empty(rows, heads * size)
        with _recorded("tropism::attend"):
            failed = self._attend(
                joint.data_ptr(),
                *(angle.data_ptr() for angle in angles),
                *(None if norm is None else norm.data_ptr() for norm in norms),
                epsilon,
                keys.data_ptr(),
                values.data_ptr(),
                starts.data_ptr(),
                out.data_ptr(),
                *(rows, heads, shared, size, columns, cursor, window or 0),
                scale,
                torch.get_num_threads(),
            )
        if failed:
            raise MemoryError("no room for the attention scores of one decode step")
        return out


def _recorded(name: str) -> AbstractContextManager[Any]:
    """For ``--profile``, which sees the operators of torch by itself and not what goes past it."""
    return torch.profiler.record_function(name) if _PROFILED() else nullcontext()


@cache
def decode_kernels() -> Kernels:
    """The kernels for this machine, built where they are not yet there.

    Raises:
        ConfigError: there is no C compiler, or it cannot build them; says what to do.
    """
    source = files("tropism.models").joinpath("kernels.c").read_bytes()
    compiler = _compiler()
    named = "\n".join([_version(compiler), *FLAGS, platform.machine(), _instructions()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tropism" / "kernels"
    library = folder / f"{hashlib.sha256(source + named.encode()).hexdigest()[:24]}.so"
    if not library.is_file():
        began = time.perf_counter()
        _build(compiler, source, library)
        logger.info("compiled the decode kernels in %.1f s; kept as %s", time.perf_counter() - began, library)
    try:
        return Kernels(library)
    except (OSError, AttributeError) as error:
        raise ConfigError(f"the compiled decode kernels {library} do not load ({error}); delete that file") from error


def _compiler() -> list[str]:
    """The command that compiles; CC may name arguments, too."""
    named = os.environ.get("CC", "").strip()
    for command in [shlex.split(named)] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    missing = f"CC={named} is no program" if named else f"there is none of {', '.join(COMPILERS)} on PATH"
    raise ConfigError(
        f"sampling.compile needs a C compiler with OpenMP, and {missing}: install one (Debian and Ubuntu: apt "
        f"install gcc), name it in CC, {INSTEAD}"
    )


def _version(compiler: Sequence[str]) -> str:
    ended = subprocess.run([*compiler, "--version"], capture_output=True, text=True, errors="replace", check=False)
    return f"{shutil.which(compiler[0])} {compiler[1:]} {ended.stdout}"


def _instructions() -> str:
    """What tells CPUs apart that share a home folder: kernels use the instructions of the one they were built on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build(compiler: Sequence[str], source: bytes, library: Path) -> None:
    """Under its name only once it is whole: several processes may build it at once."""
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            written, built = Path(scratch) / "kernels.c", Path(scratch) / "kernels.so"
            written.write_bytes(source)
            command = [*compiler, *FLAGS, str(written), "-o", str(built), "-lm"]
            ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if ended.returncode != 0:
                words = " / ".join(ended.stderr.strip().splitlines()[-_SHOWN:])
                raise ConfigError(
                    f"sampling.compile: {shlex.join(compiler)} did not build the decode kernels: {words:.600}. Name "
                    f"another compiler in CC (gcc, or clang with OpenMP), {INSTEAD}"
                )
            built.replace(library)
    except OSError as error:
        raise ConfigError(
            f"sampling.compile: the decode kernels could not be built in {library.parent} "
            f"({error.strerror or error}); set XDG_CACHE_HOME to a folder that can be written, {INSTEAD}"
        ) from error
