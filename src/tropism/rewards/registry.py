"""Rewards that a recipe may name, and the decorator by which Python users add theirs."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tropism.errors import ConfigError
from tropism.rewards.config import closest

RewardFn = Callable[..., Any]
"""A reward function: any callable, sync or async, by the calling convention of docs/rewards.md."""

FACTORIES: dict[str, str] = {
    "vader": "tropism.rewards.lexicon:vader",
    "words": "tropism.rewards.rules:words",
    "keywords": "tropism.rewards.rules:keywords",
    "length": "tropism.rewards.rules:length",
    "regex": "tropism.rewards.rules:regex",
    "repetition": "tropism.rewards.rules:repetition",
    "number_answer": "tropism.rewards.numeric:number_answer",
    "overlap": "tropism.rewards.overlap:overlap",
    "classifier": "tropism.rewards.classifier:classifier",
    "profanity": "tropism.rewards.profanity:profanity",
    "remote": "tropism.rewards.remote:remote",
    "reward-model": "tropism.rewards.reward_model:reward_model",
    "randomwalks": "tropism.envs.randomwalks:randomwalks",
}
"""Name -> where the factory is. Factories are imported when used: some need torch or an optional package."""

_registered: dict[str, Any] = {}
"""What ``register`` added: reward functions, or classes whose instances are."""

Registered = TypeVar("Registered", bound=Callable[..., Any])


def register(name: str) -> Callable[[Registered], Registered]:
    """Decorator that lets recipes of this process use a reward function (or a class of callable objects) by name.

    ``args`` of the recipe are bound to the function as keyword arguments, or given to the class.

    Raises:
        ConfigError: a name of the library's own rewards, or one with ':' in it.
    """
    if name in FACTORIES:
        raise ConfigError(f"the reward name {name!r} belongs to the library; register yours under another name")
    if not name.strip() or ":" in name or "/" in name:
        raise ConfigError(f"a reward cannot be registered as {name!r}: use a plain name without ':' and '/'")

    def add(reward: Registered) -> Registered:
        _registered[name] = reward
        return reward

    return add


def reward_names() -> list[str]:
    """Every name a recipe may use now, sorted."""
    return sorted({*FACTORIES, *_registered})


def registered(name: str) -> Any:
    """What ``register`` added under a name.

    Raises:
        ConfigError: nothing.
    """
    if name not in _registered:
        raise ConfigError(f"unknown reward {name!r}. {closest(name, reward_names())}")
    return _registered[name]


def make_reward(name: str, args: Mapping[str, Any]) -> RewardFn:
    """The reward function of a registered name.

    Raises:
        ConfigError: unknown name or argument (names the closest), a missing argument, or a value the reward refuses.
    """
    if name in _registered:
        return bind_arguments(_registered[name], args, f"reward {name!r}")
    if name not in FACTORIES:
        hint = " Code is given as file.py:function or module:function." if "." in name else ""
        raise ConfigError(f"unknown reward {name!r}. {closest(name, reward_names())}{hint}")
    module, _, attribute = FACTORIES[name].partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    check_arguments(factory, args, f"reward {name!r}", complete=True)
    try:
        reward: RewardFn = factory(**args)
    except ConfigError as error:
        raise ConfigError(f"reward {name!r}: {error}") from error
    return reward


def bind_arguments(reward: Any, args: Mapping[str, Any], what: str) -> RewardFn:
    """A function with keyword arguments bound, or an instance of a class made with them."""
    if inspect.isclass(reward):
        check_arguments(reward, args, what, complete=True)
        instance = reward(**args)
        if not callable(instance):
            raise ConfigError(f"{what}: objects of class {reward.__name__} cannot be called; define __call__")
        return instance
    if not args:
        return reward  # type: ignore[no-any-return]
    check_arguments(reward, args, what, complete=False)
    return functools.partial(reward, **args)


def check_arguments(function: Callable[..., Any], args: Mapping[str, Any], what: str, *, complete: bool) -> None:
    """Refuse an argument the function does not take and, if ``complete``, the lack of one that it needs."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return
    by_name = {name: p for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in args:
            if name not in by_name:
                raise ConfigError(f"{what} takes no argument {name!r}. {closest(name, by_name)}")
    if complete:
        missing = [name for name, p in by_name.items() if p.default is p.empty and name not in args]
        if missing:
            raise ConfigError(f"{what} needs the argument {missing[0]!r}; it takes: {', '.join(by_name)}")
