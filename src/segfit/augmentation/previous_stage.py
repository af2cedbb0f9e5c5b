"""What the previous stage of a cascade predicted as input of the next one, and its random changes in training.

The second stage is trained on predictions for cases that the first had not seen, and on further mistakes: labels grown
and shrunk by balls, components that are missing. Order, probabilities and ranges are those of nnU-Net 2.8.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from segfit.connected_components import components
from segfit.specs import AugmentationSpec

__all__ = ["Changes", "Operator", "change", "draw_changes", "label_channels", "morphed"]

Operator = Literal["dilation", "erosion", "closing", "opening"]


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything random about the labels of one sample, by index of the label, in the order in which it is done."""

    operators: tuple[tuple[int, Operator, float], ...] = ()  # label, operator, radius in voxels
    removals: tuple[tuple[int, float], ...] = ()  # label, which of its small components: a share of their number
    removed_share: float = 0.0  # of the patch; components as large as that stay


def draw_changes(spec: AugmentationSpec, batch: int, labels: int, rng: np.random.Generator) -> tuple[Changes, ...]:
    """Draw the changes of every sample of a batch; the same generator state gives the same ones."""

    def chosen(probability: float, label_probability: float) -> list[int]:
        """The labels of a sample that are changed, in random order."""
        gate, order = rng.random() < probability, rng.permutation(labels)
        return order[rng.random(labels) < label_probability].tolist() if gate else []

    def one() -> Changes:
        operators = tuple(
            (label, get_args(Operator)[rng.integers(4)], float(rng.uniform(*spec.previous_radius_range)))
            for label in chosen(spec.previous_operator_probability, spec.previous_operator_label_probability)
        )
        removals = tuple(
            (label, float(rng.random()))
            for label in chosen(spec.previous_removal_probability, spec.previous_removal_label_probability)
        )
        return Changes(operators, removals, spec.previous_removed_share)

    return tuple(one() for _ in range(batch))


def label_channels(labels: Tensor, values: Tensor) -> Tensor:
    """Return where labels ``(b, *spatial)`` have each of the values ``(n,)``, bool ``(b, n, *spatial)``."""
    return labels[:, None] == values.view(1, -1, *(1,) * (labels.ndim - 1))


@torch.no_grad()
def change(channels: Tensor, changes: Changes) -> None:
    """Change the labels of one sample, bool ``(labels, *spatial)``, in place; no voxel gets two labels by it."""
    for label, operator, radius in changes.operators:
        result = morphed(channels[label], operator, radius)
        channels &= ~(result & ~channels[label])
        channels[label] = result
    for label, which in changes.removals:
        _remove_component(channels[label], which, changes.removed_share)


def morphed(mask: Tensor, operator: Operator, radius: float) -> Tensor:
    """Return a mask, bool ``(*spatial)``, after a binary operator with a ball, or a disk in 2D.

    Beyond the border nothing is there to dilate from, and nothing erodes.
    """
    element = _element(mask.ndim, radius)
    steps: dict[Operator, tuple[Callable[[Tensor, NDArray[np.bool_]], Tensor], ...]] = {
        "dilation": (_dilated,),
        "erosion": (_eroded,),
        "closing": (_dilated, _eroded),
        "opening": (_eroded, _dilated),
    }
    for step in steps[operator]:
        mask = step(mask, element)
    return mask


def _element(ndim: int, radius: float) -> NDArray[np.bool_]:
    """Return the ball or disk as nnU-Net has it: in 3D its outermost voxels lie on the radius, in 2D its first ones."""
    step = 1j * (2 * radius + 1)
    line = np.mgrid[-radius:radius:step] if ndim == 3 else np.arange(-radius, radius + 1)
    squares = np.meshgrid(*[line**2] * ndim, indexing="ij")
    result: NDArray[np.bool_] = np.stack(squares).sum(0) <= radius**2
    return result


def _eroded(mask: Tensor, element: NDArray[np.bool_]) -> Tensor:
    return ~_dilated(~mask, element)


def _dilated(mask: Tensor, element: NDArray[np.bool_]) -> Tensor:
    """Return whether any voxel under the element is set.

    The element is convex: its lines along the first axis are intervals inside each other. The mask is spread over the
    shortest of them, shifted to where the element has them, then over the next longer one, and so on.
    """
    lines: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
    for place in np.ndindex(*element.shape[1:]):
        inside = np.flatnonzero(np.moveaxis(element, 0, -1)[place])
        if inside.size:
            lines[int(inside[0]), int(inside[-1])].append(place)
    size = mask.shape
    padded = F.pad(mask, [amount for n in reversed(element.shape) for amount in ((n - 1) // 2, n // 2)])
    spread, result = torch.zeros_like(padded.narrow(0, 0, size[0])), torch.zeros_like(mask)
    done: set[int] = set()
    for first, last in sorted(lines, key=lambda interval: interval[1] - interval[0]):
        for step in {*range(first, last + 1)} - done:
            spread |= padded.narrow(0, step, size[0])
            done.add(step)
        for place in lines[first, last]:
            result |= spread[:, *(slice(low, low + n) for low, n in zip(place, size[1:], strict=True))]
    return result


def _remove_component(mask: Tensor, which: float, share: float) -> None:
    """Remove one of the components of a mask that are smaller than a share of it, in place; the CPU looks for them."""
    found, sizes = components(mask.cpu().numpy())
    small = np.flatnonzero(sizes < share * mask.numel())
    small = small[small > 0]
    if small.size:
        mask &= torch.from_numpy(found != small[int(which * small.size)]).to(mask.device)
