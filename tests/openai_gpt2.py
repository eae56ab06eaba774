"""What the checkpoints in tests/models/openai_checkpoints hold, and GPT-2 by its formulas: numpy, loops, no library.

``make.py`` beside the checkpoints writes these numbers with TensorFlow; tests compute from them what has to come out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CHECKPOINTS = Path(__file__).parent / "models" / "openai_checkpoints"

CHARACTERS = "abcdefghijklmnopqrstuvwxyz.,!?'\u0120\u010a"
"""Tokens 0 to 32; the last two stand for the space and the line break, as everywhere in GPT-2's files."""
MERGES = (
    *("t h", "th e", "\u0120 the", "i n", "a n", "e r", "\u0120 a", "o n", "r e", "a t"),
    *("e n", "o r", "e s", "\u0120 s", "\u0120 w", "h e", "i t", "o u", "e d", "a r"),
    *("i s", "\u0120 f", "\u0120 o", "a l", "in g", "\u0120 b", "\u0120 c", "an d", "\u0120 m", "\u0120 d"),
)
"""Tokens 33 to 62; token 63 stands between documents."""

SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"n_vocab": 64, "n_ctx": 16, "n_embd": 8, "n_head": 2, "n_layer": 2},
    "run/reward_model": {"n_vocab": 64, "n_ctx": 12, "n_embd": 6, "n_head": 3, "n_layer": 2},
    "run/policy": {"n_vocab": 64, "n_ctx": 12, "n_embd": 4, "n_head": 2, "n_layer": 1},
}
"""hparams.json of each folder."""
GAIN, BIAS, HEAD_BIAS = 1.75, -0.625, 0.5
"""Of the reward model; exact in binary."""


def encoder() -> dict[str, int]:
    """Token -> id."""
    tokens = [*CHARACTERS, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}


def variables(scope: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every variable of a model, as in OpenAI's source."""
    width = sizes["n_embd"]
    yield f"{scope}/wpe", (sizes["n_ctx"], width)
    yield f"{scope}/wte", (sizes["n_vocab"], width)
    for layer in range(sizes["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            yield f"{scope}/h{layer}/{norm}/g", (width,)
            yield f"{scope}/h{layer}/{norm}/b", (width,)
        for name, inner, outer in (
            ("attn/c_attn", width, 3 * width),
            ("attn/c_proj", width, width),
            ("mlp/c_fc", width, 4 * width),
            ("mlp/c_proj", 4 * width, width),
        ):
            yield f"{scope}/h{layer}/{name}/w", (1, inner, outer)
            yield f"{scope}/h{layer}/{name}/b", (outer,)
    yield f"{scope}/ln_f/g", (width,)
    yield f"{scope}/ln_f/b", (width,)


def weights_of(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Numbers from -1 to 1 that depend on the name alone (around 1 for the factors of norms)."""
    count = int(np.prod(shape))
    drawn = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), "<u4") / 2**31 - 1
    return (drawn + name.endswith("/g")).astype(np.float32).reshape(shape)


def hidden(scope: str, sizes: Mapping[str, int], ids: Sequence[int]) -> Array:
    """[L, n_embd] what the body says after each of ``ids``."""
    w = {name.removeprefix(f"{scope}/"): weights_of(name, shape) for name, shape in variables(scope, sizes)}
    rows = [w["wte"][token].astype(float) + w["wpe"][place] for place, token in enumerate(ids)]
    for layer in range(sizes["n_layer"]):
        part = {n.removeprefix(f"h{layer}/"): v for n, v in w.items() if n.startswith(f"h{layer}/")}
        rows = [row + a for row, a in zip(rows, _attention(part, rows, sizes["n_head"]), strict=True)]
        rows = [
            row + _dense(part, "mlp/c_proj", _gelu(_dense(part, "mlp/c_fc", _norm(part, "ln_2", row)))) for row in rows
        ]
    return np.stack([_norm(w, "ln_f", row) for row in rows])


def logits(scope: str, sizes: Mapping[str, int], ids: Sequence[int]) -> Array:
    """[L, n_vocab]"""
    embedding = weights_of(f"{scope}/wte", (sizes["n_vocab"], sizes["n_embd"])).astype(float)
    result: Array = hidden(scope, sizes, ids) @ embedding.T
    return result


def reward(ids: Sequence[int]) -> float:
    """gain * (h . w + b) + bias of the last of ``ids``."""
    sizes = SIZES["run/reward_model"]
    last = hidden("reward_model/model", sizes, ids)[-1]
    head = weights_of("reward_model/model/heads/reward/w", (sizes["n_embd"],))
    return float(GAIN * (last @ head.astype(float) + HEAD_BIAS) + BIAS)


def _attention(w: Mapping[str, Any], rows: list[Array], heads: int) -> list[Array]:
    queries, keys, values = zip(
        *(np.split(_dense(w, "attn/c_attn", _norm(w, "ln_1", row)), 3) for row in rows), strict=True
    )
    size = len(rows[0]) // heads
    out = []
    for place in range(len(rows)):
        said = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = [queries[place][part] @ keys[before][part] / np.sqrt(size) for before in range(place + 1)]
            shares = np.exp(np.array(scores) - max(scores))
            shares /= shares.sum()
            said.append(sum(shares[before] * values[before][part] for before in range(place + 1)))
        out.append(_dense(w, "attn/c_proj", np.concatenate(said)))
    return out


def _dense(w: Mapping[str, Any], name: str, row: Array) -> Array:
    result: Array = row @ w[f"{name}/w"][0].astype(float) + w[f"{name}/b"]
    return result


def _norm(w: Mapping[str, Any], name: str, row: Array) -> Array:
    result: Array = (row - row.mean()) / np.sqrt(row.var() + 1e-5) * w[f"{name}/g"] + w[f"{name}/b"]
    return result


def _gelu(x: Array) -> Array:
    result: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return result
