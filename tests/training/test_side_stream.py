"""The next batch is prepared beside the steps, in an order in which neither sees what the other has not finished.

There is no GPU here: streams are notes of what was asked for on which of them, and every call is watched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_fakes import SCHEME, disc_cases, tiny_configuration, tiny_recipe

from segfit.training import learner as learner_module
from segfit.training.learner import Learner
from segfit.training.sampler import Batches, PatchSampler, stream
from segfit.training.side_stream import SideStream
from segfit.training.threads import kept_threads


class FakeStream:
    """A stream that knows what of the others it has waited for."""

    def __init__(self, *_: object) -> None:
        self.asked = self.waits = 0  # calls until now
        self.seen: dict[FakeStream, int] = {}  # of another stream, that are done before what is asked for from now on

    def wait_stream(self, other: FakeStream) -> None:
        self.seen[other] = other.asked
        self.waits += 1

    def record_event(self, event: FakeEvent) -> FakeEvent:
        event.at = self.asked
        return event


class FakeEvent:
    def __init__(self, *, enable_timing: bool) -> None:
        self.at = -1

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1000.0 * (other.at - self.at)


class Streams(TorchDispatchMode):
    """Knows which stream made which memory; fails where another one uses it too early, or when it may be given away."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = self.present = FakeStream()
        self.made: dict[int, tuple[FakeStream, int, set[FakeStream], Any]] = {}
        self.calls: dict[FakeStream, Counter[str]] = {}

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.present = self.present, stream
        try:
            yield
        finally:
            self.present = before

    def keep_for(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        self.made[tensor.untyped_storage().data_ptr()][2].add(stream)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stream = self.present
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and (address := tensor.untyped_storage().data_ptr()) in self.made:
                maker, number, kept_for, _ = self.made[address]
                if maker is not stream:
                    assert number <= stream.seen.get(maker, -1), f"{func} did not wait"
                    assert stream in kept_for, f"{func} has memory that may be given away"
        result = func(*args, **(kwargs or {}))
        stream.asked += 1
        self.calls.setdefault(stream, Counter())[func.__name__.partition(".")[0]] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()  # kept, or its address might be used again
                if storage.data_ptr():
                    self.made.setdefault(storage.data_ptr(), (stream, stream.asked, set(), storage))
        return result


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Streams as a GPU has them, in notes."""
    notes = Streams()
    monkeypatch.setattr(learner_module, "apply", partial(learner_module.apply, together=True))
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", notes.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: notes.present)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: notes.keep_for(tensor, stream))
    return notes


def trained(*, as_on_a_gpu: bool = False) -> tuple[list[torch.Tensor], list[float]]:
    """Train some steps; return their losses and how long each waited."""
    recipe = tiny_recipe()
    learner = Learner(tiny_configuration(), recipe, SCHEME, torch.device("cpu"), seed=0)
    if as_on_a_gpu:
        learner.beside = SideStream(torch.device("cuda:0"))
    sampler = PatchSampler(
        disc_cases(), SCHEME, channels=1, sample_patch=(20, 20), patch=(16, 16), batch_size=2, foreground_share=0.5,
        seed=0, augmentation=recipe.augmentation,
    )  # fmt: skip
    values, stalls = [], []
    with Batches(sampler, reading=learner.beside.working) as batches, kept_threads(1):
        for step in range(3):
            stall = learner.beside.stall()
            batch = next(batches)
            stall.end(read=True)
            values.append(learner.step(batch, learning_rate=0.01, rng=stream(0, "augmentation", step)))
            stalls.append(stall.seconds())
    return values, stalls


def test_the_next_batch_is_prepared_beside_the_steps(streams: Streams) -> None:
    with streams:
        values, stalls = trained(as_on_a_gpu=True)
    side = next(stream for stream in streams.calls if stream is not streams.steps)
    assert streams.calls[side]["lift_fresh"] > 0  # augmentation
    assert streams.calls[side]["convolution"] == 0
    assert streams.calls[streams.steps]["convolution"] > 0
    assert side.waits == 1  # for what was there before the first step, and for no step
    assert stalls == [0.0, 0.0, 0.0]
    for one, other in zip(values, trained()[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("missing", ["wait_stream", "record_stream"])
def test_a_wrong_order_is_found(streams: Streams, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = FakeStream if missing == "wait_stream" else torch.Tensor
    monkeypatch.setattr(owner, missing, lambda *_: None)
    with pytest.raises(AssertionError, match="did not wait" if missing == "wait_stream" else "given away"), streams:
        trained(as_on_a_gpu=True)


def test_on_a_processor_reading_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr("segfit.training.side_stream.perf_counter", lambda: float(next(ticks)))
    assert trained()[1] == [1.0, 1.0, 1.0]


def test_what_waited_is_known_only_when_it_ended() -> None:
    stall = SideStream(torch.device("cpu")).stall()
    assert stall.seconds() == 0.0
    stall.end(read=True)
    ended = stall.seconds()
    stall.end()
    assert stall.seconds() == ended >= 0
    assert np.isfinite(ended)
