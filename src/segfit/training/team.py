"""The first process of a training has others take its steps with it: it alone decides, validates, and writes.

The others know no project, no clock and no file but the cases. They are told what is trained, then the state to go on
from, then step after step its number and learning rate; so none can decide otherwise than the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Self

import torch

from segfit.device import resolve_device
from segfit.errors import InputError, SegfitError, StageError
from segfit.execution.memory import free_memory_gb
from segfit.execution.processors import available_workers
from segfit.training.checkpoint import State
from segfit.training.device_cases import DeviceCases
from segfit.training.distributed import ALONE, PartedError, Ranks
from segfit.training.job import TrainingJob
from segfit.training.learner import Learner, training_on
from segfit.training.sampler import Batches, PatchSampler, TrainingCase, keep_in_memory, stream
from segfit.training.threads import kept_threads

__all__ = ["Step", "Team", "batches_of", "follow", "learner_of", "sampler_of"]

_MEMORY_SHARE = 0.5  # of the free RAM, for keeping cases (assumption)
_MOST_READERS = 4  # threads reading ahead for a GPU (assumption)


@dataclass(frozen=True, slots=True)
class Step:
    """A step, as it is ordered."""

    number: int  # steps before it
    learning_rate: float
    threads: int


@dataclass(frozen=True, slots=True)
class _Work:
    """A training, as it is begun."""

    job: TrainingJob
    cases: Sequence[TrainingCase]
    device: str  # of the first process


def learner_of(job: TrainingJob, device: torch.device, ranks: Ranks) -> Learner:
    """Return the learner of a training, with the weights of its seed."""
    return Learner(job.configuration, job.recipe, job.labels, device, seed=job.seed, ranks=ranks)


def sampler_of(job: TrainingJob, cases: Sequence[TrainingCase], ranks: Ranks) -> PatchSampler:
    """Return what draws the batches of a training, or a process's part of them.

    Cases are kept in memory where there is room, also for what other processes here keep.
    """
    configuration = job.configuration
    room_gb = free_memory_gb() * _MEMORY_SHARE / ranks.size
    kept = keep_in_memory(cases, channels=configuration.image_channels, limit_gb=room_gb)
    rows = ranks.for_batch(configuration.batch_size).rows
    return PatchSampler.for_training(
        kept, configuration, job.recipe, job.labels, seed=job.seed, weights=job.weights, rows=rows
    )


def batches_of(sampler: PatchSampler, learner: Learner, *, start: int) -> Batches:
    """Return the batches that a learner is given, from a step on."""
    kind = learner.device.type
    # On a CPU threads that read ahead would compete with those that train.
    threads = 0 if kind == "cpu" else min(_MOST_READERS, available_workers())
    return Batches(sampler, start=start, threads=threads, pin_memory=kind == "cuda", reading=learner.beside.working)


class Team:
    """The other processes, as the first one has them work, until the context ends; without any it does nothing."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self.is_parted = False  # one of them, or this one, has ended within a step

    @contextmanager
    def training(self, job: TrainingJob, cases: Sequence[TrainingCase], device: torch.device) -> Iterator[None]:
        """Have the others train too; raise the error of one that cannot."""
        if self.ranks.size > 1 and device.type not in ("cpu", "cuda"):
            raise InputError(f"several processes train on cpu or cuda, not on {device.type}", "use --device cpu")
        if self.is_parted:
            raise StageError("the processes of this command are no longer in step", "rerun it")
        # What a training starts from is in its first state.
        if self._tell(_Work(replace(job, initial=None, start=None, start_identity=None), cases, str(device))):
            for error in filter(None, self.ranks.answers(None)):
                raise error
        try:
            yield
        finally:
            self._tell(None)

    def go_on_from(self, state: State) -> None:
        """Have the others take over a state."""
        if self.ranks.size > 1:
            tensors = {name: tensor.detach().cpu() for name, tensor in state.tensors.items()}
            self._tell(replace(state, tensors=tensors))

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Have the others take the step that is taken inside."""
        self._tell(step)
        try:
            yield
        except BaseException:
            self.is_parted = True
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(PartedError):  # they have
            self._tell(None)
        self.is_parted = True

    def _tell(self, order: object) -> bool:
        """Tell the others, and return whether there are any."""
        if self.ranks.size == 1 or self.is_parted:
            return False
        self.is_parted = True
        self.ranks.told(order)
        self.is_parted = False
        return True


def follow(ranks: Ranks, local_rank: int) -> None:
    """Be one of the others until the first process needs none; `local_rank`: this one's number on its host.

    Raises `PartedError` where another process ended before its time.
    """
    while (work := ranks.told()) is not None:
        device = torch.device(work.device)
        if device.type == "cuda":
            device = torch.device("cuda", (device.index or 0) + local_rank)
        with training_on(work.job.configuration, work.job.recipe, device), kept_threads():
            _follow(work, ranks, device)


def _follow(work: _Work, ranks: Ranks, device: torch.device) -> None:
    job, failed = work.job, None
    try:
        device = resolve_device(str(device))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        learner = learner_of(job, device, ranks)
        sampler = sampler_of(job, work.cases, ranks)
        on_device = DeviceCases(work.cases, sampler, device, spared=0)
        batches = batches_of(sampler, learner, start=0)
    except SegfitError as error:
        failed = error
    if any(ranks.answers(failed)):
        return
    with batches:
        while (order := ranks.told()) is not None:
            if isinstance(order, State):
                learner.restore(order.tensors, order.facts["learner"])
                batches.go_back(order.step)
                continue
            batch = next(batches)
            assert batch.step == order.number, "all processes take the same step"
            torch.set_num_threads(order.threads)
            rng = stream(job.seed, "augmentation", order.number)
            learner.step(batch, learning_rate=order.learning_rate, rng=rng)
            on_device.after_step(batches)
