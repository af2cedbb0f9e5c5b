"""How far a project is, read from its files: nothing is computed, opened or written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from segfit.bundle.bundle import MANIFEST, ModelManifest
from segfit.errors import InputError
from segfit.evaluation.summary import Summary
from segfit.files import Document, Record
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.notebook import html_table
from segfit.planning.plan import Plan
from segfit.project.folder import CheckFile, ProjectFile, ProjectFolder
from segfit.records import RECORD_FILE
from segfit.selection.select import Selection
from segfit.training.result import RESULT
from segfit.words import count, dice, listing

__all__ = ["ProjectStatus", "StageStatus", "status_of"]

_State = Literal["done", "begun", "open"]


class StageStatus(Record):
    """How far one stage is, and what it found in a few words."""

    stage: str
    state: _State
    detail: str = ""


class ProjectStatus(Record):
    """How far a project is."""

    project: Path
    dataset: Path
    preset: str
    stages: tuple[StageStatus, ...]
    model: Path | None  # where there is one
    verdict: str | None  # good, doubtful or failed

    def __repr__(self) -> str:
        done = [item.stage for item in self.stages if item.state == "done"]
        last = f"{done[-1]} done" if done else "nothing done yet"
        model = f", verdict {self.verdict or 'none'}" if self.model else ""
        return f"Project({str(self.project)!r} on {self.dataset.name}: {last}{model})"

    __str__ = __repr__

    def rows(self) -> list[tuple[str, str, str]]:
        """Return stage, state and detail of every stage."""
        return [(item.stage, item.state, item.detail) for item in self.stages]

    def _repr_html_(self) -> str:
        verdict = (f"verdict: {self.verdict}",) if self.verdict else ()
        return html_table(f"{self.project} on {self.dataset}", ("stage", "state", ""), self.rows(), verdict)


def status_of(root: Path) -> ProjectStatus:
    """Return how far the project in a folder is; raise `InputError` if there is none."""
    folder = ProjectFolder(root)
    if not folder.project.exists():
        raise InputError(f"{root} is not a segfit project", "give the folder that segfit run --out made")
    file = ProjectFile.load(folder.project)
    manifest = _read(ModelManifest, folder.model / MANIFEST)
    return ProjectStatus(
        project=root,
        dataset=file.dataset,
        preset=file.options.preset,
        stages=(*_preparation(folder), *_results(folder)),
        model=None if manifest is None else folder.model,
        verdict=None if manifest is None else manifest.verdict.get("level"),
    )


def _preparation(folder: ProjectFolder) -> list[StageStatus]:
    check, plan = _read(CheckFile, folder.check), _read(Plan, folder.plan)
    fingerprint = _read(Fingerprint, folder.fingerprint)
    stored = sum(1 for _ in folder.cases.glob("*/case.json"))
    found = []
    if check is not None:
        problems = (*check.structure, *check.problems)
        fatal = sum(problem.fatal for problem in problems)
        found = [count(fatal, "error"), count(len(problems) - fatal, "warning")]
    return [
        _stage("check", ", ".join(found)),
        _stage("fingerprint", "" if fingerprint is None else count(len(fingerprint.cases), "case")),
        _stage("plan", "" if plan is None else listing(list(plan.configurations))),
        _stage("preprocess", count(stored, "stored case") if stored else ""),
        _training(folder, plan),
    ]


def _training(folder: ProjectFolder, plan: Plan | None) -> StageStatus:
    begun = bool(list(folder.runs.glob("*/fold-*")))
    if plan is None or plan.run is None:
        return StageStatus(stage="train", state="begun" if begun else "open")
    wanted = [(name, fold) for name in plan.run.configurations for fold in plan.run.folds]
    done = sum(any(folder.runs.glob(f"{name}/fold-{fold}/*/{RESULT}")) for name, fold in wanted)
    state: _State = "done" if done == len(wanted) else "begun" if begun else "open"
    return StageStatus(stage="train", state=state, detail=f"{done} of {count(len(wanted), 'training')}")


def _results(folder: ProjectFolder) -> list[StageStatus]:
    selection = _read(Selection, folder.selection)
    test = _read(Summary, folder.predictions / "summary.json")
    chosen = ""
    if selection is not None:
        chosen = f"{' + '.join(selection.winner)}, cross-validated Dice {dice(selection.dice_after_steps)}"
    others = ("summary.json", RECORD_FILE)
    predicted = [path for path in folder.predictions.glob("*") if path.name[0] != "." and path.name not in others]
    return [
        _stage("select", chosen),
        _stage("predict", count(len(predicted), "label file") if predicted else ""),
        _stage("evaluate", "" if test is None else f"test Dice {dice(test.mean_dice)}"),
        _stage("report", str(folder.report) if folder.report.exists() else ""),
    ]


def _stage(name: str, detail: str) -> StageStatus:
    return StageStatus(stage=name, state="done" if detail else "open", detail=detail)


_Document = TypeVar("_Document", bound=Document)


def _read(kind: type[_Document], path: Path) -> _Document | None:
    """Read a document if it is there and whole; who needs it says what is wrong with it."""
    try:
        return kind.load(path) if path.exists() else None
    except InputError:
        return None
