"""A plan in words: every value with its rule, its inputs, the bound that was active and what would change it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from segfit.planning.plan import Decision, Outcome, Plan, RunSpec
from segfit.planning.rules import CHANGES, SET, TABLE
from segfit.text import duration, gigabytes, listing, name_in_words, value_in_words

__all__ = [
    "GENERAL",
    "WIDEST",
    "Filling",
    "Words",
    "change_in_words",
    "compare",
    "explain",
    "explain_json",
    "forecast_rows",
    "grouped",
    "set_in_words",
    "words_of",
]

WIDEST = 110
GENERAL = "dataset"
"""The group of the decisions that are not of one configuration."""


def explain(plan: Plan, width: int = WIDEST) -> str:
    """Return the plan as readable text, grouped by configuration, in lines of at most `width` characters."""
    kind = "differs from nnU-Net" if plan.changes else "every decision is nnU-Net's"
    lines = [f"Plan for {plan.dataset}: preset {plan.preset}, {kind}", f"stock: {'yes' if plan.stock else 'no'}", ""]
    lines += _bullets("How it differs", plan.changes, width)
    lines += _bullets("Remarks on the data", [str(item) for item in plan.warnings], width)
    for group, decisions in grouped(plan).items():
        title = group if group == GENERAL else f"configuration {group}"
        lines += [title.capitalize() if group == GENERAL else title, "-" * len(title)]
        for decision in decisions:
            lines += [*_paragraph(decision, words_of(decision, plan.unit), group, width), ""]
    if plan.run is not None:
        lines += ["Forecast, from steps measured on this machine", *_forecast(plan.run)]
    return "\n".join(lines).rstrip() + "\n"


def forecast_rows(run: RunSpec) -> list[tuple[str, ...]]:
    """Return the forecast as rows of words: stage, time, RAM, device memory, disk; the last row is the whole run."""
    return [
        (stage, duration(item.seconds), *map(gigabytes, (item.memory_gb, item.device_memory_gb, item.disk_gb)))
        for stage, item in {**run.forecast, "in all": run.total}.items()
    ]


def _forecast(run: RunSpec) -> list[str]:
    steps = [
        f"  {name}: {duration(run.seconds_per_step[name])} and {gigabytes(run.peak_memory_gb[name])} per step, about "
        f"{run.expected_steps[name]} steps per training"
        for name in run.configurations
    ]
    rows = [("stage", "time", "RAM", "device memory", "disk"), *forecast_rows(run)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [*steps, *(line.rstrip() for line in table)]


def explain_json(plan: Plan) -> dict[str, Any]:
    """Return the same as a JSON-able value: decisions by configuration ("dataset" for those of all), also in words."""
    told = plan.model_dump(mode="json", include={"dataset", "preset", "stock", "changes", "run", "warnings"})
    told["decisions"] = {
        group: [{**item.model_dump(mode="json"), "words": asdict(words_of(item, plan.unit))} for item in decisions]
        for group, decisions in grouped(plan).items()
    }
    return told


def compare(first: Plan, second: Plan) -> list[tuple[str, str, str]]:
    """Return name and both values, in words, of every decision in which two plans differ; a dash where one has none."""
    both = [{item.key: item.value for item in plan.decisions} for plan in (first, second)]
    keys = dict.fromkeys([*both[0], *both[1]])
    values = [(key, *(value_in_words(side[key], key) if key in side else "-" for side in both)) for key in keys]
    return [(key, a, b) for key, a, b in values if a != b]


def grouped(plan: Plan) -> dict[str, list[Decision]]:
    """Return the decisions by configuration, those of all of them first, without groups that are empty."""
    groups: dict[str, list[Decision]] = {GENERAL: [], **{name: [] for name in plan.configurations}}
    for decision in plan.decisions:
        prefix = decision.key.partition(".")[0]
        groups[prefix if prefix in plan.configurations else GENERAL].append(decision)
    return {group: decisions for group, decisions in groups.items() if decisions}


def _paragraph(decision: Decision, words: Words, group: str, width: int) -> list[str]:
    key = decision.key.removeprefix(group + ".")
    lines = textwrap.wrap(f"{key} = {words.value}", width, subsequent_indent="  ", break_long_words=False)
    for name in ("rule", "inputs", "bound", "source", "changes"):
        start = f"  {'changes with' if name == 'changes' else name:<13}"
        text = getattr(words, name)
        lines += textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * 15, break_long_words=False)
    return lines


def _bullets(title: str, items: Sequence[str], width: int) -> list[str]:
    if not items:
        return []
    wrapped = [textwrap.fill(item, width, initial_indent="  - ", subsequent_indent="    ") for item in items]
    return [title, *wrapped, ""]


def change_in_words(change: str, inputs: Mapping[str, Any]) -> str:
    """Return how a plan differs, in a sentence."""
    if change == "option":
        inputs = {"option": inputs["option"], "value": value_in_words(inputs["value"], inputs["option"])}
    return _filled(CHANGES[change], inputs)


def set_in_words(name: str, value: Any, by_rule: Any, remark: str = "") -> str:
    """Return what was set in place of what the rules give; None: they give nothing."""
    words = {"name": name, "value": value_in_words(value, name) + remark, "by_rule": value_in_words(by_rule, name)}
    return change_in_words("set" if by_rule is None else "set_instead", words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A decision as people read it."""

    value: str
    rule: str
    inputs: str
    bound: str
    source: str
    changes: str


def words_of(decision: Decision, unit: str = "mm") -> Words:
    """Return a decision in words, with sizes in `unit`."""
    rule, name = TABLE.get(decision.rule), decision.key
    value = value_in_words(decision.value, name)
    inputs = "; ".join(
        f"{name_in_words(key, unit)}: {value_in_words(item, name if key.startswith('by_rule') else key)}"
        for key, item in decision.inputs.items()
    )
    says = decision.rule if rule is None else _filled(rule.says, decision.inputs)
    bound = decision.bound if rule is None else _filled(rule.bounds[decision.bound], decision.inputs)
    if decision.options:
        said = "the rules give none" if decision.by_rule is None else f"the rule gives {_by_rule(decision)}: {says}"
        option = f"the option{'s' * (len(decision.options) > 1)} {listing(decision.options)}"
        return Words(value=value, rule=f"{SET}; {said}", inputs=inputs, bound=SET, source="options", changes=option)
    if rule is None:
        return Words(value=value, rule=says, inputs=inputs, bound=bound, source="", changes="")
    changes = "; ".join(filter(None, [rule.changes, *(_outlook(decision, kind) for kind in rule.again)]))
    return Words(value=value, rule=says, inputs=inputs, bound=bound, source=rule.source, changes=changes)


def _by_rule(decision: Decision) -> str:
    """Return what the rule gives, of many values only those that differ."""
    usual = decision.by_rule
    if isinstance(usual, Mapping) and isinstance(decision.value, Mapping):
        usual = {key: item for key, item in usual.items() if item != decision.value.get(key)} or "the same"
    return value_in_words(usual, decision.key)


def _outlook(decision: Decision, kind: str) -> str:
    """Return what more memory, or more cases, would make of a value."""
    outcomes = [item for item in decision.outcomes if (item.memory_gb is not None) == (kind == "memory")]
    if not outcomes:
        return "memory is capped by auto; choose another preset" if kind == "memory" else ""
    if all(item.state == "planned" and item.value == decision.value for item in outcomes):
        return f"more {'memory' if kind == 'memory' else 'training cases'} would not change it"
    fates = groupby(outcomes, key=lambda item: _fate(item, decision))
    return ", ".join(f"with {' or '.join(map(_circumstance, group))} {fate}" for fate, group in fates)


def _fate(item: Outcome, decision: Decision) -> str:
    if item.state == "refused":
        return "your settings do not fit"
    if item.state == "absent":
        return f"there would be no {decision.key.partition('.')[0]}"
    still = "still " if item.value == decision.value else ""
    return f"it would {still}be {value_in_words(item.value, decision.key)}"


def _circumstance(item: Outcome) -> str:
    if item.memory_gb is None:
        return f"{item.cases} training cases"
    return f"{item.memory_gb:g} GB" + (f" (then by {item.preset})" if item.preset else "")


class _Input:
    """A value that a sentence is filled with: as people write it, or by a format of numbers."""

    def __init__(self, value: Any, name: str) -> None:
        self.value, self.name = value, name

    def __format__(self, spec: str) -> str:
        if spec:
            return format(self.value, spec)
        names = isinstance(self.value, list | tuple) and all(isinstance(item, str) for item in self.value)
        return listing(self.value) if names else value_in_words(self.value, self.name)


class _Blank(str):
    """The place of an input that is not there: its name, in italics."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return f"*{name_in_words(str(self))}*"


class Filling(dict[str, Any]):
    """What the names in braces of a sentence are filled with."""

    def __missing__(self, name: str) -> _Blank:
        return _Blank(name)


def _filled(text: str, inputs: Mapping[str, Any]) -> str:
    return text.format_map(Filling({name: _Input(value, name) for name, value in inputs.items()}))
