"""What holds of groups of cases: means with intervals, by values of a column, and of two sets of predictions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean

from segfit.dataset.manifest import Case
from segfit.dataset.name_groups import groups_from_names
from segfit.errors import InputError, nearest
from segfit.evaluation.statistics import Difference, difference, estimate, estimate_over
from segfit.evaluation.summary import Estimates, Slice, Summary
from segfit.files import Record
from segfit.text import count, listing

__all__ = [
    "Behind",
    "Comparison",
    "column_of",
    "compare",
    "groups_of",
    "groups_of_cases",
    "slices_behind",
    "with_estimates",
]

_NOT_OF_COHORTS = frozenset({"case", "group", "weight", "image", "label", "fold"})
_MOST_VALUES = 12
"""A column with more is a measurement or a name, not a kind of case."""


class Behind(Record):
    """Cases of which a column of a table says the same and that clearly fall behind all others in some classes."""

    column: str
    value: str
    cases: int
    classes: tuple[str, ...]
    dice: float  # mean over these classes, of these cases
    others: float  # the same of all other cases


class Comparison(Record):
    """How much larger the values of one set of predictions are than those of another, over the cases of both.

    `mean_dice` is of the mean over the classes of each case, `classes` by class and measure.
    """

    first: str
    second: str
    mean_dice: Difference
    classes: dict[str, dict[str, Difference]]

    @property
    def sentence(self) -> str:
        """Say which is better, by how much, and how sure that is."""
        found = self.mean_dice
        if found.mean is None:
            return f"{self.first} and {self.second} have no case with a Dice in common"
        over = f"over {count(found.cases, 'case')} in {count(found.groups, 'group')}"
        apart = f"differ by a mean Dice of {abs(found.mean):.4f} {over}"
        if found.low is None or found.high is None or found.p_value is None:
            return f"{self.first} and {self.second} {apart}, too few groups to tell it from chance"
        sure = f"95 % interval {found.low:+.4f} to {found.high:+.4f}, Wilcoxon p = {found.p_value:.2g}"
        if found.low <= 0 <= found.high:
            return f"{self.first} and {self.second} {apart}, which may be chance ({sure})"
        better, worse = (self.first, self.second) if found.mean > 0 else (self.second, self.first)
        return f"{better} is better than {worse} by a mean Dice of {abs(found.mean):.4f} {over} ({sure})"


def groups_of(cases: Iterable[str], rows: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the group of each case by the column "group" of a table, else as the names of cases say it."""
    names = list(cases)
    told = {name: group for name in names if (group := rows.get(name, {}).get("group", "").strip())}
    return told or dict(groups_from_names(names))


def groups_of_cases(cases: Sequence[Case]) -> dict[str, str]:
    """Return the group of each case of a dataset, else as the names of cases say it."""
    rows = {case.id: {"group": case.group or ""} for case in cases}
    return groups_of(rows, rows)


def column_of(rows: Mapping[str, Mapping[str, str]], name: str) -> dict[str, str]:
    """Return what a column of the table of cases says of each; `InputError` where there is no such column."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    if name not in columns:
        found = f"it has {', '.join(columns)}" if columns else "there is no such table"
        raise InputError(
            f"the table of cases has no column {name!r}: {found}{nearest(name, columns)}",
            "write cases.csv beside the references, with a row per case and that column",
        )
    return {case: row.get(name, "").strip() for case, row in rows.items()}


def with_estimates(
    summary: Summary, groups: Mapping[str, str], by: str = "", values: Mapping[str, str] | None = None
) -> Summary:
    """Return a summary with intervals of all its means, over groups, and with `by` those of the cases of every value.

    Parameters
    ----------
    groups : group by case; others are groups of their own
    by, values : name of a column of the table of cases, and what it says of each
    """
    dice = [{case.case: case.metrics[name].dice for case in summary.cases} for name in summary.mean]
    update: dict[str, object] = {
        "estimates": _estimates(summary, groups),
        "mean_dice_estimate": estimate_over(dice, groups),
        "by": by,
    }
    if values is not None:
        members: dict[str, list[str]] = defaultdict(list)
        for case in summary.cases:
            members[values.get(case.case, "")].append(case.case)
        slices = []
        for value, cases in sorted(members.items()):
            others = [case.case for case in summary.cases if case.case not in set(cases)]
            own = _estimates(summary.subset(cases), groups)
            rest = _estimates(summary.subset(others), groups, ("dice",)) if others else {}
            slices.append(Slice(value=value, estimates=own, behind=tuple(_behind(own, rest))))
        update["slices"] = tuple(slices)
    return summary.model_copy(update=update)


def slices_behind(
    summary: Summary, groups: Mapping[str, str], rows: Mapping[str, Mapping[str, str]]
) -> tuple[Behind, ...]:
    """Return the cohorts that clearly fall behind, of every column of a table of cases that tells kinds of cases."""
    columns = dict.fromkeys(key for row in rows.values() for key in row if key not in _NOT_OF_COHORTS)
    found = []
    for column in columns:
        values = {case.case: rows.get(case.case, {}).get(column, "").strip() for case in summary.cases}
        if not 2 <= len(set(values.values())) <= _MOST_VALUES:
            continue
        for item in with_estimates(summary, groups, column, values).slices:
            if item.behind and item.value:
                found.append(_behind_others(summary, column, item, values))
    return tuple(found)


def _behind_others(summary: Summary, column: str, item: Slice, values: Mapping[str, str]) -> Behind:
    own = summary.subset(case for case, value in values.items() if value == item.value)
    rest = summary.subset(case for case, value in values.items() if value != item.value)
    dice, others = (fmean(one.mean[name].dice or 0.0 for name in item.behind) for one in (own, rest))
    return Behind(column=column, value=item.value, cases=len(own.cases), classes=item.behind, dice=dice, others=others)


def compare(first: Summary, second: Summary, groups: Mapping[str, str], names: tuple[str, str]) -> Comparison:
    """Compare two sets of predictions of the same cases; `InputError` where they have no case or class in common."""
    classes = [class_.name for class_ in first.classes if class_.name in second.mean]
    shared = {case.case for case in first.cases} & {case.case for case in second.cases}
    if not classes or not shared:
        what = "case" if classes else "class"
        raise InputError(f"{listing(names)} have no {what} in common", "give two evaluations of the same data")
    one, other = first.subset(shared), second.subset(shared)
    found: dict[str, dict[str, Difference]] = {}
    for name in classes:
        ours, theirs = one.values(name), other.values(name)
        found[name] = {key: difference(ours[key], theirs[key], groups) for key in ours if key in theirs}
    means = [{case.case: case.mean_dice for case in summary.cases} for summary in (one, other)]
    return Comparison(first=names[0], second=names[1], mean_dice=difference(means[0], means[1], groups), classes=found)


def _estimates(summary: Summary, groups: Mapping[str, str], only: Collection[str] = ()) -> Estimates:
    values = {class_.name: summary.values(class_.name) for class_ in summary.classes}
    return {
        name: {key: estimate(by_case, groups) for key, by_case in of_class.items() if not only or key in only}
        for name, of_class in values.items()
    }


def _behind(own: Estimates, rest: Estimates) -> list[str]:
    """Return the classes whose Dice is clearly lower than that of all other cases: their intervals lie apart."""
    found = []
    for name, values in own.items():
        high, low = values["dice"].high, rest[name]["dice"].low if name in rest else None
        if high is not None and low is not None and high < low:
            found.append(name)
    return found
