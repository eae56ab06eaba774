"""A Hugging Face sequence classifier (sentiment, toxicity, a reward model) as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tropism.classifier_inputs import READ_TEXTS, ClassifierInputs, ReadText, UnreadableError
from tropism.errors import ConfigError, ModelError
from tropism.rewards.config import closest
from tropism.rewards.raw import RowError

Output = Literal["probability", "logit", "log_odds"]


def classifier(
    model: str,
    label: str | int | None = None,
    output: Output | None = None,
    text: ReadText = "completion",
    batch_size: int = 16,
    max_length: int | None = None,
    cut_completion: bool = False,
    device: str | None = None,
) -> ClassifierReward:
    """Load a sequence classifier as a reward.

    Args:
        model: hub id or folder. Code of a model repository is never run.
        label: the label whose score is the reward, by name or index. Needed unless the head has a single output.
        output: `probability` (default), `log_odds` = log p / (1 - p), or the raw `logit`. A head with one output (a
            reward or regression model) gives its `logit`, and only that.
        text: the completion alone, or prompt and completion together (chat messages through the classifier's chat
            template, where it has one).
        batch_size: texts per forward pass.
        max_length: longest input in tokens; by default what the model takes. A prompt is cut from its left to fit.
        cut_completion: allow a completion longer than that to lose its end; otherwise it is an error.
        device: by default CUDA or MPS where there is one, else the CPU.

    Raises:
        ConfigError: a value out of range, an unknown label (names the closest), an output the head does not have.
        ModelError: the classifier cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    from tropism.foreign.pretrained import load_pretrained

    for name, value, choices in (("output", output, (*get_args(Output), None)), ("text", text, READ_TEXTS)):
        if value not in choices:
            raise ConfigError(f"{name}: unknown value {value!r}. {closest(str(value), filter(None, choices))}")
    if batch_size < 1:
        raise ConfigError(f"batch_size: expected at least 1, not {batch_size}")
    try:
        network, tokenizer, missing = load_pretrained(str(model), AutoModelForSequenceClassification)
    except Exception as error:  # ModelError, or whatever a failed download raises
        raise ModelError(
            f"cannot load the classifier {model!r}: {error}. Give a folder, or an id that this machine can download."
        ) from error
    if missing:  # transformers would fill a missing head with random numbers
        raise ModelError(f"{model!r} is no sequence classifier: it has no weights for {', '.join(missing[:3])}")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return ClassifierReward(
        network.to(device or best),
        tokenizer,
        label=label_index(network.config, label),
        output=output_of(network.config, output),
        text=text,
        batch_size=batch_size,
        max_length=max_length,
        cut_completion=cut_completion,
    )


class ClassifierReward:
    """The reward function that ``classifier`` makes; also of a model already in memory."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        label: int,
        output: Output,
        text: ReadText = "completion",
        batch_size: int = 16,
        max_length: int | None = None,
        cut_completion: bool = False,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.label = label
        self.output: Output = output
        self.batch_size = batch_size
        self.inputs = ClassifierInputs(
            model, tokenizer, text=text, max_length=max_length, cut_completion=cut_completion
        )
        self.multi_label = model.config.problem_type == "multi_label_classification"
        # Many decoders have no pad token, or use eos, and then find the last token of a row by comparing ids. Rows of
        # one length need no padding; an id that never occurs keeps the model from taking a real eos for padding.
        self.pads = tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id if self.pads else -1

    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float]:
        rows = [self._input_ids(row, *pair) for row, pair in enumerate(zip(prompts, completions, strict=True))]
        rewards = [0.0] * len(rows)
        for indices in self._batches(rows):
            logits = self._logits([rows[index] for index in indices])
            for index, reward in zip(indices, self._reward(logits).tolist(), strict=True):
                rewards[index] = reward
        return rewards

    def _input_ids(self, row: int, prompt: Any, completion: Any) -> list[int]:
        try:
            return self.inputs.ids(prompt, completion)
        except UnreadableError as error:
            raise RowError(str(error), row) from error

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Row numbers of each forward pass: similar lengths together, equal lengths where the model cannot pad."""
        batches: list[list[int]] = []
        for index in sorted(range(len(rows)), key=lambda row: len(rows[row])):
            full = not batches or len(batches[-1]) == self.batch_size
            if full or not (self.pads or len(rows[batches[-1][0]]) == len(rows[index])):
                batches.append([])
            batches[-1].append(index)
        return batches

    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """[N, labels] fp32, of rows padded on the right."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.pads else 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        with torch.inference_mode():
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits
        return logits.float()

    def _reward(self, logits: Tensor) -> Tensor:
        """[N] from logits [N, labels]: log p / (1 - p) of a softmax is the logit over the logsumexp of the others."""
        chosen = logits[:, self.label]
        if self.output == "logit" or (self.output == "log_odds" and self.multi_label):
            return chosen
        if self.output == "probability":
            return torch.sigmoid(chosen) if self.multi_label else torch.softmax(logits, dim=-1)[:, self.label]
        others = torch.cat([logits[:, : self.label], logits[:, self.label + 1 :]], dim=-1)
        return chosen - torch.logsumexp(others, dim=-1)


def label_index(config: Any, label: str | int | None) -> int:
    """The index of a label given by name (case does not matter), by index, or not at all where there is only one.

    Raises:
        ConfigError: no such label, or none given and several to choose from; lists them.
    """
    names = [str(config.id2label[index]) for index in range(config.num_labels)]
    listing = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    if label is None:
        if len(names) > 1:
            raise ConfigError(f"label: the classifier has several; choose one of: {listing}")
        return 0
    if isinstance(label, str):
        folded = [name.casefold() for name in names]
        if folded.count(label.casefold()) == 1:
            return folded.index(label.casefold())
        raise ConfigError(f"label: unknown {label!r}. {closest(label, names)}")
    if isinstance(label, bool) or not 0 <= label < len(names):
        raise ConfigError(f"label: no label {label!r}; the classifier has: {listing}")
    return label


def output_of(config: Any, output: Output | None) -> Output:
    """The wanted output, or the default of the head: the logit of a single output, else the probability.

    Raises:
        ConfigError: a probability of a head that scores on an open scale.
    """
    open_scale = config.num_labels == 1 and config.problem_type != "multi_label_classification"
    open_scale = open_scale or config.problem_type == "regression"
    if open_scale and output not in (None, "logit"):
        raise ConfigError(
            f"output: the classifier's head is a regression without probabilities; use 'logit', not {output!r}"
        )
    return output or ("logit" if open_scale else "probability")
