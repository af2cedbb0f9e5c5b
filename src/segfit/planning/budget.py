"""Sizing a run to the time there is: network width, batch, patch, recipe, folds, configurations.

The planner says what fits the data; this module says what fits the clock. It has no clock itself: the caller measures
seconds per step for the candidates proposed here and says what it found. The constants and the experiments behind them
are in ``docs/decisions/time-budget.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from segfit.options import CASCADE, Options
from segfit.specs import Configuration, NetworkSpec, TrainingSpec

__all__ = [
    "ENOUGH_STEPS",
    "FEWEST_STEPS",
    "FINE_TUNING_SHARE",
    "FINE_TUNING_WARMUP",
    "LONG_STEPS",
    "MANY_STEPS",
    "MOST_FEATURES",
    "MOST_STEPS",
    "NARROW",
    "TOLERABLE_STEPS",
    "WANTED_STEPS",
    "WIDE_STEPS",
    "candidates",
    "choose_configurations",
    "choose_trainings",
    "coarser",
    "fine_tuning_recipe",
    "reductions",
    "short_recipe",
    "shrunk",
]

FEWEST_STEPS = 100
"""With fewer optimiser steps a network has learned nothing worth handing over."""
WANTED_STEPS = 1000
"""A patch should see the whole image if it still gets this many steps."""
WIDE_STEPS = 2000
"""A wider network is taken only if it still gets this many steps; below, width costs more than it gives."""
MANY_STEPS = 3000
"""Wider deep stages and larger batches are taken only if they still get this many steps."""
TOLERABLE_STEPS = 600
"""The patch is reduced only if a narrow network does not even get these: a network that sees less learns less."""
ENOUGH_STEPS = 10_000
"""Another fold, or another configuration, is trained only if each training still gets this many steps."""
LONG_STEPS = 10_000
"""From here on nnU-Net's recipe is kept."""
MOST_STEPS = 250_000
"""nnU-Net's schedule, 1000 epochs of 250: a training ends with it, also where there is more time."""
NARROW = 16
"""Features of the first stage below which a network costs hardly less; taken only where the patch cannot shrink."""

FINE_TUNING_SHARE = 0.3
"""Of the recipe's learning rate, for a network that starts from a model (docs/decisions/fine-tuning.md)."""
FINE_TUNING_WARMUP = 0.1
"""Share of such a training in which the rate rises to that."""

MOST_FEATURES = 128
"""Of the deep stages of a network that is trained for a short time."""

_WIDTHS = (8, 16, 24, 32)  # features of the first stage, narrow to wide
_SMALL_BATCH = 2
_BATCH_VOXELS = 2**15  # much smaller batches, of slices of volumes, cost hardly less; an even number suits two threads
_FEWEST_STAGES = 3  # of a network whose patch is reduced
_REDUCTION = 0.8  # of the patch's voxels, from one version to the next that needs less memory
_SHORT_MOMENTUM = 0.95
_MUON_RATE = 0.05
_COOLDOWN_SHARE = 0.5  # of a short training
_ORDER = ("3d_fullres", "2d", "3d_lowres", CASCADE)  # which configuration is trained first


def choose_configurations(names: Sequence[str], options: Options) -> tuple[str, ...]:
    """Return the configurations that can be trained, the most promising first.

    Those asked for keep their order; the second stage of a cascade comes after its first one, which it needs.
    """
    asked = options.planning.configurations
    if asked is None:
        return tuple(name for name in _ORDER if name in names)
    first = () if CASCADE not in asked else ("3d_lowres",)
    others = tuple(name for name in asked if name != CASCADE)
    return (*(name for name in first if name not in others), *others, *([CASCADE] if first else ()))


def candidates(configuration: Configuration, options: Options) -> tuple[Configuration, ...]:
    """Return versions of a configuration from the cheapest to the planned one, for the caller to measure.

    First wider and wider networks with a small batch, then larger batches of the planned network. What the user fixed
    stays fixed.
    """
    planned = configuration.network.features[0]
    asked = options.planning.of(configuration.name)
    fixed = bool(asked.base_features or asked.features)
    widths = [planned] if fixed else [*(w for w in _WIDTHS if w < planned), planned]
    pairs = round(_BATCH_VOXELS / prod(configuration.patch_size) / _SMALL_BATCH)
    small = min(configuration.batch_size, _SMALL_BATCH * max(1, pairs))
    batches = [configuration.batch_size]
    if asked.batch_size is None:
        while batches[0] > small:
            batches.insert(0, max(small, batches[0] // 2))
    most = None if fixed else MOST_FEATURES
    narrow = [_resized(configuration, width, batches[0], most) for width in widths]
    return tuple(dict.fromkeys([*narrow, *(_resized(configuration, planned, batch, None) for batch in batches)]))


def _resized(configuration: Configuration, width: int, batch: int, most: int | None) -> Configuration:
    network = configuration.network
    features = tuple(n * width // network.features[0] for n in network.features)  # the cap shrinks with the width
    if most is not None:
        features = tuple(min(n, max(most, width)) for n in features)
    return configuration.model_copy(
        update={"network": network.model_copy(update={"features": features}), "batch_size": batch}
    )


def coarser(spacing_mm: Sequence[float], times: float) -> tuple[float, ...]:
    """Return a spacing with voxels `times` as large: the finest axes give way first, to one common spacing."""
    order = sorted(spacing_mm)
    for count in range(1, len(order) + 1):  # axes that become coarser
        common = (times * prod(order[:count])) ** (1 / count)
        if count == len(order) or common <= order[count]:
            return tuple(max(value, common) for value in spacing_mm)
    raise AssertionError("the last count always suffices")


def shrunk(configuration: Configuration, share: float) -> Configuration | None:
    """Return the configuration with a patch of at most `share` of its voxels; None if it cannot be that small.

    The longest axis gives way first, in steps the network can halve; every axis keeps at least two of them. Where none
    can give way, the network loses its lowest resolution, down to three.
    """
    patch, network = list(configuration.patch_size), configuration.network
    wanted = share * prod(patch)
    while prod(patch) > wanted:
        divisor = network.divisor
        open_axes = [axis for axis, size in enumerate(patch) if size >= 3 * divisor[axis]]
        if not open_axes:
            if network.num_stages <= _FEWEST_STAGES:
                return None
            network = _shallower(network)
            continue
        axis = max(open_axes, key=lambda a: patch[a])
        patch[axis] -= divisor[axis]
    return configuration.model_copy(update={"patch_size": tuple(patch), "network": network})


def _shallower(network: NetworkSpec) -> NetworkSpec:
    """Return the network without its lowest resolution."""
    encoder = {name: getattr(network, name)[:-1] for name in ("features", "strides", "kernels", "encoder_convs")}
    return network.model_copy(update=encoder | {"decoder_convs": network.decoder_convs[1:]})


def reductions(configuration: Configuration, options: Options) -> tuple[Configuration, ...]:
    """Return versions of a configuration that need less and less memory, for a device that cannot hold the planned one.

    First smaller batches, then the smallest batch with smaller patches. What the user fixed stays fixed.
    """
    asked = options.planning.of(configuration.name)
    result = []
    current = configuration
    while asked.batch_size is None and current.batch_size > _SMALL_BATCH:
        current = current.model_copy(update={"batch_size": max(_SMALL_BATCH, current.batch_size // 2)})
        result.append(current)
    while asked.patch_size is None and (smaller := shrunk(current, _REDUCTION)) is not None:
        current = smaller
        result.append(current)
    return tuple(result)


def choose_trainings(
    seconds: float, step_seconds: Sequence[float], num_folds: int, *, folds: int | None = None
) -> tuple[int, int]:
    """Return how many configurations and how many folds of each to train in `seconds`.

    Parameters
    ----------
    step_seconds : by configuration, in the order of `choose_configurations`
    folds : how many folds were asked for, if any

    One network at first; then more folds of the first configuration, then the next configurations with as many folds,
    as long as every training gets `ENOUGH_STEPS`.
    """

    def fits(configurations: int, count: int) -> bool:
        return count * sum(step_seconds[:configurations]) * ENOUGH_STEPS <= seconds

    count = folds or next((n for n in range(num_folds, 1, -1) if fits(1, n)), 1)
    if folds is None and count < num_folds:
        return 1, count
    return next((n for n in range(len(step_seconds), 1, -1) if fits(n, count)), 1), count


def short_recipe(recipe: TrainingSpec, options: Options) -> TrainingSpec:
    """Return the recipe for a training of less than `LONG_STEPS` steps; what the user set stays.

    Orthogonalised updates reach in half the steps what gradient descent does. The rate stays constant for half of the
    time, so that candidates can be compared at any moment of it, and then falls to zero. Gradient descent, where it
    was asked for, gets less momentum (0.99 averages over the last hundred gradients or so) and a rate that keeps
    rate / (1 - momentum), the length of a step in the long run.
    """
    asked = options.training.values
    values: dict[str, Any] = {"momentum": _SHORT_MOMENTUM, "cooldown_share": _COOLDOWN_SHARE}
    if "optimizer" in asked and recipe.optimizer == "adamw":
        return recipe
    if "optimizer" in asked:
        values["learning_rate"] = round(recipe.learning_rate * (1 - _SHORT_MOMENTUM) / (1 - recipe.momentum), 6)
        if "momentum" in asked:
            del values["learning_rate"]
    else:
        values |= {"optimizer": "muon", "learning_rate": _MUON_RATE}
    return recipe.model_copy(update={key: value for key, value in values.items() if key not in asked})


def fine_tuning_recipe(recipe: TrainingSpec, options: Options) -> TrainingSpec:
    """Return the recipe for a network that starts from a model: a low rate, reached slowly; what the user set stays."""
    values = {
        "learning_rate": round(recipe.learning_rate * FINE_TUNING_SHARE, 8),
        "warmup_share": FINE_TUNING_WARMUP,
    }
    return recipe.model_copy(update={key: value for key, value in values.items() if key not in options.training.values})
