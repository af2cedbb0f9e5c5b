"""Dice plus cross-entropy, for exclusive labels and for overlapping regions, with deep supervision.

Formulas are those of nnU-Net 2.8.1: both terms weigh 1, Dice is soft, smoothed by 1e-5 and without background
for labels. Everything is computed in float32 whatever the logits come in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from segfit.labels import LabelScheme
from segfit.networks.outputs import class_masks
from segfit.training.batch import Batch

__all__ = ["SegmentationLoss", "deep_supervision_weights", "shrink_target"]

_SMOOTH = 1e-5
_TINY = 1e-8


class SegmentationLoss:
    """The training loss of one configuration.

    Parameters
    ----------
    scheme : what the labels mean; decides between softmax (labels) and sigmoid (regions), and what is ignored
    batch_dice : pool the Dice sums over the batch
    strides : of the network, one entry per stage

    Attributes
    ----------
    weights : of the outputs with deep supervision, full resolution first, sum 1; outputs with weight 0 are left out
    num_heads : outputs worth computing; set `UNet.num_heads` to it
    """

    def __init__(self, scheme: LabelScheme, batch_dice: bool, strides: Sequence[Sequence[int]]) -> None:
        self.scheme = scheme
        self.batch_dice = batch_dice
        self.weights = tuple(weight for weight in deep_supervision_weights(len(strides) - 1) if weight > 0)

    @property
    def num_heads(self) -> int:
        """Outputs with a weight, counted from full resolution."""
        return len(self.weights)

    def __call__(self, outputs: Tensor | Sequence[Tensor], batch: Batch) -> Tensor:
        """Return the scalar loss of logits `(b, num_outputs, *spatial)` for a batch: its labels `(b, 1, *spatial)`.

        With a list of outputs (full resolution first) the weighted sum over them; those with weight 0 are left out.
        """
        if isinstance(outputs, Tensor):
            return self._single(outputs, batch.labels)
        losses = [
            weight * self._single(output, shrink_target(batch.labels, output.shape[2:]))
            for weight, output in zip(self.weights, outputs, strict=False)
        ]
        assert len(losses) == len(self.weights), "an output with a weight is missing"
        return torch.stack(losses).sum()

    def _single(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return self._regions(logits, target) if self.scheme.has_regions else self._labels(logits, target)

    def _labels(self, logits: Tensor, target: Tensor) -> Tensor:
        """Softmax Dice without background, plus cross-entropy over the annotated voxels."""
        ignore = self.scheme.ignore_value
        valid = None if ignore is None else target != ignore
        log_shares = F.log_softmax(logits, dim=1)
        entropy = F.nll_loss(
            log_shares, target[:, 0].long(), reduction="sum", ignore_index=-100 if ignore is None else ignore
        )
        voxels = target.numel() if valid is None else valid.sum().clamp(min=1)
        truth = class_masks(target, self.scheme)
        return entropy / voxels + self._dice_loss(log_shares[:, 1:].exp(), truth, valid)

    def _regions(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sigmoid Dice of all regions, plus binary cross-entropy.

        As in nnU-Net, the binary cross-entropy is a mean over voxels and regions without an ignore label, and a
        sum over regions divided by the annotated voxels with one.
        """
        truth = class_masks(target, self.scheme)
        if self.scheme.ignore_value is None:
            entropy = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype))
            return entropy + self._dice_loss(logits.sigmoid(), truth, None)
        valid = target != self.scheme.ignore_value
        entropies = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none")
        entropy = (entropies * valid).sum() / valid.sum().clamp(min=_TINY)
        return entropy + self._dice_loss(logits.sigmoid(), truth, valid)

    def _dice_loss(self, shares: Tensor, truth: Tensor, valid: Tensor | None) -> Tensor:
        """Return minus the mean soft Dice of `(b, k, *spatial)`; `valid` (b, 1, *spatial) says what counts."""
        space = tuple(range(2, shares.ndim))
        common = torch.where(truth, shares, 0.0).sum(space)
        predicted = (shares if valid is None else torch.where(valid, shares, 0.0)).sum(space)
        true = truth.sum(space)
        if self.batch_dice:
            common, predicted, true = common.sum(0), predicted.sum(0), true.sum(0)
        return -((2 * common + _SMOOTH) / (predicted + true + _SMOOTH).clamp(min=_TINY)).mean()


def deep_supervision_weights(levels: int) -> tuple[float, ...]:
    """Return the weights of the outputs, full resolution first: halved per level, the lowest 0, sum 1.

    A network with a single level (two stages) gets weight 1; nnU-Net divides 0 by 0 there.
    """
    if levels == 1:
        return (1.0,)
    raw = [0.5**level for level in range(levels - 1)]
    return (*(value / sum(raw) for value in raw), 0.0)


def shrink_target(target: Tensor, size: Sequence[int]) -> Tensor:
    """Return labels `(b, 1, *spatial)` at a lower resolution, nearest neighbour with half-voxel centres, as a view.

    Every size must divide the target's, as the outputs of a network do.
    """
    for axis, (full, part) in enumerate(zip(target.shape[2:], size, strict=True), start=2):
        step = full // part
        assert step * part == full, "the size of an output divides the size of the patch"
        target = target[(slice(None),) * axis + (slice(step // 2, None, step),)]
    return target
