"""A training by several processes is that of one: the same weights, judged alike, stopped and gone on with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from team_process import JOBS, LABELS, STOPPED, cases, train

from segfit.errors import DivergedError, InputError, Problem, StageError
from segfit.progress import SILENT
from segfit.specs import Acceleration
from segfit.training.device_cases import DeviceCases
from segfit.training.distributed import ALONE, Ranks
from segfit.training.events import EventLog, read_events
from segfit.training.result import EVENTS, RESULT, WEIGHTS
from segfit.training.schedule import forced_foreground
from segfit.training.shortage import learn
from segfit.training.team import Team, learner_of, sampler_of
from segfit.training.threads import kept_threads

PROGRAM = Path(__file__).with_name("team_process.py")
PATIENCE_S = 300
COMPARED = [name for name in JOBS if name not in ("elsewhere", "far too fast", "long")]


def started(size: int, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Start the processes of a training, as torchrun does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    there = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    return [
        subprocess.Popen([sys.executable, str(PROGRAM), *arguments], env={**os.environ, **there, "RANK": str(rank)})
        for rank in range(size)
    ]


def ended(size: int, *arguments: str) -> list[int]:
    """Have a training by several processes; return their exit codes."""
    return [process.wait(PATIENCE_S) for process in started(size, *arguments)]


def newest_state(training: Path) -> int:
    return max(int(path.stem.removeprefix("step-")) for path in training.glob("state/*"))


def assert_close(one: Path, other: Path, most: float = 1e-5, apart: str | None = None) -> None:
    """Compare what two trainings left, but for what has a name that ends with `apart`."""
    first, second = (load_file(folder / WEIGHTS) for folder in (one, other))
    assert first.keys() == second.keys()
    differences = {name: (second[name] - tensor).abs().max().item() for name, tensor in first.items()}
    assert not {name: by for name, by in differences.items() if by > most and not (apart and name.endswith(apart))}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of the trainings that are compared."""
    folder = tmp_path_factory.mktemp("by-two")
    assert ended(2, str(folder), ",".join(["elsewhere", *COMPARED, "far too fast"])) == [0, 0]
    return folder


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_learn_what_one_does(name: str, by_two: Path, tmp_path: Path) -> None:
    with kept_threads(1):
        alone = train(name, tmp_path)
    # The gradient of a bias before a norm is 0 but for its last digits, which AdamW takes for a direction.
    apart = ".conv.bias" if name == "adamw" else None
    close = 1e-3 if name == "half precision" else 1e-5  # it rounds to a thousandth
    assert_close(tmp_path / name, by_two / name, close, apart)
    steps = [
        [event for event in read_events(folder / name / EVENTS) if event["kind"] == "step"]
        for folder in (tmp_path, by_two)
    ]
    assert [event["step"] for event in steps[1]] == [event["step"] for event in steps[0]]
    losses = [[event["loss"] for event in one] for one in steps]
    assert losses[1] == pytest.approx(losses[0], abs=2 * close)
    assert alone.steps == 10


def test_they_go_back_together_where_the_training_diverges(by_two: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError), kept_threads(1):
        train("far too fast", tmp_path)
    assert "diverged again" in (by_two / "far too fast failed").read_text(encoding="utf-8")
    assert not (by_two / "far too fast" / RESULT).exists()
    back = [
        [(event["step"], event["at"]) for event in read_events(folder / "far too fast" / EVENTS) if "at" in event]
        for folder in (tmp_path, by_two)
    ]
    assert len(back[1]) == 1
    assert back[1] == back[0]


def test_the_error_of_another_is_that_of_the_first_and_the_next_training_is_done(by_two: Path) -> None:
    assert (by_two / "elsewhere failed").read_text(encoding="utf-8") == "case case0 is not here; share the folder"
    assert not (by_two / "elsewhere" / RESULT).exists()
    assert (by_two / COMPARED[0] / RESULT).exists()


def test_where_one_is_killed_the_others_end_and_any_number_goes_on(tmp_path: Path) -> None:
    folder, training = tmp_path / "killed", tmp_path / "killed/long"
    folder.mkdir()
    assert ended(2, str(folder), "long", "0", "7") == [-signal.SIGKILL, STOPPED]
    assert "process 0 of 2 has ended" in (folder / "told by 1").read_text(encoding="utf-8")
    assert 6 <= newest_state(training) <= 8
    assert ended(3, str(folder), "long", "1", "7") == [STOPPED, -signal.SIGKILL, STOPPED]
    assert {path.name for path in folder.glob("told*")} == {f"told by {rank}" for rank in range(3)}
    assert "process 1 of 3 has ended" in (folder / "told by 0").read_text(encoding="utf-8")
    assert 12 <= newest_state(training) <= 16
    assert not (training / RESULT).exists()
    with kept_threads(1):
        train("long", folder)
        train("long", tmp_path)
    assert_close(training, tmp_path / "long")
    events = [event for event in read_events(training / EVENTS) if event["kind"] == "step"]
    assert [event["step"] for event in events] == list(range(1, 21))


def test_samples_are_divided_as_nnunet_divides_them() -> None:
    def parts(samples: int, size: int) -> list[tuple[int, int]]:
        forced = forced_foreground(samples)
        whole = [forced[Ranks(rank, size).for_batch(samples).rows] for rank in range(size)]
        assert sum(whole, ()) == forced
        return [(len(part), sum(part)) for part in whole]

    assert parts(2, 2) == [(1, 0), (1, 1)]
    assert parts(5, 2) == [(3, 0), (2, 2)]
    assert parts(12, 4) == [(3, 0), (3, 0), (3, 1), (3, 3)]
    assert parts(7, 3) == [(3, 0), (2, 0), (2, 2)]
    with pytest.raises(InputError, match="3 processes cannot share a batch of 2 samples"):
        parts(2, 3)


def test_what_no_team_can_do() -> None:
    team, job = Team(Ranks(0, 2)), JOBS["long"]
    with pytest.raises(InputError, match="not on mps"), team.training(job, [], torch.device("mps")):
        pass
    team.is_parted = True
    with pytest.raises(StageError, match="no longer in step"), team.training(job, [], torch.device("cpu")):
        pass


class Kept(DeviceCases):
    """Cases on a device, that could be given back."""

    def __init__(self) -> None:
        self.asked = False

    def give_back(self) -> bool:
        self.asked = True
        return True


def test_a_step_is_not_repeated_and_not_accelerated_where_others_take_part(tmp_path: Path) -> None:
    alone, one = (learner_of(JOBS["long"], torch.device("cpu"), ranks) for ranks in (ALONE, Ranks(0, 2)))
    assert alone.can_repeat()
    assert alone.can_divide()
    assert not one.can_repeat()
    assert not one.can_divide()
    kept = Kept()
    with (
        patch.object(one, "step", side_effect=MemoryError) as steps,
        pytest.raises(MemoryError),
        EventLog(tmp_path / EVENTS, step=0) as events,
    ):
        learn(one, sampler_of(JOBS["long"], cases(LABELS), ALONE).batch(0), 0.1, 0, kept, events, SILENT)
    assert steps.call_count == 1
    assert not kept.asked
    told: list[Problem] = []
    assert not alone.gradients.accelerate(Acceleration(graph=True), told.append)  # a CPU has no graphs
    assert len(told) == 1
    assert one.gradients.accelerate(Acceleration(graph=True), told.append)
    assert len(told) == 1


def test_each_reads_its_samples_of_the_batch() -> None:
    asked = JOBS["batch Dice"]
    given = cases(asked.labels)
    alone = sampler_of(asked, given, ALONE)
    parts = [sampler_of(asked, given, Ranks(rank, 2)) for rank in range(2)]
    whole_of_both = set()
    for step in range(6):
        batch, (first, second) = alone.batch(step), (part.batch(step) for part in parts)
        assert first.cases == second.cases == batch.cases
        assert len(first.image) == 2
        assert len(second.image) == 1
        assert batch.whole is not None
        assert first.whole is not None
        assert second.whole is not None
        for name in ("image", "labels"):
            assert torch.equal(torch.cat((getattr(first, name), getattr(second, name))), getattr(batch, name))
        for one, other, both in zip(first.whole, second.whole, batch.whole, strict=True):
            assert torch.equal(torch.cat((one, other)), both)
        whole_of_both.add((len(first.whole[0]), len(second.whole[0])))
    assert len(whole_of_both) > 2  # turned samples are of either


def test_one_process_alone_is_no_team() -> None:
    values = torch.ones(3, requires_grad=True)
    assert ALONE.total(values) is values
    assert ALONE.mean(values) is values
    assert ALONE.gathered(values) is values
    assert ALONE.totals(values, values) == (values, values)
    assert ALONE.rows == slice(None)
    assert ALONE.for_batch(5) is ALONE
