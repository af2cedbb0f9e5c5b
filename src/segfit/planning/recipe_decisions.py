"""The reasons behind the training recipe of one configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from segfit.planning.plan import Decision, TrainingSpec
from segfit.planning.reasons import ASKED, by_axis, reason

__all__ = ["recipe_values", "training_decisions"]

_BY_PATCH = ("rotation_degrees", "dummy_2d", "sample_patch", "mirror_axes", "masked_channels")
"""What of the augmentation depends on the data; the rest are the reference's constants."""


def recipe_values(recipe: TrainingSpec) -> dict[str, Any]:
    """Return everything of the recipe but the augmentation and deep supervision, which are explained by themselves."""
    return recipe.model_dump(mode="json", exclude={"augmentation", "deep_supervision"})


def training_decisions(
    name: str, recipe: TrainingSpec, patch: tuple[int, ...], asked: Mapping[str, Any], stages: int, *, augmented: bool
) -> Iterator[Decision]:
    """Why the recipe of one configuration is what it is.

    Parameters
    ----------
    patch : size the network sees
    asked : values of the recipe that were asked for
    stages : resolution levels of the network
    augmented : False where no augmentation was asked for
    """
    yield reason(
        f"{name}.training",
        recipe_values(recipe),
        "the reference's training recipe" + (" with what was asked for" if asked else ""),
        inputs=asked,
        bound=ASKED if asked else "preset",
        source="nnU-Net 2.8.1 training",
        would_change="the options training.*, or a time budget",
    )
    yield reason(
        f"{name}.training.deep_supervision",
        recipe.deep_supervision,
        "every decoder level but the lowest is supervised; networks of two stages have one level and nothing to add",
        inputs={"stages": stages},
        bound="number of stages",
        source="nnU-Net 2.8.1 training",
        would_change="a patch so small that the network has two stages"
        if recipe.deep_supervision
        else "a larger patch, which gives the network a third stage",
    )
    yield _geometry_decision(name, recipe, patch, augmented=augmented)
    augmentation = recipe.augmentation.model_dump(mode="json", exclude=set(_BY_PATCH))
    yield reason(
        f"{name}.augmentation.intensities",
        augmentation,
        "the reference's probabilities and ranges" if augmented else "no augmentation: no step is ever applied",
        bound="preset" if augmented else ASKED,
        source="nnU-Net 2.8.1 training, augmentation",
        would_change="the option augmentation.strength",
    )


def _geometry_decision(name: str, recipe: TrainingSpec, patch: tuple[int, ...], *, augmented: bool) -> Decision:
    augmentation = recipe.augmentation
    if len(patch) == 2:
        rule = "pictures are turned by any angle, by up to 15 degrees where one edge is more than 1.5 times the other"
        bound = f"longer edge {max(patch) / min(patch):.3g} times the shorter"
    else:
        rule = (
            "volumes are turned by up to 30 degrees about each axis; a patch with an axis more than three times the "
            "first one by any angle, in its plane only (dummy_2d)"
        )
        bound = f"longest axis {max(patch) / patch[0]:.3g} times the first"
    rule += "; the patch that is cut out first is large enough for the turned one at a scale of 0.85"
    rule += " (axes as the network sees them); channels with a mask are set to 0 outside it"
    if not augmented:
        rule, bound = "no augmentation: the patch is taken as it is", ASKED
    return reason(
        f"{name}.augmentation",
        augmentation.model_dump(mode="json", include=set(_BY_PATCH)),
        rule,
        inputs={"patch_size": by_axis(patch)},
        bound=bound,
        source="nnU-Net 2.8.1 training, patch geometry",
        would_change="another patch size, or the options planning.mirror_axes and augmentation.strength",
    )
