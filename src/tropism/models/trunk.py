"""Frozen blocks that are computed once for rows that pass through the policy again and again.

With only the last blocks trained, the hidden states that enter the first of them depend on token ids alone. A step of a
method that samples passes the same rows through the policy (and through the reference, which shares its frozen blocks)
several times: for old log-probs, for the reference, and once per epoch. Here they are kept from one pass to the next.

No family's code is needed: for the length of a pass the frozen blocks' ``forward`` is replaced. All but the last give
their input back, and the last gives what is kept. Embeddings, positions, rotary angles and masks are computed by the
model as always. A comparison with the ordinary pass decides whether this is done at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tropism.errors import ModelError, NoRoomError
from tropism.models.freezing import transformer_blocks
from tropism.models.modules import replaced_forward
from tropism.models.rows import TOLERANCE
from tropism.out_of_memory import is_out_of_memory, reason_of
from tropism.types import Tokens, length_mask

_Key = tuple[tuple[int, ...], tuple[int, ...]]


class _ReachedError(Exception):
    """The last frozen block has been computed: the rest of the pass is not needed."""


class Features:
    """Hidden states after the last frozen block, for known rows: one flat tensor, prompts that rows share once.

    A row is found by its token ids, since nothing else decides what frozen blocks make of it.
    """

    def __init__(self) -> None:
        self.rows: dict[_Key, tuple[int, int]] = {}
        """Ids of prompt and completion -> index of the first token of each in ``states``."""
        self.size = 0
        self.states: Tensor | None = None
        """[size, H]; index 0 is for pads."""

    def plan(self, tokens: Tokens) -> None:
        """Lay out places for these rows; nothing is known of them yet."""
        self.drop()
        prompts: dict[tuple[int, ...], int] = {}
        size = 1
        for key in _keys(tokens.prompt_ids, tokens.prompt_lengths, tokens.completion_ids, tokens.completion_lengths):
            if key in self.rows:
                continue
            if key[0] not in prompts:
                prompts[key[0]] = size
                size += len(key[0])
            self.rows[key] = prompts[key[0]], size
            size += len(key[1])
        self.size = size

    def drop(self) -> None:
        """Forget everything."""
        self.rows, self.size, self.states = {}, 0, None

    def write(self, places: Tensor, hidden: Tensor) -> None:
        """Keep ``hidden`` [..., H] at ``places`` [...].

        Raises:
            NoRoomError: there is no memory for all rows that were planned, which smaller parts do not change.
        """
        if self.states is None:
            try:
                self.states = hidden.new_zeros(self.size, hidden.shape[-1])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise NoRoomError(f"no room for what frozen blocks give ({reason_of(error)})") from error
        self.states[places.flatten()] = hidden.flatten(0, -2)


class FrozenTrunk:
    """The blocks of a policy below the first trained one.

    Args:
        policy: a ``Policy``, of whose blocks the last ``layers`` are trained.
        features: shared by policies with the same frozen blocks; None: of its own.
    """

    def __init__(self, policy: Any, layers: int, *, features: Features | None = None) -> None:
        self.policy, self.layers = policy, layers
        self.features = Features() if features is None else features
        self.blocks: list[nn.Module] = []
        self.width = 0
        self._around: list[Callable[[Tensor], Any]] = []
        """How each frozen block wraps its hidden states."""
        self._writing = False
        self.reason = self._why_not()

    @classmethod
    def attach(cls, policy: Any, layers: int) -> None:
        """Give ``policy`` a trunk, once what is trained of it has been chosen (``freezing.train_last_layers``)."""
        policy.trunk = cls(policy, layers)

    def share_with(self, other: Any) -> None:
        """Let another policy, with copies of the trained blocks and the same frozen ones, use what is kept here."""
        other.trunk = FrozenTrunk(other, self.layers, features=self.features)

    @property
    def usable(self) -> bool:
        """Whether frozen blocks can be passed over now.

        Sharded blocks gather their weights in their own forward, and recomputed activations read it again later.
        """
        sharded = isinstance(self.policy, FSDPModule)
        return self.reason is None and not sharded and not self.policy.recomputes_activations

    def needed(self, tokens: Tokens) -> int:
        """Bytes that keeping these rows takes."""
        self.features.plan(tokens)
        size = self.features.size
        self.features.drop()
        return size * self.width * int(self.policy.dtype.itemsize)

    @torch.no_grad()
    def keep(self, tokens: Tokens, parts: Iterable[Tensor]) -> None:
        """Compute the frozen blocks for these rows; what was kept before is forgotten.

        Args:
            parts: index tensors that cover every row, one per pass.

        Raises:
            ModelError: weights of these blocks are trained by now.
        """
        if any(parameter.requires_grad for block in self.blocks for parameter in block.parameters()):
            raise ModelError(
                "blocks that were frozen when the policy was made are trained now, so what they compute cannot be "
                "kept; make the policy after choosing what is trained"
            )
        self.features.plan(tokens)
        self._writing = True
        try:
            for rows in parts:
                try:
                    self.policy(**tokens.select(rows).to(self.policy.device).inputs, want=frozenset({"hidden"}))
                except _ReachedError:
                    continue
        except BaseException:
            self.features.drop()
            raise
        finally:
            self._writing = False

    def drop(self) -> None:
        """Forget what is kept."""
        self.features.drop()

    def places(
        self,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        completion_ids: Tensor,
        completion_lengths: Tensor,
        positions: Tensor,
        mask: Tensor,
    ) -> Tensor | None:
        """Where the tokens of joined rows are kept, or are to be kept; None where a row is not known.

        Args:
            positions: [B, L] of each token in its row. mask: [B, L] real tokens.

        Returns:
            [B, L]; 0 at pads, and while rows are computed also at prompts that an earlier row has.
        """
        rows = self.features.rows
        if not rows or not self.usable or (self.features.states is None and not self._writing):
            return None
        found = [rows.get(key) for key in _keys(prompt_ids, prompt_lengths, completion_ids, completion_lengths)]
        known = [starts for starts in found if starts is not None]
        if len(known) != len(found):
            return None
        starts = torch.tensor(known, dtype=torch.long, device=positions.device)
        in_prompt = positions < prompt_lengths[:, None]
        offset = torch.where(in_prompt, starts[:, :1], starts[:, 1:] - prompt_lengths[:, None])
        if self._writing:
            firsts: dict[int, int] = {}
            first = torch.tensor([firsts.setdefault(p, row) == row for row, (p, _) in enumerate(known)])
            mask = mask & (first.to(mask.device)[:, None] | ~in_prompt)
        return (offset + positions) * mask

    @contextmanager
    def passed_over(self, places: Tensor) -> Iterator[None]:
        """A block in which the frozen blocks give what is kept at ``places`` [B, L] without computing anything.

        While rows are computed (``keep``) they compute, and the block ends with the last of them.
        """
        with ExitStack() as stack:
            if self._writing:
                stack.enter_context(_hook(self.blocks[-1], lambda out: self._reach(places, out)))
            else:
                assert self.features.states is not None
                kept = self.features.states[places]
                for block, wrap in zip(self.blocks[:-1], self._around, strict=False):
                    stack.enter_context(
                        replaced_forward(block, lambda *given, w=wrap, **named: w(_entering(given, named)))
                    )
                last = self._around[-1]
                stack.enter_context(replaced_forward(self.blocks[-1], lambda *_, **__: last(kept)))
            yield

    def _reach(self, places: Tensor, output: Any) -> None:
        self.features.write(places, _hidden_of(output))
        raise _ReachedError

    # Whether it works ------------------------------------------------------------------------------------------------

    def _why_not(self) -> str | None:
        """Why frozen blocks have to be computed in every pass; None where they need not."""
        policy = self.policy
        family = type(policy.language_model).__name__
        if policy.conditioning is not None:
            return "prompts hold reward slots, whose embeddings are trained"
        if policy.language_model.config.is_encoder_decoder:
            return f"{family} has an encoder"
        blocks = list(transformer_blocks(policy.language_model))
        self.blocks = blocks[: len(blocks) - self.layers]
        if not self.blocks:
            return "no block is frozen"
        try:
            agrees = self._agrees()
        except Exception as error:  # whatever a family does with what it does not expect
            return f"{family} does not allow it: {error}"
        finally:
            self._writing = False
        return None if agrees else f"{family} gives other hidden states then"

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Three rows, two of them with the same prompt, against the ordinary pass."""
        policy, shared = self.policy, self.features
        before = policy.trunk
        device = policy.device
        tokens = Tokens(
            prompt_ids=torch.tensor([[1, 0], [1, 0], [0, 2]], device=device),
            prompt_lengths=torch.tensor([2, 2, 1], device=device),
            completion_ids=torch.tensor([[2, 0], [0, 1], [1, 1]], device=device),
            completion_lengths=torch.tensor([2, 2, 2], device=device),
        )
        want = frozenset({"hidden"})
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_hook(block, lambda out: self._around.append(_wrapper(out))))
            own = policy(**tokens.inputs, want=want).need("hidden")
        self._around = self._around[: len(self.blocks)]
        self.reason, self.features, policy.trunk = None, Features(), self
        try:
            self.keep(tokens, [torch.arange(3)])
            assert self.features.states is not None, "its last frozen block is not reached"
            self.width = self.features.states.shape[1]
            found = policy(**tokens.inputs, want=want).need("hidden")
        finally:
            self.features, policy.trunk = shared, before
        mask = length_mask(tokens.completion_lengths, 2)
        difference = (found - own)[mask].float().abs().max()
        return bool(difference <= TOLERANCE.get(own.dtype, 5e-2) * own.float().abs().max().clamp(min=1.0))


@contextmanager
def over_trunk(
    trunk: FrozenTrunk | None,
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
    positions: Tensor,
    mask: Tensor,
    *,
    source: Tensor | None = None,
) -> Iterator[None]:
    """A block with one pass over rows, in which frozen blocks are passed over where what they make of them is kept.

    Args:
        rows: prompts [B, P], their lengths [B], completions [B, T], their lengths [B].
        positions, mask: [B, L] of the joined rows.
        source: [N] index into the flattened [B * L] of what the pass is over; None: the joined rows themselves.
    """
    places = None if trunk is None else trunk.places(*rows, positions, mask)
    if trunk is None or places is None:
        yield
        return
    if source is not None:
        places = places.flatten()[source][None]
    with trunk.passed_over(places):
        yield


def _keys(
    prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, completion_lengths: Tensor
) -> Iterator[_Key]:
    """Ids of prompt and completion of each row, without pads."""
    wide = prompt_ids.shape[1]
    prompts = zip(prompt_ids.tolist(), prompt_lengths.tolist(), strict=True)
    completions = zip(completion_ids.tolist(), completion_lengths.tolist(), strict=True)
    for (prompt, before), (completion, after) in zip(prompts, completions, strict=True):
        yield tuple(prompt[wide - before :]), tuple(completion[:after])


def _entering(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments."""
    hidden: Tensor = given[0] if given else named["hidden_states"]
    return hidden


def _hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def _wrapper(output: Any) -> Callable[[Tensor], Any]:
    """What makes hidden states look like ``output``, a block's own; what it returns beside them is left out.

    Raises:
        ModelError: it is neither hidden states nor a tuple that begins with them.
    """
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        others = (None,) * (len(output) - 1)
        return lambda hidden: (hidden, *others)
    raise ModelError(f"its blocks return values of the type {type(output).__name__}")


@contextmanager
def _hook(block: nn.Module, look: Callable[[Any], None]) -> Iterator[None]:
    """A block in which ``look`` is given what ``block`` returns."""
    handle = block.register_forward_hook(lambda _, __, output: look(output))
    try:
        yield
    finally:
        handle.remove()
