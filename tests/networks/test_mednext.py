"""The MedNeXt: shapes, parameters and feature maps by closed form, what its blocks start as, and training it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, Literal

import pytest
import torch
from torch import nn

from segfit.feature_maps import network_elements
from segfit.networks.blocks import MedNeXtBlock
from segfit.networks.unet import build_network, empty_network
from segfit.specs import NetworkSpec
from segfit.training.muon import kernels_of

FLAT = ((1, 3, 3), (3, 3, 3), (3, 3, 3))
CONVOLUTIONS = nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d


def spec_of(ndim: Literal[2, 3] = 3, **values: Any) -> NetworkSpec:
    given: dict[str, Any] = {
        "ndim": ndim,
        "in_channels": 2,
        "num_outputs": 3,
        "features": (4, 6, 8),
        "strides": ((1,) * ndim, *((2,) * ndim,) * 2),
        "kernels": ((3,) * ndim,) * 3,
        "encoder_convs": (1, 2, 1),
        "decoder_convs": (2, 1),
    }
    return NetworkSpec(kind="mednext", **(given | values))


SPECS = [
    spec_of(2),
    spec_of(3),
    spec_of(3, kernels=FLAT, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), expansion=3),
    spec_of(3, kernels=((5, 5, 5),) * 3, norm="batch"),
]


def parameters_of_block(a: int, b: int, kernel: Sequence[int], expansion: int, *, resized: bool) -> int:
    """Depthwise convolution, normalisation, two 1x1 convolutions, and the one of the shortcut."""
    inner = expansion * a
    return a * prod(kernel) + a + 2 * a + (a * inner + inner) + (inner * b + b) + (a * b + b if resized else 0)


def parameters_of(spec: NetworkSpec) -> int:
    e, f = spec.expansion, spec.features
    total = spec.in_channels * f[0] + f[0]
    for width, kernel, count in zip(f, spec.kernels, spec.encoder_convs, strict=True):
        total += count * parameters_of_block(width, width, kernel, e, resized=False)
    for width, kernel, count in zip(f[:-1], spec.kernels, reversed(spec.decoder_convs), strict=False):
        total += count * parameters_of_block(width, width, kernel, e, resized=False)
        total += width * spec.num_outputs + spec.num_outputs
    for (upper, lower), kernel in zip(pairwise(f), spec.kernels[1:], strict=True):
        total += parameters_of_block(upper, lower, kernel, e, resized=True)
        total += parameters_of_block(lower, upper, kernel, e, resized=True)
    return total


@pytest.mark.parametrize("spec", SPECS)
def test_shapes_parameters_and_feature_maps(spec: NetworkSpec) -> None:
    network = build_network(spec, deep_supervision=True)
    made: list[int] = []
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS):
            module.register_forward_hook(lambda _, __, output: made.append(output[0].numel()))
    size = (16,) * spec.ndim
    outputs = network(torch.randn(2, 2, *size))
    lower = tuple(16 // stride for stride in spec.strides[1])
    assert [tuple(output.shape) for output in outputs] == [(2, 3, *size), (2, 3, *lower)]
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters_of(spec)
    assert network_elements(spec, size, heads=3) == sum(made) + 3 * prod(size)  # of the heads that of the top
    sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_published_size() -> None:
    """MedNeXt-S with kernels of 3 has 5.6 million parameters in its paper."""
    stages: dict[str, Any] = {
        "in_channels": 1,
        "num_outputs": 14,
        "features": (32, 64, 128, 256, 512),
        "strides": ((1, 1, 1), *((2, 2, 2),) * 4),
        "kernels": ((3, 3, 3),) * 5,
        "encoder_convs": (2,) * 5,
        "decoder_convs": (2,) * 4,
    }
    network = empty_network(spec_of(**stages))
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(5.6e6, rel=0.01)


@pytest.mark.parametrize("up", [False, True])
def test_block_is_what_it_says(up: bool) -> None:
    torch.manual_seed(0)
    block = MedNeXtBlock(3, 5, (1, 3, 3), (1, 2, 2), expansion=2, up=up)
    x = torch.randn(1, 3, 4, 6, 8)
    plain = block.norm(block.conv(x))
    inner = torch.einsum("bczyx,oc->bozyx", plain, block.expand.weight.flatten(1)) + block.expand.bias.view(-1, 1, 1, 1)
    mixed = torch.einsum("bczyx,oc->bozyx", nn.functional.gelu(inner), block.compress.weight.flatten(1))
    result = mixed + block.compress.bias.view(-1, 1, 1, 1) + block.shortcut(x)
    assert block(x).shape == (1, 5, 4, 12, 16) if up else (1, 5, 4, 3, 4)
    torch.testing.assert_close(block(x), result, rtol=1e-5, atol=1e-5)
    alone = x.clone()
    alone[:, 1:] = 0
    torch.testing.assert_close(block.conv(alone)[:, 0], block.conv(x)[:, 0])  # no channel sees another


def test_initial_weights_come_from_the_generator_alone() -> None:
    first, second, third = (
        build_network(spec_of(), deep_supervision=True, generator=torch.Generator().manual_seed(seed)).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.1.0.conv.weight"], third["encoder.1.0.conv.weight"])
    assert first["stem.weight"].abs().max() <= 2**-0.5  # uniform, by the two channels that come in


def test_channels_last_changes_nothing() -> None:
    network = build_network(spec_of(), deep_supervision=False, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = network(image)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload] # missing in torch's types
    found = network(image.contiguous(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_filters_of_single_channels_are_outputs_of_their_kernel() -> None:
    network = build_network(spec_of(), deep_supervision=True)
    kernels = kernels_of(network)
    up = network.get_submodule("upsample.0")
    assert isinstance(up, MedNeXtBlock)
    assert isinstance(up.shortcut, nn.ConvTranspose3d)
    assert kernels[up.conv.weight] == 0
    assert kernels[up.shortcut.weight] == 1
