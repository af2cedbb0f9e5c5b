"""What learns fastest is found by trying: several candidates train for a while, one goes on."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from segfit.errors import DivergedError, StageError
from segfit.planning.plan import Plan
from segfit.project import Project, decide, measuring, race, train_and_validate
from segfit.project.candidate import Candidate
from segfit.specs import Configuration
from segfit.training.job import TrainingJob
from segfit.training.probe import StepCost, TileCost
from segfit.training.result import TrainingResult


@pytest.fixture
def raced(tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose planned network is too slow for its budget, so that it tries two; rounds take a second."""
    monkeypatch.setattr(measuring, "probe_step", lambda *_, **__: StepCost(0.03, 0.1, 0.001))
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.001, 0.1))
    monkeypatch.setattr(measuring, "best_threads", lambda *_: 1)
    monkeypatch.setattr(race, "_SHORTEST_SECONDS", 0.5)
    monkeypatch.setattr(race, "_FEWEST_ROUND_STEPS", 1)
    monkeypatch.setattr(race, "_MOST_ROUND_STEPS", 30)
    settings = ["time_s=40", "planning.base_features=4", "training.precision=fp32", "training.channels_last=false"]
    return Project.create(tmp_path / "p", volumes, settings=settings)


def test_the_winner_goes_on_from_where_it_is(raced: Project) -> None:
    plan = raced.size()
    run = plan.run
    assert run is not None
    assert {entry.configuration for entry in run.race} == {"2d", "3d_fullres"}
    winner = next(entry for entry in run.race if entry.winner)
    best = max(entry.mean or 0.0 for entry in run.race)
    assert (winner.mean or 0.0) >= best - race._EVEN
    assert run.configurations == (winner.configuration,)
    assert run.start is not None
    begun = TrainingResult.load(raced.folder.root / run.start / "training.json")
    assert begun.steps == winner.steps > 0
    recipe = plan.training[winner.configuration]
    assert (recipe.optimizer, recipe.poly_exponent, recipe.cooldown_share) == ("muon", 0.9, 0.5)
    [trained] = raced.train()
    assert trained.steps > begun.steps
    assert "race" in run.forecast
    kept = [path for path in (raced.folder.root / run.start).parents[1].iterdir() if path.is_dir()]
    assert kept == [(raced.folder.root / run.start).parent]  # the other one is gone


def test_the_next_candidate_is_trained_where_the_winner_diverges(
    raced: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    race_run = raced.size().run
    assert race_run is not None
    train = train_and_validate.train_fold

    def diverges(job: TrainingJob, *args: Any, **kwargs: Any) -> TrainingResult:
        if job.configuration.name == race_run.configurations[0]:
            raise DivergedError("twice")
        return train(job, *args, **kwargs)

    monkeypatch.setattr(train_and_validate, "train_fold", diverges)
    monkeypatch.setattr(race, "train_fold", _never_trained(race.train_fold))
    [trained] = raced.train()
    run = raced.run_plan()
    assert run.configurations == (trained.configuration,) != race_run.configurations
    assert [(entry.configuration, entry.winner, entry.diverged) for entry in run.race] == [
        (entry.configuration, not entry.winner, entry.winner) for entry in race_run.race
    ]
    assert [entry.steps for entry in run.race] == [entry.steps for entry in race_run.race]
    assert trained.steps > next(entry.steps for entry in run.race if entry.winner)
    raced.select()
    verdict = raced.verdict()
    assert verdict is not None
    assert any(item.code == "diverged" and item.numbers == {"networks": 1} for item in verdict.findings)


def test_the_run_fails_where_all_candidates_diverge(raced: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def diverges(job: TrainingJob, *_: Any, **__: Any) -> TrainingResult:
        names.append(job.configuration.name)
        raise DivergedError("twice")

    monkeypatch.setattr(train_and_validate, "train_fold", diverges)
    with pytest.raises(DivergedError):
        raced.train()
    assert sorted(names) == ["2d", "3d_fullres"]
    with pytest.raises(DivergedError):  # the same command says the same again
        raced.train()


def test_what_is_no_fault_of_a_candidate_decides_nothing(raced: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> TrainingResult:
        raise StageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(race, "train_fold", full)
        with pytest.raises(StageError):
            raced.size()
    run = raced.size().run
    assert run is not None
    assert all(entry.mean is not None for entry in run.race)


def _never_trained(train: Any) -> Any:
    """Return `train`, for what is finished only."""

    def finished(*args: Any, **kwargs: Any) -> TrainingResult:
        assert (args[3] / "training.json").exists()
        result: TrainingResult = train(*args, **kwargs)
        return result

    return finished


class _Fake:
    """A candidate with a Dice for each round; None cannot be trained."""

    def __init__(self, *dice: float | None) -> None:
        self.results, self.tried = dice, 0
        self.rounds, self.dice = 0, 0.0
        self.error: StageError | None = None

    def run(self, round_: int) -> None:
        self.tried += 1
        result = self.results[round_]
        if result is None:
            self.error, self.dice = StageError("no"), -1.0
        else:
            self.dice, self.rounds = result, round_ + 1

    def has_done(self, round_: int) -> bool:
        return round_ < len(self.results) and self.results[round_] is not None


@pytest.mark.parametrize(
    ("candidates", "winner", "tried"),
    [
        ([[0.5], [0.7]], 1, [1, 1]),
        ([[0.695], [0.7]], 0, [1, 1]),  # even: the first one
        ([[0.1], [0.5, 0.6], [0.4, 0.7], [0.2]], 2, [1, 2, 2, 1]),
        ([[None], [0.5, 0.6], [None], [None]], 1, [1, 1, 1, 1]),  # what failed is not tried again
        ([[0.1], [0.5, None], [0.4, None], [0.2]], 3, [1, 2, 2, 1]),  # both of the last round fail
    ],
)
def test_half_of_them_go_on(candidates: list[list[float | None]], winner: int, tried: list[int]) -> None:
    runners = [_Fake(*dice) for dice in candidates]
    assert race._first(runners) is runners[winner]  # type: ignore[arg-type]
    assert [runner.tried for runner in runners] == tried


def test_the_second_best_is_known_without_further_training() -> None:
    runners = [_Fake(0.5, 0.6), _Fake(None), _Fake(0.4, 0.5), _Fake(0.45)]
    assert race._second(runners, (0,)) is runners[2]  # type: ignore[arg-type]
    assert runners[1].tried == 0
    with pytest.raises(StageError):
        race._second(runners, (0, 2, 3))  # type: ignore[arg-type]


def test_cases_of_the_race_are_not_trained_on_in_it(raced: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[set[str], set[str]]] = []
    train, predict = race.train_fold, race.validate_fold

    def watched_train(job: TrainingJob, *args: Any, **kwargs: Any) -> TrainingResult:
        seen.append((set(job.cases_train), set()))
        return train(job, *args, **kwargs)

    def watched_predict(*args: Any, **kwargs: Any) -> Any:
        seen[-1][1].update(case.id for case in args[3])
        return predict(*args, **kwargs)

    monkeypatch.setattr(race, "train_fold", watched_train)
    monkeypatch.setattr(race, "validate_fold", watched_predict)
    raced.size()
    split = raced.splits().folds[0]
    assert len(seen) == 2
    for trained, predicted in seen:
        assert predicted
        assert trained | predicted == set(split.train)
        assert not trained & predicted


def test_a_race_that_was_killed_goes_on(raced: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    train, done = race.train_fold, []

    def killed(*args: Any, **kwargs: Any) -> TrainingResult:
        if done:
            raise KeyboardInterrupt
        done.append(train(*args, **kwargs))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(race, "train_fold", killed)
        with pytest.raises(KeyboardInterrupt):
            raced.size()
    [file] = raced.folder.plans.glob("*/race/race.json")
    before = json.loads(file.read_text())
    assert raced.plan().run is None

    monkeypatch.setattr(
        measuring, "probe_step", lambda *_, **__: StepCost(0.5, 0.1, 0.001)
    )  # it would decide otherwise now
    again = Project.open(raced.folder.root)
    plan = again.size()
    assert json.loads(file.read_text()) == before
    assert plan.run is not None
    entry = next(item for item in plan.run.race if item.configuration == done[0].configuration)
    assert entry.steps == done[0].steps  # it was not trained again
    assert Plan.load(again.folder.plan) == plan


def test_there_is_no_race_without_time_for_one(tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "probe_step", lambda *_, **__: StepCost(0.1, 0.1, 0.001))
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.001, 0.1))
    monkeypatch.setattr(measuring, "best_threads", lambda *_: 1)
    project = Project.create(tmp_path / "p", volumes, settings=["time_s=40"])
    run = project.size().run
    assert run is not None
    assert (run.race, run.start, len(run.configurations)) == ((), None, 1)


def test_large_structures_are_tried_at_a_coarser_spacing(
    tmp_path: Path, data_of_discs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Candidate, ...]] = []
    monkeypatch.setattr(decide, "race", lambda _, entrants, *__, **___: seen.append(tuple(entrants)))
    monkeypatch.setattr(measuring, "best_threads", lambda *_: 1)
    monkeypatch.setattr(measuring, "probe_step", lambda item, *_, **__: StepCost(2e-6 * _voxels(item), 0.1, 0.001))
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.001, 0.1))
    project = Project.create(tmp_path / "p", data_of_discs, settings=["time_s=60", "training.precision=fp32"])
    plan = project.size()
    [(coarse, fine)] = seen
    assert fine.configuration.spacing_mm == (1.0, 1.0)
    assert coarse.configuration.spacing_mm == pytest.approx((coarse.configuration.spacing_mm[0],) * 2)
    assert coarse.configuration.spacing_mm[0] > 2
    assert prod(fine.configuration.patch_size) < 0.5 * 256**2  # sees less than half
    assert all(p >= n for p, n in zip(coarse.configuration.patch_size, coarse.configuration.median_shape, strict=True))
    assert plan.configurations["2d"] == coarse.configuration.model_copy(
        update={"memory_estimate": plan.configurations["2d"].memory_estimate}
    )
    decision = next(item for item in plan.decisions if item.key == "2d.spacing_mm")
    assert (decision.rule, decision.value) == ("sized_spacing", list(coarse.configuration.spacing_mm))
    [change] = [change for change in plan.changes if change.startswith("2d: target_spacing_mm ")]
    assert "set by you" not in change


def test_a_patch_that_was_guessed_far_too_small_grows(
    tmp_path: Path, data_of_discs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half a second for every step, as on a device that small patches leave idle, but a quarter of it for large ones.
    monkeypatch.setattr(measuring, "best_threads", lambda *_: 1)
    monkeypatch.setattr(
        measuring, "probe_step", lambda item, *_, **__: StepCost(0.5 if _voxels(item) < 2**16 else 0.125, 0.1, 0.001)
    )
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.001, 0.1))
    monkeypatch.setattr(decide, "race", lambda *_, **__: None)
    project = Project.create(tmp_path / "p", data_of_discs, settings=["time_s=900", "training.precision=fp32"])
    plan = project.plan()
    assert project.size().configurations["2d"].patch_size == plan.configurations["2d"].patch_size


def _voxels(item: Configuration) -> int:
    return item.batch_size * prod(item.patch_size)
