"""A Gymnasium environment in which an action is a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from tropism.best_of import text_of
from tropism.envs.completing import Completing, Episode, tokens_of
from tropism.envs.spaces import Env, Observation, action_space, check_settings, observation_space
from tropism.errors import ConfigError, TropismError
from tropism.models.policy import Policy
from tropism.types import FinishReason, Messages, Rollouts, pad_rows


class TextGenerationEnv(Env[Any, Any]):
    """Text generation a token at a time: the state is a prompt and its completions so far, an action the next tokens.

    A step costs one forward pass over one token per sample, whatever the length of the text. Rewards come from
    ``reward``, once a completion has ended, from ``get_reward`` in a subclass, after every token, or from both.

    Args:
        model: anything that ``load_model`` takes (a hub id, a folder, (model, tokenizer), ...), a run folder, or a
            ``TextPolicy``.
        items: texts, lists of chat messages, or records with "prompt" or "input" and whatever the reward needs.
        reward: what a recipe's reward may be: a callable, a name, ``{"name": (reward, weight)}``. Where it gives
            numbers per token, each counts at its token.
        max_new_tokens: most tokens of a completion, the one that ends it included.
        compare_sample: completions of the prompt, side by side. With more than one an action holds a token for each,
            and the reward of a step is their sum; ``info["rewards"]`` has each one's own.
        observation: "hidden", what the vocabulary projection reads [H] ([compare_sample, H]), or "ids", those of the
            prompt and the completion.
        stop: strings that end a completion. stop_token_ids: tokens that do, beside the model's eos.
        prompt_of: makes the text or messages of the prompt from an item; None takes the item's own.
        layer: whose hidden states are observed: -1 is what the vocabulary projection reads, -1 - k what the last k
            transformer blocks read.
        seed: of the choice of items, until ``reset`` gets one.
        compile: decode on the CPU with compiled kernels, as ``Sampling.compile`` does.
        allow_code: let the reward name code: ``module:function`` or ``file.py:function``.

    Raises:
        TropismError: a setting that cannot work, an item without a prompt, or no reward at all.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (Gymnasium declares it so)

    def __init__(
        self,
        model: Any,
        items: Any,
        reward: Any = None,
        *,
        max_new_tokens: int = 100,
        compare_sample: int = 1,
        observation: Observation = "hidden",
        stop: Sequence[str] | str = (),
        stop_token_ids: Sequence[int] = (),
        prompt_of: Callable[[Any], str | Messages] | None = None,
        layer: int = -1,
        seed: int = 0,
        compile: bool = False,
        allow_code: bool = False,
    ) -> None:
        check_settings(observation, compare_sample=compare_sample, max_new_tokens=max_new_tokens)
        own = type(self).get_reward is not TextGenerationEnv.get_reward
        self._completing = Completing(
            model,
            items,
            reward,
            self.get_reward if own else None,
            episodes=1,
            samples=compare_sample,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            prompt_of=prompt_of,
            layer=layer,
            compiled=compile,
            allow_code=allow_code,
        )
        self.policy: Policy = self._completing.policy
        self.tokenizer: Any = self._completing.tokenizer
        self.compare_sample, self.max_new_tokens = compare_sample, max_new_tokens
        self.observation: Observation = observation
        self.action_space = action_space(self._completing.vocabulary, compare_sample)
        self.observation_space = observation_space(
            observation,
            compare_sample,
            width=self._completing.decoding.width,
            vocabulary=self._completing.vocabulary,
        )
        super().reset(seed=seed)

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        """The reward of the newest token of each sample; for a subclass to override.

        It is called after every token. Of a sample that has ended before the others it is heard once more, with
        ``finish``, and what it says then belongs to that sample's last token.

        Args:
            input_item: the item, as it was given.
            predicted_list: tokens so far of each sample, as strings of the vocabulary.
                One that is shorter than the longest had ended: its last token has been paid already.
            finish: whether this was the last token of the episode.

        Returns:
            One number per sample as a list, array or tensor, or one number that counts for every sample.
        """
        return 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin with an item of random choice, or with ``options={"item": item or its index}``.

        Raises:
            TropismError: an unknown option, no such index, or an item without a usable prompt.
        """
        super().reset(seed=seed)
        unknown = sorted(set(options or {}) - {"item"})
        if unknown:
            raise ConfigError(f"reset knows the option 'item' alone, not {', '.join(map(repr, unknown))}")
        given = None if options is None else options.get("item")
        item = int(self.np_random.integers(len(self._completing.items))) if given is None else given
        self._completing.begin({0: item})
        return self._observed(), self._info()

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take a token for every sample; those that have ended ignore theirs, and their reward is 0.

        Returns:
            Observation; the reward, summed over samples; whether all samples ended by themselves; whether the length
            limit ended the episode; and ``info`` with ``rewards``, ``ended``, ``predicted`` (ids) and
            ``predicted_str``, each a list of one entry per sample.

        Raises:
            TropismError: the action is no token of the vocabulary, or the episode is over.
            RewardError: a reward failed or returned something unusable; ``reset`` begins anew.
        """
        if self._episode.over:
            raise TropismError("the episode is over; call reset() before the next step()")
        self._completing.act({0: tokens_of(action, self.compare_sample, self._completing.vocabulary)})
        episode = self._episode
        return self._observed(), float(sum(episode.rewards)), episode.terminated, episode.truncated, self._info()

    def close(self) -> None:
        """Give up the cache, and end what the reward has running; ``reset`` begins anew."""
        self._completing.close()

    @property
    def item(self) -> Any:
        """The item of this episode, as it was given."""
        return self._episode.item

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt, as the policy reads them."""
        return list(self._episode.prompt.ids)

    @property
    def completions(self) -> list[list[int]]:
        """Token ids so far of each sample."""
        return [list(sample.ids) for sample in self._episode.samples]

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each sample ended; None while it goes on."""
        return [sample.finish_reason for sample in self._episode.samples]

    @property
    def token_rewards(self) -> list[list[float]]:
        """Of each sample one reward per token: that of the newest token when it was new, and at the last token what
        was said of the whole completion."""
        return [list(sample.rewards) for sample in self._episode.samples]

    def logits(self) -> Tensor:
        """[compare_sample, V] raw logits of each sample's next token; without meaning where a sample has ended."""
        return self._completing.logits()

    def rollouts(
        self,
        logprobs: Sequence[Sequence[float]],
        behaviour_logprobs: Sequence[Sequence[float]] | None = None,
        values: Sequence[Sequence[float]] | None = None,
        temperature: float = 1.0,
    ) -> Rollouts:
        """The episode as rollouts, one row per sample.

        Args:
            logprobs: of each token of each sample, under the tempered, unfiltered distribution.
            behaviour_logprobs: under the distribution that was sampled from; None: the same.
            values: the critic's before each token; None where there is none.
            temperature: at which ``logprobs`` hold.

        Raises:
            TropismError: the episode goes on, or a list has not one number per token.
        """
        episode = self._episode
        reasons = [sample.finish_reason for sample in episode.samples]
        if not episode.over:
            raise TropismError("the episode goes on; rollouts are of a finished one")
        ids = [sample.ids for sample in episode.samples]
        lengths = [len(row) for row in ids]

        def numbers(given: Sequence[Sequence[float]], name: str) -> Tensor:
            found = [len(row) for row in given]
            if found != lengths:
                raise TropismError(f"{name} has rows of {found} numbers for completions of {lengths} tokens")
            return pad_rows(given, value=0.0, dtype=torch.float32)

        own = numbers(logprobs, "logprobs")
        prompts = [episode.prompt.ids] * self.compare_sample
        return Rollouts(
            prompt_ids=pad_rows(prompts, left=True),
            prompt_lengths=torch.tensor([len(row) for row in prompts]),
            completion_ids=pad_rows(ids),
            completion_lengths=torch.tensor(lengths),
            logprobs=own,
            behaviour_logprobs=(
                own.clone() if behaviour_logprobs is None else numbers(behaviour_logprobs, "behaviour_logprobs")
            ),
            finish_reasons=tuple(reason for reason in reasons if reason is not None),
            values=None if values is None else numbers(values, "values"),
            temperature=temperature,
        )

    @property
    def _episode(self) -> Episode:
        return self._completing.episode(0)

    def _observed(self) -> Any:
        if self.observation == "hidden":
            states = self._completing.decoding.observed.float().cpu().numpy()
            return states[0].copy() if self.compare_sample == 1 else states.copy()
        prompt = self._episode.text.ids
        rows = tuple((*prompt, *sample.ids) for sample in self._episode.samples)
        return rows[0] if self.compare_sample == 1 else rows

    def _info(self) -> dict[str, Any]:
        episode = self._episode
        return {
            "rewards": list(episode.rewards),
            "ended": [sample.finish_reason is not None for sample in episode.samples],
            "predicted": [list(sample.ids) for sample in episode.samples],
            "predicted_str": [text_of(sample.text) for sample in episode.samples],
        }
