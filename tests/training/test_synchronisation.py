"""A training step as on a GPU never waits for the device, and takes as many calls whatever batch and channels.

There is no GPU here: the step runs on the CPU, by the kernels and the augmentation of a GPU, and every call is watched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_fakes import SCHEME, disc_cases, tiny_configuration, tiny_recipe

from segfit.labels import Exchange, LabelScheme
from segfit.specs import AugmentationSpec
from segfit.training import learner as learner_module
from segfit.training.batch import Batch
from segfit.training.device_cases import DeviceCase
from segfit.training.learner import Learner
from segfit.training.sampler import PatchSampler
from segfit.training.threads import kept_threads

LABELS = LabelScheme.from_declaration({"background": 0, "left": 1, "right": 2})
REGIONS = LabelScheme.from_declaration(
    {"background": 0, "whole": [1, 2, 3], "core": [1, 3]} | {"a": 3}, regions_class_order=[2, 1, 3]
)
IGNORING = LabelScheme.from_declaration({"background": 0, "left": 1, "right": 2, "ignore": 3})
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "masked_select", "equal", "unique",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount",
}  # fmt: skip
"""Names of operations for which the host waits."""

SENT = "lift_fresh"
"""Name of the operation that begins what the host sends: arrays and constants."""


class Watch(TorchDispatchMode):
    """Counts calls, and fails on one for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        masks = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for group in args
            if isinstance(group, list | tuple)
            for index in group
        )
        if name in WAITING or masks:
            raise AssertionError(f"a GPU would be waited for: {func}")
        self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let steps on the CPU run as they would on a GPU."""
    optimizer = learner_module._optimizer
    monkeypatch.setattr(learner_module, "apply", partial(learner_module.apply, together=True))
    monkeypatch.setattr(
        learner_module,
        "_optimizer",
        lambda recipe, network, device, beside: optimizer(recipe, network, torch.device("cuda"), beside),
    )
    with kept_threads(1):  # a GPU has no groups side by side
        yield


def watched_step(
    *,
    ndim: int = 3,
    samples: int = 2,
    channels: int = 1,
    labels: LabelScheme = LABELS,
    watch: TorchDispatchMode | None = None,
    **recipe: Any,
) -> Watch:
    """Train twice, the second time watched: what is made once does not count."""
    configuration = tiny_configuration(ndim)
    outputs = len(labels.classes) + (not labels.has_regions)
    own = {name: recipe.pop(name) for name in ("kind", "norm") if name in recipe}
    network = configuration.network.model_copy(update={"in_channels": channels, "num_outputs": outputs, **own})
    configuration = configuration.model_copy(update={"batch_size": samples, "network": network})
    stock = set(AugmentationSpec.model_fields) - AugmentationSpec.LATER  # what is stronger goes sample by sample
    augmentation = AugmentationSpec(
        **{name: 1.0 for name in stock if name.endswith("_probability")},
        blur_sigma_range=(0.95, 1.0),  # kernels of one size
        sample_patch=(20,) * ndim,
        mirror_axes=tuple(range(ndim)),
        masked_channels=(0,),
        exchange=None if labels.has_regions else Exchange(axis=0, pairs=((1, 2),)),
    )
    learner = Learner(
        configuration, tiny_recipe(augmentation=augmentation, **recipe), labels, torch.device("cpu"), seed=0
    )
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((samples, channels, *(20,) * ndim), generator=generator)
    target = torch.randint(-1, 3, (samples, 1, *(20,) * ndim), generator=generator, dtype=torch.int16)
    step = partial(learner.step, Batch(image, target), learning_rate=0.01)
    step(rng=np.random.default_rng(0))
    with watch or nullcontext(), Watch() as calls:
        values = step(rng=np.random.default_rng(1))
    assert values.isfinite().all()
    return calls


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("labels", [LABELS, REGIONS, IGNORING])
def test_no_step_waits(optimizer: str, labels: LabelScheme) -> None:
    watch = watched_step(labels=labels, optimizer=optimizer, weight_average=0.9)
    assert watch.calls[SENT] == 1  # the parameters of the augmentation
    assert watch.calls["convolution"] > 0


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_in_two_dimensions_or_half_precision(precision: str) -> None:
    assert watched_step(ndim=2, precision=precision).calls["convolution"] > 0


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_step_of_a_mednext_waits() -> None:
    assert watched_step(kind="mednext").calls["convolution"] > 0


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_takes_as_many_calls_whatever_batch_and_channels() -> None:
    small, large = watched_step(samples=2, channels=1), watched_step(samples=7, channels=4)
    assert large.calls - small.calls == Counter()
    assert small.calls.total() < 1000


@pytest.mark.parametrize("samples", [2, 7])
def test_patches_are_cut_on_the_device_without_waiting(samples: int) -> None:
    recipe = tiny_recipe(augmentation=AugmentationSpec(sample_patch=(20, 20, 20)))
    configuration = tiny_configuration(3).model_copy(update={"batch_size": samples})
    cpu = torch.device("cpu")
    cases = disc_cases(3, (30, 28, 26))
    plain = PatchSampler.for_training(cases, configuration, recipe, SCHEME, seed=0)
    sampler = plain.on_device([DeviceCase(case, cpu) for case in cases], cpu)
    for step in range(4):  # by then all of them are there
        sampler.batch(step)
    with Watch() as watch:
        sampler.batch(4)
    assert watch.calls[SENT] == 0
    assert watch.calls["copy_"] == 2 * samples


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.zeros(())),
    ],
)
def test_what_waits_is_found(work: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="would be waited for"), Watch():
        work(torch.ones(2))


def test_constants_of_the_host_are_counted() -> None:
    with Watch() as watch:
        torch.tensor([1.0, 2.0])
        torch.from_numpy(np.ones(2))
    assert watch.calls == {SENT: 2}
