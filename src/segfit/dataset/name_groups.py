"""Which cases belong together, as far as their names say: frames, visits and sides of one examination or patient."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from segfit.dataset.manifest import Dataset
from segfit.dataset.splits import MAX_FOLDS
from segfit.errors import InputError

__all__ = ["grouped_by_names", "groups_from_names"]

_FEWEST_GROUPS = 2  # of several cases; one alone may be chance (assumption)
_PART = re.compile(
    r"(.+?)(?:[_.-]|(?<=\d))(?:"
    r"(?:frame|fr|slice|sl|tile|patch|crop|view|ses|session|visit|v|t|tp|time|timepoint|month|m)[_.-]?\d+|"
    r"(?:rot|rotated|flip|flipped|hflip|vflip|mirror|mirrored|aug|copy)[_.-]?\d*)",
    re.IGNORECASE,
)
_SIDE = re.compile(r"(.*\d)[_.-]?(l|r|left|right|od|os)", re.IGNORECASE)
_BIDS = re.compile(r"(sub-[a-z0-9]+)_.+", re.IGNORECASE)  # brain imaging data structure: subject, then the rest
_NUMBER = re.compile(r"(.*\d)[_.-](\d{1,4})")
_DATE = re.compile(r"(?<![a-z0-9])(?:19|20)\d\d(?:[_.-]?\d\d){0,2}(?![a-z0-9])", re.IGNORECASE)


def grouped_by_names(dataset: Dataset, how: Literal["names", "none"] | None, *, by_default: bool) -> Dataset:
    """Return a dataset with the groups that the names of its training cases say, unless it has groups.

    Parameters
    ----------
    how : "names": refused where they say none; "none": not; None: if `by_default`, and only where there is no doubt
    """
    if how == "none" or not (how or by_default) or any(case.group is not None for case in dataset.training):
        return dataset
    names = [case.id for case in dataset.training]
    groups = groups_from_names(names, asked=how is not None)
    if how and names and not groups:
        raise InputError(f"names of cases such as {names[0]} say no groups", "leave out --groups names")
    return dataset.in_groups(groups).model_copy(update={"groups_from_names": bool(groups)})


def groups_from_names(names: Sequence[str], *, asked: bool = False) -> Mapping[str, str]:
    """Return the groups that names of cases say, by name, for those that share one with another; none if in doubt.

    A group is what names have in common before a frame, visit, side (both of them) or, if all names are like this, a
    number. What they have in common must hold a number that is no date: ``exam014_1`` is of ``exam014``,
    ``hippocampus_001`` of nothing. Numbers count only within groups: there are more groups than numbers.

    Parameters
    ----------
    asked : the user wants groups: two will do, and words before a visit or frame without number too
    """
    groups = {name: name for name in names}
    while found := _shortened(sorted(set(groups.values())), asked):
        groups = {name: found.get(group, group) for name, group in groups.items()}
    sizes = Counter(groups.values())
    several = [group for group, size in sizes.items() if size > 1]
    clear = len(sizes) > 1 if asked else len(several) >= _FEWEST_GROUPS and len(sizes) >= MAX_FOLDS
    return {name: group for name, group in groups.items() if sizes[group] > 1} if clear else {}


def _shortened(names: Sequence[str], asked: bool) -> dict[str, str]:
    """Return names without the part that tells them apart within a group, for those that have one."""
    for found in (_by_subject(names), _by_part(names, asked), _by_side(names), _by_number(names, asked)):
        if len({found.get(name, name) for name in names}) < len(names):
            return found
    return {}


def _by_subject(names: Sequence[str]) -> dict[str, str]:
    return {name: match[1] for name in names if (match := _BIDS.fullmatch(name))}


def _by_part(names: Sequence[str], asked: bool) -> dict[str, str]:
    found = {name: match[1] for name in names if (match := _PART.fullmatch(name))}
    return {name: group for name, group in found.items() if asked or _has_id(group)}


def _by_side(names: Sequence[str]) -> dict[str, str]:
    sides: dict[str, set[str]] = defaultdict(set)
    found: dict[str, str] = {}
    for name in names:
        if match := _SIDE.fullmatch(name):
            found[name] = match[1]
            sides[match[1]].add(match[2].lower())
    pairs = sum(len(seen) > 1 for seen in sides.values())
    return found if 2 * pairs >= len(sides) and all(map(_has_id, sides)) else {}


def _by_number(names: Sequence[str], asked: bool) -> dict[str, str]:
    matches = {name: _NUMBER.fullmatch(name) for name in names}
    found = {name: match[1] for name, match in matches.items() if match}
    numbers = {int(match[2]) for match in matches.values() if match}
    if len(found) < len(names) or not any(map(_has_id, found.values())):
        return {}
    starts_anew = min(numbers) <= 1 and len(numbers) < len(set(found.values()))
    return found if asked or starts_anew else {}


def _has_id(name: str) -> bool:
    """Whether a name holds a number that is no date."""
    return any(map(str.isdigit, _DATE.sub("", name)))
