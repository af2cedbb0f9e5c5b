"""Building blocks of the U-Nets: normalisation, the convolution unit, the residual block, the block of MedNeXt.

All of them take `(b, c, *spatial)` with two or three spatial axes and keep the memory format of their input, so that a
network whose weights and input are channels-last stays so from end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from segfit.networks.prediction import convolved, may_overwrite, normalize_

__all__ = [
    "CONVOLUTION",
    "EPSILON",
    "NORMS",
    "SLOPE",
    "TRANSPOSED_CONVOLUTION",
    "BatchNorm",
    "ConvUnit",
    "Head",
    "InstanceNorm",
    "MedNeXtBlock",
    "ResidualBlock",
]

SLOPE = 0.01  # of the leaky rectifier
EPSILON = 1e-5  # added to the variance
_MOMENTUM = 0.1  # of running statistics

CONVOLUTION: dict[int, Callable[..., nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED_CONVOLUTION: dict[int, Callable[..., nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class InstanceNorm(nn.Module):
    """Affine instance normalisation: biased variance over space, eps 1e-5, no running statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(b, c, *spatial)`."""
        # PyTorch's kernel first copies channels-last input to the contiguous format, and the next convolution copies it
        # back. On CPUs that costs more than the normalisation itself.
        if x.device.type == "cpu" and not x.is_contiguous() and not torch.compiler.is_compiling():
            result: Tensor = _Normalize.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return result
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=EPSILON)


class _Normalize(torch.autograd.Function):
    """Instance normalisation written with format-preserving operations; statistics in two passes, at least float32.

    Large results are written over temporary ones: fresh memory costs more here than the arithmetic.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        space, voxels, dtype = tuple(range(2, x.ndim)), x[0, 0].numel(), torch.promote_types(x.dtype, torch.float32)
        weight, bias = (v.view(1, -1, *(1 for _ in space)) for v in (weight, bias))
        centred = x - x.sum(space, keepdim=True, dtype=dtype) / voxels
        result = centred * centred
        rate = (result.sum(space, keepdim=True) / voxels + EPSILON).rsqrt()
        torch.addcmul(bias, centred, rate * weight, out=result)
        ctx.save_for_backward(centred.to(x.dtype), rate, weight)
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred, rate, weight = ctx.saved_tensors
        space, voxels = tuple(range(2, centred.ndim)), centred[0, 0].numel()
        result = centred * gradient  # in this order: the first operand decides on the memory format
        moment = result.sum(space, keepdim=True, dtype=rate.dtype)
        total = gradient.sum(space, keepdim=True, dtype=rate.dtype)
        scale = rate * weight
        # scale * (gradient - mean(gradient) - centred * rate^2 * mean(gradient * centred))
        slope, offset = -scale * rate * rate * moment / voxels, -scale * total / voxels
        torch.addcmul(offset.to(result.dtype), centred, slope.to(result.dtype), out=result)
        result.addcmul_(gradient, scale.to(result.dtype))
        return result, (moment * rate).sum(0).flatten(), total.sum(0).flatten()


class BatchNorm(nn.Module):
    """Affine batch normalisation as PyTorch's: eps 1e-5, running statistics that a step moves by a tenth.

    A step whose statistics are not finite leaves them as they were, as such a step leaves the weights. Where several
    processes share a batch, `pooled` sums a tensor over them, and its gradient: statistics are those of all samples.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pooled: Callable[[Tensor], Tensor] | None = None
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(b, c, *spatial)`: by the batch in training, by the running statistics in evaluation."""
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPSILON)
        mean, var = self.running_mean.clone(), self.running_var.clone()
        if self.pooled is None:
            result = F.batch_norm(x, mean, var, self.weight, self.bias, training=True, momentum=_MOMENTUM, eps=EPSILON)
        else:
            result = self._over_processes(x, mean, var, self.pooled)
        finite = mean.isfinite().all() & var.isfinite().all()
        self.running_mean.copy_(torch.where(finite, mean, self.running_mean))
        self.running_var.copy_(torch.where(finite, var, self.running_var))
        return result

    def _over_processes(
        self, x: Tensor, running_mean: Tensor, running_var: Tensor, pooled: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Do what `F.batch_norm` does, with the samples of all processes."""
        space, shape = (0, *range(2, x.ndim)), (1, -1, *(1,) * (x.ndim - 2))
        own = x.to(torch.promote_types(x.dtype, torch.float32))
        total = pooled(torch.cat((own.sum(space), own.new_full((1,), x.numel() // x.shape[1]))))
        mean, number = total[:-1] / total[-1].detach(), total[-1].detach()
        centred = own - mean.view(shape)
        squares = pooled(centred.square().sum(space))
        running_mean.lerp_(mean.detach(), _MOMENTUM)
        running_var.lerp_(squares.detach() / (number - 1), _MOMENTUM)
        scale = (squares / number + EPSILON).rsqrt() * self.weight
        return torch.addcmul(self.bias.view(shape), centred, scale.view(shape)).to(x.dtype)


NORMS: dict[Literal["instance", "batch"], Callable[[int], nn.Module]] = {"instance": InstanceNorm, "batch": BatchNorm}
"""The normalisations, by the name that `NetworkSpec.norm` has."""


class Head(nn.Module):
    """Logits from features: a 1x1 convolution with bias, computed as a matrix product; the result is contiguous.

    PyTorch's convolution has no fast path for it on a single CPU thread.
    """

    def __init__(self, in_channels: int, out_channels: int, ndim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *(1,) * ndim))
        self.bias = nn.Parameter(torch.empty(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, in_channels, *spatial)` to `(b, out_channels, *spatial)`."""
        weight = self.weight.flatten(1).expand(x.shape[0], -1, -1)
        result = torch.baddbmm(self.bias.unsqueeze(1), weight, x.flatten(2))
        return result.view(x.shape[0], -1, *x.shape[2:])


class ConvUnit(nn.Module):
    """Convolution, normalisation, leaky rectifier (unless `activate` is False).

    Padding keeps the size for odd kernels; a stride divides it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        *,
        bias: bool = True,
        activate: bool = True,
        norm: Literal["instance", "batch"] = "instance",
    ) -> None:
        super().__init__()
        self.activate = activate
        self.conv = CONVOLUTION[len(kernel)](
            in_channels,
            out_channels,
            tuple(kernel),
            stride=tuple(stride or (1,) * len(kernel)),
            padding=tuple((k - 1) // 2 for k in kernel),
            bias=bias,
        )
        self.norm = NORMS[norm](out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, in_channels, *spatial)` to `(b, out_channels, *spatial / stride)`."""
        x = convolved(self.conv, x)
        if isinstance(self.norm, InstanceNorm) and may_overwrite(x):
            return normalize_(x, self.norm.weight, self.norm.bias, EPSILON, SLOPE if self.activate else 1.0)
        x = self.norm(x)
        return F.leaky_relu(x, SLOPE, inplace=True) if self.activate else x


class ResidualBlock(nn.Module):
    """Two convolution units and a shortcut, rectified after their sum.

    The shortcut averages over the stride (if there is one) and projects by a 1x1 convolution without bias and a
    normalisation (if the channels change).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        *,
        norm: Literal["instance", "batch"] = "instance",
    ) -> None:
        super().__init__()
        self.stride = tuple(stride)
        self.first = ConvUnit(in_channels, out_channels, kernel, stride, norm=norm)
        self.second = ConvUnit(out_channels, out_channels, kernel, activate=False, norm=norm)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = ConvUnit(
                in_channels, out_channels, (1,) * len(kernel), bias=False, activate=False, norm=norm
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, in_channels, *spatial)` to `(b, out_channels, *spatial / stride)`."""
        main = self.second(self.first(x))
        if any(step != 1 for step in self.stride):
            x = _averaged(x, self.stride)
        return F.leaky_relu(main + self.shortcut(x), SLOPE, inplace=True)


class MedNeXtBlock(nn.Module):
    """The block of MedNeXt (Roy et al., MICCAI 2023): first every channel by itself, then all of them.

    A depthwise convolution and a normalisation, a 1x1 convolution to `expansion` times the channels, GELU, and one to
    those that come out. What went in is added; where size or channels change, by a 1x1 convolution. A stride divides
    the size, or multiplies it where the block goes `up`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        *,
        expansion: int,
        up: bool = False,
        norm: Literal["instance", "batch"] = "instance",
    ) -> None:
        super().__init__()
        ndim, ones = len(kernel), (1,) * len(kernel)
        stride = tuple(stride or ones)
        sizes: dict[str, Any] = {"stride": stride}
        if up:
            sizes["output_padding"] = tuple(step - 1 for step in stride)  # to exactly as many times the size
        resizing, mixing = (TRANSPOSED_CONVOLUTION if up else CONVOLUTION)[ndim], CONVOLUTION[ndim]
        padding = tuple((k - 1) // 2 for k in kernel)
        self.conv = resizing(in_channels, in_channels, tuple(kernel), padding=padding, groups=in_channels, **sizes)
        self.norm = NORMS[norm](in_channels)
        self.expand = mixing(in_channels, expansion * in_channels, ones)
        self.compress = mixing(expansion * in_channels, out_channels, ones)
        same = in_channels == out_channels and stride == ones
        self.shortcut: nn.Module = nn.Identity() if same else resizing(in_channels, out_channels, ones, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, in_channels, *spatial)` to `(b, out_channels, *spatial)`, divided or multiplied by the stride."""
        result: Tensor = self.compress(F.gelu(self.expand(self.norm(self.conv(x))))) + self.shortcut(x)
        return result


def _averaged(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the means of blocks of so many voxels; sizes are multiples of them."""
    if len(stride) == 2:
        return F.avg_pool2d(x, stride)
    if not torch.are_deterministic_algorithms_enabled():
        return F.avg_pool3d(x, stride)
    for axis, step in enumerate(stride, start=2):  # torch has no kernel backwards on CUDA that repeats itself
        x = x.view(*x.shape[:axis], -1, step, *x.shape[axis + 1 :]).mean(axis + 1)
    return x
