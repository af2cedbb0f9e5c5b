"""The samples of a batch side by side on a CPU: groups of them go through the network, each on threads of its own.

Threads that share one operation wait for each other at its end, hundreds of times in a step; groups meet twice. On two
cores a step takes two thirds to four fifths of the time, beside a busy process half (docs/decisions/threads.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from segfit.training.parts import outputs_backward

__all__ = ["SideBySide", "best_groups"]

_SHARING = 0.5  # n threads in one operation are as fast as n ** 0.5 apart (two cores: 1.3 instead of 1.4)

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def best_groups(threads: int, samples: int, least: int = 1) -> int:
    """Return into how many groups of `least` samples or more a batch is best divided.

    The threads are shared out evenly among the groups.
    """
    return min(
        range(1, max(1, min(threads, samples // least)) + 1),
        key=lambda groups: (-(-samples // groups) / (threads // groups) ** _SHARING, -groups),
    )


class SideBySide:
    """Runs work on as many threads as torch has now, in groups; nothing is kept but the threads.

    Groups have `least` samples or more: torch leaves small convolutions of a single volume in single precision to
    slower kernels, so that one of them takes as long as two.
    """

    def __init__(self, device: torch.device, *, least: int = 1) -> None:
        self._device = device
        self._least = least
        self._groups = (1, 1)  # number, threads of each
        self._pool: ThreadPoolExecutor | None = None

    def arrange(self, samples: int) -> int:
        """Divide torch's threads among groups of so many samples; return how many groups there are."""
        threads = torch.get_num_threads() if self._device.type == "cpu" else 1
        number = best_groups(threads, samples, self._least)
        groups = (number, threads // number)
        if groups != self._groups:
            self._groups = groups
            if self._pool is not None:
                self._pool.shutdown()
            self._pool = None
            if number > 1:
                self._pool = ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=groups[1:])
        return number

    def map(self, work: Callable[[_In], _Out], items: Iterable[_In]) -> list[_Out]:
        """Do `work` on every item, on the threads of the last arrangement; return the results in order."""
        if self._pool is None:
            return [work(item) for item in items]
        threads = torch.get_num_threads()
        try:
            futures = [self._pool.submit(work, item) for item in items]
            wait(futures)  # also after a failure: nothing goes on behind the back of who is told of it
            return [future.result() for future in futures]
        finally:
            torch.set_num_threads(threads)  # what new threads set holds for a part of all others too

    def backward(
        self,
        network: nn.Module,
        batches: Sequence[Tensor],
        loss: Callable[[Any], Tensor],
        scaled: Callable[[Tensor], Tensor],
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        """Set the gradients of the network's parameters as one backward pass of the whole batch would.

        Parameters
        ----------
        batches : parts of one batch, each `(b, c, *spatial)`; no layer may depend on other samples
        loss : from the outputs for the whole batch, a tensor or a list of them
        scaled : the loss as the backward pass starts from it
        precision : context of the forward passes and the loss

        Returns the loss.
        """
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]

        def forward(batch: Tensor) -> list[Tensor]:
            with precision():
                outputs = network(batch)
            return [outputs] if isinstance(outputs, Tensor) else list(outputs)

        parts = self.map(forward, batches)
        value, ends = outputs_backward(parts, loss, scaled, precision)

        def backward(number: int) -> tuple[Tensor | None, ...]:
            used = [(output, end.grad) for output, end in zip(parts[number], ends[number], strict=True)]
            used = [(output, gradient) for output, gradient in used if gradient is not None]
            outputs, gradients = zip(*used, strict=True)
            return torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)

        for parameter, *gradients in zip(parameters, *self.map(backward, range(len(parts))), strict=True):
            found = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = sum(found[1:], start=found[0]) if found else None
        return value
