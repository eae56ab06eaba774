"""From token ids back to what reward functions see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tropism.rollouts.stops import added_text, cut_at_stop, decode
from tropism.texts import decoder_prefix_of
from tropism.types import Messages, Prompt, RewardInputs, Rollouts


class Transcriber:
    """Rollouts as text, ids, finish reasons and columns; of tokens behind ``visible_lengths`` rewards learn nothing.

    Args:
        tokenizer: special tokens are left out of texts; bytes that are no text become U+FFFD.
        stop: stop strings; the text ends before the first, the ids keep it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)

    def __call__(
        self, rollouts: Rollouts, prompts: Sequence[Prompt], trainer_state: Mapping[str, int | float] | None = None
    ) -> RewardInputs:
        """Args: prompts: one per row of ``rollouts``."""
        ids = [row[:n].tolist() for row, n in zip(rollouts.completion_ids, rollouts.seen_lengths, strict=True)]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        return RewardInputs(
            prompts=[prompt.text for prompt in prompts],
            completions=[self.completion(prompt, row) for prompt, row in zip(prompts, ids, strict=True)],
            completion_ids=ids,
            finish_reasons=list(rollouts.finish_reasons),
            columns={name: [prompt.columns.get(name) for prompt in prompts] for name in names},
            trainer_state=trainer_state or {},
        )

    def completion(self, prompt: Prompt, ids: Sequence[int]) -> str | Messages:
        """The completion of one prompt: text after text, an assistant message after messages."""
        if isinstance(prompt.text, str):
            before = prompt.ids if decoder_prefix_of(self.tokenizer) is None else ()
            return cut_at_stop(added_text(self.tokenizer, before, ids), self.stop)
        return [{"role": "assistant", "content": cut_at_stop(decode(self.tokenizer, ids), self.stop)}]
