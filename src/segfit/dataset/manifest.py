"""A dataset as segfit sees it: cases with their files, channels and labels. Nothing is copied or renamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from segfit.errors import Problem
from segfit.files import Record
from segfit.images.formats import known_ending
from segfit.labels import LabelScheme
from segfit.options import DatasetOptions, LabelUse
from segfit.text import count, listing

__all__ = ["Case", "Dataset", "Mask", "by_number"]


class Mask(Record):
    """A label file of one class: it is where the file is not 0, or where a layer of it has a value."""

    path: Path
    value: int  # inner label value of the class
    layer: int = 0
    label: int | None = None  # as stored; None: all but 0


class Case(Record):
    """One case: the files of its channels, by name in channel order, and, if there is one, its annotation.

    A file that holds all channels stands under each of their names, a channel without a file under its name as None.
    Names are numbers from 0 where nobody has told them: of files given as `images` instead, and of files that hold
    several channels beside others (`Dataset.named`).

    The annotation is one label file, or one mask per class: those are merged in their order, later ones over earlier.
    What `segfit.dataset.annotation.read_labels` makes of them is what all stages see.

    Cases of one `group` (a patient, a specimen) belong together when the data are split; `site` says where a case
    comes from; `weight` says how often it is drawn in training, relative to the others. `spacing_mm` is the voxel size
    where it is known from a table, one number for all axes or one per axis in array order: all who read the files of a
    case pass it on (`segfit.images.formats.read_image`).
    """

    id: str
    channels: dict[str, Path | None]
    label: Path | None = None
    masks: tuple[Mask, ...] = ()
    group: str | None = None
    site: str | None = None
    weight: float = Field(1.0, ge=0)
    spacing_mm: tuple[float, ...] | None = None
    resample_label: bool = False  # onto the grid of the image, where it lies on another
    label_use: LabelUse = "classes"

    @model_validator(mode="before")
    @classmethod
    def _numbered(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "images" not in given:
            return given
        rest = {name: value for name, value in given.items() if name != "images"}
        return {"channels": by_number(dict(enumerate(given["images"]))), **rest}

    @property
    def images(self) -> tuple[Path, ...]:
        """The image files that are there, in channel order, each once."""
        return tuple(dict.fromkeys(path for path in self.channels.values() if path is not None))

    @property
    def numbers_objects(self) -> bool:
        """Whether the annotation counts as numbers of objects, of which classes are made when it is read."""
        return self.label_use.startswith("objects")

    @property
    def label_files(self) -> tuple[Path, ...]:
        """The files of the annotation; none in a case without."""
        return tuple(dict.fromkeys(mask.path for mask in self.masks)) if self.label is None else (self.label,)


def by_number(files: Mapping[int, Path], expected: int = 0) -> dict[str, Path | None]:
    """Return `Case.channels` of files with channel numbers; None for those of the `expected` that are not there."""
    return {str(number): files.get(number) for number in sorted({*range(expected), *files})}


class Dataset(Record):
    """A dataset that was understood; `segfit.dataset.layouts.open_dataset` makes it."""

    name: str
    root: Path  # what `open_dataset` opens again: the folder, or the table
    layout: str  # a key of `segfit.dataset.layouts.LAYOUTS`
    channel_names: tuple[str, ...]
    labels: LabelScheme
    file_ending: str  # of labels, with the leading dot
    num_training: int
    training: tuple[Case, ...]
    test: tuple[Case, ...] = ()  # labels are None where the dataset has none
    problems: tuple[Problem, ...] = ()  # of its structure, as it was understood
    groups_from_names: bool = False  # groups of training cases are what their names say

    def __repr__(self) -> str:
        cases = f"{count(len(self.training), 'training case')}, {count(len(self.test), 'test case')}"
        classes = listing([one.name for one in self.labels.classes])
        return f"Dataset({self.name!r}, {self.layout}: {cases}; {' + '.join(self.channel_names)} to {classes})"

    __str__ = __repr__

    @property
    def image_ending(self) -> str:
        """Ending of most training images, `segfit.images.formats.FOLDER` for DICOM series."""
        endings = (known_ending(path) for case in self.training for path in case.images)
        found = Counter(ending for ending in endings if ending)  # the check tells of others
        return found.most_common(1)[0][0] if found else self.file_ending

    def named(self) -> Dataset:
        """Return the dataset with the channels of its cases under their names, as far as these can be told."""

        def named(case: Case) -> Case:
            files = list(case.channels.values())
            if len(files) == 1:
                files *= len(self.channel_names)
            if len(files) != len(self.channel_names):
                return case
            return case.model_copy(update={"channels": dict(zip(self.channel_names, files, strict=True))})

        changes = {"training": tuple(map(named, self.training)), "test": tuple(map(named, self.test))}
        return self.model_copy(update=changes)

    def taken(self, options: DatasetOptions) -> Dataset:
        """Return the dataset as it was opened with its labels taken as the options say.

        Where they number objects, masks of a case are its objects. Raises `InputError` as `LabelScheme.of_objects`.
        """
        update: dict[str, Any] = {"resample_label": options.resample_labels, "label_use": options.labels}

        def taken(case: Case) -> Case:
            case = case.model_copy(update=update)
            masks = tuple(mask.model_copy(update={"value": number}) for number, mask in enumerate(case.masks, 1))
            return case.model_copy(update={"masks": masks}) if case.numbers_objects else case

        changes: dict[str, Any] = {"training": tuple(map(taken, self.training)), "test": tuple(map(taken, self.test))}
        if options.labels.startswith("objects"):
            changes["labels"] = self.labels.of_objects(boundary=options.labels == "objects-as-boundary")
        return self.model_copy(update=changes)

    def in_groups(self, groups: Mapping[str, str]) -> Dataset:
        """Return the dataset with groups of training cases, by case id; cases that are not named keep theirs."""
        training = tuple(case.model_copy(update={"group": groups.get(case.id, case.group)}) for case in self.training)
        return self.model_copy(update={"training": training})

    @property
    def folder(self) -> Path:
        """The folder that it is in."""
        return self.root if self.root.is_dir() else self.root.parent

    def weights(self, names: Sequence[str]) -> list[float] | None:
        """Return how often training cases are drawn, relative to each other; None where all are drawn alike."""
        weights = [case.weight for case in self.cases(names)]
        return None if len(set(weights)) == 1 and weights[0] else weights

    def cases(self, names: Iterable[str]) -> list[Case]:
        """Return training cases by their ids, in one pass; raise KeyError for one that is not there."""
        known = {case.id: case for case in self.training}
        return [known[name] for name in names]

    def case(self, case_id: str) -> Case:
        """Return a training case by its id; raise KeyError if there is none."""
        for case in self.training:
            if case.id == case_id:
                return case
        raise KeyError(case_id)
