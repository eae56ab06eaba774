"""Completions that grow by one token per forward pass, over a KV cache that lives between the passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tropism.errors import ModelError
from tropism.models.freezing import transformer_blocks
from tropism.models.policy import Policy
from tropism.models.sampling_model import PreparedSampling, SamplingModel, check_compiled
from tropism.rollouts.encoded_cache import EncodedCache
from tropism.rollouts.engine import SLACK
from tropism.rollouts.prefill import RowCache, prefill, room_for


class Decoding:
    """A fixed number of rows, each a prompt and the completion so far, and what the policy makes of them.

    A new prompt costs a forward pass over it, a token a forward pass over that token: nothing is read twice. Only where
    the policy's weights have changed are the rows read again, so that what follows is what the new weights say.

    Args:
        rows: number of rows.
        layer: whose hidden states to observe: -1 is what the vocabulary projection reads, -1 - k what the last k
            transformer blocks read.
        compiled: decode with compiled kernels, on the CPU.

    Raises:
        ModelError: no such layer.
        ConfigError: nothing can be compiled here.
    """

    def __init__(self, policy: Policy, *, rows: int, layer: int = -1, compiled: bool = False) -> None:
        if compiled:
            check_compiled(policy.device.type)
        self.policy, self.compiled = policy, compiled
        self.prompts: list[tuple[int, ...]] = [() for _ in range(rows)]
        self.completions: list[list[int]] = [[] for _ in range(rows)]
        self.hidden = torch.zeros(0)
        """[rows, H] what the vocabulary projection reads after the newest token of each row."""
        self.observed = torch.zeros(0)
        """[rows, H] hidden states of ``layer`` at the same place."""
        self._tap = None if layer == -1 else _Tap(policy, layer)
        self._growing: list[int] = []  # rows by their place in the cache
        self._room = (0, 0)  # tokens of the longest prompt and completion that the cache is for
        self._prepared: PreparedSampling | None = None
        self._numbers = torch.zeros(0)
        self._cache: RowCache | None = None

    @property
    def width(self) -> int:
        """H of ``observed``."""
        return self.policy.hidden_size if self._tap is None else int(self.policy.config.hidden_size)

    def begin(self, prompts: Mapping[int, Sequence[int]], *, new_tokens: int) -> None:
        """Start these rows anew; equal prompts are read once, and all of them in one forward pass.

        Args:
            prompts: row -> ids. new_tokens: most tokens that may follow.
        """
        self.end(prompts)
        if self._prepared is not None and not torch.equal(self._prepared.some_numbers(), self._numbers):
            self._prepared = None
        for row, ids in prompts.items():
            self.prompts[row], self.completions[row] = tuple(ids), []
        self._make_ready(max(len(ids) for ids in prompts.values()), new_tokens)
        self._read(list(prompts))

    def advance(self, tokens: Mapping[int, int]) -> None:
        """One forward pass over the newest token of every growing row.

        Args:
            tokens: row -> token, of every row that has begun and not ended.
        """
        self._make_ready(*self._room)
        model, cache = self._ready()
        taken = torch.tensor([tokens[row] for row in self._growing], device=self.policy.device)
        with self._passing():
            cache.make_room(0)
            hidden = model.decode(taken, cache)
            cache.advance(1)
            self._keep(self._growing, hidden)
        for row, token in tokens.items():
            self.completions[row].append(token)

    def end(self, rows: Iterable[int]) -> None:
        """These rows take no more tokens; what was observed of them stays."""
        ended = set(rows)
        going = [place for place, row in enumerate(self._growing) if row not in ended]
        if len(going) == len(self._growing):
            return
        _, cache = self._ready()
        cache.keep(torch.tensor(going, dtype=torch.long, device=self.policy.device))
        self._growing = [self._growing[place] for place in going]

    def logits(self) -> Tensor:
        """[rows, V] raw logits of the token after the newest one of each row."""
        self._make_ready(*self._room)
        model, _ = self._ready()
        with self._passing(observing=False):
            return model.logits(self.hidden).float()

    def release(self) -> None:
        """Give up the cache and the packed weights; rows have to begin anew."""
        self._growing, self._prepared, self._cache, self._room = [], None, None, (0, 0)

    def _ready(self) -> tuple[SamplingModel, RowCache]:
        assert self._prepared is not None and self._cache is not None
        return self._prepared.model, self._cache

    def _make_ready(self, longest: int, new: int) -> None:
        """Have room for prompts and completions of so many tokens, and the weights of this moment.

        Where the cache has to be made anew, rows that grow are read again.
        """
        room = max(longest, self._room[0]), max(new, self._room[1])
        if self._prepared is not None and self._prepared.up_to_date and room == self._room:
            return
        going, self._growing, self._room = self._growing, [], room
        self._prepared = self.policy.sampling_models.prepare(fused=self._tap is None, compiled=self.compiled)
        self._numbers = self._prepared.some_numbers()
        # Captured steps belong to one cache, so both are made anew together.
        self._cache = room_for(
            self.policy, self._prepared.model, rows=len(self.prompts), longest=room[0], new=room[1] + SLACK
        )
        for length in sorted({len(self.completions[row]) for row in going}):
            self._read([row for row in going if len(self.completions[row]) == length])

    def _read(self, rows: Sequence[int]) -> None:
        """Read prompts and completions of these rows, whose completions are of one length; then they grow."""
        model, cache = self._ready()
        prompts = [self.prompts[row] for row in rows]
        distinct = list(dict.fromkeys(prompts))
        index = torch.tensor([distinct.index(ids) for ids in prompts], device=self.policy.device)
        length = len(self.completions[rows[0]])
        with self._passing():
            given, hidden = prefill(self.policy, model, distinct)
            if length:
                longer = room_for(self.policy, model, rows=len(rows), longest=max(map(len, prompts)), new=length)
                _add(longer, given, index)
                columns = torch.arange(length, device=index.device)
                ids = torch.tensor([self.completions[row] for row in rows], device=index.device)
                positions = (longer.cursor - longer.starts)[:, None] + columns[None, :]
                hidden = model.hidden_states(ids, longer.mask(length), positions, longer)[:, -1]
                longer.advance(length)
                given, index = longer, torch.arange(len(rows), device=index.device)
            _add(cache, given, index)
            self._keep(rows, hidden, index)
        self._growing.extend(rows)

    def _keep(self, rows: Sequence[int], hidden: Tensor, index: Tensor | None = None) -> None:
        """Hidden states of ``rows``, from those [N, H] of a pass, in the order of ``rows`` or by ``index`` [rows]."""
        at = torch.tensor(rows, device=hidden.device)
        observed = hidden if self._tap is None else self._tap.taken
        for name, given in (("hidden", hidden), ("observed", observed)):
            if getattr(self, name).shape != (len(self.prompts), given.shape[1]):
                setattr(self, name, given.new_zeros(len(self.prompts), given.shape[1]))
            getattr(self, name)[at] = given if index is None else given[index]

    @contextmanager
    def _passing(self, *, observing: bool = True) -> Iterator[None]:
        assert self._prepared is not None
        with torch.no_grad(), self._prepared.computing():
            if self._tap is None or not observing:
                yield
            else:
                with self._tap:
                    yield


def _add(cache: RowCache, given: RowCache, rows: Tensor) -> None:
    """Rows [K] of ``given`` behind those in use; an empty cache begins at its first column again."""
    slabs = cache.decoded if isinstance(cache, EncodedCache) else cache
    if not slabs.rows:
        slabs.shift(-slabs.cursor)
    cache.make_room(given.cursor)
    cache.append(given, rows)  # type: ignore[arg-type]


class _Tap:
    """Takes what enters a transformer block, at the last column of a pass."""

    def __init__(self, policy: Policy, layer: int) -> None:
        blocks = transformer_blocks(policy.language_model)
        if not -len(blocks) - 1 <= layer <= -1:
            raise ModelError(
                f"layer is {layer}, and the model has {len(blocks)} transformer blocks: choose -1 (what the vocabulary "
                f"projection reads) to {-len(blocks) - 1} (the embeddings)"
            )
        self._block = blocks[layer + 1]
        self.taken = torch.zeros(0)

    def __enter__(self) -> None:
        self._handle = self._block.register_forward_pre_hook(self._take, with_kwargs=True)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _take(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states: Tensor = args[0] if args else kwargs["hidden_states"]
        self.taken = states[:, -1]
