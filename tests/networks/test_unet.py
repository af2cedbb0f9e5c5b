from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from segfit.networks.blocks import ConvUnit
from segfit.networks.unet import build_network
from segfit.specs import NetworkSpec


def spec_of(kind: Literal["plain", "residual"] = "plain", ndim: Literal[2, 3] = 3, stages: int = 4) -> NetworkSpec:
    return NetworkSpec(
        kind=kind,
        ndim=ndim,
        in_channels=2,
        num_outputs=3,
        features=(4, 6, 8, 8)[:stages],
        strides=((1,) * ndim, *((2,) * ndim,) * (stages - 1)),
        kernels=((3,) * ndim,) * stages,
        encoder_convs=(1, 2, 1, 1)[:stages],
        decoder_convs=(1,) * (stages - 1),
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_number_of_outputs_can_be_changed(kind: Literal["plain", "residual"], ndim: Literal[2, 3]) -> None:
    network = build_network(spec_of(kind, ndim), deep_supervision=True)
    image = torch.randn(1, 2, *(16,) * ndim, generator=seeded(0))
    outputs = network(image)
    assert [tuple(output.shape) for output in outputs] == [(1, 3, *(n,) * ndim) for n in (16, 8, 4)]
    network.num_heads = 2
    fewer = network(image)
    assert len(fewer) == 2
    assert all(torch.equal(a, b) for a, b in zip(fewer, outputs, strict=False))
    sum(output.sum() for output in fewer).backward()
    unused = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert unused == ["heads.0.weight", "heads.0.bias"]
    network.deep_supervision = False
    assert torch.equal(network(image), outputs[0])


def test_two_stages() -> None:
    network = build_network(spec_of(stages=2), deep_supervision=True)
    (output,) = network(torch.zeros(1, 2, 4, 4, 4))
    assert output.shape == (1, 3, 4, 4, 4)


def test_initial_weights_come_from_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, third = (
        build_network(spec_of(), deep_supervision=True, generator=seeded(seed)).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["encoder.0.0.conv.weight"], third["encoder.0.0.conv.weight"])


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_channels_last_survives_every_unit(kind: Literal["plain", "residual"]) -> None:
    network = build_network(spec_of(kind), deep_supervision=True).to(memory_format=torch.channels_last_3d)
    seen: list[str] = []

    def check(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert output.is_contiguous(memory_format=torch.channels_last_3d)
        seen.append(type(module).__name__)

    for module in network.modules():
        if isinstance(module, ConvUnit | nn.ConvTranspose3d) and not (
            kind == "residual" and module in [getattr(block, "shortcut", None) for block in network.modules()]
        ):
            module.register_forward_hook(check)
    image = torch.randn(2, 2, 16, 16, 16, generator=seeded(0)).contiguous(memory_format=torch.channels_last_3d)
    network(image)
    assert seen.count("ConvTranspose3d") == 3
    assert seen.count("ConvUnit") >= 8
