"""The U-Net, plain, with a residual encoder, or of MedNeXt's blocks, in two or three dimensions.

Topology and initialisation of the first two are those of nnU-Net (2.8.1, PlainConvUNet and ResidualEncoderUNet). The
parameters come in nnU-Net's order too: encoder, decoder convolutions, upsampling, heads. MedNeXt is that of Roy et al.
(MICCAI 2023): blocks change the resolution, skips are added, weights start as PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor, nn

from segfit.errors import InputError
from segfit.networks.blocks import (
    CONVOLUTION,
    SLOPE,
    TRANSPOSED_CONVOLUTION,
    BatchNorm,
    ConvUnit,
    Head,
    InstanceNorm,
    MedNeXtBlock,
    ResidualBlock,
)
from segfit.plugins import guarded, load_plugin
from segfit.specs import NetworkSpec

__all__ = ["PluginNetwork", "UNet", "build_network", "empty_network"]


class UNet(nn.Module):
    """Encoder, decoder with skips, one segmentation head per decoder level (lowest resolution first).

    Attributes that may be changed at any time:

    deep_supervision : `forward` returns a list of outputs instead of the full-resolution one
    num_heads : how many outputs that list has, counted from full resolution; the others are not computed. All levels
        at first. Training sets it to the levels with a weight (`segfit.training.loss.SegmentationLoss.num_heads`).
    """

    def __init__(self, spec: NetworkSpec, *, deep_supervision: bool) -> None:
        super().__init__()
        assert spec.num_stages >= 2, "a U-Net has at least two resolutions"
        self.spec = spec
        self.deep_supervision = deep_supervision
        self.num_heads = spec.num_stages - 1
        self.stem, width = _stem(spec)
        self.encoder = nn.ModuleList(_encoder(spec, width))
        self.decoder = nn.ModuleList()
        self.upsample = nn.ModuleList()
        self.heads = nn.ModuleList()
        for level in range(spec.num_stages - 1):
            stage = spec.num_stages - 2 - level  # the encoder stage of the same resolution
            upsample, units = _decoder(spec, stage, spec.decoder_convs[level])
            self.decoder.append(units)
            self.upsample.append(upsample)
            self.heads.append(Head(spec.features[stage], spec.num_outputs, spec.ndim))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return logits `(b, num_outputs, *spatial)`, or with deep supervision a list, full resolution first.

        The spatial size must be a multiple of `spec.divisor`.
        """
        x = self.stem(x)
        skips: list[Tensor] = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        skips.pop()  # the bottleneck itself
        outputs: list[Tensor] = []
        wanted = self.num_heads if self.deep_supervision else 1
        for upsample, convs, head in zip(self.upsample, self.decoder, self.heads, strict=True):
            x = upsample(x)
            x = convs(x + skips[-1] if self.spec.kind == "mednext" else torch.cat((x, skips[-1]), dim=1))
            if len(skips) <= wanted:
                outputs.append(head(x))
            skips.pop()
        return outputs[::-1] if self.deep_supervision else outputs[0]


def _stem(spec: NetworkSpec) -> tuple[nn.Module, int]:
    """Return what comes before the first stage, and how many channels go there."""
    width = spec.features[0]
    if spec.kind == "plain":
        return nn.Identity(), spec.in_channels
    if spec.kind == "residual":
        return ConvUnit(spec.in_channels, width, spec.kernels[0], norm=spec.norm), width
    return CONVOLUTION[spec.ndim](spec.in_channels, width, (1,) * spec.ndim), width


def _encoder(spec: NetworkSpec, width: int) -> Iterator[nn.Sequential]:
    """Yield the stages; `width` channels come in. The first unit of a stage carries its stride.

    With MedNeXt's blocks that unit is there beside those that are counted, where there is anything to change.
    """
    for features, kernel, stride, count in zip(
        spec.features, spec.kernels, spec.strides, spec.encoder_convs, strict=True
    ):
        ones = (1,) * spec.ndim
        widths, strides = [width, *(features,) * count], [stride, *(ones,) * (count - 1)]
        if spec.kind == "mednext" and (width, stride) != (features, ones):
            widths, strides = [*widths, features], [*strides, ones]
        yield nn.Sequential(
            *(_unit(spec, a, b, kernel, s) for (a, b), s in zip(pairwise(widths), strides, strict=True))
        )
        width = features


def _unit(spec: NetworkSpec, a: int, b: int, kernel: Sequence[int], stride: Sequence[int]) -> nn.Module:
    if spec.kind == "mednext":
        return MedNeXtBlock(a, b, kernel, stride, expansion=spec.expansion, norm=spec.norm)
    return (ResidualBlock if spec.kind == "residual" else ConvUnit)(a, b, kernel, stride, norm=spec.norm)


def _decoder(spec: NetworkSpec, stage: int, count: int) -> tuple[nn.Module, nn.Sequential]:
    """Return what brings the next lower resolution to that of a stage, and the units after the two have met."""
    deeper, width, kernel, stride = spec.features[stage + 1], spec.features[stage], spec.kernels[stage], spec.strides
    if spec.kind == "mednext":
        blocks = (_unit(spec, width, width, kernel, stride[0]) for _ in range(count))
        up = MedNeXtBlock(
            deeper, width, spec.kernels[stage + 1], stride[stage + 1], expansion=spec.expansion, up=True, norm=spec.norm
        )
        return up, nn.Sequential(*blocks)
    units = (ConvUnit(a, b, kernel, norm=spec.norm) for a, b in pairwise((2 * width, *(width,) * count)))
    transposed = TRANSPOSED_CONVOLUTION[spec.ndim]
    return transposed(deeper, width, stride[stage + 1], stride=stride[stage + 1]), nn.Sequential(*units)


class PluginNetwork(nn.Module):
    """The network of a plug-in: what ``segfit.networks`` names makes it of a `NetworkSpec`.

    It maps `(b, in_channels, *spatial)` to logits `(b, num_outputs, *spatial)`.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        assert spec.plugin is not None
        self.spec = spec
        self.deep_supervision = False  # it has one output
        self.num_heads = 1
        self.body: nn.Module = guarded("networks", spec.plugin, load_plugin("networks", spec.plugin))(spec)
        if not isinstance(self.body, nn.Module) or next(self.body.parameters(), None) is None:
            raise _unlike(spec, f"a torch.nn.Module with parameters, it made {type(self.body).__name__}")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        spec = self.spec
        result = guarded("networks", str(spec.plugin), self.body)(x)
        wanted = (x.shape[0], spec.num_outputs, *x.shape[2:])
        if not isinstance(result, Tensor) or result.shape != wanted:
            got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise _unlike(spec, f"logits of shape {wanted}, it gave {got}")
        return result


def _unlike(spec: NetworkSpec, what: str) -> InputError:
    return InputError(f"the plug-in {spec.plugin} (segfit.networks) must give {what}", "mend it, or leave it out")


def empty_network(spec: NetworkSpec) -> UNet | PluginNetwork:
    """Return a network with one output whose weights are to be loaded; those of a U-Net are nowhere yet."""
    if spec.plugin is not None:
        return PluginNetwork(spec)
    with torch.device("meta"):
        return UNet(spec, deep_supervision=False)


def build_network(
    spec: NetworkSpec, *, deep_supervision: bool, generator: torch.Generator | None = None
) -> UNet | PluginNetwork:
    """Build and initialise a network on the CPU, float32; without a generator torch's default one is used.

    A plug-in's network has the weights that it gives itself.
    """
    if spec.plugin is not None:
        with torch.random.fork_rng(devices=[]):
            if generator is not None:
                torch.default_generator.manual_seed(generator.initial_seed())  # not those of GPUs
            return PluginNetwork(spec)
    with torch.device("meta"):  # no memory is touched and no random number drawn before `_initialize`
        network = UNet(spec, deep_supervision=deep_supervision)
    network.to_empty(device="cpu")
    _initialize(network, generator)
    return network


@torch.no_grad()
def _initialize(network: UNet, generator: torch.Generator | None) -> None:
    """Kaiming normal weights and zero biases; normalisations start as identity, residual blocks as their shortcut.

    As in nnU-Net, the fan-in of a transposed convolution is taken from the second axis of its weight, which is
    its number of output channels. Weights of a MedNeXt are uniform, as PyTorch's: its shortcuts have no normalisation.
    """
    uniform = network.spec.kind == "mednext"
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d | Head):
            if uniform:
                nn.init.kaiming_uniform_(module.weight, a=sqrt(5), generator=generator)
            else:
                nn.init.kaiming_normal_(module.weight, a=SLOPE, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, InstanceNorm | BatchNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, BatchNorm):
            module.running_mean.zero_()
            module.running_var.fill_(1)
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.second.norm.get_parameter("weight"))
