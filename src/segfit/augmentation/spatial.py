"""Rotation, scaling and cropping of one sample, image and labels together, in one interpolation.

Arrays are `(channels, *spatial)`; offsets and coordinates are in voxels. Pure functions of their arguments, on the
device of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import product
from math import prod

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["OUTSIDE", "affine_matrices", "centre_crop", "warp"]

OUTSIDE = -1  # label of voxels outside the image (and, from preprocessing, outside the non-zero mask)


def affine_matrices(angles: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the matrices that map an offset from the centre of the patch to the offset it is sampled at.

    Parameters
    ----------
    angles : (b, 3) radians about axis 0, 1 and 2, or (b, 1) in the plane
    scales : (b,); above 1 the field of view grows and objects shrink

    Returns
    -------
    (b, n, n), n = 3 or 2: Rz Ry Rx scale, each rotation right-handed in the coordinates (axis 0, axis 1, axis 2)
    """
    planes = ((0, 1),) if angles.shape[1] == 1 else ((1, 2), (2, 0), (0, 1))
    ndim = 2 if angles.shape[1] == 1 else 3
    result = np.eye(ndim) * scales[:, None, None]
    for angle, (a, b) in zip(angles.T, planes, strict=True):
        turn = np.tile(np.eye(ndim), (len(scales), 1, 1))
        turn[:, a, a] = turn[:, b, b] = np.cos(angle)
        turn[:, b, a] = np.sin(angle)
        turn[:, a, b] = -turn[:, b, a]
        result = turn @ result
    return result


def centre_crop(array: Tensor, patch: Sequence[int]) -> Tensor:
    """Return the view `(..., *patch)` of the centre of `(..., *spatial)`."""
    for axis, size in enumerate(patch, start=array.ndim - len(patch)):
        array = array.narrow(axis, array.shape[axis] // 2 - size // 2, size)
    return array


def warp(image: Tensor, labels: Tensor, matrix: NDArray[np.float64], patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sample a patch around the centre of an image and its labels.

    Parameters
    ----------
    image : (c, *spatial) floating; interpolated linearly, zero outside
    labels : (k, *spatial) integer; the label with the largest interpolated share wins, `OUTSIDE` being one of them, and
        the nearest voxel's label wins ties
    matrix : (n, n) from `affine_matrices`
    patch : n sizes; the voxel with offset q from its centre is sampled at offset `matrix @ q` from the image's centre

    Returns
    -------
    image (c, *patch), labels (k, *patch)
    """
    ndim = len(patch)
    image, labels = F.pad(image, (1, 1) * ndim), F.pad(labels, (1, 1) * ndim, value=OUTSIDE)
    strides = [prod(image.shape[axis + 1 :]) for axis in range(1, ndim + 1)]
    lowest, fractions = _locate(matrix, image.shape[1:], patch, strides, image.device)
    values, classes = image.flatten(1), labels.flatten(1)

    closest = lowest + sum((f > 0.5) * stride for f, stride in zip(fractions, strides, strict=True))
    nearest = classes.index_select(1, closest)
    result = torch.zeros(len(values), len(lowest), dtype=image.dtype, device=image.device)
    share = torch.zeros(nearest.shape, dtype=image.dtype, device=image.device)
    for step, weight in _corners(fractions, strides):
        index = lowest + step
        result.addcmul_(values.index_select(1, index), weight)
        share += (classes.index_select(1, index) == nearest) * weight
    _settle(nearest, share, classes, lowest, fractions, strides)
    return result.view(-1, *patch), nearest.view(-1, *patch)


def _locate(
    matrix: NDArray[np.float64],
    padded: Sequence[int],
    patch: Sequence[int],
    strides: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, list[Tensor]]:
    """Return for every voxel of the patch the flat index of its lowest neighbour, and per axis how far it is beyond it.

    The image is padded by one voxel on every side; whatever lies further out is moved onto the padding.
    """
    lowest = torch.zeros(prod(patch), dtype=torch.int64, device=device)
    fractions: list[Tensor] = []
    for row, full, stride in zip(matrix, padded, strides, strict=True):
        position = torch.full((1,) * len(patch), (full - 1) / 2, device=device)
        for axis, (factor, size) in enumerate(zip(row, patch, strict=True)):
            offsets = torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2
            position = position + float(factor) * offsets.view(-1, *(1,) * (len(patch) - 1 - axis))
        position = position.flatten().clamp_(0, full - 1)
        lower = position.floor().clamp_(max=full - 2)
        fractions.append(position - lower)
        lowest += lower.long() * stride
    return lowest, fractions


def _corners(fractions: Sequence[Tensor], strides: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the 2^n neighbours of every voxel: what to add to the lowest one's index, and their weights."""
    for upper in product((False, True), repeat=len(strides)):
        step = sum(stride for stride, up in zip(strides, upper, strict=True) if up)
        yield step, reduce(torch.mul, (f if up else 1 - f for f, up in zip(fractions, upper, strict=True)))


def _settle(
    nearest: Tensor, share: Tensor, classes: Tensor, lowest: Tensor, fractions: Sequence[Tensor], strides: Sequence[int]
) -> None:
    """Replace, in place, the nearest label where another one has a larger share; `share` is the nearest label's.

    Only a label without half of the weight can lose, so that few voxels are looked at, whatever the number of labels.
    """
    channel, voxel = (share < 0.5).nonzero(as_tuple=True)
    steps, weights = zip(*_corners([f[voxel] for f in fractions], strides), strict=True)
    neighbours = torch.stack([classes[channel, lowest[voxel] + step] for step in steps])
    shares = torch.stack([((neighbours == label) * torch.stack(weights)).sum(0) for label in neighbours])
    largest, winner = shares.max(0)
    label = neighbours.gather(0, winner[None])[0]
    nearest[channel, voxel] = torch.where(largest > share[channel, voxel], label, nearest[channel, voxel])
