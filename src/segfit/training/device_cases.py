"""Cases that wait in the memory of a GPU: patches are cut there, and the host sends no voxels any more.

That is decided when some steps are done: by then torch holds what a step takes, and of the rest validation takes image
and logits of a case. Either all cases fit into half of what is left or none goes there. A case is read when it is first
drawn; the patches are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from segfit.preprocessing.locations import Region
from segfit.training.sampler import Batches, PatchSampler, TrainingCase

__all__ = ["DeviceCase", "DeviceCases"]

_SETTLED = 10  # steps after which torch holds all that steps take
_SHARE = 0.5  # of the memory that is left then (assumption)


class DeviceCases:
    """The cases of a training and what draws from them, for a GPU whose memory they may fit into.

    `spared` are bytes that are left for validation.
    """

    def __init__(
        self, cases: Sequence[TrainingCase], sampler: PatchSampler, device: torch.device, *, spared: int
    ) -> None:
        self._cases, self._sampler, self._device, self._spared = cases, sampler, device, spared
        self._bytes = sum(prod(case.shape) for case in cases) * sampler.bytes_per_voxel
        self._steps_left = _SETTLED if device.type == "cuda" else 0
        self._batches: Batches | None = None  # that are cut from the GPU's memory

    def after_step(self, batches: Batches) -> None:
        """Be told of every step; have the batches cut from the GPU's memory once it is known that there is room."""
        if not self._steps_left:
            return
        self._steps_left -= 1
        if self._steps_left:
            return
        free, _ = torch.cuda.mem_get_info(self._device)
        if self._bytes <= _SHARE * (free - self._spared):
            cases = [DeviceCase(case, self._device) for case in self._cases]
            batches.sampler, self._batches = self._sampler.on_device(cases, self._device), batches

    def give_back(self) -> bool:
        """Give the memory of the GPU back, for good, where steps need it; return whether there was any."""
        if self._batches is None:
            return False
        self._batches.sampler, self._batches = self._sampler, None
        return True


class DeviceCase:
    """A case with its arrays as tensors on a device, where they go whole when it is first used."""

    def __init__(self, case: TrainingCase, device: torch.device) -> None:
        self.id, self.shape, self.locations = case.id, case.shape, case.locations
        self._case, self._device = case, device
        self._lock = Lock()
        self._arrays: tuple[Tensor | None, ...] = ()

    def image(self, region: Region | None = None) -> Tensor | None:
        """Return the image, (c, *spatial), or a view of a region."""
        return self._view(0, region and (slice(None), *region))

    def labels(self, region: Region | None = None) -> Tensor | None:
        """Return the label map, (*spatial), or a view of a region."""
        return self._view(1, region)

    def previous_stage(self, region: Region | None = None) -> Tensor | None:
        """Return what the previous stage predicted, like `labels`."""
        return self._view(2, region)

    def _view(self, which: int, region: Region | None) -> Tensor | None:
        with self._lock:
            if not self._arrays:
                arrays = self._case.image(), self._case.labels(), self._case.previous_stage()
                self._arrays = tuple(
                    None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
                    for array in arrays
                )
            array = self._arrays[which]
        return array if array is None or region is None else array[region]
