"""The plain way back from network arrays to the stored axes, whole arrays at a time, to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.cropping import slices
from segfit.geometry import AxisMap
from segfit.preprocessing.pipeline import CaseProperties


def paste(array: NDArray[Any], properties: CaseProperties, fill: float = 0) -> NDArray[Any]:
    """Put ``(..., *shape_after_crop)`` back into the uncropped frame; outside the crop lies `fill`."""
    lead = array.shape[: array.ndim - len(properties.shape_before_crop)]
    assert array.shape[len(lead) :] == properties.shape_after_crop, (array.shape, properties.shape_after_crop)
    result = np.full((*lead, *properties.shape_before_crop), fill, dtype=array.dtype)
    result[(slice(None),) * len(lead) + slices(properties.crop_box)] = array
    return result


def restore_axes(array: NDArray[Any], properties: CaseProperties) -> NDArray[Any]:
    """Bring ``(..., *shape_before_crop)`` from network axes to the axes of the stored file."""
    transposition = AxisMap(properties.transpose, (False,) * len(properties.transpose))
    orientation = AxisMap(properties.axis_order, properties.axis_flip)
    result = orientation.inverse().apply(transposition.inverse().apply(array))
    assert result.shape[result.ndim - len(properties.stored_shape) :] == properties.stored_shape
    return result
