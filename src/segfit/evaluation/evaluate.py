"""Label maps are compared with their references: pairs of them, or two folders of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from numpy.typing import NDArray

from segfit.dataset.annotation import count_values
from segfit.dataset.layouts.names import composed
from segfit.dataset.layouts.table import rows_beside, spacings_of
from segfit.dataset.object_numbers import FEWEST_OBJECTS
from segfit.errors import DatasetError, InputError, Problem, warning
from segfit.evaluation.cohorts import column_of, groups_of, with_estimates
from segfit.evaluation.measures import TOLERANCE_MM, TOLERANCE_PX, MeasureKind, Measures, Sizes, Unit, measure
from segfit.evaluation.metrics import Metrics, joint_histogram, metrics_from_histogram
from segfit.evaluation.pairs import LabelFile, Pair, Placed
from segfit.evaluation.summary import Summary, summarize
from segfit.execution.execution import LOCAL, Execution
from segfit.execution.processors import available_workers
from segfit.files import path_of
from segfit.images.formats import ENDINGS, full_name, known_ending, read_label
from segfit.images.image import problem_of
from segfit.labels import LabelScheme
from segfit.options import LabelUse
from segfit.progress import KeptWarnings
from segfit.text import count, listing

__all__ = ["evaluate", "evaluate_folder"]

_TOLD = {
    "axes_turned": "the prediction of {} stores its axes in another order and was reoriented",
    "compared_by_index": "prediction and reference of {} differ in voxel size and do not both have an affine; voxels "
    "were compared by index",
}


def evaluate(
    pairs: Sequence[Pair], scheme: LabelScheme, *, measures: Measures | None = None, execution: Execution = LOCAL
) -> Summary:
    """Evaluate every pair, in parallel over cases; the summary lists them in the order of `pairs`.

    With `measures` more than overlap is measured.

    Raises `DatasetError` naming every case whose label maps cannot be compared. Values that were not declared count as
    no class, and a warning says where they are, as of files that do not lie alike in space.
    """
    kept = KeptWarnings(execution.progress)
    threads = 1  # of a worker elsewhere, which may have one processor
    if execution.is_here:
        threads = max(1, (execution.workers or available_workers()) // max(1, len(pairs)))
    results = replace(execution, progress=kept).map(
        partial(_evaluate_pair, scheme, measures, threads),
        pairs,
        description="evaluating",
        name=lambda pair: pair.case,
        size=lambda pair: pair.predicted_bytes() * (2 if measures is not None and measures.kinds else 1),
    )
    found = {pair.case: one for pair, one in results}
    problems = [found[pair.case].problem for pair in pairs]
    if any(problems):
        raise DatasetError([problem for problem in problems if problem is not None], "nothing was evaluated")
    _tell(found, kept)
    measured, unit = _as_measured(measures, found, kept)
    summary = summarize([pair.with_metrics(found[pair.case].metrics) for pair in pairs], scheme.classes)
    return summary.model_copy(update={"warnings": tuple(kept.warnings), "measures": measured, "unit": unit})


def _tell(found: Mapping[str, _Evaluated], kept: KeptWarnings) -> None:
    """Warn of values that no class has, and of files that do not lie alike in space."""
    for role in ("prediction", "reference"):
        strange = {case: one.undeclared[role] for case, one in sorted(found.items()) if role in one.undeclared}
        if strange:
            values = sorted({value for those in strange.values() for value in those})
            named = f" ({listing([str(value) for value in values])})" if values else ""
            problem = f"the {role} of {listing(list(strange))} has undeclared values{named}, which are ignored"
            action = "change them in the files to the values that dataset.json declares, if they are classes"
            if role == "reference" and len(values) >= FEWEST_OBJECTS:
                action += "; if they number objects, give --labels objects-as-foreground or objects-as-boundary"
            kept.warn(warning("undeclared_values", problem, action))
    for placed, words in _TOLD.items():
        if cases := sorted(case for case, one in found.items() if one.placed == placed):
            kept.warn(warning(placed, words.format(listing(cases))))


def _as_measured(
    asked: Measures | None, found: Mapping[str, _Evaluated], kept: KeptWarnings
) -> tuple[Measures | None, Unit | None]:
    """Return what was measured with the tolerance that held, and the unit of distances; None where there are none."""
    if asked is None or not asked.needs_sizes:
        return asked, None
    without = sorted(case for case, one in found.items() if not one.sizes_known)
    if not without:
        return asked.within(TOLERANCE_MM), "mm"
    if len(without) == len(found):
        return asked.within(TOLERANCE_PX), "px"
    problem = f"distances of {listing(without)} are in pixels, those of the others in mm, and means are of both"
    kept.warn(warning("mixed_units", problem, "give their pixel_mm in cases.csv beside the references"))
    return asked, None


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """Metrics of a pair, and the values that no class has by which of the two holds them; or why there are none."""

    metrics: dict[str, Metrics]
    undeclared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    placed: Placed = "alike"
    problem: Problem | None = None
    sizes_known: bool = True


def _evaluate_pair(scheme: LabelScheme, measures: Measures | None, threads: int, pair: Pair) -> _Evaluated:
    try:
        prediction, reference, placed = pair.compared()
        counts = joint_histogram(prediction, reference, scheme)
        metrics = metrics_from_histogram(counts, scheme.classes)
        needed = measures is not None and measures.needs_sizes
        sizes = pair.sizes(prediction.shape) if needed else Sizes.unknown(prediction.shape)
        if measures is not None:
            metrics = measure(prediction, reference, scheme, metrics, sizes, measures, threads)
    except InputError as error:
        return _Evaluated({}, problem=problem_of(pair.case, error))
    undeclared: dict[str, tuple[int, ...]] = {}
    if counts[:, -1].any():
        undeclared["prediction"] = _undeclared(pair.load_prediction, prediction, scheme)
    if counts[-1].any():
        undeclared["reference"] = _undeclared(pair.load_reference, reference, scheme)
    return _Evaluated(metrics, undeclared, placed, sizes_known=sizes.known)


def _undeclared(load: object, inner: NDArray[Any], scheme: LabelScheme) -> tuple[int, ...]:
    """Return the values of a label map that are not declared, as stored; none where only inner ones are known."""
    if isinstance(load, LabelFile):
        return tuple(sorted(set(count_values(read_label(load.path).array)) - set(scheme.stored_values)))
    return tuple(sorted(set(count_values(inner)) - set(scheme.stored_values))) if scheme.stored is None else ()


def evaluate_folder(
    predictions: Path | str,
    references: Path | str,
    scheme: LabelScheme,
    *,
    ending: str,
    require_all: bool = True,
    label_use: LabelUse = "classes",
    metrics: Sequence[MeasureKind] = (),
    tolerance: float | None = None,
    matched_iou: float = 0.5,
    table: Path | str | None = None,
    by: str = "",
    execution: Execution = LOCAL,
) -> Summary:
    """Evaluate every label file of a folder against the file of the same name in another folder.

    Parameters
    ----------
    predictions, references : folders of label files
    ending : file ending of both, with the leading dot; a folder without such files may have label files with another
        ending that is known; hidden files are ignored
    require_all : whether every reference must have a prediction
    label_use : what the values of references are; where they number objects, `scheme` is that of the one class, or of
        interior and boundary, that predictions have
    metrics : what to measure beside overlap: "surface" (surface Dice, HD95, average distance), "centreline" (centreline
        Dice, needs scikit-image), "objects" (sensitivity to objects, false ones, panoptic quality)
    tolerance : of surface Dice; 1 mm by default, 2 pixels for images that do not say how large theirs are
    matched_iou : IoU above which an object was found
    table : where a table of the cases, `cases.csv`, lies if none is beside the references or in the folder above: for
        `pixel_mm` of pictures, `group` (over which intervals of means are taken; names of cases may say it too), `by`
    by : column of the table by whose values means are told too

    Pairs are compared in space: predictions that store the same volume in another order of axes are turned, and told.
    Raises `InputError` if nothing is there, naming the files that lack their counterpart, or the cases whose label maps
    differ in shape or lie apart. Where a file does not say where it lies, voxels are compared by index; voxel sizes
    that differ are then a warning.
    """
    kept = KeptWarnings(execution.progress)
    measures = Measures.asked(metrics, tolerance, matched_iou)
    _require_fitting(scheme, label_use)
    if not isinstance(ending, str):
        raise InputError(f"the ending of label files is text, got {ending!r}", 'give for example ".nii.gz"')
    predictions, references = path_of(predictions, "predictions"), path_of(references, "references")
    rows, place = rows_beside(references), references
    if not rows and table is not None:
        place = path_of(table, "table")
        rows = rows_beside(place)
    sizes = spacings_of(place) if measures.needs_sizes else {}
    if not execution.is_here:  # workers may be in another folder
        predictions, references = predictions.absolute(), references.absolute()
    files = _counterparts(predictions, references, ending, require_all, kept)
    execution.require_shared(files[0][1:])
    pairs = [Pair.of_files(*found, scheme, label_use, sizes.get(found[0])) for found in files]
    values = column_of(rows, by) if by else None
    summary = evaluate(pairs, scheme, measures=measures, execution=replace(execution, progress=kept))
    summary = with_estimates(summary, groups_of([pair.case for pair in pairs], rows), by, values)
    return summary.model_copy(update={"warnings": tuple(kept.warnings)})


def _require_fitting(scheme: LabelScheme, label_use: LabelUse) -> None:
    """Refuse what is no scheme, or none of what references are taken as."""
    if not isinstance(scheme, LabelScheme):
        raise InputError(f"what labels mean is told by a LabelScheme, got {scheme!r}", "give dataset.labels")
    if label_use not in get_args(LabelUse):
        raise InputError(f"label_use is {', '.join(get_args(LabelUse))}, got {label_use!r}")
    wanted = {"objects-as-foreground": 1, "objects-as-boundary": 2}.get(label_use)
    if wanted is not None and len(scheme.classes) != wanted:
        problem = f"{label_use} makes {count(wanted, 'class', 'classes')} of the references, predictions have"
        action = "give the labels, or the model, that the predictions are of"
        raise InputError(f"{problem} {len(scheme.classes)}", action)


def _counterparts(
    predictions: Path, references: Path, ending: str, require_all: bool, kept: KeptWarnings
) -> list[tuple[str, Path, Path]]:
    """Return the name of every prediction, its file and that of its reference; names compose accents."""
    predicted, expected = _files(predictions, ending), _files(references, ending)
    if not predicted:
        raise InputError(f"{predictions} has no prediction that ends in {ending}", "give the folder of label files")
    unknown = sorted(set(predicted) - set(expected))
    if unknown:
        raise InputError(f"{references} has no reference for {listing(unknown)}", "add it or remove the prediction")
    missing = sorted(set(expected) - set(predicted))
    if missing and require_all:
        problem = f"{predictions} has no prediction for {listing(missing)}"
        raise InputError(problem, "predict them first or allow a subset")
    if missing:
        verbs = ("has", "is") if len(missing) == 1 else ("have", "are")
        of = f"{listing(missing)} of {count(len(expected), 'reference')}"
        problem = f"{of} {verbs[0]} no prediction and {verbs[1]} not counted"
        kept.warn(warning("no_prediction", problem))
    return [(name, predicted[name], expected[name]) for name in sorted(predicted)]


def _files(folder: Path, ending: str) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of label files")
    visible = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    found = {composed(path.name.removesuffix(ending)): path for path in visible if path.name.endswith(ending)}
    if found:
        return found
    for path in visible:
        other = known_ending(path)
        if other and ENDINGS[other.lower()].write is not None:
            same = found.setdefault(composed(full_name(path).removesuffix(other)), path)
            if same is not path:
                raise InputError(f"{folder} has both {same.name} and {path.name}", "leave one of them")
    return found
