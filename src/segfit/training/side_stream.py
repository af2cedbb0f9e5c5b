"""What a GPU does beside the steps of a training: it fetches and augments the next batch while it still learns.

The host is some steps ahead of a GPU, and what it asks for on a stream of its own need not wait for these steps. On
other devices all is done in turn.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

__all__ = ["SideStream", "Stall"]


class Stall:
    """How long a step stood still for want of samples: on a GPU for all that is done beside it, else for reading."""

    def __init__(self, steps: torch.cuda.Stream | None) -> None:
        self._steps = steps
        self._began: Any = self._now()
        self._ended: Any = None

    def _now(self) -> Any:
        if self._steps is None:
            return perf_counter()
        return self._steps.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]

    def end(self, *, read: bool = False) -> None:
        """Take its end; `read`: the samples have been read, and a GPU still has to fetch and to augment them."""
        if self._ended is None and not (read and self._steps is not None):
            self._ended = self._now()

    def seconds(self) -> float:
        """Return how long it was, once the GPU has done the step."""
        if self._ended is None:
            return 0.0
        passed = self._ended - self._began if self._steps is None else self._began.elapsed_time(self._ended) / 1000
        return float(passed)


class SideStream:
    """A stream of its own on a GPU, nothing on another device. It begins when all that was asked for until now is done.

    Tensors that are made and used in `working()` alone need nothing more; others are handed over. Any thread may work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stall: Stall | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def stall(self) -> Stall:
        """Return what tells how long the next step stands still from now on, as far as samples are to blame."""
        self._stall = Stall(torch.cuda.current_stream(self._device) if self._stream is not None else None)
        return self._stall

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which what is asked for is done beside the steps."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def hand_over(self, *made: Tensor) -> None:
        """Have the steps wait for all that was asked for here, and keep the memory of `made` until they used it."""
        if self._stream is None:
            return
        steps = torch.cuda.current_stream(self._device)
        steps.wait_stream(self._stream)
        for tensor in made:
            tensor.record_stream(steps)
        if self._stall is not None:
            self._stall.end()
