"""The choice of the configuration, or ensemble of two, that is handed over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import AliasChoices, Field

from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError, StageError
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import Summary
from segfit.execution.execution import LOCAL, Execution
from segfit.files import Document, Record
from segfit.labels import LabelScheme
from segfit.selection.postprocess import decide_postprocessing

__all__ = ["Candidate", "CandidateDice", "Choice", "Selection", "select", "select_winner"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One configuration or an ensemble of several, with its cross-validated metrics."""

    members: tuple[str, ...]  # names of configurations
    summary: Summary

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


def select_winner(candidates: Sequence[Candidate]) -> Choice:
    """Choose the candidate with the highest mean Dice.

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
    return Choice(ranked[0][1], _reason(ranked), notes)


def select(
    candidates: Sequence[Candidate],
    scheme: LabelScheme,
    folds: Mapping[int, Sequence[str]],
    pairs_of: Callable[[Candidate], Sequence[Pair]],
    *,
    execution: Execution = LOCAL,
) -> tuple[Selection, Summary]:
    """Choose the winner and decide its post-processing; return that, and the metrics of the winner after it.

    Parameters
    ----------
    candidates : every trained configuration, and ensembles of them
    folds : validation cases by fold
    pairs_of : returns the validation predictions of the winner with their references
    """
    choice = select_winner(candidates)
    decision = decide_postprocessing(pairs_of(choice.winner), scheme, execution=execution)
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
