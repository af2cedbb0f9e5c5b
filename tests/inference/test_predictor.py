from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from segfit.errors import StageError
from segfit.execution.scratch import Scratch
from segfit.inference import predictor as predictor_module
from segfit.inference.predictor import Predictor
from segfit.inference.tiles import mirror_subsets
from segfit.labels import Exchange, LabelScheme
from segfit.networks.unet import build_network
from segfit.progress import SILENT, KeptWarnings
from segfit.specs import Configuration

CPU = torch.device("cpu")
LABELS = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})


class Scale(nn.Module):
    """A network of one voxel's sight: output c is (c + 1) times the first input channel, plus `shift`."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, 4.0))
        self.shift = shift
        self.batches: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(tuple(x.shape))
        return torch.stack([x[:, 0] * w for w in self.weight], dim=1) + self.shift


@pytest.mark.parametrize("shape", [(8, 12, 12), (9, 13, 25), (3, 30, 5), (20, 12, 12)])
@pytest.mark.parametrize("gaussian", [True, False])
def test_a_local_network_gives_its_own_output_everywhere(
    configuration: Callable[..., Configuration], shape: tuple[int, ...], gaussian: bool
) -> None:
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    predictor = Predictor(configuration(), LABELS, [Scale()], (0, 1, 2), CPU, gaussian=gaussian)
    logits = predictor.logits(image)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), image * np.array([1, 2, 3]).reshape(3, 1, 1, 1), rtol=2e-6, atol=1e-6)


def test_any_function_is_a_network(configuration: Callable[..., Configuration]) -> None:
    image = np.random.default_rng(0).normal(size=(1, 9, 13, 25)).astype(np.float32)
    logits = Predictor(configuration(), LABELS, [lambda x: torch.cat([x, -x, 2 * x], 1)], (0,), CPU).logits(image)
    np.testing.assert_allclose(logits.numpy(), image * np.array([1, -1, 2]).reshape(3, 1, 1, 1), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("function", [lambda x: x, lambda x: torch.cat([x] * 3, 1)[..., :1]])
def test_outputs_of_another_shape_are_refused(
    configuration: Callable[..., Configuration], function: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(StageError) as refused:
        Predictor(configuration(), LABELS, [function], (), CPU).logits(np.zeros((1, 8, 12, 12), np.float32))
    assert "(1, 3, " in refused.value.problem


def test_constant_in_constant_out(configuration: Callable[..., Configuration]) -> None:
    predictor = Predictor(configuration(patch=(16, 16, 16)), LABELS, [Scale()], (), CPU)
    logits = predictor.logits(np.full((1, 23, 40, 31), 0.3, np.float32))
    np.testing.assert_allclose(logits[0].numpy(), 0.3, rtol=1e-6)
    assert (logits.argmax(0) == 2).all()


def test_folds_are_averaged_as_logits(configuration: Callable[..., Configuration]) -> None:
    image = np.zeros((1, 10, 12, 14), np.float32)
    logits = Predictor(configuration(), LABELS, [Scale(1.0), Scale(2.0)], (0,), CPU).logits(image)
    np.testing.assert_allclose(logits.numpy(), 1.5, rtol=1e-6)


def test_slices_of_a_volume_go_through_a_2d_network(configuration: Callable[..., Configuration]) -> None:
    network = Scale()
    plane = configuration("2d", ndim=2, patch=(12, 16), spacing=(None, 1.0, 1.0))
    image = np.random.default_rng(1).normal(size=(1, 5, 20, 10)).astype(np.float32)
    logits = Predictor(plane, LABELS, [network], (0, 1), CPU, batch=7).logits(image)
    np.testing.assert_allclose(logits[1].numpy(), 2 * image[0], rtol=2e-6, atol=1e-6)
    views = 5 * 3 * 1 * 4  # slices, tiles per slice (20 by 12, 16 by 16), mirrored views
    assert sum(batch[0] for batch in network.batches) == views
    assert network.batches[0] == (7, 1, 12, 16)


def test_2d_images(configuration: Callable[..., Configuration]) -> None:
    plane = configuration("2d", ndim=2, patch=(12, 16), spacing=(1.0, 1.0))
    image = np.random.default_rng(1).normal(size=(1, 20, 10)).astype(np.float32)
    logits = Predictor(plane, LABELS, [Scale()], (), CPU).logits(image)
    np.testing.assert_allclose(logits[0].numpy(), image[0], rtol=2e-6, atol=1e-6)


class Sides(nn.Module):
    """Equivariant: outputs 1 and 2 are a kernel and its mirror image along the last axis, output 0 is symmetric."""

    def __init__(self) -> None:
        super().__init__()
        kernel = torch.randn(1, 1, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        self.kernel = nn.Parameter(torch.cat([kernel + kernel.flip(4), kernel, kernel.flip(4)]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv3d(x, self.kernel, padding=1)


@pytest.mark.parametrize("batch", [1, 5])
@given(axes=st.sets(st.integers(0, 2)), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_equivariant_network_predicts_the_mirror_image_of_a_mirror_image(
    configuration: Callable[..., Configuration], batch: int, axes: set[int], seed: int
) -> None:
    image = np.random.default_rng(seed).normal(size=(1, 8, 13, 20)).astype(np.float32)
    exchange = Exchange(axis=2, pairs=((1, 2),))

    def logits(values: NDArray[np.float32], axes: set[int], exchange: Exchange | None = exchange) -> NDArray[Any]:
        predictor = Predictor(
            configuration(patch=(8, 12, 12)),
            LABELS,
            [Sides()],
            sorted(axes),
            CPU,
            exchange=exchange,
            batch=batch,
            gaussian=False,
        )
        return predictor.logits(values).numpy()

    straight, turned = logits(image, axes | {2}), logits(np.ascontiguousarray(image[..., ::-1]), axes | {2})
    np.testing.assert_allclose(turned[[0, 2, 1]][..., ::-1], straight, atol=1e-4)
    # A network that is equivariant already gains nothing along that axis, and loses without the exchange.
    one_tile = image[..., :12, :12]
    np.testing.assert_allclose(logits(one_tile, {2}), logits(one_tile, set()), atol=1e-5)
    assert np.abs(logits(one_tile, {2}, None) - logits(one_tile, set())).max() > 0.1


@pytest.mark.parametrize(
    ("declared", "partners"),
    [
        ({"background": 0, "left": 1, "right": 2, "spine": 3}, [0, 2, 1, 3]),
        ({"background": 0, "all": [1, 2, 3], "right": 2, "left": 1, "spine": 3}, [0, 2, 1, 3]),
    ],
)
@pytest.mark.parametrize("ndim", [2, 3])
def test_outputs_of_flipped_views_are_exchanged_before_they_are_averaged(
    configuration: Callable[..., Configuration], declared: dict[str, Any], partners: list[int], ndim: int
) -> None:
    labels = LabelScheme.from_declaration(declared, [1] * 4)
    assert list(labels.exchanged_outputs([(1, 2)])) == partners
    torch.manual_seed(0)
    network = (nn.Conv2d if ndim == 2 else nn.Conv3d)(1, 4, 3, padding=1).requires_grad_(False)
    plane = configuration("2d", ndim=2, patch=(12, 12), spacing=(None, 1.0, 1.0), outputs=4)
    volume = configuration(patch=(4, 12, 12), outputs=4)
    image = np.random.default_rng(0).normal(size=(1, 4, 12, 12)).astype(np.float32)
    axis = ndim - 1
    exchange = Exchange(axis=axis, pairs=((1, 2),))
    predictor = Predictor(plane if ndim == 2 else volume, labels, [network], (0, axis), CPU, exchange=exchange)
    tiles = torch.from_numpy(image).transpose(0, 1) if ndim == 2 else torch.from_numpy(image)[None]
    views = []
    for subset in mirror_subsets((0, axis)):
        dims = [2 + flipped for flipped in subset]
        view = network(tiles.flip(dims)).flip(dims)
        views.append(view[:, partners] if axis in subset else view)
    mean = torch.stack(views).mean(0)
    expected = mean.transpose(0, 1) if ndim == 2 else mean[0]
    np.testing.assert_allclose(predictor.logits(image).numpy(), expected.numpy(), atol=1e-5)


def test_labels_of_a_previous_stage_are_exchanged_in_flipped_views(
    configuration: Callable[..., Configuration],
) -> None:
    """A network that hands its label channels on is equivariant: only what is exchanged twice comes back as it was."""
    second = configuration(patch=(4, 12, 12)).model_copy(update={"previous_stage": "3d_lowres"})
    exchange = Exchange(axis=2, pairs=((1, 2),))
    image = np.random.default_rng(0).normal(size=(3, 4, 12, 12)).astype(np.float32)
    predictor = Predictor(second, LABELS, [lambda x: x], (0, 2), CPU, exchange=exchange, batch=3)
    np.testing.assert_allclose(predictor.logits(image).numpy(), image, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batching_and_layout_change_nothing(configuration: Callable[..., Configuration], batch: int) -> None:
    image = np.random.default_rng(2).normal(size=(1, 12, 17, 20)).astype(np.float32)
    networks = [nn.Conv3d(1, 3, 3, padding=1)]
    one = Predictor(configuration(), LABELS, networks, (0, 2), CPU, batch=1).logits(image)
    many = Predictor(configuration(), LABELS, networks, (0, 2), CPU, batch=batch, channels_last=True).logits(image)
    np.testing.assert_allclose(many.numpy(), one.numpy(), atol=1e-5)


def test_bf16_runs_only_where_the_hardware_has_it(
    configuration: Callable[..., Configuration], monkeypatch: pytest.MonkeyPatch
) -> None:
    def types(fast: bool) -> torch.dtype | None:
        hardware = predictor_module.measure_hardware("cpu")
        replaced = type(hardware)(device="cpu", name="x", threads=1, free_memory_gb=1.0, fast_bf16=fast)
        monkeypatch.setattr(predictor_module, "measure_hardware", lambda name: replaced)
        return Predictor(configuration(), LABELS, [Scale()], (), CPU, precision="bf16").dtype

    real = predictor_module.measure_hardware
    assert types(True) is torch.bfloat16
    monkeypatch.setattr(predictor_module, "measure_hardware", real)
    assert types(False) is None
    assert Predictor(configuration(), LABELS, [Scale()], (), CPU, precision="fp16").dtype is None


def test_out_of_memory_falls_back_step_by_step(
    configuration: Callable[..., Configuration], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told as on a GPU: the placements are played on the CPU, the first ones without memory."""
    predictor = Predictor(configuration(), LABELS, [lambda views: views], (), CPU)
    predictor.device = torch.device("cuda", 0)
    predictor.batch = 4
    tried = []

    def run(self: Predictor, image: object, placement: object, *rest: object) -> Iterator[Tensor]:
        tried.append(str(placement))
        if len(tried) < 4:
            raise torch.OutOfMemoryError
        yield torch.zeros(3, 1, 1, 1)

    monkeypatch.setattr(Predictor, "_slide", run)
    notes = KeptWarnings(SILENT)
    predictor.logits(np.zeros((1, 1, 1, 1), np.float32), progress=notes)
    assert tried == [
        "cuda:0 with batches of 4",
        "cuda:0 with batches of 1",
        "cuda:0 with batches of 1, image and sums on cpu",
        "cpu with batches of 1",
    ]
    assert [item.code for item in notes.warnings] == ["out_of_memory"] * 3
    assert tried[0] in notes.warnings[0].problem


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize(("rows", "most"), [(0, 0), (0, 2**40), (19, 0)])
def test_streamed_equals_whole_to_the_bit(
    configuration: Callable[..., Configuration], ndim: int, rows: int, most: int, tmp_path: Path
) -> None:
    """Whatever the rows held at a time, in memory or in files."""
    chosen = configuration(ndim=ndim, patch=(8, 12, 12)[-ndim:], spacing=(2.0, 1.0, 1.0))
    network = build_network(chosen.network, deep_supervision=False, generator=torch.Generator().manual_seed(0))
    predictor = Predictor(chosen, LABELS, [network], (0, 1), CPU, batch=3)
    image = np.random.default_rng(0).normal(size=(1, 37, 21, 30)).astype(np.float32)
    blocks = list(predictor.stream(image, rows=rows, scratch=Scratch(most, tmp_path)))
    assert len(blocks) > 1
    assert max(block.shape[1] for block in blocks) < 30
    assert torch.equal(torch.cat(blocks, 1), predictor.logits(image))
    assert not list(tmp_path.iterdir())


def test_a_stream_that_runs_out_of_memory_goes_on_where_it_was(
    configuration: Callable[..., Configuration], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(configuration(), LABELS, [Scale()], (), CPU, batch=2)
    image = np.random.default_rng(0).normal(size=(1, 37, 21, 30)).astype(np.float32)
    whole = predictor.logits(image)
    placements = [predictor_module._Placement(CPU, CPU, batch) for batch in (2, 1)]
    monkeypatch.setattr(Predictor, "_placements", lambda self: iter(placements))
    monkeypatch.setattr(Predictor, "_add", _failing(Predictor._add, at=30))
    kept = KeptWarnings(SILENT)
    blocks = list(predictor.stream(image, rows=0, progress=kept))
    assert [item.code for item in kept.warnings] == ["out_of_memory"]
    assert torch.equal(torch.cat(blocks, 1), whole)


def _failing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Return the function, which runs out of memory when it is called for the `at`-th time."""
    calls = count(1)

    def called(*arguments: Any) -> Any:
        if next(calls) == at:
            raise torch.OutOfMemoryError
        return function(*arguments)

    return called


def test_numbers_that_are_not_finite_are_an_error(configuration: Callable[..., Configuration]) -> None:
    predictor = Predictor(configuration(), LABELS, [Scale(float("nan"))], (), CPU)
    with pytest.raises(StageError, match="not finite"):
        predictor.logits(np.zeros((1, 8, 12, 12), np.float32))
