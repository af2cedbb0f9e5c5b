"""How cases are split into folds: the way, which of them stay together, and why there are so many folds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from segfit.dataset.manifest import Case, Dataset
from segfit.dataset.name_groups import grouped_by_names
from segfit.dataset.splits import MAX_FOLDS, Splits, asked_splits, faults_of
from segfit.options import Options
from segfit.planning.explain import change_in_words
from segfit.planning.plan import Decision, Plan
from segfit.planning.presets import splits_of

__all__ = ["folds_decision", "grouped", "splitting", "with_folds"]


def with_folds(plan: Plan, splits: Splits, dataset: Dataset) -> Plan:
    """Return a plan with what there is to say of its folds: the decision, what is not nnU-Net's way, and warnings."""
    balanced, cases = splits.source == "balanced", dataset.training
    changes = {
        "decisions": (*plan.decisions, folds_decision(splits, cases, named=dataset.groups_from_names)),
        "warnings": (*plan.warnings, *faults_of(splits, cases)),
        "changes": (*plan.changes, *([change_in_words("balanced", {})] if balanced else [])),
        "stock": plan.stock and not balanced,
    }
    return plan.model_copy(update=changes)


def splitting(options: Options, dataset: Dataset) -> Literal["balanced", "nnunet"] | Path:
    """Return how the cases are to be split: as asked for, by a file in the dataset's folder, or as the preset does."""
    return asked_splits(options.planning.splits, dataset) or splits_of(options)


def grouped(dataset: Dataset, options: Options) -> Dataset:
    """Return the dataset with the groups that names of cases say: as asked for, else for balanced folds of `auto`."""
    by_default = options.preset == "auto" and splitting(options, dataset) == "balanced"
    return grouped_by_names(dataset, options.dataset.groups, by_default=by_default)


def folds_decision(splits: Splits, cases: Sequence[Case], *, named: bool = False) -> Decision:
    """Return the decision on the folds of a dataset, from splits that say how they were made.

    `named` says that groups were taken from the names of cases.
    """
    groups = len({case.group for case in cases if case.group is not None})
    single = sum(case.group is None for case in cases)
    sites = len({case.site for case in cases if case.site is not None})
    inputs: dict[str, Any] = {"cases": len(cases), "groups": groups, "sites": sites}
    inputs = {key: number for key, number in inputs.items() if number}
    match splits.source:
        case "balanced":
            rule = "folds_named" if named else "folds_balanced"
            bound = "groups" if groups + single <= MAX_FOLDS else "most"
        case "nnunet":
            rule, bound = "folds_nnunet", "cases" if len(cases) <= MAX_FOLDS else "most"
        case file:
            rule, bound = "folds_file", "file"
            inputs["file"] = file
    if bound == "most":
        inputs["most_folds"] = MAX_FOLDS
    return Decision(key="num_folds", value=len(splits.folds), rule=rule, bound=bound, inputs=inputs)
