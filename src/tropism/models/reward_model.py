"""The reward model: a sequence classifier with one output, and a gain and a bias that put its scores on a scale."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tropism.errors import ModelError
from tropism.models.modules import base_model
from tropism.models.sharding import gather, gathered

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Relative; the classifiers themselves compute their heads in the dtype of their weights."""


class RewardModel(nn.Module):
    """Scores of texts: gain * logit + bias, in fp32.

    Of a decoder the logit is a linear map of the last token's hidden state; an encoder pools as its family does. Gain
    starts at 1 and bias at 0, as in lm-human-preferences (https://arxiv.org/abs/1909.08593), and both are trained.

    Args:
        model: a Hugging Face sequence classifier with one output, or a PEFT model around one.

    Raises:
        ModelError: it has not exactly one output, or scores texts in a way that is not known here.
    """

    value_head: None = None
    conditioning: None = None
    reference_logits: None = None
    without_padding = False
    recomputes_activations = False
    chunk_size = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head_name, head = _head_of(self.classifier)
        self.reads_last_token = self.head_name == "score"
        device = head.weight.device
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))
        self._check_family()

    @property
    def classifier(self) -> Any:
        """The sequence classifier itself, without its PEFT wrapper."""
        model: Any = self.model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def language_model(self) -> Any:
        """The network whose sizes the memory estimate reads."""
        return self.classifier

    @property
    def head(self) -> nn.Linear:
        """The last layer, which makes one number of what the body says."""
        layer = self.classifier.get_submodule(self.head_name)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def config(self) -> Any:
        """The Hugging Face configuration of the body."""
        return self.classifier.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.classifier.dtype  # type: ignore[no-any-return]

    def whole(self) -> AbstractContextManager[None]:
        """A block in which no weight is sharded."""
        return gathered(self)

    def gather(self) -> None:
        """Make sharded weights whole for good; nothing to do here."""
        gather(self)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """[N] scores.

        Args:
            ids: [N, L] padded on the right; what the pads are does not matter. lengths: [N] at least 1.
        """
        return self.gain * self.logits(ids, lengths) + self.bias

    def logits(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """[N] scores before gain and bias, fp32."""
        mask = torch.arange(ids.shape[1], device=ids.device)[None, :] < lengths[:, None]
        # Pads may be no ids of the vocabulary at all, and some encoders derive positions from the id of theirs.
        ids = ids.masked_fill(~mask, self.classifier.config.get_text_config().pad_token_id)
        if not self.reads_last_token:
            logits: Tensor = self.classifier(input_ids=ids, attention_mask=mask.long()).logits
            return logits.squeeze(-1).float()
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        hidden = self.classifier.base_model(**arguments).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        head = self.head
        with torch.autocast(ids.device.type, enabled=False):
            weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()
            return nn.functional.linear(last.float(), weight, bias).squeeze(-1)

    def start_head(self, *, seed: int) -> None:
        """Fresh head: weights of N(0, 1 / (H + 1)), bias 0. Neither reads nor moves the global random state."""
        head = self.head
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5
        with torch.no_grad():
            head.weight.copy_(drawn)
            if head.bias is not None:
                head.bias.zero_()

    @torch.no_grad()
    def rescale(self, *, gain: float, bias: float) -> None:
        """Set gain and bias."""
        self.gain.fill_(gain)
        self.bias.fill_(bias)

    @torch.no_grad()
    def _check_family(self) -> None:
        """Our scores against the classifier's own: an unknown family fails here and not in training."""
        classifier = self.classifier
        pad = classifier.config.get_text_config().pad_token_id
        if pad is None:
            raise ModelError(f"{type(classifier).__name__} has no pad token; set config.pad_token_id to an unused id")
        ids = torch.tensor([[i for i in range(1, 5) if i != pad][:3]], device=self.device)
        own = classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().flatten()
        lengths = torch.tensor([ids.shape[1]], device=self.device)
        # One pad more, which must not count.
        ours = self.logits(torch.cat([ids, ids[:, :1]], dim=1), lengths)
        tolerance = PROBE_TOLERANCE.get(self.dtype, 1e-3) * own.abs().max().clamp(min=1.0)
        if own.shape != ours.shape or (own - ours).abs().max() > tolerance:
            raise ModelError(
                f"{type(classifier).__name__} scores texts in a way tropism does not know; please report the family"
            )


def _head_of(classifier: Any) -> tuple[str, nn.Linear]:
    """Name and layer of the head.

    Raises:
        ModelError: there is not exactly one linear layer with one output that is the last.
    """
    body = {id(module) for module in base_model(classifier).base_model.modules()}
    heads = [
        (name, module)
        for name, module in classifier.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == 1
        and id(module) not in body
        and ".lora_" not in name  # those of rank 1 have one output, too
    ]
    if len(heads) != 1:
        raise ModelError(
            f"{type(classifier).__name__} has {len(heads)} heads with one output, and a reward model has one; set "
            "num_labels to 1"
        )
    return heads[0]
