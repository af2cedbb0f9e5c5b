"""What is done to a training batch: parameters are drawn first, then applied by pure functions.

Order, probabilities and ranges are those of nnU-Net 2.8.1. Unlike there, every random number comes from the
generator that is handed in, so that a batch can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import radians

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.augmentation.intensity import blur, change_contrast, change_gamma, lower_resolution, make_noise
from segfit.augmentation.spatial import affine_matrices, centre_crop, warp
from segfit.augmentation.strong import Extras, apply_extras, draw_extras
from segfit.errors import InputError
from segfit.labels import Exchange
from segfit.plugins import guarded, load_plugin
from segfit.specs import AugmentationSpec

__all__ = ["Parameters", "apply", "draw", "exchanged", "loaded_augmentation"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Everything random about the augmentation of `b` samples with `c` channels and `n` axes.

    A step with its neutral value is not run at all. `m` is 2 for 2D and for `dummy_2d`, else 3.
    """

    patch: tuple[int, ...]  # size of the result
    dummy_2d: bool  # spatial transforms and lower resolution leave axis 0 alone
    masked_channels: tuple[int, ...]  # set to 0 where the label is negative
    exchange: Exchange | None  # of labels in the samples flipped along its axis
    matrix: Array  # (b, m, m) see `affine_matrices`; neutral: identity, the sample is cropped
    noise_std: Array  # (b,) neutral: 0
    noise_seed: NDArray[np.int64]  # (b,)
    blur_sigma: Array  # (b, c, n) voxels; neutral: 0
    brightness: Array  # (b, c) factor; neutral: 1
    contrast: Array  # (b, c) factor; neutral: 1
    resolution: Array  # (b, c) share of the size; neutral: 1
    inverted_gamma: Array  # (b, c) exponent; neutral: 1
    gamma: Array  # (b, c) exponent; neutral: 1
    flip: NDArray[np.bool_]  # (b, n) axes that are mirrored; neutral: False
    extras: Extras | None = None  # of the strong augmentation


def draw(
    spec: AugmentationSpec, patch: Sequence[int], batch: int, channels: int, rng: np.random.Generator
) -> Parameters:
    """Draw the parameters of a batch; the same generator state gives the same parameters."""
    ndim = len(patch)
    per_channel, per_axis = (batch, channels), (batch, channels, ndim)

    def gate(probability: float, shape: tuple[int, ...] = (batch,)) -> NDArray[np.bool_]:
        return rng.random(shape) < probability

    def factor(probability: float, limits: tuple[float, float]) -> Array:
        """One factor per channel in the samples that are changed, 1 in the others."""
        return np.where(gate(probability)[:, None], _balanced(rng, limits, per_channel), 1.0)

    limit = radians(spec.rotation_degrees)
    angles = rng.uniform(-limit, limit, (batch, 3 if ndim == 3 and not spec.dummy_2d else 1))
    angles = np.where(gate(spec.rotation_probability)[:, None], angles, 0.0)
    scales = np.where(gate(spec.scaling_probability), rng.uniform(*spec.scaling_range, batch), 1.0)
    blurred = gate(spec.blur_probability)[:, None] & gate(spec.blur_channel_probability, per_channel)
    lowered = gate(spec.low_resolution_probability)[:, None] & gate(
        spec.low_resolution_channel_probability, per_channel
    )
    return Parameters(
        patch=tuple(patch),
        dummy_2d=spec.dummy_2d,
        masked_channels=spec.masked_channels,
        exchange=spec.exchange,
        matrix=affine_matrices(angles, scales),
        noise_std=np.where(gate(spec.noise_probability), rng.uniform(*spec.noise_std_range, batch), 0.0),
        noise_seed=rng.integers(2**62, size=batch),
        blur_sigma=np.where(blurred[..., None], rng.uniform(*spec.blur_sigma_range, per_axis), 0.0),
        brightness=factor(spec.brightness_probability, spec.brightness_range),
        contrast=factor(spec.contrast_probability, spec.contrast_range),
        resolution=np.where(lowered, rng.uniform(*spec.low_resolution_range, per_channel), 1.0),
        inverted_gamma=factor(spec.inverted_gamma_probability, spec.gamma_range),
        gamma=factor(spec.gamma_probability, spec.gamma_range),
        flip=gate(0.5, (batch, ndim)) & np.isin(np.arange(ndim), spec.mirror_axes),
        extras=draw_extras(spec, patch, batch, channels, rng),
    )


def _balanced(rng: np.random.Generator, limits: tuple[float, float], shape: tuple[int, ...]) -> Array:
    """Draw factors that shrink and stretch equally often: below 1 with probability 0.5 if the range contains 1."""
    low, high = limits
    below, value = rng.random(shape) < 0.5, rng.random(shape)
    if not low < 1 < high:
        return low + (high - low) * value
    return np.where(below, low + (1 - low) * value, 1 + (high - 1) * value)


@torch.no_grad()
def apply(parameters: Parameters, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Augment a batch; the arguments stay as they are.

    Parameters
    ----------
    image : (b, c, *sample_patch) float32
    labels : (b, 1, *sample_patch) signed integers; -1 = background outside the non-zero mask or outside the image

    Returns
    -------
    image (b, c, *patch) and labels (b, 1, *patch), contiguous, on the same device; -1 has become 0
    """
    size = parameters.patch
    new_image = image.new_empty((*image.shape[:2], *size))
    new_labels = labels.new_empty((*labels.shape[:2], *size))
    for sample in range(len(image)):
        _place(parameters, sample, image[sample], labels[sample], new_image[sample], new_labels[sample])
        _recolour(parameters, sample, new_image[sample])
        axes = [1 + int(axis) for axis in np.flatnonzero(parameters.flip[sample])]
        if axes:
            new_image[sample] = new_image[sample].flip(axes)
            new_labels[sample] = new_labels[sample].flip(axes)
        if parameters.exchange is not None and parameters.flip[sample, parameters.exchange.axis]:
            new_labels[sample] = exchanged(new_labels[sample], parameters.exchange.pairs)
    if parameters.extras is not None:
        new_image, new_labels = apply_extras(parameters.extras, new_image, new_labels)
    if parameters.masked_channels:
        outside = new_labels[:, 0] < 0
        for channel in parameters.masked_channels:
            new_image[:, channel].masked_fill_(outside, 0.0)
    return new_image, new_labels.clamp_(min=0)


def loaded_augmentation(name: str) -> Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]:
    """Return the augmentation of a plug-in, which takes and gives a batch as the network and the loss see it.

    Image `(b, c, *patch)` float32 and labels `(b, 1, *patch)`, signed integers from 0; all that is random comes from
    the generator. What it gives must be of the same shapes and types.
    """
    augment = guarded("augmentations", name, load_plugin("augmentations", name))

    @torch.no_grad()
    def checked(image: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        result = augment(image, labels, rng)
        given = [_kind(part) for part in result] if isinstance(result, tuple | list) else [_kind(result)]
        if given != (wanted := [_kind(image), _kind(labels)]):
            problem = f"the plug-in {name} (segfit.augmentations) must give {' and '.join(wanted)}"
            raise InputError(f"{problem}, it gave {' and '.join(given)}", "mend it, or leave it out")
        return result[0], result[1]

    return checked


def _kind(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def exchanged(labels: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Return labels, signed integers of any shape from -1, in which the values of each pair have changed places.

    A table holds what is added to the values from -1 to one beyond the highest of a pair, which stands for all higher
    ones. It takes a fiftieth of the time of comparisons pair by pair with 17 pairs.
    """
    top = max(value for pair in pairs for value in pair) + 1
    change = [0] * (top + 2)
    for first, second in pairs:
        change[first + 1], change[second + 1] = second - first, first - second
    table = torch.tensor(change, dtype=labels.dtype, device=labels.device)
    index = labels.clamp(-1, top).int() + 1
    return labels + table.index_select(0, index.flatten()).view(labels.shape)


def _place(p: Parameters, sample: int, image: Tensor, labels: Tensor, new_image: Tensor, new_labels: Tensor) -> None:
    """Fill the new arrays by the centre of the old ones, rotated and scaled if the sample is to be."""
    matrix, patch = p.matrix[sample], p.patch
    if np.array_equal(matrix, np.eye(len(matrix))):
        new_image.copy_(centre_crop(image, patch))
        new_labels.copy_(centre_crop(labels, patch))
        return
    if p.dummy_2d:  # slices become channels of a 2D image
        image, labels = (centre_crop(a, (patch[0], *a.shape[2:])).flatten(0, 1) for a in (image, labels))
    moved_image, moved_labels = warp(image, labels, matrix, patch[-len(matrix) :])
    new_image.copy_(moved_image.view(new_image.shape))
    new_labels.copy_(moved_labels.view(new_labels.shape))


def _recolour(p: Parameters, sample: int, image: Tensor) -> None:
    """Run the intensity transforms on `(c, *patch)` in place."""
    if p.noise_std[sample] > 0:
        image += make_noise(image.shape, p.noise_std[sample], int(p.noise_seed[sample]), image.device)
    # no step looks at more than one channel, so the channels may take turns
    axes = range(1 if p.dummy_2d else 0, image.ndim - 1)
    for channel, values in enumerate(image):
        result = values
        if p.blur_sigma[sample, channel].any():
            result = blur(result, p.blur_sigma[sample, channel])
        if (factor := float(p.brightness[sample, channel])) != 1:
            result = result * factor
        if (factor := float(p.contrast[sample, channel])) != 1:
            result = change_contrast(result, factor)
        if (scale := float(p.resolution[sample, channel])) != 1:
            result = lower_resolution(result, scale, axes)
        if (exponent := float(p.inverted_gamma[sample, channel])) != 1:
            result = change_gamma(result, exponent, inverted=True)
        if (exponent := float(p.gamma[sample, channel])) != 1:
            result = change_gamma(result, exponent)
        if result is not values:
            values.copy_(result)
