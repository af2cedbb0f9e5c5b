"""The reasons behind the training recipe of one configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from segfit.options import AugmentationOptions, Options
from segfit.planning.plan import Decision
from segfit.planning.reasons import SET, by_axis, reason
from segfit.specs import TrainingSpec
from segfit.words import listing

__all__ = ["geometry_values", "patch_ratio", "recipe_values", "training_decisions"]

_BY_PATCH = ("rotation_degrees", "dummy_2d", "sample_patch", "mirror_axes", "masked_channels")
"""What of the augmentation depends on the data; the rest are the reference's constants."""
_NO_INTENSITY = {*_BY_PATCH, "exchange"}  # the exchange of labels is a decision of its own


def recipe_values(recipe: TrainingSpec) -> dict[str, Any]:
    """Return everything of the recipe but the augmentation and deep supervision, which are explained by themselves."""
    return recipe.model_dump(mode="json", exclude={"augmentation", "deep_supervision"})


def geometry_values(recipe: TrainingSpec) -> dict[str, Any]:
    """Return what of the augmentation depends on patch and data."""
    return recipe.augmentation.model_dump(mode="json", include=set(_BY_PATCH))


def patch_ratio(patch: Sequence[int]) -> str:
    """Return how flat a patch is, which bounds how far it may be turned."""
    if len(patch) == 2:
        return f"longer edge {max(patch) / min(patch):.3g} times the shorter"
    return f"longest axis {max(patch) / patch[0]:.3g} times the first"


def training_decisions(
    name: str, recipe: TrainingSpec, usual: TrainingSpec, patch: tuple[int, ...], stages: int, options: Options
) -> Iterator[Decision]:
    """Why the recipe of one configuration is what it is.

    Parameters
    ----------
    usual : the recipe if nothing had been set of it
    patch : size the network sees
    stages : resolution levels of the network
    options : what was set of the recipe and the augmentation
    """
    asked = options.training.values
    yield _told(
        f"{name}.training",
        recipe_values(recipe),
        recipe_values(usual),
        [f"training.{key}" for key in asked if key != "deep_supervision"],
        rule="the reference's training recipe",
        bound="preset",
        source="nnU-Net 2.8.1 training",
        would_change="the options training.*, or a time budget",
    )
    yield _told(
        f"{name}.training.deep_supervision",
        recipe.deep_supervision,
        usual.deep_supervision,
        ["training.deep_supervision"] if "deep_supervision" in asked else [],
        rule="every decoder level but the lowest is supervised; networks of two stages have one level and nothing to "
        "add",
        inputs={"stages": stages},
        bound="number of stages",
        source="nnU-Net 2.8.1 training",
        would_change="a patch so small that the network has two stages"
        if usual.deep_supervision
        else "a larger patch, which gives the network a third stage",
    )
    yield from _augmentation_decisions(name, recipe, usual, patch, options.augmentation)


def _augmentation_decisions(
    name: str, recipe: TrainingSpec, usual: TrainingSpec, patch: tuple[int, ...], asked: AugmentationOptions
) -> Iterator[Decision]:
    if len(patch) == 2:
        rule = "pictures are turned by any angle, by up to 15 degrees where one edge is more than 1.5 times the other"
    else:
        rule = (
            "volumes are turned by up to 30 degrees about each axis; a patch with an axis more than three times the "
            "first one by any angle, in its plane only (dummy_2d)"
        )
    rule += "; the patch that is cut out first is large enough for the turned one at a scale of 0.85"
    rule += " (axes as the network sees them); channels with a mask are set to 0 outside it"
    strength = ["augmentation.strength"] if asked.strength == "none" else []
    yield _told(
        f"{name}.augmentation",
        geometry_values(recipe),
        geometry_values(usual),
        strength + [f"augmentation.{key}" for key in asked.values if key in _BY_PATCH],
        rule=rule,
        inputs={"patch_size": by_axis(patch)},
        bound=patch_ratio(patch),
        source="nnU-Net 2.8.1 training, patch geometry",
        would_change="another patch size, or the options planning.mirror_axes and augmentation.*",
    )
    yield _told(
        f"{name}.augmentation.intensities",
        recipe.augmentation.model_dump(mode="json", exclude=_NO_INTENSITY),
        usual.augmentation.model_dump(mode="json", exclude=_NO_INTENSITY),
        strength + [f"augmentation.{key}" for key in asked.values if key not in _BY_PATCH],
        rule="the reference's probabilities and ranges",
        bound="preset",
        source="nnU-Net 2.8.1 training, augmentation",
        would_change="the options augmentation.*",
    )


def _told(
    key: str,
    value: Any,
    usual: Any,
    options: Sequence[str],
    *,
    rule: str,
    inputs: Mapping[str, Any] | None = None,
    bound: str,
    source: str,
    would_change: str,
) -> Decision:
    """Return the decision of the rule, or, where options set a part of the value, that of the user beside it."""
    if options:
        by_rule = usual
        if isinstance(usual, Mapping):
            by_rule = {name: item for name, item in usual.items() if item != value[name]} or "the same"
        rule = f"what you set; by rule: {rule}"
        inputs = {**(inputs or {}), "by_rule": by_rule}
        bound, source, would_change = SET, "options", f"the option{'s' * (len(options) > 1)} {listing(options)}"
    return reason(key, value, rule, inputs=inputs, bound=bound, source=source, would_change=would_change)
