"""Cases in memory and a tiny configuration, shared by the tests of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from segfit.labels import LabelScheme
from segfit.specs import AugmentationSpec, Configuration, NetworkSpec, Normalization, PreprocessingSpec, TrainingSpec

SCHEME = LabelScheme.from_declaration({"background": 0, "disc": 1})


@dataclass
class MemoryCase:
    """A preprocessed case that lives in memory and counts how often it is read."""

    id: str
    array: NDArray[np.float32]
    label: NDArray[np.int16]
    locations: Mapping[str, NDArray[np.int32]]
    reads: list[str] = field(default_factory=list)
    previous: NDArray[np.int16] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.label.shape

    def image(self, region: tuple[slice, ...] | None = None) -> NDArray[np.float32]:
        self.reads.append("image")
        return self.array if region is None else self.array[(slice(None), *region)]

    def labels(self, region: tuple[slice, ...] | None = None) -> NDArray[np.int16] | None:
        self.reads.append("labels")
        return self.label if region is None else self.label[region]

    def previous_stage(self, region: tuple[slice, ...] | None = None) -> NDArray[np.int16] | None:
        return self.previous if region is None or self.previous is None else self.previous[region]


def disc_case(name: str, shape: tuple[int, ...] = (24, 20), seed: int = 0) -> MemoryCase:
    """A bright disc (or ball) on noise."""
    rng = np.random.default_rng(seed)
    centre = [rng.integers(n // 4, n - n // 4) for n in shape]
    grid = np.meshgrid(*(np.arange(n) - c for n, c in zip(shape, centre, strict=True)), indexing="ij")
    label = (sum(g**2 for g in grid) < 16).astype(np.int16)
    array = (label + rng.normal(0, 0.3, shape))[None].astype(np.float32)
    return MemoryCase(name, array, label, {"disc": np.argwhere(label).astype(np.int32)})


def disc_cases(count: int = 3, shape: tuple[int, ...] = (24, 20)) -> list[MemoryCase]:
    return [disc_case(f"case{index}", shape, seed=index) for index in range(count)]


def tiny_configuration(ndim: int = 2, image_ndim: int | None = None) -> Configuration:
    """Patch 16 per axis, two stages, batch 2."""
    axes = image_ndim or ndim
    spacing: tuple[float | None, ...] = (None,) * (axes - ndim) + (1.0,) * ndim
    return Configuration(
        name="tiny",
        ndim=ndim,
        patch_size=(16,) * ndim,
        batch_size=2,
        spacing_mm=(1.0,) * ndim,
        median_shape=(24.0,) * ndim,
        batch_dice=True,
        preprocessing=PreprocessingSpec(
            orientation="stored",
            transpose=tuple(range(axes)),
            spacing_mm=spacing,
            normalization=(Normalization(scheme="none"),),
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=ndim,
            in_channels=1,
            num_outputs=2,
            features=(4, 8, 8),
            strides=((1,) * ndim, (2,) * ndim, (2,) * ndim),
            kernels=((3,) * ndim,) * 3,
            encoder_convs=(1, 1, 1),
            decoder_convs=(1, 1),
        ),
        memory_estimate=0,
    )


ALWAYS_VALIDATED = 1000.0  # share of the time for validation of which no stall of the machine leaves too little


def tiny_recipe(**changes: object) -> TrainingSpec:
    """The reference's recipe with an enlarged patch and mirroring."""
    values: dict[str, object] = {"augmentation": AugmentationSpec(sample_patch=(20, 20), mirror_axes=(0, 1))}
    return TrainingSpec.model_validate(values | changes)
