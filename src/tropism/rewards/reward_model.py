"""A reward model that was trained here, as a reward: found by its folder, on the scale that it was saved with.

Torch is imported when a model is loaded, so that naming one stays cheap.
"""

from __future__ import annotations

import hashlib
import logging
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tropism.errors import ConfigError
from tropism.foreign.reward_facts import FILE, RewardFacts
from tropism.rewards.config import RewardTerm
from tropism.rewards.registry import reward_names

if TYPE_CHECKING:
    from tropism.classifier_inputs import ReadText
    from tropism.rewards.classifier import ClassifierReward

logger = logging.getLogger("tropism")

NAME = "reward-model"
"""What recipes call this reward."""

_WHOLE_BYTES = 2**26
_BLOCK, _BLOCKS = 2**18, 64


def reward_model(model: str, batch_size: int = 16, device: str | None = None) -> RewardModelReward:
    """Load a trained reward model as a reward: gain * logit + bias, as it was trained and normalised.

    Args:
        model: the run folder of a reward model, or its model folder.
        batch_size: texts per forward pass.
        device: by default CUDA or MPS where there is one, else the CPU.

    Raises:
        ConfigError: there is no such folder, the run has not finished, or the folder holds something else.
        ModelError: the model is damaged.
    """
    from tropism.rewards.classifier import classifier

    folder = find_reward_model(model)
    facts = facts_of(folder)
    score = classifier(
        str(folder),
        text=cast("ReadText", facts.text),
        batch_size=batch_size,
        max_length=facts.max_length,
        cut_completion=True,  # as in training
        device=device,
    )
    return RewardModelReward(score, facts.offset)


class RewardModelReward:
    """The reward function that ``reward_model`` makes.

    Args:
        offset: what the head of the model could not carry of its bias.
    """

    def __init__(self, classifier: ClassifierReward, offset: float) -> None:
        self.classifier, self.offset = classifier, offset

    def __call__(self, prompts: list[Any], completions: list[Any]) -> list[float | None]:
        logits = self.classifier(prompts, completions)
        return [None if logit is None else logit + self.offset for logit in logits]


def names_folder(use: str) -> bool:
    """Whether a term's ``use`` is a path, and no name or code reference: it has a "/", or is a folder that is there."""
    if ":" in use or use.endswith(".py") or use in reward_names():
        return False
    return "/" in use or Path(use).expanduser().is_dir()


def folder_named(term: RewardTerm) -> str | None:
    """The folder of the reward model that a term names, as it is written there; None where it names something else."""
    if term.use == NAME:
        model = term.args.get("model")
        return None if model is None else str(model)
    return term.use if isinstance(term.use, str) and names_folder(term.use) else None


def find_reward_model(source: str | Path) -> Path:
    """The model folder of a reward model, which its run folder may stand for.

    Raises:
        ConfigError: says what is there instead, and what to do.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"there is no folder {folder} (seen from {Path.cwd()})"
        raise ConfigError(
            f"{what}{_closest(folder)}; a reward model is given by its run folder, such as runs/my-rm, or by the model "
            "folder in it"
        )
    if (folder / "recipe.yaml").is_file():
        if not (folder / "model").is_dir():
            raise ConfigError(
                f"the run {folder} has no model yet; finish it with `tropism train --resume {folder}`, and use it then"
            )
        folder = folder / "model"
    if (folder / FILE).is_file():
        return folder
    if (folder / "model" / FILE).is_file():
        return folder / "model"
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"the model in {folder} was not trained as a reward model (it has no {FILE}): a policy gives no scores. "
            "Train one with algorithm: reward-model, or use a plain classifier by {use: classifier, args: {model: "
            f"{folder}}}}}"
        )
    raise ConfigError(f"the folder {folder} holds no model; give the run folder of a reward model, such as runs/my-rm")


def facts_of(folder: Path) -> RewardFacts:
    """What ``find_reward_model``'s folder says of itself.

    Raises:
        ModelError: the file is damaged.
    """
    facts = RewardFacts.read(folder)
    assert facts is not None
    return facts


def warn_without_scale(term: RewardTerm) -> None:
    """Say so where a term is a reward model that was never normalised.

    Raises:
        ConfigError: it is none that can be found.
    """
    named = folder_named(term)
    if named is not None and term.weight != 0 and facts_of(find_reward_model(named)).normalised is None:
        logger.warning(
            "the reward model %s was never normalised, so its scores have no known scale: a fixed penalty such as "
            "missing_eos.score, and kl_coef, mean nothing beside them. Train it with `normalise: {samples: 256}` in "
            "its recipe, which puts the scores of a policy's samples to mean 0 and standard deviation 1",
            named,
        )


def fingerprint(folder: Path) -> str:
    """Digest of the files of a reward model; of large ones their size and 64 blocks at even distances."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogatepass"))
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _closest(folder: Path) -> str:
    """A hint that names the most similar neighbour of a folder that does not exist."""
    if folder.exists() or not folder.parent.is_dir():
        return ""
    names = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    close = get_close_matches(folder.name, names, n=1, cutoff=0.5)
    return f"; did you mean {folder.parent / close[0]}?" if close else ""
