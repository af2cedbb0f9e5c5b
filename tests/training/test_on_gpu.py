"""What only a GPU can show: `pytest -m gpu`. `--card cpu` rehearses all of it on a processor.

Steps never wait, an interrupted training ends where a straight one does, samples are the same from wherever they come,
memory that does not suffice is told, and the card predicts what a processor does.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_fakes import SCHEME, MemoryCase, disc_cases, tiny_configuration, tiny_recipe

from segfit.augmentation.policy import apply, draw, draw_matrices, turned
from segfit.errors import MemoryShortageError
from segfit.inference.predictor import Predictor
from segfit.networks.unet import build_network
from segfit.progress import SILENT, Checked, Progress
from segfit.specs import AugmentationSpec, Configuration, TrainingSpec
from segfit.training import device_cases
from segfit.training.budget import TimeBudget
from segfit.training.device_cases import DeviceCase
from segfit.training.events import read_events
from segfit.training.job import TrainingJob
from segfit.training.learner import Learner
from segfit.training.loop import train_fold
from segfit.training.probe import memory_limited, probe_forward, probe_step
from segfit.training.result import EVENTS, WEIGHTS
from segfit.training.sampler import Batches, PatchSampler, stream
from segfit.training.side_stream import SideStream

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
SHAPE = (30, 28, 26)
STOCK = AugmentationSpec(sample_patch=(22, 22, 22), mirror_axes=(0, 1, 2), masked_channels=(0,))
RECIPES = {
    "sgd": {},
    "sgd bf16": {"precision": "bf16"},
    "sgd fp16": {"precision": "fp16"},
    "sgd channels last": {"channels_last": True, "precision": "bf16"},
    "adamw averaged": {"optimizer": "adamw", "momentum": 0.9, "learning_rate": 1e-3, "weight_average": 0.99},
    "muon": {"optimizer": "muon", "momentum": 0.95, "learning_rate": 0.05},
}


@pytest.fixture
def card(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--card"))


@pytest.fixture
def exact() -> Iterator[None]:
    """Single precision as it is called, by kernels that repeat themselves."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # is read once, when matrices are first multiplied
    kinds = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    for kind, allowed in zip(kinds, before, strict=True):
        kind.allow_tf32 = allowed


@contextmanager
def never_waiting(card: torch.device) -> Iterator[None]:
    """Have torch raise where the host waits for the card."""
    if card.type == "cpu":
        yield
        return
    torch.cuda.synchronize(card)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recipe(name: str = "sgd", **changes: Any) -> TrainingSpec:
    return tiny_recipe(augmentation=STOCK, **RECIPES[name] | changes)


def batches_of(cases: list[MemoryCase], *, threads: int, learner: Learner) -> Batches:
    sampler = PatchSampler.for_training(cases, tiny_configuration(3), recipe(), SCHEME, seed=0)
    pinned = learner.device.type == "cuda"
    return Batches(sampler, threads=threads, pin_memory=pinned, reading=learner.beside.working)


def learner_on(card: torch.device, name: str = "sgd", configuration: Configuration | None = None) -> Learner:
    return Learner(configuration or tiny_configuration(3), recipe(name), SCHEME, card, seed=0)


def train(folder: Path, card: torch.device, *, steps: int, progress: Progress = SILENT, **changes: Any) -> Any:
    cases = disc_cases(3, SHAPE)
    job = TrainingJob(
        configuration=tiny_configuration(3),
        recipe=recipe(**changes),
        labels=SCHEME,
        cases_train=[case.id for case in cases],
        cases_validation=[cases[0].id],
        seed=3,
        budget=TimeBudget(None, steps),
    )
    return train_fold(job, cases, cases[:1], folder, card, checkpoint_seconds=1000.0, progress=progress)


def stopping_after(reports: int) -> Progress:
    """Interrupts a training."""
    left = iter(range(reports))

    def check() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return Checked(SILENT, check)


@pytest.mark.parametrize("name", RECIPES)
def test_no_step_waits_for_the_card(card: torch.device, name: str) -> None:
    learner = learner_on(card, name)
    values = []
    with batches_of(disc_cases(3, SHAPE), threads=2, learner=learner) as batches:
        for step in range(12):
            with never_waiting(card) if step > 7 else never_waiting(CPU):  # the first ones choose kernels
                batch = next(batches)
                rng = stream(0, "augmentation", step)
                values.append(learner.step(batch, learning_rate=0.01, rng=rng))
    assert torch.stack(values).isfinite().all()
    assert values[0].device.type == card.type


def test_batches_are_read_into_page_locked_memory(card: torch.device) -> None:
    with batches_of(disc_cases(3, SHAPE), threads=2, learner=learner_on(card)) as batches:
        batch = next(batches)
    assert batch.whole is not None
    for part in (batch.image, batch.labels):
        assert part.is_pinned() == (card.type == "cuda")


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_training_ends_where_a_straight_one_does(
    card: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(device_cases, "_SETTLED", 3)
    straight = train(tmp_path / "straight", card, steps=8, name=name)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", card, steps=8, name=name, progress=stopping_after(5))
    assert list((tmp_path / "resumed/state").glob("*.safetensors"))
    assert train(tmp_path / "resumed", card, steps=8, name=name).final_loss == straight.final_loss
    assert (tmp_path / "resumed" / WEIGHTS).read_bytes() == (tmp_path / "straight" / WEIGHTS).read_bytes()
    assert straight.device == str(card)
    steps = [event for event in read_events(tmp_path / "straight" / EVENTS) if event["kind"] == "step"]
    assert all(0 <= event["data_wait_share"] <= 1 for event in steps)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_where_cases_wait_and_what_is_done_beside_changes_nothing(
    card: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(device_cases, "_SETTLED", 2)
    monkeypatch.setattr(device_cases, "_SHARE", share)
    train(tmp_path / "beside", card, steps=6)
    monkeypatch.setattr(device_cases, "_SHARE", 0.0)
    monkeypatch.setattr("segfit.training.learner.SideStream", lambda device: SideStream(CPU))
    train(tmp_path / "in turn", card, steps=6)
    assert (tmp_path / "beside" / WEIGHTS).read_bytes() == (tmp_path / "in turn" / WEIGHTS).read_bytes()


def test_patches_cut_on_the_card_are_those_read(card: torch.device) -> None:
    cases = disc_cases(3, SHAPE)
    plain = PatchSampler.for_training(cases, tiny_configuration(3), recipe(), SCHEME, seed=0)
    there = plain.on_device([DeviceCase(case, card) for case in cases], card)
    for step in range(6):
        read, cut = plain.batch(step), there.batch(step)
        assert cut.image.device.type == card.type
        assert read.whole is not None
        assert cut.whole is not None
        which = turned(draw_matrices(STOCK, 3, 2, stream(0, "augmentation", step)))
        cropped = [sample for sample in range(2) if sample not in which]
        for a, b in zip((*read.whole, read.image[cropped]), (*cut.whole, cut.image[cropped]), strict=True):
            assert torch.equal(a, b.cpu())
        assert torch.equal(read.labels[cropped], cut.labels[cropped].cpu())


@pytest.mark.parametrize("axes", [2, 3])
def test_the_card_augments_as_a_processor_does(card: torch.device, axes: int) -> None:
    probabilities = {name: 0.7 for name in AugmentationSpec.model_fields if name.endswith("_probability")}
    spec = AugmentationSpec(**probabilities | {"noise_probability": 0.0}, mirror_axes=tuple(range(axes)))
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((5, 2, *(26, 24, 22)[:axes]), generator=generator)
    labels = torch.randint(-1, 4, (5, 1, *(26, 24, 22)[:axes]), generator=generator, dtype=torch.int16)
    parameters = draw(spec, (20, 18, 16)[:axes], 5, 2, np.random.default_rng(0))
    expected_image, expected_labels = apply(parameters, image, labels)
    new_image, new_labels = apply(parameters, image.to(card), labels.to(card))
    torch.testing.assert_close(new_image.cpu(), expected_image, rtol=0, atol=1e-4)
    assert (new_labels.cpu() != expected_labels).float().mean() < 1e-3  # ties of shares may fall otherwise


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.05), ("fp16", 0.01)])
def test_the_card_predicts_what_a_processor_does(
    card: torch.device, axes: int, precision: str, tolerance: float
) -> None:
    configuration = tiny_configuration(axes)
    image = np.random.default_rng(0).normal(size=(1, *SHAPE[:axes])).astype(np.float32)

    def logits(device: torch.device, arithmetic: Any) -> Tensor:
        network = build_network(
            configuration.network, deep_supervision=False, generator=torch.Generator().manual_seed(0)
        )
        axes_mirrored = tuple(range(axes))
        predictor = Predictor(configuration, SCHEME, [network], axes_mirrored, device, precision=arithmetic)
        return predictor.logits(image).cpu()

    expected, found = logits(CPU, "fp32"), logits(card, precision)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_memory_that_does_not_suffice_is_told_and_free_again(card: torch.device) -> None:
    if card.type == "cpu":
        pytest.skip("the limit of a processor's memory is tested where it is made")
    large = tiny_configuration(3).model_copy(update={"batch_size": 64, "patch_size": (96, 96, 96)})
    wide = recipe(augmentation=STOCK.model_copy(update={"sample_patch": (128, 128, 128)}))
    before = torch.cuda.memory_allocated(card)
    with pytest.raises(MemoryShortageError) as caught, memory_limited(card, 1.0):
        probe_step(large, wide, SCHEME, card, steps=1)
    assert "96x96x96" in str(caught.value)
    del caught
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated(card) <= before + 2**20
    assert probe_step(tiny_configuration(3), recipe(), SCHEME, card, steps=1).seconds_per_step > 0


def test_probes_tell_what_a_step_and_a_tile_take(card: torch.device) -> None:
    step = probe_step(tiny_configuration(3), recipe(), SCHEME, card)
    tile = probe_forward(tiny_configuration(3), recipe(), SCHEME, card)
    assert 0 < tile.seconds < 60
    assert 0 < step.seconds_per_step < 60
    assert step.peak_memory_gb > 0


def test_what_waits_is_found(card: torch.device) -> None:
    if card.type == "cpu":
        pytest.skip("a processor is never waited for")
    values = torch.ones(3, device=card)
    with pytest.raises(RuntimeError, match="synchroniz"), never_waiting(card):
        values.sum().item()
