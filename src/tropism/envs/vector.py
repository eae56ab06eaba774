"""Many prompts at a time as one Gymnasium vector environment: one decode moves all of them by a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tropism.best_of import text_of
from tropism.envs.completing import Completing, Episode, tokens_of
from tropism.envs.spaces import (
    AutoresetMode,
    Observation,
    VectorEnv,
    action_space,
    batch_space,
    check_settings,
    observation_space,
)
from tropism.errors import ConfigError
from tropism.types import FinishReason, Messages

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


class TextGenerationVectorEnv(VectorEnv[Any, Any, Any]):
    """``num_envs`` completions side by side, of prompts of any lengths; each step is one decode of one batch.

    A completion that has ended makes place in the next step (Gymnasium's ``AutoresetMode.NEXT_STEP``): its action is
    ignored, its reward is 0, and its observation is that of a new prompt. Prompts that begin together are read in one
    pass.

    Args:
        num_envs: completions at a time.

    The other arguments, and ``get_reward``, are those of ``TextGenerationEnv``; each place has one sample.

    Raises:
        TropismError: a setting that cannot work, an item without a prompt, or no reward at all.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        items: Any,
        reward: Any = None,
        *,
        num_envs: int = 8,
        max_new_tokens: int = 100,
        observation: Observation = "hidden",
        stop: Sequence[str] | str = (),
        stop_token_ids: Sequence[int] = (),
        prompt_of: Callable[[Any], str | Messages] | None = None,
        layer: int = -1,
        seed: int = 0,
        compile: bool = False,
        allow_code: bool = False,
    ) -> None:
        check_settings(observation, num_envs=num_envs, max_new_tokens=max_new_tokens)
        own = type(self).get_reward is not TextGenerationVectorEnv.get_reward
        self._completing = Completing(
            model,
            items,
            reward,
            self.get_reward if own else None,
            episodes=num_envs,
            samples=1,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_token_ids=stop_token_ids,
            prompt_of=prompt_of,
            layer=layer,
            compiled=compile,
            allow_code=allow_code,
        )
        self.policy, self.tokenizer = self._completing.policy, self._completing.tokenizer
        self.num_envs, self.observation, self.max_new_tokens = num_envs, observation, max_new_tokens
        vocabulary = self._completing.vocabulary
        width = self._completing.decoding.width
        self.single_action_space = action_space(vocabulary, 1)
        self.single_observation_space = observation_space(observation, 1, width=width, vocabulary=vocabulary)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        super().reset(seed=seed)

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        """The reward of the newest token of one completion; for a subclass to override.

        Args:
            input_item: the item, as it was given.
            predicted_list: a list with the tokens so far, as strings of the vocabulary.
            finish: whether the completion has ended.

        Returns:
            One number, by itself or in a list, array or tensor.
        """
        return 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin everywhere with items of random choice, or with ``options={"items": [an item or its index, ...]}``.

        Raises:
            TropismError: an unknown option, another number of items than of places, or an unusable one.
        """
        super().reset(seed=seed)
        unknown = sorted(set(options or {}) - {"items"})
        if unknown:
            raise ConfigError(f"reset knows the option 'items' alone, not {', '.join(map(repr, unknown))}")
        given = None if options is None else options.get("items")
        chosen = [self._random_item() for _ in range(self.num_envs)] if given is None else list(given)
        if len(chosen) != self.num_envs:
            raise ConfigError(f"there are {len(chosen)} items for {self.num_envs} environments; give one each")
        self._completing.begin(dict(enumerate(chosen)))
        return self._observed(), self._infos()

    def step(self, actions: Any) -> tuple[Any, Floats, Bools, Bools, dict[str, Any]]:
        """Take a token everywhere, but where the completion had ended: there a new item begins.

        Returns:
            Observations, rewards, terminations (ended by itself) and truncations (by the length limit), each
            [num_envs], and infos with ``predicted`` (ids), ``predicted_str`` and ``finish_reason`` of each place.

        Raises:
            TropismError: not one token of the vocabulary per place.
            RewardError: a reward failed or returned something unusable; ``reset`` begins anew.
        """
        tokens = tokens_of(actions, self.num_envs, self._completing.vocabulary)
        over = [self._episode(place).over for place in range(self.num_envs)]
        going = {place: [token] for place, token in enumerate(tokens) if not over[place]}
        if going:
            self._completing.act(going)
        if any(over):
            self._completing.begin({place: self._random_item() for place, ended in enumerate(over) if ended})
        episodes = [self._episode(place) for place in range(self.num_envs)]
        return (
            self._observed(),
            np.array([episode.rewards[0] for episode in episodes], dtype=np.float64),
            np.array([episode.terminated for episode in episodes], dtype=np.bool_),
            np.array([episode.truncated for episode in episodes], dtype=np.bool_),
            self._infos(),
        )

    def close_extras(self, **kwargs: Any) -> None:
        """Give up the cache, and end what the reward has running."""
        self._completing.close()

    @property
    def items(self) -> list[Any]:
        """The item of each place, as it was given."""
        return [self._episode(place).item for place in range(self.num_envs)]

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Token ids of each prompt, as the policy reads them."""
        return [list(self._episode(place).prompt.ids) for place in range(self.num_envs)]

    @property
    def completions(self) -> list[list[int]]:
        """Token ids so far of each completion."""
        return [list(self._episode(place).samples[0].ids) for place in range(self.num_envs)]

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each completion ended; None while it goes on."""
        return [self._episode(place).samples[0].finish_reason for place in range(self.num_envs)]

    @property
    def token_rewards(self) -> list[list[float]]:
        """One reward per token of each completion; see ``TextGenerationEnv.token_rewards``."""
        return [list(self._episode(place).samples[0].rewards) for place in range(self.num_envs)]

    def logits(self) -> Tensor:
        """[num_envs, V] raw logits of each next token; without meaning where a completion has ended."""
        return self._completing.logits()

    def _episode(self, place: int) -> Episode:
        return self._completing.episode(place)

    def _random_item(self) -> int:
        return int(self.np_random.integers(len(self._completing.items)))

    def _observed(self) -> Any:
        if self.observation == "hidden":
            return self._completing.decoding.observed.float().cpu().numpy().copy()
        episodes = [self._episode(place) for place in range(self.num_envs)]
        return tuple((*episode.text.ids, *episode.samples[0].ids) for episode in episodes)

    def _infos(self) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for place in range(self.num_envs):
            sample = self._episode(place).samples[0]
            found = {
                "predicted": list(sample.ids),
                "predicted_str": text_of(sample.text),
                "finish_reason": sample.finish_reason,
            }
            infos = self._add_info(infos, found, place)
        return infos
