from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from segfit.dataset.manifest import Case
from segfit.dataset.splits import balanced_splits, nnunet_splits
from segfit.planning.folds import folds_decision


def cases(count: int, per_group: int = 0) -> list[Case]:
    return [
        Case(id=f"c{n}", images=(Path("a"),), group=f"p{n // per_group}" if per_group else None, site="AB"[n % 2])
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("per_group", "source", "value", "inputs", "bound"),
    [
        (0, "balanced", 5, {"cases": 12, "sites": 2}, "most"),
        (4, "balanced", 3, {"cases": 12, "groups": 3, "sites": 2}, "groups"),
        (4, "nnunet", 5, {"cases": 12, "groups": 3, "sites": 2}, "most"),
        (4, "/data/mine.json", 5, {"cases": 12, "groups": 3, "sites": 2}, "file"),
    ],
)
def test_folds_are_explained(per_group: int, source: str, value: int, inputs: dict[str, Any], bound: str) -> None:
    given = cases(12, per_group)
    splits = balanced_splits(given, {}) if source == "balanced" else nnunet_splits([case.id for case in given])
    decision = folds_decision(splits.sealed(source), given)
    assert (decision.key, decision.value, decision.bound) == ("num_folds", value, bound)
    extra = {"most": {"most_folds": 5}, "file": {"file": "/data/mine.json"}}
    assert decision.inputs == inputs | extra.get(bound, {})


def test_groups_from_names_are_told() -> None:
    given = cases(12, 4)
    rules = [
        folds_decision(balanced_splits(given, {}).sealed("balanced"), given, named=named).rule
        for named in (False, True)
    ]
    assert rules == ["folds_balanced", "folds_named"]


def test_few_cases_of_the_reference() -> None:
    given = cases(3)
    decision = folds_decision(nnunet_splits([case.id for case in given]).sealed("nnunet"), given)
    assert (decision.value, decision.bound) == (3, "cases")
