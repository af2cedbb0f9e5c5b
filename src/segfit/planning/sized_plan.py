"""The plan with what was sized to the time and the memory there is, each with its reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

from segfit.feature_maps import network_elements
from segfit.options import CASCADE
from segfit.planning.configurations import stride_inputs
from segfit.planning.explain import change_in_words
from segfit.planning.plan import Decision, Initial, Plan, RunSpec
from segfit.planning.recipe import geometry_values, patch_ratio, recipe_values
from segfit.planning.rules import SET
from segfit.planning.trace import as_json
from segfit.specs import Configuration, TrainingSpec
from segfit.text import value_in_words

__all__ = ["with_run"]

_SIZED = {"network.features": "sized_features", "batch_size": "sized_batch", "patch_size": "sized_patch"}
"""What sizing may change of a configuration, and by which rule."""
_RECIPE = ("optimizer", "learning_rate", "momentum", "warmup_share", "cooldown_share")


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
    told = _Told({item.key: item for item in plan.decisions}, [_unset(change, coarser) for change in plan.changes])
    configurations: dict[str, Configuration] = {}
    for name, (configuration, recipe) in sized.items():
        before, now = plan.configurations[name], configuration
        if (now.network, now.patch_size) != (before.network, before.patch_size):
            estimate = network_elements(now.network, now.patch_size, heads)
            now = now.model_copy(update={"memory_estimate": estimate})
        configurations[name] = now
        inputs = {
            **asked,
            "seconds_per_step": run.seconds_per_step.get(name),
            "expected_steps": run.expected_steps.get(name, 0),
        }
        told.sizes(before, now, inputs, memory_gb.get(name))
        told.recipe(name, plan.training[name], recipe, inputs, run)
        told.following(before, now, recipe)
        if run.initial is not None:
            told.fine_tuned(name, recipe, run.initial)
        if name in coarser:
            told.coarser(f"{name}.spacing_mm")
    told.run(run, asked, [name for name in (CASCADE,) if name in plan.configurations and name not in sized])
    changes = tuple(told.changes)
    return plan.model_copy(
        update={
            "configurations": plan.configurations | configurations,
            "training": plan.training | {name: item for name, (_, item) in sized.items()},
            "run": run,
            "decisions": tuple(told.decisions.values()),
            "changes": changes,
            "stock": plan.stock and changes == plan.changes,
        }
    )


def _unset(change: str, coarser: Collection[str]) -> str:
    """Return a change without the words that it was set, where sizing asked for a coarser spacing."""
    sized = any(change.startswith(f"{name}: target_spacing_mm") for name in coarser)
    return change.replace(f" {SET}", "") if sized else change


class _Told:
    """The decisions of a plan, by key, and its changes, while those of sizing take their places."""

    def __init__(self, decisions: dict[str, Decision], changes: list[str]) -> None:
        self.decisions, self.changes = decisions, changes

    def decide(self, key: str, value: Any, rule: str, bound: str, inputs: Mapping[str, Any]) -> None:
        """Put a decision in the place of the one before."""
        self.decisions[key] = Decision(key=key, value=as_json(value), rule=rule, bound=bound, inputs=as_json(inputs))

    def again(self, key: str, inputs: Mapping[str, Any] | None = None, **update: Any) -> None:
        """Change a decision that there is: more inputs, or other fields."""
        item = self.decisions.get(key)
        if item is not None:
            self.decisions[key] = item.model_copy(update={**update, "inputs": item.inputs | as_json(inputs or {})})

    def change(self, name: str, leaf: str, now: Any, before: Any) -> None:
        """Say that a value of a configuration is another one than before."""
        words = {"value": value_in_words(now, leaf), "by_rule": value_in_words(before, leaf)}
        self.changes.append(f"{name}: {change_in_words('sized', {'name': leaf.removeprefix('network.'), **words})}")

    def sizes(
        self, before: Configuration, now: Configuration, inputs: Mapping[str, Any], limit_gb: float | None
    ) -> None:
        """Tell width, batch and patch; a batch that stayed is told too where something else changed."""
        for leaf, rule in _SIZED.items():
            key = f"{now.name}.{leaf}"
            old, new = (as_json(attrgetter(leaf)(item)) for item in (before, now))
            known = self.decisions.get(key)
            stayed = leaf == "batch_size" and now != before and not (known is not None and known.options)
            if new == old and not stayed:
                continue
            of_memory = limit_gb is not None and leaf != "network.features"
            bound = {} if limit_gb is None else {"free_gb": limit_gb}
            self.decide(
                key,
                new,
                "sized_memory" if of_memory else rule,
                "time" if limit_gb is None else "memory",
                {**inputs, "by_rule_of_the_preset": old, **bound},
            )
            if new != old:
                self.change(now.name, leaf, new, old)

    def recipe(
        self, name: str, before: TrainingSpec, recipe: TrainingSpec, inputs: Mapping[str, Any], run: RunSpec
    ) -> None:
        """Tell the recipe, of which the user may have set a part."""
        for leaf in _RECIPE:
            old, new = getattr(before, leaf), getattr(recipe, leaf)
            if old != new:
                self.change(name, leaf, new, old)
        key = f"{name}.training"
        known = self.decisions.get(key)
        self.decide(key, recipe_values(recipe), "sized_recipe", _bound(run), inputs)
        if known is not None and known.options:
            leaves = [option.partition(".")[2] for option in known.options]
            usual = {leaf: known.by_rule[leaf] for leaf in leaves} if known.by_rule else None
            self.again(key, options=known.options, by_rule=usual)

    def fine_tuned(self, name: str, recipe: TrainingSpec, initial: Initial) -> None:
        """Tell the rate of a network that starts from a model, and what it takes over."""
        inputs = initial.model_dump(mode="json", exclude={"anew"})
        value = {"learning_rate": recipe.learning_rate, "warmup_share": recipe.warmup_share}
        self.decide(f"{name}.training.start", value, "fine_tuning", "", inputs)

    def coarser(self, key: str) -> None:
        """Tell a spacing that sizing asked for, not the user."""
        known = self.decisions.get(key)
        usual = {} if known is None else {"by_rule_of_the_preset": known.by_rule}
        self.again(key, usual, rule="sized_spacing", bound="time", options=(), by_rule=None, outcomes=())

    def following(self, before: Configuration, now: Configuration, recipe: TrainingSpec) -> None:
        """Tell anew what follows from another width or patch."""
        name = now.name
        self.again(f"{name}.memory_estimate", value=now.memory_estimate)
        for part in ("strides", "kernels", "encoder_convs", "decoder_convs"):
            self.again(f"{name}.network.{part}", value=as_json(getattr(now.network, part)))
        if now.patch_size == before.patch_size:
            return
        share = {"3d_fullres": "configurations", "3d_lowres": "3d_lowres.spacing_mm"}.get(name, "")
        self.again(share, {"patch_size_after_sizing": now.patch_size})
        strides = self.decisions.get(f"{name}.network.strides")
        if strides is not None and not strides.options:
            lost = before.network.num_stages - now.network.num_stages
            inputs = stride_inputs(now.spacing_mm, now.patch_size, now.network)
            inputs |= {"planned_patch_size": before.patch_size} | ({"lost_stages": lost} if lost > 0 else {})
            self.again(strides.key, inputs, bound="lost" if lost > 0 else "kept")
        patch = {"patch_size": now.patch_size, "ratio": patch_ratio(now.patch_size)}
        self.again(f"{name}.augmentation", patch, value=geometry_values(recipe))

    def run(self, run: RunSpec, asked: Mapping[str, Any], left_out: Sequence[str]) -> None:
        """Tell what is trained, and what there is no time for."""
        inputs = {
            **asked,
            "seconds_per_training": run.seconds_per_training,
            "steps": run.steps,
            "tried": [f"{entry.configuration}: Dice {entry.mean or 0:.2f}" for entry in run.race],
        }
        if left_out and run.steps is None:
            inputs["left_out"] = left_out
        if run.extends is not None:
            inputs |= {"seconds_of_the_earlier_run": run.extends.time_s, "step_before_its_cool_down": run.extends.step}
        value = {"configurations": run.configurations, "folds": run.folds}
        self.decide("run", value, "run" if run.extends is None else "run_extended", _bound(run), inputs)


def _bound(run: RunSpec) -> str:
    return "time" if run.steps is None else "steps"
