"""Metrics of many cases and their means; nnU-Net's ``summary.json`` form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, Field

from segfit.dataset.annotation import count_values, read_labels
from segfit.dataset.layouts.names import composed
from segfit.dataset.manifest import Case
from segfit.errors import DatasetError, InputError, Problem, warning
from segfit.evaluation.metrics import Metrics, joint_histogram, metrics_from_histogram
from segfit.execution.execution import LOCAL, Execution
from segfit.files import Document, Record, Warned
from segfit.geometry import Grid
from segfit.images.formats import ENDINGS, full_name, known_ending, num_voxels, read_grid, read_label
from segfit.images.image import FileError, Image, problem_of
from segfit.labels import LabelClass, LabelScheme
from segfit.notebook import html_table
from segfit.progress import KeptWarnings
from segfit.words import count, dice, listing

__all__ = [
    "CaseMetrics",
    "MeanMetrics",
    "Pair",
    "Stored",
    "Summary",
    "evaluate",
    "evaluate_folder",
    "predicted_bytes",
    "summarize",
]

_Placed = Literal["alike", "axes_turned", "compared_by_index"]
_TOLD = {
    "axes_turned": "the prediction of {} stores its axes in another order and was reoriented",
    "compared_by_index": "prediction and reference of {} differ in voxel size and do not both have an affine; voxels "
    "were compared by index",
}
_BYTES_PER_VOXEL = 8  # of a label map that is read and compared with another

# Field of our records -> key of nnU-Net.
_NNUNET_KEYS = {
    "dice": "Dice",
    "fn": "FN",
    "fp": "FP",
    "iou": "IoU",
    "tn": "TN",
    "tp": "TP",
    "n_pred": "n_pred",
    "n_ref": "n_ref",
}


@runtime_checkable
class Stored(Protocol):
    """Loads an array from files, in any process: it is small, can be pickled, and knows what loading takes."""

    def __call__(self) -> NDArray[Any]:
        """Return the array."""
        ...

    def predicted_bytes(self) -> int:
        """Return the memory that loading and using the array takes, about; 0 if it cannot leave this process."""
        ...


def predicted_bytes(loads: Iterable[Callable[[], NDArray[Any]]]) -> int:
    """Return the memory that loading all takes, about; 0 if one of them cannot leave this process."""
    each = [load.predicted_bytes() if isinstance(load, Stored) else 0 for load in loads]
    return sum(each) if all(each) else 0


@dataclass(frozen=True, slots=True)
class _File:
    """Loads the label map of a file; without `scheme` its values are taken as inner ones."""

    path: Path
    scheme: LabelScheme | None

    def __call__(self) -> NDArray[Any]:
        """Return the inner label values, (*spatial)."""
        return self.inner(read_label(self.path))

    def inner(self, image: Image) -> NDArray[Any]:
        """Return the inner label values of what was read."""
        labels: NDArray[Any] = image.array[0]
        return labels if self.scheme is None else self.scheme.to_inner(labels)

    def predicted_bytes(self) -> int:
        """Return what a label map takes."""
        return num_voxels(self.path) * _BYTES_PER_VOXEL


@dataclass(frozen=True, slots=True)
class _Annotation:
    """Loads the annotation of a case; the header of its prediction tells the grid of its image, and how large it is."""

    case: Case
    scheme: LabelScheme
    prediction: Path

    def __call__(self) -> NDArray[Any]:
        """Return the inner label values, (*spatial)."""
        grid = None  # resampling is exact only on the grid that the image tells
        if not self.case.resample_label:
            grid = read_grid(self.prediction, self.case.spacing_mm)
        labels: NDArray[Any] = read_labels(self.case, self.scheme, grid).array[0]
        return labels

    def predicted_bytes(self) -> int:
        """Return what a label map takes."""
        return num_voxels(self.prediction) * _BYTES_PER_VOXEL


@dataclass(frozen=True, slots=True)
class Pair:
    """A prediction and its reference, read only when they are needed: folders of any size fit in memory.

    Parameters
    ----------
    case : case id
    load_prediction, load_reference : return the integer label maps, of equal shape; those that are `Stored` may be
        loaded by other processes
    prediction_file, reference_file : where they come from, for the summary; empty for computed ones
    """

    case: str
    load_prediction: Callable[[], NDArray[Any]]
    load_reference: Callable[[], NDArray[Any]]
    prediction_file: str = ""
    reference_file: str = ""

    @classmethod
    def of_files(cls, case: str, prediction: Path, reference: Path, scheme: LabelScheme | None = None) -> Pair:
        """Return the pair of two label files; without `scheme` their values are taken as inner ones.

        They are compared in space: a prediction that stores its axes in another order is turned.
        """
        return cls(
            case,
            _File(prediction, scheme),
            _File(reference, scheme),
            prediction.as_posix(),
            reference.as_posix(),
        )

    @classmethod
    def of_case(cls, case: Case, prediction: Path, scheme: LabelScheme, reference: Stored | None = None) -> Pair:
        """Return the pair of a label file that was predicted on the grid of a case and the annotation of the case.

        `reference` loads the annotation where it is kept elsewhere than in the files of the case.
        """
        return cls(
            case.id,
            _File(prediction, scheme),
            reference or _Annotation(case, scheme, prediction),
            prediction.as_posix(),
            ", ".join(path.as_posix() for path in case.label_files),
        )

    def predicted_bytes(self) -> int:
        """Return the memory that evaluating takes, about; 0 for label maps that cannot leave this process."""
        return predicted_bytes((self.load_prediction, self.load_reference))

    def load(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return prediction and reference; raise `InputError` naming the case if their shapes differ."""
        prediction, reference, _ = self.compared()
        return prediction, reference

    def compared(self) -> tuple[NDArray[Any], NDArray[Any], _Placed]:
        """Return what `load` does, and how two files lie in space: `FileError` where they lie apart."""
        placed: _Placed = "alike"
        if isinstance(self.load_prediction, _File) and isinstance(self.load_reference, _File):
            image, expected = read_label(self.load_prediction.path), read_label(self.load_reference.path)
            if expected.grid.mismatch(image.grid):
                placed = "compared_by_index" if expected.grid.turn(image.grid) is None else "axes_turned"
                image = image.turned_to(expected.grid)
            if _apart(expected.grid, image.grid):
                action = "predict on the grid of the reference, or copy its header if the voxels correspond"
                problem = f"does not fit its reference: {expected.grid.mismatch(image.grid)}"
                raise FileError(self.load_prediction.path, problem, action)
            prediction, reference = self.load_prediction.inner(image), self.load_reference.inner(expected)
        else:
            prediction, reference = self.load_prediction(), self.load_reference()
        if prediction.shape != reference.shape:
            raise InputError(
                f"case {self.case}: the prediction has shape {prediction.shape} and its reference {reference.shape}",
                "predict on the grid of the reference",
            )
        return prediction, reference, placed

    def with_metrics(self, metrics: dict[str, Metrics]) -> CaseMetrics:
        """Return the record of this pair and its metrics."""
        return CaseMetrics(
            case=self.case, prediction_file=self.prediction_file, reference_file=self.reference_file, metrics=metrics
        )


class CaseMetrics(Record):
    """Metrics of one case by name of the class."""

    case: str
    prediction_file: str
    reference_file: str
    metrics: dict[str, Metrics] = Field(validation_alias=AliasChoices("metrics", "scores"))  # its old name

    @property
    def mean_dice(self) -> float | None:
        """Mean over the classes that have a Dice here; None if none has."""
        dice = [one.dice for one in self.metrics.values() if one.dice is not None]
        return math.fsum(dice) / len(dice) if dice else None


class MeanMetrics(Record):
    """Means of `Metrics` over cases or classes; None where no value exists."""

    tp: float | None
    fp: float | None
    fn: float | None
    tn: float | None
    n_pred: float | None
    n_ref: float | None
    dice: float | None
    iou: float | None


class Summary(Document):
    """Metrics of a set of cases.

    `mean` has one entry per class: the mean over the cases that have a value. `foreground_mean` follows
    nnU-Net: the plain mean over the classes, so its Dice is None (NaN there) as soon as one class has a value
    in no case. `mean_dice` is the mean over the classes that have a value; segfit selects by it.
    `warnings` say what to know about the comparison.
    """

    SHARED = True
    classes: tuple[LabelClass, ...] = Field(validation_alias=AliasChoices("classes", "targets"))  # its old name
    cases: tuple[CaseMetrics, ...]
    mean: dict[str, MeanMetrics]
    foreground_mean: MeanMetrics
    mean_dice: float | None
    warnings: tuple[Warned, ...] = ()

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {dice(one.dice)}" for name, one in self.mean.items())
        return f"Summary({count(len(self.cases), 'case')}, mean Dice {dice(self.mean_dice)}: {means})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        names = list(self.mean)
        rows = [("mean", *(dice(one.dice) for one in self.mean.values()))]
        rows += [(case.case, *(dice(case.metrics[name].dice) for name in names)) for case in self.cases]
        title = f"{count(len(self.cases), 'case')}, mean Dice {dice(self.mean_dice)}"
        return html_table(title, ("Dice", *names), rows, [str(item) for item in self.warnings])

    def subset(self, case_ids: Iterable[str]) -> Summary:
        """Return the summary of some of the cases, for example of one fold."""
        wanted = set(case_ids)
        return summarize([case for case in self.cases if case.case in wanted], self.classes)

    def to_nnunet(self) -> dict[str, Any]:
        """Return the content of nnU-Net's ``summary.json``: keys sorted, NaN for missing values."""
        keys = {class_.name: _class_key(class_) for class_ in self.classes}
        mean = {keys[name]: _nnunet_values(one) for name, one in self.mean.items()}
        cases = [
            {
                "metrics": dict(sorted((keys[name], _nnunet_values(one)) for name, one in case.metrics.items())),
                "prediction_file": case.prediction_file,
                "reference_file": case.reference_file,
            }
            for case in self.cases
        ]
        return {
            "foreground_mean": _nnunet_values(self.foreground_mean),
            "mean": dict(sorted(mean.items())),
            "metric_per_case": cases,
        }


def summarize(cases: Sequence[CaseMetrics], classes: Sequence[LabelClass]) -> Summary:
    """Summarise cases, which keep their order; raise `InputError` if there are none."""
    if not cases:
        raise InputError("there is no case to summarise")
    twice = [case for case, count in Counter(item.case for item in cases).items() if count > 1]
    if twice:
        raise InputError(f"{listing(sorted(twice))} occurs twice", "every case may be evaluated once")
    mean = {class_.name: _mean([case.metrics[class_.name] for case in cases]) for class_ in classes}
    dice = [one.dice for one in mean.values() if one.dice is not None]
    return Summary(
        classes=tuple(classes),
        cases=tuple(cases),
        mean=mean,
        foreground_mean=_mean(list(mean.values()), skip_missing=False),
        mean_dice=float(np.mean(dice)) if dice else None,
    )


def evaluate(pairs: Sequence[Pair], scheme: LabelScheme, *, execution: Execution = LOCAL) -> Summary:
    """Evaluate every pair, in parallel over cases; the summary lists them in the order of `pairs`.

    Raises `DatasetError` naming every case whose label maps cannot be compared. Values that were not declared count as
    no class, and a warning says where they are, as of files that do not lie alike in space.
    """
    kept = KeptWarnings(execution.progress)
    results = replace(execution, progress=kept).map(
        partial(_evaluate_pair, scheme),
        pairs,
        description="evaluating",
        name=lambda pair: pair.case,
        size=Pair.predicted_bytes,
    )
    found = {pair.case: one for pair, one in results}
    problems = [found[pair.case].problem for pair in pairs]
    if any(problems):
        raise DatasetError([problem for problem in problems if problem is not None], "nothing was evaluated")
    for role in ("prediction", "reference"):
        strange = {case: one.undeclared[role] for case, one in sorted(found.items()) if role in one.undeclared}
        if strange:
            values = sorted({value for those in strange.values() for value in those})
            named = f" ({listing([str(value) for value in values])})" if values else ""
            problem = f"the {role} of {listing(list(strange))} has undeclared values{named}, which are ignored"
            action = "change them in the files to the values that dataset.json declares, if they are classes"
            kept.warn(warning("undeclared_values", problem, action))
    for placed, words in _TOLD.items():
        if cases := sorted(case for case, one in found.items() if one.placed == placed):
            kept.warn(warning(placed, words.format(listing(cases))))
    summary = summarize([pair.with_metrics(found[pair.case].metrics) for pair in pairs], scheme.classes)
    return summary.model_copy(update={"warnings": tuple(kept.warnings)})


@dataclass(frozen=True, slots=True)
class _Evaluated:
    """Metrics of a pair, and the values that no class has by which of the two holds them; or why there are none."""

    metrics: dict[str, Metrics]
    undeclared: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    placed: _Placed = "alike"
    problem: Problem | None = None


def _evaluate_pair(scheme: LabelScheme, pair: Pair) -> _Evaluated:
    try:
        prediction, reference, placed = pair.compared()
        counts = joint_histogram(prediction, reference, scheme)
    except InputError as error:
        return _Evaluated({}, problem=problem_of(pair.case, error))
    undeclared: dict[str, tuple[int, ...]] = {}
    if counts[:, -1].any():
        undeclared["prediction"] = _undeclared(pair.load_prediction, prediction, scheme)
    if counts[-1].any():
        undeclared["reference"] = _undeclared(pair.load_reference, reference, scheme)
    return _Evaluated(metrics_from_histogram(counts, scheme.classes), undeclared, placed)


def _undeclared(load: object, inner: NDArray[Any], scheme: LabelScheme) -> tuple[int, ...]:
    """Return the values of a label map that are not declared, as stored; none where only inner ones are known."""
    if isinstance(load, _File):
        return tuple(sorted(set(count_values(read_label(load.path).array)) - set(scheme.stored_values)))
    return tuple(sorted(set(count_values(inner)) - set(scheme.stored_values))) if scheme.stored is None else ()


def evaluate_folder(
    predictions: Path | str,
    references: Path | str,
    scheme: LabelScheme,
    *,
    ending: str,
    require_all: bool = True,
    execution: Execution = LOCAL,
) -> Summary:
    """Evaluate every label file of a folder against the file of the same name in another folder.

    Parameters
    ----------
    predictions, references : folders of label files
    ending : file ending of both, with the leading dot; a folder without such files may have label files with another
        ending that is known; hidden files are ignored
    require_all : whether every reference must have a prediction

    Pairs are compared in space: predictions that store the same volume in another order of axes are turned, and told.
    Raises `InputError` if nothing is there, naming the files that lack their counterpart, or the cases whose label maps
    differ in shape or lie apart. Where a file does not say where it lies, voxels are compared by index; voxel sizes
    that differ are then a warning.
    """
    kept = KeptWarnings(execution.progress)
    predicted, expected = _files(Path(predictions), ending), _files(Path(references), ending)
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
        problem = f"{listing(missing)} of {len(expected)} references have no prediction and are not counted"
        kept.warn(warning("no_prediction", problem))
    pairs = [Pair.of_files(name, predicted[name], expected[name], scheme) for name in sorted(predicted)]
    summary = evaluate(pairs, scheme, execution=replace(execution, progress=kept))
    return summary.model_copy(update={"warnings": tuple(kept.warnings)})


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


def _apart(reference: Grid, prediction: Grid) -> bool:
    """Whether voxels of equal index lie apart, as far as both say where they lie; other shapes are told elsewhere."""
    placed = reference.affine is not None and prediction.affine is not None
    return placed and reference.shape == prediction.shape and bool(reference.mismatch(prediction))


def _mean(items: Sequence[Metrics | MeanMetrics], *, skip_missing: bool = True) -> MeanMetrics:
    """Average each value over those that exist; without `skip_missing` one missing value makes the mean missing."""
    means: dict[str, float | None] = {}
    for key in _NNUNET_KEYS:
        values = [getattr(item, key) for item in items]
        present = [value for value in values if value is not None]
        complete = len(present) == len(values)
        means[key] = float(np.mean(present)) if present and (skip_missing or complete) else None
    return MeanMetrics(**means)


def _nnunet_values(metrics: Metrics | MeanMetrics) -> dict[str, float]:
    values = {name: getattr(metrics, key) for key, name in _NNUNET_KEYS.items()}
    return {name: math.nan if value is None else value for name, value in values.items()}


def _class_key(class_: LabelClass) -> str:
    """Return nnU-Net's key: the value of a label, the text of a Python tuple for a region."""
    return str(class_.values[0]) if len(class_.values) == 1 else str(class_.values)
