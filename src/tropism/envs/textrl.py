"""TextRL's interface: an environment to subclass, an actor, an agent, and a training loop, over this library's engine.

class MyRLEnv(TextRLEnv):
    def get_reward(self, input_item, predicted_list, finish):
        return [float(finish and "!" in tokens) for tokens in predicted_list]

env = MyRLEnv(model, tokenizer, observation_input=[{"input": "The film was"}], max_length=20, compare_sample=2)
actor = TextRLActor(env, model, tokenizer, act_deterministically=False)
agent = actor.agent_ppo(update_interval=20, minibatch_size=20, epochs=4)
train_agent_with_evaluation(agent, env, steps=1000, eval_n_steps=None, eval_n_episodes=4, eval_interval=200,
                            outdir="somewhere")
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tropism.envs.items import OwnItem
from tropism.envs.text_generation import TextGenerationEnv
from tropism.envs.textrl_acting import Acting
from tropism.envs.textrl_agent import TextRLAgent
from tropism.envs.textrl_learning import Learner, TextRLPPO
from tropism.envs.textrl_training import train_agent_with_evaluation
from tropism.errors import ConfigError, DataError, ModelError
from tropism.generation import TextPolicy
from tropism.models.freezing import train_last_layers
from tropism.models.loading import load_model
from tropism.models.policy import Policy
from tropism.models.trunk import FrozenTrunk
from tropism.rollouts.randomness import StreamKey
from tropism.types import FinishReason, Messages

__all__ = ["TextRLActor", "TextRLAgent", "TextRLEnv", "TextRLPPO", "train_agent_with_evaluation"]

logger = logging.getLogger("tropism")


class TextRLEnv:
    """A text generation environment as TextRL has it, whose steps are those of ``TextGenerationEnv``.

    ``reset`` and ``step`` return what they do in TextRL (the old Gym's four values); what takes Gymnasium's five is
    ``TextGenerationEnv``.

    Args:
        model: a transformers causal (or encoder-decoder) language model; it stays on its device.
        tokenizer: the model's.
        observation_input: items: ``{"input": prompt, ...}`` with whatever the reward needs, lists that begin with the
            prompt, or plain prompts.
        max_length: most tokens of a completion, the one that ends it included.
        compare_sample: completions of each prompt, side by side.
        unfreeze_layer_from_past: what the actor is given; kept for it, and told from here.
        seed: of the choice of items.

    Raises:
        DataError: an item without a prompt.
        ModelError: model and tokenizer do not fit, or the model is an adapter model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        observation_input: Sequence[Any] = (),
        max_length: int = 100,
        compare_sample: int = 2,
        unfreeze_layer_from_past: int = 0,
        *,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ModelError(
                f"TextRLEnv takes a transformers model, not {type(model).__name__}; merge an adapter into its model "
                "first, or train it with tropism.train(lora=...)"
            )
        if isinstance(observation_input, (str, Mapping)):
            raise DataError("observation_input is a list of items; put the one item into a list")
        loaded = load_model((model, tokenizer))
        self.model, self.tokenizer = model, tokenizer
        self.policy = Policy(loaded.model)
        self.text = TextPolicy(self.policy, loaded)
        """The model as it is at any moment, for ``env.text.generate(prompts)``."""
        self.observation_space = list(observation_input)
        self.compare_sample, self.unfreeze_layer_from_past = compare_sample, unfreeze_layer_from_past
        self.env_max_length = min(max_length, int(min(tokenizer.model_max_length, 2**31)))
        self.episode = 0
        """Counts resets."""
        self.observation: Tensor | None = None
        """[compare_sample, H], what the last reset or step returned."""
        self.judges = True
        """Whether ``get_reward`` is asked; ``TextRLActor.predict`` has no use for it."""
        self._random = np.random.default_rng(seed)
        self._inner: _Completions | None = None
        self._item: Any = None
        if type(self).gat_obs_input is TextRLEnv.gat_obs_input:
            for item in self.observation_space:
                self.gat_obs_input(_as_item(item))

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        """The reward of the newest tokens, for a subclass to override; it is called after every token.

        Args:
            input_item: the item; a plain prompt as ``{"input": prompt}``.
            predicted_list: per sample the tokens so far, as strings of the vocabulary.
                One that is shorter than the longest had ended: its last token has been paid already.
            finish: whether this was the last token of all samples.

        Returns:
            One number per sample (list, array or tensor), or one that counts for every sample.
        """
        return [0] * self.compare_sample

    def gat_obs_input(self, input_item: Any) -> str | Messages:
        """The prompt of an item, for a subclass to override (its name is TextRL's).

        Raises:
            DataError: the item has none.
        """
        if isinstance(input_item, Mapping):
            for key in ("input", "prompt"):
                if input_item.get(key) is not None:
                    return input_item[key]  # type: ignore[no-any-return]
        elif isinstance(input_item, (list, tuple)) and input_item and isinstance(input_item[0], str):
            return input_item[0]
        raise DataError(
            f"the item {str(input_item)[:80]!r} has no prompt: give {{'input': prompt, ...}}, a list that begins with "
            "the prompt, or the prompt itself; or override gat_obs_input"
        )

    @property
    def actions(self) -> list[str]:
        """The vocabulary's strings by id; "" where an id has none."""
        size = int(self.policy.language_model.get_output_embeddings().weight.shape[0])
        by_id = {token_id: token for token, token_id in self.tokenizer.get_vocab().items()}
        return [by_id.get(token_id, "") for token_id in range(size)]

    @property
    def rewards_something(self) -> bool:
        """Whether ``get_reward`` is a subclass's own."""
        return type(self).get_reward is not TextRLEnv.get_reward

    def reset(self, input_item: Any = None) -> Tensor:
        """Begin with an item, or with a random one of ``observation_input``.

        Returns:
            [compare_sample, H] hidden states of the prompt's last token, which the next token is chosen from.

        Raises:
            DataError: no item, or one without a usable prompt.
        """
        if input_item is None:
            if not self.observation_space:
                raise DataError("there are no items to begin with; pass observation_input, or reset(item)")
            input_item = self.observation_space[int(self._random.integers(len(self.observation_space)))]
        self._item = _as_item(input_item)
        if self._inner is None:
            self._inner = _Completions(self)
        state, _ = self._inner.reset(options={"item": OwnItem(self._item)})
        self.episode += 1
        return self._observed(state)

    def step(self, action: Any) -> tuple[Tensor, np.ndarray[Any, Any], bool, dict[str, Any]]:
        """Take one token per sample; samples that have ended ignore theirs.

        Returns:
            [compare_sample, H] hidden states; [compare_sample] rewards; whether all samples have ended; and
            ``{"predicted_str": texts so far}``.

        Raises:
            TropismError: no such tokens, or the episode is over.
            RewardError: ``get_reward`` failed or returned something unusable.
        """
        ids = np.asarray(action.cpu() if isinstance(action, Tensor) else action)
        taken = ids.reshape(-1)[0] if self.compare_sample == 1 and ids.size == 1 else ids
        state, _, terminated, truncated, info = self._begun.step(taken)
        rewards = np.asarray(info["rewards"], dtype=np.float64)
        return self._observed(state), rewards, terminated or truncated, {"predicted_str": info["predicted_str"]}

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the prompt."""
        return self._begun.prompt_ids

    @property
    def completions(self) -> list[list[int]]:
        """Token ids so far of each sample."""
        return self._begun.completions

    @property
    def finish_reasons(self) -> list[FinishReason | None]:
        """Why each sample ended; None while it goes on."""
        return self._begun.finish_reasons

    def logits(self) -> Tensor:
        """[compare_sample, V] raw logits of each sample's next token."""
        return self._begun.logits()

    @property
    def _begun(self) -> _Completions:
        if self._inner is None:
            raise ConfigError("the environment has not begun; call reset() first")
        return self._inner

    def _observed(self, state: Any) -> Tensor:
        self.observation = torch.from_numpy(np.asarray(state)).reshape(self.compare_sample, -1)
        return self.observation


class _Completions(TextGenerationEnv):
    """The environment below, which asks a ``TextRLEnv`` for prompts and rewards."""

    def __init__(self, outer: TextRLEnv) -> None:
        self.outer = outer
        separator = outer.tokenizer.sep_token_id
        super().__init__(
            outer.text,
            [outer._item],
            max_new_tokens=outer.env_max_length,
            compare_sample=outer.compare_sample,
            stop_token_ids=() if separator is None else (int(separator),),
            prompt_of=outer.gat_obs_input,
        )

    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> Any:
        return self.outer.get_reward(input_item, predicted_list, finish) if self.outer.judges else 0.0


class TextRLActor:
    """Chooses tokens, predicts, and makes the agent.

    What is trained is decided here: the output embedding and the final norm, with the last ``unfreeze_layer_from_past``
    blocks; the rest of the model is frozen, and the log says what is what. The head alone (0) of a model whose output
    embedding is tied to its input embedding becomes a matrix of its own.

    Args:
        env, model, tokenizer: the environment, and what it was made with.
        optimizer: "sgd" or "adamw".
        gpu_id: TextRL's; the model stays on the device where it is, whatever this says.
        unfreeze_layer_from_past: how many of the last transformer blocks are trained; 0 takes what the environment
            says.
        act_deterministically: ``predict`` and evaluation take the most likely token; training always samples.
        temperature, top_k, top_p, repetition_penalty: of sampling; the penalty is on tokens that the completion holds.
        compare_sample: that of the environment, for code that names it here, too.

    Raises:
        ConfigError: a setting that cannot work, or contradicts the environment.
        ModelError: no such number of blocks.
    """

    def __init__(
        self,
        env: TextRLEnv,
        model: Any,
        tokenizer: Any,
        optimizer: str = "sgd",
        gpu_id: int | None = 0,
        unfreeze_layer_from_past: int = 0,
        act_deterministically: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        compare_sample: int | None = None,
    ) -> None:
        if model is not env.model or tokenizer is not env.tokenizer:
            raise ConfigError("the environment was made with another model or tokenizer; give the actor the same ones")
        if compare_sample is not None and compare_sample != env.compare_sample:
            raise ConfigError(
                f"compare_sample is {compare_sample} here and {env.compare_sample} in the environment, which decides; "
                "give it there"
            )
        layers = {unfreeze_layer_from_past, env.unfreeze_layer_from_past} - {0} or {0}
        if len(layers) > 1:
            raise ConfigError(
                f"unfreeze_layer_from_past is {unfreeze_layer_from_past} here and {env.unfreeze_layer_from_past} in "
                "the environment; give the same number to both, or to one of them"
            )
        self.acting = Acting(
            act_deterministically=act_deterministically,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        self.env, self.optimizer, self.gpu_id = env, optimizer, gpu_id
        self.unfreeze_layer_from_past = layers.pop()
        self.agent: TextRLAgent | None = None
        self._predictions = 0
        try:
            train_last_layers(model, self.unfreeze_layer_from_past)
        except ModelError as error:  # by the name that it has here
            raise ModelError(str(error).replace("train_layers", "unfreeze_layer_from_past")) from error
        FrozenTrunk.attach(env.policy, self.unfreeze_layer_from_past)

    def agent_ppo(
        self,
        update_interval: int = 10,
        minibatch_size: int = 3000,
        epochs: int = 20,
        lr: float = 3e-6,
        **settings: Any,
    ) -> TextRLAgent:
        """A learner of the environment's rewards.

        Args:
            update_interval: steps of the environment (a token of each sample) between updates.
            minibatch_size: steps per optimizer step. epochs: passes over the stored steps. lr: learning rate.
            settings: further fields of ``TextRLPPO``, such as ``kl_coef``.

        Raises:
            ConfigError: a setting that cannot work, or an environment that rewards nothing.
        """
        if not self.env.rewards_something:
            raise ConfigError(
                f"{type(self.env).__name__} does not override get_reward, so every reward is 0 and nothing can be "
                "learned; build the environment from your own subclass of TextRLEnv"
            )
        ppo = TextRLPPO(
            update_interval=update_interval, minibatch_size=minibatch_size, epochs=epochs, lr=lr, **settings
        )
        learner = Learner(self.env.policy, ppo, optimizer=self.optimizer)
        self.agent = TextRLAgent(self.env, learner, self.acting, layers=self.unfreeze_layer_from_past)
        return self.agent

    def predict(self, input_item: Any, max_episode_len: int | None = None) -> list[str]:
        """The model's completions of an item or a prompt, ``compare_sample`` of them; rewards are not asked.

        A training episode that is under way in the environment is left.

        Args:
            max_episode_len: most tokens, where that is fewer than the environment's limit.

        Raises:
            DataError: an item without a usable prompt.
        """
        env = self.env
        if self.agent is not None:
            self.agent.forget_episode()
        key = StreamKey(seed=0, purpose="generate", collect=self._predictions)
        self._predictions += 1
        env.judges = False
        try:
            env.reset(input_item)
            for _ in range(max_episode_len or env.env_max_length):
                going = [reason is None for reason in env.finish_reasons]
                greedy = self.acting.act_deterministically
                choice = self.acting.choose(env.logits(), env.completions, going, key=key, greedy=greedy)
                _, _, done, info = env.step(choice.tokens)
                if done:
                    break
        finally:
            env.judges = True
        return list(info["predicted_str"])


def _as_item(item: Any) -> Any:
    """An item as rewards see it: a plain prompt becomes a record."""
    return {"input": item} if isinstance(item, str) else item
