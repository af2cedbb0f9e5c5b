"""The identity of a training stays when names in documents change, or stored trainings would be lost."""

from __future__ import annotations

from typing import Any

import pytest

from segfit.labels import LabelScheme
from segfit.specs import Configuration, NetworkSpec, Normalization, PreprocessingSpec, ResamplingSpec, TrainingSpec
from segfit.training.budget import TimeBudget
from segfit.training.job import TrainingJob

LABELS = LabelScheme.from_declaration({"background": 0, "liver": 1})


def _configuration(**preprocessing: ResamplingSpec) -> Configuration:
    return Configuration(
        name="2d",
        ndim=2,
        patch_size=(16, 16),
        batch_size=2,
        spacing_mm=(0.5, 0.5),
        median_shape=(30.5, 40.0),
        batch_dice=True,
        preprocessing=PreprocessingSpec(
            orientation="canonical",
            transpose=(0, 1, 2),
            spacing_mm=(None, 0.5, 0.5),
            normalization=(Normalization(scheme="zscore"),),
            **preprocessing,
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=2,
            in_channels=1,
            num_outputs=2,
            features=(2, 4),
            strides=((1, 1), (2, 2)),
            kernels=((3, 3), (3, 3)),
            encoder_convs=(1, 1),
            decoder_convs=(1,),
        ),
        memory_estimate=0,
    )


def _identity(configuration: Configuration, **recipe: Any) -> str:
    return TrainingJob(
        configuration=configuration,
        recipe=TrainingSpec(**recipe),
        labels=LABELS,
        cases_train=["a"],
        cases_validation=["b"],
        seed=0,
        budget=TimeBudget(60.0, None),
    ).identity


def test_stored_trainings_keep_their_identity() -> None:
    """The value is that of the version in which ``resample_logits`` was called ``resample_scores``."""
    assert _identity(_configuration()) == "2582dd996a66a11b"
    assert _identity(_configuration(resample_label=ResamplingSpec(order=0))) != "2582dd996a66a11b"


@pytest.mark.parametrize(("name", "default", "other"), [("loss", "dice+ce", "dice+topk"), ("focal_exponent", 2.0, 3.0)])
def test_fields_that_came_later_count_where_they_say_something_else(name: str, default: Any, other: Any) -> None:
    assert _identity(_configuration(), **{name: default}) == "2582dd996a66a11b"
    assert _identity(_configuration(), **{name: other}) != "2582dd996a66a11b"
    assert TrainingSpec.model_validate_json(TrainingSpec(**{name: other}).model_dump_json()) == TrainingSpec(
        **{name: other}
    )
