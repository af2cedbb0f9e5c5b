"""The configuration rules: from spacings, shapes and a memory budget to patch, batch and topology.

Numbers only, and exactly the reference's (nnU-Net 2.8.1): every step below is one of its planning rules, evaluated in
float64 in the same order. `design_dataset` is the whole of it; `segfit.planning.planner` makes a plan of the result
and `segfit.planning.reference_plans` the reference's plans file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError
from segfit.planning.memory import feature_map_elements
from segfit.planning.presets import Rules
from segfit.planning.spacing import axis_order, median_shape, target_spacing
from segfit.planning.topology import Topology, topology

__all__ = [
    "LOWRES_SHARE",
    "SMALLEST_BATCH",
    "START_VOXELS",
    "Budget",
    "DatasetDesign",
    "Design",
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
        """Return a bound that no patch within the budget exceeds: the first stage's encoder alone would fill it."""
        single = Topology(strides=((1,) * ndim,), kernels=((3,) * ndim,), divisor=(1,) * ndim, patch=(1,) * ndim)
        return self.elements(ndim) * reference_batch(ndim) / SMALLEST_BATCH / self.estimate(single)

    def exceeded(self, ndim: int, estimate: int) -> bool:
        """Whether the patch is still too large. The plain network's 2D patches may fill the memory at batch size 2."""
        if self.rules.kind == "residual":
            return estimate > self.elements(ndim)
        return estimate / reference_batch(ndim) * SMALLEST_BATCH > self.elements(ndim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The numbers of one configuration; axes are those the network sees, after transposition."""

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
    """All configurations of a dataset: `fullres` is None for 2D data, `lowres` where one patch sees enough."""

    target_mm: tuple[float, ...]  # array order
    transpose: tuple[int, ...]
    plane: Design
    fullres: Design | None
    lowres: Design | None


def design(
    spacing: tuple[float, ...],
    median: tuple[float, ...],
    dataset_voxels: float,
    budget: Budget,
    fixed_patch: tuple[int, ...] | None = None,
) -> Design:
    """Return patch, topology and batch size for images of `median` voxels with `spacing` mm.

    The patch starts with as many voxels as 256x256x256 (2D: 2048x2048) have, of equal physical edge and cut to the
    median shape, and is reduced along the axis that covers most of the median image until its feature maps fit. A
    fixed patch is only rounded up to what its own topology must be divisible by.

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

    affordable = round(budget.elements(ndim) / estimate * reference_batch(ndim))
    covering = round(dataset_voxels * budget.rules.coverage / prod(current.patch))
    batch = max(min(affordable, covering), SMALLEST_BATCH)
    return Design(
        spacing_mm=spacing,
        median_shape=median,
        dataset_voxels=dataset_voxels,
        start_patch=start_patch,
        topology=current,
        batch_size=batch,
        estimate=estimate,
        patch_bound=bound,
        batch_bound=_batch_bound(affordable, covering),
    )


def design_dataset(
    spacings: NDArray[np.float64],
    shapes: NDArray[np.float64],
    num_training: int,
    budget: Budget,
    *,
    target_mm: tuple[float, ...] | None = None,
    patch_size: tuple[int, ...] | None = None,
    transpose: tuple[int, ...] | None = None,
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
    """
    target = target_mm or target_spacing(spacings, shapes)
    transpose = transpose or axis_order(target)
    in_order = median_shape(spacings, shapes, target)
    if min(in_order) < 1:
        raise InputError(
            f"at a target spacing of {list(target)} mm the median image would have {list(in_order)} voxels; "
            "choose a finer target spacing"
        )
    spacing = tuple(target[axis] for axis in transpose)
    median = tuple(in_order[axis] for axis in transpose)
    voxels = prod(median) * num_training
    patch = tuple(patch_size[axis] for axis in transpose) if patch_size and len(patch_size) == 3 else None
    fullres = design(spacing, median, voxels, budget, patch) if median[0] != 1 else None
    lowres = _lower_resolution(fullres, num_training, budget, patch) if fullres is not None else None
    # The plane's axes keep their order, so that a patch of two needs no reordering.
    patch = patch_size if patch_size and len(patch_size) == 2 else None
    plane = design(spacing[1:], median[1:], voxels, budget, patch)
    return DatasetDesign(target_mm=target, transpose=transpose, plane=plane, fullres=fullres, lowres=lowres)


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


def _lower_resolution(
    fullres: Design, num_training: int, budget: Budget, fixed_patch: tuple[int, ...] | None
) -> Design | None:
    """Coarsen in steps of 3 %, the finer axes first, until a patch covers a quarter of the median image."""
    target, median = fullres.spacing_mm, fullres.median_shape
    spacing = list(target)
    voxels = prod(median)
    patch_voxels = float(prod(fullres.patch))
    most = budget.most_voxels(len(target))
    lowres: Design | None = None
    while patch_voxels / voxels < LOWRES_SHARE:
        coarsest = max(spacing)
        finer = [coarsest / s > 2 for s in spacing]
        spacing = [s * _LOWRES_STEP if f or not any(finer) else s for s, f in zip(spacing, finer, strict=True)]
        size = [t / s * m for t, s, m in zip(target, spacing, median, strict=True)]
        voxels = prod(size)
        if fixed_patch is None and most / voxels < LOWRES_SHARE:
            continue  # too large for any patch: no need to design one
        rounded = tuple(float(max(1, round(n))) for n in size)
        lowres = design(tuple(spacing), rounded, voxels * num_training, budget, fixed_patch)
        patch_voxels = prod(lowres.patch)
    return lowres if lowres is not None and prod(median) / voxels >= LOWRES_GAIN else None
