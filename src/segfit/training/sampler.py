"""Which patches a training step sees: where they are cut, how they are read, and reading them ahead.

The patch of (seed, step, sample) is always the same one, whatever the number of threads and however often a training
was interrupted: every sample draws from a stream of its own. Positions follow nnU-Net (case with replacement,
forced foreground, patches that hang over the border). Of samples that augmentation will only crop no more is read than
the network sees.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from math import prod
from operator import add
from threading import Lock
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.augmentation.policy import draw_matrices, turned
from segfit.labels import LabelScheme
from segfit.preprocessing.locations import ANNOTATED, Region
from segfit.specs import AugmentationSpec, Configuration, TrainingSpec
from segfit.training.batch import Batch
from segfit.training.schedule import forced_foreground

__all__ = [
    "Batches",
    "PatchSampler",
    "PatchSource",
    "TrainingCase",
    "corner_bounds",
    "keep_in_memory",
    "read_patch",
    "stream",
]

_OUTSIDE_LABEL = -1  # label of voxels outside the image; augmentation turns it into background at its end
_STREAMS = {"training": 0, "augmentation": 2}
_Labels = NDArray[np.int16] | None
_Box = tuple["PatchSource", tuple[int, ...]]  # case and lower corner


class TrainingCase(Protocol):
    """A preprocessed case as the sampler sees it; arrays may be read in part."""

    @property
    def id(self) -> str:
        """Case id."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape."""

    @property
    def locations(self) -> Mapping[str, NDArray[np.int32]]:
        """Sampled voxels of every class, (n, spatial axes) each, by name of the class."""

    def image(self, region: Region | None = None) -> NDArray[np.float32]:
        """Return the image, (c, *spatial), or a region of it."""

    def labels(self, region: Region | None = None) -> NDArray[np.int16] | None:
        """Return the label map, (*spatial), or a region of it; -1 is background outside the non-zero mask."""

    def previous_stage(self, region: Region | None = None) -> NDArray[np.int16] | None:
        """Return what the previous stage of a cascade predicted, like `labels`; None where there is none."""


class PatchSource(Protocol):
    """A `TrainingCase`, or one whose arrays are tensors on a device."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def locations(self) -> Mapping[str, NDArray[np.int32]]: ...  # noqa: D102
    def image(self, region: Region | None = None) -> Any: ...  # noqa: D102
    def labels(self, region: Region | None = None) -> Any: ...  # noqa: D102
    def previous_stage(self, region: Region | None = None) -> Any: ...  # noqa: D102


def stream(seed: int, name: Literal["training", "augmentation"], step: int, sample: int = 0) -> Any:
    """Return the random generator (numpy) of one sample of one step."""
    return np.random.default_rng((seed, _STREAMS[name], step, sample))


def corner_bounds(
    shape: Sequence[int], sample_patch: Sequence[int], patch: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the lowest and the highest lower corner of a patch (both included), one per axis.

    `sample_patch` is what is cut out, `patch` what the network sees of it: the patch may hang over the image by half
    of their difference, and an image smaller than the patch is centred in it. Rule of nnU-Net.
    """
    lowest, highest = [], []
    for size, cut, seen in zip(shape, sample_patch, patch, strict=True):
        need = max(cut - seen, cut - size)
        lowest.append(-((need + 1) // 2))
        highest.append(size + need // 2 + need % 2 - cut)
    return tuple(lowest), tuple(highest)


def read_patch(case: PatchSource, corner: Sequence[int], image: Any, labels: Any) -> None:
    """Fill `image` (c, *patch) and `labels` (k, *patch) from the box at `corner`; outside the case they stay.

    Both are arrays or tensors as the case has them. With `k` = 2 the second ones are those of the previous stage.
    """
    source, target = [], []
    for low, length, size in zip(corner, labels.shape[1:], case.shape, strict=True):
        start, stop = max(low, 0), min(low + length, size)
        if stop <= start:
            return
        source.append(slice(start, stop))
        target.append(slice(start - low, stop - low))
    image[(slice(None), *target)] = case.image(tuple(source))
    for own, read in zip(labels, (case.labels, case.previous_stage), strict=False):
        found = read(tuple(source))
        assert found is not None, f"case {case.id} has no labels"
        own[tuple(target)] = found


def _shares(weights: Sequence[float]) -> NDArray[np.float64]:
    """Return what cases up to each have of all draws; the last share is exactly 1, which no random number reaches.

    Scaled by a power of two, which changes no digit, so that large weights have a finite sum.
    """
    summed = np.cumsum(np.ldexp(np.array(weights), -int(np.frexp(max(weights))[1])))
    shares: NDArray[np.float64] = summed / summed[-1]
    return shares


class PatchSampler:
    """Draws and reads the patches of any step.

    Parameters
    ----------
    cases : drawn from with replacement
    weights : how often each case is drawn, relative to the others; alike when absent
    labels : names the classes that forced foreground chooses from
    channels : image channels
    sample_patch, patch : what is cut out and what the network sees of it; one axis less than the cases have when a
        two-dimensional network looks at slices of volumes (along axis 0)
    foreground_share : share of the samples of a batch that are forced to hold foreground
    probabilistic : each sample is forced with that probability, instead of the last ones of the batch
    previous_stage : also read what the previous stage of a cascade predicted
    augmentation : what will be done to the batches, by the stream of their step; when absent, all samples are cut out
        whole
    rows : the samples of every batch that are read; which are forced is told by their place in the whole batch
    """

    def __init__(
        self,
        cases: Sequence[PatchSource],
        labels: LabelScheme,
        *,
        channels: int,
        sample_patch: Sequence[int],
        patch: Sequence[int],
        batch_size: int,
        foreground_share: float,
        probabilistic: bool = False,
        seed: int,
        weights: Sequence[float] | None = None,
        previous_stage: bool = False,
        augmentation: AugmentationSpec | None = None,
        rows: slice = slice(None),
    ) -> None:
        self._rows = rows
        self._cases = tuple(cases)
        self._shares = None if weights is None else _shares(weights)
        slice_axis = (1,) * (len(cases[0].shape) - len(patch))
        self._cut = (*slice_axis, *sample_patch)
        self._seen = (*slice_axis, *patch)
        self._channels = channels
        self._axes = len(sample_patch)  # that the network sees
        self._augmentation = augmentation
        self._device: torch.device | None = None  # of the arrays of the cases; None: they are in memory or on disk
        self._forced = forced_foreground(batch_size, foreground_share)
        self._probability = foreground_share if probabilistic else None
        self._has_ignore = labels.ignore_value is not None
        self._keys = (*(class_.name for class_ in labels.classes), ANNOTATED)
        self._seed = seed
        self._maps = 1 + previous_stage  # of labels, per sample

    @classmethod
    def for_training(
        cls,
        cases: Sequence[PatchSource],
        configuration: Configuration,
        recipe: TrainingSpec,
        labels: LabelScheme,
        *,
        seed: int,
        weights: Sequence[float] | None = None,
        rows: slice = slice(None),
    ) -> PatchSampler:
        """Return what draws for the training of a configuration."""
        return cls(
            cases,
            labels,
            channels=configuration.image_channels,
            sample_patch=recipe.augmentation.sample_patch or configuration.patch_size,
            patch=configuration.patch_size,
            batch_size=configuration.batch_size,
            foreground_share=recipe.foreground_share,
            probabilistic=recipe.oversampling == "probabilistic",
            seed=seed,
            weights=weights,
            previous_stage=configuration.previous_stage is not None,
            augmentation=recipe.augmentation,
            rows=rows,
        )

    @property
    def bytes_per_voxel(self) -> int:
        """Bytes of image and labels for a voxel of a case."""
        return 4 * self._channels + 2 * self._maps

    def on_device(self, cases: Sequence[PatchSource], device: torch.device) -> PatchSampler:
        """Return what draws the same patches from the same cases, whose arrays are tensors on a device by now."""
        result = copy(self)
        result._cases, result._device = tuple(cases), device
        return result

    def draw(self, step: int, sample: int) -> tuple[PatchSource, tuple[int, ...]]:
        """Return the case and the lower corner (may be negative) of one sample of one step."""
        rng = stream(self._seed, "training", step, sample)
        if self._shares is None:
            case = self._cases[rng.integers(len(self._cases))]
        else:
            case = self._cases[np.searchsorted(self._shares, rng.random(), side="right")]
        lowest, highest = corner_bounds(case.shape, self._cut, self._seen)
        forced = self._forced[sample] if self._probability is None else rng.random() < self._probability
        voxel = self._centre(case, rng, forced=forced)
        if voxel is None:
            return case, tuple(int(rng.integers(low, high + 1)) for low, high in zip(lowest, highest, strict=True))
        # Only the lower side is held at its bound, as in nnU-Net: patches around foreground may hang over the
        # upper border much further than others, and its results depend on it.
        return case, tuple(max(low, int(v) - cut // 2) for low, v, cut in zip(lowest, voxel, self._cut, strict=True))

    def _centre(self, case: TrainingCase, rng: np.random.Generator, *, forced: bool) -> NDArray[np.int32] | None:
        """Return the voxel around which the patch is cut, or None where any position will do."""
        if not forced and not self._has_ignore:
            return None
        locations = case.locations
        keys = [key for key in (self._keys if forced else (ANNOTATED,)) if len(locations.get(key, ()))]
        if len(keys) > 1 and keys[-1] == ANNOTATED:
            keys.pop()
        if not keys:
            return None
        voxels = locations[keys[rng.integers(len(keys))]]
        voxel: NDArray[np.int32] = voxels[rng.integers(len(voxels))]
        return voxel

    def batch(self, step: int, *, pin_memory: bool = False) -> Batch:
        """Read the batch of one step, or this one's part of it; its cases are those of the whole batch.

        `pin_memory` has arrays of the host where a GPU can fetch them by itself.
        """
        samples = len(self._forced)
        drawn = [self.draw(step, sample) for sample in range(samples)]
        cases = tuple(case.id for case, _ in drawn)
        drawn = drawn[self._rows]
        if self._augmentation is None:
            return Batch(*self._read(drawn, self._cut, pin_memory), step, cases)
        rng = stream(self._seed, "augmentation", step)
        which = turned(draw_matrices(self._augmentation, self._axes, samples, rng)[self._rows])
        whole = self._read([drawn[sample] for sample in which], self._cut, pin_memory)
        margin = [cut // 2 - seen // 2 for cut, seen in zip(self._cut, self._seen, strict=True)]
        cropped: list[_Box | None] = [
            None if sample in which else (case, tuple(map(add, corner, margin)))
            for sample, (case, corner) in enumerate(drawn)
        ]
        return Batch(*self._read(cropped, self._seen, pin_memory), step, cases, whole)

    def _read(self, boxes: Sequence[_Box | None], size: Sequence[int], pin_memory: bool) -> tuple[Tensor, Tensor]:
        """Return images and labels of boxes of one size; outside the cases, and for None, they are 0 and -1."""
        pin = pin_memory and self._device is None
        image, labels = (
            torch.empty((len(boxes), number, *size), dtype=dtype, device=self._device, pin_memory=pin)
            for number, dtype in ((self._channels, torch.float32), (self._maps, torch.int16))
        )
        arrays: Any = image, labels
        fill: Any = Tensor.fill_
        if self._device is None:  # threads that read have no threads of their own, as torch would give them
            arrays, fill = (image.numpy(), labels.numpy()), np.ndarray.fill
        fill(arrays[0], 0)
        fill(arrays[1], _OUTSIDE_LABEL)
        for box, own_image, own_labels in zip(boxes, *arrays, strict=True):
            if box is not None:
                read_patch(box[0], box[1], own_image, own_labels)
        slices = range(2, 2 + len(size) - self._axes)  # of which there is one
        return image.squeeze(tuple(slices)), labels.squeeze(tuple(slices))


class Batches:
    """The batches of consecutive steps, read ahead by `threads` threads (0: read when asked for).

    At most two batches per thread wait. An error while reading is raised where the batch is asked for. Leaving the
    context drops what was read ahead and ends the threads. `sampler` may be replaced by one that draws the same;
    `reading` is the context in which it reads.
    """

    def __init__(
        self,
        sampler: PatchSampler,
        *,
        start: int = 0,
        threads: int = 0,
        pin_memory: bool = False,
        reading: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.sampler = sampler
        self._next = start
        self._pin = pin_memory
        self._reading = reading
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="segfit-batches") if threads else None
        self._ahead = 2 * threads
        self._waiting: deque[Future[Batch]] = deque()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pool is None:
            batch = self._read(self._next)
            self._next += 1
            return batch
        while len(self._waiting) < self._ahead:
            self._waiting.append(self._pool.submit(self._read, self._next))
            self._next += 1
        return self._waiting.popleft().result()

    def _read(self, step: int) -> Batch:
        with self._reading():
            return self.sampler.batch(step, pin_memory=self._pin)

    def go_back(self, step: int) -> None:
        """Go on with the batch of an earlier step."""
        for batch in self._waiting:
            batch.cancel()
        self._waiting.clear()
        self._next = step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()


def keep_in_memory(cases: Sequence[TrainingCase], *, channels: int, limit_gb: float) -> tuple[TrainingCase, ...]:
    """Return the cases, those that fit into `limit_gb` GiB (in the given order) read once and kept.

    Kept are float32 images, int16 labels, those of a previous stage and the locations; the other cases are read in part
    for every patch.
    """
    left = limit_gb * 2**30
    result: list[TrainingCase] = []
    for case in cases:
        size = prod(case.shape) * (4 * channels + 2)
        fits = size <= left
        left -= size if fits else 0
        result.append(_KeptCase(case) if fits else case)
    return tuple(result)


class _KeptCase:
    """A case that is read whole when it is first used, once even if several threads ask for it."""

    def __init__(self, case: TrainingCase) -> None:
        self.id, self.shape, self.locations = case.id, case.shape, case.locations
        self._case = case
        self._lock = Lock()
        self._arrays: tuple[NDArray[np.float32], _Labels, _Labels] | None = None

    def image(self, region: Region | None = None) -> NDArray[np.float32]:
        image, _, _ = self._read()
        return image if region is None else image[(slice(None), *region)]

    def labels(self, region: Region | None = None) -> _Labels:
        _, labels, _ = self._read()
        return labels if region is None or labels is None else labels[region]

    def previous_stage(self, region: Region | None = None) -> _Labels:
        _, _, labels = self._read()
        return labels if region is None or labels is None else labels[region]

    def _read(self) -> tuple[NDArray[np.float32], _Labels, _Labels]:
        with self._lock:
            if self._arrays is None:
                self._arrays = self._case.image(), self._case.labels(), self._case.previous_stage()
            return self._arrays
