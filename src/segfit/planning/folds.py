"""Why there are so many folds, and what decides who is in which."""

from __future__ import annotations

from collections.abc import Sequence

from segfit.dataset.manifest import Case
from segfit.dataset.splits import MAX_FOLDS, Splits
from segfit.planning.plan import Decision

__all__ = ["folds_decision"]


def folds_decision(splits: Splits, cases: Sequence[Case]) -> Decision:
    """Return the decision on the folds of a dataset, from splits that say how they were made."""
    groups = len({case.group for case in cases if case.group is not None})
    single = sum(case.group is None for case in cases)
    sites = len({case.site for case in cases if case.site is not None})
    named = {"cases": len(cases), "groups": groups, "sites": sites}
    match splits.source:
        case "balanced":
            rule = (
                "one fold for each group of cases (a case without group is its own), at most five; groups stay "
                "together, sites and structures are spread evenly, rare ones first"
            )
            bound = "number of groups" if groups + single <= MAX_FOLDS else f"at most {MAX_FOLDS} folds"
            source = "segfit"
        case "nnunet":
            rule = "nnU-Net's shuffled split of the sorted case ids; groups and sites are not looked at"
            bound = "number of cases" if len(cases) <= MAX_FOLDS else f"{MAX_FOLDS} folds"
            source = "nnU-Net 2.8.1, KFold with seed 12345"
        case file:
            rule, bound, source = f"the folds in {file}", "the file", "the user"
    return Decision(
        key="num_folds",
        value=len(splits.folds),
        rule=rule,
        inputs={key: number for key, number in named.items() if number},
        bound=bound,
        source=source,
        would_change="the option planning.splits (--splits balanced, nnunet or FILE)",
    )
