"""From the recipe of a reward model to a run: its judgements, its scale, its export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from tropism.algorithms.reward_modeling import RewardModeling
from tropism.build import Assembly
from tropism.classifier_inputs import ClassifierInputs
from tropism.data.expected_records import expecting
from tropism.data.order import fingerprint
from tropism.errors import ModelError
from tropism.evaluation.comparisons import ComparisonEvaluation
from tropism.evaluation.report import write_report
from tropism.foreign.reward_facts import Normalised, RewardFacts
from tropism.models.loading import LoadedModel
from tropism.models.reward_files import load_reward_model, save_reward_model
from tropism.models.reward_model import RewardModel
from tropism.recipe_comparisons import Judgements, NormalisationSamples, comparisons_of
from tropism.recipe_identity import note
from tropism.recipe_model import reward_model_of
from tropism.recipe_resumption import Resumption, export_of
from tropism.result import Result
from tropism.text_reward_model import TextRewardModel
from tropism.training.comparisons import ComparisonSource
from tropism.training.normalisation import Normalisation, Scale, measured, rescaling, target_scale
from tropism.training.run import Evaluation
from tropism.training.scoring import TextScorer

NORMAL = Scale(mean=0.0, std=1.0)
PROBE = 9
"""Keys the samples of the check before training, apart from those that are measured."""


@dataclass(kw_only=True)
class ComparisonData:
    """The source of a reward model's batches, and what is held out for evaluation."""

    judgements: Judgements
    recipe: Any
    scorer: TextScorer
    prompts: tuple[()] = ()
    maker: None = None
    answers: None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)

    def make(self) -> ComparisonSource:
        """The source; with it evaluations are there."""
        recipe, judgements = self.recipe, self.judgements
        if judgements.held_out:
            self.held_out.append(fingerprint(judgements.held_out))
            self.evaluations.append(ComparisonEvaluation(judgements.held_out, kind=judgements.kind, score=self.scorer))
        return ComparisonSource(
            judgements.train, kind=judgements.kind, batch_size=recipe.prompts_per_step, seed=recipe.seed
        )


class RewardModelAssembly(Assembly):
    """Everything that the recipe of a reward model needs, built and connected."""

    policy: Any  # a RewardModel

    def _load(self) -> tuple[LoadedModel, Any]:
        return reward_model_of(self.recipe)

    def _build_reference(self) -> None:
        """None: a reward model is compared with nothing."""

    @cached_property
    def inputs(self) -> ClassifierInputs:
        """How the model reads prompt and completion."""
        config = self.recipe.algorithm
        assert isinstance(config, RewardModeling)
        return ClassifierInputs(
            self.policy.classifier,
            self.loaded.tokenizer,
            text=config.text,
            max_length=config.max_length,
            cut_completion=True,
        )

    @cached_property
    def judgements(self) -> Judgements:
        """What people said."""
        with expecting(self.recipe.algorithm, self.recipe.data):
            return comparisons_of(self.recipe, self.inputs)

    @cached_property
    def text_scorer(self) -> TextScorer:
        """The model over whole texts."""
        return TextScorer(self.policy, self.processes, max_tokens=2 * self.recipe.trainer.micro_batch_tokens)

    def _recipe_source(self) -> Any:
        return ComparisonData(judgements=self.judgements, recipe=self.recipe, scorer=self.text_scorer)

    # Scale -----------------------------------------------------------------------------------------------------------

    @cached_property
    def samples(self) -> NormalisationSamples | None:
        """What the scores are put on a scale with; None where the recipe asks for none."""
        settings = self.recipe.normalise
        if settings is None:
            return None
        return NormalisationSamples(
            self.recipe,
            settings,
            self.inputs,
            judged=self.judgements.train,
            processes=self.processes,
        )

    def check(self) -> None:
        """Memory, and that completions of the policy can be sampled and scored, which may happen at the end alone."""
        super().check()
        if self.samples is not None:
            self.text_scorer(self.samples.rows(self.samples.load(), 2, collect=PROBE))

    normalised: Normalised | None = None
    trained: Mapping[str, float] = MappingProxyType({})
    """Gain and bias as they were trained, where another scale has replaced them."""

    def _connect(self) -> None:
        if self.samples is not None:
            self.identity["normalisation"] = self.samples.identity()
        super()._connect()

    def _compare(self, resumption: Resumption) -> None:
        super()._compare(resumption)
        saved = resumption.checkpoint.state["identity"].get("normalisation")
        if saved != self.identity.get("normalisation"):
            raise ModelError(
                "the policy that the scores are put on a scale with, or its prompts, are not those of the run: files "
                "have changed, or a model given from Python has been trained since. Give them as they were"
            )

    def _write_head(self) -> None:
        settings = self.recipe.normalise
        found = None
        if settings is not None and settings.before and self.checkpoint is None:
            # Before there is a folder: what fails, or is interrupted, leaves none behind.
            targets = [item.target or 0.0 for item in self.judgements.train]
            found = self._normalise(settings, target_scale(self.judgements.kind, targets), collect=0)
        super()._write_head()
        if found is not None:
            self._tell_scale("before", found)

    def _conclude(self) -> None:
        settings = self.recipe.normalise
        if settings is not None and settings.after:
            trained = {"trained_gain": self.policy.gain.item(), "trained_bias": self.policy.bias.item()}
            self.normalised = self._normalise(settings, NORMAL, collect=1)
            self.trained = trained
            self._tell_scale("after", self.normalised)

    def _normalise(self, settings: Normalisation, wanted: Scale, *, collect: int) -> Normalised:
        """Set gain and bias by samples of the policy, and measure what came of it, on fresh ones if there are any."""
        samples = self.samples
        assert samples is not None
        self.run.display.stage("normalising")
        loaded = samples.load()
        self.policy.rescale(gain=1.0, bias=0.0)
        raw = self.text_scorer(samples.rows(loaded, settings.samples, collect=collect))
        gain, bias = rescaling(measured(raw), wanted)
        self.policy.rescale(gain=gain, bias=bias)
        found = measured(gain * raw + bias)
        if settings.check:
            found = measured(self.text_scorer(samples.rows(loaded, settings.check, collect=collect + 2)))
        return Normalised(mean=found.mean, std=found.std, samples=settings.samples, policy=samples.policy_name)

    def _tell_scale(self, when: str, found: Normalised) -> None:
        """Say and note what the scale is, ``before`` or ``after`` training."""
        if not self.processes.is_main:
            return
        gain, bias = self.policy.gain.item(), self.policy.bias.item()
        checked = 0 if self.recipe.normalise is None else self.recipe.normalise.check
        on = f"; on {checked} fresh ones mean {found.mean:.3f}, deviation {found.std:.3f}" if checked else ""
        self.run.display.say(
            f"normalised {when} training on {found.samples} completions of {found.policy}: gain {gain:.4g}, bias "
            f"{bias:.4g}{on}"
        )
        facts = {"gain": gain, "bias": bias, "samples": found.samples, "mean": found.mean, "std": found.std}
        note(self.folder.path, **{f"normalised_{when}": facts})

    # After -----------------------------------------------------------------------------------------------------------

    @property
    def facts_of_model(self) -> RewardFacts:
        """What the model's folder says of it; gain and bias are put in when it is written."""
        config = self.recipe.algorithm
        assert isinstance(config, RewardModeling)
        return RewardFacts(
            text=config.text,
            max_length=config.max_length,
            gain=self.policy.gain.item(),
            bias=self.policy.bias.item(),
            offset=0.0,
            normalised=self.normalised,
            **self.trained,
        )

    def _export(self) -> None:
        save_reward_model(self.policy, self.loaded.tokenizer, self.folder.path / "model", self.facts_of_model)
        write_report(self.folder.path)
        note(self.folder.path, exported=export_of(self.trainer.state_dict()))

    def finished_result(self, resumption: Resumption) -> Result:
        """The result of a finished run: the model as it was written, scale included."""
        self.run.take_up(resumption.checkpoint)
        if self.processes.is_main:
            self.run.display.say(resumption.end)
        model, tokenizer, facts = load_reward_model(self.folder.path / "model")
        return self._result(TextRewardModel(model, tokenizer, facts))

    def result(self) -> Result:
        assert isinstance(self.policy, RewardModel)
        return self._result(TextRewardModel(self.policy, self.loaded.tokenizer, self.facts_of_model))

    def _result(self, trained: TextRewardModel) -> Result:
        return Result(trained=trained, metrics=dict(self.run.recent), path=self.folder.path)
