"""Losses, networks and augmentations of another package, from a training to a model that predicts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_fakes import SCHEME, MemoryCase, disc_cases, tiny_configuration, tiny_recipe

from segfit.bundle.bundle import Member, ModelManifest, card, weights_name, write_bundle
from segfit.errors import InputError
from segfit.inference.model import load_model
from segfit.plugins import load_plugin, package_version
from segfit.specs import Configuration, TrainingSpec
from segfit.training.budget import TimeBudget
from segfit.training.job import TrainingJob
from segfit.training.loop import train_fold
from segfit.training.result import WEIGHTS, TrainingResult

CPU = torch.device("cpu")
CODE = """
import torch
from torch import nn

calls = []

def squared(seen):
    return ((seen.shares - seen.truth.float()) ** 2).mean()

def shape(seen):
    return seen.shares

def broken(*_):
    raise ValueError("no such boundary")

def brighter(image, labels, rng):
    calls.append(int(labels.min()))
    return image + float(rng.random()), labels

def cropped(image, labels, rng):
    return image[:, :, 1:], labels

class Tiny(nn.Sequential):
    def __init__(self, spec):
        super().__init__(
            nn.Conv2d(spec.in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, spec.num_outputs, 1)
        )
        self.register_buffer("index", torch.arange(3))

def flat(spec):
    return nn.Conv2d(spec.in_channels, 1, 2, stride=2)

def nothing(spec):
    return None
"""


@pytest.fixture
def package(plugin_package: Callable[..., Path]) -> Path:
    losses, networks = ["squared", "shape", "broken"], ["Tiny", "flat", "nothing", "broken"]
    return plugin_package(CODE, losses=losses, networks=networks, augmentations=["brighter", "cropped", "broken"])


def with_network(name: str) -> Configuration:
    plain = tiny_configuration()
    return plain.model_copy(update={"network": plain.network.model_copy(update={"plugin": name})})


def train(
    folder: Path, configuration: Configuration | None = None, recipe: TrainingSpec | None = None, **changes: Any
) -> TrainingResult:
    cases: list[MemoryCase] = disc_cases()
    job = TrainingJob(
        configuration=configuration or tiny_configuration(),
        recipe=recipe or tiny_recipe(),
        labels=SCHEME,
        cases_train=[case.id for case in cases],
        cases_validation=[],
        seed=3,
        budget=TimeBudget(None, 6),
    )
    return train_fold(replace(job, **changes), cases, [], folder, CPU)


def bundle(folder: Path, configuration: Configuration, weights: Path, **fields: Any) -> Path:
    name = weights_name("tiny", 0)
    manifest = ModelManifest(
        name="discs",
        labels=SCHEME,
        channel_names=("photo",),
        file_ending=".png",
        members=(Member(configuration=configuration, weights={"0": name}),),
        **fields,
    )
    write_bundle(folder, manifest, {name: weights})
    return folder


def forget(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(package)])
    monkeypatch.delitem(sys.modules, "own_things", raising=False)


def test_a_loss_and_an_augmentation_train_a_model_that_predicts_without_them(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(loss="ce+own-things:squared")
    changes = {"plugins": ("own-things:brighter",)}
    recipe = recipe.model_copy(update={"augmentation": recipe.augmentation.model_copy(update=changes)})
    result = train(tmp_path / "own", recipe=recipe)
    assert sys.modules["own_things"].calls == [0] * 6
    again = train(tmp_path / "again", recipe=recipe)
    assert result.final_loss == again.final_loss
    assert result.final_loss != train(tmp_path / "plain").final_loss
    forget(package, monkeypatch)
    model = load_model(bundle(tmp_path / "model", tiny_configuration(), tmp_path / "own" / WEIGHTS))
    assert model.predict(np.zeros((24, 24), np.float32), 1.0).labels.shape == (24, 24)
    with pytest.raises(InputError, match=r"own-things:squared .*install the package own-things"):
        train(tmp_path / "other", recipe=recipe)


def test_a_network_is_trained_averaged_and_needed_to_predict(
    tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = with_network("own-things:Tiny")
    recipe = tiny_recipe(deep_supervision=False, weight_average=0.9)
    train(tmp_path / "first", configuration, recipe)
    train(tmp_path / "second", configuration, recipe)
    weights = [load_file(tmp_path / name / WEIGHTS) for name in ("first", "second")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(weights[0]["body.index"], torch.arange(3))
    requires = {"own-things": package_version("own-things")}
    assert requires == {"own-things": "1.2"}
    folder = bundle(tmp_path / "model", configuration, tmp_path / "first" / WEIGHTS, requires=requires)
    assert "own-things 1.2" in (folder / "card.md").read_text()
    model = load_model(folder)
    assert model.predict(np.zeros((24, 24), np.float32), 1.0).labels.shape == (24, 24)
    assert "Needs the package" in card(model.manifest)
    forget(package, monkeypatch)
    with pytest.raises(InputError, match=r"needs the package own-things 1\.2.*install it if you trust it"):
        load_model(folder)


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("losses", "broken", r"own-things:broken \(segfit.losses\) failed: ValueError: no such boundary"),
        (
            "losses",
            "shape",
            r"own-things:shape .* must give a tensor without axes, it gave \(2, 1, 16, 16\)",
        ),
        ("networks", "broken", r"own-things:broken \(segfit.networks\) failed"),
        ("networks", "nothing", "own-things:nothing .* must give a torch.nn.Module with parameters, it made NoneType"),
        ("networks", "flat", r"own-things:flat .* logits of shape \(2, 2, 16, 16\), it gave \(2, 1, 8, 8\)"),
        ("augmentations", "broken", r"own-things:broken \(segfit.augmentations\) failed"),
        ("augmentations", "cropped", r"own-things:cropped .* it gave torch.float32 \(2, 1, 15, 16\)"),
    ],
)
def test_plugins_that_fail_are_named(tmp_path: Path, package: Path, kind: str, name: str, told: str) -> None:
    plugin, recipe, configuration = f"own-things:{name}", tiny_recipe(deep_supervision=False), tiny_configuration()
    if kind == "losses":
        recipe = tiny_recipe(loss=f"dice+{plugin}", deep_supervision=False)
    elif kind == "augmentations":
        augmentation = recipe.augmentation.model_copy(update={"plugins": (plugin,)})
        recipe = recipe.model_copy(update={"augmentation": augmentation})
    else:
        configuration = with_network(plugin)
    with pytest.raises(InputError, match=told):
        train(tmp_path / "trained", configuration, recipe)


def test_plugins_are_found_by_package_and_name(package: Path) -> None:
    assert load_plugin("losses", "Own_Things:squared") is load_plugin("losses", "own-things:squared")
    with pytest.raises(InputError, match=r"own-things:other is none of the plug-ins .*installed are own-things:broken"):
        load_plugin("losses", "own-things:other")
    with pytest.raises(InputError, match="other:squared is none of the plug-ins"):
        load_plugin("losses", "other:squared")


def test_a_package_that_cannot_be_imported_is_named(plugin_package: Callable[..., Path]) -> None:
    plugin_package("import nothing_of_this_name", losses=["squared"])
    with pytest.raises(InputError, match=r"own-things:squared .*failed: ModuleNotFoundError"):
        load_plugin("losses", "own-things:squared")
