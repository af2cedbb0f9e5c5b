"""What is done to a training batch: parameters are drawn first, then applied by pure functions.

Order, probabilities and ranges are those of nnU-Net 2.8.1. Unlike there, every random number comes from the
generator that is handed in, so that a batch can be repeated.

The same steps run in two ways. On a CPU one channel after the other is changed, and only where it was chosen. On a GPU
every step changes all channels at once, by parameters of their own that came there in one copy; the host never waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import radians
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.augmentation.intensity import (
    Amount,
    blur,
    blur_kernels,
    change_contrast,
    change_gamma,
    lower_resolution,
    lower_resolution_by_index,
    make_noise,
    resolution_indices,
)
from segfit.augmentation.spatial import affine_matrices, centre_crop, warp, warp_together
from segfit.augmentation.strong import Extras, apply_extras, draw_extras
from segfit.errors import InputError
from segfit.labels import Exchange
from segfit.plugins import guarded, load_plugin
from segfit.specs import AugmentationSpec

__all__ = [
    "Parameters",
    "apply",
    "draw",
    "draw_matrices",
    "exchanged",
    "loaded_augmentation",
    "of_samples",
    "turned",
]

Array = NDArray[np.float64]
_Whole = tuple[Tensor, Tensor] | None


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
    matrix = draw_matrices(spec, ndim, batch, rng)  # before all else

    def gate(probability: float, shape: tuple[int, ...] = (batch,)) -> NDArray[np.bool_]:
        return rng.random(shape) < probability

    def factor(probability: float, limits: tuple[float, float]) -> Array:
        """One factor per channel in the samples that are changed, 1 in the others."""
        return np.where(gate(probability)[:, None], _balanced(rng, limits, per_channel), 1.0)

    blurred = gate(spec.blur_probability)[:, None] & gate(spec.blur_channel_probability, per_channel)
    lowered = gate(spec.low_resolution_probability)[:, None] & gate(
        spec.low_resolution_channel_probability, per_channel
    )
    return Parameters(
        patch=tuple(patch),
        dummy_2d=spec.dummy_2d,
        masked_channels=spec.masked_channels,
        exchange=spec.exchange,
        matrix=matrix,
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


def draw_matrices(spec: AugmentationSpec, ndim: int, batch: int, rng: np.random.Generator) -> Array:
    """Draw `Parameters.matrix` alone: `draw` begins with it."""
    limit = radians(spec.rotation_degrees)
    angles = rng.uniform(-limit, limit, (batch, 3 if ndim == 3 and not spec.dummy_2d else 1))
    angles = np.where(rng.random((batch, 1)) < spec.rotation_probability, angles, 0.0)
    chosen = rng.random(batch) < spec.scaling_probability
    return affine_matrices(angles, np.where(chosen, rng.uniform(*spec.scaling_range, batch), 1.0))


def turned(matrix: Array) -> NDArray[np.int64]:
    """Return which samples are turned or scaled: of the others no more than the patch is seen."""
    return np.flatnonzero((matrix != np.eye(matrix.shape[1])).any((1, 2)))


def of_samples(parameters: Parameters, rows: slice) -> Parameters:
    """Return the parameters of some samples of the batch."""

    def taken(whole: Parameters | Extras) -> dict[str, Any]:
        values = {one.name: getattr(whole, one.name) for one in fields(whole)}
        return {name: value[rows] for name, value in values.items() if isinstance(value, np.ndarray)}

    extras = parameters.extras
    return replace(parameters, **taken(parameters), extras=None if extras is None else replace(extras, **taken(extras)))


def _balanced(rng: np.random.Generator, limits: tuple[float, float], shape: tuple[int, ...]) -> Array:
    """Draw factors that shrink and stretch equally often: below 1 with probability 0.5 if the range contains 1."""
    low, high = limits
    below, value = rng.random(shape) < 0.5, rng.random(shape)
    if not low < 1 < high:
        return low + (high - low) * value
    return np.where(below, low + (1 - low) * value, 1 + (high - 1) * value)


@torch.no_grad()
def apply(
    parameters: Parameters,
    image: Tensor,
    labels: Tensor,
    whole: _Whole = None,
    *,
    together: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Augment a batch; the arguments stay as they are.

    Parameters
    ----------
    image : (b, c, *sample_patch) float32
    labels : (b, 1, *sample_patch) signed integers; -1 = background outside the non-zero mask or outside the image
    whole : image and labels of the samples that are turned, in order; the others may be of size `patch` then, and what
        `image` and `labels` hold of the turned ones is not looked at
    together : change all channels at once; None: unless they are on a CPU

    Returns
    -------
    image (b, c, *patch) and labels (b, 1, *patch), contiguous, on the same device; -1 has become 0
    """
    if together is None:
        together = image.device.type != "cpu"
    which = turned(parameters.matrix)
    assert whole is None or len(whole[0]) == len(which), "other samples are turned than were cut out whole"
    new_image, new_labels = (_together if together else _one_by_one)(parameters, image, labels, whole, which)
    return new_image, new_labels.clamp_(min=0)


def _one_by_one(
    p: Parameters, image: Tensor, labels: Tensor, whole: _Whole, which: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Augment sample by sample, channel by channel."""
    new_image = image.new_empty((*image.shape[:2], *p.patch))
    new_labels = labels.new_empty((*labels.shape[:2], *p.patch))
    place = {int(sample): number for number, sample in enumerate(which)}
    for sample in range(len(image)):
        if sample in place:
            both = (image[sample], labels[sample]) if whole is None else [part[place[sample]] for part in whole]
            moved = warp(_flat(p, both[0]), _flat(p, both[1]), p.matrix[sample], p.patch[-p.matrix.shape[1] :])
            values, classes = moved[0].view(new_image.shape[1:]), moved[1].view(new_labels.shape[1:])
        else:
            values, classes = centre_crop(image[sample], p.patch), centre_crop(labels[sample], p.patch)
        if p.noise_std[sample] > 0:
            values = make_noise(values.shape, p.noise_std[sample], int(p.noise_seed[sample]), image.device).add_(values)
        flipped = [1 + int(axis) for axis in np.flatnonzero(p.flip[sample])]
        for channel in range(image.shape[1]):
            changed = _changes_of_one(p, sample, channel).apply(values[channel : channel + 1])
            new_image[sample, channel : channel + 1] = changed.flip(flipped) if flipped else changed
        new_labels[sample] = classes.flip(flipped) if flipped else classes
        if p.exchange is not None and p.flip[sample, p.exchange.axis]:
            new_labels[sample] = exchanged(new_labels[sample], p.exchange.pairs)
    if p.extras is not None:
        new_image, new_labels = apply_extras(p.extras, new_image, new_labels)
    if p.masked_channels:
        outside = new_labels[:, 0] < 0
        for channel in p.masked_channels:
            new_image[:, channel].masked_fill_(outside, 0.0)
    return new_image, new_labels


def _together(
    p: Parameters, image: Tensor, labels: Tensor, whole: _Whole, which: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Augment all samples at once, by as many calls whatever the numbers of samples and channels."""
    there = _sent(_amounts(p, image.shape[1], which), image.device)
    new_image, new_labels = (
        centre_crop(part, p.patch).clone(memory_format=torch.contiguous_format) for part in (image, labels)
    )
    if "matrix" in there:
        index = there["turned"].long()
        both = whole or [part.index_select(0, index) for part in (image, labels)]
        parts = [_flat(p, part) for part in both]
        moved = warp_together(parts[0], parts[1], there["matrix"], p.patch[-p.matrix.shape[1] :])
        new_image.index_copy_(0, index, moved[0].view(-1, *new_image.shape[1:]))
        new_labels.index_copy_(0, index, moved[1].view(-1, *new_labels.shape[1:]))
    if "noise_std" in there:
        noise = make_noise(new_image.shape, 1.0, int(p.noise_seed[0]), image.device)
        new_image.addcmul_(noise, there["noise_std"])
    channels = new_image.flatten(0, 1)
    new_image = _changes_of_all(there, _axes(p)).apply(channels).view(new_image.shape)
    if "flip" in there:
        mirrored = torch.split(there["flip"].long(), list(p.patch), dim=1)
        new_image, new_labels = _at(new_image, mirrored), _at(new_labels, mirrored)
    if "exchange" in there:
        table = there["exchange"]
        index = new_labels.clamp(-1, table.shape[1] - 2).long() + 1
        new_labels += table.gather(1, index.flatten(1)).view(index.shape).to(new_labels.dtype)
    if p.extras is not None:
        new_image, new_labels = apply_extras(p.extras, new_image, new_labels)
    if "masked" in there:
        new_image.masked_fill_((new_labels < 0) & (there["masked"] > 0), 0.0)
    return new_image, new_labels


def _amounts(p: Parameters, channels: int, which: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return what the host has to tell the device, of the steps that some sample was chosen for."""
    result: dict[str, NDArray[Any]] = {}
    ones = (1,) * len(p.patch)
    if len(which):
        result |= {"turned": which, "matrix": p.matrix[which]}
    if p.noise_std.any():
        result["noise_std"] = p.noise_std.reshape(-1, 1, *ones)
    if p.blur_sigma.any():
        for axis, kernels in enumerate(blur_kernels(p.blur_sigma.reshape(-1, len(ones)))):
            result[f"kernel {axis}"] = kernels.T.reshape(*kernels.T.shape, *ones)
    for name in ("brightness", "contrast", "inverted_gamma", "gamma"):
        factors = getattr(p, name)
        if (factors != 1).any():
            result[name] = factors.reshape(-1, *ones)
    if (p.resolution != 1).any():
        for axis in _axes(p):
            result[f"resolution {axis}"] = np.stack(resolution_indices(p.patch[axis], p.resolution.ravel()))
    if p.flip.any():
        index = [np.where(f[:, None], np.arange(n)[::-1], np.arange(n)) for f, n in zip(p.flip.T, p.patch, strict=True)]
        result["flip"] = np.concatenate(index, axis=1)
    if p.exchange is not None and p.flip[:, p.exchange.axis].any():
        result["exchange"] = p.flip[:, [p.exchange.axis]] * _added(p.exchange.pairs)
    if p.masked_channels:
        result["masked"] = np.isin(np.arange(channels), p.masked_channels).reshape(-1, *ones)
    return result


def _sent(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Return the arrays as float32 tensors on a device; they go there in one copy that nobody waits for."""
    flat = torch.from_numpy(np.concatenate([np.zeros(0), *(array.ravel() for array in arrays.values())], dtype="f4"))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = torch.split(flat.to(device, non_blocking=True), [array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


def _at(array: Tensor, index: Sequence[Tensor]) -> Tensor:
    """Return for each sample of `(b, c, *patch)` what is at the indices `(b, size)` of each axis."""
    axes = range(1, array.ndim)
    whole = [
        part.view(len(part), *(-1 if other == axis else 1 for other in axes)) for axis, part in enumerate(index, 2)
    ]
    sample, channel = (torch.arange(size, device=array.device) for size in array.shape[:2])
    return array[(sample.view(-1, *(1 for _ in axes)), channel.view(-1, *(1 for _ in index)), *whole)]


def _flat(p: Parameters, array: Tensor) -> Tensor:
    """Return `(..., c, *sample_patch)` as what is rotated; with `dummy_2d` slices are channels of a 2D image."""
    ndim, seen = p.matrix.shape[1], len(p.patch)
    array = centre_crop(array, (*p.patch[:-ndim], *array.shape[-ndim:]))
    return array.flatten(-1 - seen, -1 - ndim)


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

    A table takes a fiftieth of the time of comparisons pair by pair with 17 pairs.
    """
    table = torch.from_numpy(_added(pairs)).to(labels.dtype)
    index = labels.clamp(-1, len(table) - 2).int() + 1
    return labels + table.index_select(0, index.flatten()).view(labels.shape)


def _added(pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Return what an exchange adds to the values from -1 to one beyond the highest, which stands for all above."""
    change = np.zeros(max(value for pair in pairs for value in pair) + 3, np.int64)
    for first, second in pairs:
        change[first + 1], change[second + 1] = second - first, first - second
    return change


def _axes(p: Parameters) -> range:
    """Return the axes whose resolution is lowered."""
    return range(1 if p.dummy_2d else 0, len(p.patch))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changes:
    """What is done to the grey values of channels `(n, *patch)`, in this order; a step that is None is left out."""

    kernels: Sequence[Sequence[Amount]] | None
    brightness: Amount | None
    contrast: Amount | None
    lower: Callable[[Tensor], Tensor] | None
    inverted_gamma: Amount | None
    gamma: Amount | None

    def apply(self, channels: Tensor) -> Tensor:
        if self.kernels is not None:
            channels = blur(channels, self.kernels)
        if self.brightness is not None:
            channels = channels * self.brightness
        if self.contrast is not None:
            channels = _where(self.contrast, change_contrast(channels, self.contrast), channels)
        if self.lower is not None:
            channels = self.lower(channels)
        if self.inverted_gamma is not None:
            changed = change_gamma(channels, self.inverted_gamma, inverted=True)
            channels = _where(self.inverted_gamma, changed, channels)
        if self.gamma is not None:
            channels = _where(self.gamma, change_gamma(channels, self.gamma), channels)
        return channels


def _where(factor: Amount, changed: Tensor, channels: Tensor) -> Tensor:
    """Return the changed channels, but as they were those whose factor is neutral."""
    return torch.where(factor != 1, changed, channels) if isinstance(factor, Tensor) else changed


def _changes_of_one(p: Parameters, sample: int, channel: int) -> _Changes:
    """Return what is done to one channel, in numbers."""

    def factor(factors: Array) -> float | None:
        return None if factors[sample, channel] == 1 else float(factors[sample, channel])

    sigma, scale, axes = p.blur_sigma[sample, channel], factor(p.resolution), _axes(p)
    return _Changes(
        kernels=[kernel[0].tolist() for kernel in blur_kernels(sigma[None])] if sigma.any() else None,
        brightness=factor(p.brightness),
        contrast=factor(p.contrast),
        lower=None if scale is None else lambda channels: lower_resolution(channels, scale, axes),
        inverted_gamma=factor(p.inverted_gamma),
        gamma=factor(p.gamma),
    )


def _changes_of_all(there: Mapping[str, Tensor], axes: Sequence[int]) -> _Changes:
    """Return what is done to all channels, by what was sent to their device."""
    kernels = [part.unbind(0) for name, part in there.items() if name.startswith("kernel")]
    indices = {axis: there[f"resolution {axis}"].unbind(0) for axis in axes if f"resolution {axis}" in there}

    def lower(channels: Tensor) -> Tensor:
        return lower_resolution_by_index(
            channels, {axis: (a.long(), b.long(), s) for axis, (a, b, s) in indices.items()}
        )

    return _Changes(
        kernels=kernels or None,
        brightness=there.get("brightness"),
        contrast=there.get("contrast"),
        lower=lower if indices else None,
        inverted_gamma=there.get("inverted_gamma"),
        gamma=there.get("gamma"),
    )
