"""A training that starts from the weights of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from training_fakes import SCHEME, disc_cases, tiny_configuration, tiny_recipe

from segfit.errors import StageError
from segfit.files import hash_file
from segfit.labels import LabelScheme
from segfit.networks.transfer import Transfer
from segfit.networks.unet import build_network
from segfit.progress import Progress
from segfit.text import dice
from segfit.training.budget import TimeBudget
from segfit.training.events import read_events
from segfit.training.initial import InitialWeights
from segfit.training.job import TrainingJob
from segfit.training.loop import train_fold
from segfit.training.online_validation import CaseValidation, ValidationSchedule
from segfit.training.result import EVENTS, WEIGHTS, before_and_after

CPU = torch.device("cpu")
STILL = 1e-30  # a rate that changes no float32


@pytest.fixture(autouse=True)
def scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate twice, however long a step takes."""

    def plan(self: CaseValidation, step_seconds: float, seconds: float) -> None:
        self.schedule = ValidationSchedule(2, (disc_cases()[2].id,), 0.0)

    monkeypatch.setattr(CaseValidation, "plan", plan)


@pytest.fixture
def initial(tmp_path: Path) -> InitialWeights:
    """Weights of the network of these tests, from another seed."""
    generator = torch.Generator().manual_seed(9)
    network = build_network(tiny_configuration().network, deep_supervision=False, generator=generator)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    return InitialWeights(identity="a" * 16, path=tmp_path / "model.safetensors", labels=SCHEME)


def job_from(initial: InitialWeights | None, steps: int = 20, rate: float = STILL, average: float = 0.0) -> TrainingJob:
    names = [case.id for case in disc_cases()]
    return TrainingJob(
        configuration=tiny_configuration(),
        recipe=tiny_recipe(learning_rate=rate, weight_decay=0.0, weight_average=average),
        labels=SCHEME,
        cases_train=names[:2],
        cases_validation=names[2:],
        seed=0,
        budget=TimeBudget(None, steps),
        initial=initial,
    )


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_it_begins_with_them(initial: InitialWeights, tmp_path: Path, average: float) -> None:
    cases = disc_cases()
    result = train_fold(job_from(initial, average=average), cases[:2], cases[2:], tmp_path / "t", CPU)
    weights, came = load_file(tmp_path / "t" / WEIGHTS), load_file(initial.path)
    assert all(torch.allclose(weights[name], came[name], atol=1e-6) for name in came)
    assert result.before is not None
    assert result.before.step == 0
    assert result.before.dice == result.curve[-1].dice  # nothing was learned
    (event,) = [event for event in read_events(tmp_path / "t" / EVENTS) if event["kind"] == "before"]
    assert event["dice"] == result.before.dice
    told = before_and_after(result, ["disc"])
    assert told.count(dice(result.before.dice["disc"])) == 2  # before and after
    assert before_and_after(result, []) == ""
    assert before_and_after(result.model_copy(update={"before": None}), ["disc"]) == ""


def test_the_weights_are_read_once_and_again_where_it_was_interrupted(
    initial: InitialWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, reads, read = disc_cases(), list[Path](), InitialWeights.for_network

    def counted(self: InitialWeights, network: nn.Module, labels: LabelScheme) -> Transfer:
        reads.append(self.path)
        return read(self, network, labels)

    monkeypatch.setattr(InitialWeights, "for_network", counted)
    job = job_from(initial, steps=60, rate=0.05)
    straight = train_fold(job, cases[:2], cases[2:], tmp_path / "straight", CPU)
    assert len(reads) == 1
    with pytest.raises(KeyboardInterrupt):  # after a step, before it is validated
        train_fold(job, cases[:2], cases[2:], tmp_path / "cut", CPU, progress=Impatient(1))
    resumed = train_fold(job, cases[:2], cases[2:], tmp_path / "cut", CPU)
    assert len(reads) == 3
    assert straight.before is not None
    assert resumed.before is not None
    assert resumed.before.dice == straight.before.dice


def test_what_was_before_is_measured_on_the_weights_that_came(initial: InitialWeights, tmp_path: Path) -> None:
    cases = disc_cases()
    still = train_fold(job_from(initial), cases[:2], cases[2:], tmp_path / "still", CPU)
    moved = train_fold(job_from(initial, rate=0.05), cases[:2], cases[2:], tmp_path / "moved", CPU)
    assert moved.before is not None
    assert still.before is not None
    assert moved.before.dice == still.before.dice
    weights, came = load_file(tmp_path / "moved" / WEIGHTS), load_file(initial.path)
    assert not torch.allclose(weights["encoder.0.0.conv.weight"], came["encoder.0.0.conv.weight"], atol=1e-3)


def test_their_identity_is_in_that_of_the_training(initial: InitialWeights, tmp_path: Path) -> None:
    named = job_from(initial).identity
    assert named != job_from(None).identity
    assert named == job_from(replace(initial, path=tmp_path / "elsewhere")).identity
    assert named != job_from(replace(initial, identity="b" * 16)).identity


def test_weights_that_were_changed_are_not_used(initial: InitialWeights, tmp_path: Path) -> None:
    known = replace(initial, checksum=hash_file(initial.path))
    network = build_network(tiny_configuration().network, deep_supervision=False)
    assert len(known.for_network(network, SCHEME).fitted) == len(initial.for_network(network, SCHEME).fitted)
    save_file(network.state_dict(), initial.path)
    with pytest.raises(StageError, match=r"model\.safetensors is damaged"):
        train_fold(job_from(known), disc_cases()[:2], disc_cases()[2:], tmp_path / "t", CPU)


def test_weights_that_are_gone_are_named(initial: InitialWeights, tmp_path: Path) -> None:
    initial.path.unlink()
    with pytest.raises(StageError, match=r"model\.safetensors cannot be read"):
        train_fold(job_from(initial), disc_cases()[:2], disc_cases()[2:], tmp_path / "t", CPU)


class Impatient(Progress):
    """Interrupts the training after some steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Impatient]:
        yield self

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [1, 10])
def test_an_interrupted_training_goes_on_from_its_own_weights(
    initial: InitialWeights, tmp_path: Path, steps: int
) -> None:
    cases, job = disc_cases(), job_from(initial, rate=0.01)
    whole = train_fold(job, cases[:2], cases[2:], tmp_path / "whole", CPU)
    with pytest.raises(KeyboardInterrupt):
        train_fold(job, cases[:2], cases[2:], tmp_path / "part", CPU, progress=Impatient(steps))
    assert not (tmp_path / "part" / WEIGHTS).exists()
    again = train_fold(job, cases[:2], cases[2:], tmp_path / "part", CPU)
    assert again.weights == whole.weights
    assert again.before is not None
    assert whole.before is not None
    assert again.before.dice == whole.before.dice
