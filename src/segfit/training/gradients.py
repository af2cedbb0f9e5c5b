"""The gradient of a batch, by the way that suits: at once, side by side on a CPU, in parts, or as fast as a GPU allows.

All give the gradient of the whole batch; they differ by rounding only.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from segfit.errors import Problem
from segfit.networks.unet import PluginNetwork, UNet
from segfit.specs import Acceleration, Configuration, TrainingSpec
from segfit.training.acceleration import LossOfBatch, accelerated, loss_in_one
from segfit.training.batch import Batch
from segfit.training.loss import SegmentationLoss
from segfit.training.parts import KeptBuffers, backward_in_parts
from segfit.training.side_by_side import SideBySide

__all__ = ["Gradients"]

_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Gradients:
    """Computes losses and gradients of a network that is on its device.

    `at_once` samples go through the network together: the batch, until `divide`.
    """

    def __init__(
        self,
        network: UNet | PluginNetwork,
        loss: SegmentationLoss,
        configuration: Configuration,
        recipe: TrainingSpec,
        device: torch.device,
        *,
        alone: bool,
    ) -> None:
        """`alone`: no other process has samples of the batch."""
        spec = configuration.network
        self._network, self._loss, self._device, self._alone = network, loss, device, alone
        self._precision = recipe.precision
        self._shape = spec.in_channels, *configuration.patch_size
        self._format = torch.preserve_format
        if recipe.channels_last:
            self._format = torch.channels_last if spec.ndim == 2 else torch.channels_last_3d
            network.to(memory_format=self._format)  # type: ignore[call-overload] # missing in torch's types
        # Samples that are normalised together stay together; of a plug-in's network that is not known.
        together = spec.norm == "batch" or spec.plugin is not None
        self.divides_exactly = not together
        self.at_once = self._batch_size = configuration.batch_size
        self._buffers = KeptBuffers(network)
        self._fast: LossOfBatch | None = None  # see `accelerate`
        least = 2 if spec.ndim == 3 and recipe.precision == "fp32" else 1
        self.side_by_side = SideBySide(device, least=configuration.batch_size if together else least)

    def precision(self, *, cache_enabled: bool = True) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        name = self._precision
        return torch.autocast(self._device.type, _PRECISION[name], enabled=name != "fp32", cache_enabled=cache_enabled)

    def to_device(self, image: Tensor) -> Tensor:
        """Return an image batch ``(b, c, *spatial)`` on the device, in the memory format of the network."""
        return image.to(self._device, non_blocking=True, memory_format=self._format)

    def accelerate(self, how: Acceleration | None, tell: Callable[[Problem], None] = lambda _: None) -> bool:
        """Have steps run so from now on, which takes up to minutes; what is not possible here is told and left out.

        None has them plain again, and frees what they held. Returns whether it is possible.
        """
        if self._fast is not None:
            self._fast = None
            torch.compiler.reset()  # which keeps the graphs of what was compiled
        # Parts are computed plainly; what several processes tell each other is in no graph.
        if how is None or how == Acceleration() or self.at_once < self._batch_size or not self._alone:
            return True
        image = self.to_device(torch.zeros((self.at_once, *self._shape)))
        labels = torch.zeros((self.at_once, 1, *self._shape[1:]), dtype=torch.int16, device=self._device)
        whole = loss_in_one(self._network, self._loss).train()
        self._buffers.keep()
        self._fast = accelerated(whole, how, image, labels, self.precision, tell)
        self._buffers.put_back()
        return self._fast is not None

    def groups(self, samples: int) -> int:
        """Return in how many groups, side by side, a batch of so many samples is computed from now on."""
        alone = samples > self.at_once or self._fast is not None
        return self.side_by_side.arrange(1 if alone else samples)

    @contextmanager
    def repeatable(self) -> Iterator[None]:
        """Put back what a forward pass changes of the network if what is done inside fails."""
        self._buffers.keep()
        try:
            yield
        except BaseException:
            self._buffers.put_back()
            raise

    def backward(self, batch: Batch, groups: int, scaled: Callable[[Tensor], Tensor]) -> Tensor:
        """Set the gradients for an augmented batch, with a loss that is `scaled`; return the loss as it is.

        Inside of `repeatable`, with the number of `groups` that there are.
        """

        def loss_of(outputs: Any) -> Tensor:
            return self._loss(outputs, batch)

        if self.at_once < len(batch.image):
            parts = [self.to_device(part) for part in torch.split(batch.image, self.at_once)]
            return backward_in_parts(self._network, parts, loss_of, scaled, self.precision, self._buffers)
        if groups > 1:
            parts = [self.to_device(part) for part in batch.image.chunk(groups)]
            return self.side_by_side.backward(self._network, parts, loss_of, scaled, self.precision)
        image = self.to_device(batch.image)
        with self.precision():
            fast = self._fast
            loss = loss_of(self._network(image)) if fast is None else fast(image, batch.labels.contiguous())
        scaled(loss).backward()  # type: ignore[no-untyped-call]
        return loss

    def divide(self) -> None:
        """Have half as many samples go through the network at once from now on; the gradient stays the batch's."""
        self.at_once = (self.at_once + 1) // 2
        self.accelerate(None)
        self._network.zero_grad(set_to_none=True)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
