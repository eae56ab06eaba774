"""What a model says of whole rollout batches, without gradients, in micro-batches, shared among processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tropism.training.processes import Processes, micro_batches, plan_micro_batches
from tropism.types import Tokens, pad_rows


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

    def logprobs(self, tokens: Tokens, *, temperature: float) -> Tensor:
        """[B, T] log-probs of the completion tokens, on the CPU."""
        shape = tokens.completion_ids.shape
        return self._fill(tokens, {"logprobs": shape}, temperature)["logprobs"]

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
    def _fill(self, tokens: Tokens, shapes: dict[str, tuple[int, ...]], temperature: float) -> dict[str, Tensor]:
        mine = torch.arange(self.processes.rank, len(tokens), self.processes.count)
        with self.active() as policy, self.processes.accelerator.autocast():
            plan = micro_batches(
                tokens.select(mine),
                max_tokens=self.max_tokens,
                max_rows=self.max_rows,
                without_padding=policy.without_padding,
            )
            parts = [(rows, tokens.select(rows)) for rows in (mine[chosen] for chosen in plan)]
            sharded = isinstance(policy, FSDPModule)
            if sharded:
                # Sharded weights are gathered by all processes together, so that all make the same number of passes.
                missing = self.processes.maximum(len(parts)) - len(parts)
                parts += [(torch.zeros(0, dtype=torch.long), _nothing(tokens))] * missing

            def compute() -> dict[str, Tensor]:
                results = {name: torch.zeros(shape) for name, shape in shapes.items()}
                for rows, part in parts:
                    if sharded:
                        self.processes.agree_to_go_on()
                    output = policy(**part.to(policy.device).inputs, temperature=temperature, want=frozenset(shapes))
                    for name, result in results.items():
                        _put(result, rows, getattr(output, name).float().cpu())
                return results

            shares = self.processes.together(compute, alone=not sharded)
        # Every row is computed by one process, and 0 in what the others give.
        return {name: torch.stack([share[name] for share in shares]).sum(0) for name in shapes}


class TextScorer:
    """A reward model over whole texts.

    Args:
        max_tokens: most padded tokens of a forward pass.
    """

    def __init__(self, model: Any, processes: Processes, *, max_tokens: int) -> None:
        self.model, self.processes, self.max_tokens = model, processes, max_tokens

    @torch.no_grad()
    def __call__(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[N] scores of rows of ids, fp32 on the CPU. Every process is given all rows and scores its share."""
        _, mine = self.processes.share(rows)

        def compute() -> Tensor:
            scores = torch.zeros(len(mine))
            lengths = torch.tensor([len(row) for row in mine], dtype=torch.long)
            with self.processes.accelerator.autocast():
                for chosen in plan_micro_batches(lengths, max_tokens=self.max_tokens):
                    ids = pad_rows([mine[place] for place in chosen.tolist()]).to(self.model.device)
                    scores[chosen] = self.model(ids, lengths[chosen].to(ids.device)).float().cpu()
            return scores

        return torch.cat(self.processes.together(compute))


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
