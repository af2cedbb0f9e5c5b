"""What the model that is handed over makes of the test images, and how good that is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from segfit.dataset.layouts.table import rows_beside
from segfit.dataset.manifest import Case
from segfit.evaluation.cohorts import column_of, groups_of, with_estimates
from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.measures import Measures
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import Summary
from segfit.files import replace_folder
from segfit.inference.model import load_model
from segfit.inference.predict_folder import predict_folder
from segfit.project.handing_over import hand_over, model_key, select_model
from segfit.project.preparation import Preparation
from segfit.project.selecting import Selected
from segfit.project.sharing import Task
from segfit.project.stage_log import told_of_files
from segfit.project.stages import STAGES
from segfit.project.validation import SUMMARY
from segfit.records import Key, is_sealed, remove_damaged, seal

__all__ = ["Predictions", "evaluate_test", "measure_test", "metrics_of", "predict_test", "predictions_of"]


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions of the test images by the model that was handed over, and where their metrics lie."""

    folder: Path
    key: Key
    cases: tuple[Case, ...]
    ending: str

    @property
    def names(self) -> list[str]:
        """Files in the folder."""
        return [f"{case.id}{self.ending}" for case in self.cases]


def predictions_of(project: Preparation, chosen: Selected) -> Predictions:
    """Return where the predictions of the test images are, or are to be."""
    cases = project.dataset.test
    key = STAGES["predict"].key(
        project.options,
        model=model_key(project, chosen).hash,
        images={case.id: project.hashes.images(case) for case in cases},
    )
    return Predictions(project.plan_folder.predictions(key.hash), key, cases, project.dataset.file_ending)


def metrics_of(project: Preparation, predictions: Predictions) -> tuple[Path, Key]:
    """Return where the metrics of predictions lie, and what they count under."""
    references = {case.id: project.hashes.case(case) for case in predictions.cases if case.label_files}
    key = STAGES["evaluate"].key(project.options, predictions=predictions.key.hash, references=references)
    return predictions.folder / SUMMARY, key


def predict_test(project: Preparation) -> list[Path]:
    """Predict the test images into ``predictions/``."""
    top = project.folder.predictions
    return [top / name for name in _predicted(project).names]


def _predicted(project: Preparation) -> Predictions:
    """Predict the test images, and have a copy at the top of the project."""
    chosen = select_model(project)
    item, top = predictions_of(project, chosen), project.folder.predictions
    if not item.cases:
        shutil.rmtree(top, ignore_errors=True)  # of images that are gone
        return item

    def do() -> None:
        remove_damaged(item.folder, item.key)
        with project.stage_log.of("predict") as use:
            execution, device = project.execution, project.options.device
            if execution.is_here:  # one reads ahead: each holds a case beside the networks
                execution = replace(execution, workers=1)
            with project.locks.held("model"):  # other commands may have another one handed over
                hand_over(project, chosen)
                repeated, here = bool(project.options.training.deterministic), device if execution.is_here else "cpu"
                model = load_model(project.folder.model, here, deterministic=repeated)
            predict_folder(model, item.cases, item.folder, ending=item.ending, device=device, execution=execution)
            seal(item.folder, item.key, item.names, use())

    project.locks.share([Task("predict", lambda: is_sealed(item.folder, item.key), do)])
    with project.locks.held("predictions"), told_of_files("results"):
        if not is_sealed(top, item.key):
            replace_folder(item.folder, top)
    return item


def evaluate_test(project: Preparation) -> Summary | None:
    """Score the predictions of the test images that have labels; None if there are none."""
    item, top = _predicted(project), project.folder.predictions / SUMMARY
    cases = [case for case in item.cases if case.label_files]
    if not cases:
        top.unlink(missing_ok=True)
        return None
    path, key = metrics_of(project, item)

    def make() -> Summary:
        return evaluate(
            _test_pairs(project, item), project.dataset.labels, measures=Measures(), execution=project.execution
        )

    found = project.documents.get(Summary, path, key, make)
    project.documents.publish(path, top)
    return found


def measure_test(project: Preparation, measures: Measures, by: str) -> Summary:
    """Measure more of the same predictions, with intervals of means over groups; nothing of it is kept."""
    item = _predicted(project)
    pairs = _test_pairs(project, item)
    rows = rows_beside(project.dataset.root)
    values = column_of(rows, by) if by else None
    groups = groups_of([pair.case for pair in pairs], rows)
    found = evaluate(pairs, project.dataset.labels, measures=measures, execution=project.execution)
    return with_estimates(found, groups, by, values)


def _test_pairs(project: Preparation, item: Predictions) -> list[Pair]:
    """Return the predictions of the test images that have labels, with these."""
    cases = [case for case in item.cases if case.label_files]
    return [Pair.of_case(case, item.folder / f"{case.id}{item.ending}", project.dataset.labels) for case in cases]
