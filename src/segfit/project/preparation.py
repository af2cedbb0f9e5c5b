"""The stages of a project up to its preprocessed cases, and what all stages share: folder, lock, accounts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

from segfit.dataset.checks import check_dataset, require_usable
from segfit.dataset.layouts import leave_out
from segfit.dataset.manifest import Dataset
from segfit.dataset.splits import SPLITS_FILE, Splits, balanced_splits, faults_of, nnunet_splits, read_splits
from segfit.device import Hardware, measure_hardware
from segfit.errors import InputError, Problem, StageError
from segfit.files import Document, content_hash
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.fingerprint.measure import measure
from segfit.options import Options, parse_seconds
from segfit.planning.budget import choose_configurations
from segfit.planning.folds import folds_decision
from segfit.planning.plan import Plan, RunSpec
from segfit.planning.planner import derive
from segfit.planning.presets import orientation_of, splits_of
from segfit.preprocessing.dataset import preprocess_dataset
from segfit.preprocessing.store import CaseStore
from segfit.progress import LOGGED, Progress
from segfit.project.accounts import Accounts
from segfit.project.folder import CheckFile, Marks, ProjectFile, ProjectFolder, listing_hash
from segfit.words import duration, gigabytes, listing

if TYPE_CHECKING:
    from filelock import FileLock


__all__ = ["Preparation", "load"]


class Preparation:
    """A project folder and what is prepared in it before anything is trained."""

    def __init__(self, root: Path, dataset: Dataset, options: Options, *, progress: Progress = LOGGED) -> None:
        self.folder = ProjectFolder(root)
        self._found = dataset
        self._adopt(options)
        self.progress = progress
        self.marks = Marks(self.folder.runs / "marks.json")  # of what comes after the trainings; moves with them
        self._measured = Marks(self.folder.cache / "marks.json")
        self.accounts = Accounts(self.folder.stages)
        self._keys: dict[str, dict[str, str]] = {}  # case keys by configuration
        self._checked = False  # here and now; what a busy machine caused earlier may be gone
        self._started = perf_counter()
        self.validates_all = False  # predict all validation cases, also those that a run had no time for
        self.overrun = False  # take more time rather than refuse a budget that is too short

    def _adopt(self, options: Options) -> None:
        """Take options; some of them say how the dataset is read."""
        self.options = options
        self._found = self._found.resampling_labels(options.dataset.resample_labels)  # all cases
        self.dataset = self._found  # narrowed by `check`

    def save_options(self) -> None:
        """Write dataset and options into the project file."""
        file = ProjectFile(dataset=self.dataset.root, options=self.options)
        if load(ProjectFile, self.folder.project) != file:
            with self.stage("options", unless=True):
                file.save(self.folder.project)

    def check(self) -> tuple[Problem, ...]:
        """Read every file once and return all problems; unchanged files are not read again.

        With the option dataset.skip_incomplete the cases with fatal problems are left out of `dataset` from here on.
        """
        problems = self._problems()
        if not self.options.dataset.skip_incomplete:
            return problems
        self.dataset, problems = leave_out(self._found, problems)
        return problems

    def _problems(self) -> tuple[Problem, ...]:
        """Return the problems of all cases that were found."""
        try:
            listing = listing_hash(self._found)
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read ({error.strerror}); restore it") from None
        listing = content_hash([listing, self.options.dataset.resample_labels])
        if self.folder.check.exists():
            known = CheckFile.load(self.folder.check)
            lasting = self._checked or not any(problem.transient for problem in known.problems)
            if known.listing == listing and lasting:
                return known.found()
        with self.stage("check"):
            problems = check_dataset(self._found, workers=self.options.workers, progress=self.progress)
            CheckFile.of(listing, problems).save(self.folder.check)
        self._checked = True
        return problems

    def fingerprint(self) -> Fingerprint:
        """Measure the dataset."""
        require_usable(self.check())
        orientation = orientation_of(self.options)
        listing = CheckFile.load(self.folder.check).listing
        basis = content_hash([listing, orientation])
        if self._measured.holds("fingerprint", basis) and self.folder.fingerprint.exists():
            return Fingerprint.load(self.folder.fingerprint)
        with self.stage("fingerprint"):
            result = measure(
                self.dataset,
                orientation,
                workers=self.options.workers,
                progress=self.progress,
                cache=self.folder.cache,
            )
            result.save(self.folder.fingerprint)
            self._measured.set("fingerprint", basis)
        return result

    def plan(
        self,
        *,
        time: str | float | None = None,
        memory_gb: float | None = None,
        preset: str | None = None,
        settings: Sequence[str] = (),
    ) -> Plan:
        """Derive the plan; arguments change the options of the project.

        Parameters
        ----------
        time : budget of the run, like "2h", or seconds
        memory_gb, preset : as in `Options`
        settings : ``key=value``, as in `Options.with_settings`
        """
        changes = [*settings]
        if time is not None:
            changes.append(f"time_s={parse_seconds(time) if isinstance(time, str) else time}")
        if memory_gb is not None:
            changes.append(f"memory_gb={memory_gb}")
        if preset is not None:
            changes.append(f"preset={preset}")
        if changes:
            self._adopt(self.options.with_settings(changes))
            self.save_options()
        fingerprint = self.fingerprint()
        splits = self.splits()
        basis = self._plan_basis(fingerprint, splits)
        known = load(Plan, self.folder.plan)
        if known is not None and known.basis == basis:
            return known
        with self.stage("plan"):
            if known is not None:
                known.save(self.put_aside(known.basis).plan)
            plan = load(Plan, self.put_aside(basis).plan) or self._derived(fingerprint, splits, basis, self.options)
            plan.save(self.folder.plan)
        return plan

    def _derived(self, fingerprint: Fingerprint, splits: Splits, basis: str, options: Options) -> Plan:
        """Return the plan of the rules, with what is to be said of the folds."""
        plan, cases = derive(fingerprint, self.dataset.labels, options, self.hardware), self.dataset.training
        return plan.model_copy(
            update={
                "basis": basis,
                "decisions": (*plan.decisions, folds_decision(splits, cases)),
                "warnings": (*plan.warnings, *faults_of(splits, cases)),
            }
        )

    def size(self) -> Plan:
        """Decide what is trained in the time there is, from steps measured on this machine, and write it down."""
        plan = self.plan()
        if plan.run is None:
            plan = self._sized(plan)
        self._put_in_place(plan)
        return plan

    def decide_anew(self) -> None:
        """Forget what is trained: it is decided again, when it is asked for, in the time that is left."""
        plan = self.replanned(())
        with self.stage("plan", unless=True):
            plan.save(self.folder.plan)
        self._keys.clear()

    def _sized(self, plan: Plan) -> Plan:
        """Return the plan with its run."""
        from segfit.project.decide import decide_run

        plan = decide_run(self, plan)
        plan.save(self.folder.plan)
        assert plan.run is not None
        self.progress.note(_forecast(plan.run))
        return plan

    def replanned(self, settings: Sequence[str]) -> Plan:
        """Return the plan of this project with further settings of the planner; nothing is written."""
        fingerprint, splits = self.fingerprint(), self.splits()
        return self._derived(
            fingerprint, splits, self._plan_basis(fingerprint, splits), self.options.with_settings(settings)
        )

    def splits(self) -> Splits:
        """Return which cases train and which validate, and write it down.

        Raises `InputError` if ``splits.json`` was edited: its folds are used when the option names the file.
        """
        splits, path = self._split(), self.folder.splits
        known = load(Splits, path)
        if known == splits:
            return splits
        if known is not None and known.folds != splits.folds and not known.intact:
            raise InputError(
                f"{path} was edited or comes from another version of segfit; give --splits {path} to use its folds, or "
                "delete it to have them made anew"
            )
        with self.stage("splits", unless=True):
            splits.save(path)
        return splits

    def _split(self) -> Splits:
        """Split the cases as asked for; a file of folds in the dataset's folder counts as asked for."""
        cases, root = self.dataset.training, self.dataset.root
        ids = [case.id for case in cases]
        asked = splits_of(self.options)
        beside = (root if root.is_dir() else root.parent) / SPLITS_FILE
        if self.options.planning.splits is None and beside.is_file():
            asked = beside
        if asked == "nnunet":
            return nnunet_splits(ids).sealed(asked)
        if asked == "balanced":
            return balanced_splits(cases, self.structures()).sealed(asked)
        return read_splits(asked, ids).sealed(str(asked))

    def structures(self) -> dict[str, list[int]]:
        """Return the foreground values that occur in every training case."""
        return {
            case.case: [value for value, voxels in case.label_voxels.items() if value > 0 and voxels]
            for case in self.fingerprint().cases
        }

    def typical_spacing(self) -> tuple[float, ...]:
        """Return the median voxel size of the training images, array order."""
        return tuple(map(median, zip(*(case.spacing_mm for case in self.fingerprint().cases), strict=True)))

    def weights(self, names: Sequence[str]) -> list[float] | None:
        """Return how often training cases are drawn, relative to each other; None where all are drawn alike."""
        weights = [self.dataset.case(name).weight for name in names]
        return None if len(set(weights)) == 1 and weights[0] else weights

    def validated(self, fold: int) -> tuple[str, ...]:
        """Return the validation cases of a fold that are predicted: all, or those there is time for."""
        count, cases = self.run_plan().validation_cases, self.splits().folds[fold].validation
        return cases if count is None or self.validates_all else cases[:: max(1, len(cases) // count)][:count]

    @property
    def first_fold(self) -> int:
        """The fold that is trained first."""
        return (self.options.planning.folds or (0,))[0]

    def seconds(self) -> float:
        """Return the seconds since this project was opened."""
        return perf_counter() - self._started

    def preprocess(self) -> dict[str, dict[str, str]]:
        """Preprocess all cases; return the key of every case in ``cases/`` by configuration and case id.

        Before anything was sized, all configurations that can be trained are prepared, afterwards those in the run.
        """
        plan = self.plan()
        names = plan.run.configurations if plan.run else choose_configurations(list(plan.configurations), self.options)
        missing = [name for name in names if name not in self._keys]
        if missing:
            with self.stage("preprocess"):
                for name in missing:
                    self._keys[name] = preprocess_dataset(
                        self.dataset.training,
                        plan.configurations[name].preprocessing,
                        self.dataset.labels,
                        CaseStore(self.folder.cases),
                        workers=self.options.workers,
                        progress=self.progress,
                    )
        return {name: self._keys[name] for name in names}

    # ------------------------------------------------------------------------------------- for the stages' code

    @contextmanager
    def stage(self, name: str, *, unless: bool = False) -> Iterator[None]:
        """Do a stage alone in the folder and account for it, `unless` it is done; OS errors become a `StageError`."""
        try:
            with self.alone():
                if unless:
                    yield
                else:
                    with self.accounts.of(name):
                        yield
        except OSError as error:
            file = f": {error.filename}" if error.filename else ""
            raise StageError(
                f"stage {name} could not go on ({error.strerror or error}{file}); when that is mended, the same "
                "command goes on"
            ) from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out of the folder, or raise `InputError` where one is in it.

        The lock goes with its process, however that ends.
        """
        from filelock import Timeout

        self.folder.root.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"another segfit is at work in {self.folder.root}; wait for it, or choose another folder with --out"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    @cached_property
    def _lock(self) -> FileLock:
        from filelock import FileLock

        return FileLock(self.folder.root / ".lock")

    @cached_property
    def hardware(self) -> Hardware:
        """The machine, looked at once."""
        return measure_hardware(self.options.device)

    def run_plan(self) -> RunSpec:
        """Return what is trained; it is decided now if it was not."""
        run = self.size().run
        assert run is not None
        return run

    def _plan_basis(self, fingerprint: Fingerprint, splits: Splits, *, timed: bool = True) -> str:
        """Return the hash of everything that a plan is derived from; the time is left out if it is not `timed`."""
        asked = self.options.model_dump(
            mode="json",
            exclude_defaults=True,
            exclude={
                "workers": True,
                "dataset": {"skip_incomplete"},
                "training": {"checkpoint_seconds"},
                "time_s": not timed,
            },
        )
        return content_hash([fingerprint.content_hash(), self.dataset.labels.content_hash(), splits.seal, asked])

    def course(self) -> str:
        """Return the hash of everything but the time that the plan is derived from."""
        return self._plan_basis(self.fingerprint(), self.splits(), timed=False)

    def put_aside(self, basis: str) -> ProjectFolder:
        """Return where the results of a plan lie while those of another one are in their place."""
        return ProjectFolder(self.folder.earlier / basis)

    def results_of(self, basis: str) -> ProjectFolder:
        """Return where the results of a plan lie at this moment."""
        return self.folder if self.marks.holds("plan", basis) else self.put_aside(basis)

    def _put_in_place(self, plan: Plan) -> None:
        """See that what was trained belongs to this plan: put that of another aside, bring back what there was.

        `runs`, which knows its plan, moves last: whoever is killed in between finds the same work to do again.
        """
        owner = self.marks.get("plan")
        if owner == plan.basis:
            return
        folder = self.folder
        parts = [folder.selection, folder.validation_summary, folder.model, folder.predictions, folder.runs]
        with self.stage("results", unless=True):
            if owner is not None:
                aside = self.put_aside(owner).root
                self.progress.note(f"options or data changed; what was trained before is in {aside}")
                _move(parts, aside)
            _move([self.put_aside(plan.basis).root / part.name for part in parts], folder.root)
            self.marks.set("plan", plan.basis)


def _forecast(run: RunSpec) -> str:
    """Say what is going to be done and how long it will take."""
    trainings = listing([f"{name} (about {run.expected_steps[name]} steps)" for name in run.configurations])
    stages = ", ".join(f"{stage} {duration(item.seconds)}" for stage, item in run.forecast.items())
    total = run.total
    folds = listing([str(fold) for fold in run.folds])
    amounts = [f"{duration(total.seconds)} in all"]
    for value, kind in ((total.memory_gb, "RAM"), (total.device_memory_gb, "device memory"), (total.disk_gb, "disk")):
        amounts += [f"{gigabytes(value)} of {kind}"] if value is not None else []
    return (
        f"forecast: {trainings}, {'fold' if len(run.folds) == 1 else 'folds'} {folds}; {stages}; {', '.join(amounts)}"
    )


def _move(paths: Sequence[Path], folder: Path) -> None:
    """Move what is there of `paths` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.exists():
            path.replace(folder / path.name)


_Document = TypeVar("_Document", bound=Document)


def load(kind: type[_Document], path: Path) -> _Document | None:
    """Read a document if it is there."""
    return kind.load(path) if path.exists() else None
