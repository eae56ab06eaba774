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
COMPILERS = ("gcc", "cc", "clang")
PATIENCE = 120
"""Seconds until a compiler is given up."""
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
        packed = _room(-(-out // self.panel), len(weights), into, self.panel)
        for place, weight in enumerate(weights):
            whole = weight.contiguous()
            given = _pointer(whole, (out, into))
            self._pack(given, packed.data_ptr(), out, into, len(weights), place, torch.get_num_threads())
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
        rows, into = len(x), packed.shape[2]
        panels = -(-columns // self.panel)
        out = _room(rows, columns)
        with _recorded("tropism::product"):
            self._product(
                _pointer(x, (rows, into)),
                _pointer(packed, (panels, packed.shape[1], into, self.panel)),
                None if bias is None else _pointer(bias, (panels, packed.shape[1], self.panel)),
                None if residual is None else _pointer(residual, (rows, columns)),
                out.data_ptr(),
                *(rows, into, columns, packed.shape[1] - 1),
                torch.get_num_threads(),
            )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """[N, n] -> x / sqrt(mean(x^2) + epsilon) weight."""
        x = x.contiguous()
        rows, size = x.shape
        out = _room(rows, size)
        given = _pointer(x, (rows, size)), _pointer(weight, (size,)), out.data_ptr()
        with _recorded("tropism::rms_norm"):
            self._rms_norm(*given, rows, size, epsilon, torch.get_num_threads())
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
        rows, all_heads, size = joint.shape
        slots, shared, columns = keys.shape[:3]
        heads = all_heads - 2 * shared
        if not (0 <= cursor < columns and rows <= slots and size % 2 == 0 and heads > 0 and heads % shared == 0):
            raise ValueError(
                f"{rows} rows of {heads} query heads of {size} numbers do not fit column {cursor} of keys "
                f"{tuple(keys.shape)}"
            )
        out = _room(rows, heads * size)
        with _recorded("tropism::attend"):
            failed = self._attend(
                _pointer(joint, (rows, all_heads, size)),
                *(_pointer(angle, (rows, size)) for angle in angles),
                *(None if norm is None else _pointer(norm, (size,)) for norm in norms),
                epsilon,
                _pointer(keys, (slots, shared, columns, size)),
                _pointer(values, (slots, shared, columns, size)),
                _pointer(starts, (rows,), torch.int64),
                out.data_ptr(),
                *(rows, heads, shared, size, columns, cursor, window or 0),
                scale,
                torch.get_num_threads(),
            )
        if failed:
            raise MemoryError("no room for the attention scores of one decode step")
        return out


def _room(*shape: int) -> Tensor:
    """For results, whatever torch's default type and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _pointer(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Where the numbers are; C would read, and write, past anything else than what it expects.

    Raises:
        TypeError: the tensor is something else.
    """
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise TypeError(
            f"a compiled kernel takes {dtype} {list(shape)}, contiguous on the CPU, and got {tensor.dtype} "
            f"{list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


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
    folder = _folder()
    library = folder / f"{hashlib.sha256(source + named.encode()).hexdigest()[:24]}.so"
    if not library.is_file():
        began = time.perf_counter()
        _build(compiler, source, library)
        logger.info("compiled the decode kernels in %.1f s; kept as %s", time.perf_counter() - began, library)
    _check_owner(library)
    try:
        kernels = Kernels(library)
    except (OSError, AttributeError) as error:
        raise ConfigError(
            f"sampling.compile: the decode kernels {library} do not load ({error}). Delete that file; where files "
            f"there may not be run, set XDG_CACHE_HOME to another folder, {INSTEAD}"
        ) from error
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        right = _right(kernels)
    if not right:
        raise ConfigError(
            f"sampling.compile: the decode kernels that {shlex.join(compiler)} built compute something else than torch "
            f"does; name another compiler in CC, {INSTEAD}"
        )
    return kernels


def _right(kernels: Kernels) -> bool:
    """Whether products of one and of several rows, gated ones, a norm and attention are those of torch."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    rows, inner, columns, size, cursor = 5, 30, kernels.panel + 3, 8, 20
    x, weights, bias = random(rows, inner), [random(columns, inner) for _ in range(2)], random(columns)
    residual = random(rows, columns)
    product = kernels.product(x, kernels.pack(weights[:1]), kernels.pack_biases([bias]), columns, residual)
    alone = kernels.product(x[:1], kernels.pack(weights[:1]), None, columns)
    gated = kernels.product(x, kernels.pack(weights), None, columns)
    first, second = (x @ weight.T for weight in weights)
    keys, values, starts = (
        random(2, 1, cursor + 1, size),
        random(2, 1, cursor + 1, size),
        torch.tensor([0, 3], device="cpu"),
    )
    joint, angles = random(2, 4, size), torch.zeros(2, 2, size, dtype=torch.float32, device="cpu")
    angles[0] = 1.0  # cosines of a position that turns nothing, and sines
    turn_nothing = angles[0], angles[1]
    seen = kernels.attend(
        joint, turn_nothing, (None, None), 0.0, keys, values, starts, cursor=cursor, window=None, scale=0.5
    )
    expected = [  # after the call, which has put the new keys and values where they belong
        ((0.5 * joint[row, :2] @ keys[row, 0, begin:].T).softmax(-1) @ values[row, 0, begin:]).flatten()
        for row, begin in enumerate((0, 3))
    ]
    pairs = [
        (product, first + bias + residual),
        (alone, first[:1]),
        (gated, torch.nn.functional.silu(first) * second),
        (kernels.rms_norm(x, x[0], 1e-5), torch.nn.functional.rms_norm(x, (inner,), x[0], 1e-5)),
        (seen, torch.stack(expected)),
    ]
    return all(torch.allclose(found, right, rtol=1e-4, atol=1e-4) for found, right in pairs)


def _folder() -> Path:
    """Where built kernels are kept: of this user alone, since what lies there is run."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tropism" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(folder)
        folder.chmod(0o700)
    except (OSError, RuntimeError) as error:  # the latter where the user has no home
        raise ConfigError(
            f"sampling.compile: there is no folder to keep the decode kernels in ({error}); set XDG_CACHE_HOME to one "
            f"that can be written, {INSTEAD}"
        ) from error
    return folder


def _check_owner(path: Path) -> None:
    """Code that somebody else has put there is not run.

    Raises:
        ConfigError: it is another user's, or a link.
    """
    if os.name == "posix" and (path.is_symlink() or path.lstat().st_uid != os.geteuid()):
        raise ConfigError(
            f"sampling.compile: {path} is not this user's own, and what lies there would be run; set XDG_CACHE_HOME to "
            f"a folder of yours, {INSTEAD}"
        )


def _compiler() -> list[str]:
    """The command that compiles; CC may name arguments, too."""
    named = os.environ.get("CC", "").strip()
    try:
        commands = [shlex.split(named)] if named else [[name] for name in COMPILERS]
    except ValueError:  # an open quote
        commands = [[named]]
    for command in commands:
        if shutil.which(command[0]):
            return command
    missing = f"CC={named} is no program" if named else f"there is none of {', '.join(COMPILERS)} on PATH"
    raise ConfigError(
        f"sampling.compile needs a C compiler with OpenMP, and {missing}: install one (Debian and Ubuntu: apt "
        f"install gcc), name it in CC, {INSTEAD}"
    )


def _version(compiler: Sequence[str]) -> str:
    return f"{shutil.which(compiler[0])} {compiler[1:]} {_run([*compiler, '--version']).stdout}"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"sampling.compile: {command[0]} could not be run ({error}); name another compiler in CC, {INSTEAD}"
        ) from error


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
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            written, built = Path(scratch) / "kernels.c", Path(scratch) / "kernels.so"
            written.write_bytes(source)
            ended = _run([*compiler, *FLAGS, str(written), "-o", str(built), "-lm"])
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
