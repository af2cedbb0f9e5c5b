"""How often and where a U-Net pools, and which patch that asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SMALLEST_MAP", "Topology", "kernels_for", "topology"]

SMALLEST_MAP = 4
"""An axis is pooled as long as at least this many voxels remain."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Strides and kernels per stage, full resolution first, and the patch that fits them.

    `strides[0]` is all ones; `divisor` is the product of the strides per axis; `patch` is a multiple of it.
    """

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    divisor: tuple[int, ...]
    patch: tuple[int, ...]


def topology(spacing: Sequence[float], shape: Sequence[float]) -> Topology:
    """Return the topology for voxels of `spacing` (mm) and a patch of at least `shape` (voxels, may be fractional).

    The finest axes are pooled first, until spacings differ by less than a factor of two; then all of them together.
    An axis gets kernel size 3 as soon as its spacing is within a factor of two of the finest, and keeps it.
    """
    axes = range(len(spacing))
    now = list(spacing)
    size: list[float] = list(shape)
    divisor = [1] * len(now)
    strides = [(1,) * len(now)]
    while candidates := [axis for axis in axes if size[axis] >= 2 * SMALLEST_MAP]:
        finest = min([now[axis] for axis in candidates])
        pooled = [axis for axis in candidates if now[axis] / finest < 2]
        if len(pooled) == 1 and size[pooled[0]] < 3 * SMALLEST_MAP:
            break
        for axis in pooled:
            divisor[axis] *= 2
            now[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
        strides.append(tuple([2 if axis in pooled else 1 for axis in axes]))
    return Topology(
        strides=tuple(strides),
        kernels=kernels_for(spacing, strides),
        divisor=tuple(divisor),
        patch=tuple(math.ceil(n / d) * d for n, d in zip(shape, divisor, strict=True)),
    )


def kernels_for(spacing: Sequence[float], strides: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Return the kernels per stage that the rule of `topology` gives for strides, and voxels of `spacing` (mm)."""
    now = list(spacing)
    kernel: tuple[int, ...] = (1,) * len(now)
    kernels = []
    for stride in strides[:-1]:
        now = [mm * step for mm, step in zip(now, stride, strict=True)]
        finest = min(now)
        kernel = tuple([3 if size == 3 or mm / finest < 2 else 1 for size, mm in zip(kernel, now, strict=True)])
        kernels.append(kernel)
    return (*kernels, (3,) * len(now))
