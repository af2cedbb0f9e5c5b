"""Sizing a run to the time there is: network width, batch, patch, recipe, folds, configurations.

The planner says what fits the data; this module says what fits the clock. It has no clock itself: the caller measures
seconds per step for the candidates proposed here and says what it found. The constants and the experiments behind them
are in ``docs/decisions/time-budget.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from segfit.errors import InputError
from segfit.feature_maps import network_elements
from segfit.options import Options
from segfit.planning.configuration_decisions import stride_inputs
from segfit.planning.plan import Decision, Plan, RunSpec
from segfit.planning.reasons import SET, by_axis
from segfit.planning.recipe_decisions import geometry_values, patch_ratio, recipe_values
from segfit.planning.wording import value_in_words
from segfit.specs import Configuration, NetworkSpec, TrainingSpec

__all__ = [
    "ENOUGH_STEPS",
    "FEWEST_STEPS",
    "LONG_STEPS",
    "MANY_STEPS",
    "NARROW",
    "TOLERABLE_STEPS",
    "WANTED_STEPS",
    "WIDE_STEPS",
    "candidates",
    "choose_configurations",
    "choose_trainings",
    "coarser",
    "reductions",
    "short_recipe",
    "shrunk",
    "with_run",
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
"""From here on the reference's recipe is kept."""
NARROW = 16
"""Features of the first stage below which a network costs hardly less; taken only where the patch cannot shrink."""

_WIDTHS = (8, 16, 24, 32)  # features of the first stage, narrow to wide
_MOST_FEATURES = 128  # of the deep stages of a network that is trained for a short time
_SMALL_BATCH = 2
_BATCH_VOXELS = 2**15  # much smaller batches, of slices of volumes, cost hardly less; an even number suits two threads
_FEWEST_STAGES = 3  # of a network whose patch is reduced
_REDUCTION = 0.8  # of the patch's voxels, from one version to the next that needs less memory
_SHORT_MOMENTUM = 0.95
_MUON_RATE = 0.05
_COOLDOWN_SHARE = 0.5  # of a short training
_SOURCE = "segfit, docs/decisions/time-budget.md"
_RUN_RULE = (
    "one network first, of several that were tried the one that had learned most; another fold, then another "
    f"configuration, if every training still gets {ENOUGH_STEPS} steps"
)
_EXTENSION_RULE = "the network of an earlier, shorter run goes on from where its learning rate began to fall"
_ORDER = ("3d_fullres", "2d", "3d_lowres")  # which configuration is trained first


def choose_configurations(names: Sequence[str], options: Options) -> tuple[str, ...]:
    """Return the configurations that can be trained, the most promising first.

    Those asked for keep their order. The second stage of a cascade needs the predictions of the first, which this
    version does not train on: asking for it raises `InputError`.
    """
    asked = options.planning.configurations
    if asked is None:
        return tuple(name for name in _ORDER if name in names)
    unusable = [name for name in asked if name not in _ORDER]
    if unusable:
        raise InputError(
            f"configuration {unusable[0]} cannot be trained by this version (it is planned and predicted only); "
            f"choose among {', '.join(name for name in _ORDER if name in names)}"
        )
    return asked


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
    most = None if fixed else _MOST_FEATURES
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
    if recipe.optimizer == "adamw":
        return recipe
    if "optimizer" in asked:
        values["learning_rate"] = round(recipe.learning_rate * (1 - _SHORT_MOMENTUM) / (1 - recipe.momentum), 6)
        if "momentum" in asked:
            del values["learning_rate"]
    else:
        values |= {"optimizer": "muon", "learning_rate": _MUON_RATE}
    return recipe.model_copy(update={key: value for key, value in values.items() if key not in asked})


def with_run(
    plan: Plan,
    sized: Mapping[str, tuple[Configuration, TrainingSpec]],
    run: RunSpec,
    *,
    asked: Mapping[str, Any],
    memory_gb: Mapping[str, float | None],
    heads: int,
    coarser: Collection[str] = (),
) -> Plan:
    """Return the plan with what was sized to the budget, a reason for each, and how that differs from before.

    Parameters
    ----------
    sized : by name of the configuration, those that are trained
    asked : what the user asked for (time, steps, folds, ...), the inputs of the decisions
    memory_gb : by name of the configuration, the memory that a measured step had to be reduced to; None: it fitted
    heads : declared labels, as the memory estimate counts them
    coarser : configurations for which `plan` was made with a coarser spacing than that of the rules
    """
    decided = {item.key: item for item in plan.decisions}
    changes = [_unset(change, coarser) for change in plan.changes]
    configurations: dict[str, Configuration] = {}
    for name, (configuration, recipe) in sized.items():
        before, limit = plan.configurations[name], memory_gb.get(name)
        estimate = before.memory_estimate
        if (configuration.network, configuration.patch_size) != (before.network, before.patch_size):
            estimate = network_elements(configuration.network, configuration.patch_size, heads)
        now = configurations[name] = configuration.model_copy(update={"memory_estimate": estimate})
        steps = run.expected_steps.get(name, 0)
        inputs = {**asked, "seconds_per_step": run.seconds_per_step.get(name), "expected_steps": steps}
        for key, old, new, rule, change in _sized_values(before, now):
            known = decided.get(f"{name}.{key}")
            if limit is not None and key != "network.features":
                rule = "the largest whose training step, measured, fits into the memory that is free, smaller batches "
                rule += "before smaller patches"
                change = "more free memory, or the option planning." + key
            kept_batch = key == "batch_size" and now != before and not (known is not None and known.bound == SET)
            if new != old or kept_batch:
                decided[f"{name}.{key}"] = Decision(
                    key=f"{name}.{key}",
                    value=new,
                    rule=rule,
                    inputs=inputs | {"by_rule_of_the_preset": old},
                    bound="time budget" if limit is None else f"{limit:.1f} GB of free memory",
                    source=_SOURCE,
                    would_change=change,
                )
            if new != old:
                words = [value_in_words(value, key) for value in (new, old)]
                changes.append(f"{name}: {key.removeprefix('network.')} {words[0]} instead of {words[1]}")
        for key in ("optimizer", "learning_rate", "momentum", "cooldown_share"):
            old, new = getattr(plan.training[name], key), getattr(recipe, key)
            if old != new:
                changes.append(f"{name}: {key} {value_in_words(new, key)} instead of {value_in_words(old, key)}")
        for part in ("strides", "kernels", "encoder_convs", "decoder_convs"):
            item = decided.get(f"{name}.network.{part}")
            if item is not None and getattr(before.network, part) != getattr(now.network, part):
                decided[item.key] = item.model_copy(update={"value": _as_json(getattr(now.network, part))})
        spacing = decided.get(f"{name}.spacing_mm")
        if name in coarser and spacing is not None:
            decided[spacing.key] = spacing.model_copy(
                update={
                    "rule": "coarser than by the rules of the preset, so that a patch that leaves enough steps sees the"
                    " whole image; larger voxels keep enough of the labels",
                    "bound": "time budget",
                    "source": _SOURCE,
                    "would_change": "a longer time budget, or the option planning.target_spacing_mm",
                }
            )
        decided |= {item.key: item for item in _following(decided, before, now, recipe)}
        item = _recipe_decision(name, recipe, decided.get(f"{name}.training"), inputs, run)
        decided[item.key] = item
    decided["run"] = Decision(
        key="run",
        value={"configurations": list(run.configurations), "folds": list(run.folds)},
        rule=_RUN_RULE if run.extends is None else _EXTENSION_RULE,
        inputs={
            **asked,
            "seconds_per_training": run.seconds_per_training,
            "steps": run.steps,
            "tried": [f"{entry.configuration}: Dice {entry.mean or 0:.2f}" for entry in run.race],
            **_beginning(run),
        },
        bound="time budget" if run.steps is None else "steps asked for",
        source=_SOURCE,
        would_change="a longer time budget, or the options planning.configurations and planning.folds",
    )
    return plan.model_copy(
        update={
            "configurations": plan.configurations | configurations,
            "training": plan.training | {name: item for name, (_, item) in sized.items()},
            "run": run,
            "decisions": tuple(decided.values()),
            "changes": tuple(changes),
            "stock": plan.stock and tuple(changes) == plan.changes,
        }
    )


def _beginning(run: RunSpec) -> dict[str, Any]:
    """Return what a run goes on with, as inputs of the decision on it."""
    if run.extends is None:
        return {}
    return {"seconds_of_the_earlier_run": run.extends.time_s, "step_before_its_cool_down": run.extends.step}


def _following(
    decided: Mapping[str, Decision], before: Configuration, now: Configuration, recipe: TrainingSpec
) -> Iterator[Decision]:
    """Yield anew the decisions on what follows from another width or patch."""
    estimate = decided.get(f"{now.name}.memory_estimate")
    if estimate is not None:
        yield estimate.model_copy(update={"value": now.memory_estimate})
    if now.patch_size == before.patch_size:
        return
    share = decided.get({"3d_fullres": "configurations", "3d_lowres": "3d_lowres.spacing_mm"}.get(now.name, ""))
    if share is not None:
        yield share.model_copy(update={"rule": f"{share.rule} (by the planned patch, before it was reduced)"})
    strides = decided.get(f"{now.name}.network.strides")
    if strides is not None and strides.bound != SET:
        lost = before.network.num_stages - now.network.num_stages
        less = f" but for the {lost} lowest resolutions" if lost > 0 else ""
        yield strides.model_copy(
            update={
                "rule": f"{strides.rule}; decided for the planned patch, and kept{less} when the patch was reduced",
                "inputs": stride_inputs(now) | {"planned_patch_size": list(before.patch_size)},
                "bound": f"planned patch of {by_axis(before.patch_size)}",
            }
        )
    geometry = decided.get(f"{now.name}.augmentation")
    if geometry is not None:
        yield geometry.model_copy(
            update={
                "value": geometry_values(recipe),
                "inputs": geometry.inputs | {"patch_size": by_axis(now.patch_size)},
                "bound": geometry.bound if geometry.bound == SET else patch_ratio(now.patch_size),
            }
        )


def _recipe_decision(
    name: str, recipe: TrainingSpec, before: Decision | None, inputs: Mapping[str, Any], run: RunSpec
) -> Decision:
    """Return the decision on the recipe, of which the user may have set a part."""
    steps = run.expected_steps.get(name, 0)
    rule = (
        f"the recipe for a training of about {steps} steps; below {LONG_STEPS} updates are orthogonalised and the "
        "learning rate falls in the last half; arithmetic and memory layout are those that were measured to be fastest"
    )
    bound = "time budget" if run.steps is None else "steps asked for"
    if before is not None and before.bound == SET:
        rule, bound, inputs = f"{rule}; what you set stays", f"{SET}; {bound}", {**inputs, **before.inputs}
    return Decision(
        key=f"{name}.training",
        value=recipe_values(recipe),
        rule=rule,
        inputs=dict(inputs),
        bound=bound,
        source=_SOURCE,
        would_change="a longer time budget, or the options training.*",
    )


def _unset(change: str, coarser: Collection[str]) -> str:
    """Return a change without the words that it was set, where sizing asked for a coarser spacing."""
    sized = any(change.startswith(f"{name}: target_spacing_mm") for name in coarser)
    return change.replace(f" {SET}", "") if sized else change


def _as_json(value: tuple[Any, ...]) -> list[Any]:
    return [list(item) if isinstance(item, tuple) else item for item in value]


def _sized_values(before: Configuration, after: Configuration) -> tuple[tuple[str, Any, Any, str, str], ...]:
    """Return (key, old, new, rule, what would change it) of what sizing may change."""
    longer = "a longer time budget, a faster machine, or the option planning."
    return (
        (
            "network.features",
            list(before.network.features),
            list(after.network.features),
            f"the widest network that still gets {WIDE_STEPS} training steps, its deep stages with at most "
            f"{_MOST_FEATURES} features",
            longer + "base_features",
        ),
        (
            "batch_size",
            before.batch_size,
            after.batch_size,
            f"the largest batch that leaves {MANY_STEPS} training steps, once the network has its full width",
            longer + "batch_size",
        ),
        (
            "patch_size",
            list(before.patch_size),
            list(after.patch_size),
            f"reduced along its longest axes until a network of {NARROW} features gets {TOLERABLE_STEPS} steps",
            longer + "patch_size",
        ),
    )
