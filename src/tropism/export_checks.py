"""Whether a folder that was just written is, for everybody who loads it, the model that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropism import export_checks_seq2seq as seq2seq
from tropism.data.encoding import render_chat
from tropism.errors import DataError, ModelError
from tropism.models.baked import TOLERANCE, greedy_gap, logits_difference
from tropism.models.baked_tokenizer import Opening, differing_texts
from tropism.models.conditioning_files import MARK
from tropism.models.modules import AutoLanguageModel, base_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tropism.generation import TextPolicy
    from tropism.types import Messages

TEXTS = (
    "",
    "a",
    "The film was",
    "I watched it, and then I could not stop thinking about it: what a day!",
    "It is 7:30 a.m. \U0001f600 and caf\u00e9 costs 3.50\n\n  two  spaces",
    "Once upon a time there was a small dog who lived near the sea with an old man. " * 4,
)
"""Empty, short, long, with digits, an emoji, an accent, line breaks and runs of blanks."""
CHATS: tuple[Messages, ...] = (
    [{"role": "user", "content": "What is a good name for a dog?"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How are you?"},
        {"role": "user", "content": "Fine \U0001f600"},
    ],
)
"""Conversations, for tokenizers with a chat template."""
GREEDY = 3
"""Texts that completions are compared on."""
NEW_TOKENS = 20
"""Tokens of these completions."""
READ = ("input_ids", "attention_mask")
"""What language models read of an encoded text; some tokenizers of theirs make more."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a verification measured."""

    texts: int
    largest_difference: float
    """Of a logit, over all texts and tokens; of a reward model's score, over all texts."""
    largest_logit: float
    """Or score."""
    tolerance: float
    """What the difference may be: a share of the largest logit, or of 1 where that is smaller."""
    dtype: str
    """Of the weights."""
    greedy_texts: int = 0
    """How many were completed by ``NEW_TOKENS`` greedy tokens, too; none by a reward model."""


def verify(
    folder: Path, policy: TextPolicy, asked: Sequence[int], opening: Opening | None, texts: Sequence[str]
) -> Found:
    """Load the folder as anybody would, and compare it with the policy.

    Args:
        asked: the ids that ask the policy for the target; empty where nothing is asked.
        opening: what the folder's tokenizer is to put before every text.
        texts: to compare on.

    Raises:
        ModelError: it differs; says in what.
    """
    from transformers import AutoTokenizer

    plain = _load_plain(folder, policy, opening)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    pairs = {text: _both(policy, text, asked, opening) for text in texts}
    baked = {text: pair[1] for text, pair in pairs.items()}
    for problem in chain(differing_texts(tokenizer, texts, baked), _other_problems(tokenizer, policy, opening)):
        raise differs(problem)
    limit = policy.policy.context_length or max(map(len, baked.values()))
    tolerance = tolerance_of(plain.dtype)
    decoded = _decoded(policy, limit) if policy.policy.encoder_decoder else ()
    measured = []
    for text, (one, other) in pairs.items():
        if one and decoded:
            measured.append(
                (text, *seq2seq.logits_difference(policy.policy, plain, one[:limit], other[:limit], decoded))
            )
        elif one:
            measured.append((text, *logits_difference(policy.policy, plain, one[:limit], other[:limit])))
    largest = max(logit for _, _, logit in measured)
    allowed = tolerance * max(1.0, largest)
    for text, difference, _ in measured:
        if not difference <= allowed:
            raise differs(f"logits differ by {difference:.3g} after {text!r:.60}, and rounding makes {allowed:.3g}")
    room = 0 if decoded else NEW_TOKENS
    short = [text for text, ids in baked.items() if ids and len(ids) + room <= limit][:GREEDY]
    for text in short:
        encoded = tokenizer(text, return_tensors="pt", verbose=False)
        encoded = {name: encoded[name] for name in READ}
        gap_of = seq2seq.greedy_gap if decoded else greedy_gap
        gap = gap_of(policy.policy, plain, pairs[text][0], encoded, new_tokens=NEW_TOKENS)
        if not gap <= 2 * allowed:
            raise differs(f"greedy generation after {text!r:.60} takes a token that is {gap:.3g} below the best")
    return Found(
        texts=len(measured),
        largest_difference=max(difference for _, difference, _ in measured),
        largest_logit=largest,
        tolerance=tolerance,
        dtype=str(plain.dtype).removeprefix("torch."),
        greedy_texts=len(short),
    )


def load_plain(kind: Any, folder: Path, live: Any) -> Any:
    """The folder's model by an Auto class, in the precision and on the device of the live one.

    Raises:
        ModelError: weights are missing, too many, of another size or precision.
    """
    plain, info = kind.from_pretrained(
        str(folder),
        dtype="auto",
        attn_implementation=live.config._attn_implementation,
        output_loading_info=True,
        trust_remote_code=False,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise differs(f"{problem.replace('_', ' ')} among the weights: {sorted(map(str, info[problem]))[0]}")
    if plain.dtype != live.dtype:
        raise differs(f"the weights are {plain.dtype} instead of {live.dtype}")
    return plain.to(live.device).eval()


def tolerance_of(dtype: Any) -> float:
    """``TOLERANCE`` of a precision; the finest of one that it does not know."""
    return TOLERANCE.get(dtype, min(TOLERANCE.values()))


def _load_plain(folder: Path, policy: TextPolicy, opening: Opening | None) -> Any:
    """By the Auto class that anybody would take, for that kind of model."""
    live: Any = base_model(policy.policy.model)  # type: ignore[arg-type]
    plain = load_plain(AutoLanguageModel.of(live.config), folder, live)
    if getattr(plain.config, MARK, None) is not None:
        raise differs(f"its config.json names {MARK}, which a plain model has not")
    rows = set() if opening is None else {slot.row for slot in opening.slots}
    if not rows <= set(plain.generation_config.suppress_tokens or ()):
        raise differs("its generation_config.json does not suppress the slots' tokens")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"):
        wanted, found = (getattr(model.generation_config, name, None) for model in (live, plain))
        if wanted != found:
            raise differs(f"its generation_config.json has {name} {found} instead of {wanted}")
    wanted, found = (model.get_output_embeddings().weight.shape[0] for model in (live, plain))
    wanted += 0 if opening is None else sum(slot.kind == "appended" for slot in opening.slots)
    if not wanted == found == plain.config.get_text_config().vocab_size:
        raise differs(f"its vocabulary has {found} rows instead of {wanted}")
    return plain


def _decoded(policy: TextPolicy, limit: int) -> tuple[int, ...]:
    """What an encoder-decoder's decoder is given to read in the comparison."""
    ids = policy.tokenizer(TEXTS[3], verbose=False)["input_ids"]
    prefix = policy.policy.decoder_prefix or ()
    return tuple(ids[: max(2, limit - len(prefix))])


def _both(
    policy: TextPolicy, text: str, asked: Sequence[int], opening: Opening | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A text's ids as the policy is asked, and as the folder's tokenizer is to encode it."""
    ids = policy.tokenizer(text, verbose=False)["input_ids"]
    if policy.conditioner is None or opening is None:
        return tuple(ids), tuple(ids)
    return policy.conditioner.apply(ids, asked), policy.conditioner.apply(ids, opening.ids)


def _other_problems(tokenizer: PreTrainedTokenizerBase, policy: TextPolicy, opening: Opening | None) -> Iterator[str]:
    """What is wrong with pairs of texts, chats and decoding."""
    before, conditioner = policy.tokenizer, policy.conditioner
    if opening is None:
        yield from _other_words(tokenizer, before)

    def opened(ids: Sequence[int]) -> list[int]:
        return list(ids) if conditioner is None or opening is None else list(conditioner.apply(ids, opening.ids))

    if list(tokenizer("a dog", "the sea")["input_ids"]) != opened(before("a dog", "the sea")["input_ids"]):
        yield "pairs of texts are encoded otherwise"
    if opening is None or opening.slots:
        text = TEXTS[3]
        whole = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        if whole != before.decode(before(text)["input_ids"], skip_special_tokens=True):
            yield f"{text!r:.60} is decoded as {whole!r:.60}"
    if not before.chat_template:
        return
    for messages in CHATS:
        try:
            written = render_chat(before, messages, where="a chat", add_generation_prompt=True)
        except DataError:  # a template may refuse conversations of some kinds
            continue
        expected = opened(before(written, add_special_tokens=False)["input_ids"])
        found = render_chat(tokenizer, messages, where="a chat, in the export", add_generation_prompt=True)
        if list(tokenizer(found, add_special_tokens=False)["input_ids"]) != expected:
            yield (
                "its chat template does not lead to the ids that the model was trained on"
                + ("" if opening is None or opening.slots else "; train with another mechanism than text")
            )


def _other_words(tokenizer: PreTrainedTokenizerBase, before: PreTrainedTokenizerBase) -> Iterator[str]:
    """What is not as it was of a tokenizer that nothing was built into."""
    if tokenizer.get_vocab() != before.get_vocab():
        odd = sorted({*tokenizer.get_vocab().items()} ^ {*before.get_vocab().items()}, key=lambda entry: entry[1])
        yield f"the vocabulary of its tokenizer is another, first at the id {odd[0][1]} ({odd[0][0]!r:.40})"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(tokenizer, name) != getattr(before, name):
            yield f"its tokenizer has {name} {getattr(tokenizer, name)} instead of {getattr(before, name)}"
    if tokenizer.chat_template != before.chat_template:
        yield "its tokenizer has another chat template"


def differs(what: str) -> ModelError:
    """The error of an export in which something differs."""
    return ModelError(f"the export is not the model that it was made of, and was not kept: {what}")
