"""A project: one folder, one dataset, the stages in order. Every stage does what is missing and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Self, TypeVar

from segfit.dataset.checks import check_dataset, require_usable
from segfit.dataset.layouts import open_dataset
from segfit.dataset.manifest import Dataset
from segfit.dataset.splits import Splits, make_splits
from segfit.device import Hardware, measure_hardware, resolve_device
from segfit.errors import InputError, Problem, StageError
from segfit.evaluation.summary import Pair, Summary, evaluate
from segfit.files import Document, content_hash
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.fingerprint.measure import measure
from segfit.options import Options, parse_seconds
from segfit.planning.budget import choose_configurations
from segfit.planning.plan import Plan, RunSpec
from segfit.planning.planner import derive
from segfit.planning.presets import orientation_of
from segfit.preprocessing.store import CaseStore, preprocess_dataset
from segfit.progress import SILENT, Progress
from segfit.project.accounts import Accounts
from segfit.project.folder import CheckFile, Marks, ProjectFile, ProjectFolder, listing_hash
from segfit.selection.select import Selection

if TYPE_CHECKING:
    from filelock import FileLock

    from segfit.training.result import TrainingResult

__all__ = ["Project"]

_PROBED_CASES = 4  # preprocessed ahead to forecast the time of all


class Project:
    """A project folder; make one with `create` or `open`.

    The methods named after stages stand in pipeline order. Each runs what it needs of the stages before it, skips what
    is done, and may be interrupted at any moment and called again.
    """

    def __init__(self, root: Path, dataset: Dataset, options: Options, *, progress: Progress = SILENT) -> None:
        self.folder = ProjectFolder(root)
        self.dataset = dataset
        self.options = options
        self.progress = progress
        self.marks = Marks(self.folder.marks)
        self._accounts = Accounts(self.folder.stages)
        self._keys: dict[str, dict[str, str]] = {}  # case keys by configuration
        self._started = perf_counter()

    @classmethod
    def create(
        cls,
        folder: Path | str,
        dataset: Dataset | Path | str,
        options: Options | None = None,
        *,
        settings: Sequence[str] = (),
        progress: Progress = SILENT,
    ) -> Self:
        """Make a project, or take up the one that is there: what its stages did is kept as far as it still applies.

        Parameters
        ----------
        options : None: those the project was made with, or the default ones
        settings : changes to them, ``key=value`` as in `Options.with_settings`

        Raises `InputError` if `folder` belongs to another dataset or holds other things, and `DatasetError` for an
        unusable dataset.
        """
        root = Path(folder).expanduser().absolute()
        opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
        before = _load(ProjectFile, ProjectFolder(root).project)
        if before is not None and before.dataset != opened.root:
            raise InputError(
                f"{root} is a project on {before.dataset}, not on {opened.root}; choose another folder with --out"
            )
        if before is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise InputError(f"{root} is not empty and not a segfit project; choose another folder with --out")
        options = options or (before.options if before is not None else Options())
        project = cls(root, opened, options.with_settings(settings), progress=progress)
        project._save_options()
        return project

    @classmethod
    def open(cls, folder: Path | str, *, settings: Sequence[str] = (), progress: Progress = SILENT) -> Self:
        """Open a project and change its options by `settings`; raise `InputError` if there is none."""
        root = Path(folder).expanduser().absolute()
        file = _load(ProjectFile, ProjectFolder(root).project)
        if file is None:
            raise InputError(f"{root} is not a segfit project; give the folder that segfit run --out made")
        return cls.create(root, file.dataset, settings=settings, progress=progress)

    def _save_options(self) -> None:
        file = ProjectFile(dataset=self.dataset.root, options=self.options)
        if _load(ProjectFile, self.folder.project) != file:
            with self.stage("options", unless=True):
                file.save(self.folder.project)

    # ------------------------------------------------------------------------------------------------- stages

    def check(self) -> tuple[Problem, ...]:
        """Read every file once and return all problems; unchanged files are not read again."""
        try:
            listing = listing_hash(self.dataset)
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read ({error.strerror}); restore it") from None
        if self.folder.check.exists():
            known = CheckFile.load(self.folder.check)
            if known.listing == listing:
                return known.found()
        with self.stage("check"):
            problems = check_dataset(self.dataset, workers=self.options.workers, progress=self.progress)
            CheckFile.of(listing, problems).save(self.folder.check)
        return problems

    def fingerprint(self) -> Fingerprint:
        """Measure the dataset."""
        require_usable(self.check())
        orientation = orientation_of(self.options)
        listing = CheckFile.load(self.folder.check).listing
        basis = content_hash([listing, orientation])
        if self.marks.holds("fingerprint", basis) and self.folder.fingerprint.exists():
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
            self.marks.set("fingerprint", basis)
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
            self.options = self.options.with_settings(changes)
            self._save_options()
        fingerprint = self.fingerprint()
        basis = self._plan_basis(fingerprint)
        known = _load(Plan, self.folder.plan)
        if known is not None and known.basis == basis:
            return known
        with self.stage("plan"):
            self._change_plan("" if known is None else known.basis, basis)
            known = _load(Plan, self.folder.plan)
            if known is not None:
                return known
            plan = derive(fingerprint, self.dataset.labels, self.options, self._hardware)
            plan = plan.model_copy(update={"basis": basis})
            plan.save(self.folder.plan)
            self._splits_file()
        return plan

    def size(self) -> Plan:
        """Decide what is trained in the time there is, from steps measured on this machine, and write it down."""
        plan = self.plan()
        if plan.run is not None:
            return plan
        from segfit.project.sizing import DEFAULT_SECONDS, Workload, size_run

        options = self.options
        if options.time_s is not None and options.training.steps is not None:
            raise InputError("a run is limited by --time or by --steps, not by both; leave one out")
        seconds = None
        if options.training.steps is None:
            budget = options.time_s or DEFAULT_SECONDS[self._hardware.kind]
            if options.time_s is None:
                self.progress.note(f"no --time was given: this run is planned for {budget / 3600:g} h")
            seconds = budget
        splits = self.splits()
        workload = Workload(
            num_folds=len(splits.folds),
            validation_cases=max(len(fold.validation) for fold in splits.folds),
            test_cases=len(self.dataset.test),
        )
        with self.stage("size"):
            ahead = self._forecast_preprocessing(plan)
            left = None if seconds is None else seconds - (perf_counter() - self._started)
            plan = size_run(
                plan,
                self.fingerprint(),
                self.dataset.labels,
                options,
                resolve_device(options.device),
                workload,
                seconds=left,
                forecast_s={"preprocess": ahead},
                progress=self.progress,
            )
            plan.save(self.folder.plan)
        return plan

    def splits(self) -> Splits:
        """Return which cases train and which validate."""
        self.plan()
        return self._splits_file()

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

    def train(self) -> list[TrainingResult]:
        """Train all folds of all configurations of the run, and validate each; return the trainings' results."""
        from segfit.project import trainings

        return trainings.train_all(self)

    def select(self) -> Selection:
        """Choose the best configuration or ensemble and its post-processing, and write the model."""
        from segfit.project import handover

        return handover.select_model(self)

    def predict(self) -> list[Path]:
        """Predict the dataset's test images with the model; return the label files."""
        from segfit.project import handover

        return handover.predict_test(self)

    def evaluate(self) -> Summary | None:
        """Score the predictions of the test images; None if there are none with labels."""
        paths = {path.name.removesuffix(self.dataset.file_ending): path for path in self.predict()}
        pairs = [
            Pair.of_files(case.id, paths[case.id], case.label) for case in self.dataset.test if case.label is not None
        ]
        if not pairs:
            return None
        known = _load(Summary, self.folder.predictions / "summary.json")
        if known is not None:  # the folder is emptied when the model changes
            return known
        with self.stage("evaluate"):
            summary = evaluate(pairs, self.dataset.labels, workers=self.options.workers, progress=self.progress)
            summary.save(self.folder.predictions / "summary.json")
        return summary

    def report(self) -> Path:
        """Write ``report.html`` from what there is; return its path."""
        from segfit.project.reporting import report_data
        from segfit.report.page import write_report

        with self.stage("report"):
            data = report_data(
                self.folder,
                self.dataset,
                self.options,
                fingerprint=_load(Fingerprint, self.folder.fingerprint),
                plan=_load(Plan, self.folder.plan),
                selection=_load(Selection, self.folder.selection),
                validation=_load(Summary, self.folder.validation_summary),
                folds={
                    case: number for number, fold in enumerate(self._splits_file().folds) for case in fold.validation
                },
                test=_load(Summary, self.folder.predictions / "summary.json"),
                records=self._accounts.records(),
                hardware=self._hardware,
                warnings=[f"{item.case}: {item.problem}; {item.action}" for item in self.check() if not item.fatal],
            )
            write_report(data, self.folder.report)
        return self.folder.report

    def run(self) -> Summary | None:
        """Run all stages; return the scores of the test images, None if there are no labels for them."""
        with self._alone():
            return self._run()

    def _run(self) -> Summary | None:
        for problem in self.check():
            if not problem.fatal:
                self.progress.warn(f"{problem.case}: {problem.problem}; {problem.action}")
        self.size()
        self.preprocess()
        self.train()
        self.select()
        summary = self.evaluate()
        self.report()
        return summary

    # ------------------------------------------------------------------------------------- for the stages' code

    @contextmanager
    def stage(self, name: str, *, unless: bool = False) -> Iterator[None]:
        """Do a stage alone in the folder and account for it, `unless` it is done; OS errors become one sentence."""
        try:
            with self._alone():
                if unless:
                    yield
                else:
                    with self._accounts.of(name):
                        yield
        except OSError as error:
            file = f": {error.filename}" if error.filename else ""
            raise StageError(
                f"stage {name} could not go on ({error.strerror or error}{file}); when that is mended, the same "
                "command goes on"
            ) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out of the folder; the lock goes with its process, however that ends."""
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
    def _hardware(self) -> Hardware:
        return measure_hardware(self.options.device)

    def run_plan(self) -> RunSpec:
        """Return what is trained; it is decided now if it was not."""
        run = self.size().run
        assert run is not None
        return run

    def _plan_basis(self, fingerprint: Fingerprint) -> str:
        """Return the hash of everything that a plan is derived from."""
        asked = self.options.model_dump(mode="json", exclude={"workers": True, "training": {"checkpoint_seconds"}})
        return content_hash([fingerprint.content_hash(), self.dataset.labels.content_hash(), asked])

    def _change_plan(self, before: str, after: str) -> None:
        """Put what belongs to one plan aside and bring back what was made by another, if it was."""
        folder = self.folder
        parts = [
            folder.plan,
            folder.runs,
            folder.selection,
            folder.validation_summary,
            folder.model,
            folder.predictions,
        ]
        aside, back = folder.earlier / before, folder.earlier / after
        if any(part.exists() for part in parts):
            aside.mkdir(parents=True, exist_ok=True)
            for part in parts:
                if part.exists():
                    part.replace(aside / part.name)
            if (aside / folder.runs.name).exists():
                self.progress.note(f"the options or the data changed; what was trained before is kept in {aside}")
        if back.is_dir():
            for part in parts:
                if (back / part.name).exists():
                    (back / part.name).replace(part)
            back.rmdir()

    def _splits_file(self) -> Splits:
        splits = make_splits([case.id for case in self.dataset.training])
        if _load(Splits, self.folder.splits) != splits:
            splits.save(self.folder.splits)
        return splits

    def _forecast_preprocessing(self, plan: Plan) -> float:
        """Preprocess a few cases of the first configuration, and return the seconds that the others will take."""
        cases = self.dataset.training
        name = choose_configurations(list(plan.configurations), self.options)[0]
        started = perf_counter()
        preprocess_dataset(
            cases[:_PROBED_CASES],
            plan.configurations[name].preprocessing,
            self.dataset.labels,
            CaseStore(self.folder.cases),
            workers=self.options.workers,
        )
        seconds = perf_counter() - started
        return round(seconds / min(_PROBED_CASES, len(cases)) * max(0, len(cases) - _PROBED_CASES), 1)


_Document = TypeVar("_Document", bound=Document)


def _load(kind: type[_Document], path: Path) -> _Document | None:
    """Read a document if it is there."""
    return kind.load(path) if path.exists() else None
