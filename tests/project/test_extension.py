"""More time for a finished short run: its training goes on, and only its cool-down is done again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from torch import Tensor

from segfit.bundle.bundle import open_bundle
from segfit.errors import InputError, MemoryShortageError
from segfit.planning.plan import Extension, Plan, RunSpec
from segfit.project import Project, decide, measuring, race, sizing, trainings
from segfit.project.candidate import SLACK, Candidate
from segfit.project.folder import ProjectFile
from segfit.project.trainings import trainings_of
from segfit.training import loop
from segfit.training.checkpoint import Checkpoints, State
from segfit.training.events import read_events
from segfit.training.learner import Learner
from segfit.training.probe import StepCost, TileCost
from segfit.training.result import BEFORE_COOLDOWN, EVENTS
from segfit.training.starting_state import state_before_cooldown

SETTINGS = ["planning.base_features=4", "training.precision=fp32", "training.channels_last=false"]


@pytest.fixture
def begun(tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with 40 seconds, planned as on a machine that takes 30 ms for a step, and nothing is tried.

    Trainings take every step for a second, so that they end soon.
    """
    _pretend(monkeypatch, 0.03)
    monkeypatch.setattr(decide, "race", lambda *_, **__: None)
    monkeypatch.setattr(loop, "Clock", _StepClock)
    monkeypatch.setattr(trainings, "FEWEST_STEPS", 0)
    step = Learner.step

    def counted(*args: Any, **values: Any) -> Tensor:
        if _StepClock.steps == _StepClock.stop:
            raise KeyboardInterrupt
        _StepClock.steps += 1
        return step(*args, **values)

    monkeypatch.setattr(Learner, "step", counted)
    return Project.create(tmp_path / "p", volumes, settings=["time_s=40", *SETTINGS])


@pytest.fixture
def raced(tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with 18 seconds, in which short races are run."""
    _pretend(monkeypatch, 0.03)
    monkeypatch.setattr(race, "_SHORTEST_SECONDS", 0.1)
    monkeypatch.setattr(race, "_FEWEST_ROUND_STEPS", 1)
    monkeypatch.setattr(race, "_MOST_ROUND_STEPS", 10)
    return Project.create(tmp_path / "p", volumes, settings=["time_s=18", *SETTINGS])


class _StepClock:
    """A clock of a training on which every step takes a second."""

    steps = 0
    stop: int | None = None  # the step at which the user interrupts

    def __init__(self, before: float = 0.0) -> None:
        self._begun, self._before = _StepClock.steps, before

    def start(self) -> None:
        self._begun = _StepClock.steps

    def seconds(self) -> float:
        return self._before + _StepClock.steps - self._begun


def before_cooldown_of(project: Project) -> State:
    [training] = trainings_of(project)
    state, _ = Checkpoints(training.folder / BEFORE_COOLDOWN, training.identity).load()
    assert state is not None
    return state


def _pretend(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(measuring, "probe_step", lambda *_, **__: StepCost(seconds, 0.1, 0.001))
    monkeypatch.setattr(measuring, "probe_forward", lambda *_: TileCost(0.001, 0.1))
    monkeypatch.setattr(measuring, "best_threads", lambda *_: 1)


def again(project: Project, *settings: str) -> Project:
    return Project.open(project.folder.root, settings=settings)


def run_of(project: Project) -> RunSpec:
    run = project.size().run
    assert run is not None
    return run


def stages(project: Project) -> list[str]:
    return [json.loads(line)["stage"] for line in project.folder.stages.read_text().splitlines()]


def test_more_time_goes_on_from_before_the_cool_down(begun: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    [first] = begun.train()
    before, plan = run_of(begun), begun.plan()
    name, (training,) = before.configurations[0], trainings_of(begun)
    assert (before.extends, before.start, before.time_s) == (None, None, 40.0)
    kept = before_cooldown_of(begun)
    assert 0 < kept.step < first.steps

    monkeypatch.setattr(sizing.Sizer, "best", lambda *_: pytest.fail("nothing is sized"))
    more = again(begun, "time_s=60")
    [second] = more.train()
    after = run_of(more)
    assert [item.folder for item in trainings_of(more)] == [training.folder]
    assert after.extends == Extension(time_s=40.0, step=kept.step)
    assert (after.configurations, after.folds, after.race) == (before.configurations, before.folds, before.race)
    assert more.plan().configurations[name] == plan.configurations[name]
    assert more.plan().training[name] == plan.training[name]
    assert before.seconds_per_training is not None
    assert after.seconds_per_training == pytest.approx(20 + before.seconds_per_training, abs=0.06)
    assert after.expected_steps[name] == int(after.seconds_per_training / (0.03 * SLACK))
    assert after.forecast["train"].seconds == pytest.approx(after.seconds_per_training - kept.step, abs=0.06)
    assert "race" not in after.forecast
    assert after.forecast["train"].disk_gb == 0.0015  # the weights, and the state before the cool-down
    assert second.first_step == 0
    assert 0 <= second.steps - after.seconds_per_training < 1
    assert kept.step < before_cooldown_of(more).step < second.steps
    steps = [event["step"] for event in read_events(training.folder / EVENTS) if event["kind"] == "step"]
    assert steps == sorted(set(steps))
    assert more.size() == again(begun).size()  # it is decided once


def test_what_was_trained_longer_counts_for_less_time(begun: Project) -> None:
    begun.train()
    first = begun.plan()
    [second] = again(begun, "time_s=60").train()
    most = again(begun, "time_s=90")
    [third] = most.train()
    run = run_of(most)
    assert run.extends is not None
    assert run.extends.time_s == 60.0
    assert third.steps > second.steps
    back = again(begun, "time_s=40")
    assert back.train() == [third]
    assert back.plan() == first


def test_an_interrupted_training_that_is_given_more_time_goes_on(
    begun: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(begun)
    assert run.seconds_per_training is not None
    stop = int(0.8 * run.seconds_per_training)  # while it cools down
    monkeypatch.setattr(_StepClock, "stop", _StepClock.steps + stop)
    with pytest.raises(KeyboardInterrupt):
        begun.train()
    monkeypatch.setattr(_StepClock, "stop", None)
    kept = before_cooldown_of(begun)
    more = again(begun, "time_s=60")
    [result] = more.train()
    after = run_of(more)
    assert after.extends == Extension(time_s=40.0, step=kept.step)
    assert after.seconds_per_training == pytest.approx(20 + run.seconds_per_training, abs=0.06)
    assert 0 <= result.steps - after.seconds_per_training < 1
    assert kept.step < before_cooldown_of(more).step < result.steps


def _nothing(_: Project) -> None:
    pass


def _forget(project: Project) -> None:
    for path in project.folder.runs.rglob(f"{BEFORE_COOLDOWN}/*"):
        path.unlink()


def _tear(project: Project) -> None:
    for path in project.folder.runs.rglob(f"{BEFORE_COOLDOWN}/*"):
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("settings", "spoil"),
    [
        (["time_s=60", "seed=5"], _nothing),
        (["time_s=60", "planning.folds=1"], _nothing),
        (["time_s=60", "training.cooldown_share=0.4"], _nothing),
        (["time_s=60"], _forget),
        (["time_s=60"], _tear),
    ],
    ids=["another seed", "another fold", "another recipe", "nothing kept", "damaged"],
)
def test_all_else_is_decided_anew(begun: Project, settings: list[str], spoil: Callable[[Project], None]) -> None:
    begun.train()
    spoil(begun)
    other = again(begun, *settings)
    [result] = other.train()
    run = run_of(other)
    assert (run.extends, run.start, result.first_step) == (None, None, 0)


def test_another_fold_does_not_start_from_the_race_of_the_first(raced: Project) -> None:
    """The winner of a race has seen the cases that validate the other folds."""
    [first] = raced.train()
    assert first.first_step > 0
    for folds, first_steps in (("1", [0]), ("1,0", [0, first.first_step])):
        other = again(raced, f"planning.folds={folds}")
        assert [result.first_step for result in other.train()] == first_steps
        assert run_of(other).start_fold == 0


def test_steps_of_a_slow_minute_make_no_training_longer(raced: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A race met a stall: a hundred steps as long as those would take thirty times the time that was asked for."""
    found = decide.race
    monkeypatch.setattr(decide, "race", lambda *args, **values: _stalled(found(*args, **values)))
    run = run_of(raced)
    assert run.race
    assert run.seconds_per_training is not None
    assert run.seconds_per_training < 18
    assert run.expected_steps[run.configurations[0]] == 100
    assert run.forecast["train"].seconds == pytest.approx(560)


def _stalled(outcome: race.Outcome | None) -> race.Outcome:
    assert outcome is not None
    return replace(outcome, seconds_per_step=5.6)


def test_the_same_time_never_trains_longer(begun: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    [first] = begun.train()
    _pretend(monkeypatch, 3.0)  # the machine is a hundred times slower now
    monkeypatch.setattr(trainings, "FEWEST_STEPS", 100)
    assert again(begun, "inference.tile_step=1").train() == [first]


def test_a_coarser_spacing_stays(begun: Project, data_of_discs: Path, tmp_path: Path) -> None:
    settings = ["time_s=60", "training.precision=fp32", "planning.base_features=4", "planning.batch_size=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            measuring, "probe_step", lambda item, *_, **__: StepCost(2e-6 * 2 * prod(item.patch_size), 0.1, 0.0)
        )
        project = Project.create(tmp_path / "discs", data_of_discs, settings=settings)
        [first] = project.train()
        before = project.plan()
        more = again(project, "time_s=70")
        [result] = more.train()
    run, after = run_of(more), more.plan()
    assert before.run is not None
    assert before.configurations["2d"].spacing_mm[0] > 2
    assert run.settings == before.run.settings != ()
    assert run.extends is not None
    assert result.steps > first.steps
    assert after.configurations["2d"] == before.configurations["2d"]
    assert after.changes == before.changes


def test_a_network_that_gets_enough_steps_is_decided_anew(begun: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.train()
    monkeypatch.setattr(sizing, "ENOUGH_STEPS", 500)
    assert run_of(again(begun, "time_s=45")).extends is None
    monkeypatch.setattr(sizing, "ENOUGH_STEPS", 10_000)
    assert run_of(again(begun, "time_s=46")).extends is not None


def test_a_network_that_no_longer_fits_is_decided_anew(begun: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    begun.train()
    measure = measuring.Measurer.measure
    calls = []

    def first_fails(self: measuring.Measurer, *values: Any) -> Candidate:
        calls.append(values)
        if len(calls) == 1:
            raise MemoryShortageError("too large")
        return measure(self, *values)

    monkeypatch.setattr(measuring.Measurer, "measure", first_fails)
    assert run_of(again(begun, "time_s=60")).extends is None
    assert len(calls) > 1


def test_several_trainings_go_on_each_from_before_its_cool_down(tmp_path: Path, begun: Project) -> None:
    two = Project.create(tmp_path / "two", begun.dataset, settings=["time_s=40", *SETTINGS, "planning.folds=0,1"])
    first = two.train()
    before, folders = run_of(two), [item.folder for item in trainings_of(two)]
    states = [state_before_cooldown(item.folder, item.identity) for item in trainings_of(two)]
    more = again(two, "time_s=60")
    second = more.train()
    run = run_of(more)
    assert run.extends is not None
    assert [item.folder for item in trainings_of(more)] == folders
    assert [state.step for state in states if state is not None] == [run.extends.step] * 2
    assert before.seconds_per_training is not None
    assert run.seconds_per_training == pytest.approx(before.seconds_per_training + 10, abs=0.06)  # 20 s for two
    assert all(one.steps < other.steps for one, other in zip(first, second, strict=True))


def test_a_fold_that_had_not_begun_takes_its_part_of_what_is_left(tmp_path: Path, begun: Project) -> None:
    two = Project.create(tmp_path / "two", begun.dataset, settings=["time_s=40", *SETTINGS, "planning.folds=0,1"])
    two.train(folds=[1])
    _, fold_1 = trainings_of(two)
    state = state_before_cooldown(fold_1.folder, fold_1.identity)
    assert state is not None
    more = again(two, "time_s=+20")
    assert run_of(more).extends == Extension(time_s=40.0, step=state.step)
    assert len(more.train()) == 2


def _time(project: Project) -> tuple[float | None, float | None]:
    file = ProjectFile.load(project.folder.project)
    return file.options.time_s, file.time_before_s


def test_added_time_is_added_once_until_it_is_trained(begun: Project) -> None:
    begun.train()
    more = again(begun, "time_s=+20")
    assert _time(more) == (60.0, 40.0)
    assert _time(again(begun, "time_s=+20")) == (60.0, 40.0)  # the same command, after it was interrupted
    assert _time(again(begun, "workers=2")) == (60.0, 40.0)
    assert run_of(again(begun)).extends is not None
    again(begun).train()
    assert _time(more) == (60.0, None)
    assert _time(again(begun, "time_s=+20")) == (80.0, 60.0)
    assert _time(again(begun, "time_s=+30")) == (110.0, 80.0)
    assert _time(again(begun, "time_s=70")) == (70.0, None)


def test_a_run_is_given_more_time_where_it_is_called(begun: Project) -> None:
    begun.train()
    begun.run(time="+20s")
    assert run_of(begun).time_s == 60.0
    assert run_of(begun).extends is not None
    assert _time(begun) == (60.0, None)


def test_an_extension_that_is_interrupted_goes_on_and_can_be_extended(
    begun: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    [first] = begun.train()
    for settings, stop in ((["time_s=+20"], 5), (["time_s=+20"], 30), (["time_s=+10"], 12)):
        monkeypatch.setattr(_StepClock, "stop", _StepClock.steps + stop)
        with pytest.raises(KeyboardInterrupt):
            again(begun, *settings).train()
    monkeypatch.setattr(_StepClock, "stop", None)
    assert _time(begun) == (70.0, 60.0)
    more = again(begun, "time_s=+10")
    before = _StepClock.steps
    [result] = more.train()
    assert _time(more) == (70.0, None)
    assert result.steps == pytest.approx(first.steps + 30, abs=1)
    assert _StepClock.steps - before < result.steps - first.steps / 2  # it did not begin anew
    [training] = trainings_of(more)
    steps = [event["step"] for event in read_events(training.folder / EVENTS) if event["kind"] == "step"]
    assert steps == sorted(set(steps))


def test_a_model_of_what_is_trained_so_far_is_the_earlier_one_or_the_state(
    begun: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped_after(steps: int, *settings: str) -> Project:
        monkeypatch.setattr(_StepClock, "stop", _StepClock.steps + steps)
        with pytest.raises(KeyboardInterrupt):
            again(begun, *settings).train()
        monkeypatch.setattr(_StepClock, "stop", None)
        return again(begun)

    def handed_over() -> tuple[list[int], int]:
        manifest = open_bundle(begun.folder.model).manifest
        found = sum("has not ended" in text for text in manifest.verdict["findings"])
        return manifest.training["steps"], found

    stopped_after(20).select(so_far=True)  # killed in a step: the state before the cool-down is the last one
    assert handed_over() == ([before_cooldown_of(begun).step], 1)
    [first] = again(begun).train()
    project = stopped_after(15, "time_s=+20")
    project.select(so_far=True)
    assert handed_over() == ([first.steps], 0)  # its learning rate has fallen, that of the state has not
    [second] = again(begun).train()
    assert second.steps == pytest.approx(first.steps + 20, abs=1)
    assert _time(begun) == (60.0, None)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], ["seed=5"]),
        (["training.cooldown_share=1"], []),
        (["preset=stock", "planning.base_features=4"], []),
    ],
    ids=["another seed", "the rate fell from the first step on", "nnU-Net's schedule"],
)
def test_time_is_not_added_to_what_cannot_go_on(begun: Project, first: list[str], then: list[str]) -> None:
    again(begun, *first).train()
    project = again(begun, *then, "time_s=+20")
    with pytest.raises(InputError):
        project.train()
    assert _time(begun) == (40.0, None)  # as it was
    again(begun, *then, "time_s=60").train()  # trained anew, as the message says


def test_time_is_not_added_to_a_run_on_other_data(begun: Project, tmp_path: Path) -> None:
    data = shutil.copytree(begun.dataset.root, tmp_path / "data")
    project = Project.create(tmp_path / "q", data, settings=["time_s=40", *SETTINGS])
    project.train()
    label = next(iter((data / "labelsTr").iterdir()))
    volume = nibabel.load(label)
    values = np.asarray(volume.dataobj).copy()
    values[0, 0, 0] = 1
    nibabel.save(nibabel.Nifti1Image(values, volume.affine, volume.header), label)
    with pytest.raises(InputError):
        again(project, "time_s=+20").train()
    other_run = again(project, "time_s=60")
    assert run_of(other_run).extends is None


@pytest.mark.parametrize("settings", [["training.steps=4"], []], ids=["by steps", "no time yet"])
def test_time_is_added_to_a_time(tmp_path: Path, volumes: Path, settings: list[str]) -> None:
    with pytest.raises(InputError):
        Project.create(tmp_path / "new", volumes, settings=["time_s=+20"])
    assert not (tmp_path / "new").exists()
    Project.create(tmp_path / "p", volumes, settings=settings)
    before = (tmp_path / "p" / "project.json").read_bytes()
    with pytest.raises(InputError):
        Project.open(tmp_path / "p", settings=["time_s=+20"])
    assert (tmp_path / "p" / "project.json").read_bytes() == before


def test_more_steps_equal_a_project_that_had_them_at_once(tmp_path: Path, pictures: Path, tiny: list[str]) -> None:
    tiny += [*SETTINGS[1:], "training.steps=20"]
    project = Project.create(tmp_path / "p", pictures, settings=tiny)
    [first] = project.train()
    more = again(project, "training.steps=40")
    [second] = more.train()
    whole = Project.create(tmp_path / "whole", pictures, settings=[*tiny, "training.steps=40"])
    [third] = whole.train()
    assert (first.steps, second.steps, second.weights) == (20, 40, third.weights)
    times = [
        [event["seconds"] for event in read_events(trainings_of(one)[0].folder / EVENTS) if event["kind"] == "step"]
        for one in (project, more)
    ]
    assert times[0][:10] == times[1][:10]  # those were not done again
    assert again(project, "training.steps=20").train() == [first]


def test_the_course_leaves_out_the_time_alone(begun: Project) -> None:
    def course(*settings: str) -> tuple[str, str]:
        project = again(begun, *settings)
        return project.course(), project.plan_folder.root.name

    first, basis = course()
    other, another = course("time_s=50")
    assert other == first
    assert another != basis
    assert course("workers=2") == (first, another)
    assert course("seed=9")[0] != first


def test_a_whole_run_with_a_race_and_then_more_time(raced: Project) -> None:
    raced.run()
    before = run_of(raced)
    [first] = raced.train()
    kept = before_cooldown_of(raced)
    assert kept.step > first.first_step > 0  # that of the race
    assert stages(raced).count("race") == 1
    sized = stages(raced).count("size")  # once more after the race, where it was faster than what was pretended

    more = again(raced, "time_s=24")
    more.run()
    after = run_of(more)
    [second] = more.train()
    assert stages(more).count("race") == 1
    assert stages(more).count("size") == sized + 1
    assert after.race == before.race != ()
    assert after.extends == Extension(time_s=18.0, step=kept.step)
    assert second.first_step == first.first_step
    assert second.budget_seconds == after.seconds_per_training
    assert second.steps > first.steps
    page = more.folder.report.read_text()
    assert f"step {kept.step} of the run of 18 s" in page
    decision = next(item for item in Plan.load(more.folder.plan).decisions if item.key == "run")
    assert decision.inputs["step_before_its_cool_down"] == kept.step
