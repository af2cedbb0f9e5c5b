"""Measure the dataset: shapes, spacings, labels and foreground intensities (spec: planning, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from segfit.cropping import bounding_box, slices
from segfit.dataset.annotation import as_seen, count_values, read_labels
from segfit.dataset.case_checks import CaseVoxels, Look
from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case, Dataset
from segfit.errors import InputError
from segfit.execution.execution import LOCAL, Execution
from segfit.files import content_hash, read_arrays, write_arrays
from segfit.fingerprint.appearance import measure_image, oriented_crop
from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint, Orientation
from segfit.fingerprint.intensities import ChannelDistribution, Mixture
from segfit.images.formats import num_voxels, read_case, stacked
from segfit.images.image import Image
from segfit.labels import LabelScheme
from segfit.text import count

__all__ = ["look_to_measure", "measure"]

_SLAB = 1 << 20  # voxels looked at a time where work would need much memory at once
_BYTES_PER_VOXEL = 16  # of a channel: four arrays of 32 bits, that measuring holds at its peak
_VERSION = 4  # of what is measured; a change makes cached measurements stale


@dataclass(frozen=True, slots=True)
class _Declared:
    """What a dataset says of all its cases, and how and where they are measured."""

    channels: int
    labels: LabelScheme
    orientation: Orientation
    cache: Path | None

    @classmethod
    def of(cls, dataset: Dataset, orientation: Orientation, cache: Path | None) -> _Declared:
        return cls(len(dataset.channel_names), dataset.labels, orientation, cache)

    @property
    def values(self) -> tuple[int, ...]:
        """Every label value, the ignore label included."""
        scheme = self.labels
        return scheme.all_values if scheme.ignore_value is None else (*scheme.all_values, scheme.ignore_value)

    def remembered(self, case: Case, content: str) -> Path | None:
        """Where the case with this content of its files is remembered; None where nothing is."""
        if self.cache is None:
            return None
        meaning = [self.channels, self.values, self.labels.foreground_values, self.labels.stored]
        return self.cache / f"{content_hash([_VERSION, case.id, content, self.orientation, meaning])}.npz"

    def predicted_bytes(self, case: Case, hashes: FileHashes) -> int:
        """Return the memory that measuring a case takes, about; 1 where it is remembered."""
        path = self.remembered(case, hashes.case(case)) if self.cache is not None else None
        if path is not None and path.exists():
            return 1
        return num_voxels(case.images[0]) * self.channels * _BYTES_PER_VOXEL


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    record: CaseFingerprint
    channels: tuple[ChannelDistribution, ...]  # none in a case without foreground


def measure(
    dataset: Dataset,
    orientation: Orientation,
    *,
    execution: Execution = LOCAL,
    cache: Path | None = None,
    hashes: FileHashes | None = None,
) -> Fingerprint:
    """Measure every training case; the result does not depend on the number of workers.

    Parameters
    ----------
    cache : folder that remembers each case by the content of its files, so that only new and changed cases are read
    hashes : what is known of the contents of files, and what is found out about them

    Foreground is every label above 0, the ignore label included, as in nnU-Net. Raises `InputError` for
    unreadable files, cases whose axes or channels differ from the dataset's, and a dataset without any foreground.
    """
    if not dataset.training:
        raise InputError(f"dataset {dataset.name} has no training case", "add images and labels")
    hashes = hashes or FileHashes()
    declared = _Declared.of(dataset, orientation, cache)
    records: list[CaseFingerprint] = []
    mixtures = tuple(Mixture() for _ in dataset.channel_names)
    early: dict[str, _Measured] = {}  # measured before a case in front of them
    for (case, _), (measured, found) in execution.map(
        partial(_measure_or_recall, declared),
        [(case, hashes.of(case)) for case in dataset.training],
        description="fingerprint",
        name=lambda item: item[0].id,
        size=lambda item: declared.predicted_bytes(item[0], hashes),
    ):
        hashes.learn(found)
        early[case.id] = measured
        for following in dataset.training[len(records) :]:  # sums are formed in dataset order
            if following.id not in early:
                break
            ready = early.pop(following.id)
            records.append(ready.record)
            if ready.channels:
                for mixture, channel in zip(mixtures, ready.channels, strict=True):
                    mixture.add(channel)
    hashes.save()
    ndim = len(records[0].shape)
    odd = [record.case for record in records if len(record.shape) != ndim]
    if odd:
        raise InputError(f"case {odd[0]} does not have {ndim} axes like {records[0].case}", "remove one")
    if not len(mixtures[0]):
        raise InputError(f"dataset {dataset.name}: no case has a label above 0", "label at least one class")
    return Fingerprint(
        dataset=dataset.name,
        ndim=3 if ndim == 3 else 2,
        orientation=orientation,
        channel_names=dataset.channel_names,
        num_training=dataset.num_training,
        cases=tuple(records),
        median_relative_size_after_crop=float(np.median([record.relative_size_after_crop for record in records])),
        intensities=tuple(mixture.statistics() for mixture in mixtures),
    )


def look_to_measure(dataset: Dataset, orientation: Orientation, cache: Path) -> Look:
    """Return what measures the training cases while they are checked: `measure` finds them in its cache."""
    declared = _Declared.of(dataset, orientation, cache)
    return Look(partial(_measure_read, declared), (declared.channels + 1) * _BYTES_PER_VOXEL)


def _measure_read(declared: _Declared, found: CaseVoxels) -> None:
    path = declared.remembered(found.case, found.content)
    if path is not None and not path.exists():
        image = stacked(found.case.images, found.images)
        label = as_seen(found.case, declared.labels, found.label, image.grid)
        _remember(path, _measure_case(found.case, found.content, declared, image, label))


def _measure_or_recall(declared: _Declared, item: tuple[Case, FileHashes]) -> tuple[_Measured, FileHashes]:
    """Return what a case is like, and the hashes of its files."""
    case, hashes = item
    content = hashes.case(case)
    path = declared.remembered(case, content)
    measured = None if path is None else _recall(path, content)
    if measured is None:
        if not case.label_files:
            raise InputError(f"case {case.id} has no label", "add it or move the images to the test cases")
        image = read_case(case.images, case.spacing_mm)
        label = read_labels(case, declared.labels, image.grid)
        hashes.require(case, content)
        measured = _measure_case(case, content, declared, image, label)
        if path is not None:
            _remember(path, measured)
    return measured, hashes


def _measure_case(case: Case, content: str, declared: _Declared, image: Image, label: Image) -> _Measured:
    if image.array.shape[0] != declared.channels:
        raise InputError(
            f"case {case.id} has {count(image.array.shape[0], 'channel')}, the dataset declares {declared.channels}"
        )
    extremes = [(float(channel.min()), float(channel.max())) for channel in image.array]
    if not np.isfinite(extremes).all():
        raise InputError(f"case {case.id} contains NaN or infinite values", "replace them in the image file")
    if label.grid.shape != image.grid.shape:
        raise InputError(f"case {case.id}: the label has shape {label.grid.shape}, the image {image.grid.shape}")
    axes, box, voxels = oriented_crop(image, declared.orientation)
    values = axes.apply(label.array)[0][box]
    foreground = values > 0
    found = tuple(ChannelDistribution.of(channel[foreground]) for channel in voxels) if foreground.any() else ()
    facts = measure_image(image, axes, voxels)
    moments = [_moments(channel) for channel in found] or [{} for _ in voxels]
    channels = tuple(one.model_copy(update=more) for one, more in zip(facts.channels, moments, strict=True))
    record = CaseFingerprint(
        case=case.id,
        content=content,
        label_voxels=dict(sorted((dict.fromkeys(declared.values, 0) | count_values(values)).items())),
        label_centroids=_centroids(values, declared.labels.foreground_values),
        **{**dict(facts), "channels": channels},
    )
    return _Measured(record, found)


def _moments(channel: ChannelDistribution) -> dict[str, float]:
    mean, variance = channel.moments[:2]
    return {"foreground_mean": float(mean), "foreground_std": float(np.sqrt(variance))}


def _centroids(labels: NDArray[np.integer[Any]], values: Sequence[int]) -> dict[int, tuple[float, ...]]:
    """Return the centre of mass of every present value as a share of the array's extent per axis."""
    highest = max(values)
    counts, sums = np.zeros(highest + 1), np.zeros((labels.ndim, highest + 1))
    depth = max(1, _SLAB // max(1, labels[0].size))
    for start in range(0, len(labels), depth):
        slab = labels[start : start + depth]
        wanted = (slab > 0) & (slab <= highest)
        box = bounding_box(wanted)
        index = np.nonzero(wanted[slices(box)])
        present = slab[slices(box)][index]
        found = np.bincount(present, minlength=highest + 1)
        counts += found
        for axis, (positions, (low, _)) in enumerate(zip(index, box, strict=True)):
            sums[axis] += np.bincount(present, positions, highest + 1) + found * (low + (start if axis == 0 else 0))
    extent = np.array(labels.shape)
    return {
        value: tuple(((sums[:, value] / counts[value] + 0.5) / extent).tolist()) for value in values if counts[value]
    }


def _remember(path: Path, measured: _Measured) -> None:
    record = np.frombuffer(measured.record.model_dump_json().encode(), dtype=np.uint8)
    arrays: dict[str, Any] = {"record": record}
    for index, channel in enumerate(measured.channels):
        arrays[f"moments_{index}"] = channel.moments
        arrays[f"bins_{index}"] = channel.bins
        arrays[f"counts_{index}"] = channel.counts
    write_arrays(path, arrays)


def _recall(path: Path, content: str) -> _Measured | None:
    """Return a remembered case; None if there is none or it is not legible."""
    arrays = read_arrays(path)
    if arrays is None:
        return None
    try:
        record = CaseFingerprint.model_validate_json(arrays["record"].tobytes())
        channels = tuple(
            ChannelDistribution(arrays[f"moments_{i}"], arrays[f"bins_{i}"], arrays[f"counts_{i}"])
            for i in range(sum(name.startswith("bins_") for name in arrays))
        )
    except (KeyError, ValidationError):
        return None
    return _Measured(record, channels) if record.content == content else None
