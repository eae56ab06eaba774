"""Episodes of text: prompts with completions that grow a token at a time, side by side in one decode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from tropism.envs.decoding import Decoding
from tropism.envs.items import Items
from tropism.envs.token_rewards import Judge, Sample, TokenReward, asked
from tropism.errors import ConfigError, TropismError
from tropism.generation import TextPolicy
from tropism.ops.slots import without_slots
from tropism.rollouts.config import Sampling
from tropism.rollouts.ends import Ends
from tropism.rollouts.stops import CONTEXT
from tropism.rollouts.transcribe import Transcriber
from tropism.types import Messages, Prompt


@dataclass(kw_only=True)
class Episode:
    """One item and the completions of its prompt."""

    item: Any
    prompt: Prompt
    """As the policy reads it."""
    text: Prompt
    """The same without reward slots."""
    samples: list[Sample]
    rewards: list[float]
    """Of the last step, one per sample."""

    @property
    def over(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    @property
    def terminated(self) -> bool:
        """Over, and no sample was cut by the length limit."""
        return self.over and not self.truncated

    @property
    def truncated(self) -> bool:
        """Over, and the length limit cut a sample."""
        return self.over and any(sample.finish_reason == "length" for sample in self.samples)


class Completing:
    """Episodes that take tokens and give rewards; what both kinds of environment do.

    Args:
        model: anything that ``load_model`` takes, or a ``TextPolicy``.
        items, prompt_of: see ``Items``.
        reward: what a recipe's reward may be, judged when a completion has ended; None: none.
        get_reward: asked after every token; None: none.
        episodes: prompts at a time. samples: completions of each.
        max_new_tokens: most tokens of a completion. stop, stop_token_ids: what ends it, beside the model's eos.
        layer, compiled: see ``Decoding``.
        allow_code: let the reward name code.

    Raises:
        TropismError: a setting that cannot work, or an item without a prompt.
    """

    def __init__(
        self,
        model: Any,
        items: Any,
        reward: Any,
        get_reward: TokenReward | None,
        *,
        episodes: int,
        samples: int,
        max_new_tokens: int,
        stop: Sequence[str] | str,
        stop_token_ids: Sequence[int],
        prompt_of: Callable[[Any], str | Messages] | None,
        layer: int,
        compiled: bool,
        allow_code: bool,
    ) -> None:
        if reward is None and get_reward is None:
            raise ConfigError(
                "this environment would reward nothing: pass reward=..., or make a subclass that overrides get_reward "
                "and build that"
            )
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(max_new_tokens=max_new_tokens, stop=stop, stop_token_ids=tuple(stop_token_ids))
        self.model = model if isinstance(model, TextPolicy) else TextPolicy.load(model)
        self.policy, self.tokenizer = self.model.policy, self.model.tokenizer
        self.vocabulary = int(self.policy.language_model.get_output_embeddings().weight.shape[0])
        self.max_new_tokens, self.samples = max_new_tokens, samples
        self._ends = Ends.of(sampling, self.model.sampler.eos_ids, self.tokenizer)
        self._transcriber = Transcriber(self.tokenizer, stop)
        self.items = Items(items, self.model, new_tokens=max_new_tokens, prompt_of=prompt_of)
        self._judge = None if reward is None else Judge(reward, allow_code=allow_code)
        self._get_reward = get_reward
        self.decoding = Decoding(self.policy, rows=episodes * samples, layer=layer, compiled=compiled)
        self._episodes: dict[int, Episode] = {}

    def episode(self, place: int) -> Episode:
        """The episode at a place.

        Raises:
            TropismError: none has begun there, or a reward failed in it.
        """
        if place not in self._episodes:
            raise TropismError("there is no episode: call reset() first, and again after an error")
        return self._episodes[place]

    def begin(self, chosen: Mapping[int, Any]) -> None:
        """Start these episodes anew: place -> item, or its index.

        Raises:
            DataError: no such index, or an item without a usable prompt.
        """
        found = {place: self.items.find(item) for place, item in chosen.items()}
        rows = {place: range(place * self.samples, (place + 1) * self.samples) for place in chosen}
        for place in chosen:
            self._episodes.pop(place, None)
        prompts = {row: found[place][1].ids for place in chosen for row in rows[place]}
        self.decoding.begin(prompts, new_tokens=self.max_new_tokens)
        for place, (item, prompt) in found.items():
            text = replace(prompt, ids=tuple(without_slots(prompt.ids)))
            samples = [Sample(row=row, text=self._transcriber.completion(text, ())) for row in rows[place]]
            self._episodes[place] = Episode(
                item=item, prompt=prompt, text=text, samples=samples, rewards=[0.0] * self.samples
            )

    def act(self, actions: Mapping[int, Sequence[int]]) -> None:
        """One token of every sample that goes on, in one decode; then the rewards of the step.

        Args:
            actions: place -> one token id per sample, of every episode that is not over. Samples that have ended
                ignore theirs.

        Raises:
            RewardError: a reward failed; the episodes have to begin anew.
        """
        going = {place: self.episode(place) for place in actions}
        growing = [
            (episode, sample, token)
            for place, episode in going.items()
            for sample, token in zip(episode.samples, actions[place], strict=True)
            if sample.finish_reason is None
        ]
        for place in going:
            del self._episodes[place]  # until all has gone well
        self.decoding.advance({sample.row: token for _, sample, token in growing})
        for episode, sample, token in growing:
            self._append(episode, sample, token)
        ended = [(episode, sample) for episode, sample, _ in growing if sample.finish_reason is not None]
        self.decoding.end([sample.row for _, sample in ended])
        grown = {sample.row for _, sample, _ in growing}
        for episode in going.values():
            episode.rewards = self._after_token(episode, grown)
        if ended and self._judge is not None:
            said = self._judge.rewards([(episode.text, sample) for episode, sample in ended])
            for (episode, sample), per_token in zip(ended, said, strict=True):
                sample.rewards = [old + new for old, new in zip(sample.rewards, per_token, strict=True)]
                episode.rewards[sample.row % self.samples] += sum(per_token)
        self._episodes |= going

    def logits(self) -> Tensor:
        """[episodes * samples, V] raw logits of each next token.

        Raises:
            TropismError: no episode has begun, or a reward failed.
        """
        for place in range(len(self.decoding.prompts) // self.samples):
            self.episode(place)
        return self.decoding.logits()

    def close(self) -> None:
        """Give up the cache, and end what the reward has running."""
        self._episodes.clear()
        self.decoding.release()
        if self._judge is not None:
            self._judge.close()

    def _append(self, episode: Episode, sample: Sample, token: int) -> None:
        sample.ids.append(token)
        sample.tokens.append(str(self.tokenizer.convert_ids_to_tokens(token) or ""))  # an id may have no token
        ids, stops = episode.text.ids, self._ends.stops
        if stops is not None and not sample.spelled_stop:
            sample.spelled_stop = stops.ended(() if self.policy.encoder_decoder else ids, sample.ids)
        sample.finish_reason = self._ends.reason(sample.ids, spelled_stop=sample.spelled_stop)
        # A few tokens settle how the completion's text begins; what rewards see is decoded as in training.
        context = episode.text if sample.finish_reason is not None else replace(episode.text, ids=ids[-CONTEXT:])
        sample.text = self._transcriber.completion(context, sample.ids)

    def _after_token(self, episode: Episode, grown: Collection[int]) -> list[float]:
        """What ``get_reward`` says of each sample, once that is added to the rewards of its tokens.

        A sample that has ended before has no new token. What is said of it counts in the last call alone (finish),
        and belongs to its last token.
        """
        said = [0.0] * self.samples
        if self._get_reward is not None:
            tokens = max(len(sample.ids) for sample in episode.samples)
            where = f"get_reward, after token {tokens} of {_shown(episode.text.text)}"
            said = asked(self._get_reward, episode.item, episode.samples, episode.over, where)
        for index, sample in enumerate(episode.samples):
            if sample.row in grown:
                sample.rewards.append(said[index])
            elif episode.over:
                sample.rewards[-1] += said[index]
            else:
                said[index] = 0.0
        return said


def tokens_of(action: Any, samples: int, vocabulary: int) -> list[int]:
    """An action as one token id per sample.

    Args:
        action: a whole number (of one sample), or a list, array or tensor of one per sample.

    Raises:
        TropismError: it is something else, or no token of the vocabulary.
    """
    given = np.asarray(action.cpu() if hasattr(action, "cpu") else action)
    if given.dtype.kind not in "iu" or given.shape not in {(samples,), ()} or (given.ndim == 0 and samples > 1):
        wanted = "a token id" if samples == 1 else f"{samples} token ids, one per sample"
        raise TropismError(f"the action must be {wanted}, not {str(action)[:60]} ({type(action).__name__})")
    tokens: list[int] = given.reshape(-1).tolist()
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise TropismError(f"the action {token} is no token: the vocabulary has the ids 0 to {vocabulary - 1}")
    return tokens


def _shown(text: str | Messages) -> str:
    shown = text if isinstance(text, str) else str(text[-1].get("content", ""))
    return repr(shown if len(shown) <= 60 else f"{shown[:57]}...")
