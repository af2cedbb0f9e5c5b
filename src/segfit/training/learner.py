"""Model, loss and optimiser of a training, with the average of the weights.

The gradient scaler decides on every device whether a gradient is finite: with fp16 it scales as usual, otherwise its
scale stays 1 and it only leaves out the optimiser's step, on a GPU without the host waiting for the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segfit.augmentation.policy import apply, draw, loaded_augmentation, of_samples
from segfit.augmentation.previous_stage import change, draw_changes, label_channels
from segfit.device import deterministic_kernels, is_memory_shortage
from segfit.errors import MemoryShortageError
from segfit.labels import LabelScheme
from segfit.networks.blocks import BatchNorm
from segfit.networks.unet import PluginNetwork, UNet, build_network
from segfit.specs import Configuration, TrainingSpec
from segfit.text import extent
from segfit.training.batch import Batch
from segfit.training.distributed import ALONE, Ranks
from segfit.training.gradients import Gradients
from segfit.training.loss import SegmentationLoss
from segfit.training.muon import Muon, kernels_of
from segfit.training.side_by_side import SideBySide
from segfit.training.side_stream import SideStream
from segfit.training.threads import kept_threads

__all__ = ["Learner", "training_on"]

_ADAM_BETA2 = 0.999  # torch's default


class Learner:
    """A network in training on one device.

    Everything random comes from `seed` (initial weights) or from the generator given to `step` (augmentation).
    Where several processes share a batch they have the same weights, and each is given its samples.
    """

    def __init__(
        self,
        configuration: Configuration,
        recipe: TrainingSpec,
        labels: LabelScheme,
        device: torch.device,
        *,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        spec = configuration.network
        self._ranks = ranks.for_batch(configuration.batch_size)
        self._patch = configuration.patch_size
        self._recipe = recipe
        seen = labels.foreground_values if configuration.previous_stage is not None else ()
        self._previous_values = torch.tensor(seen, dtype=torch.int16, device=device)  # of a cascade's first stage
        self.beside = SideStream(device)
        self.device = device
        self.loss = SegmentationLoss(labels, configuration.batch_dice, spec.strides, recipe, self._ranks)
        self._plugins = [loaded_augmentation(name) for name in recipe.augmentation.plugins]
        self.network: UNet | PluginNetwork = build_network(
            spec, deep_supervision=recipe.deep_supervision, generator=torch.Generator().manual_seed(seed)
        )
        self.network.num_heads = self.loss.num_heads
        if ranks.size > 1:
            for module in self.network.modules():
                if isinstance(module, BatchNorm):
                    module.pooled = self._ranks.pooled
        self.network.to(device)
        alone = self._ranks.size == 1
        self.gradients = Gradients(self.network, self.loss, configuration, recipe, device, alone=alone)
        self._changing = False  # the weights, which a step does at its end
        self._optimizer = _optimizer(recipe, self.network, device, self.gradients.side_by_side)
        self._scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if recipe.precision == "fp16" else 1.0)
        self._average = _WeightAverage(self.network, recipe.weight_average) if recipe.weight_average > 0 else None

    def step(self, batch: Batch, *, learning_rate: float, rng: np.random.Generator) -> Tensor:
        """Augment a raw batch, on any device, and learn from it once.

        A GPU augments it while it still learns from the batch before. One that is there already must have been made
        in `beside.working()`, or long ago.

        Returns the loss and the norm of the gradient before clipping, float32 on the device. With a norm that is not
        finite the weights stayed as they were.
        """
        groups = self.gradients.groups(len(batch.image))
        # Further threads would wait, or spin, while the groups work.
        with kept_threads(torch.get_num_threads() // groups):
            with self.beside.working():
                batch = self._augmented(batch, rng)
            self.beside.hand_over(batch.image, batch.labels)
            return self._step(batch, groups, learning_rate)

    def _augmented(self, batch: Batch, rng: np.random.Generator) -> Batch:
        """Return a raw batch as the network and the loss see it, on the device."""
        image, labels, whole = batch.image, batch.labels, batch.whole
        samples, channels = self._ranks.samples or image.shape[0], image.shape[1]
        parameters = draw(self._recipe.augmentation, self._patch, samples, channels, rng)
        parameters = of_samples(parameters, self._ranks.rows)
        image, labels = apply(parameters, *self._sent(image, labels), whole and self._sent(*whole))
        for augment in self._plugins:
            image, labels = augment(image, labels, self._ranks.own(rng))
        if len(self._previous_values):
            image, labels = self._with_previous_stage(image, labels, rng)
        return replace(batch, image=image, labels=labels, whole=None)

    def _sent(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return image.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _with_previous_stage(self, image: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Move what the previous stage predicted, augmented, from the labels to the image, a channel per label."""
        channels = label_channels(labels[:, 1], self._previous_values)
        whole = self._ranks.samples or len(image)
        drawn = draw_changes(self._recipe.augmentation, whole, len(self._previous_values), rng)
        for sample, changes in zip(channels, drawn[self._ranks.rows], strict=True):
            change(sample, changes)
        return torch.cat((image, channels.to(image.dtype)), 1), labels[:, :1]

    def _step(self, batch: Batch, groups: int, learning_rate: float) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self.network.train()
        self._optimizer.zero_grad(set_to_none=True)
        with self.gradients.repeatable():
            loss = self.gradients.backward(batch, groups, self._scaler.scale)
            self._ranks.sum_gradients(self.network.parameters())
        self._changing = True
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self._recipe.gradient_clip)
        self._scaler.step(self._optimizer)
        self._scaler.update(None if self._recipe.precision == "fp16" else 1.0)
        if self._average is not None:
            self._average.update()
        self._changing = False
        return torch.stack((loss.detach().float(), norm.float()))

    def can_divide(self) -> bool:
        """Whether a step that failed can be done again with fewer samples at once."""
        return self.gradients.at_once > 1 and self.can_repeat()

    def can_repeat(self) -> bool:
        """Whether a step that failed can be done again: it has changed no weight, and no other process took part."""
        return not self._changing and self._ranks.size == 1

    @contextmanager
    def evaluating(self) -> Iterator[UNet | PluginNetwork]:
        """Give the network as it will predict: one output, averaged weights where there are any, no gradients."""
        deep_supervision = self.network.deep_supervision
        self.network.eval()
        self.network.deep_supervision = False
        try:
            with torch.no_grad(), self._average.swapped_in() if self._average else nullcontext():
                yield self.network
        finally:
            self.network.deep_supervision = deep_supervision
            self.network.train()

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights that predict, float32 on the CPU, by parameter name."""
        with self.evaluating() as network:
            state = network.state_dict()
            return {
                name: tensor.to("cpu", torch.float32 if tensor.is_floating_point() else None, copy=True).contiguous()
                for name, tensor in state.items()
            }

    def take_over(self, weights: Mapping[str, Tensor]) -> None:
        """Have these weights before the first step."""
        own = self.network.state_dict()
        _copy(weights, {name: tensor for name, tensor in own.items() if name in weights})
        if self._average is not None:
            self._average.restore(own, 0)

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Have other weights for a while, by the names of the network."""
        average, self._average = self._average, None
        present = self.network.state_dict()
        own = {name: tensor.clone() for name, tensor in present.items()}
        _copy(weights, present)
        try:
            yield
        finally:
            _copy(own, present)
            self._average = average

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state, by name; they share memory with the learner."""
        result = {f"network/{name}": tensor for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    result[f"optimizer/{key}/{name}"] = value
        if self._average is not None:
            result |= {f"average/{name}": tensor for name, tensor in self._average.tensors.items()}
        return result

    def facts(self) -> dict[str, Any]:
        """Return the JSON-able rest of the state."""
        averaged = self._average.updates if self._average else 0
        return {"scaler": self._scaler.state_dict(), "averaged": averaged, "at_once": self.gradients.at_once}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over a state made by `tensors` and `facts`."""
        self.network.load_state_dict(_under("network/", tensors))
        grouped = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        index_of = {parameter: index for index, parameter in enumerate(grouped)}
        parameter_of = dict(self.network.named_parameters())
        slots: dict[int, dict[str, Tensor]] = {}
        for path, value in _under("optimizer/", tensors).items():
            key, _, name = path.partition("/")
            like = parameter_of[name]
            # In the parameter's own memory layout, or the optimiser's fused kernels cannot be used.
            slots.setdefault(index_of[like], {})[key] = (
                torch.empty_like(like).copy_(value) if value.shape == like.shape else value
            )
        self._optimizer.load_state_dict({"state": slots, "param_groups": self._optimizer.state_dict()["param_groups"]})
        self._scaler.load_state_dict(facts["scaler"])
        at_once = self.gradients.at_once
        self.gradients.at_once = min(at_once, facts.get("at_once", at_once))
        if self._average is not None:
            self._average.restore(_under("average/", tensors), facts["averaged"])


class _WeightAverage:
    """Exponential moving average of the weights.

    The decay starts low and rises to its value, `(1 + n) / (10 + n)` after n updates, so that the random initial
    weights do not weigh on short trainings.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        state = network.state_dict()  # shares memory with the network
        self._weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        self.tensors = {name: tensor.clone() for name, tensor in self._weights.items()}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average into the network for a while."""
        own = {name: tensor.clone() for name, tensor in self._weights.items()}
        _copy(self.tensors, self._weights)
        try:
            yield
        finally:
            _copy(own, self._weights)

    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take over a saved average."""
        _copy(tensors, self.tensors)
        self.updates = updates


@contextmanager
def training_on(configuration: Configuration, recipe: TrainingSpec, device: torch.device) -> Iterator[None]:
    """Work on a device: running out of its memory becomes one sentence (`MemoryShortageError`).

    On a GPU cuDNN chooses its kernels by trying them meanwhile, since every batch has the same shape; not where all
    kernels are to repeat themselves to the bit.
    """
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = benchmark or device.type == "cuda"
    try:
        with deterministic_kernels(recipe.deterministic):
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory_shortage(error):
            raise
        raise MemoryShortageError(
            f"{configuration.name} (patch {extent(configuration.patch_size)}, batch {configuration.batch_size}) "
            f"does not fit into the memory of {device}",
            "free memory there, or plan again with a smaller --memory",
        ) from None
    finally:
        torch.backends.cudnn.benchmark = benchmark


def _optimizer(
    recipe: TrainingSpec, network: nn.Module, device: torch.device, side_by_side: SideBySide
) -> torch.optim.Optimizer:
    """Return the optimiser over all parameters, weight decay on norms and biases too, as in nnU-Net.

    On a GPU the fused kernels, and Muon itself, leave out a non-finite step without asking the host.
    """
    fused = device.type == "cuda" or None
    momentum = recipe.momentum
    rates: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "muon":
        kernels = kernels_of(network)
        rest = [parameter for parameter in network.parameters() if parameter not in kernels]
        threads = side_by_side.map if device.type == "cpu" else None
        guarded = device.type == "cuda"
        return Muon(kernels, rest, momentum=momentum, side_by_side=threads, guarded=guarded, **rates)
    parameters = network.parameters()
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=momentum, nesterov=momentum > 0, fused=fused, **rates)
    return torch.optim.AdamW(parameters, betas=(momentum, _ADAM_BETA2), fused=fused, **rates)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
