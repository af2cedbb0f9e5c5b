"""A dataset as segfit sees it: cases with their files, channels and labels. Nothing is copied or renamed."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from segfit.files import Record
from segfit.labels import LabelScheme

__all__ = ["Case", "Dataset"]


class Case(Record):
    """One case: its channel files in channel order and, if there is one, its label file.

    Cases of one `group` (a patient, a specimen) belong together when the data are split; `site` says where a case
    comes from; `weight` says how often it is drawn in training, relative to the others.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    group: str | None = None
    site: str | None = None
    weight: float = Field(1.0, ge=0)


class Dataset(Record):
    """A dataset that was understood; `segfit.dataset.layouts.open_dataset` makes it."""

    name: str
    root: Path
    layout: str  # "nnunet-v2", ...
    channel_names: tuple[str, ...]
    labels: LabelScheme
    file_ending: str  # of images and labels, with the leading dot
    num_training: int
    training: tuple[Case, ...]
    test: tuple[Case, ...] = ()  # labels are None where the dataset has none

    def case(self, case_id: str) -> Case:
        """Return a training case by its id; raise KeyError if there is none."""
        for case in self.training:
            if case.id == case_id:
                return case
        raise KeyError(case_id)
