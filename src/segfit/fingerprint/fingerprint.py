"""What was measured from the data. Facts only, no decision."""

from __future__ import annotations

from statistics import median
from typing import Literal

from segfit.files import Document, Record
from segfit.specs import IntensityStatistics
from segfit.words import count

__all__ = ["CaseFingerprint", "ChannelIntensities", "Fingerprint", "ImageFingerprint", "Orientation"]

Orientation = Literal["canonical", "stored"]


class ChannelIntensities(Record):
    """One channel of one case."""

    min: float  # of the whole image
    max: float
    foreground_mean: float | None = None  # None in a case without foreground
    foreground_std: float | None = None
    quantiles: tuple[float, ...] = ()  # of the voxels that are not 0; from 0.5 to 99.5 %


class ImageFingerprint(Record):
    """One image. Axis order: array order after the fingerprint's orientation; spacing in mm."""

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    shape_after_crop: tuple[int, ...]
    relative_size_after_crop: float
    channels: tuple[ChannelIntensities, ...] = ()
    layout: tuple[float, ...] = ()  # brightness of the parts of the crop, flat, in deviations from their mean


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
    def typical_spacing(self) -> tuple[float, ...]:
        """The median voxel size of the cases."""
        return tuple(map(median, zip(*(case.spacing_mm for case in self.cases), strict=True)))
