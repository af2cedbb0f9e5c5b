"""The network and its loss in one call, as fast as a GPU allows: compiled, as a CUDA graph, or both.

What comes out differs by rounding only. The network itself stays as it is: it is what is saved and what predicts.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from segfit.errors import Problem, reason_of, warning
from segfit.specs import Acceleration
from segfit.text import listing
from segfit.training.batch import Batch

__all__ = ["LossOfBatch", "accelerated", "loss_in_one"]

LossOfBatch = Callable[[Tensor, Tensor], Tensor]
"""From images and labels of a batch, both on the device, to the loss."""

_BACKEND = "inductor"
_WITH_GRAPHS = ("cuda",)


class _LossOfBatch(nn.Module):
    """The network with its loss."""

    def __init__(self, network: nn.Module, loss: Callable[[Any, Batch], Tensor]) -> None:
        super().__init__()
        self.network = network
        self._loss = loss

    def forward(self, image: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        return self._loss(self.network(image), Batch(image, labels))


def loss_in_one(network: nn.Module, loss: Callable[[Any, Batch], Tensor]) -> nn.Module:
    """Return what gives the loss of a batch, a `LossOfBatch`."""
    return _LossOfBatch(network, loss)


def accelerated(
    whole: nn.Module,
    how: Acceleration,
    image: Tensor,
    labels: Tensor,
    precision: Callable[..., AbstractContextManager[Any]],
    tell: Callable[[Problem], None],
) -> LossOfBatch | None:
    """Return a faster twin of `loss_in_one`, None where there is none here, which `tell` is told with the reason.

    It is tried on a batch forwards and backwards, which may take minutes and changes running statistics. What there is
    of gradients goes. All batches must have the size, layout and kind of this one. What the process compiled before is
    compiled anew when it is next called.

    Parameters
    ----------
    precision : context of forward passes; takes `cache_enabled`
    """
    parameters = list(whole.parameters())
    reason = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how torch works
            made = _made(whole, how, image, labels, precision)
            with precision():
                loss = made(image, labels)
            loss.backward()  # type: ignore[no-untyped-call]
        if image.device.type == "cuda":
            torch.cuda.synchronize(image.device)  # what went wrong is told by now
    except Exception as error:  # noqa: BLE001 - of compilers and drivers; what else is wrong fails again without
        reason = reason_of(error).partition("from user code:")[0].strip() or type(error).__name__
    for parameter in parameters:
        parameter.grad = None
    if not reason:
        return made
    gc.collect()  # not before: the error held what was made
    if image.device.type == "cuda":
        torch.cuda.empty_cache()
    ways = listing([name for name, wanted in (("compiled", how.compiled), ("a CUDA graph", how.graph)) if wanted])
    tell(
        warning(
            "not_accelerated",
            f"the steps are not {ways} on {image.device}: {reason[:300]}",
            "they give the same without, in more time",
        )
    )
    return None


def _made(
    whole: nn.Module,
    how: Acceleration,
    image: Tensor,
    labels: Tensor,
    precision: Callable[..., AbstractContextManager[Any]],
) -> LossOfBatch:
    if how.graph and image.device.type not in _WITH_GRAPHS:
        raise ValueError("only CUDA has graphs")
    if how.compiled:
        torch.compiler.reset()  # forgets what was compiled for other trainings, and frees their graphs
        mode = "reduce-overhead" if how.graph else None  # that is by graphs
        return torch.compile(whole, backend=_BACKEND, fullgraph=True, dynamic=False, mode=mode)
    # A graph keeps no weights that were cast outside, and outputs without a weight are not computed.
    with torch.cuda.device(image.device), precision(cache_enabled=False):
        graphed: Any = torch.cuda.make_graphed_callables(whole, (image, labels), allow_unused_input=True)
    return graphed  # type: ignore[no-any-return]
