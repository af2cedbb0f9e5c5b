"""One training by several processes, each on a device of its own: what their steps have in common.

Each has its samples of every batch. The loss of the whole batch is made of sums over all of them, which all know while
each derives its own part; so the sum of their gradients is the gradient that a single process has.

Torch's DistributedDataParallel is not used. It takes the mean of the gradients of separate losses, which is another
gradient where parts differ in size or where Dice pools the batch; and it sees what autograd adds to the parameters,
which groups of samples side by side on a CPU do not do. What it would gain is that gradients travel while others are
still computed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from segfit.errors import InputError, StageError, StoppedError, reason_of
from segfit.owner import Owner
from segfit.text import count, listing

__all__ = ["ALONE", "PartedError", "Ranks"]

_MEETING = timedelta(minutes=5)
_PATIENCE = timedelta(days=30)  # with a process that does other work; of one that ended its connection tells
_SEEN_ENDING_S = 2.0  # a process is known to have ended a moment after its connection is

_CPU = torch.device("cpu")


class PartedError(StoppedError):
    """One of the processes of a training has ended before its time."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a training, and which of them this is. Of a single one nothing here does anything.

    Parameters
    ----------
    rank : from 0, who decides
    size : their number
    samples : of a batch, all of them; 0: as many as there are
    owners : the processes, by rank
    """

    rank: int = 0
    size: int = 1
    samples: int = 0
    owners: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    @contextmanager
    def joined(cls, place: str = "env://") -> Iterator[Ranks]:
        """Meet the others, and part at the end; `place`, for torch, unless the environment that it reads says it."""
        both = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if both else "gloo"
        try:
            store, rank, size = next(rendezvous(place, timeout=_MEETING))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        except RuntimeError as error:
            raise StageError(f"the processes did not meet ({reason_of(error)})", "start all of them again") from error
        try:
            ranks = cls(dist.get_rank(), dist.get_world_size())
            yield replace(ranks, owners=tuple(ranks.answers(Owner.own().name)))
        except PartedError:
            if dist.group.WORLD is not None:
                dist.group.WORLD.abort()  # what waits on a GPU for a process that is gone would wait for ever
            raise
        finally:
            # Its threads end with it. One that wants to free a tensor when Python has ended would abort the process.
            gc.collect()
            dist.destroy_process_group()

    def for_batch(self, samples: int) -> Ranks:
        """Return the same processes with batches of so many samples; `InputError` if one would have none."""
        if samples < self.size:
            raise InputError(
                f"{self.size} processes cannot share a batch of {count(samples, 'sample')}",
                f"start {samples} at most, or plan larger batches: --set planning.batch_size={self.size}",
            )
        return replace(self, samples=samples) if self.size > 1 else self

    @property
    def rows(self) -> slice:
        """Which samples of a batch are of this process: nnU-Net's division, the first ones have one more."""
        if self.size == 1:
            return slice(None)
        each, more = divmod(self.samples, self.size)
        first = self.rank * each + min(self.rank, more)
        return slice(first, first + each + (self.rank < more))

    def own(self, rng: np.random.Generator) -> np.random.Generator:
        """Return a generator whose numbers no other process has."""
        return rng if self.size == 1 else rng.spawn(self.size)[self.rank]

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes; each derives its own."""
        return values if self.size == 1 else _Total.apply(values, self)  # type: ignore[no-untyped-call]

    def totals(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the totals of several tensors of one shape, in one message."""
        return values if self.size == 1 else self.total(torch.stack([one.to(values[0]) for one in values])).unbind(0)

    def pooled(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes for what all of them go on computing with, as layers do."""
        return values if self.size == 1 else _Pooled.apply(values, self)  # type: ignore[no-untyped-call]

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean over the samples of all processes of what is a mean over the own ones."""
        if self.size == 1:
            return value
        own = self.rows.stop - self.rows.start
        return self.total(value * (own / self.samples))

    def gathered(self, values: Tensor) -> Tensor:
        """Return `(b, ...)` of all samples in their order; each process derives its own."""
        if self.size == 1:
            return values
        whole = torch.zeros((self.samples, *values.shape[1:]), dtype=values.dtype, device=values.device)
        whole[self.rows] = values
        return self.total(whole)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have all processes hold the sum of their gradients."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.sum_up(flat)
        for gradient, part in zip(gradients, torch.split(flat, [one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view(gradient.shape))

    def sum_up(self, values: Tensor) -> None:
        """Have all processes hold the sum of `values`, in their place."""
        self._together(lambda: dist.all_reduce(values))

    def told(self, value: Any = None) -> Any:
        """Return what the first process tells; it gives its `value`."""
        box = [value]
        self._together(lambda: dist.broadcast_object_list(box, src=0, device=_CPU))
        return box[0]

    def answers(self, own: Any) -> list[Any]:
        """Return what every process says, by rank; this one says `own`."""
        said: list[Any] = [None] * self.size
        self._together(lambda: dist.all_gather_object(said, own))
        return said

    def _together(self, work: Callable[[], object]) -> None:
        """Do what all do; raise `PartedError` where another process has ended in the middle of it."""
        try:
            work()
        except RuntimeError as error:
            reason = reason_of(error)
        else:
            return
        # Not in the handler: the traceback there would keep torch's group.
        gone = self._ended()
        one = f"process {listing(gone, 4)}" if gone else f"another process ({reason})"
        problem = f"{one} of {self.size} has ended before its time"
        raise PartedError(problem, "the same command goes on where the last state was saved")

    def _ended(self) -> list[str]:
        """Return which processes are gone; of those of other hosts that is not known."""
        began = perf_counter()
        while True:
            known = enumerate(map(Owner.of_name, self.owners))
            gone = [str(rank) for rank, owner in known if owner is not None and owner.is_dead()]
            if gone or perf_counter() - began > _SEEN_ENDING_S:
                return gone
            sleep(0.05)


ALONE = Ranks()
"""A single process."""


class _Total(torch.autograd.Function):
    """The sum over all processes; what is derived of it goes to each as if the others' parts were constant."""

    @staticmethod
    def forward(_: Any, values: Tensor, ranks: Ranks) -> Tensor:
        result = values.clone(memory_format=torch.contiguous_format)
        ranks.sum_up(result)
        return result

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Pooled(torch.autograd.Function):
    """The sum over all processes; what each derives of it is summed too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        result = values.clone(memory_format=torch.contiguous_format)
        ranks.sum_up(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        result = gradient.clone(memory_format=torch.contiguous_format)
        ctx.ranks.sum_up(result)
        return result, None
