"""What lies where in a project folder, and the files that belong to no single stage.

my-project/
  project.json       dataset and options
  check.json         problems found in the dataset, and which files they were found in
  fingerprint.json   plan.json   splits.json   selection.json   validation.json   report.html
  cache/             the fingerprint's memory of each case
  cases/             preprocessed cases
  runs/<configuration>/fold-<k>/
    events.jsonl weights.safetensors training.json state/
    before-cooldown/ the state from before the learning rate fell, for a run with more time
    validation/      predictions of the fold's validation cases, summary.json
  race/<hash>/       what was tried before it was decided what is trained, see `segfit.project.race`
  model/             the bundle
  predictions/       of the dataset's test images, summary.json if they have labels
  stages.jsonl       what each stage used
  earlier/<hash>/    plan, runs and model of other options, taken up again when they are asked for again; a run with
                     more time goes on from the training there (`segfit.project.extension`)
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from segfit.dataset.manifest import Dataset
from segfit.errors import InputError, Problem
from segfit.files import Document, Record, content_hash, read_json, write_json
from segfit.images.formats import files_of
from segfit.options import Options

__all__ = ["CheckFile", "Marks", "ProjectFile", "ProjectFolder", "listing_hash"]


class ProjectFile(Document):
    """project.json: what the user asked for."""

    dataset: Path
    options: Options


class _ProblemRecord(Record):
    case: str
    problem: str
    action: str
    fatal: bool
    transient: bool = False


class CheckFile(Document):
    """check.json: the outcome of the last check."""

    listing: str  # `listing_hash` of the files that were looked at
    problems: tuple[_ProblemRecord, ...]

    @classmethod
    def of(cls, listing: str, problems: tuple[Problem, ...]) -> CheckFile:
        """Keep problems."""
        return cls(listing=listing, problems=tuple(_ProblemRecord(**asdict(item)) for item in problems))

    def found(self) -> tuple[Problem, ...]:
        """Return the problems again."""
        return tuple(Problem(**item.model_dump()) for item in self.problems)


def listing_hash(dataset: Dataset) -> str:
    """Return a hash of names, sizes and times of all files of a dataset: equal while nobody touched them."""
    declared = (dataset.root / name for name in ("dataset.json", "cases.csv", "cases.json"))
    files = [path for path in (dataset.root, *declared) if path.is_file()]
    for case in (*dataset.training, *dataset.test):
        for path in (*case.images, *case.label_files):
            files += [path, *_parts(path)]
    return content_hash([[str(path), status.st_size, status.st_mtime_ns] for path in files if (status := path.stat())])


def _parts(path: Path) -> list[Path]:
    """Return the other files that an image consists of, as far as they can be told and are there."""
    try:
        return [part for part in files_of(path) if part != path and part.exists()]
    except InputError:
        return []  # told by the check


class ProjectFolder:
    """Paths of a project."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.project = root / "project.json"
        self.check = root / "check.json"
        self.fingerprint = root / "fingerprint.json"
        self.plan = root / "plan.json"
        self.splits = root / "splits.json"
        self.selection = root / "selection.json"
        self.validation_summary = root / "validation.json"
        self.report = root / "report.html"
        self.cache = root / "cache"
        self.cases = root / "cases"
        self.runs = root / "runs"
        self.race = root / "race"
        self.model = root / "model"
        self.predictions = root / "predictions"
        self.stages = root / "stages.jsonl"
        self.earlier = root / "earlier"

    def training(self, configuration: str, fold: int) -> Path:
        """Folder of one training."""
        return self.runs / configuration / f"fold-{fold}"

    def trained(self, configuration: str, fold: int) -> bool:
        """Whether a training left its result (of whichever data: the training looks closer)."""
        return (self.training(configuration, fold) / "training.json").exists()

    def validation(self, configuration: str, fold: int) -> Path:
        """Folder of the predictions of a fold's validation cases."""
        return self.training(configuration, fold) / "validation"


class Marks:
    """Which inputs (hashes) the finished stages had, in one small file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, name: str) -> str | None:
        """Return the inputs a stage was last finished with."""
        return self._read().get(name)

    def holds(self, name: str, basis: str) -> bool:
        """Whether a stage was finished with these inputs."""
        return self.get(name) == basis

    def set(self, name: str, basis: str) -> None:
        """Remember it."""
        write_json(self._path, self._read() | {name: basis})

    def _read(self) -> dict[str, str]:
        try:
            found = read_json(self._path)
        except InputError:
            return {}  # only a memory: a stage is done again
        return found if isinstance(found, dict) else {}
