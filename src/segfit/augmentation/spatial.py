"""Rotation, scaling and cropping of one sample, image and labels together, in one interpolation.

Arrays are `(channels, *spatial)`; offsets and coordinates are in voxels. Pure functions of their arguments, on the
device of the image. On a processor a sample is interpolated in parts that stay in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import floor, prod

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["OUTSIDE", "affine_matrices", "centre_crop", "warp", "warp_together"]

OUTSIDE = -1  # label of voxels outside the image (and, from preprocessing, outside the non-zero mask)
_MIXED = -2  # stands for the label of voxels near which there are several
_AT_ONCE = 2**17  # voxels, of all channels, that are interpolated at once on a processor


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
    full = tuple(size + 2 for size in image.shape[1:])
    box = _reach(matrix, full, patch)
    labels = _cut(labels, box, OUTSIDE)
    strides = [prod(labels.shape[axis + 1 :]) for axis in range(1, len(patch) + 1)]
    classes = labels.flatten(1)
    plain = classes.masked_fill(_mixed(labels, strides), _MIXED)
    plane = len(patch) == 2  # for which torch has a fast interpolation, other than for volumes
    if plane:
        whole = torch.from_numpy(matrix).to(image.device, torch.float32)
        values, new_image = image, _of_planes(image.unsqueeze(0), whole.unsqueeze(0), patch).squeeze(0)
    else:
        values, new_image = _cut(image, box, 0).flatten(1), image.new_empty((len(image), *patch))
    new_labels = labels.new_empty((len(labels), *patch))
    mixed: list[tuple[Tensor, ...]] = []
    rows = max(1, _AT_ONCE // (prod(patch[1:]) * max(len(image), len(labels))))
    for start in range(0, patch[0], rows):
        part = slice(start, min(start + rows, patch[0]))
        lowest, fractions = _locate(matrix, full, box, patch, part, strides, image.device)
        if not plane:
            new_image[:, part] = _interpolated(values, lowest, fractions, strides).view_as(new_image[:, part])
        found = plain.index_select(1, lowest)
        new_labels[:, part] = found.view_as(new_labels[:, part])
        channel, voxel = (found == _MIXED).nonzero(as_tuple=True)
        place = channel * prod(patch) + (voxel + start * prod(patch[1:]))
        lowest = lowest.index_select(0, voxel) + channel * classes.shape[1]
        mixed.append((place, lowest, *(share.index_select(0, voxel) for share in fractions)))
    place, lowest, *fractions = map(torch.cat, zip(*mixed, strict=True))
    new_labels.view(-1).index_copy_(0, place, _winners(classes.flatten(), lowest, fractions, strides))
    return new_image, new_labels


def _of_planes(image: Tensor, matrix: Tensor, patch: Sequence[int]) -> Tensor:
    """Return the images `(b, c, *patch)` of `(b, c, *spatial)` with two axes, by matrices `(b, 2, 2)`."""
    rows, columns = (torch.arange(size, device=image.device, dtype=torch.float32) - (size - 1) / 2 for size in patch)
    grid = [
        (by_row.view(-1, 1, 1) * rows.unsqueeze(1) + by_column.view(-1, 1, 1) * columns).mul_(2 / size)
        for (by_row, by_column), size in zip((row.unbind(1) for row in matrix.unbind(1)), image.shape[2:], strict=True)
    ]
    return F.grid_sample(image, torch.stack(grid[::-1], dim=-1).to(image.dtype), align_corners=False)


def _reach(matrix: NDArray[np.float64], full: Sequence[int], patch: Sequence[int]) -> list[tuple[int, int]]:
    """Return first voxel and end, per axis, of all neighbours in an image of these sizes, with one voxel to spare."""
    half = np.abs(matrix) @ ((np.array(patch) - 1) / 2)
    lowest = [max(0, min(floor((n - 1) / 2 - h) - 1, n - 2)) for n, h in zip(full, half, strict=True)]
    ends = [max(2, min(floor((n - 1) / 2 + h) + 3, n)) for n, h in zip(full, half, strict=True)]
    return list(zip(lowest, ends, strict=True))


def _cut(array: Tensor, box: Sequence[tuple[int, int]], outside: int) -> Tensor:
    """Return a box of `(c, *spatial)` as if it were padded by one voxel, with this value, on every side."""
    pads: list[int] = []
    for axis, (start, end) in enumerate(box, start=1):
        size = array.shape[axis]
        before, after = max(0, 1 - start), max(0, end - 1 - size)
        array = array.narrow(axis, start - 1 + before, end - start - before - after)
        pads = [before, after, *pads]
    return F.pad(array, pads, value=outside)


def _mixed(labels: Tensor, strides: Sequence[int]) -> Tensor:
    """Return `(k, voxels)`: a voxel of `(k, *spatial)` and its next ones on all axes, diagonals too, may differ.

    Ends of rows are compared with what follows in memory: that is several times faster than to leave them out.
    """
    flat = labels.flatten()
    mixed = torch.zeros_like(flat, dtype=torch.bool)
    for stride in strides:
        differ = flat[:-stride] != flat[stride:]
        mixed[:-stride] = differ.logical_or_(mixed[:-stride]).logical_or_(mixed[stride:])
    return mixed.view(len(labels), -1)


def _locate(
    matrix: NDArray[np.float64],
    full: Sequence[int],
    box: Sequence[tuple[int, int]],
    patch: Sequence[int],
    part: slice,
    strides: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, list[Tensor]]:
    """Return for every voxel of a part of the patch the lowest neighbour's flat index in a box, and how far it is off.

    `part` is of the patch's first axis, `full` the size of the image, padded by one voxel on every side; whatever lies
    further out is moved onto the padding.
    """
    offsets = [torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2 for size in patch]
    offsets[0] = offsets[0][part]
    lowest = torch.zeros(prod(len(offset) for offset in offsets), dtype=torch.int32, device=device)
    fractions: list[Tensor] = []
    for row, size, stride in zip(matrix, full, strides, strict=True):
        position = torch.full((1,) * len(patch), (size - 1) / 2, device=device)
        for axis, (factor, offset) in enumerate(zip(row, offsets, strict=True)):
            position = position + float(factor) * offset.view(-1, *(1,) * (len(patch) - 1 - axis))
        position = position.flatten().clamp_(0, size - 1)
        lower = position.floor().clamp_(max=size - 2)
        fractions.append(position.sub_(lower))
        lowest.add_(lower.int(), alpha=stride)
    return lowest.sub_(sum(start * stride for (start, _), stride in zip(box, strides, strict=True))), fractions


def _interpolated(values: Tensor, lowest: Tensor, fractions: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Return the values `(c, voxels)` between those of an image `(c, all of its voxels)`."""
    if not strides:
        return values.index_select(1, lowest)
    low = _interpolated(values, lowest, fractions[1:], strides[1:])
    return low.lerp_(_interpolated(values, lowest + strides[0], fractions[1:], strides[1:]), fractions[0])


def _winners(classes: Tensor, lowest: Tensor, fractions: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    """Return of labels the ones `(voxels,)` with the largest interpolated shares; the nearest voxel's wins ties.

    Other labels than the nearest are looked at only where that one has less than half: so that few voxels are looked
    at, whatever the number of labels.
    """
    label = classes.index_select(0, lowest + sum((f > 0.5) * n for f, n in zip(fractions, strides, strict=True)))
    share = torch.zeros_like(fractions[0])
    for step, weight in _corners(fractions, strides):
        share += torch.where(classes.index_select(0, lowest + step) == label, weight, 0)
    unsure = (share < 0.5).nonzero(as_tuple=True)[0]
    lowest, share = lowest[unsure], share[unsure]
    steps, weights = zip(*_corners([f[unsure] for f in fractions], strides), strict=True)
    neighbours, each = torch.stack([classes.index_select(0, lowest + step) for step in steps]), torch.stack(weights)
    shares = torch.stack([torch.where(neighbours == other, each, 0).sum(0) for other in neighbours])
    largest, winner = shares.max(0)
    found = neighbours.gather(0, winner[None])[0]
    label[unsure] = torch.where(largest > share, found, label[unsure])
    return label


def _corners(fractions: Sequence[Tensor], strides: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the 2^n neighbours of every voxel: what to add to the lowest one's index, and their weights."""
    weights: list[Tensor] = []
    for share in fractions:
        both = (1 - share, share)
        weights = [weight * each for weight in weights for each in both] if weights else list(both)
    yield from zip(_steps(strides), weights, strict=True)


def _steps(strides: Sequence[int]) -> list[int]:
    """Return what leads from the lowest of 2^n neighbours to each."""
    return [sum(steps) for steps in product(*((0, stride) for stride in strides))]


def warp_together(image: Tensor, labels: Tensor, matrix: Tensor, patch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Do what `warp` does, to all samples in one interpolation, for a GPU: the host waits for nothing.

    Parameters
    ----------
    image, labels : (b, c, *spatial), (b, k, *spatial)
    matrix : (b, n, n) float32, on their device

    Returns
    -------
    image (b, c, *patch), labels (b, k, *patch)
    """
    ndim = len(patch)
    labels = F.pad(labels, (1, 1) * ndim, value=OUTSIDE)
    strides = [prod(labels.shape[axis + 1 :]) for axis in range(2, ndim + 2)]
    lowest, fractions = _locate_together(matrix, labels.shape[2:], patch, strides)
    steps, weights = zip(*_corners(fractions, strides), strict=True)
    classes = labels.flatten(2)
    if ndim == 2:
        result = _of_planes(image, matrix, patch)
    else:
        values = F.pad(image, (1, 1) * ndim).flatten(2)
        flat = values.new_zeros((*values.shape[:2], lowest.shape[1]))
        for step, weight in zip(steps, weights, strict=True):
            flat.addcmul_(_taken(values, lowest + step), weight.unsqueeze(1))
        result = flat.view(*flat.shape[:2], *patch)
    closest = lowest + sum((f > 0.5) * stride for f, stride in zip(fractions, strides, strict=True))
    neighbours = torch.stack([_taken(classes, lowest + step) for step in steps])
    label = _largest(_taken(classes, closest), neighbours, torch.stack(weights).unsqueeze(2))
    return result, label.view(*label.shape[:2], *patch)


def _locate_together(
    matrix: Tensor, padded: Sequence[int], patch: Sequence[int], strides: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Return `(b, voxels)` each: the flat index of the lowest neighbour, and per axis how far it is off."""
    device, ones = matrix.device, (1,) * len(patch)
    lowest = torch.zeros((len(matrix), prod(patch)), dtype=torch.int64, device=device)
    fractions: list[Tensor] = []
    for row, full, stride in zip(matrix.unbind(1), padded, strides, strict=True):
        position = torch.full((1, *ones), (full - 1) / 2, device=device)
        for axis, (factor, size) in enumerate(zip(row.unbind(1), patch, strict=True)):
            offsets = torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2
            position = position + factor.view(-1, *ones) * offsets.view(-1, *ones[axis + 1 :])
        position = position.flatten(1).clamp_(0, full - 1)
        lower = position.floor().clamp_(max=full - 2)
        fractions.append(position - lower)
        lowest += lower.long() * stride
    return lowest, fractions


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Return what is at the indices `(b, m)` of `(b, c, voxels)`."""
    return values.gather(2, index.unsqueeze(1).expand(-1, values.shape[1], -1))


def _largest(label: Tensor, neighbours: Tensor, weights: Tensor) -> Tensor:
    """Return the label with the largest share; `label` wins ties, corners are the first axis of the others."""
    share = torch.zeros_like(weights[0])
    for neighbour, weight in zip(neighbours, weights, strict=True):
        share = share + (neighbour == label) * weight
    for neighbour in neighbours:
        found = ((neighbours == neighbour) * weights).sum(0)
        larger = found > share
        share, label = torch.where(larger, found, share), torch.where(larger, neighbour, label)
    return label
