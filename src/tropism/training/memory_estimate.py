"""What memory a run will need, by arithmetic alone, before it starts; and which settings lower it.

What stays for the whole run (weights, reference, optimizer states) is added to the largest of the phases that follow
one another: sampling, scoring, the update, saving. Everything is in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

SLACK_COLUMNS = 32
"""Columns that the sampler's cache has beyond the longest row."""
LOGITS_KEPT = 256 * 2**20
"""Most logits of an update that are kept for the backward pass; what is beyond is computed again."""
LOGITS_COPIES = 2
"""Tensors as large as one block of logits that log-prob and entropy hold at a time."""
DRAWING_COPIES = 4
"""Tensors as large as the logits of one step that drawing a token holds at a time."""
HOLES = 0.3
"""Share of what an update holds that glibc adds in blocks which are free and of no use. A tensor's memory is aligned,
and glibc (2.36 was measured) never finds room for an aligned block in a hole of exactly its size: the hole that a
tensor leaves between two others stays empty. Measured on models of 3 and 30 million weights."""
HOLES_PER_ADAPTER = 2
"""Tensors of the size of its output that an adapted layer leaves as such holes: the adapter's product and its scaled
copy, before they are added."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a decoder that its activations depend on."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    """Rows of the output embedding."""
    mlp_tensors: int = 4
    """Tensors of ``intermediate_size`` that one feed-forward block keeps for its backward pass: 4 where it is gated
    (gate, its activation, up, their product), 2 for linear, activation, linear; 5 where the activation is computed in
    steps."""
    cached_layers: int | None = None
    """Layers that keep keys and values while rows are sampled; None: all. Of an encoder-decoder the decoder's, which
    keep those of the prompt, too."""
    eager_attention: bool = False
    """Whether attention keeps the scores of every head, as eager attention does."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a run asks of one device. Sizes in bytes, lengths in tokens."""

    weights: int
    """All weights and buffers, heads and adapters included."""
    trained: int
    """The weights with gradients; gradients have the same size, and AdamW's two moments each."""
    largest: int = 0
    """The largest weight with a gradient."""
    reference: int = 0
    """A frozen copy kept as the reference, as far as it shares nothing with the policy."""
    packed: int = 0
    """Copies of the weights that sampling makes: packed, merged with adapters, or in another precision."""
    packed_kept: int = 0
    """The part of ``packed`` that stays from one collect to the next (frozen layers)."""
    cast: int = 0
    """Copies of the weights in the precision of the update, where autocast makes them."""
    weight_size: int = 4
    """Bytes per number of the language model's weights."""
    compute_size: int = 4
    """Bytes per number of what forward and backward compute with: 4, or 2 in bf16."""
    adapter_rank: int = 0
    """Of LoRA; 0 trains weights themselves."""
    trained_layers: int
    """Layers that gradients pass through."""
    gradient_checkpointing: bool = False
    value_heads: int = 0
    """Numbers per token that heads keep for their backward pass, in multiples of the hidden size."""
    head_weights: int = 0
    """The part of ``weights`` that is heads and their targets, and so in no layer."""
    head_trained: int = 0
    """The part of ``trained`` that is heads: no setting lowers it."""
    update_tokens: int
    """All tokens of one optimizer step on this device, prompts included."""
    row_tokens: int
    """Of the longest row, prompt included."""
    trained_share: float = 1.0
    """Share of those tokens that logits are computed for."""
    micro_batch_tokens: int
    chunk_bytes: int
    """Logits that are computed at once."""
    sampled_rows: int = 0
    """Completions sampled together on this device; 0 where nothing is sampled."""
    sampled_prompts: int = 0
    """Different prompts among them."""
    prompt_tokens: int = 0
    """Of the longest prompt."""
    max_new_tokens: int = 0
    sampling_batch_size: int = 64
    trunk: int = 0
    """What frozen blocks give for the rows of a step, where it is kept from pass to pass."""
    on_host: bool = True
    """Whether the memory that trains is the host's: models are exported there, and its C library leaves holes."""
    merges: int = 0
    """Weights that are copied when an adapter is merged for export, or sharded ones are gathered to be saved."""

    @property
    def micro_batch(self) -> int:
        """Tokens of the largest micro-batch; a longer single row stands alone."""
        return max(min(self.update_tokens, self.micro_batch_tokens), self.row_tokens)

    @property
    def decoded_rows(self) -> int:
        """Rows that are decoded at once."""
        return min(self.sampled_rows, self.sampling_batch_size)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that a run needs on one device."""

    lasting: Mapping[str, int]
    """What is there all the time, by name."""
    phases: Mapping[str, Mapping[str, int]]
    """What each phase needs beside that, by name; phases follow one another."""

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Most bytes at any time."""
        return sum(self.lasting.values()) + sum(self.phases[self.phase].values())

    @property
    def certain(self) -> int:
        """What no run of this kind can do without: weights, reference, optimizer, and gradients or KV cache."""
        update, sampling = self.phases["update"], self.phases.get("sampling", {})
        return sum(self.lasting.values()) + max(update["gradients"], sampling.get("KV cache", 0))

    def line(self) -> str:
        """The estimate in one line."""
        lasting = ", ".join(f"{name} {readable(size)}" for name, size in self.lasting.items() if size)
        passing = ", ".join(f"{name} {readable(size)}" for name, size in self.phases[self.phase].items() if size)
        return f"{readable(self.peak)} at most, in the phase of {self.phase} ({lasting}; {passing})"


def estimate_memory(architecture: Architecture, load: Load) -> MemoryEstimate:
    """Peak memory of a run, phase by phase.

        peak = weights + reference + moments + kept copies + max(sampling, scoring, update, saving)

    The update is the backward pass over the largest micro-batch. Where that is the whole step, the gradients appear
    as the activations go, so the larger of the two counts; otherwise the gradients of earlier micro-batches are there
    already and both count.
    """
    lasting = {
        "weights": load.weights,
        "reference": load.reference,
        "optimizer": 2 * load.trained,
        "kept copies of weights": load.packed_kept,
    }
    phases = {"update": _update(architecture, load)}
    if load.sampled_rows:
        phases["sampling"] = _sampling(architecture, load)
        phases["scoring"] = _scoring(architecture, load)
    if load.on_host and load.merges:
        phases["saving"] = {"copies to save": load.merges}
    return MemoryEstimate(lasting=lasting, phases=phases)


def activations_per_token(architecture: Architecture, load: Load) -> int:
    """Bytes that one layer keeps per token for its backward pass, without the attention mask.

    For a layer of the Llama kind with hidden size H, query width A (heads x head size) and intermediate size F, all
    weights trained in fp32, the numbers kept are

        both norms     their inputs, normalised values and outputs                          6 H
        attention      queries, keys, values, outputs (keys and values once per query head)  4 A
        feed-forward   gate, activation, up, product                                         4 F

    of 4 bytes each. Under bf16 autocast the norms keep fp32, every projection keeps a bf16 copy of its input (two with
    an adapter), and attention is fp32 on a CPU. With weights in bf16 the norms still compute in fp32. A norm that is
    not trained does not keep its normalised values; LoRA keeps ``rank`` numbers for each of 7 adapted layers.
    """
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    width = architecture.heads * architecture.head_size
    adapted, narrow = load.adapter_rank > 0, load.weight_size < 4
    if load.compute_size < load.weight_size:
        copies = 2 if adapted else 1
        stream = (8 if adapted else 16) * hidden + 2 * copies * (5 * hidden + width) + 2 * (copies - 1) * inner
    elif narrow:
        stream = 12 * hidden + 2 * (5 * hidden + width + inner) if adapted else 16 * hidden
    else:
        stream = (16 if adapted else 24) * hidden
    kept_inside = architecture.mlp_tensors * inner + 7 * load.adapter_rank
    return stream + 4 * width * _attention_size(load) + load.compute_size * kept_inside


def _attention_size(load: Load) -> int:
    """Bytes per number in attention; autocast leaves it in fp32 on a CPU."""
    return load.weight_size if load.on_host else load.compute_size


def _activations(architecture: Architecture, load: Load) -> int:
    """Bytes of all layers that gradients pass through, for the largest micro-batch."""
    tokens = load.micro_batch
    # Per token the mask has one number per column; eager attention keeps scores and probabilities of every head.
    columns = load.row_tokens * (2 * architecture.heads + 1 if architecture.eager_attention else 1)
    layer = activations_per_token(architecture, load) + _attention_size(load) * columns
    if load.gradient_checkpointing:
        between = architecture.hidden_size * load.weight_size * load.trained_layers
        return tokens * (between + layer)
    heads = 4 * architecture.hidden_size * load.value_heads
    return tokens * (layer * load.trained_layers + heads)


def _work(architecture: Architecture, load: Load, tokens: int) -> int:
    """Bytes that one layer's computation holds for a moment, in either direction."""
    attention = 4 * architecture.heads * architecture.head_size
    inner = max(3 * architecture.intermediate_size, attention)
    return tokens * load.compute_size * (3 * architecture.hidden_size + inner)


def _update(architecture: Architecture, load: Load) -> dict[str, int]:
    logits = round(load.micro_batch * load.trained_share) * architecture.vocabulary * 4
    activations = _activations(architecture, load)
    whole = load.update_tokens <= load.micro_batch_tokens
    parts = {
        "gradients": load.trained,
        "activations": max(activations - load.trained, 0) if whole else activations,
        "logits": min(logits, LOGITS_KEPT) + LOGITS_COPIES * min(logits, load.chunk_bytes),
        "copies of weights": load.cast,
        "work": max(_work(architecture, load, load.micro_batch), load.largest),
        **_kept(load),
    }
    if load.on_host:
        parts["holes"] = round(HOLES * sum(parts.values())) + _holes_of_adapters(architecture, load)
    return parts


def _holes_of_adapters(architecture: Architecture, load: Load) -> int:
    """Bytes that the forward passes of adapted layers leave behind, see ``HOLES_PER_ADAPTER``."""
    if not load.adapter_rank or load.gradient_checkpointing:
        return 0
    width, keys = architecture.heads * architecture.head_size, architecture.kv_heads * architecture.head_size
    outputs = width + 2 * keys + 2 * architecture.hidden_size + 2 * architecture.intermediate_size
    return HOLES_PER_ADAPTER * outputs * load.compute_size * load.micro_batch * load.trained_layers


def _sampling(architecture: Architecture, load: Load) -> dict[str, int]:
    rows, size = load.decoded_rows, load.compute_size
    layers = architecture.layers if architecture.cached_layers is None else architecture.cached_layers
    per_column = 2 * layers * architecture.kv_heads * architecture.head_size * size
    prefilled = min(load.sampled_prompts, rows) * load.prompt_tokens
    columns = load.prompt_tokens + load.max_new_tokens + SLACK_COLUMNS
    return {
        "KV cache": (rows * columns + prefilled) * per_column,
        "copies of weights": load.packed - load.packed_kept,
        "logits": DRAWING_COPIES * rows * architecture.vocabulary * 4,
        "work": _work(architecture, load, max(prefilled, rows)),
    }


def _scoring(architecture: Architecture, load: Load) -> dict[str, int]:
    """Log-probs without gradients, in micro-batches of twice the size."""
    tokens = max(min(load.update_tokens, 2 * load.micro_batch_tokens), load.row_tokens)
    logits = round(tokens * load.trained_share) * architecture.vocabulary * 4
    return {
        "logits": LOGITS_COPIES * min(logits, load.chunk_bytes),
        "work": _work(architecture, load, tokens),
        "copies of weights": load.cast,
        **_kept(load),
    }


def _kept(load: Load) -> dict[str, int]:
    return {"what frozen blocks give": load.trunk} if load.trunk else {}


def suggestions(architecture: Architecture, load: Load, available: float, *, most: int = 3) -> list[tuple[str, int]]:
    """Settings that lower the need, as ``(setting=value, bytes needed with it alone)``.

    Those that make the run fit come first, the mildest of them in front; then those that save most.
    """
    now = estimate_memory(architecture, load).peak
    tried = [(text, estimate_memory(architecture, changed).peak) for text, changed in _changes(architecture, load)]
    fitting: dict[str, int] = {}
    for text, need in tried:  # of one setting's values the mildest that fits, or the last
        name = text.partition("=")[0]
        known = [t for t in fitting if t.partition("=")[0] == name]
        if need < 0.98 * now and not (known and fitting[known[0]] <= available):
            for other in known:
                del fitting[other]
            fitting[text] = need
    ordered = sorted(fitting.items(), key=lambda item: 0 if item[1] <= available else item[1])
    return ordered[:most]


def _changes(architecture: Architecture, load: Load) -> list[tuple[str, Load]]:
    """Every change worth trying, mildest first within a setting, settings in order of what they cost."""
    changes: list[tuple[str, Load]] = []
    tokens = load.micro_batch // 2
    while tokens >= load.row_tokens:
        changes.append((f"trainer.micro_batch_tokens={tokens}", replace(load, micro_batch_tokens=tokens)))
        tokens //= 2
    rows = load.decoded_rows // 2
    while rows >= 1:
        changes.append((f"sampling.batch_size={rows}", replace(load, sampling_batch_size=rows)))
        rows //= 2
    if not load.gradient_checkpointing:
        changes.append(("model.gradient_checkpointing=true", replace(load, gradient_checkpointing=True)))
    if load.adapter_rank == 0:
        layers = architecture.layers // 2
        while layers >= 1 and load.trained_layers == architecture.layers:
            changes.append((f"train_layers={layers}", _with_layers(architecture, load, layers)))
            layers //= 2
        changes.append(("lora.rank=16", _with_lora(architecture, load)))
    return changes


def _body(architecture: Architecture, load: Load) -> int:
    """Bytes of the layers, without the embeddings."""
    embedding = architecture.vocabulary * architecture.hidden_size * load.weight_size
    return max(load.weights - embedding - load.head_weights, 0)


def _with_layers(architecture: Architecture, load: Load, layers: int) -> Load:
    share = layers / architecture.layers
    layers_trained = round(_body(architecture, load) * share)
    trained = min(load.trained, layers_trained + load.head_trained)
    reference = min(load.reference, layers_trained)
    largest = min(load.largest, trained)
    kept = load.packed - round(load.packed * share)
    return replace(load, trained=trained, reference=reference, largest=largest, trained_layers=layers, packed_kept=kept)


def _with_lora(architecture: Architecture, load: Load, rank: int = 16) -> Load:
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    width = architecture.heads * architecture.head_size
    keys = architecture.kv_heads * architecture.head_size
    sides = 2 * (hidden + width) + 2 * (hidden + keys) + 3 * (hidden + inner)
    trained = 4 * rank * sides * architecture.layers
    return replace(
        load,
        weights=load.weights + trained,
        trained=trained + load.head_trained,
        largest=min(load.largest, load.head_trained),
        reference=0,
        adapter_rank=rank,
        merges=_body(architecture, load),
    )


def readable(size: float) -> str:
    """``1.5 GB``, ``320 MB``: three digits at most, powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
