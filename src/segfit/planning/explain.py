"""A plan in words: every value with its rule, its inputs, the bound that was active and what would change it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from segfit.planning.plan import Decision, Plan, RunSpec
from segfit.planning.wording import name_in_words, value_in_words
from segfit.words import duration, gigabytes

__all__ = ["WIDEST", "compare", "explain", "explain_json", "forecast_rows", "in_words"]

WIDEST = 110
_GENERAL = "dataset"


def explain(plan: Plan, width: int = WIDEST) -> str:
    """Return the plan as readable text, grouped by configuration, in lines of at most `width` characters."""
    kind = "differs from the reference" if plan.changes else "every decision is the reference's"
    lines = [f"Plan for {plan.dataset}: preset {plan.preset}, {kind}", f"stock: {'yes' if plan.stock else 'no'}", ""]
    lines += _bullets("How it differs", plan.changes, width)
    lines += _bullets("Remarks on the data", plan.warnings, width)
    for group, decisions in _groups(plan).items():
        title = group if group == _GENERAL else f"configuration {group}"
        lines += [title.capitalize() if group == _GENERAL else title, "-" * len(title)]
        for decision in decisions:
            lines += [*_paragraph(decision, group, width), ""]
    if plan.run is not None:
        lines += ["Forecast, from steps measured on this machine", *_forecast(plan.run)]
    return "\n".join(lines).rstrip() + "\n"


def forecast_rows(run: RunSpec) -> list[tuple[str, ...]]:
    """Return the forecast as rows of words: stage, time, RAM, device memory, disk; the last row is the whole run."""
    return [
        (
            stage,
            duration(item.seconds),
            gigabytes(item.memory_gb),
            gigabytes(item.device_memory_gb),
            gigabytes(item.disk_gb),
        )
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
    """Return the same as a JSON-able value: decisions by configuration ("dataset" for those of all of them)."""
    return {
        "dataset": plan.dataset,
        "preset": plan.preset,
        "stock": plan.stock,
        "changes": list(plan.changes),
        "run": None if plan.run is None else plan.run.model_dump(mode="json"),
        "warnings": list(plan.warnings),
        "decisions": {
            group: [decision.model_dump(mode="json") for decision in decisions]
            for group, decisions in _groups(plan).items()
        },
    }


def in_words(decision: Decision) -> tuple[str, str]:
    """Return the value and the inputs of a decision as people write them."""
    key = decision.key
    inputs = [
        f"{name_in_words(name)}: {value_in_words(value, key if name.startswith('by_rule') else name)}"
        for name, value in decision.inputs.items()
    ]
    return value_in_words(decision.value, key), "; ".join(inputs)


def compare(first: Plan, second: Plan) -> list[tuple[str, str, str]]:
    """Return name and both values, in words, of every decision in which two plans differ; a dash where one has none."""
    both = [{item.key: item.value for item in plan.decisions} for plan in (first, second)]
    keys = dict.fromkeys([*both[0], *both[1]])
    values = [(key, *(value_in_words(side[key], key) if key in side else "-" for side in both)) for key in keys]
    return [(key, a, b) for key, a, b in values if a != b]


def _groups(plan: Plan) -> dict[str, list[Decision]]:
    groups: dict[str, list[Decision]] = {_GENERAL: [], **{name: [] for name in plan.configurations}}
    for decision in plan.decisions:
        prefix = decision.key.partition(".")[0]
        groups[prefix if prefix in plan.configurations else _GENERAL].append(decision)
    return {group: decisions for group, decisions in groups.items() if decisions}


def _paragraph(decision: Decision, group: str, width: int) -> list[str]:
    key = decision.key.removeprefix(group + ".")
    value, inputs = in_words(decision)
    lines = textwrap.wrap(f"{key} = {value}", width, subsequent_indent="  ", break_long_words=False)
    for label, text in (
        ("rule", decision.rule),
        ("inputs", inputs),
        ("bound", decision.bound),
        ("source", decision.source),
        ("changes with", decision.would_change),
    ):
        if text:
            lines += textwrap.wrap(
                text, width, initial_indent=f"  {label:<13}", subsequent_indent=" " * 15, break_long_words=False
            )
    return lines


def _bullets(title: str, items: Sequence[str], width: int) -> list[str]:
    if not items:
        return []
    wrapped = [textwrap.fill(item, width, initial_indent="  - ", subsequent_indent="    ") for item in items]
    return [title, *wrapped, ""]
