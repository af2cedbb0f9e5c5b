"""What the user set beside what the rules would have given: told in the decisions and in the changes of a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from segfit.options import ConfigurationOptions, PlanningOptions, ResamplingOptions, StatisticsOptions
from segfit.planning.overrides import option_key
from segfit.planning.plan import Decision, Plan
from segfit.planning.reasons import SET, by_axis
from segfit.planning.wording import value_in_words
from segfit.specs import Configuration, IntensityStatistics, TrainingSpec
from segfit.words import listing

__all__ = ["anything_set", "with_set_values"]

_NETWORK = ("kind", "features", "strides", "kernels", "encoder_convs", "decoder_convs")
_DECISIONS = {
    "target_spacing_mm": "spacing_mm",
    "base_features": "network.features",
    **{leaf: f"network.{leaf}" for leaf in _NETWORK},
}
"""What the decision on a value of a configuration is called where the option has another name."""
_OF_THE_DATASET = {
    "target_spacing_mm": "target_spacing_mm",
    "transpose": "transpose",
    "mirror_axes": "mirror_axes",
    **dict.fromkeys(("normalization", "use_mask", "statistics"), "normalization"),
}
"""The decision on a value that is alike in all configurations, unless one has its own."""
_OF_THE_PLAN = ("configurations", "orientation")
"""Values that no configuration has for itself."""
_READ: dict[str, Callable[[Configuration, TrainingSpec], Any]] = {
    "target_spacing_mm": lambda item, _: item.spacing_mm,
    "patch_size": lambda item, _: item.patch_size,
    "batch_size": lambda item, _: item.batch_size,
    "base_features": lambda item, _: item.network.features[0],
    "batch_dice": lambda item, _: item.batch_dice,
    "normalization": lambda item, _: [how.scheme for how in item.preprocessing.normalization],
    "use_mask": lambda item, _: [how.use_mask for how in item.preprocessing.normalization],
    "statistics": lambda item, _: [_clipping(how.statistics) for how in item.preprocessing.normalization],
    "transpose": lambda item, _: item.preprocessing.transpose,
    "mirror_axes": lambda item, recipe: sorted(
        item.preprocessing.transpose[-item.ndim :][axis] for axis in recipe.augmentation.mirror_axes
    ),
}
"""Where a plan holds the value of an option; what is not here is in the network or in a resampling."""


def anything_set(planning: PlanningOptions) -> bool:
    """Whether a derived value was set."""
    return planning != PlanningOptions(folds=planning.folds, splits=planning.splits)


@dataclass(frozen=True, slots=True)
class _SetValue:
    """A value of one configuration, as JSON has it."""

    configuration: str
    leaf: str  # of `ConfigurationOptions`, like "resample_image.order"
    option: str
    value: Any
    has_rule: bool
    by_rule: Any  # None without one

    @property
    def own(self) -> bool:
        """Whether it was set for one configuration."""
        return self.option != f"planning.{self.leaf}"


def with_set_values(plan: Plan, by_rule: Plan | None, planning: PlanningOptions) -> Plan:
    """Return the plan with a reason for every value that was set, and a change where it is not what the rules give.

    `by_rule` is the plan without them; None where the rules find none.
    """
    values = list(_set_values(plan, by_rule, planning))
    decisions = tuple(_decisions(values, plan, by_rule, planning))
    changes = (*plan.changes, *_changes(values, plan, by_rule, planning))
    stock = plan.preset != "auto" and not changes
    return plan.model_copy(update={"decisions": decisions, "changes": changes, "stock": stock})


def _set_values(plan: Plan, by_rule: Plan | None, planning: PlanningOptions) -> Iterator[_SetValue]:
    for name, item in plan.configurations.items():
        for leaf in _leaves(planning.of(name)):
            option = option_key(planning, name, leaf)
            if (name, option) == ("3d_lowres", "planning.target_spacing_mm"):
                continue  # that of the full resolution, from which this one is derived
            if leaf == "patch_size" and len(planning.of(name).patch_size or ()) != item.ndim:
                continue  # that of the other configurations
            value = _value(leaf, item, plan.training[name])
            if by_rule is None or name not in by_rule.configurations:
                yield _SetValue(name, leaf, option, value, False, None)
            else:
                rule = _value(leaf, by_rule.configurations[name], by_rule.training[name])
                yield _SetValue(name, leaf, option, value, True, rule)


def _changes(values: Sequence[_SetValue], plan: Plan, by_rule: Plan | None, planning: PlanningOptions) -> Iterator[str]:
    """Yield a sentence for every value that differs, once for all configurations in which it does so alike."""
    for key in ("orientation", "target_spacing_mm"):
        if getattr(planning, key) is not None:
            now, before = _decided(plan, key), None if by_rule is None else _decided(by_rule, key)
            if now != before:
                yield f"{key} {value_in_words(now, key)} {SET}{_instead(before, key)}"
    said: dict[str, list[str]] = {}
    for item in values:
        of_all = item.leaf == "target_spacing_mm" and not item.own  # told above
        if of_all or (item.has_rule and item.value == item.by_rule):
            continue
        rounded = _rounding(plan.configurations[item.configuration], planning) if item.leaf == "patch_size" else ""
        instead = _instead(item.by_rule if item.has_rule else None, item.leaf)
        sentence = f"{item.leaf} {value_in_words(item.value, item.leaf)}{rounded} {SET}{instead}"
        said.setdefault(sentence, []).append(item.configuration)
    for sentence, names in said.items():
        everywhere = len(names) == len(plan.configurations) > 1
        yield sentence if everywhere else f"{listing(names)}: {sentence}"


def _decisions(
    values: Sequence[_SetValue], plan: Plan, by_rule: Plan | None, planning: PlanningOptions
) -> Iterator[Decision]:
    """Yield the decisions of the plan, those on values that were set rewritten, then those on values of its own."""
    rules = {} if by_rule is None else {item.key: item for item in by_rule.decisions}
    options = {key: f"planning.{key}" for key in _OF_THE_PLAN if getattr(planning, key) is not None}
    for item in values:
        options[f"{item.configuration}.{_decision_name(item.leaf)}"] = item.option
        if item.leaf in _OF_THE_DATASET and not item.own:
            options[_OF_THE_DATASET[item.leaf]] = item.option
    for decision in plan.decisions:
        option = options.get(decision.key) or options.get(_without_number(decision.key))
        if option is None:
            yield decision
            continue
        rule = rules.get(decision.key)
        yield _set(decision, rule, option)
    for item in values:
        if item.own and item.leaf in _OF_THE_DATASET and item.leaf != "target_spacing_mm":
            key = f"{item.configuration}.{item.leaf}"
            general = rules.get(_OF_THE_DATASET[item.leaf], rules.get(f"{_OF_THE_DATASET[item.leaf]}.0"))
            text = "" if general is None else general.rule
            rule = Decision(key=key, value=item.by_rule, rule=text) if item.has_rule else None
            yield _set(Decision(key=key, value=item.value, rule=""), rule, item.option)


def _set(decision: Decision, by_rule: Decision | None, option: str) -> Decision:
    """Return the decision as one of the user, with what the rule would have given."""
    name = decision.key.rpartition(".")[2]
    rule = "the value that you set; "
    inputs: dict[str, Any] = {}
    if by_rule is None:
        rule += "the rules give none"
    else:
        rule += f"the rule would have given {value_in_words(by_rule.value, name)}" + (
            f": {by_rule.rule}" if by_rule.rule else ""
        )
        inputs = by_rule.inputs | {"by_rule": by_rule.value}
    change = {"rule": rule, "inputs": inputs, "bound": SET, "source": "options", "would_change": f"the option {option}"}
    return decision.model_copy(update=change)


def _decided(plan: Plan, key: str) -> Any:
    return next(item.value for item in plan.decisions if item.key == key)


def _leaves(asked: ConfigurationOptions) -> Iterator[str]:
    """Yield the dotted names of what was set."""
    for name in ConfigurationOptions.model_fields:
        value = getattr(asked, name)
        if isinstance(value, ResamplingOptions):
            yield from (f"{name}.{leaf}" for leaf in value.model_dump(exclude_none=True))
        elif value is not None:
            yield name


def _value(leaf: str, item: Configuration, recipe: TrainingSpec) -> Any:
    """Return a value of a configuration, as JSON has it."""
    if leaf in _READ:
        value = _READ[leaf](item, recipe)
    elif leaf.startswith("resample_"):
        kind, _, name = leaf.partition(".")
        value = getattr(getattr(item.preprocessing, kind), name)
        value = "auto" if value is None else value
    else:
        value = getattr(item.network, leaf)
    return json.loads(json.dumps(value))


def _clipping(statistics: IntensityStatistics | None) -> dict[str, float] | None:
    return None if statistics is None else statistics.model_dump(include=set(StatisticsOptions.model_fields))


def _decision_name(leaf: str) -> str:
    return leaf.partition(".")[0] if leaf.startswith("resample_") else _DECISIONS.get(leaf, leaf)


def _without_number(key: str) -> str:
    """Return ``normalization`` for ``normalization.0``."""
    head, _, last = key.rpartition(".")
    return head if last.isdigit() else key


def _rounding(item: Configuration, planning: PlanningOptions) -> str:
    """Say that the patch that was set did not fit the strides."""
    order = item.preprocessing.transpose if item.ndim == 3 else (0, 1)
    asked = planning.of(item.name).patch_size or ()
    wanted = [asked[axis] for axis in order]
    if tuple(wanted) == item.patch_size:
        return ""
    return f" ({by_axis(wanted)} rounded up to multiples of {by_axis(item.network.divisor)})"


def _instead(by_rule: Any, name: str) -> str:
    return "; the rules give none" if by_rule is None else f" instead of {value_in_words(by_rule, name)}"
