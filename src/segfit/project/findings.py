"""What counts of what the stages of a project left: looked up, never made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from segfit.dataset.splits import Fold
from segfit.evaluation.summary import Summary
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.planning.plan import Plan
from segfit.project.handover import Selected, metrics_of, predictions_of, selected
from segfit.project.preparation import Preparation
from segfit.project.trainings import Training, results_of, trainings_of
from segfit.records import recall
from segfit.selection.evidence import Evidence
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

    @property
    def validated(self) -> dict[str, Path]:
        """Where the prediction of each validation case by the first configuration of the winner lies: its folder."""
        if self.selected is None:
            return {}
        first = self.selected.selection.winner[0]
        return {
            case: item.folder
            for item in self.selected.validations
            if item.training.name == first
            for case in item.cases
        }

    def verdict(self) -> Verdict | None:
        """Judge the model; None as long as none was selected."""
        if self.selected is None or self.plan is None or self.fingerprint is None:
            return None
        return judge(
            Evidence(
                validation=self.selected.summary,
                selection=self.selected.selection,
                trainings=self.results,
                plan=self.plan,
                fingerprint=self.fingerprint,
                num_folds=len(self.folds),
                test=self.test,
            )
        )


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
        results = tuple(results_of(project, trainings))
        if len(results) < len(trainings):
            return Findings(fingerprint, plan, folds, trainings, results)
        chosen = selected(project, results)
        if chosen is None or not any(case.label_files for case in project.dataset.test):
            return Findings(fingerprint, plan, folds, trainings, results, chosen)
        predictions = predictions_of(project, chosen)
        path, key = metrics_of(project, predictions)
    test = recall(Summary, path, key)
    predicted = None if test is None else predictions.folder
    return Findings(fingerprint, plan, folds, trainings, results, chosen, test, predicted)
