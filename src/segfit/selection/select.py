"""The choice of the configuration, or ensemble of two, that is handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import AliasChoices, Field

from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError, StageError
from segfit.evaluation.measurement import Margins
from segfit.evaluation.pairs import Pair
from segfit.evaluation.quality import QualityFit
from segfit.evaluation.statistics import Difference, difference
from segfit.evaluation.summary import Summary
from segfit.execution.execution import LOCAL, Execution
from segfit.files import Document, Record
from segfit.labels import LabelScheme
from segfit.options import SelectionRule
from segfit.selection.postprocess import decide_postprocessing
from segfit.selection.sizes_and_holes import decide_sizes_and_holes
from segfit.text import count

__all__ = ["Candidate", "CandidateDice", "Choice", "Selection", "select", "select_winner"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration or an ensemble of several, with its cross-validated metrics."""

    members: tuple[str, ...]  # names of configurations
    summary: Summary
    networks: int = 0  # that predict a case, both of a cascade; 0: as many as members

    @property
    def cost(self) -> int:
        """Networks that predict a case, in each fold."""
        return self.networks or len(self.members)

    @property
    def name(self) -> str:
        """Name for readers: the configuration, or the members joined by plus signs."""
        return " + ".join(self.members)


@dataclass(frozen=True, slots=True)
class Choice:
    """The winning candidate, why it won, and what readers should know about the others."""

    winner: Candidate
    reason: str
    notes: tuple[str, ...]


class CandidateDice(Record):
    """Cross-validated Dice of a candidate; None where no case gives a value."""

    members: tuple[str, ...]
    mean_dice: float | None  # over classes that have a value, what is compared
    per_class: dict[str, float | None] = Field(validation_alias=AliasChoices("per_class", "per_target"))  # its old name
    per_fold: dict[int, float | None]  # mean Dice of the fold's cases


class Selection(Document):
    """What cross-validation chose, and from what."""

    candidates: tuple[CandidateDice, ...]
    winner: tuple[str, ...]  # configurations whose probabilities are averaged
    reason: str
    notes: tuple[str, ...]
    steps: tuple[PostprocessingStep, ...]
    dice_before_steps: float | None
    dice_after_steps: float | None
    folds: tuple[int, ...]
    margins: Margins = {}  # of measurements of predictions
    quality: dict[str, QualityFit] = {}  # how good predictions are likely to be, by class


def select_winner(
    candidates: Sequence[Candidate], rule: SelectionRule = "nnunet", groups: Mapping[str, str] | None = None
) -> Choice:
    """Choose the candidate with the highest mean Dice, by the rule "beyond-chance" only if no cheaper one is as good.

    Cheaper is what fewer networks predict. It is as good where the 95 % interval of the mean difference of cases, over
    `groups` (by case; others are their own), does not lie above 0, or cannot be told from so few.
    Ties go to the first in order, single configurations before ensembles. A candidate without a value is skipped with
    a note. Raises `InputError` without candidates or if they were scored on different cases, `StageError` if none of
    them has a value.
    """
    if not candidates:
        raise InputError("there is nothing to select from", "train at least one configuration")
    cases = {case.case for case in candidates[0].summary.cases}
    for candidate in candidates:
        other = {case.case for case in candidate.summary.cases}
        if other != cases:
            raise InputError(
                f"{candidates[0].name} was validated on {len(cases)} cases and {candidate.name} on {len(other)} others "
                "or in part",
                "train the same folds of both, or select among one of them",
            )
    ordered = sorted(candidates, key=lambda candidate: len(candidate.members) > 1)
    valid = [(dice, candidate) for candidate in ordered if (dice := candidate.summary.mean_dice) is not None]
    left_out = [candidate for candidate in ordered if candidate.summary.mean_dice is None]
    notes = tuple(f"{candidate.name} was left out: no class has a Dice in any case" for candidate in left_out)
    if not valid:
        raise StageError("no candidate has a Dice in any case: the references of all validation cases are empty")
    ranked = sorted(valid, key=lambda item: -item[0])  # stable: ties stay in order
    best = ranked[0][1]
    for cost in sorted({item.cost for _, item in ranked if item.cost < best.cost} if rule == "beyond-chance" else ()):
        cheaper = next(entry for entry in ranked if entry[1].cost == cost)
        gain = difference(_by_case(best), _by_case(cheaper[1]), groups or {})
        if gain.low is None or gain.low <= 0:
            return Choice(cheaper[1], _as_good(ranked[0], cheaper, gain), notes)
    return Choice(best, _reason(ranked), notes)


def select(
    candidates: Sequence[Candidate],
    scheme: LabelScheme,
    folds: Mapping[int, Sequence[str]],
    pairs_of: Callable[[Candidate], Sequence[Pair]],
    *,
    rule: SelectionRule = "nnunet",
    groups: Mapping[str, str] | None = None,
    execution: Execution = LOCAL,
) -> tuple[Selection, Summary]:
    """Choose the winner and decide its post-processing, by the rule "beyond-chance" also by size and for holes.

    Returns what was chosen, and the metrics of the winner after its post-processing.

    Parameters
    ----------
    candidates : every trained configuration, and ensembles of them
    folds : validation cases by fold
    pairs_of : returns the validation predictions of the winner with their references
    rule, groups : as in `select_winner`
    """
    choice = select_winner(candidates, rule, groups)
    pairs = pairs_of(choice.winner)
    decision = decide_postprocessing(pairs, scheme, execution=execution)
    if rule == "beyond-chance":
        decision = decide_sizes_and_holes(decision, pairs, scheme, groups or {}, execution=execution)
    selection = Selection(
        candidates=tuple(_dice(candidate, folds) for candidate in candidates),
        winner=choice.winner.members,
        reason=choice.reason,
        notes=choice.notes,
        steps=decision.steps,
        dice_before_steps=decision.before.mean_dice,
        dice_after_steps=decision.after.mean_dice,
        folds=tuple(sorted(folds)),
    )
    return selection, decision.after


def _dice(candidate: Candidate, folds: Mapping[int, Sequence[str]]) -> CandidateDice:
    summary = candidate.summary
    return CandidateDice(
        members=candidate.members,
        mean_dice=summary.mean_dice,
        per_class={name: one.dice for name, one in summary.mean.items()},
        per_fold={fold: summary.subset(cases).mean_dice for fold, cases in sorted(folds.items())},
    )


def _by_case(candidate: Candidate) -> dict[str, float | None]:
    return {case.case: case.mean_dice for case in candidate.summary.cases}


def _as_good(best: tuple[float, Candidate], cheaper: tuple[float, Candidate], gain: Difference) -> str:
    """Say in one sentence why a cheaper candidate was taken."""
    where = f"over {count(gain.cases, 'case')}"
    if gain.low is not None and gain.high is not None:
        where = f"95 % interval of the difference {gain.low:+.4f} to {gain.high:+.4f} {where}"
    many = f"{cheaper[1].cost} instead of {count(best[1].cost, 'network')}"
    return (
        f"{cheaper[1].name} is taken ({cheaper[0]:.4f}, {many}): {best[1].name} ({best[0]:.4f}) is not better by more "
        f"than chance in cross-validation ({where})."
    )


def _reason(ranked: Sequence[tuple[float, Candidate]]) -> str:
    """Say in one sentence why the first of the ranked candidates won."""
    dice, winner = ranked[0]
    if len(ranked) == 1:
        return f"{winner.name} is the only candidate (mean Dice {dice:.4f} in cross-validation)."
    second, runner_up = ranked[1]
    if second == dice:
        return (
            f"{winner.name} and {runner_up.name} share the highest mean Dice in cross-validation ({dice:.4f}); "
            "the first in order is taken, single configurations before ensembles."
        )
    return (
        f"{winner.name} has the highest mean Dice in cross-validation: {dice:.4f}, "
        f"followed by {runner_up.name} with {second:.4f}."
    )
