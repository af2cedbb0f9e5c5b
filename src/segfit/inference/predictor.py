"""From a preprocessed image to the network's outputs on the same grid: sliding window, mirroring, folds.

Every tile is seen by every network (fold) in every mirrored view; the logits are averaged with the importance of their
place in the tile. Sums are float32 whatever the arithmetic of the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from segfit.device import deterministic_kernels, measure_hardware
from segfit.errors import StageError, warning
from segfit.inference.tiles import (
    axis_coverage,
    axis_importance,
    importance_map,
    mirror_subsets,
    padding,
    tile_corners,
    tile_starts,
)
from segfit.labels import Exchange, LabelScheme
from segfit.progress import SILENT, Progress
from segfit.specs import Configuration

__all__ = ["Precision", "Predictor"]

Precision = Literal["fp32", "bf16", "fp16"]

_CPU_BATCH_VOXELS = 2**17  # views that fill a processor; more only cost cache


@dataclass(frozen=True, slots=True)
class _Placement:
    """Where a prediction runs: networks on `compute`, image and sums on `store`, `batch` views at a time."""

    compute: torch.device
    store: torch.device
    batch: int

    def __str__(self) -> str:
        where = "" if self.store == self.compute else f", image and sums on {self.store}"
        return f"{self.compute} with batches of {self.batch}{where}"


class Predictor:
    """Runs the networks of one configuration over whole images.

    Parameters
    ----------
    configuration : patch size and number of axes the networks see
    labels : decides the number of outputs
    networks : one per fold: any functions of views ``(b, c, *patch)`` that return logits ``(b, num_outputs, *patch)``
        on the same device. Modules have deep supervision off; they stay on the device, in evaluation mode
    mirror_axes : network axes flipped at test time; every axis doubles the work, () means none
    tile_step : distance of neighbouring tiles as a share of the patch, in (0, 1]
    precision : arithmetic of the forward pass; falls back to fp32 where the device lacks it
    channels_last : memory layout of networks and views, on a processor in any case
    exchange : label values that change places when its axis is flipped: in the input of flipped views, where it has the
        labels of a previous stage, and back in their outputs
    gaussian : weigh the voxels of a tile by their distance to its centre (off: all alike)
    batch : views per forward pass; None: decided from the device and the patch
    deterministic : only kernels that give the same bits again, see `segfit.device.deterministic_kernels`
    """

    def __init__(
        self,
        configuration: Configuration,
        labels: LabelScheme,
        networks: Sequence[Callable[[Tensor], Tensor]],
        mirror_axes: Sequence[int],
        device: torch.device,
        tile_step: float = 0.5,
        *,
        precision: Precision = "fp32",
        channels_last: bool = False,
        exchange: Exchange | None = None,
        gaussian: bool = True,
        batch: int | None = None,
        deterministic: bool = False,
    ) -> None:
        assert networks
        assert all(0 <= axis < configuration.ndim for axis in mirror_axes)
        self.patch = configuration.patch_size
        self.num_outputs = labels.num_outputs
        self.subsets = mirror_subsets(mirror_axes)
        self.exchanged_axis = None if exchange is None else exchange.axis
        self.exchanged_outputs = () if exchange is None else labels.exchanged_outputs(exchange.pairs)
        self.exchanged_inputs: tuple[int, ...] = ()
        if exchange is not None and configuration.previous_stage is not None:
            channels = configuration.image_channels
            places = labels.exchanged_foreground(exchange.pairs)
            self.exchanged_inputs = (*range(channels), *(channels + place for place in places))
        self.device = device
        self.tile_step = tile_step
        self.gaussian = gaussian
        self.dtype = _supported_dtype(precision, device)
        layout = torch.preserve_format
        if channels_last or device.type == "cpu":
            layout = torch.channels_last if configuration.ndim == 2 else torch.channels_last_3d
        self.layout = layout
        self.networks = networks
        self._modules = [network for network in networks if isinstance(network, nn.Module)]
        for module in self._modules:
            module.to(device, memory_format=layout).eval()  # type: ignore[call-overload]
        self.batch = batch or default_batch(configuration, device)
        self._deterministic = deterministic

    @torch.inference_mode()
    def logits(self, image: NDArray[np.float32], *, progress: Progress = SILENT) -> Tensor:
        """Return the averaged logits, float32 ``(num_outputs, *spatial)`` on the grid of `image` ``(c, *spatial)``.

        A 2D network on a 3D image sees the slices along axis 0. If a GPU runs out of memory, the case is repeated
        with smaller batches, then with the sums on the CPU, then on the CPU alone; half precision that overflows is
        repeated in fp32. Each gives a warning. Raises `StageError` if the network gives no finite numbers.
        """
        dtype = self.dtype
        with deterministic_kernels(self._deterministic):
            result = self._with_fallback(image, dtype, progress)
            if dtype is torch.float16 and not _all_finite(result):
                progress.warn(warning("overflow", "the network overflowed in fp16; retrying the case in fp32"))
                result = self._with_fallback(image, None, progress)
        if not _all_finite(result):
            raise StageError("the network output is not finite", "its weights or the image are unusable")
        return result

    def _with_fallback(self, image: NDArray[np.float32], dtype: torch.dtype | None, progress: Progress) -> Tensor:
        *first, last = self._placements()
        for placement in first:
            result = self._try(image, placement, dtype, progress)
            if result is not None:
                return result
            torch.cuda.empty_cache()
            progress.warn(warning("out_of_memory", f"out of memory on {placement}; retrying the case with less"))
        return self._run(image, last, dtype, progress)

    def _placements(self) -> Iterator[_Placement]:
        """Yield where to run, the fastest first; the next one is for when memory did not suffice."""
        cpu = torch.device("cpu")
        yield _Placement(self.device, self.device, self.batch)
        if self.device.type == "cuda":
            if self.batch > 1:
                yield _Placement(self.device, self.device, 1)
            yield _Placement(self.device, cpu, 1)
            yield _Placement(cpu, cpu, 1)

    def _try(
        self, image: NDArray[np.float32], placement: _Placement, dtype: torch.dtype | None, progress: Progress
    ) -> Tensor | None:
        """Return the logits, or None without memory; by then everything the attempt held is free again."""
        try:
            return self._run(image, placement, dtype, progress)
        except torch.OutOfMemoryError:
            return None

    def _run(
        self, image: NDArray[np.float32], placement: _Placement, dtype: torch.dtype | None, progress: Progress
    ) -> Tensor:
        if placement.compute == self.device:
            return self._slide(image, placement, dtype, progress)
        try:  # for this case only: the next one tries the device again
            for module in self._modules:
                module.to(placement.compute)
            return self._slide(image, placement, None, progress)
        finally:
            for module in self._modules:
                module.to(self.device)

    def _slide(
        self, image: NDArray[np.float32], placement: _Placement, dtype: torch.dtype | None, progress: Progress
    ) -> Tensor:
        """Sum the weighted logits of all views of all tiles and divide by the sum of the weights."""
        ndim = image.ndim - 1
        patch = (1,) * (ndim - len(self.patch)) + self.patch
        margins = padding(image.shape[1:], patch)
        source = functional.pad(
            torch.from_numpy(np.ascontiguousarray(image)).to(placement.store),
            [amount for margin in reversed(margins) for amount in margin],
        )
        shape = source.shape[1:]
        starts = [tile_starts(n, p, self.tile_step) for n, p in zip(shape, patch, strict=True)]
        profiles = [axis_importance(p) if self.gaussian else np.ones(p) for p in patch]
        importance = torch.from_numpy(importance_map(patch) if self.gaussian else np.ones(patch, np.float32))
        importance = importance.to(placement.store)
        senders, partners = (
            torch.tensor(order, dtype=torch.int64, device=placement.store)
            for order in (self.exchanged_inputs, self.exchanged_outputs)
        )
        total = torch.zeros((self.num_outputs, *shape), device=placement.store)
        views = [(corner, subset) for corner in tile_corners(starts) for subset in self.subsets]
        offset = 1 + ndim - len(self.patch)  # from network axes to axes of the arrays here
        with progress.task("tiles", len(views)) as task:
            for first in range(0, len(views), placement.batch):
                group = views[first : first + placement.batch]
                regions = [tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True)) for corner, _ in group]
                flips = [[axis + offset for axis in subset] for _, subset in group]
                tiles = [source[:, *region].flip(dims) for region, dims in zip(regions, flips, strict=True)]
                if self.exchanged_inputs:
                    exchanged = (self.exchanged_axis in subset for _, subset in group)
                    tiles = [
                        tile.index_select(0, senders) if own else tile
                        for tile, own in zip(tiles, exchanged, strict=True)
                    ]
                inputs = torch.stack(tiles).reshape(len(group), -1, *self.patch)
                logits = self._forward(inputs, placement.compute, dtype).to(placement.store)
                for one, region, dims, (_, subset) in zip(logits, regions, flips, group, strict=True):
                    own = one.index_select(0, partners) if self.exchanged_axis in subset else one
                    view = own.reshape(-1, *patch).flip(dims)
                    total[:, *region].addcmul_(view, importance)
                task.advance(len(group))
        total /= len(self.subsets) * len(self.networks)
        for axis, (size, begin, profile) in enumerate(zip(shape, starts, profiles, strict=True)):
            coverage = torch.from_numpy(axis_coverage(size, begin, profile)).float().to(placement.store)
            total /= coverage.reshape([-1 if a == axis else 1 for a in range(ndim)])
        inside = tuple(slice(low, low + n) for (low, _), n in zip(margins, image.shape[1:], strict=True))
        return total[:, *inside]

    def _forward(self, views: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Return the sum of all networks' logits for a batch of views, float32."""
        views = views.to(device, memory_format=self.layout)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            result: Tensor = self.networks[0](views).float()
            for network in self.networks[1:]:
                result = result + network(views).float()
        expected = (views.shape[0], self.num_outputs, *views.shape[2:])
        if result.shape != expected:  # it might be broadcast otherwise
            raise StageError(
                f"the network made an array of shape {tuple(result.shape)} of views of shape {tuple(views.shape)}, "
                f"where {expected} is expected"
            )
        return result


def _supported_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the autocast type, or None for fp32."""
    if precision == "fp16" and device.type == "cuda":
        return torch.float16
    if precision == "bf16" and device.type in ("cpu", "cuda") and measure_hardware(str(device)).fast_bf16:
        return torch.bfloat16
    return None


def default_batch(configuration: Configuration, device: torch.device) -> int:
    """Return how many views go through the network at once.

    A device that trains on `batch_size` patches holds at least twice as many without gradients.
    """
    if device.type == "cpu":
        return max(1, _CPU_BATCH_VOXELS // prod(configuration.patch_size))
    return 2 * configuration.batch_size


def _all_finite(values: Tensor) -> bool:
    # The extremes tell it without a mask of the size of the array; NaN and infinities pass through both.
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low) and torch.isfinite(high))
