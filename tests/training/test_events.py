"""The log of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from segfit.training import events
from segfit.training.events import EventLog, last_event, read_events


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


class _Counted:
    """A file that counts the bytes that are read from it."""

    def __init__(self, file: Any) -> None:
        self._file, self.count = file, 0

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def seek(self, *place: int) -> int:
        return int(self._file.seek(*place))

    def read(self, size: int) -> bytes:
        self.count += size
        return bytes(self._file.read(size))


def test_no_more_than_the_end_of_a_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened, open_ = tmp_path / "events.jsonl", list[_Counted](), Path.open

    def counted(self: Path, mode: str = "r", **values: Any) -> Any:
        if self != path:  # threads of other tests may be at work
            return open_(self, mode, **values)
        opened.append(_Counted(open_(self, mode, **values)))
        return opened[-1]

    write(path, start=0, steps=range(1, 20_000))
    last = read_events(path)[-1]
    monkeypatch.setattr(events, "_BLOCK", 500)
    monkeypatch.setattr(Path, "open", counted)
    assert last_event(path, "loss") == last
    assert [file.count for file in opened] == [500]
    assert last_event(path, "share") is None
    assert opened[-1].count == path.stat().st_size  # each byte once


@pytest.mark.parametrize("block", [1, 7, 40, 41, 1000])
@pytest.mark.parametrize("torn", ["", '{"kind": "step", "st', '{"loss": 1, "kind": "\u00e4'])
def test_the_last_event_is_found_wherever_blocks_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, torn: str
) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, step=0) as log:
        log.write("skipped", step=1, cases=["\u00e4\u00f6"])
        log.write("step", step=2, loss=0.5)
        log.write("skipped", step=3, cases=["\u00e4"])
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    monkeypatch.setattr(events, "_BLOCK", block)
    known = read_events(path)
    assert last_event(path, "loss") == known[1]
    assert last_event(path, "kind") == known[2]
    assert last_event(path, "cases") == known[2]
    assert last_event(path, "share") is None
    assert last_event(tmp_path / "none.jsonl", "kind") is None
    path.write_text("")
    assert last_event(path, "kind") is None
