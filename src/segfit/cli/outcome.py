"""How a run ended, in the terminal: Dice, verdict, where model and report are."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from segfit.cli.common import print_json
from segfit.cli.console import say, score_table
from segfit.text import count

if TYPE_CHECKING:
    from segfit.evaluation.summary import Summary
    from segfit.project import Project
    from segfit.project.findings import Findings
    from segfit.selection.verdict import Verdict

__all__ = ["print_facts", "print_outcome", "print_verdict"]

_UNTRUSTED = 3  # exit code of a run whose model should not be used


def print_outcome(project: Project, *, as_json: bool = False) -> int:
    """Print Dice, verdict, model and report of a finished run; return its exit code."""
    folder, found = project.folder, project.findings()
    assert found.selected is not None
    summaries = {"cross-validation": found.selected.summary}
    if found.test is not None:
        summaries["test"] = found.test
    verdict = found.verdict
    code = _UNTRUSTED if verdict is not None and verdict.level == "failed" else 0
    rows = {f"{name} ({count(len(summary.cases), 'case')})": _dice(summary) for name, summary in summaries.items()}
    if as_json:
        means = {name: _dice(summary) for name, summary in summaries.items()}
        judged = None if verdict is None else verdict.model_dump(mode="json") | {"headline": verdict.headline}
        warnings = [item.facts for item in project.check() if not item.fatal]
        told = {"dice": means, "verdict": judged, "model": str(folder.model), "report": str(folder.report)}
        print_json({**told, "start": _start(found), "warnings": warnings})
        return code
    score_table(rows, first="Dice")
    print_verdict(verdict)
    say(f"model:  {folder.model}\nreport: {folder.report}")
    return code


def _start(found: Findings) -> dict[str, Any] | None:
    """Return what came from the model that the trainings started from, and Dice before and after; None: from none."""
    initial = None if found.plan is None or found.plan.run is None else found.plan.run.initial
    if initial is None:
        return None
    trainings = [
        {
            "configuration": item.name,
            "fold": item.fold,
            "cases": list(result.validation_cases),
            "before": {name: result.before.dice[name] for name in initial.kept},
            "after": {name: result.curve[-1].dice[name] for name in initial.kept},
        }
        for item, result in zip(found.trainings, found.results, strict=True)
        if result.before is not None and result.curve
    ]
    return {**initial.model_dump(mode="json", exclude={"identity"}), "trainings": trainings}


def print_verdict(verdict: Verdict | None) -> None:
    """Print a verdict; remarks stand in the report and are only counted here."""
    if verdict is None:
        return
    remarks = sum(item.level == "remark" for item in verdict.findings)
    more = f" ({count(remarks, 'remark')} in the report)" if remarks else ""
    say(f"verdict: {verdict.headline}{more}")
    for item in verdict.findings:
        if item.level != "remark":
            for text in filter(None, (item.text, item.action)):
                say(_indented(text))


def print_facts(verdict: Mapping[str, Any]) -> None:
    """Print the verdict that stands in a model."""
    say(f"verdict: {verdict['headline']}")
    for text in verdict["findings"]:
        say(_indented(text))


def _indented(text: str) -> str:
    """Return a sentence in lines of at most 80 characters; words of commands stay whole."""
    return textwrap.fill(
        text, 80, initial_indent="  ", subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _dice(summary: Summary) -> Mapping[str, float | None]:
    return {name: one.dice for name, one in summary.mean.items()} | {"mean": summary.mean_dice}
