"""The loss: a sum of terms, for exclusive labels and for overlapping regions, with deep supervision.

Dice, cross-entropy and its worst share (top-k) are those of nnU-Net 2.8.1; docs/decisions/losses.md says where the
others come from. Every term weighs 1. Everything is computed in float32 whatever the logits come in. Where several
processes share a batch each of them gets the loss of all of it, and derives its part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from segfit.errors import InputError
from segfit.labels import LabelScheme
from segfit.networks.outputs import class_masks
from segfit.plugins import guarded, load_plugin
from segfit.specs import TrainingSpec
from segfit.training.batch import Batch
from segfit.training.distributed import ALONE, Ranks

__all__ = ["Compared", "SegmentationLoss", "deep_supervision_weights", "shrink_target", "soft_centre_line"]

_SMOOTH = 1e-5
_SMOOTH_LINES = 1.0  # voxels of a centre line
_TINY = 1e-8
_NO_LABEL = -100


@dataclass(frozen=True, slots=True)
class Compared:
    """An output of the network beside what is true, as a term of the loss sees them; k classes, background is none."""

    logits: Tensor  # (b, outputs, *spatial) float32 or more; of exclusive labels log softmax was taken
    shares: Tensor  # (b, k, *spatial) probabilities of the classes, or of overlapping regions
    target: Tensor  # (b, 1, *spatial) label values
    truth: Tensor  # (b, k, *spatial) bool, nowhere true where labels are ignored
    valid: Tensor | None  # (b, 1, *spatial) bool, what counts; None: everything


class SegmentationLoss:
    """The training loss of one configuration.

    Parameters
    ----------
    scheme : what the labels mean; decides between softmax (labels) and sigmoid (regions), and what is ignored
    batch_dice : pool the sums of Dice and its kin over the batch
    strides : of the network, one entry per stage
    recipe : the terms and their parameters
    ranks : the processes that share a batch

    Attributes
    ----------
    weights : of the outputs with deep supervision, full resolution first, sum 1; outputs with weight 0 are left out
    num_heads : outputs worth computing; set `UNet.num_heads` to it
    """

    def __init__(
        self,
        scheme: LabelScheme,
        batch_dice: bool,
        strides: Sequence[Sequence[int]],
        recipe: TrainingSpec | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        recipe = recipe or TrainingSpec()
        self._ranks = ranks
        self.scheme = scheme
        self.batch_dice = batch_dice
        self.weights = tuple(weight for weight in deep_supervision_weights(len(strides) - 1) if weight > 0)
        known: dict[str, Callable[[Compared], Tensor]] = {
            "dice": self._dice,
            "tversky": partial(self._tversky, recipe.tversky_alpha, recipe.tversky_beta),
            "cldice": partial(self._centre_lines, recipe.cldice_steps),
            "ce": self._entropy,
            "topk": partial(self._worst_entropy, recipe.topk_share),
            "focal": partial(self._focal_entropy, recipe.focal_exponent),
        }
        self._terms = [known[name] if name in known else _plugin_term(name, ranks) for name in recipe.loss.split("+")]

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
            regions, ignore = self.scheme.has_regions, self.scheme.ignore_value
            logits = logits if regions else F.log_softmax(logits, dim=1)
            shares = logits.sigmoid() if regions else logits[:, 1:].exp()
            valid = None if ignore is None else target != ignore
            seen = Compared(logits, shares, target, class_masks(target, self.scheme), valid)
            return reduce(add, [term(seen) for term in self._terms])

    def _entropy(self, seen: Compared) -> Tensor:
        """Cross-entropy of labels, the mean over the annotated voxels; of regions binary cross-entropy.

        As in nnU-Net, the latter is a mean over voxels and regions without an ignore label, and a sum over regions
        divided by the annotated voxels with one.
        """
        if self.scheme.has_regions:
            if seen.valid is None:  # not the mean of the entropies, whose last digit differs
                entropy = F.binary_cross_entropy_with_logits(seen.logits, seen.truth.to(seen.logits.dtype))
                return self._ranks.mean(entropy)
            return self._mean(self._entropies(seen), seen.valid)
        entropy = self._entropies(seen).sum()
        if seen.valid is None:
            return self._ranks.mean(entropy / seen.target.numel())
        return self._ranks.total(entropy) / self._ranks.total(seen.valid.sum()).clamp(min=1)

    def _entropies(self, seen: Compared) -> Tensor:
        """Return the cross-entropy of every voxel `(b, 1 or regions, *spatial)`, 0 where labels are ignored."""
        if not self.scheme.has_regions:
            # Summed up by itself it would not repeat itself to the bit on a GPU.
            ignored = _NO_LABEL if self.scheme.ignore_value is None else self.scheme.ignore_value
            target = seen.target[:, 0].long()
            return F.nll_loss(seen.logits, target, reduction="none", ignore_index=ignored)[:, None]
        truth = seen.truth.to(seen.logits.dtype)
        entropies = F.binary_cross_entropy_with_logits(seen.logits, truth, reduction="none")
        return entropies if seen.valid is None else entropies * seen.valid

    def _mean(self, values: Tensor, valid: Tensor | None) -> Tensor:
        """Return the mean of what counts, as `_entropy` takes it."""
        if valid is None:
            return self._ranks.mean(values.mean())
        return self._ranks.total(values.sum()) / self._ranks.total(valid.sum()).clamp(min=_TINY)

    def _worst_entropy(self, share: float, seen: Compared) -> Tensor:
        """Mean cross-entropy of the worst voxels of the batch (and their regions); ignored ones count, as 0."""
        values = self._ranks.gathered(self._entropies(seen)).flatten()
        return values.topk(max(1, int(values.numel() * share)), sorted=False).values.mean()

    def _focal_entropy(self, exponent: float, seen: Compared) -> Tensor:
        """Cross-entropy weighted by how far the share of what is true is from 1, to the power of `exponent`."""
        values = self._entropies(seen)
        return self._mean((-torch.expm1(-values)).clamp(min=_TINY) ** exponent * values, seen.valid)

    def _dice(self, seen: Compared) -> Tensor:
        """Return minus the mean soft Dice."""
        common, predicted, true = self._sums(seen)
        return -self._mean_of_batch((2 * common + _SMOOTH) / (predicted + true + _SMOOTH).clamp(min=_TINY))

    def _tversky(self, alpha: float, beta: float, seen: Compared) -> Tensor:
        """Return minus the mean Tversky index; with `alpha` and `beta` 0.5 it is Dice."""
        common, predicted, true = self._sums(seen)
        wrong = alpha * (predicted - common) + beta * (true - common)
        return -self._mean_of_batch((common + _SMOOTH / 2) / (common + wrong + _SMOOTH / 2))

    def _mean_of_batch(self, scores: Tensor) -> Tensor:
        """Return the mean of scores by class, and by sample unless pooled."""
        return scores.mean() if self.batch_dice else self._ranks.mean(scores.mean())

    def _sums(self, seen: Compared) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is predicted and true, predicted, true: by class, and by sample unless pooled."""
        shares, valid, space = seen.shares, seen.valid, tuple(range(2, seen.shares.ndim))
        common = torch.where(seen.truth, shares, 0.0).sum(space)
        predicted = (shares if valid is None else torch.where(valid, shares, 0.0)).sum(space)
        true = seen.truth.sum(space)
        if not self.batch_dice:
            return common, predicted, true
        common, predicted, true = self._ranks.totals(common.sum(0), predicted.sum(0), true.sum(0))
        return common, predicted, true

    def _centre_lines(self, steps: int, seen: Compared) -> Tensor:
        """Return minus the mean soft clDice: how much of each centre line lies in the other's mask."""
        shares = seen.shares if seen.valid is None else torch.where(seen.valid, seen.shares, 0.0)
        masks = seen.truth.to(shares.dtype)
        space = (0, *range(2, shares.ndim)) if self.batch_dice else tuple(range(2, shares.ndim))

        def covered(line: Tensor, mask: Tensor) -> Tensor:
            common, whole = (line * mask).sum(space), line.sum(space)
            if self.batch_dice:
                common, whole = self._ranks.totals(common, whole)
            return (common + _SMOOTH_LINES) / (whole + _SMOOTH_LINES)

        precision = covered(soft_centre_line(shares, steps), masks)
        sensitivity = covered(soft_centre_line(masks, steps), shares)
        return -self._mean_of_batch(2 * precision * sensitivity / (precision + sensitivity))


def _plugin_term(name: str, ranks: Ranks) -> Callable[[Compared], Tensor]:
    """Return the term of a plug-in, which takes a `Compared` and gives a number that the network is to make small.

    Where several processes share a batch each asks it for its samples, and the mean counts.
    """
    function = guarded("losses", name, load_plugin("losses", name))

    def term(seen: Compared) -> Tensor:
        result = function(seen)
        if not isinstance(result, Tensor) or result.ndim:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            problem = f"the plug-in {name} (segfit.losses) must give a tensor without axes, it gave {got}"
            raise InputError(problem, "mend it, or leave it out")
        return ranks.mean(result)

    return term


def soft_centre_line(mask: Tensor, steps: int) -> Tensor:
    """Return the soft skeleton of masks `(b, k, *spatial)`, values 0 to 1: what openings take away, layer by layer.

    It is a centre line of what is at most about `2 * steps` voxels wide.
    """
    axes = range(2, mask.ndim)

    def eroded(image: Tensor) -> Tensor:
        return reduce(torch.minimum, [_neighbours(image, axis, torch.minimum) for axis in axes])

    def edges(image: Tensor, smaller: Tensor) -> Tensor:
        for axis in axes:
            smaller = _neighbours(smaller, axis, torch.maximum)
        return F.relu(image - smaller)

    smaller = eroded(mask)
    line = edges(mask, smaller)
    for _ in range(steps):
        mask, smaller = smaller, eroded(smaller)
        found = edges(mask, smaller)
        line = line + F.relu(found - line * found)
    return line


def _neighbours(image: Tensor, axis: int, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return what `choose` takes of every voxel and its two neighbours along an axis; pooling would not repeat."""
    size = image.shape[axis]
    if size == 1:
        return image
    pairs = choose(image.narrow(axis, 0, size - 1), image.narrow(axis, 1, size - 1))
    first, last = pairs.narrow(axis, 0, 1), pairs.narrow(axis, size - 2, 1)
    return choose(torch.cat((first, pairs), axis), torch.cat((pairs, last), axis))


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
