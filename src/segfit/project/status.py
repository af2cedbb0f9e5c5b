"""How far a project is, read from its files: nothing is computed, opened or written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
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
from segfit.text import count, dice, listing
from segfit.training.events import last_event
from segfit.training.result import EVENTS, RESULT, STATE

__all__ = ["ProjectStatus", "StageStatus", "read_if_whole", "share_of", "status_of"]

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
    trained: float | None  # share of the run's trainings, 0 to 1; None before it is decided what is trained
    score: float | None  # cross-validated Dice of what was selected
    test_score: float | None  # Dice of the test images, where they have labels
    model: Path | None  # where there is one
    verdict: str | None  # good, doubtful or failed
    next_step: str  # a command

    def __repr__(self) -> str:
        done = [item.stage for item in self.stages if item.state == "done"]
        last = f"{done[-1]} done" if done else "nothing done yet"
        model = f", verdict {self.verdict or 'none'}" if self.model else ""
        return f"Project({str(self.project)!r} on {self.dataset.name}: {last}{model})"

    __str__ = __repr__

    @property
    def headline(self) -> str:
        """Scores and verdict in a line; empty before there are any."""
        facts = {"cross-validated Dice": self.score, "test Dice": self.test_score}
        told = [f"{name} {dice(value)}" for name, value in facts.items() if value is not None]
        return ", ".join([*told, *([f"verdict: {self.verdict}"] if self.verdict else [])])

    def rows(self) -> list[tuple[str, str, str]]:
        """Return stage, state and detail of every stage."""
        return [(item.stage, item.state, item.detail) for item in self.stages]

    def _repr_html_(self) -> str:
        below = [*filter(None, [self.headline]), f"next: {self.next_step}"]
        return html_table(f"{self.project} on {self.dataset}", ("stage", "state", ""), self.rows(), below)


def status_of(root: Path) -> ProjectStatus:
    """Return how far the project in a folder is; raise `InputError` if there is none."""
    folder = ProjectFolder(root)
    if not folder.project.exists():
        raise InputError(f"{root} is not a segfit project", "give the folder that segfit run --out made")
    file = ProjectFile.load(folder.project)
    check, plan = read_if_whole(CheckFile, folder.check), read_if_whole(Plan, folder.plan)
    manifest = read_if_whole(ModelManifest, folder.model / MANIFEST)
    selection = read_if_whole(Selection, folder.selection)
    test = read_if_whole(Summary, folder.predictions / "summary.json")
    trained = _trained(folder, plan)
    stages = (*_preparation(folder, check, plan), _training(folder, trained), *_results(folder, selection, test))
    return ProjectStatus(
        project=root,
        dataset=file.dataset,
        preset=file.options.preset,
        stages=stages,
        trained=sum(trained) / len(trained) if trained else None,
        score=None if selection is None else selection.dice_after_steps,
        test_score=None if test is None else test.mean_dice,
        model=None if manifest is None else folder.model,
        verdict=None if manifest is None else manifest.verdict.get("level"),
        next_step=_next_step(folder, file, check, stages),
    )


def _preparation(folder: ProjectFolder, check: CheckFile | None, plan: Plan | None) -> list[StageStatus]:
    fingerprint = read_if_whole(Fingerprint, folder.fingerprint)
    stored = sum(1 for _ in folder.cases.glob("*/case.json"))
    found = []
    if check is not None:
        fatal, others = _problems(check)
        found = [count(fatal, "error"), count(others, "warning")]
    return [
        _stage("check", ", ".join(found)),
        _stage("fingerprint", "" if fingerprint is None else count(len(fingerprint.cases), "case")),
        _stage("plan", "" if plan is None else listing(list(plan.configurations))),
        _stage("preprocess", count(stored, "stored case") if stored else ""),
    ]


def _problems(check: CheckFile) -> tuple[int, int]:
    """Return how many errors and warnings a check found."""
    problems = (*check.structure, *check.problems)
    fatal = sum(problem.fatal for problem in problems)
    return fatal, len(problems) - fatal


def _trained(folder: ProjectFolder, plan: Plan | None) -> list[float]:
    """Return how much of each training of the run is done, 0 to 1."""
    if plan is None or plan.run is None:
        return []
    run = plan.run
    return [share_of(folder.runs / name / f"fold-{fold}") for name in run.configurations for fold in run.folds]


def share_of(fold: Path) -> float:
    """Return how much of a training is done, by the log of the one that is furthest."""
    if any(not _goes_on(path) for path in fold.glob(f"*/{RESULT}")):
        return 1.0
    last = [last_event(path, "share") for path in fold.glob(f"*/{EVENTS}")]
    return min(max((event["share"] for event in last if event is not None), default=0.0), 0.999)


def _goes_on(result: Path) -> bool:
    """Whether a training has saved a state since its result: it is given more time."""
    ended = result.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > ended for path in result.parent.glob(f"{STATE}/*"))


def _training(folder: ProjectFolder, trained: list[float]) -> StageStatus:
    begun: _State = "begun" if any(folder.runs.glob("*/fold-*")) else "open"
    if not trained:
        return StageStatus(stage="train", state=begun)
    done = sum(share == 1 for share in trained)
    told = f"{done} of {count(len(trained), 'training')}"
    if done == len(trained):
        return StageStatus(stage="train", state="done", detail=told)
    return StageStatus(stage="train", state=begun, detail=f"{told}, {sum(trained) / len(trained):.0%} of the work")


def _results(folder: ProjectFolder, selection: Selection | None, test: Summary | None) -> list[StageStatus]:
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


def _next_step(folder: ProjectFolder, file: ProjectFile, check: CheckFile | None, stages: Sequence[StageStatus]) -> str:
    """Return the command to give next."""
    project, model = quote(str(folder.root)), quote(str(folder.model))
    if check is not None and _problems(check)[0] and not file.options.dataset.skip_incomplete:
        return f"segfit check {project}"
    if all(item.state == "done" for item in stages if item.stage in ("train", "select", "report")):
        return f"segfit predict --model {model} IMAGES -o FOLDER"
    return f"segfit run {project}"


def _stage(name: str, detail: str) -> StageStatus:
    return StageStatus(stage=name, state="done" if detail else "open", detail=detail)


_Document = TypeVar("_Document", bound=Document)


def read_if_whole(kind: type[_Document], path: Path) -> _Document | None:
    """Read a document if it is there and whole; who needs it says what is wrong with it."""
    try:
        return kind.load(path) if path.exists() else None
    except InputError:
        return None
