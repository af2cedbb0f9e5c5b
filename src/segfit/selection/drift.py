"""Whether what a model sees, or what it makes of it, has moved: from a drift log to a sentence. No files.

The recent half of the cases is compared with the first half, and with the range of the training images. The rule:
each number by a two-sided Mann-Whitney test of the halves; the cases outside the training range by the chance that so
many lie outside if they are of the same kind as the training images (beta-binomial: the range is one of n images, not
a known one). All p-values are corrected together (Holm); what is below 0.01 then has moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Literal, NamedTuple

import numpy as np

from segfit.files import Record
from segfit.fingerprint.training_images import Fact
from segfit.inference.drift_log import LoggedCase
from segfit.text import count, listing, number

__all__ = ["FEWEST", "LEVEL", "Drift", "Series", "Shift", "drift_of", "series_of"]

FEWEST = 10
"""Cases in each half, and cases at all to compare with the training images."""
LEVEL = 0.01

_WORDS = {
    "voxel_size": "voxel size", "level": "median grey value", "width": "range of grey values",
    "values": "distance of grey values from the training images",
    "histogram": "distance of the histogram's shape from the training images",
}  # fmt: skip


class Series(NamedTuple):
    """One number over the cases that have it."""

    kind: Literal["input", "output"]
    name: str
    part: str  # axis, channel or class
    values: dict[int, float]  # by place of the case
    facts: dict[int, Fact]  # of an input, by the same

    @property
    def words(self) -> str:
        """The number in words."""
        part = f"axis {self.part}" if self.name in ("voxel_size", "extent", "shape") else self.part
        return f"{_WORDS.get(self.name, self.name)} of {part}"


class Shift(Record):
    """What was found of one number; p-values are corrected, None where too few cases were compared."""

    kind: Literal["input", "output"]
    name: str
    part: str
    first_median: float | None
    recent_median: float | None
    p_between: float | None = None  # first and recent half
    recent: int  # cases that have it
    outside: int | None = None  # recent ones outside the range of the training images
    p_outside: float | None = None
    moved: bool = False


class Drift(Record):
    """Whether anything has moved."""

    state: Literal["moved", "steady", "too_few"]
    sentence: str
    cases: int  # of the model that came last
    recent: int  # the last ones of them, that are compared
    of_other_models: int  # cases that are left out
    shifts: tuple[Shift, ...]


def series_of(cases: Sequence[LoggedCase]) -> list[Series]:
    """Return every number that is known of cases."""
    found: dict[tuple[str, str], Series] = {}

    def of(kind: Literal["input", "output"], name: str, part: str) -> Series:
        return found.setdefault((name, part), Series(kind, name, part, {}, {}))

    for place, case in enumerate(cases):
        for fact in case.facts:
            series = of("input", fact.name, fact.part)
            series.values[place], series.facts[place] = fact.value, fact
        for one in case.measurements:
            of("output", f"{one.kind} ({one.unit})", one.name).values[place] = one.value
        for known in case.quality:
            if known.dice is not None:
                of("output", "predicted Dice", known.name).values[place] = known.dice
    return list(found.values())


def drift_of(logged: Sequence[LoggedCase]) -> Drift:
    """Compare the recent cases of a log, in order of time, with the first ones and with the training images.

    Only cases of the model that came last are compared.
    """
    cases = [case for case in logged if case.model == logged[-1].model]
    split = len(cases) // 2 if len(cases) >= 2 * FEWEST else 0  # 0: all against the training images
    shifts, chances = list[Shift](), list[tuple[int, str, float]]()
    series = series_of(cases)
    for index, one in enumerate(series):
        shifts.append(_shift(one, split))
        chances += [(index, what, p) for what, p in _chances(one, split)]
    corrected: dict[int, dict[str, float]] = defaultdict(dict)
    for (index, what, _), p in zip(chances, _holm([p for *_, p in chances]), strict=True):
        corrected[index][what] = p
    shifts = [
        shift.model_copy(update=corrected[index] | {"moved": any(p < LEVEL for p in corrected[index].values())})
        for index, shift in enumerate(shifts)
    ]
    state: Literal["moved", "steady", "too_few"] = "steady" if chances else "too_few"
    state = "moved" if any(shift.moved for shift in shifts) else state
    recent = len(cases) - split
    sentence = _sentence(state, shifts, series, len(cases), split)
    others = len(logged) - len(cases)
    return Drift(
        state=state, sentence=sentence, cases=len(cases), recent=recent, of_other_models=others, shifts=tuple(shifts)
    )


def _shift(series: Series, split: int) -> Shift:
    first, recent = _halves(series, split)
    facts = [fact for place, fact in series.facts.items() if place >= split]
    return Shift(
        kind=series.kind,
        name=series.name,
        part=series.part,
        first_median=median(first) if first else None,
        recent_median=median(recent) if recent else None,
        recent=len(recent),
        outside=sum(fact.is_outside for fact in facts) if facts else None,
    )


def _halves(series: Series, split: int) -> tuple[list[float], list[float]]:
    values = series.values.items()
    return [value for place, value in values if place < split], [value for place, value in values if place >= split]


def _chances(series: Series, split: int) -> Iterator[tuple[str, float]]:
    """Yield the p-values of a number, before correction."""
    from scipy.stats import betabinom, mannwhitneyu

    first, recent = _halves(series, split)
    if min(len(first), len(recent)) >= FEWEST and len({*first, *recent}) > 1:
        yield "p_between", float(mannwhitneyu(first, recent).pvalue)
    facts = [fact for place, fact in series.facts.items() if place >= split]
    if len(facts) >= FEWEST and facts[-1].cases > 1:
        # Of new images the share outside the range of n others is Beta(2, n - 1), above the largest alone Beta(1, n).
        sides = 1 if facts[-1].low is None else 2
        outside = sum(fact.is_outside for fact in facts)
        yield "p_outside", float(betabinom.sf(outside - 1, len(facts), sides, facts[-1].cases + 1 - sides))


def _holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down rule."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(stepped)) if len(p_values) else []
    return [float(p) for p in corrected]


def _sentence(state: str, shifts: Sequence[Shift], series: Sequence[Series], cases: int, split: int) -> str:
    if state == "too_few":
        needed = f"at least {FEWEST} are needed, and {2 * FEWEST} to compare recent ones with earlier ones"
        return f"whether anything has moved cannot be told from {count(cases, 'case')}: {needed}"
    versus = "the first ones and the training images" if split else "the training images"
    where = f"in the last {count(cases - split, 'case')}, compared with {versus}"
    if state == "steady":
        return f"nothing has moved {where}"
    moved = [(shift, one) for shift, one in zip(shifts, series, strict=True) if shift.moved]
    moved.sort(key=lambda item: min(p for p in (item[0].p_between, item[0].p_outside) if p is not None))
    kinds = [f"{kind}s" for kind in ("input", "output") if any(shift.kind == kind for shift, _ in moved)]
    told = [f"{one.words} ({_told(shift)})" for shift, one in moved]
    return f"{' and '.join(kinds)} have moved {where}: {listing(told)}"


def _told(shift: Shift) -> str:
    parts = []
    if shift.p_between is not None and shift.p_between < LEVEL:
        parts.append(f"median {number(shift.first_median)} before, {number(shift.recent_median)} now")
    if shift.p_outside is not None and shift.p_outside < LEVEL:
        parts.append(f"{shift.outside} of {shift.recent} outside the range of the training images")
    return ", ".join(parts)
