"""Interpolation along one axis as a banded matrix.

Along one axis, interpolation from `old` to `new` samples is linear, hence a matrix (new, old). For the cubic spline it
is the product of the B-spline weights and the inverse of the B-spline prefilter, whose entries fall off as
(2 - sqrt 3)^k, so that the matrix is banded. It is built once per (old, new, order). Pure numpy.

Half-pixel centres, edge values repeated, no anti-aliasing (spec: preprocessing, sections 3 and 5).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.errors import InputError

__all__ = ["FAR_REACH", "REACH", "AxisOperator", "axis_operator"]

_POLE = np.sqrt(3.0) - 2.0  # of the cubic B-spline prefilter
REACH = 16  # samples on each side that the prefilter looks at; what is left out is below 1e-9 of the range
FAR_REACH = 24  # and below 1e-13, for work in float64
_ROWS = 32  # output samples per matrix product: wide enough for BLAS, narrow enough to stay near the band


@dataclass(frozen=True, slots=True, eq=False)
class AxisOperator:
    """The interpolation matrix (new, old) of one axis, stored as its band.

    Output sample j is ``weights[j] @ x[starts[j] : starts[j] + width]``. Rows sum to 1; `starts` never decreases, so
    a run of output samples depends on one contiguous run of inputs. Arrays are read-only and shared.
    """

    old: int
    new: int
    order: int
    starts: NDArray[np.intp]  # (new,)
    weights: NDArray[np.float64]  # (new, width)

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes: interpolation at the samples themselves."""
        return self.old == self.new

    def rows(self, start: int, stop: int) -> tuple[int, int, NDArray[np.float64]]:
        """Return ``(low, high, matrix)``: outputs [start, stop) are ``matrix @ x[low:high]``."""
        low, high = int(self.starts[start]), int(self.starts[stop - 1]) + self.weights.shape[1]
        matrix = np.zeros((stop - start, high - low))
        columns = self.starts[start:stop, None] - low + np.arange(self.weights.shape[1])
        np.put_along_axis(matrix, columns, self.weights[start:stop], axis=1)
        return low, high, matrix

    def dense(self) -> NDArray[np.float64]:
        """Return the whole matrix, (new, old)."""
        low, high, band = self.rows(0, self.new)
        matrix = np.zeros((self.new, self.old))
        matrix[:, low:high] = band
        return matrix

    def part(self, array: NDArray[Any], start: int, stop: int) -> NDArray[Any]:
        """Return the outputs [start, stop) of interpolating `array` along its first axis; dtypes as in `apply`."""
        if self.order == 0:
            chosen: NDArray[Any] = array[self.starts[start:stop]]
            return chosen
        low, high, matrix = self.rows(start, stop)
        lines: NDArray[Any] = matrix.astype(array.dtype) @ array[low:high].reshape(high - low, -1)
        return lines.reshape(stop - start, *array.shape[1:])

    def apply(self, array: NDArray[Any], axis: int) -> NDArray[Any]:
        """Interpolate `array` along `axis`, one block of the band at a time.

        The dtype is kept: float32 or float64, for order 0 any.
        """
        if self.is_identity:
            return array
        axis %= array.ndim
        if self.order == 0:
            return array.take(self.starts, axis=axis)
        lead, trail = array.shape[:axis], array.shape[axis + 1 :]
        source = np.ascontiguousarray(array).reshape(-1, self.old, int(np.prod(trail)))
        result = np.empty((source.shape[0], self.new, source.shape[2]), dtype=array.dtype)
        for start in range(0, self.new, _ROWS):
            stop = min(start + _ROWS, self.new)
            low, high, matrix = self.rows(start, stop)
            matrix = matrix.astype(array.dtype)
            if trail:
                np.matmul(matrix, source[:, low:high], out=result[:, start:stop])
            else:  # the last axis: one product for all lines at once
                np.matmul(source[:, low:high, 0], matrix.T, out=result[:, start:stop, 0])
        return result.reshape(*lead, self.new, *trail)


@lru_cache(maxsize=64)
def axis_operator(old: int, new: int, order: int, reach: int = REACH) -> AxisOperator:
    """Return the matrix that interpolates `old` samples at the centres of `new` ones.

    Parameters
    ----------
    order : 0 nearest (ties go up), 1 linear, 3 interpolating cubic B-spline; beyond the ends the edge values repeat
    reach : samples on each side that the prefilter of the cubic spline looks at

    The cubic spline prefilter sees an endless repetition of the edge; nnU-Net repeats it 12 times and mirrors
    that, which differs by less than 1e-11 of the range.
    """
    if order not in (0, 1, 3):
        raise InputError(f"resampling knows the orders 0, 1 and 3, got {order}", "change the plan's resampling order")
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    if order == 0:
        first = np.floor(centres + 0.5)
        kernel = np.ones((new, 1))
    elif order == 1:
        centres = centres.clip(0, old - 1)
        first = np.floor(centres)
        kernel = np.stack([1.0 - (centres - first), centres - first], axis=1)
    else:
        first = np.floor(centres)
        kernel = _cardinal_spline(centres - first, reach)
        first = first - 1 - reach
    taps = kernel.shape[1]
    width = min(taps, old)
    first = first.astype(np.intp)
    starts = first.clip(0, old - width)
    columns = (first[:, None] + np.arange(taps)).clip(0, old - 1) - starts[:, None]
    weights = np.zeros((new, width))
    np.add.at(weights, (np.arange(new)[:, None], columns), kernel)
    if order == 3:
        weights /= weights.sum(axis=1, keepdims=True)  # a constant stays that constant
    starts.flags.writeable = False
    weights.flags.writeable = False
    return AxisOperator(old, new, order, starts, weights)


def _cardinal_spline(fraction: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Return the weights of samples -1 - reach ... 2 + reach for a point at `fraction` between samples 0 and 1.

    The prefilter's impulse response is sqrt(3) * pole^|k|; it is summed over the four B-splines around the point.
    """
    taps = np.arange(-1 - reach, 3 + reach)
    kernel = np.zeros((fraction.size, taps.size))
    for knot in (-1, 0, 1, 2):
        distance = np.abs(fraction - knot)
        spline = np.where(distance < 1, (4 - 6 * distance**2 + 3 * distance**3) / 6, (2 - distance) ** 3 / 6)
        kernel += spline[:, None] * (np.sqrt(3.0) * _POLE ** np.abs(taps - knot))
    return kernel
