"""Attribution of numbers to the tokens of a row, through the embeddings that a model reads in their place."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from tropism.errors import ConfigError, ModelError
from tropism.models.modules import replaced_forward
from tropism.rewards.config import closest

logger = logging.getLogger("tropism")

Method = Literal["integrated_gradients", "gradient_x_input", "occlusion"]
Baseline = Literal["mean", "zero"]

LEAST_POINTS, MOST_POINTS = 32, 512
"""Points of the path of integrated gradients: doubled until the scores add up, or there are so many."""
ROWS = 16
"""Rows of one pass."""
TOLERANCE = 0.01
"""Share of the difference that integrated gradients may miss."""
LEAST_DIFFERENCE = 1e-3
"""Below, the difference between input and baseline counts as this much, since rounding alone would miss it."""


class TokenFunction(Protocol):
    """Numbers about a row of P tokens, as a function of their embeddings."""

    @property
    def embeddings(self) -> Tensor:
        """[P, H] what the model reads in the place of the tokens."""

    @property
    def mean_embedding(self) -> Tensor:
        """[H] the mean of the vocabulary's."""

    def __call__(self, embeddings: Tensor, kept: Tensor) -> Tensor:
        """[B, P', H] embeddings of the tokens at the places ``kept`` [B, P'] -> [B, K] numbers."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a method says."""

    values: Tensor
    """[K, P] fp64: contribution of each token to each number."""
    totals: Tensor
    """[K] the numbers themselves."""
    baselines: Tensor | None = None
    """[K] the numbers at the baseline."""
    gap: float | None = None
    """Largest difference between the sum of the scores and ``totals - baselines``."""


def check_method(method: Any, baseline: Any) -> None:
    """Refuse an unknown method or baseline.

    Raises:
        ConfigError: names the closest one.
    """
    for name, value, choices in (("method", method, get_args(Method)), ("baseline", baseline, get_args(Baseline))):
        if value not in choices:
            raise ConfigError(f"{name}: unknown value {value!r}. {closest(str(value), choices)}")


def attribute(
    function: TokenFunction,
    method: Method,
    *,
    removable: Sequence[int],
    baseline: Baseline = "mean",
    each: bool = False,
    tolerance: float = TOLERANCE,
) -> Scores:
    """Scores of all tokens by a method.

    Args:
        removable: places of the tokens that occlusion may leave out; others have the score 0 there.
        baseline: of integrated gradients.
        each: one row of scores for each number; otherwise one for their sum.
        tolerance: of integrated gradients.
    """
    if method == "occlusion":
        return occlusion(function, removable, each=each)
    if method == "gradient_x_input":
        return gradient_x_input(function, each=each)
    start = function.mean_embedding if baseline == "mean" else torch.zeros_like(function.mean_embedding)
    return integrated_gradients(function, start, each=each, tolerance=tolerance)


def gradient_x_input(function: TokenFunction, *, each: bool = False) -> Scores:
    """The first-order effect of scaling a token's embedding.

    s_i = e_i . d f / d e_i       Shrikumar et al. 2016, https://arxiv.org/abs/1605.01713
    """
    embeddings = function.embeddings
    values, gradients = _gradients(function, embeddings[None], each=each)
    return Scores(values=(gradients[:, 0] * embeddings).sum(-1).double(), totals=values[0].double())


def integrated_gradients(
    function: TokenFunction, baseline: Tensor, *, each: bool = False, tolerance: float = TOLERANCE
) -> Scores:
    """Gradients along the straight path from a baseline to the embeddings, so that the scores add up.

    s_i = (e_i - b) . integral over a in [0, 1] of d f(b + a (e - b)) / d e_i
    sum of s_i = f(e) - f(b)                Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365

    The integral is a Gauss-Legendre sum of 32 points, then 64, ... 512 until the scores add up within the tolerance; a
    warning says by how much they miss it if they never do.

    Args:
        baseline: [H] in the place of every token.
        tolerance: share of f(e) - f(b) that the sum may miss.
    """
    embeddings = function.embeddings
    difference = embeddings - baseline
    kept = _everything(embeddings)
    with torch.no_grad():
        ends = function(torch.stack([embeddings, baseline.expand_as(embeddings)]), kept.expand(2, -1)).double()
    totals, baselines = (ends if each else ends.sum(-1, keepdim=True)).unbind(0)
    points = LEAST_POINTS
    while True:
        total = _integral(function, baseline, difference, points, each=each)
        scores = (total * difference.double()).sum(-1)
        missed = (scores.sum(-1) - (totals - baselines)).abs()
        allowed = tolerance * (totals - baselines).abs().clamp(min=LEAST_DIFFERENCE)
        gap = float(missed.max())
        if bool((missed <= allowed).all()):
            break
        if points >= MOST_POINTS:
            logger.warning(
                "integrated gradients miss the difference to their baseline by %.3g with %d points: the path is not "
                "smooth enough. Read the scores as rough, or take another baseline or method (occlusion)",
                gap,
                points,
            )
            break
        points *= 2
    return Scores(values=scores, totals=totals, baselines=baselines, gap=gap)


def occlusion(function: TokenFunction, removable: Sequence[int], *, each: bool = False) -> Scores:
    """What is lost where a token is left out: s_i = f(all) - f(all but i).

    Raises:
        ConfigError: nothing can be left out.
    """
    embeddings = function.embeddings
    count = len(embeddings)
    if not removable or count < 2:
        raise ConfigError(
            "occlusion: there is no token that can be left out so that something stays; take integrated_gradients"
        )
    whole = _everything(embeddings)
    places = torch.arange(count, device=embeddings.device)
    with torch.no_grad():
        full = function(embeddings[None], whole)
        parts = []
        for begin in range(0, len(removable), ROWS):
            rows = [places[places != place] for place in removable[begin : begin + ROWS]]
            kept = torch.stack(rows)
            parts.append(function(embeddings[kept], kept))
    effects = (full - torch.cat(parts)).double()
    if not each:
        effects, full = effects.sum(-1, keepdim=True), full.sum(-1, keepdim=True)
    scores = torch.zeros(effects.shape[1], count, dtype=torch.float64, device=effects.device)
    scores[:, list(removable)] = effects.T
    return Scores(values=scores, totals=full[0].double())


def _everything(embeddings: Tensor) -> Tensor:
    return torch.arange(len(embeddings), device=embeddings.device)[None]


def _gradients(function: TokenFunction, embeddings: Tensor, *, each: bool) -> tuple[Tensor, Tensor]:
    """[B, K] numbers (K = 1 of their sum), and [K, B, P, H] their gradients at embeddings [B, P, H]."""
    with torch.enable_grad():
        given = embeddings.detach().clone().requires_grad_()
        values = function(given, _everything(embeddings[0]).expand(len(embeddings), -1))
        values = values if each else values.sum(-1, keepdim=True)
        over_rows = values.sum(0)  # rows do not read each other, so each keeps its own gradient
        last = len(over_rows) - 1
        found = [
            torch.autograd.grad(value, given, retain_graph=number < last)[0] for number, value in enumerate(over_rows)
        ]
    return values.detach(), torch.stack(found)


def _integral(function: TokenFunction, baseline: Tensor, difference: Tensor, points: int, *, each: bool) -> Tensor:
    """[K, P, H] fp64: the mean gradient along the path."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    at, share = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2).to(difference.device)
    total: Tensor | None = None
    for begin in range(0, points, ROWS):
        a = at[begin : begin + ROWS].to(difference)[:, None, None]
        _, gradients = _gradients(function, baseline + a * difference, each=each)
        part = torch.einsum("b,kbph->kph", share[begin : begin + ROWS], gradients.double())
        total = part if total is None else total + part
    assert total is not None
    return total


@contextmanager
def replaced_embeddings(embedding: Any, given: Tensor) -> Iterator[None]:
    """A block whose first call of an input embedding answers with ``given`` [B, P, H] in the first P columns.

    The model's own ids go along, so that positions, masks and what else it makes of them stay as they are; some
    families refuse ``inputs_embeds``, and others count positions or find their last token in another way with them.

    Raises:
        ModelError: the model never asks its input embedding.
    """
    plain = embedding.forward
    asked = False

    def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal asked
        answer: Tensor = plain(ids, *args, **kwargs)
        if asked:
            return answer
        asked = True
        return torch.cat([given.to(answer.dtype), answer[:, given.shape[1] :]], dim=1)

    with replaced_forward(embedding, forward):
        yield
    if not asked:
        raise ModelError("the model reads its tokens by another way than its input embedding; take method occlusion")
