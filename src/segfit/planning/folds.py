"""Why there are so many folds, and what decides who is in which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from segfit.dataset.manifest import Case
from segfit.dataset.splits import MAX_FOLDS, Splits, faults_of
from segfit.planning.explain import change_in_words
from segfit.planning.plan import Decision, Plan

__all__ = ["folds_decision", "with_folds"]


def with_folds(plan: Plan, splits: Splits, cases: Sequence[Case]) -> Plan:
    """Return a plan with what there is to say of its folds: the decision, what is not nnU-Net's way, and warnings."""
    balanced = splits.source == "balanced"
    changes = {
        "decisions": (*plan.decisions, folds_decision(splits, cases)),
        "warnings": (*plan.warnings, *faults_of(splits, cases)),
        "changes": (*plan.changes, *([change_in_words("balanced", {})] if balanced else [])),
        "stock": plan.stock and not balanced,
    }
    return plan.model_copy(update=changes)


def folds_decision(splits: Splits, cases: Sequence[Case]) -> Decision:
    """Return the decision on the folds of a dataset, from splits that say how they were made."""
    groups = len({case.group for case in cases if case.group is not None})
    single = sum(case.group is None for case in cases)
    sites = len({case.site for case in cases if case.site is not None})
    inputs: dict[str, Any] = {"cases": len(cases), "groups": groups, "sites": sites}
    inputs = {key: number for key, number in inputs.items() if number}
    match splits.source:
        case "balanced":
            rule, bound = "folds_balanced", "groups" if groups + single <= MAX_FOLDS else "most"
        case "nnunet":
            rule, bound = "folds_nnunet", "cases" if len(cases) <= MAX_FOLDS else "most"
        case file:
            rule, bound = "folds_file", "file"
            inputs["file"] = file
    if bound == "most":
        inputs["most_folds"] = MAX_FOLDS
    return Decision(key="num_folds", value=len(splits.folds), rule=rule, bound=bound, inputs=inputs)
