"""The policy: a language model, with optional value or Q heads, that answers per completion token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tropism.errors import ModelError
from tropism.models.conditioning import RewardSlots
from tropism.models.emulation import emulates, emulation, rounded
from tropism.models.filtered import Before, filtered_logprobs
from tropism.models.heads import ValueHead
from tropism.models.layout import Padding, join
from tropism.models.output import PolicyOutput, Wanted
from tropism.models.q_heads import WANTED, QHeads
from tropism.models.rows import RowsForward, lay_out
from tropism.models.sampling_model import SamplingModel, SamplingModels
from tropism.models.seq2seq import EncoderDecoder, is_encoder_decoder
from tropism.models.sharding import gather, gathered
from tropism.models.trunk import FrozenTrunk, over_trunk
from tropism.ops import entropy as entropy_of
from tropism.ops import full_kl, linear_logprobs, token_logprobs
from tropism.types import Filtering, first_with_same_prompt

PROBE_TOLERANCE = 1e-3
CHUNK_BYTES = (256 * 2**20, 24 * 2**20)
"""Logits of one chunk, on accelerators and on the CPU. There larger blocks leave the caches and, above 32 MB, are given
back to the system and faulted in anew at every use."""


class Policy(nn.Module):
    """A language model, its optional heads and reward slots behind one ``forward``, so that FSDP can wrap them all.

    Args:
        model: a Hugging Face causal LM or encoder-decoder, or a PEFT model around one.
        value_head: None where the method has no critic. q_heads: None where it has no values of actions.
        conditioning: what answers ids below 0 in prompts (``ops.slots``); None where no reward is asked for.
        chunk_size: completion tokens per pass through the vocabulary projection; None takes what keeps the logits
            within ``CHUNK_BYTES``. With gradients the chunks are recomputed in the backward pass, unless all logits fit
            into ``ops.vocabulary.KEPT_BYTES``; otherwise logits of more tokens never exist at once.

    Raises:
        ModelError: the family computes its logits in a way that cannot be reproduced from its hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        value_head: ValueHead | None = None,
        q_heads: QHeads | None = None,
        conditioning: RewardSlots | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.value_head, self.q_heads = value_head, q_heads
        self.conditioning = conditioning
        self.padding: Padding = "right"
        self.reference_logits: Callable[[Tensor], Tensor] | None = None
        """The reference's vocabulary projection, for methods with an exact KL; it must not be sharded."""
        self.trunk: FrozenTrunk | None = None
        """What frozen blocks make of rows that pass again and again, computed once; None: in every pass."""
        self.sampling_models = SamplingModels(self)
        parameters = inspect.signature(self.body.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.halves = EncoderDecoder(self) if is_encoder_decoder(self.language_model) else None
        """Encoder and decoder; None of a causal model."""
        self.hidden_scale = 1.0
        """What hidden states are multiplied by before the vocabulary projection (T5 with tied embeddings)."""
        self._check_family()
        self.rows = RowsForward(self)
        vocabulary = self.language_model.get_output_embeddings().weight.shape[0]
        self.chunk_size = chunk_size or max(1, CHUNK_BYTES[self.device.type == "cpu"] // (4 * vocabulary))

    @property
    def language_model(self) -> Any:
        """The causal LM itself, without its PEFT wrapper (whose layers stay active inside it)."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def body(self) -> Any:
        """The transformer below the vocabulary projection."""
        return self.language_model.base_model

    @property
    def input_embedding(self) -> Any:
        """The module that turns ids of prompts into what the first layer reads."""
        model = self.language_model if self.halves is None else self.halves.encoder
        return model.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        """Width of what the vocabulary projection reads; not that of the layers in every family (OPT)."""
        return int(self.language_model.get_output_embeddings().weight.shape[1])

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt and a decoder the completion."""
        return self.halves is not None

    def _penalised_prompt(self, prompt_ids: Tensor, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """What a repetition penalty counts beside the completion, [B, P] and [B].

        The prompt, or of an encoder-decoder what its decoder reads before the completion.
        """
        prefix = self.decoder_prefix
        if prefix is None:
            return prompt_ids, prompt_lengths
        return prompt_ids.new_tensor(prefix).expand(len(prompt_ids), -1), torch.full_like(prompt_lengths, len(prefix))

    @property
    def decoder_prefix(self) -> tuple[int, ...] | None:
        """Ids that stand before every completion in an encoder-decoder's decoder; None of a causal model."""
        return None if self.halves is None else self.halves.prefix

    @property
    def cached_layers(self) -> int:
        """Layers that keep keys and values of the tokens before."""
        return int(self.config.num_hidden_layers) if self.halves is None else self.halves.layers

    @property
    def takes_slots(self) -> bool:
        """Whether prompts may hold reward slots."""
        return self.conditioning is not None

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of the language model."""
        return self.language_model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights (an adapter's are float32 always)."""
        return self.language_model.dtype  # type: ignore[no-any-return]

    @property
    def context_length(self) -> int | None:
        """Most tokens a row may have, or None where the architecture sets no limit (ALiBi, T5).

        Of an encoder-decoder the prompt is a row, and so is the completion with ``decoder_prefix`` before it.
        """
        length = getattr(self.config, "max_position_embeddings", None)
        return int(length) if length else None

    def hidden_states(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """[B, L] ids -> [B, L, H], the input of the vocabulary projection; ``mask`` covers the cache too."""
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": cache is not None}
        if self.takes_positions:
            arguments["position_ids"] = positions
        if cache is not None:
            arguments["past_key_values"] = cache
        return self.run_body(**arguments)

    def run_body(self, **arguments: Any) -> Tensor:
        """The transformer's last hidden states, from its own arguments."""
        slots = nullcontext() if self.conditioning is None else self.conditioning.embedded(self.input_embedding)
        with emulation(self.device), slots:
            return self.body(**arguments).last_hidden_state  # type: ignore[no-any-return]

    def for_sampling(self, *, compiled: bool = False) -> AbstractContextManager[SamplingModel]:
        """A block of passes without gradients on unchanged weights, with what is prepared for them."""
        return self.sampling_models.ready(compiled=compiled)

    def whole(self) -> AbstractContextManager[None]:
        """A block in which no weight is sharded; all processes enter it together. Sampling needs it."""
        return gathered(self)

    def gather(self) -> None:
        """Make sharded weights whole on every process for good, once training is over; all call it together."""
        gather(self)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V] as the model itself computes them, scaling and soft-capping included."""
        if self.hidden_scale != 1:
            hidden = hidden * self.hidden_scale
        logits = self.language_model.get_output_embeddings()(hidden)
        if (bias := getattr(self.language_model, "final_logits_bias", None)) is not None:  # BART
            logits = logits + bias
        if scale := getattr(self.config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if divisor := getattr(self.config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        if cap := getattr(self.config, "final_logit_softcapping", None):  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits  # type: ignore[no-any-return]

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_lengths: Tensor,
        completion_ids: Tensor,
        completion_lengths: Tensor,
        *,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        want: Collection[Wanted] = frozenset({"logprobs"}),
        entropy_gradient: bool = False,
        reference_hidden: Tensor | None = None,
        filtering: Filtering | None = None,
    ) -> PolicyOutput:
        """Only what is wanted, at the completion tokens in ``mask`` (default: all real ones).

        Args:
            prompt_ids: [B, P] padded on the left. prompt_lengths: [B], at least 1.
            completion_ids: [B, T] padded on the right. completion_lengths: [B].
            mask: [B, T] bool; log-probs and entropy are computed at these tokens alone.
            temperature: logits are divided by it.
            want: any field of ``PolicyOutput``.
            entropy_gradient: whether the entropy is trained (an entropy bonus) or only logged.
            reference_hidden: [B, T, H] ``hidden`` of the reference, for reference_kl, whose temperature is always 1.
            filtering: log-probs and entropy are those of what it leaves; a token outside has -inf, and no gradient.
        """
        flat, place, first = self._rows(prompt_ids, prompt_lengths, completion_ids, completion_lengths)
        width = completion_ids.shape[1]
        real = torch.arange(width, device=completion_ids.device)[None, :] < completion_lengths[:, None]
        chosen = real if mask is None else mask & real
        rows, tokens = torch.nonzero(chosen, as_tuple=True)
        # The one shift of the library: the hidden state one column earlier predicts the token.
        at_tokens = flat[place[rows, first[rows] + tokens - 1]]
        taken = completion_ids[rows, tokens]
        found = {} if WANTED.isdisjoint(want) else self._action_values(at_tokens, taken, want)
        if filtering is not None and not {"logprobs", "entropy"}.isdisjoint(want):
            before = Before(*self._penalised_prompt(prompt_ids, prompt_lengths), completion_ids, rows, tokens)
            settings: dict[str, Any] = {"temperature": temperature, "chunk_size": self.chunk_size}
            settings["entropy_gradient"] = entropy_gradient
            found |= filtered_logprobs(self.logits, at_tokens, taken, before, filtering, **settings)
        elif not {"logprobs", "entropy", "reference_kl"}.isdisjoint(want):
            compared = _at(reference_hidden, rows, tokens).to(at_tokens.dtype) if "reference_kl" in want else None
            found |= self._vocabulary(at_tokens, taken, temperature, "entropy" in want, entropy_gradient, compared)
        if "hidden" in want:
            found["hidden"] = at_tokens
        if "values" in want:
            found["values"] = self._values(at_tokens)
        output = {
            name: values.new_zeros((*chosen.shape, *values.shape[1:])).index_put((rows, tokens), values)
            for name, values in found.items()
        }
        if "bootstrap_values" in want:
            after = (first + completion_lengths - 1)[:, None]
            output["bootstrap_values"] = self._values(flat[place.gather(1, after).squeeze(1)])
        return PolicyOutput(**output)

    def _rows(
        self, prompt_ids: Tensor, prompt_lengths: Tensor, completion_ids: Tensor, completion_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over rows: [N, H] states, [B, L] where each row's are among them, [B] first completion columns."""
        given = prompt_ids, prompt_lengths, completion_ids, completion_lengths
        if self.halves is not None:
            states, first = self.halves.hidden_states(*given, padding=self.padding)
        else:
            ids, attention, positions, first = join(*given, padding=self.padding)
            if self.without_padding:
                same = first_with_same_prompt(prompt_ids, prompt_lengths)
                laid_out = lay_out(ids, attention, prompt_lengths, same)
                with over_trunk(self.trunk, given, positions, attention, source=laid_out.source):
                    return self.rows.hidden_states(laid_out), laid_out.place, first
            with over_trunk(self.trunk, given, positions, attention):
                states = self.hidden_states(ids, attention, positions)
        flat = states.flatten(0, 1)
        return flat, torch.arange(len(flat), device=flat.device).view(states.shape[:2]), first

    @property
    def recomputes_activations(self) -> bool:
        """Whether activations are computed again in the backward pass (a field of ``ModelConfig``)."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.language_model.modules())

    @property
    def without_padding(self) -> bool:
        """Whether the forward pass computes real tokens alone, and prompts that rows share once."""
        return self.padding == "right" and self.rows.usable

    @property
    def followers(self) -> frozenset[str]:
        """Names of frozen weights that training moves all the same: the targets of the Q heads."""
        return frozenset(name for name, _ in self.named_parameters() if name.startswith("q_heads.targets."))

    def _action_values(self, hidden: Tensor, ids: Tensor, want: Collection[str]) -> dict[str, Tensor]:
        if self.q_heads is None:
            raise ModelError(
                "values of actions were asked of a policy without Q heads; build it with q_heads=QHeads(...)"
            )
        return self.q_heads.at_tokens(hidden, ids, want, chunk_size=self.chunk_size)

    def _values(self, hidden: Tensor) -> Tensor:
        if self.value_head is None:
            raise ModelError(
                "values were asked of a policy without a value head; build it with value_head=ValueHead(...)"
            )
        return self.value_head(hidden)  # type: ignore[no-any-return]

    def _vocabulary(
        self,
        hidden: Tensor,
        ids: Tensor,
        temperature: float,
        with_entropy: bool,
        entropy_gradient: bool,
        reference: Tensor | None,
    ) -> dict[str, Tensor]:
        """Log-probs of ``ids`` [N], and where wanted entropies [N] and KL [N], from hidden states [N, H] by chunks."""
        weight = None if (with_entropy and entropy_gradient) or reference is not None else self._plain_head()
        if weight is not None:
            hidden = hidden if self.hidden_scale == 1 else hidden * self.hidden_scale
            device = hidden.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
            cast = rounded if emulates(hidden.device) else lambda tensor: tensor.to(dtype)
            with torch.autocast(device, enabled=False):
                logprobs, entropies = linear_logprobs(
                    cast(hidden), cast(weight), ids, temperature=temperature, chunk_size=self.chunk_size
                )
            return {"logprobs": logprobs, "entropy": entropies} if with_entropy else {"logprobs": logprobs}
        logged: list[Tensor] = []  # entropies without gradient: computed in the forward pass, not when it is repeated

        def chunk(part: Tensor, part_ids: Tensor, part_reference: Tensor | None, index: int) -> dict[str, Tensor]:
            logits = self.logits(part)
            found = {"logprobs": token_logprobs(logits, part_ids, temperature=temperature)}
            if part_reference is not None:
                found["reference_kl"] = self._kl_from(part_reference, logits)
            if with_entropy and entropy_gradient:
                found["entropy"] = entropy_of(logits, temperature=temperature)
            elif with_entropy and index == len(logged):
                with torch.no_grad():
                    logged.append(entropy_of(logits, temperature=temperature))
            return found

        states, targets = hidden.split(self.chunk_size), ids.split(self.chunk_size)
        compared = [None] * len(states) if reference is None else reference.split(self.chunk_size)
        pieces = list(zip(states, targets, compared, strict=True))
        parts: list[dict[str, Tensor]] = []
        for index, piece in enumerate(pieces):
            if len(pieces) > 1 and torch.is_grad_enabled():
                parts.append(checkpoint(chunk, *piece, index, use_reentrant=False))
            else:
                parts.append(chunk(*piece, index))
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return joined | {"entropy": torch.cat(logged)} if logged else joined

    def _kl_from(self, reference: Tensor, logits: Tensor) -> Tensor:
        """[N] exact KL of softmax(logits) [N, V] from what the reference's hidden states [N, H] predict."""
        if self.reference_logits is None:
            raise ModelError("reference_kl was asked of a policy without policy.reference_logits; set it")
        with torch.no_grad():
            expected = self.reference_logits(reference)
        return full_kl(logits, expected)

    def _plain_head(self) -> Tensor | None:
        """[V, H] where logits are the hidden states times a matrix and nothing else; None otherwise."""
        head = self.language_model.get_output_embeddings()
        changed = ("logit_scale", "logits_scaling", "final_logit_softcapping")
        if type(head) is not nn.Linear or head.bias is not None or any(getattr(self.config, n, None) for n in changed):
            return None
        if (bias := getattr(self.language_model, "final_logits_bias", None)) is not None and bool(bias.any()):
            return None
        return head.weight

    @torch.no_grad()
    def _check_family(self) -> None:
        """Our logits against the model's own on two tokens: an unknown family fails here and not in training."""
        ids = torch.tensor([[1, 0]], device=self.device)
        mask, positions = torch.ones_like(ids, dtype=torch.bool), torch.arange(2, device=self.device)[None]
        try:
            if self.halves is not None:
                own, ours = self.halves.probe(ids, mask, positions)
            else:
                own = self.language_model(input_ids=ids, attention_mask=mask.long()).logits.float()
                ours = self.logits(self.hidden_states(ids, mask, positions)).float()
        except Exception as error:
            family = type(self.language_model).__name__
            raise ModelError(f"{family} cannot be used: a forward pass over two tokens failed: {error}") from error
        scale = own.abs().max().clamp(min=1.0)
        if own.shape != ours.shape or (own - ours).abs().max() > PROBE_TOLERANCE * scale:
            family = type(self.language_model).__name__
            raise ModelError(
                f"{family} computes logits from its hidden states in a way tropism does not know; please report "
                "the family so that Policy.logits learns it"
            )


def _at(reference_hidden: Tensor | None, rows: Tensor, tokens: Tensor) -> Tensor:
    """[N, H] the reference's hidden states at the chosen tokens."""
    if reference_hidden is None:
        raise ModelError("reference_kl needs reference_hidden, what the reference gave for want={'hidden'}")
    return reference_hidden[rows, tokens]
