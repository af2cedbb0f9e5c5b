"""What the log says of steps: losses, and how long they waited for their samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segfit.training.events import EventLog, read_events
from segfit.training.loss_history import LossHistory, StepFacts


def test_waiting_for_samples_is_summed_up_since_the_last_event(tmp_path: Path) -> None:
    history = LossHistory()
    with EventLog(tmp_path / "events.jsonl", step=0) as events:
        for step in range(1, 6):
            facts = StepFacts(step, 2.0 * step, step / 2500, 0.1, ("a",), lambda: 0.5)
            history.push(facts, torch.tensor((1.0, 1.0)), events)
        history.settle(events)
    steps = read_events(tmp_path / "events.jsonl")
    assert [event["step"] for event in steps] == [1, 4, 5]
    assert [event["data_wait"] for event in steps] == [0.5, 1.5, 0.5]
    assert [event["data_wait_share"] for event in steps] == [0.25, 0.25, 0.25]


def test_waiting_is_counted_on_from_a_saved_state(tmp_path: Path) -> None:
    first, second = LossHistory(), LossHistory()
    with EventLog(tmp_path / "events.jsonl", step=0) as events:
        first.push(StepFacts(1, 10.0, 0.1, 0.1, (), lambda: 1.0), torch.ones(2), events)
        second.restore(first.facts())
        second.push(StepFacts(2, 14.0, 0.2, 0.1, (), lambda: 1.0), torch.ones(2), events)
    last = read_events(tmp_path / "events.jsonl")[-1]
    assert last["data_wait_share"] == pytest.approx(0.25)
