"""The page of an evaluation: scores of label files, and pictures of them where their images are known."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segfit.dataset.manifest import Case
from segfit.evaluation.cohorts import Comparison
from segfit.evaluation.pairs import Pair
from segfit.evaluation.summary import CaseMetrics, Summary
from segfit.execution.execution import LOCAL, Execution
from segfit.files import read_arrays, write_text
from segfit.geometry import Grid
from segfit.images.formats import known_ending, read_case, read_grid
from segfit.images.image import CASE_FAILURES, Image
from segfit.labels import LabelScheme
from segfit.options import LabelUse
from segfit.planning.mirroring import value_names
from segfit.report.data import Overlay, Rank, ranked
from segfit.report.page import render_scores
from segfit.report.views import View

__all__ = ["write_evaluation"]

_READS = 4  # label maps and the image, beside what their pair is predicted to take


def write_evaluation(
    summary: Summary,
    path: Path,
    labels: LabelScheme,
    *,
    label_use: LabelUse = "classes",
    cases: Mapping[str, Case] | None = None,
    observer: Comparison | None = None,
    images: bool = True,
    execution: Execution = LOCAL,
) -> None:
    """Write the page of what `evaluate_folder` found.

    Parameters
    ----------
    label_use : as there
    cases : by id, those whose images are known; of others the labels alone are shown
    observer : of `summary` with the scores of a second person
    images : with pictures
    """
    shown: list[Overlay] = []
    if images:
        known = cases or {}
        items = [(one, rank, known.get(one.case)) for one, rank in ranked(summary)]
        drawn = execution.map(
            partial(_overlay, labels, label_use),
            items,
            description="drawing pictures",
            name=lambda item: item[0].case,
            size=lambda item: _READS * _pair(labels, label_use, item[0], item[2]).predicted_bytes(),
        )
        done = {item[0].case: overlay for item, overlay in drawn if overlay is not None}
        shown = [done[one.case] for one, _, _ in items if one.case in done]
    names = value_names(labels)
    told = "" if observer is None else observer.sentence
    write_text(path, render_scores(summary, path.stem, shown, names, observer=told, no_images=not images))


def _pair(labels: LabelScheme, label_use: LabelUse, one: CaseMetrics, case: Case | None) -> Pair:
    """Return the label maps of a case as they were scored."""
    prediction, reference = Path(one.prediction_file), Path(one.reference_file)
    if case is not None and one.reference_file == ", ".join(path.as_posix() for path in case.label_files):
        return Pair.of_case(case, prediction, labels)
    return Pair.of_files(one.case, prediction, reference, labels, label_use)


def _overlay(labels: LabelScheme, label_use: LabelUse, item: tuple[CaseMetrics, Rank, Case | None]) -> Overlay | None:
    """Draw a case; None if its files cannot be read any more."""
    one, rank, case = item
    try:
        pair = _pair(labels, label_use, one, case)
        prediction, reference, placed = pair.compared()
        image = _image(one, case, reference.shape)
    except (*CASE_FAILURES, OSError):
        return None
    view = View.of_image(image, reference, prediction, scene=bool(rank))
    chance = _probability(Path(one.prediction_file), labels, reference.shape) if rank and placed == "alike" else None
    return Overlay.of(
        one.case,
        "evaluation",
        rank,
        one.mean_dice,
        view,
        view.axes.apply(prediction[None])[0],
        probability=None if chance is None else view.axes.apply(chance[None])[0],
    )


def _probability(prediction: Path, labels: LabelScheme, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
    """Return the probability of any class as `predict --probabilities` wrote it beside a label file, if it did."""
    ending = known_ending(prediction) or prediction.suffix
    arrays = read_arrays(prediction.with_name(f"{prediction.name.removesuffix(ending)}.npz"))
    found = None if arrays is None else arrays.get("probabilities")
    if found is None or found.shape != (labels.num_outputs, *shape):
        return None
    chance: NDArray[np.float32] = (found.max(axis=0) if labels.has_regions else 1 - found[0]).astype(np.float32)
    return chance


def _image(one: CaseMetrics, case: Case | None, shape: tuple[int, ...]) -> Image:
    """Return the image of a case on the grid of its reference, or a black one."""
    files = case.label_files if case is not None else ()
    first = Path(one.reference_file) if not files else files[0]
    grid = read_grid(first, None if case is None else case.spacing_mm)
    if case is not None:
        image = read_case(case.images, case.spacing_mm)
        if grid.shape == shape and image.grid.mismatch(grid):
            image = image.turned_to(grid)
        if image.grid.shape == shape:
            return image
    return Image(np.zeros((1, *shape), np.uint8), grid if grid.shape == shape else Grid(shape, (1.0,) * len(shape)))
