"""The stages of a project up to its preprocessed cases, and what all stages share: folder, locks, accounts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeVar, cast

from segfit.dataset.checks import check_dataset, require_usable
from segfit.dataset.layouts import leave_out
from segfit.dataset.manifest import Case, Dataset
from segfit.dataset.splits import SPLITS_FILE, Splits, balanced_splits, covering, faults_of, nnunet_splits, read_splits
from segfit.device import Hardware, measure_hardware
from segfit.errors import InputError, Problem, StageError
from segfit.files import Document, write_bytes
from segfit.fingerprint.contents import FileHashes
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
from segfit.project.folder import CheckFile, PlanFolder, ProjectFile, ProjectFolder
from segfit.project.sharing import Locks
from segfit.project.stages import STAGES
from segfit.records import Key, Use, recall, store
from segfit.specs import Configuration
from segfit.words import duration, gigabytes, listing

__all__ = ["Preparation", "load", "told_of_files"]

_Result = TypeVar("_Result")
_Document = TypeVar("_Document", bound=Document)


class Preparation:
    """A project folder and what is prepared in it before anything is trained.

    What a stage left is looked up once: the same object answers alike until its options change.
    """

    def __init__(self, root: Path, dataset: Dataset, options: Options, *, progress: Progress = LOGGED) -> None:
        self.folder = ProjectFolder(root)
        self._found = dataset
        self._resolved: dict[str, Any] = {}
        self._adopt(options)
        self.progress = progress
        self.accounts = Accounts(self.folder.stages)
        self.locks = Locks(self.folder, progress)
        at = dataset.root if dataset.root.is_dir() else dataset.root.parent
        self.hashes = FileHashes(self.folder.cache / "files.json", at)
        self.store = CaseStore(self.folder.cases, self.hashes)
        self._started: float | None = None  # when the work that the time is for began
        self.validates_all = False  # predict all validation cases, also those that a run had no time for
        self.overrun = False  # take more time rather than refuse a budget that is too short

    def _adopt(self, options: Options) -> None:
        """Take options; some of them say how the dataset is read."""
        self.options = options
        self._found = self._found.resampling_labels(options.dataset.resample_labels)  # all cases
        self.dataset = self._found  # narrowed by `check`
        self._resolved.clear()
        self._looked_at_machine = False  # once: commands on several machines do not overrule each other in turn

    def save_options(self) -> None:
        """Write dataset and options into the project file."""
        file = ProjectFile(dataset=self.dataset.root, options=self.options)
        if load(ProjectFile, self.folder.project) != file:
            with self.locks.held("options"), told_of_files("options"):
                file.save(self.folder.project)

    def check(self) -> tuple[Problem, ...]:
        """Read every file once and return all problems; unchanged files are not read again.

        With the option dataset.skip_incomplete the cases with fatal problems are left out of `dataset` from here on.
        """
        return self.once("check", self._check)

    def _check(self) -> tuple[Problem, ...]:
        key = STAGES["check"].key(self.options, dataset=self._content())

        def known() -> CheckFile | None:
            file = recall(CheckFile, self.folder.check, key)
            return None if file is None or any(problem.transient for problem in file.problems) else file

        def make(use: Callable[[], Use]) -> CheckFile:
            problems = check_dataset(self._found, workers=self.options.workers, progress=self.progress)
            return store(CheckFile.of(problems), self.folder.check, key, use())

        problems = self.resolve("check", known, make).found()
        if self.options.dataset.skip_incomplete:
            self.dataset, problems = leave_out(self._found, problems)
        return problems

    def _content(self) -> str:
        """Return what names the files of the dataset and what is declared of them, wherever they lie."""
        try:
            return self.hashes.dataset(self._found)
        finally:
            self.hashes.save()

    def fingerprint(self) -> Fingerprint:
        """Measure the dataset."""
        return self.once("fingerprint", self._fingerprint)

    def _fingerprint(self) -> Fingerprint:
        require_usable(self.check())
        key = self._fingerprint_key  # of what is there before it is measured

        def make(use: Callable[[], Use]) -> Fingerprint:
            result = measure(
                self.dataset,
                orientation_of(self.options),
                workers=self.options.workers,
                progress=self.progress,
                cache=self.folder.cache,
                hashes=self.hashes,
            )
            return store(result, self.folder.fingerprint, key, use())

        return self.resolve("fingerprint", lambda: recall(Fingerprint, self.folder.fingerprint, key), make)

    def known_fingerprint(self) -> Fingerprint | None:
        """Return the fingerprint if it was measured."""
        return recall(Fingerprint, self.folder.fingerprint, self._fingerprint_key)

    @property
    def _fingerprint_key(self) -> Key:
        dataset = self.dataset
        contents = {case.id: self.hashes.case(case) for case in dataset.training}
        return STAGES["fingerprint"].key(
            self.options,
            cases=[*dataset.channel_names, contents],
            labels=dataset.labels.content_hash(),
            orientation=orientation_of(self.options),
        )

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
        return self.once("plan", self._plan)

    def _plan(self) -> Plan:
        path = self.plan_folder.plan

        def make(use: Callable[[], Use]) -> Plan:
            return store(self._derived(self.options), path, self._plan_key, use())

        result = self.resolve("plan", self.known_plan, make)
        self.publish(path, self.folder.plan)
        return result

    def known_plan(self) -> Plan | None:
        """Return the plan if it was derived."""
        return recall(Plan, self.plan_folder.plan, self._plan_key)

    def _derived(self, options: Options) -> Plan:
        """Return the plan of the rules, with what is to be said of the folds."""
        splits, cases = self.splits(), self.dataset.training
        plan = derive(self.fingerprint(), self.dataset.labels, options, self.hardware)
        return plan.model_copy(
            update={
                "decisions": (*plan.decisions, folds_decision(splits, cases)),
                "warnings": (*plan.warnings, *faults_of(splits, cases)),
                "machine": self.hardware.machine,
            }
        )

    def size(self) -> Plan:
        """Decide what is trained in the time there is, from measured steps, and write it down."""
        return self.once("size", self._size)

    @contextmanager
    def looking(self, plan: Plan) -> Iterator[None]:
        """Take this plan for what is trained, whatever else would be decided: for those who only look."""
        before = dict(self._resolved)
        self._resolved |= {"plan": plan, "size": plan}
        try:
            yield
        finally:
            self._resolved = before

    def _size(self) -> Plan:
        found = self.plan()
        if found.run is None or found.machine != self.hardware.machine:
            with self.locks.held("what is trained"):
                found = self._for_this_machine(self.known_plan() or found)  # others may have decided meanwhile
                if found.run is None:
                    found = self._decided(found).model_copy(update={"machine": self.hardware.machine})
                    found = store(found, self.plan_folder.plan, self._plan_key)
        self.publish(self.plan_folder.plan, self.folder.plan)
        self._resolved["plan"] = found
        return found

    def _for_this_machine(self, plan: Plan) -> Plan:
        """Return a plan that was made on another machine as it is, or a new one where nothing is trained by it yet."""
        from segfit.project.trainings import is_begun

        here = self.hardware.machine
        if plan.machine == here or self._looked_at_machine:
            return plan
        self._looked_at_machine = True
        made_for = f"the plan was made for {plan.machine or 'an unknown machine'}, this is {here}"
        if self.plan_folder.race.exists() or is_begun(self, plan):
            self.progress.note(f"{made_for}: it is kept, as trainings by it have begun")
            return plan
        self.progress.note(f"{made_for}: it is made anew, as nothing is trained by it yet")
        return self._planned_anew()

    def _planned_anew(self) -> Plan:
        with self.account("plan"):
            return store(self.replanned(()), self.plan_folder.plan, self._plan_key)

    def _decided(self, plan: Plan) -> Plan:
        """Return the plan with its run."""
        from segfit.project.decide import decide_run

        with self.timed():
            plan = decide_run(self, plan)
        assert plan.run is not None
        self.progress.note(_forecast(plan.run))
        return plan

    def decide_anew(self) -> None:
        """Forget what is trained: it is decided again, when it is asked for, in the time that is left."""
        with self.locks.held("what is trained"):
            self._planned_anew()
        self.look_again()

    def look_again(self) -> None:
        """Forget what is planned and trained in this session: others may have decided anew."""
        for name in [name for name in self._resolved if name in ("plan", "size") or name.startswith("preprocess ")]:
            del self._resolved[name]

    def replanned(self, settings: Sequence[str]) -> Plan:
        """Return the plan of this project with further settings of the planner; nothing is written."""
        return self._derived(self.options.with_settings(settings))

    @property
    def plan_folder(self) -> PlanFolder:
        """Where that lies which hangs on the plan of the present options."""
        return self.folder.of_plan(self._plan_key.hash)

    @property
    def _plan_key(self) -> Key:
        return self.once("key of the plan", lambda: self._key_of("plan"))

    def course(self) -> str:
        """Return the hash of everything but the time that the plan is derived from."""
        return self._key_of("course").hash

    def _key_of(self, stage: str) -> Key:
        return STAGES[stage].key(
            self.options,
            fingerprint=self.fingerprint().content_hash(),
            labels=self.dataset.labels.content_hash(),
            splits=self.splits().seal,
            weights=self.weights([case.id for case in self.dataset.training]),
        )

    def splits(self) -> Splits:
        """Return which cases train and which validate, and write it down.

        Raises `InputError` if ``splits.json`` was edited: its folds are used when the option names the file.
        """
        return self.once("splits", self._write_splits)

    def _write_splits(self) -> Splits:
        splits, path = self._split(), self.folder.splits
        known = load(Splits, path)
        if known == splits:
            return splits
        if known is not None and known.folds != splits.folds and not known.intact:
            raise InputError(
                f"{path} was edited or comes from another version of segfit; give --splits {path} to use its folds, or "
                "delete it to have them made anew"
            )
        with self.locks.held("splits"), told_of_files("splits"):
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
            return balanced_splits(cases, self.values_by_case()).sealed(asked)
        return read_splits(asked, ids).sealed(str(asked))

    def values_by_case(self) -> dict[str, list[int]]:
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

    def validated(self, fold: int, *, whole: bool) -> tuple[str, ...]:
        """Return the validation cases of a fold: all of them, or those that there is time for."""
        count, cases = self.run_plan().validation_cases, self.splits().folds[fold].validation
        return cases if count is None or whole else covering(cases, self.values_by_case(), count)

    def case_keys(self, configuration: Configuration) -> dict[str, str]:
        """Return the keys of all training cases in the store, whether they are in it or not, by case id."""
        spec, labels = configuration.preprocessing, self.dataset.labels

        def keys() -> dict[str, str]:
            return {case.id: self.store.key(case, spec, labels) for case in self.dataset.training}

        return self.once(f"keys of {spec.content_hash()}", keys)

    @property
    def first_fold(self) -> int:
        """The fold that is trained first."""
        return (self.options.planning.folds or (0,))[0]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the time of what is done inside, unless it is counted already."""
        if self._started is not None:
            yield
            return
        self._started = perf_counter()
        try:
            yield
        finally:
            self._started = None

    def seconds(self) -> float:
        """Return the seconds of the time budget that are used."""
        return 0.0 if self._started is None else perf_counter() - self._started

    def preprocess(self) -> dict[str, dict[str, str]]:
        """Preprocess all cases; return the key of every case in ``cases/`` by configuration and case id.

        Before anything was sized, all configurations that can be trained are prepared, afterwards those in the run.
        """
        plan = self.plan()
        names = plan.run.configurations if plan.run else choose_configurations(list(plan.configurations), self.options)
        missing = [name for name in names if f"preprocess {name}" not in self._resolved]
        if missing:
            with self.locks.held("preprocess"), self.account("preprocess"):
                for name in missing:
                    self._resolved[f"preprocess {name}"] = self.preprocessed(plan.configurations[name])
        return {name: self._resolved[f"preprocess {name}"] for name in names}

    def preprocessed(self, configuration: Configuration, cases: Sequence[Case] | None = None) -> dict[str, str]:
        """Preprocess training cases, all unless named; return the key of each in ``cases/`` by case id."""
        return preprocess_dataset(
            self.dataset.training if cases is None else cases,
            configuration.preprocessing,
            self.dataset.labels,
            self.store,
            measured=self.fingerprint(),
            workers=self.options.workers,
            progress=self.progress,
        )

    # ------------------------------------------------------------------------------------- for the stages' code

    def once(self, name: str, find: Callable[[], _Result]) -> _Result:
        """Return what `find` finds, looked for once until the options change."""
        if name not in self._resolved:
            self._resolved[name] = find()
        return cast("_Result", self._resolved[name])

    def resolve(
        self, stage: str, known: Callable[[], _Result | None], make: Callable[[Callable[[], Use]], _Result]
    ) -> _Result:
        """Return the result of a stage that is `known`, or make it: once, by one command of several.

        `make` is given what tells its use, for the record.
        """
        found = known()
        if found is not None:
            return found
        with self.locks.held(stage):
            found = known()  # others may have made it meanwhile
            if found is None:
                with self.account(stage) as use:
                    found = make(use)
        return found

    @contextmanager
    def account(self, stage: str) -> Iterator[Callable[[], Use]]:
        """Account for a stage; yields what tells its use so far. OS errors become a `StageError`."""
        with told_of_files(stage), self.accounts.of(stage) as use:
            yield use

    def publish(self, source: Path, target: Path) -> None:
        """Have a copy of a result at the top of the project."""
        content = source.read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            with told_of_files("results"):
                write_bytes(target, content)

    @property
    def hardware(self) -> Hardware:
        """The machine, looked at once."""
        return self.once("hardware", lambda: measure_hardware(self.options.device))

    def run_plan(self) -> RunSpec:
        """Return what is trained; it is decided now if it was not."""
        run = self.size().run
        assert run is not None
        return run


@contextmanager
def told_of_files(stage: str) -> Iterator[None]:
    """Turn OS errors into a `StageError` that says what could not go on."""
    try:
        yield
    except OSError as error:
        file = f": {error.filename}" if error.filename else ""
        raise StageError(
            f"stage {stage} failed ({error.strerror or error}{file})", "fix that and rerun the command to resume"
        ) from error


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


def load(kind: type[_Document], path: Path) -> _Document | None:
    """Read a document if it is there."""
    return kind.load(path) if path.exists() else None
