"""How completions are sampled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one round of sampling; the defaults sample the model's own distribution."""

    max_new_tokens: int = 64
    """Most tokens of a completion, the final eos included."""
    min_new_tokens: int = 0
    """No eos (nor stop token) before this many tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token (log-probs then hold at temperature 1)."""
    top_k: int = 0
    """Keep the k most likely tokens, ties included; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability, the crossing token included."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the most likely token's probability."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or completion; 1 is off."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the text that rewards see ends before the string, the token ids keep it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a completion, beside the model's eos."""
    batch_size: int = 64
    """Most rows decoded at once; as rows end, waiting prompts take their place."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "min_new_tokens must lie between 0 and max_new_tokens": 0 <= self.min_new_tokens <= self.max_new_tokens,
            "temperature must be 0 (greedy) or positive": self.temperature >= 0,
            "top_k must be 0 (off) or positive": self.top_k >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "min_p must lie in [0, 1]": 0 <= self.min_p <= 1,
            "repetition_penalty must be positive": self.repetition_penalty > 0,
            "stop strings must not be empty": all(self.stop),
            "batch_size must be at least 1": self.batch_size >= 1,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)

    @property
    def softmax_temperature(self) -> float:
        """The temperature at which log-probs are reported: greedy sampling reports them at 1."""
        return self.temperature if self.temperature > 0 else 1.0
