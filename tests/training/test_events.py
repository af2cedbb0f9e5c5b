"""The log of a training."""

from __future__ import annotations

from pathlib import Path

import pytest

from segfit.training.events import EventLog, read_events


def write(path: Path, *, start: int, steps: range) -> None:
    with EventLog(path, step=start) as log:
        for step in steps:
            log.write("step", step=step, loss=1 / (step + 1))


def test_events_are_one_object_per_line(tmp_path: Path) -> None:
    write(tmp_path / "events.jsonl", start=0, steps=range(1, 3))
    assert (tmp_path / "events.jsonl").read_text().splitlines() == [
        '{"kind": "step", "step": 1, "loss": 0.5}',
        '{"kind": "step", "step": 2, "loss": 0.3333333333333333}',
    ]


def test_every_event_is_there_at_once(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", step=0) as log:
        log.write("step", step=1)
        assert read_events(tmp_path / "events.jsonl") == [{"kind": "step", "step": 1}]


def test_going_on_drops_later_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, start=0, steps=range(1, 8))
    write(path, start=4, steps=range(5, 7))
    assert [event["step"] for event in read_events(path)] == [1, 2, 3, 4, 5, 6]


def test_starting_afresh_empties_the_log(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, start=0, steps=range(1, 8))
    write(path, start=0, steps=range(1, 2))
    assert [event["step"] for event in read_events(path)] == [1]


def test_a_torn_line_ends_the_log(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, start=0, steps=range(1, 4))
    path.write_bytes(path.read_bytes()[:-5])
    assert [event["step"] for event in read_events(path)] == [1, 2]
    write(path, start=9, steps=range(10, 11))
    assert [event["step"] for event in read_events(path)] == [1, 2, 10]


def test_a_missing_log_is_empty(tmp_path: Path) -> None:
    assert read_events(tmp_path / "none.jsonl") == []


def test_nan_is_refused(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl", step=0) as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.write("step", step=1, loss=float("nan"))
