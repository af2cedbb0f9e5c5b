"""Where voxels are: grids, orientation, and the way to the canonical axes and back.

Arrays are stored ``(z, y, x)``; `Grid` follows array order in `shape` and `spacing_mm`, while `affine` is the usual
4x4 matrix from ``(x, y, z)`` voxel indices (reversed array order) to RAS+ millimetres, as NIfTI defines it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_CORNER_DISTANCE_VOXELS",
    "NOTED_CORNER_DISTANCE_VOXELS",
    "AxisMap",
    "CornerDistance",
    "Grid",
    "canonical_map",
    "is_invertible",
]

_Scalar = TypeVar("_Scalar", bound=np.generic)
_Number = TypeVar("_Number", int, float)

MAX_CORNER_DISTANCE_VOXELS = 0.5
"""Volumes of equal shape whose corners are this close, along each voxel axis, are the same grid: files of one case may
differ by rounding in their headers, and half a voxel is where the nearest voxel becomes another one."""
NOTED_CORNER_DISTANCE_VOXELS = 0.01
"""Up to here nothing is said: an affine in single precision moves the corners of a volume of 1000 voxels by a twentieth
of it (measured). Beyond it one of the headers was changed, and somebody may want to know."""
_SMALLEST_DETERMINANT = 1e-4  # of unit axes: axes closer to one plane than this are no geometry


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """A voxel grid without voxels. Grids are equal when the first four fields are.

    Parameters
    ----------
    shape : voxels per axis, array order, length 2 or 3
    spacing_mm : voxel size per axis, array order, same length; 1.0 where the file does not say
    affine : (4, 4) float64, voxel (x, y, z) to RAS+ mm, invertible; None for 2D grids and unknown geometry
    header : opaque bytes of the source file's header, kept so that outputs get back exactly what came in
    spacing_known : False where the file does not say how large its voxels are
    cropped : whether the file says that it may be a part of the grid of another image, and background around it
    """

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    affine: NDArray[np.float64] | None = None
    header: bytes | None = None
    spacing_known: bool = True
    cropped: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) not in (2, 3) or len(self.shape) != len(self.spacing_mm):
            raise ValueError(f"a grid has 2 or 3 axes with one spacing each, got {self.shape} and {self.spacing_mm}")
        if any(n < 1 for n in self.shape):
            raise ValueError(f"a grid has at least one voxel on every axis, got shape {self.shape}")
        if not all(np.isfinite(s) and s > 0 for s in self.spacing_mm):
            raise ValueError(f"spacing is positive and finite, got {self.spacing_mm}")
        if self.affine is not None:
            if len(self.shape) != 3 or self.affine.shape != (4, 4):
                raise ValueError(f"an affine is 4x4 and belongs to 3 axes, got {self.affine.shape} and {self.shape}")
            if not is_invertible(self.affine):
                raise ValueError(f"the affine is not invertible: {self.affine.tolist()}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        if self.affine is None or other.affine is None:
            same_place = self.affine is other.affine
        else:
            same_place = np.array_equal(self.affine, other.affine)
        same_size = self.shape == other.shape and self.spacing_mm == other.spacing_mm
        return same_size and same_place and self.header == other.header

    __hash__ = None  # type: ignore[assignment]  # holds an array

    @property
    def ndim(self) -> int:
        """Number of spatial axes."""
        return len(self.shape)

    @property
    def unit(self) -> str:
        """In what its spacing is told: pixels for a picture that does not say how large they are."""
        return "mm" if self.spacing_known or self.ndim == 3 else "px"

    def corner_distance(self, other: Grid) -> CornerDistance:
        """Return how far the corners of two volumes of equal shape are apart.

        Where a file does not say where it lies (pictures, unknown geometry) the first corners are laid on each other,
        so that only the extents are compared.
        """
        assert self.shape == other.shape, (self.shape, other.shape)
        size = np.array(self.shape[::-1], dtype=np.float64)
        if self.affine is None or other.affine is None:
            spacing = np.array(self.spacing_mm[::-1])
            apart_mm = size * (np.array(other.spacing_mm[::-1]) - spacing)
            return CornerDistance(float(np.abs(apart_mm / spacing).max()), float(np.linalg.norm(apart_mm)))
        corners = np.array(list(product(*((-0.5, n - 0.5) for n in size), (1.0,)))).T  # outer ones, not voxel centres
        apart_mm = ((other.affine - self.affine) @ corners)[:3]
        apart_voxels = np.linalg.solve(self.affine[:3, :3], apart_mm)
        return CornerDistance(float(np.abs(apart_voxels).max()), float(np.linalg.norm(apart_mm, axis=0).max()))

    def mismatch(self, other: Grid) -> str:
        """Say how `other` differs from this grid, or return an empty string where voxels lie on each other.

        Shapes must be equal and corners within `MAX_CORNER_DISTANCE_VOXELS` of each other.
        """
        if self.shape != other.shape:
            return f"its shape is {other.shape}, expected {self.shape} (array order)"
        distance = self.corner_distance(other)
        if distance.voxels <= MAX_CORNER_DISTANCE_VOXELS:
            return ""
        if not np.allclose(self.spacing_mm, other.spacing_mm, rtol=1e-3):
            found, expected = (f"{_numbers(grid.spacing_mm)} {grid.unit}" for grid in (other, self))
            return f"its spacing is {found}, expected {expected}"
        if canonical_map(self) != canonical_map(other):
            return "its axes point elsewhere"
        return f"it lies {distance}"

    def turn(self, other: Grid) -> AxisMap | None:
        """Return the order and flips of axes that lay `other` on this grid voxel by voxel, None if there are none.

        Such grids fill the same volume in space; only the order in which their voxels are stored differs.
        """
        if self.ndim != other.ndim:
            return None
        way = canonical_map(other).then(canonical_map(self).inverse())
        return way if self.affine is not None and not self.mismatch(way.apply_grid(other)) else None

    def snapped(self, other: Grid) -> str:
        """Say how far `other` is moved to lie on this grid, or return an empty string where it is not.

        Nothing is said of rounding (`NOTED_CORNER_DISTANCE_VOXELS`); grids that differ are not moved (`mismatch`).
        """
        if self.shape != other.shape:
            return ""
        distance = self.corner_distance(other)
        noted = NOTED_CORNER_DISTANCE_VOXELS < distance.voxels <= MAX_CORNER_DISTANCE_VOXELS
        return str(distance) if noted else ""


@dataclass(frozen=True, slots=True)
class CornerDistance:
    """How far the corners of two volumes are apart, at the corner where it is most."""

    voxels: float  # along the voxel axis of the first grid on which it is most
    mm: float  # in space

    def __str__(self) -> str:
        voxels = f"{self.voxels:.1f}" if self.voxels >= 1 else f"{self.voxels:.2f}"
        mm = f"{self.mm:.0f}" if self.mm >= 10 else f"{self.mm:.2g}"
        return f"{voxels} voxels away ({mm} mm)"


@dataclass(frozen=True, slots=True)
class AxisMap:
    """A reordering of spatial axes with flips, exact and invertible.

    `order[i]` is the source axis that becomes axis i; `flip[i]` says whether axis i of the result is reversed.
    """

    order: tuple[int, ...]
    flip: tuple[bool, ...]

    @classmethod
    def identity(cls, ndim: int) -> AxisMap:
        """Return the map that changes nothing."""
        return cls(tuple(range(ndim)), (False,) * ndim)

    @property
    def is_identity(self) -> bool:
        """Whether the map changes nothing."""
        return self.order == tuple(range(len(self.order))) and not any(self.flip)

    def inverse(self) -> AxisMap:
        """Return the way back."""
        back = tuple(int(i) for i in np.argsort(self.order))
        return AxisMap(back, tuple(self.flip[i] for i in back))

    def then(self, other: AxisMap) -> AxisMap:
        """Return the map that does this one and after it `other`."""
        return AxisMap(
            tuple(self.order[axis] for axis in other.order),
            tuple(self.flip[axis] != flip for axis, flip in zip(other.order, other.flip, strict=True)),
        )

    def apply(self, array: NDArray[_Scalar]) -> NDArray[_Scalar]:
        """Reorder the trailing spatial axes of `array` (leading axes are kept); returns a view."""
        lead = array.ndim - len(self.order)
        moved = array.transpose(*range(lead), *[lead + axis for axis in self.order])
        index = tuple(slice(None, None, -1) if reverse else slice(None) for reverse in self.flip)
        return moved[(slice(None),) * lead + index]

    def permute(self, values: tuple[_Number, ...]) -> tuple[_Number, ...]:
        """Reorder one value per axis (no sign is changed)."""
        return tuple(values[axis] for axis in self.order)

    def apply_grid(self, grid: Grid) -> Grid:
        """Return the grid of ``apply(array)``; the affine keeps every voxel at its place in space."""
        shape = tuple(grid.shape[axis] for axis in self.order)
        affine = grid.affine
        if affine is not None:
            # Work in array order: columns reversed, then back to the x, y, z order of the affine.
            moved, origin = affine[:, :3][:, ::-1][:, self.order], affine[:, 3]
            for axis, reverse in enumerate(self.flip):
                if reverse:
                    origin = origin + moved[:, axis] * (shape[axis] - 1)
                    moved[:, axis] *= -1
            affine = np.column_stack([moved[:, ::-1], origin])
        return replace(grid, shape=shape, spacing_mm=self.permute(grid.spacing_mm), affine=affine, header=None)


def is_invertible(affine: NDArray[np.float64]) -> bool:
    """Return whether a (4, 4) matrix is finite and spans three dimensions."""
    if not np.isfinite(affine).all():
        return False
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not lengths.all():
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) > _SMALLEST_DETERMINANT)


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def canonical_map(grid: Grid) -> AxisMap:
    """Return the map that brings a grid to the closest canonical axes (RAS+, stored z, y, x).

    Oblique volumes stay oblique: axes are only permuted and flipped. 2D pictures and grids without an affine are
    returned as they are.
    """
    if grid.affine is None or grid.ndim != 3:
        return AxisMap.identity(grid.ndim)
    columns = grid.affine[:3, :3][:, ::-1]  # in array order
    directions = columns / np.linalg.norm(columns, axis=0)
    choice: dict[int, int] = {}  # world axis -> array axis
    for world, axis in sorted(product(range(3), repeat=2), key=lambda pair: -abs(directions[pair])):  # strongest first
        if world not in choice and axis not in choice.values():
            choice[world] = axis
    order = choice[2], choice[1], choice[0]  # array order z, y, x
    flip = tuple(bool(directions[world, axis] < 0) for world, axis in zip((2, 1, 0), order, strict=True))
    return AxisMap(order, flip)
