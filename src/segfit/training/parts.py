"""A batch in parts, one after the other, where memory does not suffice for all of it at once.

The gradient is that of the whole batch. First every part goes through the network without a gradient, and the loss is
taken of all outputs together, so that what it pools over the batch stays pooled. Then each part goes through again and
backwards, from the gradients of its outputs. That costs one forward pass more; the loss needs as much memory as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KeptBuffers", "backward_in_parts", "outputs_backward"]

Loss = Callable[[Any], Tensor]
Precision = Callable[[], AbstractContextManager[Any]]


class KeptBuffers:
    """What a network's forward pass changes of itself (running statistics), to be put back as it was."""

    def __init__(self, network: nn.Module) -> None:
        self._buffers = list(network.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Remember what they are now."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def put_back(self) -> None:
        """Make them what they were."""
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._kept)


def outputs_backward(
    parts: Sequence[Sequence[Tensor]], loss: Loss, scaled: Callable[[Tensor], Tensor], precision: Precision
) -> tuple[Tensor, list[list[Tensor]]]:
    """Return the loss of a batch, and per part its outputs as leaves that have their gradients.

    Parameters
    ----------
    parts : of the batch, each with its outputs
    loss : from the outputs for the whole batch, a tensor or a list of them
    scaled : the loss as the backward pass starts from it
    precision : context of the loss
    """
    ends = [[output.detach().requires_grad_() for output in outputs] for outputs in parts]
    whole = [torch.cat(outputs) for outputs in zip(*ends, strict=True)]
    with precision():
        value = loss(whole if len(whole) > 1 else whole[0])
    scaled(value).backward()  # type: ignore[no-untyped-call]
    return value.detach(), ends


def backward_in_parts(
    network: nn.Module,
    parts: Sequence[Tensor],
    loss: Loss,
    scaled: Callable[[Tensor], Tensor],
    precision: Precision,
    buffers: KeptBuffers,
) -> Tensor:
    """Add the gradients of a batch to those of the network's parameters; return the loss.

    Parameters are those of `outputs_backward`, `buffers` of the network, kept before. A layer that normalises over
    samples sees those of one part.
    """
    states = []
    outputs = []
    for part in parts:
        states.append(_random_state(part.device))
        with torch.no_grad(), precision():
            outputs.append(_as_list(network(part)))
    buffers.put_back()
    value, ends = outputs_backward(outputs, loss, scaled, precision)
    del outputs
    for part, state, leaves in zip(parts, states, ends, strict=True):
        _set_random_state(part.device, state)  # a layer that leaves out at random leaves out the same
        with precision():
            again = _as_list(network(part))
        used = [(output, leaf.grad) for output, leaf in zip(again, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([output for output, _ in used], [gradient for _, gradient in used])
    return value


def _as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
