"""Steps that are compiled or one CUDA graph: the same but for rounding, and the same as plain ones where that fails.

Without a GPU graphs are made by a stand-in; a backend that only traces stands in for the compiler but in one test.
"""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import Watcher, assert_same_weights, interrupt_at, train, weights
from test_parts import room_for
from torch import Tensor, nn
from training_fakes import SCHEME, tiny_configuration, tiny_recipe

from segfit.errors import Problem
from segfit.labels import LabelScheme
from segfit.specs import Acceleration
from segfit.training import acceleration, gradients
from segfit.training.batch import Batch
from segfit.training.events import read_events
from segfit.training.learner import Learner
from segfit.training.probe import probe_step
from segfit.training.result import EVENTS

CPU = torch.device("cpu")
COMPILED, GRAPH = Acceleration(compiled=True), Acceleration(graph=True)
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
IGNORING = LabelScheme.from_declaration({"background": 0, "disc": 1, "ignore": 2})


@pytest.fixture(autouse=True)
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(acceleration, "_BACKEND", "aot_eager")
    yield
    torch.compiler.reset()


def learner_of(ndim: int = 2, *, labels: LabelScheme = SCHEME, network: Any = None, **recipe: Any) -> Learner:
    plain = tiny_configuration(ndim)
    configuration = plain.model_copy(update={"network": plain.network.model_copy(update=network or {})})
    return Learner(configuration, tiny_recipe(augmentation={}, **recipe), labels, CPU, seed=0)


def batch_for(ndim: int, highest: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(highest + 1, (2, 1, *(16,) * ndim), generator=generator, dtype=torch.int16)
    return Batch(torch.randn((2, 1, *(16,) * ndim), generator=generator), labels)


def step(one: Learner, batch: Batch) -> Tensor:
    return one.step(batch, learning_rate=0.01, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("ndim", "labels", "network", "recipe"),
    [
        (2, SCHEME, {}, {}),
        (3, SCHEME, {}, {"precision": "bf16", "channels_last": True}),
        (2, REGIONS, {"norm": "batch", "kind": "residual"}, {"loss": "tversky+topk", "precision": "bf16"}),
        (3, IGNORING, {"kind": "residual"}, {"loss": "cldice+focal", "channels_last": True}),
        (2, IGNORING, {}, {"deep_supervision": False, "optimizer": "muon"}),
        (3, SCHEME, {"kind": "mednext"}, {"channels_last": True}),
    ],
)
def test_network_and_loss_are_compiled_as_one_graph_and_steps_are_the_same(
    ndim: int, labels: LabelScheme, network: dict[str, Any], recipe: dict[str, Any]
) -> None:
    plain, fast = (learner_of(ndim, labels=labels, network=network, **recipe) for _ in range(2))
    told: list[Problem] = []
    before = {name: tensor.clone() for name, tensor in fast.tensors().items()}
    assert fast.gradients.accelerate(COMPILED, told.append)  # a break of the graph would fail
    assert told == []
    torch.testing.assert_close(fast.tensors(), before, rtol=0, atol=0)
    batch = batch_for(ndim, 2 if labels is not SCHEME else 1)
    with torch.compiler.set_stance("fail_on_recompile"):  # what was compiled is what is run
        values = [(step(plain, batch), step(fast, batch)) for _ in range(2)]
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if recipe.get("precision") == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    for expected, found in values:
        torch.testing.assert_close(found, expected, **tolerance)
    assert fast.tensors().keys() == plain.tensors().keys()
    assert fast.weights().keys() == plain.weights().keys()
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(fast.weights()[name], tensor, **tolerance, msg=name)
    kernels = {**tolerance, "atol": max(tolerance["atol"], 1e-5)}  # prediction has convolutions of its own, uncompiled
    with fast.evaluating() as own, plain.evaluating() as other:
        torch.testing.assert_close(own(batch.image), other(batch.image), **kernels)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="the compiler needs one for C++")
def test_the_compiler_itself_gives_the_same() -> None:
    process = get_context("spawn").Process(target=compare_compiled_steps)  # without what other tests have imported
    process.start()
    process.join()
    assert process.exitcode == 0


def compare_compiled_steps() -> None:
    acceleration._BACKEND = "inductor"
    plain, fast = (learner_of() for _ in range(2))
    told: list[Problem] = []
    assert fast.gradients.accelerate(COMPILED, told.append), told
    batch = batch_for(2)
    for _ in range(3):
        torch.testing.assert_close(step(fast, batch), step(plain, batch), rtol=1e-4, atol=1e-5)


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no compiler was found; set os.environ to trust it")


@pytest.mark.parametrize(
    ("how", "backend"), [(COMPILED, broken), (GRAPH, "aot_eager"), (Acceleration(compiled=True, graph=True), "eager")]
)
def test_what_a_device_cannot_do_is_told_and_left_out(
    how: Acceleration, backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "_BACKEND", backend)
    train(tmp_path / "plain")
    watcher = Watcher()
    train(tmp_path / "told", acceleration=how, progress=watcher)
    assert [item.code for item in watcher.warned] == ["not_accelerated"]
    assert "environ" not in watcher.warned[0].problem
    assert_same_weights(tmp_path / "plain", tmp_path / "told")


def test_what_fails_on_the_way_back_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_broken(module: Any, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            result = module(*inputs)
            result[0].register_hook(broken)
            return result

        return run

    monkeypatch.setattr(acceleration, "_BACKEND", half_broken)
    one = learner_of(network={"norm": "batch"})
    before = {name: tensor.clone() for name, tensor in one.tensors().items()}
    told: list[Problem] = []
    assert not one.gradients.accelerate(COMPILED, told.append)
    assert len(told) == 1
    torch.testing.assert_close(one.tensors(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in one.network.parameters())


def test_a_training_is_the_same_one_however_its_steps_are_run(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    fast = train(tmp_path / "fast", acceleration=COMPILED)
    assert fast.identity == plain.identity
    assert fast.final_loss == pytest.approx(plain.final_loss, abs=1e-5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", acceleration=COMPILED, progress=Watcher(interrupt_at(3, KeyboardInterrupt())))
    train(tmp_path / "resumed", acceleration=COMPILED)
    assert_same_weights(tmp_path / "fast", tmp_path / "resumed")
    assert weights(tmp_path / "fast").keys() == weights(tmp_path / "plain").keys()


def test_without_memory_it_goes_on_plain_and_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def short(*_: Any) -> Any:
        nonlocal calls
        calls += 1
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gradients, "accelerated", lambda *_: short)
    watcher = Watcher()
    with room_for(1):
        train(tmp_path, acceleration=COMPILED, progress=watcher)
    assert calls == 1
    assert [item.code for item in watcher.warned] == ["out_of_memory"]
    assert [event["samples_at_once"] for event in read_events(tmp_path / EVENTS) if "samples_at_once" in event] == [1]


def test_nothing_is_made_faster_for_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "accelerated", lambda *_: pytest.fail("it was compiled in vain"))
    one = learner_of()
    one.gradients.divide()
    assert one.gradients.accelerate(COMPILED)


def test_a_graph_is_made_of_network_and_loss_with_a_batch_as_steps_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Tensor, Tensor]] = []
    run: list[tuple[Tensor, Tensor]] = []

    def graphed(whole: nn.Module, sample: tuple[Tensor, Tensor], *, allow_unused_input: bool = False) -> Any:
        """What torch does before it captures."""
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()
        assert whole.training
        torch.autograd.grad(whole(*sample), tuple(whole.parameters()), allow_unused=allow_unused_input)
        made.append(sample)

        def replayed(image: Tensor, labels: Tensor) -> Tensor:
            assert not image.requires_grad
            run.append((image, labels))
            return whole(image, labels)  # type: ignore[no-any-return]

        return replayed

    monkeypatch.setattr(acceleration, "_WITH_GRAPHS", ("cpu",))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    recipe = {"precision": "bf16", "channels_last": True}
    plain, fast = (learner_of(3, **recipe) for _ in range(2))
    assert fast.gradients.accelerate(GRAPH, lambda item: pytest.fail(str(item)))
    batch = batch_for(3)
    torch.testing.assert_close(step(fast, batch), step(plain, batch), rtol=1e-2, atol=1e-3)
    assert len(run) == 2  # tried once, then the step
    for sample, used in zip(made[0], run[1], strict=True):
        assert (sample.shape, sample.dtype, sample.stride()) == (used.shape, used.dtype, used.stride())


def test_steps_are_plain_again_and_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[None] = []
    reset = torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: (resets.append(None), reset()))
    one = learner_of()
    assert one.gradients.accelerate(None)
    assert not resets
    one.gradients.accelerate(COMPILED)
    module = weakref.ref(one.gradients._fast)  # type: ignore[arg-type]
    resets.clear()
    assert one.gradients.accelerate(None)
    assert len(resets) == 1
    gc.collect()
    assert module() is None
    assert step(one, batch_for(2)).isfinite().all()


def test_the_probe_tells_what_it_takes_and_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Problem] = []

    def cost(how: Acceleration | None) -> Any:
        return probe_step(tiny_configuration(), tiny_recipe(), SCHEME, CPU, steps=1, acceleration=how, tell=told.append)

    plain, compiled = cost(None), cost(COMPILED)
    assert 0 <= plain.setup_s < compiled.setup_s
    assert 0 < compiled.seconds_per_step < float("inf")
    assert told == []
    assert cost(GRAPH).seconds_per_step == float("inf")
    assert [item.code for item in told] == ["not_accelerated"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("how", [COMPILED, GRAPH, Acceleration(compiled=True, graph=True)])
@pytest.mark.parametrize("recipe", [{}, {"precision": "bf16", "channels_last": True}, {"precision": "fp16"}])
def test_on_a_card_steps_are_the_same(how: Acceleration, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceleration, "_BACKEND", "inductor")
    card = torch.device("cuda")
    plain, fast = (
        Learner(tiny_configuration(3), tiny_recipe(augmentation={}, **recipe), SCHEME, card, seed=0) for _ in range(2)
    )
    assert fast.gradients.accelerate(how, lambda item: pytest.fail(str(item)))
    batch = batch_for(3)
    for _ in range(5):
        torch.testing.assert_close(step(fast, batch), step(plain, batch), rtol=2e-2, atol=2e-3)
    for name, tensor in plain.weights().items():
        torch.testing.assert_close(fast.weights()[name], tensor, rtol=2e-2, atol=2e-3, msg=name)
