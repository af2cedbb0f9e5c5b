"""The stages of a project up to its preprocessed cases, each resolved once in a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from segfit.dataset.checks import COPY, check_dataset, require_usable
from segfit.dataset.contents import FileHashes
from segfit.dataset.layouts import leave_out
from segfit.dataset.manifest import Case, Dataset
from segfit.dataset.splits import Splits, covering, make_splits, splits_problems, with_copies
from segfit.device import Hardware, measure_hardware
from segfit.errors import InputError, Problem, warning
from segfit.execution.execution import LOCAL, Execution
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.fingerprint.measure import look_to_measure, measure
from segfit.options import Options, time_setting
from segfit.planning.budget import choose_configurations
from segfit.planning.folds import grouped, splitting, with_folds
from segfit.planning.plan import Plan, RunSpec
from segfit.planning.planner import derive
from segfit.planning.presets import orientation_of
from segfit.planning.taken_over import told_as_taken_over
from segfit.preprocessing.dataset import are_verified, preprocess_dataset
from segfit.preprocessing.store import CaseStore, StoredCase
from segfit.progress import Checked, Progress
from segfit.project.added_time import with_added_time
from segfit.project.documents import Documents, load
from segfit.project.folder import CheckFile, PlanFolder, ProjectFile, ProjectFolder
from segfit.project.sharing import Locks
from segfit.project.stage_log import StageLog, told_of_files
from segfit.project.stages import STAGES
from segfit.project.starting_model import initial_weights, kept_model, planned_like, resolved, taken_values
from segfit.project.stop import StopFile
from segfit.records import Key, Results, Use
from segfit.report.views import look_to_show
from segfit.specs import Configuration

if TYPE_CHECKING:
    from segfit.training.initial import InitialWeights
    from segfit.training.team import Team

__all__ = ["Preparation"]

_Result = TypeVar("_Result")


class Preparation:
    """A project folder and what is prepared in it before anything is trained.

    What a stage left is looked up once: the same object answers alike until its options change.
    """

    def __init__(self, root: Path, dataset: Dataset, options: Options, *, execution: Execution = LOCAL) -> None:
        self.folder = ProjectFolder(root)
        self._opened = dataset
        self._resolved: dict[str, Any] = {}
        self._adopt(options)
        self.locks = Locks(self.folder, execution.progress)
        self.stop_file = StopFile(self.folder.stop)
        self.progress: Progress = Checked(execution.progress, self._require_may_go_on)
        self._execution = replace(execution, progress=self.progress)
        self.stage_log = StageLog(self.folder.stages)
        self.results = Results()
        self.documents = Documents(self.results, self.stage_log, self.locks)
        self.hashes = FileHashes(self.folder.cache / "files.json", dataset.folder)
        self.store = CaseStore(self.folder.cases, self.hashes)
        self._started: float | None = None  # when the work that the time is for began
        self.time_before: float | None = None  # of the run that this one goes on with, as time was added to it
        self._former: ProjectFile | None = None  # what was saved before the options of this session are accepted
        self._is_withdrawn = False  # the options of this session were refused, and are saved again if it goes on
        self.validates_all = False  # predict all validation cases, also those that a run had no time for
        self.team: Team | None = None  # of processes that train with this one
        self.overrun = False  # take more time rather than refuse a budget that is too short

    def _adopt(self, options: Options) -> None:
        """Take options; some of them say how the dataset is read, and a model that is started from says some."""
        self.asked, identity = options, options.training.start_from
        self.start = None if identity is None else kept_model(self.folder.root, identity)
        if self.start is None and identity is not None:
            raise InputError(f"{self.folder.root} lacks the model that it starts from", "give it again with --from")
        planned = planned_like(options, self.start)
        self._found = grouped(self._opened.taken(options.dataset), planned)  # all cases
        self.options = planned
        self.dataset = self._found  # narrowed by `check`
        self._resolved.clear()
        self.looked_at_machine = False  # once: commands on several machines do not overrule each other in turn

    @property
    def execution(self) -> Execution:
        """How work on its cases is done: as was given, else with as many workers as the options say."""
        return replace(self._execution, workers=self._execution.workers or self.options.workers)

    def save_options(self) -> None:
        """Write dataset and options into the project file."""
        file = ProjectFile(dataset=self.dataset.root, options=self.asked, time_before_s=self.time_before)
        known = load(ProjectFile, self.folder.project)
        self._is_withdrawn = False
        if known != file:
            self._former = known or ProjectFile(dataset=self.dataset.root, options=Options())
            with self.locks.held("options"), told_of_files("options"):
                file.save(self.folder.project)

    def _withdraw_options(self) -> None:
        """Have the project file as it was before the options of this session, unless others changed it meanwhile."""
        file = load(ProjectFile, self.folder.project)
        if self._former is not None and file is not None and file.options == self.asked:
            with self.locks.held("options"), told_of_files("options"):
                self._former.model_copy(update={"dataset": file.dataset}).save(self.folder.project)
            self._former, self._is_withdrawn = None, True

    def end_addition(self) -> None:
        """Take the time that was added for trained: the same addition made again adds once more."""
        if self.time_before is None:
            return
        file = load(ProjectFile, self.folder.project)
        if file is not None and file.options == self.asked:
            with self.locks.held("options"), told_of_files("options"):
                file.model_copy(update={"time_before_s": None}).save(self.folder.project)
        self.time_before = None

    def change(self, settings: Sequence[str]) -> None:
        """Change the options of the project by ``key=value`` settings."""
        settings, self.time_before = with_added_time(self.folder, load(ProjectFile, self.folder.project), settings)
        asked = self.asked.with_settings(settings)
        self._adopt(resolved(self.folder.root, asked, self._opened, settings))
        self.save_options()

    def check(self) -> tuple[Problem, ...]:
        """Read every file once and return all problems, those of folds too; unchanged files are not read again.

        With the option dataset.skip_incomplete the cases with fatal problems are left out of `dataset` from here on.
        """
        return (*self._check_once(), *splits_problems(self.options.planning.splits, self.dataset))

    def _check_once(self) -> tuple[Problem, ...]:
        return self.once("check", self._check)

    def _check(self) -> tuple[Problem, ...]:
        path, structure = self.folder.check, self._found.problems

        def known() -> CheckFile | None:
            if not path.exists():
                return None  # the files are hashed when they are read, and not before
            key = self._check_key(self.hashes)
            file = self.results.recall(CheckFile, path, key)
            if file is None or any(problem.transient for problem in file.problems):
                return None
            if file.structure != structure:
                file = self.results.store(file.model_copy(update={"structure": structure}), path, key)
            return file

        def make(use: Callable[[], Use]) -> CheckFile:
            looks = (
                look_to_measure(self._found, orientation_of(self.options), self.folder.cache),
                look_to_show(self._found.labels, self.folder.cache),
            )
            self.hashes.look_again()
            problems = check_dataset(
                self._found,
                hashes=self.hashes,
                looks=looks,
                execution=self.execution,
            )
            key = self._check_key(self.hashes.as_read())  # what changed since is found the next time
            file = CheckFile(structure=structure, problems=problems[len(structure) :])
            return self.results.store(file, path, key, use())

        problems = (*structure, *self.documents.resolve("check", known, make).problems)
        if self.options.dataset.skip_incomplete:
            self.dataset, problems = leave_out(self._found, problems)
        copies = [(problem.other, problem.case) for problem in problems if problem.code == COPY]
        self.dataset = self.dataset.in_groups(with_copies(self.dataset.training, copies))
        return problems

    def _check_key(self, hashes: FileHashes) -> Key:
        """Return what names the check of the dataset's files and of what is declared of them, wherever they lie."""
        try:
            return STAGES["check"].key(self.options, dataset=hashes.dataset(self._found))
        finally:
            self.hashes.learn(hashes)
            self.hashes.save()

    def fingerprint(self) -> Fingerprint:
        """Measure the dataset."""
        return self.once("fingerprint", self._fingerprint)

    def _fingerprint(self) -> Fingerprint:
        require_usable(self._check_once())

        def make() -> Fingerprint:
            return measure(
                self.dataset,
                orientation_of(self.options),
                execution=self.execution,
                cache=self.folder.cache,
                hashes=self.hashes,
            )

        key = self._fingerprint_key  # of what is there before it is measured
        return self.documents.get(Fingerprint, self.folder.fingerprint, key, make)

    def known_fingerprint(self) -> Fingerprint | None:
        """Return the fingerprint if it was measured."""
        return self.results.recall(Fingerprint, self.folder.fingerprint, self._fingerprint_key)

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
        time : budget of the run, like "2h", or seconds; "+30m" adds to that of the run that is there
        memory_gb, preset : as in `Options`
        settings : ``key=value``, as in `Options.with_settings`
        """
        changes = [*settings]
        if time is not None:
            changes.append(time_setting(time))
        if memory_gb is not None:
            changes.append(f"memory_gb={memory_gb}")
        if preset is not None:
            changes.append(f"preset={preset}")
        if changes:
            self.change(changes)
        return self.once("plan", self._plan)

    def _plan(self) -> Plan:
        with self.at_work():
            path = self.plan_folder.plan
            result = self.documents.get(Plan, path, self.plan_key, lambda: self.replanned(()))
            self.documents.publish(path, self.folder.plan)
        return result

    def known_plan(self) -> Plan | None:
        """Return the plan if it was derived."""
        return self.results.recall(Plan, self.plan_folder.plan, self.plan_key)

    def size(self) -> Plan:
        """Decide what is trained in the time there is, from measured steps, and write it down."""
        from segfit.project.sized import sized_plan

        if "size" not in self._resolved:
            with self.at_work():
                self._resolved |= dict.fromkeys(("size", "plan"), sized_plan(self))
        return self.plan()

    def plan_anew(self) -> Plan:
        """Derive the plan again: what is trained is decided again when it is asked for, in the time that is left."""
        with self.stage_log.of("plan"):
            plan = self.results.store(self.replanned(()), self.plan_folder.plan, self.plan_key)
        self.look_again()
        return plan

    def look_again(self) -> None:
        """Forget what is planned and trained in this session: others may have decided anew."""
        for name in [name for name in self._resolved if name in ("plan", "size") or name.startswith("preprocess ")]:
            del self._resolved[name]

    @contextmanager
    def looking(self, plan: Plan) -> Iterator[None]:
        """Take this plan for what is trained, whatever else would be decided: for those who only look."""
        before = dict(self._resolved)
        self._resolved |= {"plan": plan, "size": plan}
        try:
            yield
        finally:
            self._resolved = before

    def replanned(self, settings: Sequence[str]) -> Plan:
        """Return the plan of the rules with further settings of the planner; nothing is written."""
        start, fingerprint, options = self.start, self.fingerprint(), self.options
        unfit = "" if start is None else start.unfit(fingerprint, self.dataset.name)
        if unfit:
            options = planned_like(self.asked, start, network_only=True)
            self.progress.warn(warning("network_only", f"{unfit}; only its network is taken over"))
        options = options.with_settings(settings)
        plan = derive(fingerprint, self.dataset.labels, options, self.hardware)
        if start is not None:
            plan = told_as_taken_over(plan, start.configuration_name, taken_values(self.asked, options))
        plan = with_folds(plan, self.splits(), self.dataset)
        return plan.model_copy(update={"machine": self.hardware.machine})

    @property
    def initial(self) -> InitialWeights | None:
        """The weights that trainings start from; None: they start from nothing."""
        return None if self.start is None else initial_weights(self.folder.root, self.start)

    @property
    def plan_folder(self) -> PlanFolder:
        """Where that lies which hangs on the plan of the present options."""
        return self.folder.of_plan(self.plan_key.hash)

    @property
    def plan_key(self) -> Key:
        """Key of the plan of the present options."""
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
            weights=self.dataset.weights([case.id for case in self.dataset.training]),
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
                f"{path} was edited or comes from another version of segfit",
                f"give --splits {path} to use its folds, or delete it to have them made anew",
            )
        with self.locks.held("splits"), told_of_files("splits"):
            splits.save(path)
        return splits

    def _split(self) -> Splits:
        way = splitting(self.options, self.dataset)
        classes = self.fingerprint().values_by_case if way == "balanced" else {}
        return make_splits(way, self.dataset.training, classes)

    def validated(self, fold: int, *, whole: bool) -> tuple[str, ...]:
        """Return the validation cases of a fold: all of them, or those that there is time for."""
        count, cases = self.run_plan().validation_cases, self.splits().folds[fold].validation
        return cases if count is None or whole else covering(cases, self.fingerprint().values_by_case, count)

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
    def at_work(self) -> Iterator[None]:
        """Count the time of what is done inside, unless it is counted already, and keep what it needs from removal.

        A command that joins others of the same options has their clock: all end when the first of them was to. Options
        that are refused are not kept.
        """
        if self._started is not None:
            yield
            return
        if self._is_withdrawn:
            self.save_options()
        with self.locks.joined(self.options.content_hash()) as seconds:
            self._started = perf_counter() - seconds
            self.stop_file.begin()
            try:
                yield
                self._former = None  # what was asked for was done
            except InputError:
                self._withdraw_options()
                raise
            finally:
                self._started = None

    def _require_may_go_on(self) -> None:
        self.locks.require()
        self.stop_file.require_none()

    def seconds(self) -> float:
        """Return the seconds of the time budget that are used."""
        return 0.0 if self._started is None else perf_counter() - self._started

    def preprocess(self) -> dict[str, dict[str, str]]:
        """Preprocess all cases; return the key of every case in ``cases/`` by configuration and case id.

        Before anything was sized, all configurations that can be trained are prepared, afterwards those in the run.
        """
        with self.at_work():
            plan, run = self.plan(), self.plan().run
            names = run.configurations if run else choose_configurations(list(plan.configurations), self.options)
            missing = [name for name in names if f"preprocess {name}" not in self._resolved]
            if missing and all(self._is_preprocessed(plan.configurations[name]) for name in missing):
                with self.stage_log.of("preprocess"):  # without keeping other commands from the same look
                    for name in missing:
                        self._resolved[f"preprocess {name}"] = self.case_keys(plan.configurations[name])
            elif missing:
                with self.locks.held("preprocess"), self.stage_log.of("preprocess"):
                    for name in missing:
                        self._resolved[f"preprocess {name}"] = self.preprocessed(plan.configurations[name])
        return {name: self._resolved[f"preprocess {name}"] for name in names}

    def _is_preprocessed(self, configuration: Configuration) -> bool:
        """Whether all training cases are in ``cases/`` and were verified lately."""
        keys = list(self.case_keys(configuration).values())
        return are_verified(keys, self.store, execution=self.execution)

    def preprocessed(self, configuration: Configuration, cases: Sequence[Case] | None = None) -> dict[str, str]:
        """Preprocess training cases, all unless named; return the key of each in ``cases/`` by case id."""
        return preprocess_dataset(
            self.dataset.training if cases is None else cases,
            configuration.preprocessing,
            self.dataset.labels,
            self.store,
            measured=self.fingerprint(),
            execution=self.execution,
        )

    def stored(self, key: str) -> StoredCase:
        """Open a preprocessed case, once; `StageError` if it is not there."""
        return self.once(f"case {key}", lambda: self.store.open(key))

    def once(self, name: str, find: Callable[[], _Result]) -> _Result:
        """Return what `find` finds, looked for once until the options change."""
        if name not in self._resolved:
            self._resolved[name] = find()
        return cast("_Result", self._resolved[name])

    @property
    def hardware(self) -> Hardware:
        """The machine, looked at once."""
        return self.once("hardware", lambda: measure_hardware(self.options.device))

    def run_plan(self) -> RunSpec:
        """Return what is trained; it is decided now if it was not."""
        run = self.size().run
        assert run is not None
        return run
