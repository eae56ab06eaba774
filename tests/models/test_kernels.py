"""The compiled decode kernels against plain torch; building them, and what is said where that fails."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decode_steps import needs_compiler
from tropism.errors import ConfigError
from tropism.models import kernels as kernels_module
from tropism.models.kernels import Kernels, decode_kernels
from tropism.models.packed import CompiledProduct, GatedProduct


@pytest.fixture(autouse=True)
def _compiler() -> None:
    needs_compiler()


@pytest.fixture
def compiled() -> Kernels:
    return decode_kernels()


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Kernels are built anew, into a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decode_kernels.cache_clear()
    yield tmp_path / "tropism" / "kernels"
    decode_kernels.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 32, 64, 65, 131])
@pytest.mark.parametrize(("inner", "columns"), [(1, 1), (5, 23), (64, 24), (77, 49), (300, 130), (1030, 72)])
def test_a_product_is_that_in_64_bits(rows: int, inner: int, columns: int, compiled: Kernels) -> None:
    """Rows and columns that do not fill a tile or panel, and more rows and depth than are multiplied at once."""
    x, weight, bias, residual = (
        random(rows, inner),
        random(columns, inner, seed=1),
        random(columns),
        random(rows, columns),
    )
    exact = x.double() @ weight.double().T
    size = inner**0.5
    for given in (None, bias):
        product = CompiledProduct(compiled, weight, given)
        expected = exact if given is None else exact + given.double()
        assert (product(x) - expected).abs().max() < 5e-6 * size
        assert (product.plus(x, residual) - expected - residual.double()).abs().max() < 5e-6 * size


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 8, 3), (5, 40, 24), (70, 300, 100)])
def test_a_gated_product(rows: int, inner: int, columns: int, biased: bool, compiled: Kernels) -> None:
    x = random(rows, inner)
    gate, up = (random(columns, inner, seed=seed) / inner**0.5 for seed in (1, 2))
    biases = (random(columns, seed=3), None) if biased else (None, None)
    found = GatedProduct(compiled, (gate, up), biases)(x)
    first = x.double() @ gate.double().T + (biases[0].double() if biases[0] is not None else 0)
    expected = torch.nn.functional.silu(first) * (x.double() @ up.double().T)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_the_gate_of_very_large_and_small_numbers(compiled: Kernels) -> None:
    """silu(-200) is 0 to single precision, silu(200) is 200, and neither is a NaN."""
    gated = GatedProduct(compiled, (torch.eye(4), torch.eye(4)), (None, None))
    x = torch.tensor([[-200.0, 200.0, 0.0, -1.0]])
    expected = torch.nn.functional.silu(x) * x
    torch.testing.assert_close(gated(x), expected, rtol=1e-6, atol=1e-30)


def test_what_is_not_a_number_stays_so(compiled: Kernels) -> None:
    """The sampler finds broken weights by it."""
    x = torch.tensor([[1.0, float("nan")]])
    product, gated = (
        CompiledProduct(compiled, torch.eye(2), None),
        GatedProduct(compiled, (torch.eye(2),) * 2, (None, None)),
    )
    assert product(x).isnan().all() and gated(x).isnan().all()


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 31, 64, 66])
def test_a_row_does_not_depend_on_its_neighbours(rows: int, compiled: Kernels) -> None:
    x = random(140, 300)
    product = CompiledProduct(compiled, random(100, 300, seed=1), None)
    assert torch.equal(product(x[:rows].clone()), product(x)[:rows])


def test_results_do_not_depend_on_the_threads(compiled: Kernels) -> None:
    x, product = random(9, 200), CompiledProduct(compiled, random(500, 200, seed=1), None)
    before, threads = product(x), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(product(x), before)
    finally:
        torch.set_num_threads(threads)


# Norms and attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "size"), [(1, 3), (4, 64), (40, 577)])
def test_the_norm(rows: int, size: int, compiled: Kernels) -> None:
    x, weight = random(rows, size), random(size, seed=1)
    expected = torch.nn.functional.rms_norm(x, (size,), weight, 1e-5)
    torch.testing.assert_close(compiled.rms_norm(x, weight, 1e-5), expected, rtol=2e-6, atol=2e-6)


def slow_attention(
    joint: Tensor,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    *,
    cursor: int,
    window: int | None,
) -> Tensor:
    """One row, head and column after another, in 64 bits; writes keys and values as the kernel does."""
    rows, _, size = joint.shape
    shared = keys.shape[1]
    heads = joint.shape[1] - 2 * shared

    def turned(x: Tensor, row: int, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = torch.nn.functional.rms_norm(x, (size,), norm.double(), 1e-6)
        other = torch.cat([-x[size // 2 :], x[: size // 2]])
        return x * angles[0][row].double() + other * angles[1][row].double()

    out = torch.empty(rows, heads, size, dtype=torch.float64)
    for row in range(rows):
        mine = joint[row].double()
        for head in range(shared):
            keys[row, head, cursor] = turned(mine[heads + head], row, norms[1])
            values[row, head, cursor] = mine[heads + shared + head]
        begin = int(starts[row]) if window is None else max(int(starts[row]), cursor + 1 - window)
        for head in range(heads):
            query, of = turned(mine[head], row, norms[0]), head // (heads // shared)
            scores = torch.stack([0.3 * (query @ keys[row, of, t]) for t in range(begin, cursor + 1)])
            out[row, head] = scores.softmax(0) @ values[row, of, begin : cursor + 1]
    return out.flatten(1)


@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("heads", "shared", "size"), [(1, 1, 2), (6, 2, 10), (4, 4, 16), (9, 3, 64)])
def test_attention(heads: int, shared: int, size: int, window: int | None, normed: bool, compiled: Kernels) -> None:
    """Rows that begin at different columns of slabs with more rows and columns than are in use."""
    rows, columns, cursor = 3, 15, 11
    joint = random(rows, heads + 2 * shared, size)
    angles = random(rows, size, seed=1).cos(), random(rows, size, seed=1).sin()
    norms = (random(size, seed=2), random(size, seed=3)) if normed else (None, None)
    keys, values = random(rows + 2, shared, columns, size, seed=4), random(rows + 2, shared, columns, size, seed=5)
    starts = torch.tensor([0, 7, 11])
    wide_keys, wide_values = keys.double(), values.double()
    expected = slow_attention(joint, angles, norms, wide_keys, wide_values, starts, cursor=cursor, window=window)
    found = compiled.attend(joint, angles, norms, 1e-6, keys, values, starts, cursor=cursor, window=window, scale=0.3)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(keys, wide_keys.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(values, wide_values.float())


def test_a_long_row(compiled: Kernels) -> None:
    """More columns than a vector has lanes, on every kind of CPU."""
    joint, still = random(2, 4, 16), (torch.ones(2, 16), torch.zeros(2, 16))
    keys, values = random(2, 1, 50, 16, seed=1), random(2, 1, 50, 16, seed=2)
    starts = torch.tensor([0, 30])
    wide = keys.double(), values.double()
    for window in (None, 20):
        expected = slow_attention(joint, still, (None, None), *wide, starts, cursor=47, window=window)
        found = compiled.attend(
            joint, still, (None, None), 0.0, keys, values, starts, cursor=47, window=window, scale=0.3
        )
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_are_in_single_precision_whatever_torch_makes_by_default(dtype: torch.dtype, compiled: Kernels) -> None:
    x, weight = random(4, 30), random(10, 30, seed=1)
    torch.set_default_dtype(dtype)
    try:
        found = CompiledProduct(compiled, weight, weight[:, 0])(x)
        normed = compiled.rms_norm(x, weight[0], 1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, x @ weight.T + weight[:, 0])
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (30,), weight[0], 1e-5))


def test_what_would_be_read_past_its_end_is_refused(compiled: Kernels) -> None:
    product = CompiledProduct(compiled, random(10, 30), None)
    with pytest.raises(TypeError, match=r"takes torch.float32 \[2, 30\]"):
        product(random(2, 29))
    with pytest.raises(TypeError, match=r"torch\.float64"):
        product(random(2, 30).double())
    with pytest.raises(TypeError, match=r"\[2, 10\]"):
        product.plus(random(2, 30), random(1, 10))
    joint, still = random(2, 4, 8), (torch.ones(2, 8), torch.zeros(2, 8))
    keys, values = random(2, 1, 5, 8), random(2, 1, 5, 8)
    for cursor, starts, error in ((5, [0, 0], ValueError), (4, [0], TypeError)):
        with pytest.raises(error):
            compiled.attend(
                joint, still, (None, None), 0.0, keys, values, torch.tensor(starts), cursor=cursor, window=None, scale=1
            )
    with pytest.raises(ValueError, match="do not fit column"):
        compiled.attend(
            joint, still, (None, None), 0.0, keys[:1], values[:1], torch.tensor([0, 0]), cursor=1, window=None, scale=1
        )


# Building ------------------------------------------------------------------------------------------------------------


def test_they_are_built_once_and_the_log_says_how_long_it_took(
    fresh_cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, logger="tropism"):
        decode_kernels()
    assert [r for r in caplog.records if "compiled the decode kernels in" in r.message]
    assert [path.suffix for path in fresh_cache.iterdir()] == [".so"]
    decode_kernels.cache_clear()
    monkeypatch.setattr(kernels_module, "_build", lambda *_: pytest.fail("built again"))
    decode_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_checked_alike_under_autocast_and_other_defaults(fresh_cache: Path, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decode_kernels()
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_a_compiler_the_error_says_what_to_install(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"sampling\.compile needs a C compiler.*install one"):
        decode_kernels()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ConfigError, match="CC=no-such-compiler is no program"):
        decode_kernels()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'error: no OpenMP here' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(ConfigError, match=r"did not build the decode kernels: error: no OpenMP here"):
        decode_kernels()
    assert not list(fresh_cache.iterdir())


def test_a_damaged_file_is_named(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build_rubbish(compiler: list[str], source: bytes, library: Path) -> None:
        library.write_bytes(b"not a library")

    monkeypatch.setattr(kernels_module, "_build", build_rubbish)
    with pytest.raises(ConfigError, match=r"\.so do not load .* Delete that file"):
        decode_kernels()


def test_what_another_user_has_put_there_is_not_run(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode_kernels()
    decode_kernels.cache_clear()
    monkeypatch.setattr(os, "geteuid", lambda: 12345678)
    with pytest.raises(ConfigError, match="is not this user's own"):
        decode_kernels()


def test_only_this_user_may_write_there(fresh_cache: Path) -> None:
    fresh_cache.mkdir(parents=True)
    fresh_cache.chmod(0o777)
    decode_kernels()
    assert fresh_cache.stat().st_mode & 0o777 == 0o700


def test_kernels_that_compute_something_else_are_not_used(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernels, "rms_norm", lambda self, x, weight, epsilon: x)
    with pytest.raises(ConfigError, match="compute something else than torch"):
        decode_kernels()


@pytest.mark.parametrize("cc", ["gcc 'open", "/dev/null"])
def test_an_unusable_cc_is_named(cc: str, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", cc)
    with pytest.raises(ConfigError, match="CC"):
        decode_kernels()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, fresh_cache: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="set XDG_CACHE_HOME to a folder that can be written"):
            decode_kernels()
    finally:
        tmp_path.chmod(0o700)
