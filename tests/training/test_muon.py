"""Orthogonalised updates against a plain implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from segfit.networks.unet import build_network
from segfit.specs import NetworkSpec
from segfit.training.muon import REST_RATE, Muon, kernels_of, orthogonalized


def plain_newton_schulz(matrix: Tensor) -> Tensor:
    """The published iteration, one matrix at a time."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / matrix.norm()
    if x.shape[0] > x.shape[1]:
        return plain_newton_schulz(matrix.T).T
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 9), (32, 288), (96, 16), (64, 64)])
def test_all_matrices_of_a_stack_are_orthogonalised(shape: tuple[int, int]) -> None:
    matrices = torch.randn((3, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonalized(matrices)
    for matrix, result in zip(matrices, found, strict=True):
        torch.testing.assert_close(result, plain_newton_schulz(matrix), rtol=1e-9, atol=1e-9)
    values = torch.linalg.svdvals(found)
    assert values.max() < 1.3
    assert values.median() > 0.6


def test_single_precision_suffices_for_badly_conditioned_matrices() -> None:
    u, _, v = torch.linalg.svd(torch.randn((64, 256), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    matrix = u @ torch.diag(torch.logspace(0, -5, 64, dtype=torch.float64)) @ v[:64]
    exact = orthogonalized(matrix[None])[0]
    assert (orthogonalized(matrix.float()[None])[0] - exact).abs().max() < 2e-3 * exact.abs().max()


def test_a_matrix_of_zeros_stays() -> None:
    assert not orthogonalized(torch.zeros(1, 4, 6)).any()


def network() -> torch.nn.Module:
    spec = NetworkSpec(
        kind="plain",
        ndim=2,
        in_channels=1,
        num_outputs=2,
        features=(4, 8),
        strides=((1, 1), (2, 2)),
        kernels=((3, 3), (3, 3)),
        encoder_convs=(1, 1),
        decoder_convs=(1,),
    )
    return build_network(spec, deep_supervision=False, generator=torch.Generator().manual_seed(0))


def test_a_step_is_that_of_a_plain_implementation() -> None:
    net = network()
    kernels = kernels_of(net)
    names = {name for name, parameter in net.named_parameters() if parameter in kernels}
    assert names == {
        "encoder.0.0.conv.weight",
        "encoder.1.0.conv.weight",
        "decoder.0.0.conv.weight",
        "upsample.0.weight",
    }
    rest = [parameter for parameter in net.parameters() if parameter not in kernels]
    optimizer = Muon(kernels, rest, lr=0.03, momentum=0.95, weight_decay=0.01)
    expected = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    momenta = {name: torch.zeros_like(value) for name, value in expected.items()}
    x = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            gradient, value, is_kernel = parameter.grad.clone(), expected[name], name in names
            if not is_kernel:
                gradient += 0.01 * value
            momenta[name] = 0.95 * momenta[name] + gradient
            direction = gradient + 0.95 * momenta[name]
            if not is_kernel:
                expected[name] = value - REST_RATE * 0.03 * direction
                continue
            axis = 1 if name.startswith("upsample") else 0
            matrix = direction.movedim(axis, 0).flatten(1)
            update = plain_newton_schulz(matrix).view(direction.movedim(axis, 0).shape).movedim(0, axis)
            length = 0.03 * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            expected[name] = value * (1 - 0.03 * 0.01) - length * update
        optimizer.step()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-5)


def test_a_guarded_step_is_taken_back_where_gradients_are_not_finite() -> None:
    """The scaler hands over what it found; on a CPU it asks, and leaves the step out."""
    networks, optimizers = [network(), network()], []
    for net, guarded in zip(networks, (True, False), strict=True):
        kernels = kernels_of(net)
        rest = [parameter for parameter in net.parameters() if parameter not in kernels]
        optimizers.append(Muon(kernels, rest, lr=0.1, momentum=0.9, weight_decay=0.01, guarded=guarded))
    scalers = [torch.amp.GradScaler("cpu", init_scale=1.0) for _ in networks]
    for number, factor in enumerate((float("nan"), 1.0, 1.0, float("inf"), 1.0)):
        for net, optimizer, scaler in zip(networks, optimizers, scalers, strict=True):
            before = {name: value.clone() for name, value in net.state_dict().items()}
            optimizer.zero_grad()
            image = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(number))
            scaler.scale(net(image).square().mean() * factor).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(1.0)
            moved = any(not torch.equal(before[name], value) for name, value in net.state_dict().items())
            assert moved == (factor == 1.0)
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, other)
