"""What the training images of a model have in common, and what sets an image to predict apart from them.

How much is much is learned from the training images: each is compared with all others, and an image differs if it does
so clearly more than any of them. Datasets of unlike images so allow much, those of like ones little. Few images do not
show what else there is: they allow more (docs/decisions/preprocessing.md has the rule and how often it is wrong).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations, product
from math import log
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from segfit.errors import Problem
from segfit.files import GrownRecord, Record
from segfit.fingerprint.appearance import BLOCKS, SHARES
from segfit.fingerprint.fingerprint import ImageFingerprint, Orientation, Unit, unit_of
from segfit.text import listing, numbers

__all__ = ["Fact", "Range", "TrainingImages", "impossible_size"]

_MOST_CASES = 100  # whose intensities are kept
_FEWEST_CASES = 3  # that show how much images differ
_FEWEST_ALIKE = 5  # cases that show bits and a common scale where all have the same
_ENOUGH_CASES = 20  # that show scales and offsets of values which networks do not see
_SAME_WIDTH = 1.2  # factor within which fewer show them, too: chance does not make them so alike
_LEAST_WIDTH_OF_FEW = log(512)  # of such values in fewer: other files may have eight bits more, used to twice the part
_LEAST_OFFSET_OF_FEW = 5.0  # the same for where grey values lie, in widths of their own usual range
_BYTE = 255  # the largest value of eight bits
# All that follow are assumptions; false alarms among the cases of six datasets are below 2 % (tests/fingerprint).
_LEAST_INTENSITY = 0.2  # difference of grey values that is told at least, in widths of the usual range
_LEAST_WIDTH = log(4)  # the same of the width of the range, as the logarithm of a factor
_LEAST_SHAPE = 0.15  # the same of the shape of the histogram
_LEAST_ORDER = 0.05  # by which other orders of channels must fit better, in widths of the usual range
_MOST_APART_IN_ORDER = 0.5  # how far the better order may be off: other values fit in no order
_LEAST_TURN = 0.15  # by which another order of axes must fit better, as a correlation
_ALIKE = 0.5  # correlation below which layouts do not resemble each other (assumption)
_LEAST_SIZE = log(3)  # beyond the range of voxel sizes and extents
_LEAST_TURNED_SIZE = log(1.1)  # the same where exchanged axes would lie within
_IMPOSSIBLE_SIZE = log(300)  # a unit was mistaken
_EXTREME = 10.0  # times as far outside of the usual range as any voxel was
_MOST_PERMUTED = 4  # channels of which every order is tried; of more, exchanged pairs


class Range(NamedTuple):
    """The smallest and the largest values that occur, one of each by axis or channel."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Range:
        """Return the range of values (n, m)."""
        return cls(tuple(values.min(axis=0).tolist()), tuple(values.max(axis=0).tolist()))

    def excess(self, values: NDArray[np.float64]) -> float:
        """Return how far values lie outside, as the logarithm of a factor; 0 inside."""
        return float(np.log(np.maximum(values / self.high, np.array(self.low) / values)).max(initial=0.0))

    def turned_within(self, values: NDArray[np.float64]) -> bool:
        """Whether the values lie inside in another order."""
        return any(self.excess(values[list(order)]) < 1e-6 for order in permutations(range(len(values))))

    def __str__(self) -> str:
        return numbers(self.low) if self.low == self.high else f"{numbers(self.low)} to {numbers(self.high)}"


class Fact(Record):
    """One number of an image, and between which those of the training images lie."""

    name: Literal["voxel_size", "extent", "shape", "level", "width", "values", "histogram"]
    part: str  # the axis, in the order of the fingerprint, or the channel
    value: float
    low: float | None  # None: the smaller the more usual
    high: float
    cases: int = Field(ge=1)  # that the two are of

    @property
    def is_outside(self) -> bool:
        """Whether it lies outside of what occurs among the training images, rounding allowed for."""
        slack = 1e-6 * max(abs(self.high), abs(self.low or 0.0))
        return self.value > self.high + slack or (self.low is not None and self.value < self.low - slack)


def impossible_size(
    spacing_mm: Sequence[float], usual: Range, unit: Unit = "mm", usual_unit: Unit = "mm"
) -> list[Problem]:
    """Return a problem if voxels are so much larger or smaller than usual that a unit was mistaken."""
    if usual.excess(np.array(spacing_mm)) <= _IMPOSSIBLE_SIZE:
        return []
    problem = f"voxel size {numbers(spacing_mm)} {unit}, of the training images {usual} {usual_unit}"
    return [Problem("", problem, "correct its voxel size: a unit was mistaken", code="voxel_size")]


class TrainingImages(GrownRecord):
    """A summary of training images that travels with the model. Axis order as in the fingerprint it is made from."""

    LATER: ClassVar[frozenset[str]] = frozenset({"unit"})
    orientation: Orientation
    channel_names: tuple[str, ...]
    spacing_mm: Range
    extent_mm: Range  # of the part that is not 0
    shape: Range  # of the same
    sizes_differ: tuple[float, float, float]  # how far one case lies outside the others in these three
    # By case and channel; empty where it was not measured.
    quantiles: tuple[tuple[tuple[float, ...], ...], ...] = ()
    most_apart: tuple[float, ...] = ()  # by channel: from the most similar other case
    shapes_most_apart: tuple[float, ...] = ()  # the same for the shape of the histogram
    orders_alike: float = 0.0  # by how much another order of channels fits a case better, at most
    widths: Range | None = None  # of the usual grey values, by channel
    widths_differ: float = 0.0  # how far one case lies outside the others
    farthest: tuple[float, ...] = ()  # by channel: highest and lowest voxels beyond the quantiles
    layout: tuple[float, ...] = ()  # the mean
    turns_alike: float = 0.0  # by how much another order of axes fits a case better, at most
    num_cases: int = Field(1, ge=1)
    unit: Unit = "mm"  # of spacings and extents

    @model_validator(mode="after")
    def _check(self) -> TrainingImages:
        axes, channels = len(self.spacing_mm.low), len(self.channel_names)
        sizes = (*self.spacing_mm, *self.extent_mm, *self.shape)
        if not all(len(size) == axes and min(size, default=0) > 0 for size in sizes):
            raise ValueError("spacing_mm, extent_mm and shape must have numbers above 0, one per axis")
        if self.layout and len(self.layout) != BLOCKS**axes:
            raise ValueError(f"layout must have {BLOCKS**axes} numbers")
        if (self.widths is None) is bool(self.quantiles):
            raise ValueError("quantiles and widths must both be there, or none")
        by_channel = (self.most_apart, self.shapes_most_apart, self.farthest, *(self.widths or ()))
        if self.widths is not None and not all(len(values) == channels for values in (*by_channel, *self.quantiles)):
            raise ValueError(f"what is known of grey values must have {channels} entries, one per channel")
        if any(len(values) != len(SHARES) for case in self.quantiles for values in case):
            raise ValueError(f"quantiles must have {len(SHARES)} numbers for each case and channel")
        return self

    @classmethod
    def of(
        cls, cases: Sequence[ImageFingerprint], orientation: Orientation, channel_names: Sequence[str]
    ) -> TrainingImages:
        """Summarise the images of at least one case."""
        spacing = np.array([case.spacing_mm for case in cases])
        shape = np.array([case.shape_after_crop for case in cases], dtype=np.float64)
        extent = spacing * shape
        facts: dict[str, Any] = {}
        if all(_has_quantiles(case) for case in cases):
            facts |= _intensity_facts(_evenly(cases))
        if all(case.layout for case in cases) and len(cases) >= _FEWEST_CASES:
            facts |= _layout_facts(np.array([case.layout for case in cases]), spacing.shape[1])
        return cls(
            orientation=orientation,
            channel_names=tuple(channel_names),
            spacing_mm=Range.of(spacing),
            extent_mm=Range.of(extent),
            shape=Range.of(shape),
            num_cases=len(cases),
            unit=unit_of(cases),
            sizes_differ=(_largest_excess(spacing), _largest_excess(extent), _largest_excess(shape)),
            **facts,
        )

    def differences(
        self, image: ImageFingerprint, *, absolute: Sequence[bool] = (), bits: int | None = None
    ) -> list[Problem]:
        """Return in what an image differs from all of them; fatal: it cannot be of their kind.

        Parameters
        ----------
        absolute : by channel, whether networks see its values as they are (HU) and not scaled image by image; empty:
            none
        bits : of a value of the image; None: no unsigned integers
        """
        impossible = impossible_size(image.spacing_mm, self.spacing_mm, self._unit(image), self.unit)
        if impossible or self.widths is None or not _has_quantiles(image):
            return impossible or [*self._sizes(image), *self._turn(image)]
        low, high, number = np.array(self.widths.low), np.array(self.widths.high), len(self.quantiles)
        fixed = (number >= _FEWEST_ALIKE) & (high < _SAME_WIDTH * low) | (number >= _ENOUGH_CASES)
        values = self._bits(image, bits) or self._intensities(image, fixed | np.array(absolute or [False] * len(low)))
        return [*self._sizes(image), *self._turn(image), *values]

    def facts(self, image: ImageFingerprint) -> tuple[Fact, ...]:
        """Return what `differences` compares as numbers.

        Voxel size, extent and shape by axis. By channel the median grey value (`level`) and the width of the usual
        range; how far the grey values are from those of the most similar training case, in such widths (`values`), and
        the same of the shape of the histogram.
        """
        spacing, shape = np.array(image.spacing_mm), np.array(image.shape_after_crop, dtype=np.float64)
        sizes = (
            ("voxel_size", self.spacing_mm, spacing),
            ("extent", self.extent_mm, spacing * shape),
            ("shape", self.shape, shape),
        )
        found = [
            Fact(name=name, part=str(axis), value=value, low=low, high=high, cases=self.num_cases)
            for name, known, values in sizes
            for axis, (value, low, high) in enumerate(zip(values.tolist(), *known, strict=True))
        ]
        if self.widths is None or not _has_quantiles(image):
            return tuple(found)
        known, own = np.array(self.quantiles), np.array([channel.quantiles for channel in image.channels])
        apart = _apart(own[None], known, _scale(known)).min(axis=1)[0].tolist()
        shapes = _apart(_shape(own[None]), _shape(known), np.ones(len(own))).min(axis=1)[0].tolist()
        levels, middle = Range.of(known[:, :, known.shape[2] // 2]), own[:, own.shape[1] // 2].tolist()
        nothing = (None,) * len(own)
        for name, values, low, high in (
            ("level", middle, levels.low, levels.high),
            ("width", _width(own).tolist(), *self.widths),
            ("values", apart, nothing, self.most_apart),
            ("histogram", shapes, nothing, self.shapes_most_apart),
        ):
            parts = zip(self.channel_names, values, low, high, strict=True)
            found += [Fact(name=name, part=p, value=v, low=a, high=b, cases=len(known)) for p, v, a, b in parts]
        return tuple(found)

    def _sizes(self, image: ImageFingerprint) -> Iterator[Problem]:
        spacing, shape = np.array(image.spacing_mm), np.array(image.shape_after_crop, dtype=np.float64)
        compared = (
            ("voxel_size", "voxel size", self.spacing_mm, spacing),
            ("extent", "extent", self.extent_mm, spacing * shape),
            ("", "shape", self.shape, shape),  # how finely an image is sampled is no difference by itself
        )
        turned = False
        for (code, what, known, values), differ in zip(compared, self.sizes_differ, strict=True):
            excess = known.excess(values)
            own, usual = (f" {self._unit(image)}", f" {self.unit}") if code else ("", "")
            problem = f"{what} {numbers(values)}{own}, of the training images {known}{usual}"
            if excess > max(_LEAST_TURNED_SIZE, 2 * differ) and known.turned_within(values):
                action = "check the order of its axes: in another order it would fit"
                if not turned:
                    yield Problem("", problem, action, fatal=False, code="axes")
                turned = True
            elif code and not turned and excess > max(_LEAST_SIZE, 2 * differ):
                action = "check its voxel size, or crop it as the training images are"
                yield Problem("", problem, action, fatal=False, code=code)

    def _unit(self, image: ImageFingerprint) -> Unit:
        """Return the unit of an image: one that does not say how large its voxels are has those of the training."""
        return "mm" if image.sized else self.unit

    def _turn(self, image: ImageFingerprint) -> Iterator[Problem]:
        if self.layout and image.layout:
            better, alike = _turned_better(np.array(image.layout), np.array(self.layout), len(image.spacing_mm))
            if alike > _ALIKE and better > self.turns_alike + _LEAST_TURN + 2 / self.num_cases:
                problem = "bright and dark parts lie as in the training images only if the axes are turned or flipped"
                yield Problem("", problem, "check the order and direction of its axes", fatal=False, code="axes")

    def _bits(self, image: ImageFingerprint, bits: int | None) -> list[Problem]:
        """Return a problem if values need more than eight bits where none does, or have eight where all need more."""
        known, own = np.array(self.quantiles), np.array([channel.quantiles for channel in image.channels])
        wide = known[:, :, -1].max(axis=1) > _BYTE
        more, fewer = bits is not None and not wide.any() and own.max() > _BYTE, wide.all() and bits == 8
        if len(known) < _FEWEST_ALIKE or min(known.min(), own.min()) < 0 or not (more or fewer):
            return []
        held = "more than 8 bits" if more else "8 bits"
        usual = f"{known[:, :, 0].min():.4g} to {known[:, :, -1].max():.4g}"
        problem = f"values of {held}, unlike those of every training image: {own.min():.4g} to {own.max():.4g}"
        action = f"training images have {usual}: save it with as many bits per value"
        return [Problem("", problem, action, fatal=False, code="bits")]

    def _intensities(self, image: ImageFingerprint, strict: NDArray[np.bool_]) -> Iterator[Problem]:
        """Yield in what values differ; of channels that are not `strict`, scale and offset tell little."""
        assert self.widths is not None
        known, own = np.array(self.quantiles), np.array([channel.quantiles for channel in image.channels])
        scale, slack = _scale(known), 2 + 10 / len(known)
        better, order, apart_then = _ordered_better(own, known, scale)
        if better > max(_LEAST_ORDER, slack * self.orders_alike) and apart_then < _MOST_APART_IN_ORDER:
            names = listing([self.channel_names[channel] for channel in order])
            problem = f"channels fit the training images better in another order: they seem to be {names}"
            yield Problem("", problem, "check the order of its channels", fatal=False, code="channel_order")
            return
        apart = _apart(own[None], known, scale).min(axis=1)[0]
        shapes = _apart(_shape(own[None]), _shape(known), np.ones(len(scale))).min(axis=1)[0]
        widths = _width(own)
        allowed = np.exp(np.maximum(np.where(strict, _LEAST_WIDTH, _LEAST_WIDTH_OF_FEW), 2 * self.widths_differ))
        scaled = (widths > allowed * np.array(self.widths.high)) | (widths * allowed < self.widths.low)
        far = apart > np.maximum(_LEAST_INTENSITY, slack * np.array(self.most_apart))
        offset = _apart((own / widths[:, None])[None], known / _width(known)[..., None], np.ones(len(scale)))
        unlike = scaled | np.where(strict, far, far & (offset.min(axis=1)[0] > _LEAST_OFFSET_OF_FEW))
        if unlike.any():
            first, middle = int(np.flatnonzero(unlike)[0]), known.shape[2] // 2
            usual = f"{known[:, first, 0].min():.4g} to {known[:, first, -1].max():.4g}"
            values = f"{own[first, 0]:.4g} to {own[first, -1]:.4g}, median {own[first, middle]:.4g}"
            medians = f"{known[:, first, middle].min():.4g} to {known[:, first, middle].max():.4g}"
            problem = f"values of {self._named(unlike)} are unlike those of every training image: {values}"
            action = (
                f"training images have {usual}, median {medians}: check the unit of its values (HU, rescaling, bits)"
            )
            yield Problem("", problem, action, fatal=False, code="intensity_range")
        odd = ~unlike & (shapes > np.maximum(_LEAST_SHAPE, (2 + 60 / len(known)) * np.array(self.shapes_most_apart)))
        if odd.any():
            problem = f"the histogram of {self._named(odd)} is shaped unlike that of every training image"
            yield Problem("", problem, "check that it was made in the same way", fatal=False, code="histogram")
        extreme = _farthest(image, own) > _EXTREME * (1 + np.array(self.farthest))
        if extreme.any():
            channel = image.channels[int(np.flatnonzero(extreme)[0])]
            values = f"{channel.min:.4g} to {channel.max:.4g}"
            problem = f"single values of {self._named(extreme)} lie far outside the others: {values}"
            action = "replace them if they mark something"
            yield Problem("", problem, action, fatal=False, code="extreme_values")

    def _named(self, channels: NDArray[np.bool_]) -> str:
        return listing([name for name, chosen in zip(self.channel_names, channels, strict=True) if chosen])


def _has_quantiles(image: ImageFingerprint) -> bool:
    return bool(image.channels) and all(channel.quantiles for channel in image.channels)


def _evenly(cases: Sequence[ImageFingerprint]) -> list[ImageFingerprint]:
    chosen = np.linspace(0, len(cases) - 1, min(len(cases), _MOST_CASES)).round().astype(int)
    return [cases[index] for index in chosen]


def _largest_excess(values: NDArray[np.float64]) -> float:
    """Return how far the case that is most unlike the others lies outside of them."""
    if len(values) < _FEWEST_CASES:
        return 0.0
    return max(Range.of(np.delete(values, index, axis=0)).excess(values[index]) for index in range(len(values)))


def _intensity_facts(cases: Sequence[ImageFingerprint]) -> dict[str, Any]:
    known = np.array([[channel.quantiles for channel in case.channels] for case in cases])
    scale = _scale(known)
    farthest = np.max([_farthest(case, own) for case, own in zip(cases, known, strict=True)], axis=0)
    widths = _width(known)
    facts = {"quantiles": known.tolist(), "farthest": farthest.tolist(), "widths": Range.of(widths)}
    if len(cases) < _FEWEST_CASES:
        unknown = [1.0] * len(scale)  # a whole range
        return facts | {"most_apart": unknown, "shapes_most_apart": unknown, "orders_alike": 1.0}
    others = np.where(np.eye(len(cases), dtype=bool)[:, :, None], np.inf, 0)
    apart = _apart(known, known, scale) + others
    shapes = _apart(_shape(known), _shape(known), np.ones(len(scale))) + others
    orders = [_ordered_better(own, np.delete(known, index, axis=0), scale)[0] for index, own in enumerate(known)]
    return facts | {
        "most_apart": apart.min(axis=1).max(axis=0).tolist(),
        "shapes_most_apart": shapes.min(axis=1).max(axis=0).tolist(),
        "orders_alike": max(orders),
        "widths_differ": _largest_excess(widths),
    }


def _layout_facts(layouts: NDArray[np.float64], ndim: int) -> dict[str, Any]:
    total = layouts.sum(axis=0)
    better = [_turned_better(one, (total - one) / (len(layouts) - 1), ndim)[0] for one in layouts]
    return {"layout": np.round(total / len(layouts), 3).tolist(), "turns_alike": max(0.0, *better)}


def _scale(known: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the usual width of the grey values of each channel."""
    width: NDArray[np.float64] = np.median(_width(known), axis=0)
    return width


def _width(quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how wide grey values spread, above 0."""
    width = quantiles[..., -1] - quantiles[..., 0]
    result: NDArray[np.float64] = np.maximum(width, 1e-6 * np.abs(quantiles).max(axis=-1) + 1e-30)
    return result


def _apart(own: NDArray[np.float64], known: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far images (n, channels, values) are from others (m, channels, values), as (n, m, channels).

    The mean over the quantiles: a class that covers a little more may move one of them far.
    """
    result: NDArray[np.float64] = np.abs(own[:, None] - known[None]).mean(axis=3) / scale
    return result


def _shape(quantiles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return where the middle quantiles lie between the outer ones."""
    low, high = quantiles[..., 1:2], quantiles[..., -2:-1]
    result: NDArray[np.float64] = (quantiles[..., 2:-2] - low) / np.where(high > low, high - low, 1.0)
    return result


def _farthest(image: ImageFingerprint, own: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far the lowest and highest voxels lie beyond the quantiles, by channel."""
    above = [channel.max - high for channel, high in zip(image.channels, own[:, -1], strict=True)]
    below = [low - channel.min for channel, low in zip(image.channels, own[:, 0], strict=True)]
    result: NDArray[np.float64] = np.maximum(above, below) / _width(own)
    return result


def _ordered_better(
    own: NDArray[np.float64], known: NDArray[np.float64], scale: NDArray[np.float64]
) -> tuple[float, tuple[int, ...], float]:
    """Return by how much another order of channels fits better than the given one, which, and how far it is off."""
    given = tuple(range(len(own)))
    cost = {
        order: float(_apart(own[None, list(order)], known, scale).mean(axis=2).min()) for order in _orders(len(own))
    }
    if len(cost) == 1:
        return 0.0, given, 0.0
    best = min((order for order in cost if order != given), key=lambda order: cost[order])
    found = tuple(sorted(given, key=lambda channel: best[channel]))
    return cost[given] - cost[best], found, cost[best]


def _orders(channels: int) -> list[tuple[int, ...]]:
    if channels <= _MOST_PERMUTED:
        return list(permutations(range(channels)))
    found = [tuple(range(channels))]
    for first, second in combinations(range(channels), 2):
        order = list(range(channels))
        order[first], order[second] = second, first
        found.append(tuple(order))
    return found


def _turned_better(own: NDArray[np.float64], known: NDArray[np.float64], ndim: int) -> tuple[float, float]:
    """Return by how much a layout resembles a known one better when its axes are turned, and how much it then does."""
    block = own.reshape((BLOCKS,) * ndim)
    target = _standardized(known)
    alike = {
        (order, flips): float((_standardized(np.flip(block.transpose(order), flips).ravel()) * target).mean())
        for order in permutations(range(ndim))
        for flips in (tuple(np.flatnonzero(each).tolist()) for each in product((0, 1), repeat=ndim))
    }
    given = alike.pop((tuple(range(ndim)), ()))
    best = max(alike.values())
    return best - given, best


def _standardized(values: NDArray[np.float64]) -> NDArray[np.float64]:
    deviation = values.std()
    result: NDArray[np.float64] = (values - values.mean()) / (deviation if deviation > 0 else 1.0)
    return result
