"""Batches in parts, where memory does not suffice for all at once: same gradient, told, kept in what goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import Watcher, assert_same_weights, interrupt_at, train
from torch import Tensor, nn
from training_fakes import SCHEME, tiny_configuration, tiny_recipe

from segfit.errors import MemoryShortageError
from segfit.labels import LabelScheme
from segfit.networks.unet import build_network
from segfit.training.batch import Batch
from segfit.training.events import read_events
from segfit.training.learner import Learner
from segfit.training.loss import SegmentationLoss
from segfit.training.parts import KeptBuffers, backward_in_parts
from segfit.training.result import EVENTS
from segfit.training.threads import kept_threads

CPU = torch.device("cpu")
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
IGNORING = LabelScheme.from_declaration({"background": 0, "disc": 1, "ignore": 2})
FAILURES: list[Callable[[], Exception]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    MemoryError,
]


@pytest.fixture(autouse=True)
def no_groups() -> Iterator[None]:
    """Have all samples of a batch go through the network together, however many processors there are."""
    with kept_threads(1):
        yield


@contextmanager
def room_for(samples: int, failure: Callable[[], Exception] = FAILURES[0], *, backward: bool = False) -> Iterator[None]:
    """Have networks in training fail when more samples than that go through them with a gradient, or backwards."""

    def fail(*_: Any) -> None:
        raise failure()

    def after(module: nn.Module, arguments: tuple[Tensor, ...], outputs: Any) -> None:
        if module.training and hasattr(module, "num_heads") and torch.is_grad_enabled() and len(arguments[0]) > samples:
            if not backward:
                fail()
            outputs[0].register_hook(fail)

    handle = nn.modules.module.register_module_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("labels", [SCHEME, REGIONS, IGNORING])
@pytest.mark.parametrize("loss", ["dice+ce", "dice+topk", "tversky+focal", "cldice"])
def test_the_gradient_is_that_of_the_whole_batch(loss: str, labels: LabelScheme, batch_dice: bool) -> None:
    spec = tiny_configuration().network.model_copy(update={"num_outputs": 2})
    measure = SegmentationLoss(labels, batch_dice, spec.strides, tiny_recipe(loss=loss))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((5, 1, 16, 16), generator=generator, dtype=torch.float64)
    target = torch.randint(3 if labels is not SCHEME else 2, (5, 1, 16, 16), generator=generator, dtype=torch.int16)
    target[3] = labels.ignore_value or 0  # samples differ in how much of them counts
    found: list[tuple[Tensor, list[Tensor | None]]] = []
    for size in (5, 2, 1):
        network = build_network(spec, deep_supervision=True, generator=torch.Generator().manual_seed(1)).double()
        network.num_heads = measure.num_heads

        def compared(outputs: Any) -> Tensor:
            return measure(outputs, Batch(image, target))

        if size == 5:
            value = compared(network(image))
            value.backward()
        else:
            parts = image.split(size)
            value = backward_in_parts(network, parts, compared, lambda x: x, nullcontext, KeptBuffers(network))
        found.append((value.detach(), [parameter.grad for parameter in network.parameters()]))
    for value, gradients in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recipe", [{}, {"precision": "bf16"}, {"precision": "fp16"}, {"optimizer": "muon"}])
def test_a_step_in_parts_is_the_step(recipe: dict[str, Any]) -> None:
    configuration = tiny_configuration().model_copy(update={"batch_size": 4})
    image = torch.randn((4, 1, 20, 20), generator=torch.Generator().manual_seed(1))
    batch = Batch(image, (image > 0.5).to(torch.int16))
    found = []
    for divisions in (0, 1, 2):
        learner = Learner(configuration, tiny_recipe(**recipe), SCHEME, CPU, seed=0)
        for _ in range(divisions):
            learner.gradients.divide()
        assert learner.gradients.at_once == 4 // 2**divisions
        values = learner.step(batch, learning_rate=1e-3, rng=np.random.default_rng(0))
        found.append((values, learner.weights()))
    for values, weights in found[1:]:
        torch.testing.assert_close(values, found[0][0], rtol=1e-2 if "precision" in recipe else 1e-5, atol=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, found[0][1][name], rtol=0, atol=1e-5 if recipe else 1e-6, msg=name)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_step_without_memory_is_repeated_in_parts(
    tmp_path: Path, failure: Callable[[], Exception], backward: bool, threads: int
) -> None:
    configuration = tiny_configuration().model_copy(update={"batch_size": 5})
    with room_for(5):
        whole = train(tmp_path / "whole", configuration=configuration)
    watcher = Watcher()
    with room_for(2, failure, backward=backward), kept_threads(threads):  # two are groups of three and two samples
        parts = train(tmp_path / "parts", configuration=configuration, progress=watcher)
    told = [event for event in read_events(tmp_path / "parts" / EVENTS) if event["kind"] == "out_of_memory"]
    assert told == [
        {"kind": "out_of_memory", "step": 1, "batch": 5, "samples_at_once": number, "exact": True} for number in (3, 2)
    ]
    assert [item.code for item in watcher.warned] == ["out_of_memory"] * 2
    assert parts.steps == whole.steps == 6
    assert parts.final_loss == pytest.approx(whole.final_loss, abs=1e-4)


def test_what_runs_out_of_memory_later_goes_on_in_parts_and_so_when_resumed(tmp_path: Path) -> None:
    resumed, straight = tmp_path / "resumed", tmp_path / "straight"

    def halved(folder: Path, stop: int | None) -> None:
        with pytest.raises(KeyboardInterrupt):  # by hand after two steps; then there is less room
            train(folder, progress=Watcher(interrupt_at(2, KeyboardInterrupt())))
        with room_for(1):
            if stop is not None:
                with pytest.raises(KeyboardInterrupt):
                    train(folder, progress=Watcher(interrupt_at(stop, KeyboardInterrupt())))
            else:
                train(folder)

    halved(straight, None)
    halved(resumed, 2)  # of those that are told: after step 4
    seen: list[int] = []
    step = Learner.step

    def watched(self: Learner, *arguments: Any, **named: Any) -> Tensor:
        seen.append(self.gradients.at_once)
        return step(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", watched)
        train(resumed)  # with all the room there was at first
    assert seen == [1, 1]
    assert_same_weights(straight, resumed)
    for folder in (straight, resumed):
        events = read_events(folder / EVENTS)
        assert [event["step"] for event in events if event["kind"] == "out_of_memory"] == [3]
        assert [event["step"] for event in events if event["kind"] == "step"] == [1, 2, 3, 4, 5, 6]


def test_a_process_killed_after_it_ran_out_of_memory_goes_on_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import sys; from pathlib import Path; from test_loop import train\n"
        "from segfit.training.threads import kept_threads; from test_parts import room_for\n"
        "with room_for(1), kept_threads(1): train(Path(sys.argv[1]), steps=60, checkpoint_seconds=0.0)"
    )
    here = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((here, os.environ.get("PYTHONPATH", "")))}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")], env=environment)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "killed/state").glob("step-*")):
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with room_for(1):
        train(tmp_path / "straight", steps=60)
    seen = set()
    step = Learner.step

    def watched(self: Learner, *arguments: Any, **named: Any) -> Tensor:
        seen.add(self.gradients.at_once)
        return step(self, *arguments, **named)

    monkeypatch.setattr(Learner, "step", watched)
    train(tmp_path / "killed", steps=60)
    assert seen == {1}
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")


def test_a_sample_that_does_not_fit_by_itself_is_refused(tmp_path: Path) -> None:
    watcher = Watcher()
    with room_for(0), pytest.raises(MemoryShortageError, match="does not fit into the memory of cpu"):
        train(tmp_path, progress=watcher)
    assert len(watcher.warned) == 1  # of two samples one was tried


def test_what_is_no_lack_of_memory_is_not_repeated(tmp_path: Path) -> None:
    watcher = Watcher()
    with room_for(1, lambda: RuntimeError("mat1 and mat2")), pytest.raises(RuntimeError, match="mat1"):
        train(tmp_path, progress=watcher)
    assert not watcher.warned


def test_a_step_that_changed_weights_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    watcher = Watcher()
    with pytest.raises(MemoryShortageError):
        train(tmp_path, progress=watcher)
    assert not watcher.warned


@pytest.mark.parametrize("backward", [False, True])
def test_an_attempt_that_failed_leaves_no_trace(backward: bool) -> None:
    plain = tiny_configuration()
    configuration = plain.model_copy(update={"network": plain.network.model_copy(update={"norm": "batch"})})
    learner = Learner(configuration, tiny_recipe(weight_average=0.9), SCHEME, CPU, seed=0)
    assert not learner.gradients.divides_exactly
    image = torch.randn((2, 1, 20, 20), generator=torch.Generator().manual_seed(1))
    batch = Batch(image, (image > 0.5).to(torch.int16))

    def step() -> None:
        learner.step(batch, learning_rate=1e-2, rng=np.random.default_rng(0))

    step()
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    assert any("running_mean" in name and tensor.any() for name, tensor in before.items())
    with room_for(1, backward=backward), pytest.raises(torch.OutOfMemoryError):
        step()
    torch.testing.assert_close(learner.tensors(), before, rtol=0, atol=0)
    learner.gradients.divide()
    with room_for(1):
        step()
    after = learner.tensors()
    counted = [name for name in after if name.endswith("num_batches_tracked")]
    assert all(int(after[name]) == int(before[name]) + 2 for name in counted)  # the first of two passes left nothing


def test_samples_at_once_are_those_of_the_smaller_state() -> None:
    configuration = tiny_configuration().model_copy(update={"batch_size": 8})
    divided, fresh = (Learner(configuration, tiny_recipe(), SCHEME, CPU, seed=0) for _ in range(2))
    whole = divided.facts()
    divided.gradients.divide()
    fresh.restore(divided.tensors(), divided.facts())
    assert fresh.gradients.at_once == 4
    fresh.restore(divided.tensors(), whole)  # of an earlier step: there is no more room for that
    assert fresh.gradients.at_once == 4
    del whole["at_once"]  # saved by an earlier version
    fresh.restore(divided.tensors(), whole)
    assert fresh.gradients.at_once == 4


def test_a_plug_in_that_leaves_out_at_random_leaves_out_the_same_in_both_passes() -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)).double()
    image = torch.randn((4, 1, 8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    seen: list[Tensor] = []
    network[1].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    backward_in_parts(
        network, image.split(2), lambda x: x.square().mean(), lambda x: x, nullcontext, KeptBuffers(network)
    )
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0] == 0, seen[1] == 0)
