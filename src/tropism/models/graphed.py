"""A fused step as a CUDA graph: one launch per token instead of hundreds.

With few rows a GPU finishes each small operation before the next one is launched; the launches are then the time. A
graph replays them all at once, at fixed addresses and shapes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from tropism.models.fused import TOLERANCE, FixedView, FusedDecoder, GrowingView

logger = logging.getLogger("tropism")

EAGER_STEPS = 2
"""Steps before the capture: short completions are not worth one, and a capture wants everything loaded."""


class FixedStep:
    """A fused step over all slots of one cache, whose inputs are read from fixed places.

    Args:
        cache: a ``SlabCache`` with its slabs allocated; rows and cursor may change, slabs may not.
    """

    def __init__(self, decoder: FusedDecoder, cache: Any) -> None:
        device = cache.starts.device
        self.decoder, self.slabs, self.columns = decoder, cache.slabs, cache.columns
        slots = cache.slabs[0].keys.shape[0]
        self.ids = torch.zeros(slots, dtype=torch.long, device=device)
        self.starts = torch.zeros(slots, dtype=torch.long, device=device)
        self.cursor = torch.zeros(1, dtype=torch.long, device=device)

    def place(self, ids: Tensor, cache: Any) -> None:
        """Put this step's inputs where the step reads them; slots without a row compute what nobody reads."""
        rows = len(ids)
        self.ids[:rows] = ids
        self.starts[:rows] = cache.starts
        self.starts[rows:] = 0
        self.cursor.fill_(cache.cursor)

    def run(self) -> Tensor:
        """[slots, H]."""
        return self.decoder.step(self.ids, self.slabs, FixedView(self.starts, self.cursor, self.columns))


class GraphedSteps:
    """Steps of one ``generate`` call: the first ones as they are, the others from a graph, if that works here."""

    def __init__(self, decoder: FusedDecoder, dtype: torch.dtype) -> None:
        self.decoder, self.dtype = decoder, dtype
        self.done = 0
        self.fixed: FixedStep | None = None
        self.graph: Any = None
        self.out: Tensor | None = None
        self.possible = True

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """See ``SamplingModel.decode``."""
        self.done += 1
        if self.graph is not None and self.fixed is not None and self.out is not None:
            self.fixed.place(ids, cache)
            self.graph.replay()
            return self.out[: len(ids)].clone()
        eager = self.decoder.step(ids, cache.slabs, GrowingView(cache))
        if self.possible and self.done > EAGER_STEPS:
            self._capture(ids, cache, eager)
        return eager

    def _capture(self, ids: Tensor, cache: Any, eager: Tensor) -> None:
        """Record the step just taken; taking it again writes the same keys and values, so nothing is disturbed."""
        self.possible = False
        try:
            self.fixed = FixedStep(self.decoder, cache)
            self.fixed.place(ids, cache)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.fixed.run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.out = self.fixed.run()
            graph.replay()
            difference = (self.out[: len(ids)] - eager).abs().max()
            if not bool(difference <= TOLERANCE.get(self.dtype, 5e-2) * eager.abs().max().clamp(min=1.0)):
                raise RuntimeError(f"its result differs by {float(difference):.3g}")
            self.graph = graph
        except RuntimeError as error:
            logger.warning("sampling goes on without a CUDA graph: %s", error)
            self.fixed = self.out = None
