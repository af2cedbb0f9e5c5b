"""Labels of some cases, to see what of them is left on a coarser grid."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from segfit.project.preparation import Preparation
from segfit.specs import Configuration

__all__ = ["sampled_labels"]

_CASES = 3
_MOST_VOXELS = 2**19  # of a case; larger ones are cut


def sampled_labels(project: Preparation, configuration: Configuration) -> list[NDArray[np.int16]]:
    """Return labels of some cases at the spacing of a configuration, preprocessed if need be."""
    cases = project.dataset.training
    some = cases[:: max(1, len(cases) // _CASES)][:_CASES]
    keys = project.preprocessed(configuration, some)
    arrays = [project.stored(key).labels() for key in keys.values()]
    return [_cut(array) for array in arrays if array is not None]


def _cut(labels: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return the middle of an array, of at most `_MOST_VOXELS`."""
    share = min(1.0, (_MOST_VOXELS / labels.size) ** (1 / labels.ndim))
    sizes = [max(1, int(n * share)) for n in labels.shape]
    starts = [(n - size) // 2 for n, size in zip(labels.shape, sizes, strict=True)]
    return labels[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
