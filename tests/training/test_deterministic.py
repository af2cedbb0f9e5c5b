"""Kernels that repeat themselves to the bit: nothing in a step or a tile lacks one, and all is afterwards as it was.

There is no GPU here: the operations that torch refuses there are watched for by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_loop import assert_same_weights, train
from test_synchronisation import IGNORING, LABELS, REGIONS, as_on_a_gpu, watched_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_fakes import SCHEME, tiny_configuration, tiny_recipe

from segfit.device import deterministic_kernels
from segfit.errors import InputError
from segfit.inference.predictor import Predictor
from segfit.labels import LabelScheme
from segfit.networks.blocks import ResidualBlock
from segfit.networks.outputs import decode
from segfit.networks.unet import build_network
from segfit.training.budget import TimeBudget
from segfit.training.job import TrainingJob
from segfit.training.learner import Learner

__all__ = ["as_on_a_gpu"]  # a fixture

REFUSED = {
    "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward",
    "fractional_max_pool2d_backward", "fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d",
    "upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "_ctc_loss_backward", "_embedding_bag_backward", "put", "put_", "histc", "bincount", "median", "nanmedian",
    "kthvalue", "grid_sampler_2d_backward", "grid_sampler_3d_backward", "cumsum", "cumsum_", "cumprod",
    "scatter_reduce", "scatter_reduce_", "nll_loss_forward",
}  # fmt: skip
"""Operations that raise on CUDA where only deterministic kernels are allowed (some: of some arguments)."""


class Refusing(TorchDispatchMode):
    """Fails on operations without a deterministic kernel on CUDA."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name in REFUSED or (name == "nll_loss2d_forward" and args[3] != 0):  # 0: not reduced
            raise AssertionError(f"no deterministic kernel: {func}")
        return func(*args, **(kwargs or {}))


def assert_as_before() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("labels", [LABELS, REGIONS, IGNORING])
@pytest.mark.parametrize("loss", ["dice+ce", "tversky+topk", "cldice+focal"])
@pytest.mark.parametrize("ndim", [2, 3])
def test_every_operation_of_a_step_has_a_deterministic_kernel(ndim: int, loss: str, labels: LabelScheme) -> None:
    with deterministic_kernels(True):
        for network in ({"kind": "residual"}, {"norm": "batch"}):
            calls = watched_step(ndim=ndim, labels=labels, loss=loss, watch=Refusing(), **network)
            assert calls.calls["convolution_backward"] > 0  # the way back is watched too
    assert_as_before()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("recipe", [{"optimizer": "muon"}, {"optimizer": "adamw"}, {"precision": "bf16"}])
def test_optimisers_and_precisions_have_too(recipe: dict[str, Any]) -> None:
    with deterministic_kernels(True):
        assert watched_step(watch=Refusing(), weight_average=0.9, **recipe).calls["convolution"] > 0


@pytest.mark.parametrize(
    "work",
    [
        lambda x: F.interpolate(x, scale_factor=2, mode="trilinear").sum().backward(),
        lambda x: F.avg_pool3d(x, 2).sum().backward(),
        lambda x: F.grid_sample(x, torch.zeros(1, 4, 4, 4, 3), align_corners=False).sum().backward(),
        lambda x: F.nll_loss(x, torch.zeros((1, 4, 4, 4), dtype=torch.int64)),
        lambda x: x.cumsum(0),
    ],
)
def test_what_has_none_is_found(work: Any) -> None:
    with pytest.raises(AssertionError, match="no deterministic kernel"), Refusing():
        work(torch.ones((1, 2, 4, 4, 4), requires_grad=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2), (2, 1, 4)])
def test_the_residual_shortcut_averages_the_same(stride: tuple[int, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(3, 5, (3, 3, 3), stride).double()
    image = torch.randn((2, 3, 8, 8, 8), dtype=torch.float64).contiguous(memory_format=layout)
    found = []
    for wanted in (False, True):
        leaf = image.clone().requires_grad_()
        with deterministic_kernels(wanted):
            result = block(leaf)
            result.square().sum().backward()
        found.append((result.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_all_is_as_before_whatever_happens() -> None:
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert_as_before()
    with pytest.raises(ZeroDivisionError), deterministic_kernels(True):
        raise ZeroDivisionError
    assert_as_before()
    with deterministic_kernels(False):
        assert_as_before()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_uses_that_overlap_end_with_the_last_one() -> None:
    first, second = deterministic_kernels(True), deterministic_kernels(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.are_deterministic_algorithms_enabled()
    second.__exit__(None, None, None)
    assert_as_before()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Deterministic behavior was enabled ... set CUBLAS_WORKSPACE_CONFIG=:4096:8", "CUBLAS_WORKSPACE_CONFIG"),
        ("max_unpool3d does not have a deterministic implementation, but you set", "max_unpool3d"),
    ],
)
def test_what_torch_refuses_is_one_sentence(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told), deterministic_kernels(True):
        raise RuntimeError(text)
    assert_as_before()
    with pytest.raises(RuntimeError, match="another"), deterministic_kernels(True):
        raise RuntimeError("another")


def test_what_torch_refuses_on_a_processor_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="no deterministic kernel"), deterministic_kernels(True):
        nn.MaxUnpool2d(2)(torch.ones(1, 1, 2, 2), torch.arange(4).view(1, 1, 2, 2))


def test_a_training_and_what_it_validates_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def spy(owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def watched(self: Any, *arguments: Any, **named: Any) -> Any:
            assert torch.are_deterministic_algorithms_enabled()
            seen.add(name)
            return work(self, *arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    spy(Learner, "step")
    spy(Predictor, "_slide")
    for folder in ("first", "second"):
        train(tmp_path / folder, recipe=tiny_recipe(deterministic=True, validation_share=1000.0))
    assert seen == {"step", "_slide"}
    assert_same_weights(tmp_path / "first", tmp_path / "second")
    assert_as_before()


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_operation_of_a_tile_has_a_deterministic_kernel(channels_last: bool) -> None:
    network = build_network(tiny_configuration().network, deep_supervision=False)
    predictor = Predictor(
        tiny_configuration(),
        SCHEME,
        [network],
        (0, 1),
        torch.device("cpu"),
        channels_last=channels_last,
        deterministic=True,
    )
    with Refusing():
        logits = predictor.logits(np.zeros((1, 20, 20), np.float32))
        assert decode(logits, SCHEME).shape == (20, 20)


def test_a_tile_uses_them() -> None:
    def network(views: Tensor) -> Tensor:
        assert torch.are_deterministic_algorithms_enabled() is wanted
        return torch.cat((views, views), 1)

    for wanted in (True, False):
        predictor = Predictor(tiny_configuration(), SCHEME, [network], (0,), torch.device("cpu"), deterministic=wanted)
        predictor.logits(np.zeros((1, 20, 20), np.float32))
    assert_as_before()


def test_weights_trained_without_do_not_count_for_it() -> None:
    def identity(**changes: Any) -> str:
        return TrainingJob(
            configuration=tiny_configuration(),
            recipe=tiny_recipe(**changes),
            labels=SCHEME,
            cases_train=["a"],
            cases_validation=[],
            seed=0,
            budget=TimeBudget(None, 1),
        ).identity

    assert identity() != identity(deterministic=True)
