"""What counts of what the stages of a project left: looked up, never made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segfit.dataset.splits import Fold
from segfit.evaluation.summary import Summary
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.planning.plan import Plan
from segfit.project.handing_over import evidence_of
from segfit.project.predicting import metrics_of, predictions_of
from segfit.project.preparation import Preparation
from segfit.project.selecting import Selected, selected
from segfit.project.trainings import Training, results_of, trainings_of
from segfit.selection.verdict import Verdict, judge
from segfit.training.result import TrainingResult

__all__ = ["Findings", "find"]


@dataclass(frozen=True, slots=True)
class Findings:
    """What there is, stage by stage; None of what is not done."""

    fingerprint: Fingerprint | None = None
    plan: Plan | None = None
    folds: tuple[Fold, ...] = ()
    trainings: tuple[Training, ...] = ()  # of the run, begun or not
    results: tuple[TrainingResult, ...] = ()  # of those that are finished
    selected: Selected | None = None
    test: Summary | None = None
    predicted: Path | None = None  # folder of the predictions that `test` scores
    verdict: Verdict | None = None  # on the selected model

    @property
    def validated(self) -> dict[str, Path]:
        """In which folder what the selected model makes of each validation case lies."""
        return {} if self.selected is None else self.selected.validated()


def find(project: Preparation) -> Findings:
    """Look up what there is."""
    if project.options.dataset.skip_incomplete:
        project.check()  # it decides which cases count
    fingerprint = project.known_fingerprint()
    if fingerprint is None:
        return Findings()
    folds, plan = project.splits().folds, project.known_plan()
    if plan is None or plan.run is None:
        return Findings(fingerprint, plan, folds)
    with project.looking(plan):
        trainings = tuple(trainings_of(project))
        results = tuple(results_of(trainings))
        chosen = selected(project, results) if len(results) == len(trainings) else None
        if chosen is None:
            return Findings(fingerprint, plan, folds, trainings, results)
        test, predicted = None, None
        if any(case.label_files for case in project.dataset.test):
            predictions = predictions_of(project, chosen)
            test = project.results.recall(Summary, *metrics_of(project, predictions))
            predicted = None if test is None else predictions.folder
        verdict = judge(evidence_of(project, chosen, fingerprint, test))
    return Findings(fingerprint, plan, folds, trainings, results, chosen, test, predicted, verdict)
