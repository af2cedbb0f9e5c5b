"""The frames of a multi-frame DICOM file as slices: enhanced CT, MR and PET keep a whole volume in one file.

Attributes: DICOM PS3.3, C.7.6.16 (functional groups, shared by all frames or by frame).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segfit.images.image import FileError

__all__ = ["GROUPS", "as_slices", "frame_name"]

GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_FACTS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}
_NO_VOLUMES = ("SEG",)  # modalities whose frames are masks


def as_slices(file: Path, dataset: Any, shared: Sequence[str]) -> list[Any]:
    """Return a data set for each frame that has the attributes of a slice; the one given where it has no groups.

    Parameters
    ----------
    shared : names of the attributes that frames have from their file

    The `whole` of a frame is the data set of its file, its `index` its number from 0.
    """
    groups = dataset.get(GROUPS[1])
    if not groups or dataset.get("Modality") in _NO_VOLUMES:
        return [dataset]
    number = int(dataset.get("NumberOfFrames", 1) or 1)
    if len(groups) != number:
        problem = f"has {number} frames, of which {len(groups)} are described"
        raise FileError(file, problem, "export the series again")
    common = (dataset.get(GROUPS[0]) or [{}])[0]
    slices: list[Any] = []
    for index, group in enumerate(groups):
        one = type(group)()
        one.update({dataset[name].tag: dataset[name] for name in shared if name in dataset})
        for sequence, names in _FACTS.items():
            facts = (group.get(sequence) or common.get(sequence) or [{}])[0]
            one.update({facts[name].tag: facts[name] for name in names if name in facts})
        one.filename, one.whole, one.index = dataset.filename, dataset, index
        slices.append(one)
    return slices


def frame_name(dataset: Any) -> str:
    """Return what a slice is called in messages."""
    index = getattr(dataset, "index", None)
    return Path(dataset.filename).name + ("" if index is None else f" frame {index + 1}")
