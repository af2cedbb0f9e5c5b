"""Two label maps to compare: where they come from, and what is read of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from numpy.typing import NDArray

from segfit.dataset.annotation import read_labels
from segfit.dataset.manifest import Case
from segfit.dataset.object_numbers import as_classes
from segfit.errors import InputError
from segfit.evaluation.measures import Sizes
from segfit.evaluation.metrics import Metrics
from segfit.evaluation.summary import CaseMetrics
from segfit.geometry import Grid
from segfit.images.formats import num_voxels, read_grid, read_label
from segfit.images.image import FileError, Image
from segfit.labels import LabelScheme
from segfit.options import LabelUse

__all__ = ["LabelFile", "Pair", "Placed", "Stored", "predicted_bytes"]

Placed = Literal["alike", "axes_turned", "compared_by_index"]
_BYTES_PER_VOXEL = 8  # of a label map that is read and compared with another


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
class LabelFile:
    """Loads the label map of a file; without `scheme` its values are taken as inner ones."""

    path: Path
    scheme: LabelScheme | None
    label_use: LabelUse = "classes"

    def __call__(self) -> NDArray[Any]:
        """Return the inner label values, (*spatial)."""
        return self.inner(read_label(self.path))

    def inner(self, image: Image) -> NDArray[Any]:
        """Return the inner label values of what was read."""
        labels: NDArray[Any] = image.array
        if self.scheme is not None:
            boundary = self.label_use == "objects-as-boundary"
            numbered = self.label_use.startswith("objects")
            labels = as_classes(labels, self.scheme, boundary=boundary) if numbered else self.scheme.to_inner(labels)
        inner: NDArray[Any] = labels[0]
        return inner

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
    spacing_mm : voxel size of files that do not say it
    """

    case: str
    load_prediction: Callable[[], NDArray[Any]]
    load_reference: Callable[[], NDArray[Any]]
    prediction_file: str = ""
    reference_file: str = ""
    spacing_mm: tuple[float, ...] | None = None

    @classmethod
    def of_files(
        cls,
        case: str,
        prediction: Path,
        reference: Path,
        scheme: LabelScheme | None = None,
        label_use: LabelUse = "classes",
        spacing_mm: tuple[float, ...] | None = None,
    ) -> Pair:
        """Return the pair of two label files; without `scheme` their values are taken as inner ones.

        They are compared in space: a prediction that stores its axes in another order is turned. `label_use` says what
        the values of the reference are; where they number objects, the prediction has the classes made of them.
        """
        return cls(
            case,
            LabelFile(prediction, scheme),
            LabelFile(reference, scheme, label_use),
            prediction.as_posix(),
            reference.as_posix(),
            spacing_mm,
        )

    @classmethod
    def of_case(cls, case: Case, prediction: Path, scheme: LabelScheme, reference: Stored | None = None) -> Pair:
        """Return the pair of a label file that was predicted on the grid of a case and the annotation of the case.

        `reference` loads the annotation where it is kept elsewhere than in the files of the case.
        """
        return cls(
            case.id,
            LabelFile(prediction, scheme),
            reference or _Annotation(case, scheme, prediction),
            prediction.as_posix(),
            ", ".join(path.as_posix() for path in case.label_files),
            case.spacing_mm,
        )

    def predicted_bytes(self) -> int:
        """Return the memory that evaluating takes, about; 0 for label maps that cannot leave this process."""
        return predicted_bytes((self.load_prediction, self.load_reference))

    def load(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return prediction and reference; raise `InputError` naming the case if their shapes differ."""
        prediction, reference, _ = self.compared()
        return prediction, reference

    def compared(self) -> tuple[NDArray[Any], NDArray[Any], Placed]:
        """Return what `load` does, and how two files lie in space: `FileError` where they lie apart."""
        placed: Placed = "alike"
        if isinstance(self.load_prediction, LabelFile) and isinstance(self.load_reference, LabelFile):
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

    def sizes(self, shape: tuple[int, ...]) -> Sizes:
        """Return the voxel size of label maps of a shape, as the file of one of them or a table says it."""
        files = [load.path for load in (self.load_reference, self.load_prediction) if isinstance(load, LabelFile)]
        grids = [grid for path in files if (grid := read_grid(path, self.spacing_mm)).shape == shape]
        known = [grid.spacing_mm for grid in grids if grid.spacing_known]
        return Sizes(spacing=known[0]) if known else Sizes.unknown(shape)

    def with_metrics(self, metrics: dict[str, Metrics]) -> CaseMetrics:
        """Return the record of this pair and its metrics."""
        return CaseMetrics(
            case=self.case, prediction_file=self.prediction_file, reference_file=self.reference_file, metrics=metrics
        )


def _apart(reference: Grid, prediction: Grid) -> bool:
    """Whether voxels of equal index lie apart, as far as both say where they lie; other shapes are told elsewhere."""
    placed = reference.affine is not None and prediction.affine is not None
    return placed and reference.shape == prediction.shape and bool(reference.mismatch(prediction))
