"""The side of Ray Tune's protocol that is ours: a search that suggests and is told, and a function that runs."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stub_sweeps import Runs
from tropism.errors import ConfigError, TropismError
from tropism.sweeps import ray_backend
from tropism.sweeps.sweep import Sweep
from tropism.sweeps.work import Ended
from tropism.training.interrupt import Interrupted

MakeSweep = Callable[..., Sweep]


@dataclass
class FakeRay:
    """As much of Ray as is called, one trial after the other, in this process."""

    lost: tuple[int, ...] = ()
    """Numbers of suggestions whose worker dies."""
    until: int = 100
    """Suggestions after which Ctrl-C comes."""
    asked: dict[str, Any] = field(default_factory=dict)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Tuner:
            def __init__(self, trainable: Any, *, tune_config: Any, run_config: Any) -> None:
                self.trainable, self.config = trainable, tune_config
                fake.asked |= vars(tune_config) | vars(run_config)

            def fit(self) -> None:
                search = self.config.search_alg
                for number in range(min(self.config.num_samples, fake.until)):
                    suggestion = search.suggest(f"id{number}")
                    if suggestion == Searcher.FINISHED:
                        break
                    json.dumps(suggestion)  # plain values travel everywhere
                    if number in fake.lost:
                        search.on_trial_complete(f"id{number}", None, error=True)
                    else:
                        search.on_trial_complete(f"id{number}", self.trainable(suggestion), error=False)

        class Searcher:
            FINISHED = "FINISHED"

        def with_resources(trainable: Any, resources: Any) -> Any:
            fake.asked["resources"] = resources
            return trainable

        ray, tune, search = ModuleType("ray"), ModuleType("ray.tune"), ModuleType("ray.tune.search")
        members = {"Tuner": Tuner, "with_resources": with_resources, "TuneConfig": SimpleNamespace}
        vars(tune).update(members, RunConfig=SimpleNamespace, search=search)
        vars(search).update(Searcher=Searcher)
        vars(ray).update(
            tune=tune,
            is_initialized=lambda: False,
            init=lambda **options: fake.asked.update(init=options),
            shutdown=lambda: fake.asked.update(shut=True),
        )
        for name, module in (("ray", ray), ("ray.tune", tune), ("ray.tune.search", search)):
            monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> FakeRay:
    fake = FakeRay()
    fake.install(monkeypatch)
    monkeypatch.setattr(ray_backend, "execute", lambda job: runs(job, None))
    return fake


def test_ray_runs_what_a_local_sweep_runs(sweep: MakeSweep, runs: Runs, ray: FakeRay) -> None:
    made = sweep(backend="ray", seeds=2, ray={"cpus": 3, "gpus": 1, "parallel": 4, "address": "auto"})
    rows = made.run()
    by_ray = list(runs.recipes)
    made.folder.rename(made.folder.with_name("by-ray"))
    local = sweep(seeds=2).run()
    assert runs.recipes[len(by_ray) :] == by_ray and len(by_ray) == 10
    assert [(row.state, row.by_seed, row.values) for row in rows] == [
        (row.state, row.by_seed, row.values) for row in local
    ]
    assert ray.asked["resources"] == {"cpu": 3.0, "gpu": 1.0} and ray.asked["max_concurrent_trials"] == 4
    assert ray.asked["init"]["address"] == "auto" and ray.asked["shut"]
    assert ray.asked["storage_path"] == str(made.folder)


def test_a_trial_whose_machine_dies_fails_alone(sweep: MakeSweep, ray: FakeRay) -> None:
    ray.lost = (2,)
    rows = sweep(backend="ray").run()
    assert [row.state for row in rows] == ["complete", "complete", "failed", "complete", "complete"]


def test_an_interrupted_sweep_goes_on_also_here_instead(sweep: MakeSweep, runs: Runs, ray: FakeRay) -> None:
    ray.until = 3
    with pytest.raises(Interrupted):
        sweep(backend="ray").run()
    rows = sweep().run()
    assert [row.state for row in rows] == ["complete"] * 5 and len(runs.jobs) == 5


def test_what_ends_a_sweep_ends_it_after_the_trials_under_way(
    sweep: MakeSweep, ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_backend, "execute", lambda job: Ended(reason="no file"))
    made = sweep(backend="ray", trials=9)
    with pytest.raises(TropismError, match="3 trials have failed"):
        made.run()
    assert len(made.study.trials) == 3 and ray.asked["shut"]


def test_trials_that_cannot_be_built_are_not_sent(sweep: MakeSweep, runs: Runs, ray: FakeRay) -> None:
    parameters = {
        "lora": {"strategy": "grid", "values": [{"rank": 4}, None]},
        "train_layers": {"strategy": "grid", "values": [2, None]},
        "trainer.learning_rate": {"strategy": "choice", "values": [1e-3]},
    }
    rows = sweep(backend="ray", trials=None, parameters=parameters).run()
    assert [row.state for row in rows] == ["failed"] + ["complete"] * 3 and len(runs.jobs) == 3


def test_without_ray_the_error_says_how_to_get_it(sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'pip install "ray\[tune\]"'):
        sweep(backend="ray").run()


def test_the_search_is_pickled_without_the_sweep(sweep: MakeSweep) -> None:
    """Ray Tune writes its search to the disk; a sweep holds open files and the terminal."""
    dispatcher = ray_backend.Dispatcher(sweep())
    assert type(pickle.loads(pickle.dumps(dispatcher))) is object
