"""What a model says of whole rollout batches, without gradients, in micro-batches, shared among processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tropism.errors import NoRoomError
from tropism.out_of_memory import free_memory, reason_of
from tropism.training.fitting import Fitting
from tropism.training.processes import Processes, micro_batches, plan_micro_batches
from tropism.types import Filtering, Tokens, pad_rows

logger = logging.getLogger("tropism")

MOST_KEPT_BYTES = 2**30
"""Most of what frozen blocks make of a step's rows that is kept; beyond, every pass computes them."""


class ModelScorer:
    """A policy (or its reference) as a ``Scorer``.

    Args:
        active: enters the model to score with, e.g. ``Reference.active``.
    """

    def __init__(
        self,
        active: Callable[[], AbstractContextManager[Any]],
        processes: Processes,
        *,
        max_tokens: int,
        max_rows: int | None,
    ) -> None:
        self.active = active
        self.processes = processes
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self.fitting = Fitting(processes, of="the log-probs", times=2)
        self.trunk_fitting = Fitting(processes, of="the frozen blocks", times=2)
        self._said: set[str] = set()
        self._no_room: str | None = None
        """What the allocator said when there was no room for what frozen blocks give."""

    @torch.no_grad()
    def keep_trunk(self, tokens: Tokens) -> None:
        """Compute the frozen blocks of a policy with a trunk for these rows, for every pass until ``drop_trunk``.

        Where that is not possible nothing is kept, and every pass computes them; the log says why, once.
        """
        with self.active() as policy, self.processes.accelerator.autocast():
            trunk = policy.trunk
            if trunk is None or self._computes_always(trunk, tokens):
                return
            try:
                self.trunk_fitting.together(
                    self._plan(tokens, policy),
                    list,
                    lambda plan: trunk.keep(tokens, plan),
                    budget=self.max_tokens,
                    undo=trunk.drop,
                )
            except NoRoomError as error:
                self._no_room = reason_of(error.__cause__ or error)
            if self._no_room is not None:
                trunk.drop()
                free_memory()
                self._computes_always(trunk, tokens)
                return
            self._say(f"the {len(trunk.blocks)} frozen blocks are computed once per step, and what they give is kept")

    def _plan(self, tokens: Tokens, policy: Any) -> Callable[[int], Sequence[Tensor]]:
        """From a budget of tokens to micro-batches of these rows."""
        unpadded: bool = policy.without_padding
        return lambda budget: micro_batches(tokens, max_tokens=budget, max_rows=self.max_rows, without_padding=unpadded)

    def drop_trunk(self) -> None:
        """Forget what ``keep_trunk`` computed."""
        with self.active() as policy:
            if policy.trunk is not None:
                policy.trunk.drop()

    def _computes_always(self, trunk: Any, tokens: Tokens) -> bool:
        """Whether frozen blocks have to be computed in every pass."""
        reason = trunk.reason
        if self.processes.count > 1:
            reason = "the run has several processes"
        elif reason is None and not trunk.usable:
            reason = "activations are recomputed, or weights sharded"
        elif reason is None and self._no_room is not None:
            reason = f"memory ran out while what they give was kept ({self._no_room})"
        elif reason is None and (size := trunk.needed(tokens)) > MOST_KEPT_BYTES:
            reason = f"what they give for a step takes {size / 1e9:.1f} GB, more than {MOST_KEPT_BYTES / 1e9:.1f} GB"
        if reason is not None:
            self._say(f"frozen blocks are computed in every pass: {reason}")
        return reason is not None

    def _say(self, message: str) -> None:
        kind = message.split(":")[0]
        if kind not in self._said:
            self._said.add(kind)
            logger.info("%s", message)

    def logprobs(self, tokens: Tokens, *, temperature: float, filtering: Filtering | None = None) -> Tensor:
        """[B, T] log-probs of the completion tokens, on the CPU; -inf of those that ``filtering`` leaves out."""
        shape = tokens.completion_ids.shape
        return self._fill(tokens, {"logprobs": shape}, temperature, filtering)["logprobs"]

    def values(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """[B, T] values before each completion token and [B] after the last, on the CPU."""
        shape = tokens.completion_ids.shape
        filled = self._fill(tokens, {"values": shape, "bootstrap_values": shape[:1]}, 1.0)
        return filled["values"], filled["bootstrap_values"]

    def hidden_states(self, tokens: Tokens) -> Tensor:
        """[B, T, H] what the vocabulary projection reads to predict each completion token, on the CPU."""
        with self.active() as policy:
            width: int = policy.hidden_size
        return self._fill(tokens, {"hidden": (*tokens.completion_ids.shape, width)}, 1.0)["hidden"]

    @torch.no_grad()
    def _fill(
        self,
        tokens: Tokens,
        shapes: dict[str, tuple[int, ...]],
        temperature: float,
        filtering: Filtering | None = None,
    ) -> dict[str, Tensor]:
        mine = torch.arange(self.processes.rank, len(tokens), self.processes.count)
        settings: dict[str, Any] = {"temperature": temperature, "filtering": filtering}
        with self.active() as policy, self.processes.accelerator.autocast():
            sharded = isinstance(policy, FSDPModule)

            def parts_of(plan: Sequence[Tensor]) -> list[tuple[Tensor, Tokens]]:
                parts = [(rows, tokens.select(rows)) for rows in (mine[chosen] for chosen in plan)]
                # Sharded weights are gathered by all processes together, so that all make the same number of passes.
                missing = self.processes.maximum(len(parts)) - len(parts) if sharded else 0
                return parts + [(torch.zeros(0, dtype=torch.long), _nothing(tokens))] * missing

            def compute(parts: Iterable[tuple[Tensor, Tokens]]) -> dict[str, Tensor]:
                results = {name: torch.zeros(shape) for name, shape in shapes.items()}
                for rows, part in parts:
                    if sharded:
                        self.processes.agree_to_go_on()
                    output = policy(**part.to(policy.device).inputs, want=frozenset(shapes), **settings)
                    for name, result in results.items():
                        _put(result, rows, getattr(output, name).float().cpu())
                return results

            plan = self._plan(tokens.select(mine), policy)
            shares = self.fitting.together(plan, parts_of, compute, budget=self.max_tokens, alone=not sharded)
        # Every row is computed by one process, and 0 in what the others give.
        return {name: torch.stack([share[name] for share in shares]).sum(0) for name in shapes}


class TextScorer:
    """A reward model over whole texts.

    Args:
        max_tokens: most padded tokens of a forward pass.
    """

    def __init__(self, model: Any, processes: Processes, *, max_tokens: int) -> None:
        self.model, self.processes, self.max_tokens = model, processes, max_tokens
        self.fitting = Fitting(processes, of="the scores", times=2)

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[N] scores of rows of ids, fp32 on the CPU. Every process is given all rows and scores its share."""
        _, mine = self.processes.share(rows)

        lengths = torch.tensor([len(row) for row in mine], dtype=torch.long)

        def compute(plan: Iterable[Tensor]) -> Tensor:
            scores = torch.zeros(len(mine))
            with self.processes.accelerator.autocast():
                for chosen in plan:
                    ids = pad_rows([mine[place] for place in chosen.tolist()]).to(self.model.device)
                    scores[chosen] = self.model(ids, lengths[chosen].to(ids.device)).float().cpu()
            return scores

        scores = self.fitting.together(
            lambda budget: plan_micro_batches(lengths, max_tokens=budget), list, compute, budget=self.max_tokens
        )
        return torch.cat(scores)


def _put(result: Tensor, rows: Tensor, value: Tensor) -> None:
    """Write the rows of a micro-batch, which may be narrower."""
    if not len(rows):
        return
    if value.dim() >= 2:
        result[rows, : value.shape[1]] = value
    else:
        result[rows] = value


def _nothing(tokens: Tokens) -> Tokens:
    """One row with the last token of a prompt and no completion."""
    return Tokens(
        prompt_ids=tokens.prompt_ids[:1, -1:],
        prompt_lengths=torch.ones(1, dtype=torch.long),
        completion_ids=tokens.completion_ids[:1, :1],
        completion_lengths=torch.zeros(1, dtype=torch.long),
    )
