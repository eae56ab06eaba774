"""A Hugging Face sequence classifier (sentiment, toxicity, a reward model) as a reward."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tropism.classifier_inputs import (
    JUDGED_TEXTS,
    ClassifierInput,
    ClassifierInputs,
    JudgedText,
    NothingToReadError,
    UnreadableError,
)
from tropism.errors import ConfigError, ModelError
from tropism.out_of_memory import BatchSize
from tropism.rewards.config import closest
from tropism.rewards.label_score import HeadKind, Label, LabelScore, Output, check_values
from tropism.rewards.raw import RowError
from tropism.texts import plain_text

logger = logging.getLogger("tropism")

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]


def classifier(
    model: str,
    label: Label | list[Label] | None = None,
    output: Output | None = None,
    text: JudgedText = "completion",
    batch_size: int = 16,
    max_length: int | None = None,
    cut_completion: bool = False,
    device: str | None = None,
    complement: bool = False,
    head: HeadKind | Literal["auto"] = "auto",
    empty: float | Literal["read"] | None = "read",
    dtype: DTypeName = "auto",
) -> ClassifierReward:
    """Load a sequence classifier as a reward.

    Args:
        model: hub id or folder. Code of a model repository is never run.
        label: the label whose score is the reward, by name or index, or a list of labels. Needed unless the head has a
            single output.
        output: `probability` (default), `log_odds` = log p / (1 - p), or the raw `logit`. A regression (a head with
            one output, unless ``head`` says otherwise) gives its `logit`, and only that.
        text: the completion alone, prompt and completion as one text (chat messages through the classifier's chat
            template, where it has one), or as a `pair` of texts with the tokenizer's separator between them.
        batch_size: texts per forward pass.
        max_length: longest input in tokens; by default what the model takes. A prompt is cut from its left to fit.
        cut_completion: allow a completion longer than that to lose its end; otherwise it is an error.
        device: by default CUDA or MPS where there is one, else the CPU.
        complement: reward what is not the label: 1 - p, or minus the log-odds or logit.
        head: `softmax`, `sigmoid` (each label by itself) or `regression`, where the model's configuration is wrong.
        empty: the reward of a completion without text (white space is none); None: no opinion. By default it is read
            like any other, and there is no opinion where the tokenizer makes nothing of it.
        dtype: of the weights; `auto`: as the files hold them.

    Raises:
        ConfigError: a value out of range, an unknown label (names the closest), an output the head does not have.
        ModelError: the classifier cannot be loaded.
    """
    for name, value, choices in (("text", text, JUDGED_TEXTS), ("dtype", dtype, get_args(DTypeName))):
        if value not in choices:
            raise ConfigError(f"{name}: unknown value {value!r}. {closest(str(value), choices)}")
    check_values(output=output, head=head, complement=complement)
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, not {batch_size}")
    _check_empty(empty)
    network, tokenizer = _loaded(model, dtype)
    score = LabelScore.for_model(network.config, label=label, output=output, complement=complement, head=head)
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return ClassifierReward(
        network.to(device or best),
        tokenizer,
        score=score,
        text=text,
        batch_size=batch_size,
        max_length=max_length,
        cut_completion=cut_completion,
        empty=empty,
    )


def _check_empty(empty: Any) -> None:
    number = not isinstance(empty, bool) and isinstance(empty, int | float) and math.isfinite(empty)
    if not (number or empty is None or empty == "read"):
        raise ConfigError(f"empty: expected 'read', a number, or nothing for no opinion, not {empty!r}")


def _loaded(model: str, dtype: DTypeName) -> tuple[Any, Any]:
    """The classifier and its tokenizer.

    Raises:
        ModelError: it is not there, damaged, or has no head.
    """
    from transformers import AutoModelForSequenceClassification

    from tropism.foreign.pretrained import load_pretrained

    weights = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        network, tokenizer, missing = load_pretrained(str(model), AutoModelForSequenceClassification, dtype=weights)
    except Exception as error:  # ModelError, or whatever a failed download raises
        raise ModelError(
            f"cannot load the classifier {model!r}: {error}. Give a folder, or an id that this machine can download."
        ) from error
    if missing:  # transformers would fill a missing head with random numbers
        raise ModelError(f"{model!r} is no sequence classifier: it has no weights for {', '.join(missing[:3])}")
    return network, tokenizer


class ClassifierReward:
    """The reward function that ``classifier`` makes; also of a model already in memory.

    Args:
        score: which number of the logits is the reward.
        empty: of a completion without text; `read`: what the classifier says of it.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        score: LabelScore,
        text: JudgedText = "completion",
        batch_size: int = 16,
        max_length: int | None = None,
        cut_completion: bool = False,
        empty: float | Literal["read"] | None = "read",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.score, self.empty = score, empty
        self.batch_size = batch_size
        self.size = BatchSize(
            "texts that the classifier reads at once",
            setting="the term's args.batch_size",
            advice="Set its max_length, give it another device, or take a smaller classifier",
        )
        self.inputs = ClassifierInputs(
            model, tokenizer, text=text, max_length=max_length, cut_completion=cut_completion
        )
        # Many decoders have no pad token, or use eos, and then find the last token of a row by comparing ids. Rows of
        # one length need no padding; an id that never occurs keeps the model from taking a real eos for padding.
        self.pads = tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
        self.pads = self.pads and self._ignores_pads()
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id if self.pads else -1

    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float | None]:
        rewards: list[float | None] = []
        read: dict[int, ClassifierInput] = {}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            entry, reward = self._read(row, prompt, completion)
            rewards.append(reward)
            if entry is not None:
                read[row] = entry

        def logits_of(rows: Sequence[int]) -> Tensor:
            return self._logits([read[row] for row in rows])

        for batch in self._batches(read):
            for rows, logits in self.size.parts(batch, logits_of, size=self.batch_size):
                for row, score in zip(rows, self.score.of(logits).tolist(), strict=True):
                    rewards[row] = score
        return rewards

    def _ignores_pads(self) -> bool:
        """Whether pads on the right leave a text's logits as they are: not where a model judges by the last place of
        the row, as XLNet does, whose texts are padded on the left."""
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        text = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])[:1] or [0]
        entry = ClassifierInput(ids=self.inputs.joined([], text))
        width = min(len(entry.ids) + 4, self.inputs.max_length)
        # Half precision moves logits by a hundredth; one that is too much here costs speed alone.
        same = torch.allclose(self._logits([entry]), self._logits([entry], width), rtol=0.02, atol=0.02)
        if not same:
            logger.info("the classifier's scores change with padding: texts of one length alone share a forward pass")
        return same

    def _read(self, row: int, prompt: Any, completion: Any) -> tuple[ClassifierInput | None, float | None]:
        """What the classifier is to read; where it is nothing, the reward."""
        if self.empty != "read" and not plain_text(completion).strip():
            return None, self.empty
        try:
            return self.inputs.read(prompt, completion), None
        except NothingToReadError:
            return None, None
        except UnreadableError as error:
            raise RowError(str(error), row) from error

    def _batches(self, read: dict[int, ClassifierInput]) -> list[list[int]]:
        """Row numbers of each forward pass: similar lengths together, equal lengths where the model cannot pad."""
        batches: list[list[int]] = []
        for row in sorted(read, key=lambda row: len(read[row].ids)):
            full = not batches or len(batches[-1]) == self.batch_size
            if full or not (self.pads or len(read[batches[-1][0]].ids) == len(read[row].ids)):
                batches.append([])
            batches[-1].append(row)
        return batches

    def _logits(self, entries: Sequence[ClassifierInput], width: int = 0) -> Tensor:
        """[N, labels] fp32, of rows padded on the right, to the longest or to ``width``."""
        width = max(width, *(len(entry.ids) for entry in entries))

        def padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
            return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.model.device)

        given = {
            "input_ids": padded([entry.ids for entry in entries], self.tokenizer.pad_token_id if self.pads else 0),
            "attention_mask": padded([[1] * len(entry.ids) for entry in entries], 0),
        }
        segments = [entry.segments for entry in entries if entry.segments is not None]
        if segments:  # of all rows, or of none
            given["token_type_ids"] = padded(segments, 0)
        with torch.inference_mode():
            logits: Tensor = self.model(**given).logits
        return logits.float()
