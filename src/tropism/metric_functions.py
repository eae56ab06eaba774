"""Metrics of a user's own: functions that are called on held-out completions as rewards are, and change no training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tropism.errors import ConfigError, RewardError
from tropism.rewards.attempts import failure_of
from tropism.rewards.calling import AsyncRunner, TrainerState, call_reward, row_data, without_gradients
from tropism.rewards.config import RewardTerm, callable_name, closest
from tropism.rewards.raw import checked_values
from tropism.rewards.registry import RewardFn
from tropism.rewards.resolve import resolve_reward

if TYPE_CHECKING:
    from tropism.types import RewardInputs

Measured = dict[str, list[float | None]]
"""Name -> one number per completion, None where a function has none."""

RESERVED = frozenset(
    {
        "reward",
        "gold",
        "sequence_kl",
        "length_mean",
        "eos_fraction",
        "distinct_2",
        "loss",
        "accuracy",
        "accuracy_longest",
        "accuracy_shortest",
        "accuracy_first",
        "accuracy_majority",
        "accuracy_chance",
        "pair_accuracy",
        "pair_accuracy_longest",
        "pairs",
        "calibration_error",
        "overconfidence",
        "pearson",
        "spearman",
        "pearson_length",
        "label_mean",
        "label_variance",
        "chosen",
        "rejected",
        "margin",
        "liked",
        "disliked",
        "reference_point",
    }
)
"""``eval/<these>`` are the library's own."""


@dataclass(frozen=True, kw_only=True)
class MetricTerm:
    """One function that measures held-out completions."""

    use: str | Callable[..., Any]
    """What a reward's ``use`` may be: a registered name, the folder of a trained reward model, ``file.py:function`` or
    ``module:function`` (needs --allow-code), or, from Python, any callable."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of a registered name, or keyword arguments bound to a function."""

    def __post_init__(self) -> None:
        self.as_reward()

    def as_reward(self) -> RewardTerm:
        """The same as a term of a reward, by which it is found.

        Raises:
            ConfigError: a value that cannot be used.
        """
        return RewardTerm(use=self.use, args=self.args)

    @classmethod
    def of(cls, value: Any) -> MetricTerm:
        """From a callable, a name, or a mapping of this class's fields."""
        if isinstance(value, MetricTerm):
            return value
        if not isinstance(value, Mapping):
            return cls(use=value)
        known = [f.name for f in fields(cls)]
        for key in value:
            if key not in known:
                if key in [f.name for f in fields(RewardTerm)]:
                    raise ConfigError(f"the key {key!r} belongs to rewards; leave it out")
                raise ConfigError(f"the key {key!r} is unknown. {closest(str(key), known)}")
        if "use" not in value:
            raise ConfigError(f"a metric needs `use`: a name or a function; got {dict(value)!r:.100}")
        return cls(**value)


def metrics_of(value: Any) -> dict[str, MetricTerm]:
    """Named metrics from any form a user may give them in: a callable, a name, a list of these, or a mapping of names.

    Raises:
        ConfigError: another type, an unknown key, or a name that is taken or given twice.
    """
    if isinstance(value, Mapping):
        named = list(value.items())
    else:
        entries = value if isinstance(value, list | tuple) else [value]
        if not all(callable(entry) or isinstance(entry, (str, MetricTerm)) for entry in entries):
            raise ConfigError("metrics: give a function, a name, a list of these, or a mapping of names to them")
        terms = [MetricTerm.of(entry) for entry in entries]
        named = [(_given_name(term), term) for term in terms]
    found: dict[str, MetricTerm] = {}
    for name, entry in named:
        check_name(name)
        if name in found:
            raise ConfigError(f"metrics: two are called {name!r}; name them: {{'{name}': ..., 'other_name': ...}}")
        try:
            found[name] = MetricTerm.of(entry)
        except ConfigError as error:
            raise ConfigError(f"metrics.{name}: {error}") from error
    return found


def check_name(name: Any) -> None:
    """Refuse what cannot be a metric's name, or is one of the library's.

    Raises:
        ConfigError: says which name and why.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable() or set(name) & {"/", "@"}:
        raise ConfigError(f"metrics: the name {name!r:.80} must be printable text without '/' and '@'")
    if name in RESERVED:
        raise ConfigError(
            f"metrics: eval/{name} is a metric of the library; give yours another name: {{'my_{name}': ...}}"
        )


def _given_name(term: MetricTerm) -> str:
    """The function's own name, or the registered one."""
    if not isinstance(term.use, str) and callable_name(term.use) == "reward":  # a lambda has none
        return "metric"
    return term.as_reward().name


class MetricFunctions:
    """The metrics of a run, called on completions.

    A function is called as a reward function is (docs/rewards.md), but for ``log_metric`` and ``log_extra``. It returns
    one number per completion, None where it has none; or a mapping of names to such lists, which are metrics of
    those names then.

    Raises:
        ConfigError: a function that cannot be found or called, or code that is not allowed.
    """

    def __init__(self, terms: Mapping[str, MetricTerm], *, allow_code: bool = False) -> None:
        self.terms = terms
        self._runner = AsyncRunner()
        self._functions: dict[str, RewardFn] = {}
        for name, term in terms.items():
            if isinstance(term.use, str) and ":" in term.use and not allow_code:
                raise ConfigError(
                    f"the metric {name!r} ({term.use}) runs code of your machine. If you trust it, allow it: "
                    "--allow-code on the command line, allow_code=True in Python (or pass the function itself)"
                )
            try:
                self._functions[name] = resolve_reward(term.as_reward(), allow_code=allow_code)
            except ConfigError as error:
                raise ConfigError(f"metrics.{name}: {error}") from error

    def evaluate(self, inputs: RewardInputs, *, first_row: int = 0) -> Measured:
        """Call every function on B completions; with B = 0 none is called.

        Args:
            first_row: the number of the first of these rows among those of all processes, for messages.

        Raises:
            RewardError: a function raised, asks for something that is not there, or returned something unusable.
            ConfigError: it returned a metric of a name that is taken.
        """
        found: Measured = {}
        for name, function in self._functions.items() if len(inputs) else ():
            measured = self._measured(name, function, inputs, first_row)
            for metric, values in measured.items():
                if metric in found or (metric != name and metric in self._functions):
                    raise ConfigError(f"{self._where(name, inputs)} returned {metric!r}, as another metric is called")
                found[metric] = values
        return found

    def close(self) -> None:
        """End the event loop, where there is one."""
        self._runner.close()

    def _measured(self, name: str, function: RewardFn, inputs: RewardInputs, first_row: int) -> Measured:
        """What one function says: under its name, or under the names that it gives."""
        data = {key: [v.copy() if type(v) is list else v for v in values] for key, values in row_data(inputs).items()}
        place = ""
        try:
            with without_gradients():
                returned = call_reward(function, data | {"trainer_state": TrainerState(inputs.trainer_state)})
                if inspect.isawaitable(returned):
                    returned = self._runner.run(returned)
            if not isinstance(returned, Mapping):
                return {name: _numbers(returned, len(inputs))}
            measured: Measured = {}
            for metric, values in returned.items():
                check_name(metric)
                place = f", as {metric!r},"
                measured[metric] = _numbers(values, len(inputs))
            return measured
        except ConfigError as error:
            raise ConfigError(f"{self._where(name, inputs)}: {error}") from error
        except (Exception, SystemExit) as error:  # sys.exit() in a metric must not end a run as if all were well
            failure = failure_of(error)
            where = self._where(name, inputs) + place
            if failure.row is not None:
                where += f" for row {first_row + failure.row} (prompt {_head(inputs.prompts[failure.row])})"
            raise RewardError(f"{where}{failure.what}") from error

    def _where(self, name: str, inputs: RewardInputs) -> str:
        """'metric 'readable' (my_function), after step 3', as error messages begin."""
        use = self.terms[name].use
        function = use if isinstance(use, str) else callable_name(use)
        step = inputs.trainer_state.get("step")
        shown = f" ({function})" if function not in (name, "reward") else ""
        when = "" if step is None else f", after step {step}" if step else ", before step 1"
        return f"metric {name!r}{shown}{when}"


def _numbers(returned: Any, rows: int) -> list[float | None]:
    values = checked_values(returned, [None] * rows, called="number")
    return [None if value is None else float(value) for value in values]  # type: ignore[arg-type]  # no lists by now


def _head(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The beginning of a prompt, for messages."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    return repr(text if len(text) <= 60 else text[:57] + "...")
