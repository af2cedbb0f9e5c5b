"""A plan taken over from elsewhere: configurations turned into what a user would set to get them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from segfit.options import ConfigurationName, ConfigurationOptions, PlanningOptions
from segfit.planning.plan import Decision, Plan
from segfit.planning.rules import SET
from segfit.specs import Configuration, NetworkSpec

__all__ = ["NETWORK_OPTIONS", "name_here", "network_values", "told_as_taken_over", "values_of", "with_values"]

NETWORK_OPTIONS = (
    *("kind", "base_features", "features", "strides", "kernels", "encoder_convs", "decoder_convs"),
    "expansion",
)
"""Options that say what network is trained."""
_TAKEN = "taken over"


def name_here(ndim: int) -> ConfigurationName:
    """Return the name of the configuration that a network with so many axes becomes, whatever it was called."""
    return "2d" if ndim == 2 else "3d_fullres"


def network_values(spec: NetworkSpec) -> dict[str, Any]:
    """Return the options that give a network."""
    without = {"base_features"} if spec.kind == "mednext" else {"base_features", "expansion"}
    return {leaf: getattr(spec, leaf) for leaf in NETWORK_OPTIONS if leaf not in without}


def values_of(item: Configuration) -> dict[str, Any]:
    """Return the options that give a configuration: all but the batch, which follows from memory and data.

    The slices of a 2D configuration on volumes keep their own distance; where options need a number, it is the largest
    of the others.
    """
    spec, network = item.preprocessing, item.network
    by_axis = dict(zip(spec.transpose, spec.spacing_mm, strict=True))
    most = max(mm for mm in spec.spacing_mm if mm is not None)
    found: dict[str, Any] = {
        "target_spacing_mm": tuple(by_axis[axis] or most for axis in range(spec.image_ndim)),
        "patch_size": _in_array_order(item.patch_size, spec.transpose),
        "batch_dice": item.batch_dice,
        "normalization": tuple(how.scheme for how in spec.normalization),
        "resample_image": {
            name: value
            for name, value in spec.resample_image.model_dump().items()
            if name in ("method", "order", "order_separate_axis", "separate_threshold")
        }
        | {"force_separate": "auto" if (force := spec.resample_image.force_separate) is None else force},
        **network_values(network),
    }
    if spec.image_ndim == 3:
        found["transpose"] = spec.transpose
    if any(how.scheme == "zscore" for how in spec.normalization):
        found["use_mask"] = tuple(how.use_mask for how in spec.normalization)
    if any(how.statistics is not None for how in spec.normalization):
        found["statistics"] = tuple(
            None
            if how.statistics is None
            else how.statistics.model_dump(include={"mean", "std", "percentile_00_5", "percentile_99_5"})
            for how in spec.normalization
        )
    return found


def _in_array_order(patch: tuple[int, ...], transpose: tuple[int, ...]) -> tuple[int, ...]:
    if len(patch) < 3:
        return patch  # the axes of a plane keep their order
    return tuple(patch[transpose.index(axis)] for axis in range(3))


def with_values(planning: PlanningOptions, name: ConfigurationName, values: dict[str, Any]) -> PlanningOptions:
    """Return the options with these values for one configuration; what is set for it, or for all, stays."""
    own = next((item for known, item in planning.by_configuration.items() if known == name), ConfigurationOptions())
    general = planning.model_dump(exclude_none=True, include=set(ConfigurationOptions.model_fields))
    if len(general.get("patch_size", ())) != len(values.get("patch_size", ())):
        general.pop("patch_size", None)  # of other axes
    taken = {
        leaf: value | general.get(leaf, {}) if isinstance(value, dict) else value
        for leaf, value in values.items()
        if isinstance(value, dict) or leaf not in general
    }
    if (own.kind or general.get("kind")) not in (None, "mednext"):
        taken.pop("expansion", None)  # it belongs to the network that is not taken over
    merged = taken | own.model_dump(exclude_none=True, exclude_defaults=True)
    found = dict(planning.by_configuration) | {name: ConfigurationOptions.model_validate(merged)}
    return planning.model_copy(update={"by_configuration": found})


def told_as_taken_over(plan: Plan, name: str, leaves: Collection[str]) -> Plan:
    """Return the plan with the words that a value was taken over, where it says that the user set it."""
    keys = [f"planning.{name}.{leaf}" for leaf in leaves]

    def told(item: Decision) -> Decision:
        if not item.options or not all(
            any(f"{option}.".startswith(f"{key}.") for key in keys) for option in item.options
        ):
            return item
        usual = {} if item.by_rule is None else {"by_rule_of_the_preset": item.by_rule}
        told = {"rule": "taken_over", "bound": "", "options": (), "by_rule": None, "outcomes": (), "inputs": usual}
        return item.model_copy(update=told)

    changes = (change.replace(f" {SET}", f" {_TAKEN}") if _names(change, leaves) else change for change in plan.changes)
    return plan.model_copy(update={"decisions": tuple(map(told, plan.decisions)), "changes": tuple(changes)})


def _names(change: str, leaves: Collection[str]) -> bool:
    """Whether a change is about one of these values."""
    words = change.partition(": ")[2] or change
    return any(words.startswith(leaf) for leaf in leaves)
