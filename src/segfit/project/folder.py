"""What lies where in a project folder, and the files that belong to no single stage.

my-project/
  project.json       dataset and options
  dataset/           of a dataset in object storage: its files, and origin.json, which says whence
  check.json         problems found in the dataset
  fingerprint.json   splits.json
  plan.json  selection.json  validation.json  report.html  model/  predictions/    of the present options; copies
  report-cases/      pages that show each case of the report whole, if they were asked for
  cache/             hashes of the dataset's files, the fingerprint's memory of each case, what the report shows of it
  cases/             preprocessed cases
  starts/<identity>/ models that trainings started from, see `segfit.project.starting_model`
  plans/<key>/
    plan.json        what is decided for these options, and what is trained
    race/            what was tried before, see `segfit.project.race`
    selection.json   validation.json
    validated-<key>/ what the selected model makes of validation cases, if several networks or post-processing do
    so-far/          the same, of trainings that had not ended
    predictions-<key>/   of the dataset's test images; summary.json if they have labels
  runs/<configuration>/fold-<k>/<key>/
    events.jsonl weights.safetensors training.json state/
    before-cooldown/ the state from before the learning rate fell, for more time
    so-far-<key>/    what was handed over before the training had ended, as a training
    validation-<key>/    predictions of the fold's validation cases, summary.json
  stages.jsonl       what each stage used
  stop               touched by whoever wants what is at work here to stop
  tasks/             what was submitted to a cluster and what it said, see `segfit.project.submission`
  .locks/            one for each result that is being made

A key is a hash of what a result was made from, see `segfit.project.stages`; the record of that stands beside or in it.
Results of other options lie under other keys, and count again when these are asked for.
"""

from __future__ import annotations

from pathlib import Path

from segfit.errors import Problem
from segfit.files import Document, remove_leftovers
from segfit.options import Options

__all__ = ["SO_FAR", "CheckFile", "PlanFolder", "ProjectFile", "ProjectFolder"]

SO_FAR = "so-far-"


class ProjectFile(Document):
    """project.json: what the user asked for."""

    dataset: Path
    options: Options
    time_before_s: float | None = None  # while a run goes on that time was added to: what it had before


class CheckFile(Document):
    """check.json: the outcome of the last check."""

    structure: tuple[Problem, ...]  # of which files there are, as `Dataset.problems`
    problems: tuple[Problem, ...]  # of what they hold


class ProjectFolder:
    """Paths of a project."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = root / "project.json"
        self.dataset = root / "dataset"
        self.check = root / "check.json"
        self.fingerprint = root / "fingerprint.json"
        self.splits = root / "splits.json"
        self.plan = root / "plan.json"
        self.selection = root / "selection.json"
        self.validation_summary = root / "validation.json"
        self.report = root / "report.html"
        self.report_cases = root / "report-cases"
        self.model = root / "model"
        self.predictions = root / "predictions"
        self.cache = root / "cache"
        self.cases = root / "cases"
        self.plans = root / "plans"
        self.starts = root / "starts"
        self.runs = root / "runs"
        self.stages = root / "stages.jsonl"
        self.locks = root / ".locks"
        self.tasks = root / "tasks"
        self.stop = root / "stop"

    def remove_leftovers(self) -> None:
        """Remove the partial files of commands that were killed."""
        remove_leftovers(self.root)
        for path in self.root.iterdir():
            if path.is_dir():
                remove_leftovers(path, deep=path not in (self.cases, self.dataset))  # many, and whole or not there

    def of_plan(self, key: str) -> PlanFolder:
        """Folder of what hangs on a plan."""
        return PlanFolder(self.plans / key)

    def training(self, configuration: str, fold: int, identity: str) -> Path:
        """Folder of one training."""
        return self.runs / configuration / f"fold-{fold}" / identity

    def so_far(self, configuration: str, fold: int, training: str, identity: str) -> Path:
        """Folder of a state, that is one of `training`, as a training."""
        return self.training(configuration, fold, training) / f"{SO_FAR}{identity}"

    def lock(self, name: str) -> Path:
        """Lock of one result."""
        return self.locks / f"{name.replace('/', '-')}.lock"


class PlanFolder:
    """Paths of what hangs on a plan."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan = root / "plan.json"
        self.race = root / "race"
        self.selection = root / "selection.json"
        self.validation_summary = root / "validation.json"

    @property
    def so_far(self) -> PlanFolder:
        """Where what was selected of unfinished trainings lies."""
        return PlanFolder(self.root / "so-far")

    def validated(self, key: str) -> Path:
        """Folder of what the model selected under a key makes of validation cases."""
        return self.root / f"validated-{key}"

    def predictions(self, key: str) -> Path:
        """Folder of the predictions that count under a key."""
        return self.root / f"predictions-{key}"
