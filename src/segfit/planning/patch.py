"""How large a patch and a batch fit into memory, and at which lower resolution a patch sees enough of an image.

Numbers only, and exactly nnU-Net's (2.8.1): every step is one of its planning rules, evaluated in float64 in the same
order. `segfit.planning.configurations` makes configurations of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Literal, NamedTuple

from segfit.errors import InputError
from segfit.feature_maps import feature_map_elements
from segfit.planning.presets import Rules
from segfit.planning.topology import SMALLEST_MAP, Topology, topology
from segfit.text import by_axis

__all__ = [
    "LOWRES_SHARE",
    "LOWRES_STEP",
    "SMALLEST_BATCH",
    "MemoryBudget",
    "Patch",
    "affordable",
    "batch_size",
    "fit_patch",
    "lower_resolution",
    "nnunet_batch",
]

LOWRES_SHARE = 0.25
"""A patch that covers less than this share of the median image calls for a configuration of lower resolution."""
LOWRES_GAIN = 2
"""The lower resolution is dropped unless it has at least this many times fewer voxels."""
LOWRES_STEP = 1.03
START_VOXELS = {2: 2048**2, 3: 256**3}
"""Voxels of the patch, by number of axes, before the median image and memory cut it."""
SMALLEST_BATCH = 2
_BATCH_3D, _BATCH_2D = 2, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """What a configuration may cost.

    `heads` are the declared labels: nnU-Net counts every entry of ``dataset.json``'s `labels`.
    """

    rules: Rules
    memory_gb: float
    heads: int

    def elements(self, ndim: int) -> float:
        """Return the feature-map elements that fit at nnU-Net's usual batch size."""
        rules = self.rules
        return (rules.elements_2d if ndim == 2 else rules.elements_3d) * (self.memory_gb / rules.memory_gb)

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
            expansion=self.rules.expansion,
        )

    def most_voxels(self, ndim: int) -> float:
        """Return a bound that no patch of two stages or more exceeds within the budget.

        The second stage has no fewer voxels than by halving every axis; of further ones nothing is counted.
        """
        ones, twos = (1,) * ndim, (2,) * ndim
        smallest = Topology(strides=(ones, twos), kernels=((3,) * ndim,) * 2, divisor=twos, patch=twos)
        per_voxel = self.estimate(smallest) / prod(twos)
        return self.elements(ndim) * nnunet_batch(ndim) / SMALLEST_BATCH / per_voxel

    def exceeded(self, ndim: int, estimate: int) -> bool:
        """Whether the patch is still too large. The plain network's 2D patches may fill the memory at batch size 2."""
        if self.rules.kind != "plain":
            return estimate > self.elements(ndim)
        return estimate / nnunet_batch(ndim) * SMALLEST_BATCH > self.elements(ndim)


class Patch(NamedTuple):
    """A patch that fits: its topology, what it costs, and what limits it."""

    topology: Topology
    estimate: int  # feature-map elements of one sample
    start: tuple[int, ...]  # before memory was looked at
    bound: Literal["memory", "median", "start", "mixed", "fixed"]

    @property
    def size(self) -> tuple[int, ...]:
        """Voxels per axis, a multiple of the topology's divisor."""
        return self.topology.patch


def fit_patch(
    spacing: tuple[float, ...], median: tuple[float, ...], budget: MemoryBudget, fixed: tuple[int, ...] | None = None
) -> Patch:
    """Return the patch for images of `median` voxels with `spacing` mm, in the order in which the network sees them.

    It starts with as many voxels as 256x256x256 (2D: 2048x2048) have, of equal physical edge and cut to the median
    shape, and is reduced along the axis that covers most of the median image until its feature maps fit. A fixed patch
    is only rounded up to what its own topology must be divisible by.

    Raises `InputError` when not even the smallest patch fits.
    """
    ndim = len(spacing)
    wanted = start_volume(spacing)
    cut = [m < w for m, w in zip(median, wanted, strict=True)]
    current = topology(spacing, fixed or tuple(min(w, m) for w, m in zip(wanted, median, strict=True)))
    start, estimate = current.patch, budget.estimate(current)
    if fixed:
        return Patch(current, estimate, start, "fixed")
    bound: Literal["memory", "median", "start", "mixed"] = "median" if all(cut) else "mixed" if any(cut) else "start"
    seen = {current.patch}
    while budget.exceeded(ndim, estimate):
        bound = "memory"
        smaller = _reduced(spacing, median, current)
        if smaller is None or smaller.patch in seen:
            raise InputError(
                f"even a patch of {by_axis(current.patch)} voxels does not fit into {budget.memory_gb:g} GB with "
                f"{budget.rules.base_features} base features and {budget.heads} labels",
                "raise the memory target",
            )
        current = smaller
        seen.add(current.patch)
        estimate = budget.estimate(current)
    return Patch(current, estimate, start, bound)


def start_volume(spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the voxels per axis of a patch that neither the image nor memory limits."""
    ndim = len(spacing)
    density = [1 / s for s in spacing]
    edge = (START_VOXELS[ndim] / prod(density)) ** (1 / ndim)
    return tuple([max(1, round(d * edge)) for d in density])


def affordable(patch: Sequence[int], estimate: int, dataset_voxels: float, budget: MemoryBudget) -> tuple[float, float]:
    """Return how many samples of `estimate` feature-map elements memory allows, and the share of the dataset."""
    ndim = len(patch)
    memory = budget.elements(ndim) / estimate * nnunet_batch(ndim)
    return memory, dataset_voxels * budget.rules.coverage / prod(patch)


def batch_size(
    patch: Sequence[int], estimate: int, dataset_voxels: float, budget: MemoryBudget
) -> tuple[int, Literal["memory", "coverage", "least_memory", "least_coverage"]]:
    """Return how many samples of `estimate` feature-map elements make a batch, and what limits it."""
    memory, covering = affordable(patch, estimate, dataset_voxels, budget)
    found = min(round(memory), round(covering))
    if found < SMALLEST_BATCH:
        return SMALLEST_BATCH, "least_memory" if memory < covering else "least_coverage"
    return found, "memory" if round(memory) <= round(covering) else "coverage"


def nnunet_batch(ndim: int) -> int:
    """Return the batch size at which `MemoryBudget.elements` fill the memory."""
    return _BATCH_2D if ndim == 2 else _BATCH_3D


def lower_resolution(
    spacing: tuple[float, ...],
    median: tuple[float, ...],
    patch_voxels: float,
    budget: MemoryBudget,
    fixed: tuple[int, ...] | None = None,
) -> tuple[tuple[float, ...], tuple[float, ...], float, Patch] | None:
    """Coarsen in steps of 3 %, the finer axes first, until a patch covers a quarter of the median image.

    `spacing` and `median` are those of the full resolution, where a patch has `patch_voxels`. Returns the lower
    spacing in mm, the median image there, its voxels before rounding, and the patch; None where the full resolution
    has a quarter already, or where the lower one would keep more than half of the voxels.
    """
    found = None
    most = budget.most_voxels(len(spacing))
    voxels = prod(median)
    steps = _steps(spacing, median)
    while patch_voxels / voxels < LOWRES_SHARE:
        mm, size = next(steps)
        voxels = prod(size)
        if fixed is None and max(most / voxels, _unhalved_share(mm, size)) < LOWRES_SHARE:
            patch_voxels = 0  # too large for any patch: no need to look for one
            continue
        rounded = tuple([float(max(1, round(n))) for n in size])
        patch = fit_patch(tuple(mm), rounded, budget, fixed)
        found = tuple(mm), rounded, voxels, patch
        patch_voxels = prod(patch.size)
    return found if prod(median) / voxels >= LOWRES_GAIN else None


def _steps(spacing: Sequence[float], median: Sequence[float]) -> Iterator[tuple[list[float], list[float]]]:
    """Yield coarser and coarser spacings, and the size of the median image there."""
    mm = list(spacing)
    while True:
        coarsest = max(mm)
        finer = [coarsest / s > 2 for s in mm]
        mm = [s * LOWRES_STEP if f or not any(finer) else s for s, f in zip(mm, finer, strict=True)]
        yield mm, [t / s * m for t, s, m in zip(spacing, mm, median, strict=True)]


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
