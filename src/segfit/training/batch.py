"""The patches of one training step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The patches of one step: image (b, c, *sample patch) float32 and labels (b, 1, *sample patch) int16.

    In the second stage of a cascade the labels have a second channel, what the first stage predicted. Where the samples
    that augmentation turns are cut out by themselves, as `whole`, these have the size of the patch; what they hold of
    the turned samples is not looked at.
    """

    image: Tensor
    labels: Tensor
    step: int = 0
    cases: tuple[str, ...] = ()  # id of the case of every sample, of other processes' too
    whole: tuple[Tensor, Tensor] | None = None  # image and labels of the turned samples, of the sample patch
