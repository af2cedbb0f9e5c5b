"""What runs networks in place of torch: the same results, chosen by time, with a way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segfit.bundle.bundle import Member, open_bundle
from segfit.errors import InputError
from segfit.inference import engines
from segfit.inference.engines import FasterOf, Remembering, require_engine
from segfit.inference.model import Model
from segfit.specs import Configuration

CPU = torch.device("cpu")


class Slow(nn.Module):
    """Adds a number to its views, in a time of its own on a clock that stands still otherwise."""

    def __init__(self, clock: list[float], seconds: float, number: float = 1.0) -> None:
        super().__init__()
        self.clock, self.seconds, self.number = clock, seconds, number
        self.calls = 0

    def forward(self, views: Tensor) -> Tensor:
        self.clock[0] += self.seconds * len(views)
        self.calls += 1
        return views + self.number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(engines, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("seconds", "taken"), [(0.5, True), (0.99, False), (2.0, False)])
def test_the_faster_way_is_taken_after_a_while(clock: list[float], seconds: float, taken: bool) -> None:
    first, second = Slow(clock, 1.0), Slow(clock, seconds, 1.0)
    network = FasterOf(first, lambda: second, patience_s=5.0)
    for number in (1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1):
        assert torch.equal(network(torch.zeros(number, 1, 2, 2)), torch.ones(number, 1, 2, 2))
    assert first.calls == (5 if taken else 8)  # 5 s, then three by the other way, and one to compare
    assert second.calls == (7 if taken else 3)


def test_a_faster_way_that_differs_is_not_taken(clock: list[float]) -> None:
    first, second = Slow(clock, 1.0), Slow(clock, 0.1, 1.001)
    network = FasterOf(first, lambda: second, patience_s=3.0)
    for _ in range(9):
        last = network(torch.zeros(1, 1, 2, 2))
    assert second.calls == 3
    assert torch.equal(last, torch.ones(1, 1, 2, 2))


def test_little_work_sets_up_no_engine(clock: list[float]) -> None:
    def never() -> nn.Module:
        raise AssertionError

    network = FasterOf(Slow(clock, 0.1), never, patience_s=5.0)
    for _ in range(40):
        network(torch.zeros(1, 1, 2, 2))


def test_an_engine_that_fails_leaves_the_work_to_torch(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> nn.Module:
        raise RuntimeError("no such kernel")

    first = Slow(clock, 10.0)
    network = FasterOf(first, broken)
    for _ in range(5):
        network(torch.zeros(1, 1, 2, 2))
    assert first.calls == 5
    assert [record.code for record in caplog.records] == ["engine"]


def test_views_of_one_value_are_computed_once(clock: list[float]) -> None:
    inner = Slow(clock, 1.0)
    network = Remembering(inner)
    noise = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    flat = torch.stack([torch.full((4, 4), 0.25), torch.full((4, 4), -1.0)])[None]
    for views in (flat, noise, flat, torch.cat([flat, flat]), noise, flat):
        assert torch.equal(network(views), views + 1)
    assert inner.calls == 3
    network(flat + 1)
    network(flat)
    assert inner.calls == 5  # the last value is kept
    mixed = torch.cat([flat, noise])
    assert torch.equal(network(mixed), mixed + 1)
    assert torch.isnan(network(torch.full((1, 1, 2, 2), torch.nan))).all()


def test_large_logits_are_not_kept(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_MOST_KEPT", 8)
    inner = Slow(clock, 1.0)
    network = Remembering(inner)
    for _ in range(2):
        network(torch.zeros(1, 1, 2, 2))
    assert inner.calls == 2


def test_unusable_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as refused:
        require_engine("tensorrt", CPU)
    assert "torch" in refused.value.problem
    with pytest.raises(InputError) as refused:
        require_engine("openvino", torch.device("cuda", 0))
    assert "--device cpu" in refused.value.action
    monkeypatch.setattr(engines, "package_version", lambda name: "")
    with pytest.raises(InputError) as refused:
        require_engine("openvino", CPU)
    assert "segfit[openvino]" in refused.value.action


@pytest.fixture(params=[2, 3])
def folder(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
) -> Path:
    plane = configuration("2d", ndim=2, patch=(12, 16), spacing=(None, 1.0, 1.0))
    one = plane if request.param == 2 else configuration()
    return write_model(tmp_path / "model", member(one, folds=2, mirror_axes=(0, 1)))


def test_openvino_predicts_what_torch_does(folder: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    image = np.random.default_rng(0).normal(size=(9, 21, 30)).astype(np.float32)
    found = [
        Model(open_bundle(folder), CPU, engine=engine).predict((image, (2.0, 1.0, 1.0)), probabilities=True)
        for engine in ("torch", "openvino")
    ]
    np.testing.assert_allclose(found[1].probabilities, found[0].probabilities, atol=1e-4)
    assert (found[0].labels != found[1].labels).sum() <= 1


def test_a_network_that_openvino_does_not_take_is_run_by_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> nn.Module:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(engines, "package_version", lambda name: "1")
    monkeypatch.setattr(engines, "openvino_network", broken)
    image = np.random.default_rng(0).normal(size=(9, 21, 30)).astype(np.float32)
    found = [
        Model(open_bundle(folder), CPU, engine=engine).predict((image, (2.0, 1.0, 1.0)))
        for engine in ("torch", "openvino")
    ]
    assert np.array_equal(found[0].labels, found[1].labels)
    assert [record.code for record in caplog.records] == ["engine"] * 2  # of two folds
