"""Orthogonalised updates (Muon): the direction of every convolution kernel, the length of none.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024). The momentum of a kernel, seen as a
matrix of outputs by everything else, is replaced by the nearest matrix with equal singular values, found by five
Newton-Schulz steps. Norms, biases and heads, which are no such matrices, learn by gradient descent with momentum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "kernels_of", "orthogonalized"]

REST_RATE = 5 / 3
"""The learning rate of norms, biases and heads, in that of the kernels."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, chosen by its author for slope at zero
_STEPS = 5
_TINY = 1e-7
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)

_Alike = list[tuple[Tensor, Tensor]]
"""Kernels of one shape, outputs first, and their momenta as matrices."""


def kernels_of(network: nn.Module) -> dict[Tensor, int]:
    """Return the convolution kernels of a network, each with the axis that counts its outputs; heads are no kernels."""
    return {
        module.weight: 1 if isinstance(module, _TRANSPOSED) and module.groups == 1 else 0
        for module in network.modules()
        if isinstance(module, _CONVOLUTIONS + _TRANSPOSED)
    }


class Muon(torch.optim.Optimizer):
    """Muon for kernels, Nesterov's momentum for all other parameters; one learning rate, one momentum.

    Parameters
    ----------
    kernels : convolution kernels and the axis of each that counts its outputs
    rest : all other parameters; their rate is `REST_RATE` times the learning rate
    weight_decay : of all parameters, in the gradient for `rest`, directly for kernels
    side_by_side : does work on items on several threads, as `map` does on one; None: there is one
    guarded : take back a step with gradients that are not finite, by what a gradient scaler found, which then asks no
        GPU for it
    """

    def __init__(
        self,
        kernels: dict[Tensor, int],
        rest: Iterable[Tensor],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        side_by_side: Callable[[Callable[[_Alike], None], Iterable[_Alike]], object] | None = None,
        guarded: bool = False,
    ) -> None:
        self._side_by_side = side_by_side
        self._step_supports_amp_scaling = guarded  # torch's name for it
        self._output_axis = {id(kernel): axis for kernel, axis in kernels.items()}
        groups = [{"params": list(kernels)}, {"params": list(rest)}]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override] # no loss is returned
        """Take one step along the gradients; parameters without one stay as they are."""
        assert closure is None
        found: Tensor | None = getattr(self, "found_inf", None)  # set by the gradient scaler where this is guarded
        before = {} if found is None else {value: value.clone() for value in self._values()}
        for group, move in zip(self.param_groups, (self._orthogonal, self._descend), strict=True):
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                move(group, parameters, [parameter.grad for parameter in parameters])

        if found is not None:
            for value in self._values():
                old = before[value] if value in before else torch.zeros_like(value)  # a new momentum
                value.copy_(torch.where(found > 0, old, value))

    def _values(self) -> list[Tensor]:
        """Return the parameters that have a gradient, and their momenta."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        return [*parameters, *(self.state[p]["momentum_buffer"] for p in parameters if self.state[p])]

    def _directions(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        """Return the gradients after Nesterov's momentum."""
        momenta = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            momenta.append(state["momentum_buffer"])
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        return list(torch._foreach_add(gradients, momenta, alpha=group["momentum"]))

    def _descend(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        directions = self._directions(group, parameters, gradients)
        torch._foreach_add_(parameters, directions, alpha=-REST_RATE * group["lr"])

    def _orthogonal(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        directions = self._directions(group, parameters, gradients)
        alike: defaultdict[tuple[int, ...], _Alike] = defaultdict(list)  # kernels of one shape in one product
        for parameter, direction in zip(parameters, directions, strict=True):
            axis = self._output_axis[id(parameter)]
            matrix = direction.movedim(axis, 0).flatten(1)
            alike[tuple(matrix.shape)].append((parameter.movedim(axis, 0), matrix))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])

        @torch.no_grad()  # threads of their own start with gradients
        def move(kernels: _Alike) -> None:
            moved, matrices = zip(*kernels, strict=True)
            updates = orthogonalized(torch.stack(matrices))
            length = group["lr"] * max(1.0, updates.shape[1] / updates.shape[2]) ** 0.5
            for kernel, update in zip(moved, updates, strict=True):
                kernel.add_(update.view(kernel.shape), alpha=-length)

        if self._side_by_side is None:
            for kernels in alike.values():
                move(kernels)
            return
        halves = [kernels[start::2] for kernels in alike.values() for start in range(min(2, len(kernels)))]
        self._side_by_side(move, sorted(halves, key=lambda half: -sum(matrix.numel() for _, matrix in half)))


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return matrices `(n, rows, columns)` with all singular values near 1 and the singular vectors they have.

    Every Newton-Schulz step multiplies the matrix by a polynomial of its Gram matrix, and these commute: so the
    polynomials are multiplied first, in the smaller of both dimensions, and the matrix once.
    """
    turned = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if turned else matrices
    wide = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=_TINY)
    gram = wide @ wide.mT
    a, b, c = _COEFFICIENTS
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    product = polynomial = torch.baddbmm(b * gram, gram, gram, alpha=c) + a * identity
    for _ in range(_STEPS - 1):
        gram = polynomial @ gram @ polynomial
        polynomial = torch.baddbmm(b * gram, gram, gram, alpha=c) + a * identity
        product = polynomial @ product
    result: Tensor = product @ wide
    return result.mT if turned else result
