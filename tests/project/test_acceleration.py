"""How the steps of a training are run: measured on a GPU, set by the user, in no identity."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segfit.dataset.phantom import make_phantom
from segfit.errors import MemoryShortageError, warning
from segfit.options import Options, TrainingOptions
from segfit.planning.plan import Plan
from segfit.progress import SILENT
from segfit.project import Project, decide, measuring, trainings
from segfit.project.acceleration import asked_acceleration, fastest_acceleration
from segfit.project.candidate import Workload
from segfit.project.sizing import Sizer
from segfit.specs import Acceleration
from segfit.training.probe import StepCost, TileCost

PLAIN, COMPILED, GRAPH = Acceleration(), Acceleration(compiled=True), Acceleration(graph=True)
BOTH = Acceleration(compiled=True, graph=True)


def costs(**seconds: tuple[float, float]) -> dict[Acceleration, StepCost]:
    """Seconds of a step and until it is run so, by name."""
    known = {"plain": PLAIN, "compiled": COMPILED, "graph": GRAPH, "both": BOTH}
    return {known[name]: StepCost(step, 1.0, setup_s=setup) for name, (step, setup) in seconds.items()}


@pytest.mark.parametrize(
    ("table", "asked", "seconds", "chosen", "factor"),
    [
        (costs(plain=(1, 0), compiled=(0.8, 90), both=(0.7, 95)), {}, 9000.0, BOTH, 0.7),
        (costs(plain=(1, 0), compiled=(0.8, 90), both=(0.79, 95)), {}, 9000.0, COMPILED, 0.8),
        (costs(plain=(1, 0), compiled=(0.99, 90), graph=(0.9, 3)), {}, 9000.0, GRAPH, 0.9),
        (
            costs(plain=(1, 0), compiled=(0.9, 600), graph=(0.99, 3)),
            {},
            2000.0,
            PLAIN,
            1.0,
        ),  # to be ready takes too long
        (costs(plain=(1, 0), compiled=(inf, 1), graph=(inf, 1)), {}, 9000.0, PLAIN, 1.0),  # neither is possible here
        (costs(plain=(inf, 0), compiled=(0.5, 1), both=(0.5, 1)), {}, 9000.0, PLAIN, 1.0),  # nothing to compare with
        (costs(plain=(1, 0), graph=(0.5, 3)), {}, 1000.0, GRAPH, 0.5),  # too short to compile
        ({}, {}, 100.0, PLAIN, 1.0),  # too short for either
        ({}, {"deterministic": True}, 9000.0, PLAIN, 1.0),
        ({}, {"compiled": True, "cuda_graph": False}, 9000.0, COMPILED, 1.0),
        (costs(plain=(1, 0), graph=(0.5, 3)), {"compiled": False}, 9000.0, GRAPH, 0.5),
        (costs(graph=(1, 3), both=(0.5, 90)), {"cuda_graph": True}, 9000.0, BOTH, 0.5),
    ],
)
def test_the_way_that_gives_most_steps_is_taken(
    table: dict[Acceleration, StepCost],
    asked: dict[str, bool],
    seconds: float,
    chosen: Acceleration,
    factor: float,
) -> None:
    found, part = fastest_acceleration(table.__getitem__, TrainingOptions(**asked), seconds)
    assert (found, part) == (chosen, pytest.approx(factor))


def test_what_the_user_set_stands_above_what_was_measured() -> None:
    asked = TrainingOptions(compiled=False)
    assert asked_acceleration(asked, BOTH) == GRAPH
    assert asked_acceleration(asked) == PLAIN
    assert asked_acceleration(TrainingOptions(cuda_graph=True)) == GRAPH
    assert TrainingOptions(compiled=True, cuda_graph=False).values == {}  # they are of no recipe


def _pretend(monkeypatch: pytest.MonkeyPatch) -> list[Acceleration | None]:
    tried: list[Acceleration | None] = []

    def step(*_: Any, acceleration: Acceleration | None = None, tell: Any = None, **__: Any) -> StepCost:
        tried.append(acceleration)
        if acceleration == BOTH:
            raise MemoryShortageError("a graph keeps its memory")
        if acceleration == GRAPH:
            tell(warning("not_accelerated", "no graph here"))
            return StepCost(inf, 1.0)
        return StepCost(0.6 if acceleration == COMPILED else 1.0, 1.0)

    monkeypatch.setattr(measuring, "probe_step", step)
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.01, 0.5))
    return tried


def test_it_is_measured_on_a_gpu_with_what_is_trained(
    tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = _pretend(monkeypatch)
    settings = ["planning.base_features=4", "training.channels_last=false", "training.precision=fp32"]
    project = Project.create(tmp_path / "p", volumes, settings=settings)
    plan = project.plan()
    sizer = Sizer(
        project.fingerprint(), project.dataset.labels, project.options, torch.device("cuda"), Workload(5, 1, 0), SILENT,
        budget=1.0, shares=1,
    )  # fmt: skip
    monkeypatch.setattr(sizer.measurer, "available_gb", lambda: inf)
    monkeypatch.setattr(measuring, "memory_limited", lambda *_: torch.no_grad())
    candidate = sizer.measurer.measure(plan.configurations["3d_fullres"], plan.training["3d_fullres"])
    tried.clear()
    found = sizer.measurer.accelerated(candidate, 9000.0)
    assert (found.acceleration, found.step.seconds_per_step) == (COMPILED, 0.6)
    assert tried == [PLAIN, COMPILED, BOTH]


@pytest.mark.parametrize(("device", "steps", "seconds"), [("cuda", None, 50.0), ("cuda", 7, 14.0), ("cpu", None, None)])
def test_trainings_of_their_length_are_measured_for(
    device: str, steps: int | None, seconds: float | None, tmp_path: Path, volumes: Path
) -> None:
    asked: list[float] = []
    decision: Any = SimpleNamespace(
        _device=torch.device(device),
        _options=Options().with_settings([] if steps is None else [f"training.steps={steps}"]),
        _project=Project.create(tmp_path / "p", volumes),
        _sizer=SimpleNamespace(measurer=SimpleNamespace(accelerated=lambda _, its_seconds: asked.append(its_seconds))),
    )
    candidates: Any = [SimpleNamespace(step=StepCost(2.0, 1.0))] * 2
    decide._Decision._accelerated(decision, candidates, (0, 1, 2), 300.0)
    assert asked == ([] if seconds is None else [seconds] * 2)


def test_a_training_runs_so_on_the_machine_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch)
    monkeypatch.setattr(
        decide._Decision,
        "_accelerated",
        lambda _, chosen, *__: [item.model_copy(update={"acceleration": BOTH}) for item in chosen],
    )
    data = make_phantom(tmp_path / "Dataset001_Small", cases=4, shape=(16, 16, 16))
    settings = [
        "training.steps=5",
        "planning.base_features=4",
        "planning.folds=0",
        "planning.configurations=3d_fullres",
    ]
    project = Project.create(tmp_path / "p", data, settings=settings)
    plan = project.size()
    assert plan.run is not None
    assert plan.run.acceleration == {"3d_fullres": BOTH}
    assert Plan.load(tmp_path / "p" / "plan.json") == plan
    here = trainings.training_of(project, plan, "3d_fullres", 0)
    assert here.job.acceleration == BOTH
    elsewhere = trainings.training_of(project, plan.model_copy(update={"machine": "another"}), "3d_fullres", 0)
    assert elsewhere.job.acceleration == PLAIN
    assert here.identity == elsewhere.identity == replace(here.job, acceleration=None).identity
    asked = Project.open(tmp_path / "p", settings=["training.cuda_graph=false"])
    assert asked.size() == plan  # nothing is decided anew
    assert trainings.training_of(asked, plan, "3d_fullres", 0).job.acceleration == COMPILED
