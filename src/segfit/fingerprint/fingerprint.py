"""What was measured from the data. Facts only, no decision."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import ClassVar, Literal

from segfit.files import Document, GrownRecord, Record
from segfit.specs import IntensityStatistics
from segfit.text import count

__all__ = ["CaseFingerprint", "ChannelIntensities", "Fingerprint", "ImageFingerprint", "Orientation", "Unit", "unit_of"]

Orientation = Literal["canonical", "stored"]
Unit = Literal["mm", "px"]


class ChannelIntensities(Record):
    """One channel of one case."""

    min: float  # of the whole image
    max: float
    foreground_mean: float | None = None  # None in a case without foreground
    foreground_std: float | None = None
    quantiles: tuple[float, ...] = ()  # of the voxels that are not 0; from 0.5 to 99.5 %


class ImageFingerprint(GrownRecord):
    """One image. Axis order: array order after the fingerprint's orientation; spacing in mm."""

    LATER: ClassVar[frozenset[str]] = frozenset({"sized"})
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    shape_after_crop: tuple[int, ...]
    relative_size_after_crop: float
    channels: tuple[ChannelIntensities, ...] = ()
    layout: tuple[float, ...] = ()  # brightness of the parts of the crop, flat, in deviations from their mean
    sized: bool = True  # whether its file, or a table, says how large its voxels are; else they count as 1 mm


def unit_of(images: Sequence[ImageFingerprint]) -> Unit:
    """Return in what sizes are told: pixels for pictures of which none says how large its pixels are."""
    return "px" if images and not any(image.sized or len(image.shape) > 2 for image in images) else "mm"


class CaseFingerprint(ImageFingerprint):
    """One case: its image and its annotation."""

    case: str
    content: str  # hash of image and label files: the key of the cache
    label_voxels: dict[int, int]  # voxels per label value inside the crop, zero counts included for declared labels
    label_centroids: dict[int, tuple[float, ...]]  # centre of mass per present foreground label, 0..1 of the crop


class Fingerprint(Document):
    """The whole dataset."""

    dataset: str
    ndim: Literal[2, 3]
    orientation: Orientation
    channel_names: tuple[str, ...]
    num_training: int  # declared number of training cases (nnU-Net's batch-size cap uses it)
    cases: tuple[CaseFingerprint, ...]
    median_relative_size_after_crop: float
    intensities: tuple[IntensityStatistics, ...]  # per channel

    def __repr__(self) -> str:
        channels = " + ".join(self.channel_names)
        return f"Fingerprint({self.dataset!r}: {count(len(self.cases), 'case')}, {self.ndim}D, {channels})"

    __str__ = __repr__

    @property
    def values_by_case(self) -> dict[str, list[int]]:
        """The foreground values that occur in every case."""
        return {
            case.case: [value for value, voxels in case.label_voxels.items() if value > 0 and voxels]
            for case in self.cases
        }

    @property
    def unit(self) -> Unit:
        """In what sizes are told, see `unit_of`."""
        return unit_of(self.cases)

    @property
    def typical_spacing(self) -> tuple[float, ...]:
        """The median voxel size of the cases."""
        return tuple(map(median, zip(*(case.spacing_mm for case in self.cases), strict=True)))
