"""Drift that is there is found, and what only varies is left alone."""

from __future__ import annotations

import json
import multiprocessing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from segfit.errors import InputError
from segfit.evaluation.measurement import Measurement
from segfit.fingerprint.training_images import Fact
from segfit.inference.drift_log import LoggedCase, append_case, read_log, require_log
from segfit.selection.drift import Shift, drift_of

START = datetime(2026, 1, 1, tzinfo=UTC)
TRAINING = 30


def logged(values: np.ndarray, volumes: np.ndarray, model: str = "m") -> list[LoggedCase]:
    """Cases with three numbers of the input, each of 0 to 1 in training, and one volume."""
    return [
        LoggedCase(
            date=START + timedelta(minutes=place),
            case=f"c{place}",
            model=model,
            segfit="0",
            facts=tuple(
                Fact(name="level", part=f"c{i}", value=one, low=0.0, high=1.0, cases=TRAINING)
                for i, one in enumerate(row.tolist())
            ),
            measurements=(Measurement(name="a", kind="volume", unit="ml", value=float(volume)),),
        )
        for place, (row, volume) in enumerate(zip(values, volumes, strict=True))
    ]


def moved(shifts: tuple[Shift, ...]) -> list[tuple[str, str]]:
    return [(one.name, one.part) for one in shifts if one.moved]


def test_what_moved_is_named_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    values, volumes = rng.uniform(0, 1, (40, 3)), rng.uniform(1, 2, 40)
    steady = drift_of(logged(values, volumes))
    assert (steady.state, steady.cases, steady.recent, moved(steady.shifts)) == ("steady", 40, 20, [])
    later = values.copy()
    later[20:, 1] += 0.7
    found = drift_of(logged(later, volumes))
    assert (found.state, moved(found.shifts)) == ("moved", [("level", "c1")])
    (shift,) = (one for one in found.shifts if one.moved)
    assert shift.outside == int((later[20:, 1] > 1).sum())
    assert shift.first_median == pytest.approx(np.median(later[:20, 1]))
    grown = volumes.copy()
    grown[20:] *= 1.6
    assert moved(drift_of(logged(values, grown)).shifts) == [("volume (ml)", "a")]


def test_cases_that_were_other_than_the_training_images_from_the_first_on() -> None:
    rng = np.random.default_rng(1)
    values = rng.uniform(0, 1, (12, 3))
    values[:, 2] += 0.8
    found = drift_of(logged(values, rng.uniform(1, 2, 12)))
    assert (found.recent, moved(found.shifts)) == (12, [("level", "c2")])
    assert all(one.p_between is None for one in found.shifts)
    assert drift_of(logged(values[:9], np.ones(9))).state == "too_few"


def test_false_alarms_are_as_rare_as_the_rule_says() -> None:
    """The range of the training is one of 30 images, and not the whole of what there is."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(200):
        training, cases = rng.normal(size=(TRAINING, 3)), rng.normal(size=(40, 3))
        low, high = training.min(axis=0), training.max(axis=0)
        alarms += drift_of(logged((cases - low) / (high - low), rng.lognormal(size=40))).state == "moved"
    assert alarms <= 7  # 1 % are expected at most; 8 of 200 would come in one of 1000 such tests


def test_only_the_model_that_came_last_counts() -> None:
    rng = np.random.default_rng(3)
    old = logged(rng.uniform(5, 6, (15, 3)), np.ones(15), "old")
    new = [
        one.model_copy(update={"date": one.date + timedelta(days=1)})
        for one in logged(rng.uniform(0, 1, (15, 3)), np.ones(15))
    ]
    found = drift_of([*old, *new])
    assert (found.state, found.cases, found.of_other_models) == ("steady", 15, 15)


def _append(path: Path, worker: int) -> None:
    for (case,) in (logged(np.full((1, 200), worker + 0.25), np.ones(1)) for _ in range(25)):
        append_case(path, case.model_copy(update={"case": f"w{worker}"}))


def test_several_processes_append_whole_lines(tmp_path: Path) -> None:
    path, context = tmp_path / "log.jsonl", multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append, args=(path, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    names = sorted(json.loads(line)["case"] for line in path.read_text().splitlines())
    assert names == [f"w{worker}" for worker in range(3) for _ in range(25)]


def test_a_line_that_was_cut_off_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first, second, third = logged(np.eye(3), np.ones(3))
    append_case(path, first)
    append_case(path, second)
    path.write_bytes(path.read_bytes()[:-30])
    append_case(path, third)
    append_case(path, third.model_copy(update={"date": third.date + timedelta(hours=1)}))  # predicted again
    cases, damaged = read_log(path)
    assert ([one.case for one in cases], damaged) == (["c0", "c2"], 1)
    assert cases[1].date == third.date + timedelta(hours=1)


def test_no_other_file_is_appended_to(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    binary = tmp_path / "image.nii.gz"
    binary.write_bytes(bytes(range(256)))
    for path in (other, binary, tmp_path, tmp_path / "nowhere" / "log.jsonl"):
        with pytest.raises(InputError):
            require_log(path)
    require_log(tmp_path / "log.jsonl")
    assert not (tmp_path / "log.jsonl").exists()
