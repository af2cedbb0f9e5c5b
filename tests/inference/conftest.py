"""A tiny random model, for tests of prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from segfit.bundle.bundle import Member, ModelManifest, open_bundle, weights_name, write_bundle
from segfit.inference.model import Model
from segfit.labels import LabelScheme
from segfit.networks.unet import build_network
from segfit.specs import Configuration, NetworkSpec, Normalization, PreprocessingSpec


def _configuration(
    name: str = "3d_fullres",
    *,
    ndim: int = 3,
    patch: tuple[int, ...] = (8, 12, 12),
    spacing: tuple[float | None, ...] = (2.0, 1.0, 1.0),
    transpose: tuple[int, ...] | None = None,
    orientation: str = "stored",
    channels: int = 1,
    outputs: int = 3,
) -> Configuration:
    """A configuration with a network of two resolutions and two features."""
    return Configuration(
        name=name,
        ndim=ndim,
        patch_size=patch,
        batch_size=2,
        spacing_mm=tuple(1.0 if s is None else s for s in spacing[-ndim:]),
        median_shape=tuple(float(p) for p in patch),
        batch_dice=False,
        preprocessing=PreprocessingSpec(
            orientation=orientation,
            transpose=transpose or tuple(range(len(spacing))),
            spacing_mm=spacing,
            normalization=(Normalization(scheme="zscore"),) * channels,
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=ndim,
            in_channels=channels,
            num_outputs=outputs,
            features=(2, 4),
            strides=((1,) * ndim, (2,) * ndim),
            kernels=((3,) * ndim, (3,) * ndim),
            encoder_convs=(1, 1),
            decoder_convs=(1,),
        ),
        memory_estimate=0,
    )


def _write_model(folder: Path, *members: Member, labels: dict[str, int] | None = None, **fields: Any) -> Path:
    """Write a bundle of random networks whose outputs vary widely from voxel to voxel."""
    generator = torch.Generator().manual_seed(0)
    states = {}
    for member in members:
        for name in member.weights.values():
            state = build_network(
                member.configuration.network, deep_supervision=False, generator=generator
            ).state_dict()
            states[name] = {key: value * 20 if key.startswith("heads") else value for key, value in state.items()}
    spec = members[0].configuration.preprocessing
    manifest = ModelManifest(
        name="tiny",
        labels=LabelScheme.from_declaration(labels or {"background": 0, "a": 1, "b": 2}),
        channel_names=tuple(f"channel {i}" for i in range(len(spec.normalization))),
        file_ending=".nii.gz",
        members=members,
        **fields,
    )
    write_bundle(folder, manifest, states)
    return folder


def _member(configuration: Configuration, folds: int = 1, mirror_axes: tuple[int, ...] = ()) -> Member:
    weights = {str(fold): weights_name(configuration.name, fold) for fold in range(folds)}
    return Member(configuration=configuration, weights=weights, mirror_axes=mirror_axes)


@pytest.fixture(scope="session")
def configuration() -> Callable[..., Configuration]:
    return _configuration


@pytest.fixture(scope="session")
def member() -> Callable[..., Member]:
    return _member


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    return _write_model


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Model]:
    """Build a model on the CPU from members."""

    def make(*members: Member, labels: dict[str, int] | None = None, **fields: Any) -> Model:
        folder = _write_model(tmp_path / "model", *members, labels=labels, **fields)
        return Model(open_bundle(folder), torch.device("cpu"))

    return make
