"""Faster ways on a processor for what blocks do where they only predict: the same values but for rounding.

Each has its plain twin in torch, which training, other devices and compilers take.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

__all__ = ["convolved", "may_overwrite", "normalize_"]

_PART = 2**20  # values that a processor's cache holds


def _only_predicts(x: Tensor) -> bool:
    """Return whether `x` is on a CPU, and nothing is learned from what becomes of it, compiled or traced."""
    jit: Any = torch.jit
    return x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or jit.is_tracing())


def may_overwrite(x: Tensor) -> bool:
    """Return whether `normalize_` is for `x`: channels-last, and only to predict from."""
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    dense = not x.is_contiguous() and x.is_contiguous(memory_format=layout)
    return dense and x.dtype != torch.float64 and _only_predicts(x)


def convolved(conv: Any, x: Tensor) -> Tensor:
    """Return ``conv(x)``; predictions of a single view are computed by oneDNN itself.

    Of those torch gives small ones to a kernel of its own, up to ten times slower. An image of one channel leaves most
    of a processor's lanes idle: there pairs of voxels of a row are taken as two channels.
    """
    plain = len(x) > 1 or x.dtype != torch.float32 or conv.weight.dtype != torch.float32 or not _only_predicts(x)
    if plain or not _has_onednn() or torch.is_autocast_enabled("cpu"):
        return conv(x)  # type: ignore[no-any-return]
    way = conv.padding, conv.stride, conv.dilation, conv.groups
    if conv.in_channels > 1 or set(conv.stride) != {1} or x.shape[-1] % 2:
        return torch.ops.aten.mkldnn_convolution(x, conv.weight, conv.bias, *way)  # type: ignore[no-any-return]
    reach, size = conv.padding[-1], x.shape[2:]
    near = (reach + 1) // 2  # pairs to either side that an output sees
    weight = conv.weight.new_zeros(2, *conv.weight.shape[:-1], 2 * (2 * near + 1))  # of either output of a pair
    for own in (0, 1):
        first = 2 * near + own - reach
        weight[own, ..., first : first + 2 * reach + 1] = conv.weight
    weight = weight.flatten(0, 1).unflatten(-1, (-1, 2)).movedim(-1, 2).squeeze(1)
    pairs = x.reshape(1, *size[:-1], size[-1] // 2, 2).movedim(-1, 1)
    padding = (*conv.padding[:-1], near)
    result = torch.ops.aten.mkldnn_convolution(pairs, weight, conv.bias.repeat(2), padding, *way[1:])
    return result.movedim(1, -1).reshape(1, *size, -1).movedim(-1, 1)  # type: ignore[no-any-return]


def _has_onednn() -> bool:
    mkldnn: Any = torch.backends.mkldnn
    return bool(mkldnn.enabled and mkldnn.is_available())


def normalize_(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, slope: float) -> Tensor:
    """Do instance normalisation and a leaky rectifier (1: none) in the memory of `x`, for which `may_overwrite` holds.

    It goes from part to part, each of which stays in the processor's cache meanwhile, so that `x` is read from memory
    twice and written once. Moments of the parts are put together as in Chan, Golub and LeVeque (1979).
    """
    width, channels = x.shape[-1], x.shape[1]
    for item in x.movedim(1, -1).view(len(x), -1, width * channels):  # rows of `width` voxels with all their channels
        parts = item.split(max(1, _PART // item.shape[1]))
        scratch = torch.empty(parts[0].shape, dtype=torch.float32)
        voxels, mean, squares = 0, torch.zeros(channels), torch.zeros(channels)
        for part in parts:
            count, room = len(part) * width, scratch[: len(part)]
            own = part.sum(0, dtype=torch.float32).view(width, channels).sum(0) / count
            torch.sub(part, own.repeat(width), out=room)
            room.mul_(room)
            apart = own - mean
            share = count / (voxels + count)
            squares += room.sum(0).view(width, channels).sum(0) + apart * apart * (voxels * share)
            mean += apart * share
            voxels += count
        scale = (squares / voxels + epsilon).rsqrt() * weight
        offset = (bias - mean * scale).repeat(width)
        scale = scale.repeat(width)
        for part in parts:
            room = part if part.dtype == torch.float32 else scratch[: len(part)].copy_(part)
            torch.addcmul(offset, room, scale, out=room)
            if slope != 1:
                F.leaky_relu_(room, slope)
            if room is not part:
                part.copy_(room)
    return x
