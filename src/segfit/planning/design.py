"""The configuration rules: from spacings, shapes and a memory budget to patch, batch and topology.

Numbers only, and exactly the reference's (nnU-Net 2.8.1): every step below is one of its planning rules, evaluated in
float64 in the same order. `design_dataset` is the whole of it; `segfit.planning.planner` makes a plan of the result
and `segfit.nnunet.plans_reader` the reference's plans file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.feature_maps import feature_map_elements
from segfit.planning.presets import Rules
from segfit.planning.spacing import axis_order, median_shape, target_spacing
from segfit.planning.topology import SMALLEST_MAP, Topology, topology

__all__ = [
    "LOWRES_SHARE",
    "SMALLEST_BATCH",
    "START_VOXELS",
    "Budget",
    "DatasetDesign",
    "Design",
    "Wish",
    "batch_size",
    "design",
    "design_dataset",
    "reference_batch",
]

LOWRES_SHARE = 0.25
"""A patch that covers less than this share of the median image calls for a configuration of lower resolution."""
LOWRES_GAIN = 2
"""The lower resolution is dropped unless it has at least this many times fewer voxels."""
_LOWRES_STEP = 1.03
START_VOXELS = {2: 2048**2, 3: 256**3}
"""Voxels of the patch, by number of axes, before the median image and memory cut it."""
SMALLEST_BATCH = 2
_BATCH_3D, _BATCH_2D = 2, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a configuration may cost.

    `heads` are the declared labels: the reference counts every entry of ``dataset.json``'s `labels`.
    """

    rules: Rules
    memory_gb: float
    heads: int

    def elements(self, ndim: int) -> float:
        """Return the feature-map elements that fit at the reference batch size."""
        return self.rules.elements(ndim, self.memory_gb)

    def estimate(self, shape: Topology) -> int:
        """Return the feature-map elements of one sample of this topology's patch."""
        stages = len(shape.strides)
        encoder, decoder = self.rules.convs(stages)
        return feature_map_elements(
            self.rules.kind,
            shape.patch,
            features=self.rules.features(len(shape.patch), stages),
            strides=shape.strides,
            encoder_convs=encoder,
            decoder_convs=decoder,
            heads=self.heads,
        )

    def most_voxels(self, ndim: int) -> float:
        """Return a bound that no patch of two stages or more exceeds within the budget.

        The second stage has no fewer voxels than by halving every axis; of further ones nothing is counted.
        """
        ones, twos = (1,) * ndim, (2,) * ndim
        smallest = Topology(strides=(ones, twos), kernels=((3,) * ndim,) * 2, divisor=twos, patch=twos)
        per_voxel = self.estimate(smallest) / prod(twos)
        return self.elements(ndim) * reference_batch(ndim) / SMALLEST_BATCH / per_voxel

    def exceeded(self, ndim: int, estimate: int) -> bool:
        """Whether the patch is still too large. The plain network's 2D patches may fill the memory at batch size 2."""
        if self.rules.kind == "residual":
            return estimate > self.elements(ndim)
        return estimate / reference_batch(ndim) * SMALLEST_BATCH > self.elements(ndim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a configuration may cost, and what was asked for in place of derived values, in array order.

    `patch_size` belongs to the 3D (3 entries) or 2D (2) configurations. `target_mm` of a lower resolution is its
    spacing, and calls for it whatever the rules say.
    """

    budget: Budget
    target_mm: tuple[float, ...] | None = None
    patch_size: tuple[int, ...] | None = None
    transpose: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The numbers of one configuration; axes are those the network sees, after transposition."""

    budget: Budget
    transpose: tuple[int, ...]  # of the three axes that the rules know
    spacing_mm: tuple[float, ...]
    median_shape: tuple[float, ...]
    dataset_voxels: float  # voxels of the whole dataset at this resolution
    start_patch: tuple[int, ...]  # before memory was looked at
    topology: Topology
    batch_size: int
    estimate: int
    patch_bound: Literal["memory", "median shape", "start volume", "fixed"]
    batch_bound: Literal["memory", "dataset coverage", "minimum"]

    @property
    def patch(self) -> tuple[int, ...]:
        """Patch size in voxels, a multiple of the topology's divisor."""
        return self.topology.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetDesign:
    """All configurations of a dataset: `fullres` is None for 2D data, `lowres` where one patch sees enough.

    `target_mm` (array order) and `transpose` are those of the configurations without values of their own.
    """

    target_mm: tuple[float, ...]
    transpose: tuple[int, ...]
    plane: Design
    fullres: Design | None
    lowres: Design | None
    cascade: Design | None = None


def design(
    spacing: tuple[float, ...],
    median: tuple[float, ...],
    dataset_voxels: float,
    budget: Budget,
    fixed_patch: tuple[int, ...] | None = None,
    transpose: tuple[int, ...] = (0, 1, 2),
) -> Design:
    """Return patch, topology and batch size for images of `median` voxels with `spacing` mm.

    The patch starts with as many voxels as 256x256x256 (2D: 2048x2048) have, of equal physical edge and cut to the
    median shape, and is reduced along the axis that covers most of the median image until its feature maps fit. A
    fixed patch is only rounded up to what its own topology must be divisible by. `transpose` is how the axes came to be
    in this order.

    Raises `InputError` when not even the smallest patch fits.
    """
    ndim = len(spacing)
    density = [1 / s for s in spacing]
    edge = (START_VOXELS[ndim] / prod(density)) ** (1 / ndim)
    wanted = [max(1, round(d * edge)) for d in density]
    cut = any(m < w for m, w in zip(median, wanted, strict=True))
    start = fixed_patch or tuple(min(w, m) for w, m in zip(wanted, median, strict=True))
    current = topology(spacing, start)
    start_patch = current.patch
    estimate = budget.estimate(current)
    bound: Literal["memory", "median shape", "start volume", "fixed"] = "median shape" if cut else "start volume"
    if fixed_patch:
        bound = "fixed"
    seen = {current.patch}
    while bound != "fixed" and budget.exceeded(ndim, estimate):
        bound = "memory"
        smaller = _reduced(spacing, median, current)
        if smaller is None or smaller.patch in seen:
            raise _no_room(current.patch, budget)
        current = smaller
        seen.add(current.patch)
        estimate = budget.estimate(current)

    batch, batch_bound = batch_size(current.patch, estimate, dataset_voxels, budget)
    return Design(
        budget=budget,
        transpose=transpose,
        spacing_mm=spacing,
        median_shape=median,
        dataset_voxels=dataset_voxels,
        start_patch=start_patch,
        topology=current,
        batch_size=batch,
        estimate=estimate,
        patch_bound=bound,
        batch_bound=batch_bound,
    )


def batch_size(
    patch: Sequence[int], estimate: int, dataset_voxels: float, budget: Budget
) -> tuple[int, Literal["memory", "dataset coverage", "minimum"]]:
    """Return how many samples of `estimate` feature-map elements make a batch, and what limits it."""
    ndim = len(patch)
    affordable = round(budget.elements(ndim) / estimate * reference_batch(ndim))
    covering = round(dataset_voxels * budget.rules.coverage / prod(patch))
    return max(min(affordable, covering), SMALLEST_BATCH), _batch_bound(affordable, covering)


@dataclass(frozen=True, slots=True)
class _Data:
    """What the rules know of the cases: ``(cases, 3)`` spacings in mm and shapes, array order."""

    spacings: NDArray[np.float64]
    shapes: NDArray[np.float64]
    num_training: int

    def seen(self, wish: Wish, ndim: int) -> _View:
        """Return the data as a configuration of `ndim` axes sees them."""
        target = wish.target_mm or target_spacing(self.spacings, self.shapes)
        order = wish.transpose or axis_order(target)
        in_order = median_shape(self.spacings, self.shapes, target)
        if min(in_order) < 1:
            raise InputError(
                f"at a target spacing of {list(target)} mm the median image would have {list(in_order)} voxels; "
                "choose a finer target spacing"
            )
        patch = wish.patch_size if wish.patch_size is not None and len(wish.patch_size) == ndim else None
        if patch is not None and ndim == 3:  # a plane's axes keep their order
            patch = tuple(patch[axis] for axis in order)
        return _View(
            budget=wish.budget,
            target_mm=target,
            transpose=order,
            spacing_mm=tuple(target[axis] for axis in order),
            median=tuple(in_order[axis] for axis in order),
            patch=patch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A dataset at a target spacing; all but `target_mm` in transposed order."""

    budget: Budget
    target_mm: tuple[float, ...]
    transpose: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    median: tuple[float, ...]
    patch: tuple[int, ...] | None

    def design(self, num_training: int, axes: slice = slice(None)) -> Design:
        """Return the design of these axes."""
        voxels = prod(self.median) * num_training
        return design(self.spacing_mm[axes], self.median[axes], voxels, self.budget, self.patch, self.transpose)


def design_dataset(
    spacings: NDArray[np.float64],
    shapes: NDArray[np.float64],
    num_training: int,
    budget: Budget,
    *,
    target_mm: tuple[float, ...] | None = None,
    patch_size: tuple[int, ...] | None = None,
    transpose: tuple[int, ...] | None = None,
    own: Mapping[str, Wish] | None = None,
) -> DatasetDesign:
    """Return the design of every configuration the rules ask for.

    Parameters
    ----------
    spacings : (cases, 3) mm in array order; 2D images have a leading axis with one slice
    shapes : (cases, 3) voxels after cropping
    num_training : declared number of training cases; the batch-size cap uses it
    target_mm : target spacing in array order that replaces the derived one
    patch_size : patch in array order that replaces the derived one, of the 3D (3 entries) or 2D (2) configurations
    transpose : order of axes that replaces the derived one
    own : what single configurations, by name, have in place of all these
    """
    wish = Wish(budget=budget, target_mm=target_mm, patch_size=patch_size, transpose=transpose)
    own = own or {}
    data = _Data(spacings, shapes, num_training)
    common = data.seen(wish, 3)
    plane = data.seen(own.get("2d", wish), 2).design(num_training, slice(1, None))
    fullres = lowres = cascade = None
    if common.median[0] != 1:
        full_wish = own.get("3d_fullres", wish)
        full = data.seen(full_wish, 3)
        fullres = full.design(num_training)
        low_wish = own.get("3d_lowres", replace(wish, target_mm=None))
        if low_wish.target_mm is not None:
            lowres = data.seen(low_wish, 3).design(num_training)
        else:
            start = data.seen(replace(low_wish, target_mm=full.target_mm), 3)
            lowres = _lower_resolution(start, prod(fullres.patch), num_training)
        if lowres is not None:
            cascade_wish = own.get("3d_cascade_fullres", full_wish)
            cascade = fullres if cascade_wish == full_wish else data.seen(cascade_wish, 3).design(num_training)
    return DatasetDesign(
        target_mm=common.target_mm,
        transpose=common.transpose,
        plane=plane,
        fullres=fullres,
        lowres=lowres,
        cascade=cascade,
    )


def reference_batch(ndim: int) -> int:
    """Return the batch size at which `Budget.elements` fill the memory."""
    return _BATCH_2D if ndim == 2 else _BATCH_3D


def _batch_bound(affordable: int, covering: int) -> Literal["memory", "dataset coverage", "minimum"]:
    if min(affordable, covering) < SMALLEST_BATCH:
        return "minimum"
    return "memory" if affordable <= covering else "dataset coverage"


def _reduced(spacing: Sequence[float], median: Sequence[float], current: Topology) -> Topology | None:
    """Take the smallest possible step off the axis whose patch covers most of the median image (ties: the last).

    None where no axis can give anything.
    """
    patch = current.patch
    share = [p / m for p, m in zip(patch, median, strict=True)]
    axis = max(
        (a for a in range(len(share)) if patch[a] > current.divisor[a]), key=lambda a: (share[a], a), default=None
    )
    if axis is None:
        return None
    smaller = topology(spacing, _less(patch, axis, current.divisor[axis]))
    # The step is what the smaller patch must be divisible by, which may differ from the larger one's.
    step = smaller.divisor[axis]
    return topology(spacing, _less(patch, axis, step)) if step != current.divisor[axis] else smaller


def _less(patch: Sequence[int], axis: int, step: int) -> tuple[int, ...]:
    return tuple(n - step if a == axis else n for a, n in enumerate(patch))


def _no_room(patch: Sequence[int], budget: Budget) -> InputError:
    return InputError(
        f"even a patch of {'x'.join(map(str, patch))} voxels does not fit into {budget.memory_gb:g} GB with "
        f"{budget.rules.base_features} base features and {budget.heads} labels; raise the memory target"
    )


def _lower_resolution(start: _View, patch_voxels: float, num_training: int) -> Design | None:
    """Coarsen in steps of 3 %, the finer axes first, until a patch covers a quarter of the median image.

    `start` is the full resolution, where a patch has `patch_voxels`.
    """
    target, median, budget = start.spacing_mm, start.median, start.budget
    spacing = list(target)
    voxels = prod(median)
    most = budget.most_voxels(len(target))
    lowres: Design | None = None
    while patch_voxels / voxels < LOWRES_SHARE:
        coarsest = max(spacing)
        finer = [coarsest / s > 2 for s in spacing]
        spacing = [s * _LOWRES_STEP if f or not any(finer) else s for s, f in zip(spacing, finer, strict=True)]
        size = [t / s * m for t, s, m in zip(target, spacing, median, strict=True)]
        voxels = prod(size)
        if start.patch is None and max(most / voxels, _unhalved_share(spacing, size)) < LOWRES_SHARE:
            patch_voxels = 0  # too large for any patch: no need to design one
            continue
        rounded = tuple(float(max(1, round(n))) for n in size)
        lowres = design(tuple(spacing), rounded, voxels * num_training, budget, start.patch, start.transpose)
        patch_voxels = prod(lowres.patch)
    return lowres if lowres is not None and prod(median) / voxels >= LOWRES_GAIN else None


def _unhalved_share(spacing: Sequence[float], size: Sequence[float]) -> float:
    """Return a bound on the share of an image of `size` that a patch covers of which no axis is halved.

    Such a patch has one axis too short to be halved alone, and beside it axes that are too short at all, or more than
    twice as coarse.
    """
    alone, together = 3 * SMALLEST_MAP - 1, 2 * SMALLEST_MAP - 1
    shares = []
    for axis, finest in enumerate(spacing):
        most = [alone if a == axis else together if mm / finest < 2 else inf for a, mm in enumerate(spacing)]
        shares.append(prod(min(m, max(1, n + 0.5)) / n for m, n in zip(most, size, strict=True)))
    return max(shares)
