"""Encoder-decoder models (T5, BART and their kin): what their two rows are, and a pass through each half.

The encoder reads the prompt. The decoder reads a prefix (its start token, and the token that generation forces behind
it, where there is one) and then the completion. Both kinds of rows are laid out as those of causal models are, with
masks from lengths and positions of their own, so neither pads nor their ids matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tropism.errors import ModelError
from tropism.models.emulation import emulation
from tropism.models.layout import Padding, join
from tropism.models.modules import replaced_forward
from tropism.types import first_with_same_prompt

ROWS_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest change by padding, relative to the largest state; 5e-2 in half precision."""


def is_encoder_decoder(model: Any) -> bool:
    """Whether prompts go to an encoder, and completions to a decoder that attends to it."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def decoder_prefix(model: PreTrainedModel) -> tuple[int, ...]:
    """What every row of an encoder-decoder's decoder begins with, before the first token that is predicted.

    It is the start token, as transformers chooses it, and ``forced_bos_token_id`` of the generation configuration,
    which transformers forces behind it (a language of mBART-50, the bos of some BARTs).

    Raises:
        ModelError: the model names no start token, or one that it has no embedding for.
    """
    kinds = [getattr(model, "generation_config", None), model.config]
    family = type(model).__name__

    def declared(name: str) -> int | None:
        found = (getattr(kind, name, None) for kind in kinds if kind is not None)
        value = next((value for value in found if value is not None), None)
        value = value[0] if isinstance(value, list) and value else value
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ModelError(f"the {name} of this {family} is {value!r:.80}, and not a token id; correct it")
        return value

    start = declared("decoder_start_token_id")
    start = declared("bos_token_id") if start is None else start
    if start is None:
        raise ModelError(
            f"this {family} names no decoder_start_token_id, so it is not known what its decoder begins with; set it "
            "in config.json (of T5 it is the pad token)"
        )
    forced = declared("forced_bos_token_id")
    prefix = (start,) if forced is None else (start, forced)
    rows = model.get_decoder().get_input_embeddings().weight.shape[0]
    if not 0 <= min(prefix) <= max(prefix) < rows:
        raise ModelError(
            f"the decoder of this {family} begins with the tokens {list(prefix)}, but there are embeddings for {rows} "
            "tokens only; correct decoder_start_token_id and forced_bos_token_id"
        )
    return prefix


class EncoderDecoder:
    """The two halves of a policy's language model.

    Args:
        policy: a ``Policy`` around an encoder-decoder.

    Raises:
        ModelError: see ``decoder_prefix``.
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.prefix = decoder_prefix(policy.language_model)
        self.takes_positions = "position_ids" in inspect.signature(self.decoder.forward).parameters

    @property
    def encoder(self) -> Any:
        return self.policy.language_model.get_encoder()

    @property
    def decoder(self) -> Any:
        return self.policy.language_model.get_decoder()

    @property
    def layers(self) -> int:
        """Layers of the decoder, each with keys and values of its own and of the encoder's states."""
        config = self.decoder.config
        names = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
        return int(next(value for name in names if (value := getattr(config, name, None)) is not None))

    def encode(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[B, P] ids of prompts, which may hold reward slots -> [B, P, H] states of the encoder."""
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
        if "position_ids" in inspect.signature(self.encoder.forward).parameters:
            arguments["position_ids"] = positions
        conditioning = self.policy.conditioning
        slots = nullcontext() if conditioning is None else conditioning.embedded(self.policy.input_embedding)
        with emulation(self.policy.device), slots, _placed(self.encoder, positions):
            return self.encoder(**arguments).last_hidden_state  # type: ignore[no-any-return]

    def decode(
        self, ids: Tensor, mask: Tensor, positions: Tensor, encoded: Tensor, encoded_mask: Tensor, cache: Any = None
    ) -> Tensor:
        """[B, L] ids of decoder rows -> [B, L, H], before the vocabulary projection.

        Args:
            mask: [B, L] of the rows, or [B, C + L] with the C columns that the cache holds.
            encoded: [B, P, H]; once the cache holds its keys and values only its shape is read.
            encoded_mask: [B, P].
        """
        arguments: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "encoder_hidden_states": encoded,
            "encoder_attention_mask": encoded_mask.long(),
            "use_cache": cache is not None,
        }
        if self.takes_positions:
            arguments["position_ids"] = positions
        if cache is not None:
            arguments["past_key_values"] = cache
        with emulation(self.policy.device), _placed(self.decoder, positions):
            return self.decoder(**arguments).last_hidden_state  # type: ignore[no-any-return]

    def hidden_states(
        self,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        completion_ids: Tensor,
        completion_lengths: Tensor,
        *,
        padding: Padding,
    ) -> tuple[Tensor, Tensor]:
        """States of the decoder over whole rows, and the column of each row's first completion token.

        Prompts that rows share are encoded once.

        Args:
            prompt_ids: [B, P] padded on the left. completion_ids: [B, T] padded on the right.
            padding: where the pads of both kinds of rows go.

        Returns:
            [B, L, H] and [B].
        """
        nothing = prompt_ids.new_zeros(len(prompt_ids), 0), torch.zeros_like(prompt_lengths)
        distinct, which = first_with_same_prompt(prompt_ids, prompt_lengths).unique(return_inverse=True)
        ids, encoded_mask, positions, _ = join(prompt_ids, prompt_lengths, *nothing, padding=padding)
        encoded = self.encode(ids[distinct], encoded_mask[distinct], positions[distinct])[which]
        prefix = torch.tensor(self.prefix, device=completion_ids.device).expand(len(completion_ids), -1)
        ids, mask, positions, first = join(
            prefix,
            torch.full_like(completion_lengths, len(self.prefix)),
            completion_ids,
            completion_lengths,
            padding=padding,
        )
        return self.decode(ids, mask, positions, encoded, encoded_mask), first

    def probe(self, ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the model's own forward and ours, both halves reading the same row; sets ``hidden_scale``.

        T5 and its kin scale hidden states before tied output embeddings, by a rule that differs between families and
        releases; so the scale is the one of the two that fits.
        """
        policy = self.policy
        given = {"input_ids": ids, "attention_mask": mask.long()}
        own = policy.language_model(**given, decoder_input_ids=ids, use_cache=False).logits.float()
        hidden = self.decode(ids, mask, positions, self.encode(ids, mask, positions), mask)
        width = getattr(policy.language_model, "model_dim", None)
        found: dict[float, Tensor] = {}
        for scale in (1.0,) if width is None else (1.0, width**-0.5):
            policy.hidden_scale = scale
            found[scale] = policy.logits(hidden).float()
        policy.hidden_scale = min(found, key=lambda scale: float((found[scale] - own).abs().max()))
        self._check_rows()
        return own, found[policy.hidden_scale]

    def _check_rows(self) -> None:
        """Rows of different lengths with their pads on either side: the states must be the same.

        Raises:
            ModelError: they are not, so that the family counts positions in a way that is not known here.
        """
        device = self.policy.device
        lengths = torch.tensor([2, 1], device=device)
        prompts, completions = (torch.tensor(rows, device=device) for rows in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]))
        states = []
        for padding in ("right", "left"):
            hidden, first = self.hidden_states(prompts, lengths, completions, lengths, padding=padding)
            states.append(torch.stack([row[at - 1 : at] for row, at in zip(hidden, first.tolist(), strict=True)]))
            states.append(torch.stack([row[at : at + 1] for row, at in zip(hidden, first.tolist(), strict=True)]))
        found, other = torch.cat(states[:2]).float(), torch.cat(states[2:]).float()
        limit = ROWS_TOLERANCE.get(self.policy.dtype, 5e-2)
        if (found - other).abs().max() > limit * found.abs().max().clamp(min=1.0):
            raise ModelError(
                f"{type(self.policy.language_model).__name__} computes other states where its rows are padded on the "
                "left, so rows of different lengths cannot be decoded together: it counts positions in a way tropism "
                "does not know; please report the family"
            )


@contextmanager
def _placed(half: Any, positions: Tensor) -> Iterator[None]:
    """A block in which a half with an embedding of positions embeds these, [B, L], and not the columns' numbers.

    BART and its kin count columns from the first on, and M2M100 those that hold no pad token.
    """
    table = getattr(half, "embed_positions", None)
    if table is None:
        yield
        return
    plain = table.forward
    longest = int(positions.max()) + 1
    any_token = 1 if getattr(table, "padding_idx", None) == 0 else 0

    def forward(read: Any, *args: Any, **kwargs: Any) -> Tensor:
        shape = (1, longest)  # some families give the ids here, and some their shape
        given = torch.full(shape, any_token, device=positions.device) if isinstance(read, Tensor) else torch.Size(shape)
        return plain(given).reshape(longest, -1)[positions]  # type: ignore[no-any-return]

    with replaced_forward(table, forward):
        yield
