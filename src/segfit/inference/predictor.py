"""From a preprocessed image to the network's outputs on the same grid: sliding window, mirroring, folds.

Every tile is seen by every network (fold) in every mirrored view; the logits are averaged with the importance of their
place in the tile. Sums are float32 whatever the arithmetic of the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segfit.device import deterministic_kernels, measure_hardware
from segfit.errors import InputError, StageError, warning
from segfit.execution.scratch import IN_MEMORY, Scratch
from segfit.inference.tiles import importance_map, mirror_subsets, tile_corners
from segfit.inference.window import Rows, Tiling, Window
from segfit.labels import Exchange, LabelScheme
from segfit.options import SMALLEST_TILE_STEP
from segfit.progress import SILENT, Progress
from segfit.specs import Configuration

__all__ = ["Precision", "Predictor", "require_options"]

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
            module.to(device).eval()
            for held in (*module.parameters(), *module.buffers()):
                if held.dim() == configuration.ndim + 2:  # others have no such layout
                    held.data = held.data.contiguous(memory_format=layout)
        self.batch = batch or default_batch(configuration, device)
        self._deterministic = deterministic

    def logits(self, image: NDArray[np.float32], *, progress: Progress = SILENT) -> Tensor:
        """Return the averaged logits, float32 ``(num_outputs, *spatial)`` on the grid of `image` ``(c, *spatial)``.

        A 2D network on a 3D image sees the slices along axis 0. If a GPU runs out of memory, the case is repeated
        with smaller batches, then with the sums on the CPU, then on the CPU alone; half precision that overflows is
        repeated in fp32. Each gives a warning. Raises `StageError` if the network gives no finite numbers.
        """
        [result] = self.stream(image, progress=progress)
        return result

    @torch.inference_mode()
    def stream(
        self, image: Rows, *, rows: int | None = None, scratch: Scratch = IN_MEMORY, progress: Progress = SILENT
    ) -> Iterator[Tensor]:
        """Yield what `logits` returns in blocks of rows along the first axis, to the same bits, as they are finished.

        About `rows` of the image and of the sums are held at a time, at least those of neighbouring tiles; None: all,
        in one block. What is held on the CPU is made in `scratch`. What `logits` repeats begins with the rows that
        were not yet handed out.
        """
        dtype, done = self.dtype, 0
        ladder = self._placements()
        placement = next(ladder)
        while done < image.shape[1]:
            try:
                with self._moved(placement.compute):
                    for block in self._slide(image, placement, dtype, done, rows, scratch, progress):
                        if not _all_finite(block):
                            break
                        done += block.shape[1]
                        yield block
                    else:
                        return
            except torch.OutOfMemoryError:
                following = next(ladder, None)
                if following is None:
                    raise
                problem = f"out of memory on {placement}; retrying the case with less"
                placement = following
            else:
                if dtype is not torch.float16:
                    raise StageError("the network output is not finite", "its weights or the image are unusable")
                progress.warn(warning("overflow", "the network overflowed in fp16; retrying the case in fp32"))
                dtype, ladder = None, self._placements()
                placement = next(ladder)
                continue
            torch.cuda.empty_cache()
            progress.warn(warning("out_of_memory", problem))

    def _placements(self) -> Iterator[_Placement]:
        """Yield where to run, the fastest first; the next one is for when memory did not suffice."""
        cpu = torch.device("cpu")
        yield _Placement(self.device, self.device, self.batch)
        if self.device.type == "cuda":
            if self.batch > 1:
                yield _Placement(self.device, self.device, 1)
            yield _Placement(self.device, cpu, 1)
            yield _Placement(cpu, cpu, 1)

    @contextmanager
    def _moved(self, device: torch.device) -> Iterator[None]:
        """Have the networks elsewhere for a while: the next case tries the own device again."""
        try:
            for module in self._modules:
                module.to(device)
            yield
        finally:
            for module in self._modules:
                module.to(self.device)

    def _slide(
        self,
        image: Rows,
        placement: _Placement,
        dtype: torch.dtype | None,
        done: int,
        rows: int | None,
        scratch: Scratch,
        progress: Progress,
    ) -> Iterator[Tensor]:
        """Yield blocks as `stream` does: the sums of weighted logits of all views of all tiles by those of the weights.

        Rows before `done` are neither wanted nor computed.
        """
        spatial = image.shape[1:]
        patch = (1,) * (len(spatial) - len(self.patch)) + self.patch
        tiling = Tiling.of(spatial, patch, self.tile_step, gaussian=self.gaussian)
        corners = [corner for corner in tiling.starts[0] if corner + patch[0] > done]
        held = tiling.shape[0] if rows is None else min(tiling.shape[0], max(rows, tiling.fewest_rows(placement.batch)))
        networks = len(self.subsets) * len(self.networks)
        window = Window(image, tiling, self.num_outputs, networks, held, corners[0], placement.store, scratch)
        importance = torch.from_numpy(importance_map(patch) if self.gaussian else np.ones(patch, np.float32))
        importance = importance.to(placement.store)
        views = ((c, subset) for c in tile_corners([corners, *tiling.starts[1:]]) for subset in self.subsets)
        total = len(corners) * prod(map(len, tiling.starts[1:])) * len(self.subsets)
        with progress.task("tiles", total) as task:
            while group := list(islice(views, placement.batch)):
                first, last = group[0][0][0], group[-1][0][0]
                if last + patch[0] > window.stop:
                    start = window.base
                    block = window.move(first)
                    yield from _unseen(block, start, done)
                self._add(group, window, patch, importance, placement, dtype)
                task.advance(len(group))
        yield from _unseen(window.rest(), window.base, done)

    def _add(
        self,
        group: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        window: Window,
        patch: tuple[int, ...],
        importance: Tensor,
        placement: _Placement,
        dtype: torch.dtype | None,
    ) -> None:
        """Add the weighted logits of a group of views, each a corner and the axes it is flipped along."""
        store, offset = placement.store, 1 + len(patch) - len(self.patch)  # from network axes to those of arrays here
        corners = [(corner[0] - window.base, *corner[1:]) for corner, _ in group]
        regions = [tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True)) for corner in corners]
        flips = [[axis + offset for axis in subset] for _, subset in group]
        tiles = [window.source[:, *region].flip(dims) for region, dims in zip(regions, flips, strict=True)]
        exchanged = [self.exchanged_axis in subset for _, subset in group]
        if self.exchanged_inputs:
            senders = torch.tensor(self.exchanged_inputs, device=store)
            tiles = [tile.index_select(0, senders) if own else tile for tile, own in zip(tiles, exchanged, strict=True)]
        inputs = torch.stack(tiles).reshape(len(group), -1, *self.patch)
        with deterministic_kernels(self._deterministic):
            logits = self._forward(inputs, placement.compute, dtype).to(store)
        partners = torch.tensor(self.exchanged_outputs, dtype=torch.int64, device=store)
        for one, region, dims, own in zip(logits, regions, flips, exchanged, strict=True):
            view = (one.index_select(0, partners) if own else one).reshape(-1, *patch).flip(dims)
            window.sums[:, *region].addcmul_(view, importance)

    def _forward(self, views: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """Return the sum of all networks' logits for a batch of views, float32."""
        views = views.to(device, memory_format=self.layout)
        low = dtype is not None and device == self.device  # elsewhere in float32
        with torch.autocast(device.type, dtype=dtype, enabled=low):
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


def _unseen(block: Tensor, start: int, done: int) -> Iterator[Tensor]:
    """Yield the rows of a block, which begins with the row `start`, that were not handed out before."""
    if block.shape[1] > max(0, done - start):
        yield block[:, max(0, done - start) :]


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


def require_options(mirror: Any, tile_step: Any, precision: Any) -> None:
    """Raise `InputError` for what a caller of `load_model` may not give."""
    if mirror is not None and not isinstance(mirror, bool):
        raise InputError(f"mirror is True, False or None, got {mirror!r}")
    is_number = isinstance(tile_step, int | float) and not isinstance(tile_step, bool)
    if tile_step is not None and not (is_number and SMALLEST_TILE_STEP <= tile_step <= 1):
        raise InputError(f"tile_step is a share of the patch from {SMALLEST_TILE_STEP} to 1, got {tile_step!r}")
    if precision is not None and precision not in get_args(Precision):
        raise InputError(f"precision is {', '.join(get_args(Precision))} or None, got {precision!r}")
