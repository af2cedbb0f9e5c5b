"""Small fingerprints for tests of the planner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from segfit.fingerprint.fingerprint import CaseFingerprint, ChannelIntensities, Fingerprint
from segfit.labels import LabelScheme
from segfit.specs import IntensityStatistics

STATISTICS = IntensityStatistics(mean=50, median=45, std=20, min=-10, max=200, percentile_00_5=-5, percentile_99_5=150)


def scheme(*names: str) -> LabelScheme:
    """Return labels 1, 2... with these names."""
    return LabelScheme.from_declaration({"background": 0, **{name: i + 1 for i, name in enumerate(names)}})


def case(
    shape: Sequence[int],
    spacing: Sequence[float],
    *,
    name: str = "case",
    voxels: Mapping[int, int] | None = None,
    centroids: Mapping[int, tuple[float, ...]] | None = None,
    channels: Sequence[ChannelIntensities] = (),
) -> CaseFingerprint:
    return CaseFingerprint(
        case=name,
        content="",
        shape=tuple(shape),
        spacing_mm=tuple(spacing),
        shape_after_crop=tuple(shape),
        relative_size_after_crop=1.0,
        label_voxels=dict(voxels or {}),
        label_centroids=dict(centroids or {}),
        channels=tuple(channels),
    )


def fingerprint(
    cases: Sequence[CaseFingerprint],
    *,
    orientation: Literal["canonical", "stored"] = "stored",
    channels: Sequence[str] = ("MRI",),
    num_training: int | None = None,
    relative_size: float = 1.0,
) -> Fingerprint:
    return Fingerprint(
        dataset="Dataset001_Test",
        ndim=3 if len(cases[0].shape) == 3 else 2,
        orientation=orientation,
        channel_names=tuple(channels),
        num_training=num_training or len(cases),
        cases=tuple(cases),
        median_relative_size_after_crop=relative_size,
        intensities=(STATISTICS,) * len(channels),
    )
