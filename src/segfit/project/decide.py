"""What is trained in the time there is: candidates are measured, the most promising ones race, and that is written.

A run with more time than an earlier one goes on with the training of that, see `segfit.project.extension`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

from segfit.device import resolve_device
from segfit.errors import InputError, MemoryShortageError, StageError
from segfit.options import CASCADE, Options
from segfit.planning.asked_folds import cascade_problem, folds_of
from segfit.planning.budget import (
    ENOUGH_STEPS,
    FEWEST_STEPS,
    LONG_STEPS,
    TOLERABLE_STEPS,
    choose_configurations,
    choose_trainings,
    fine_tuning_recipe,
    short_recipe,
)
from segfit.planning.plan import Plan, RunSpec, StageForecast
from segfit.planning.sized_plan import with_run
from segfit.project.candidate import SLACK, Candidate, Workload
from segfit.project.extension import Earlier, earlier_run, require_extended
from segfit.project.forecast import (
    REPORT_SECONDS,
    PreprocessingCost,
    forecast_preprocessing,
    forecast_stages,
    probe_preprocessing,
    report_seconds,
)
from segfit.project.preparation import Preparation
from segfit.project.race import Outcome, race, taken_up
from segfit.project.sampled_labels import sampled_labels
from segfit.project.sizing import Sizer
from segfit.project.taken_from_model import taken_from_model
from segfit.specs import Acceleration, Configuration, TrainingSpec
from segfit.text import duration

__all__ = ["DEFAULT_SECONDS", "decide_run", "require_possible"]

DEFAULT_SECONDS = {"cpu": 2 * 3600.0, "mps": 8 * 3600.0, "cuda": 24 * 3600.0}
"""Time budget of a run when the user names none, by kind of device."""

_AROUND_SECONDS = 3.0  # starting, selecting and leaving
_RACE_SHARE = 0.2  # of all time may go into finding out what is trained
_SHORTEST = 1.0  # seconds of a training
_HURRIED = 1.5  # times as fast as measured before: then sizing was disturbed
_SEEN_SHARE = 0.5  # of the median image: a patch that sees less of it calls for a coarser spacing


def require_possible(options: Options, *, overrun: bool = False) -> None:
    """Raise `InputError` where the options alone say that there can be no run: before anything is read.

    With `overrun` a time that is too short is no reason.
    """
    if options.time_s is None:
        return
    if options.training.steps is not None:
        raise InputError("a run is limited by --time or by --steps, not by both", "leave one out")
    least = _AROUND_SECONDS + REPORT_SECONDS
    if options.time_s <= least and not overrun:
        raise InputError(
            f"{duration(options.time_s)} are too short: a run takes {duration(least)} beside its training",
            "give a --time of minutes, such as 20m; the smallest that works is told when the dataset was measured",
        )


def decide_run(project: Preparation, plan: Plan) -> Plan:
    """Return the plan with `run` decided, measured on this machine.

    Raises `InputError` if the budget is too small for anything or nothing fits into memory.
    """
    options = project.options
    require_possible(options, overrun=project.overrun)
    if options.time_s is None and options.training.steps is None:
        project.progress.note(f"no --time was given: this run is planned for {_budget(project) / 3600:g} h")
    return _Decision(project, plan).decide()


def _budget(project: Preparation) -> float:
    return project.options.time_s or DEFAULT_SECONDS[project.hardware.kind]


class _Decision:
    """One decision on a run, and what it is taken from."""

    def __init__(self, project: Preparation, plan: Plan) -> None:
        options = project.options
        self._project, self._plan, self._options = project, plan, options
        self._names = choose_configurations(list(plan.configurations), options)
        self._all_asked = options.planning.configurations is not None and len(self._names) > 1  # all are trained
        splits, asked = project.splits(), options.planning.folds
        num_folds = len(splits.folds)
        self._folds = folds_of(asked, num_folds)
        if CASCADE in self._names and (problem := cascade_problem(splits, self._folds)) is not None:
            if self._all_asked:
                raise problem
            self._names = tuple(name for name in self._names if name != CASCADE)
        self._every_fold = self._all_asked and CASCADE in self._names
        self._workload = Workload(
            num_folds=num_folds,
            validation_cases=max(len(fold.validation) for fold in splits.folds),
            test_cases=len(project.dataset.test),
            whole=self._every_fold,
        )
        asked_folds = 1 if asked is None and not self._every_fold else len(self._folds)
        self._shares = asked_folds * (len(self._names) if self._all_asked else 1)
        self._budget = _budget(project)
        self._device = resolve_device(options.device)
        self._earlier: Earlier | None = None  # run that this one goes on with
        self._sizer = Sizer(
            project.fingerprint(),
            project.dataset.labels,
            project.asked,
            self._device,
            self._workload,
            project.progress,
            budget=self._budget,
            shares=self._shares,
            processes=1 if project.team is None else project.team.ranks.size,
        )

    def decide(self) -> Plan:
        """Return the plan with its run."""
        project = self._project
        started = perf_counter()
        with project.stage_log.of("size"):
            preprocessing = self._preprocessing()
            entrants = taken_up(project)
            if entrants is None:
                entrants = self._repeated(preprocessing)
            if entrants is None:
                entrants = self._possible(self._entrants(preprocessing), preprocessing)
        sizing = perf_counter() - started
        outcome = None
        if entrants is not None:
            if self._earlier is None:
                outcome = self._raced(entrants, preprocessing, sizing)
                entrants = [entrants[0] if outcome is None else self._winner(entrants[outcome.winner], outcome)]
            with project.stage_log.of("preprocess"):
                for candidate in entrants:
                    project.preprocessed(candidate.configuration)
        ahead = 0.0 if entrants else self._preprocessing_seconds(preprocessing)
        chosen, folds = self._trainings(entrants, self._left() - ahead)
        chosen = self._accelerated(chosen, folds, self._left() - ahead)
        seconds, steps = self._lengths(chosen, folds, self._left() - ahead, raced=outcome is not None)
        tried = outcome is not None or self._earlier is not None
        chosen = [self._with_recipe(item, steps[item.name], tried=tried) for item in chosen]
        if self._options.training.steps is None and CASCADE in set(self._names) - set(steps):
            project.progress.note(
                f"{CASCADE} is left out: the time does not suffice for it, and for 3d_lowres on every fold before"
            )
        run = self._run(chosen, folds, seconds, steps, outcome, preprocessing, sizing, prepared=entrants is not None)
        return self._written(chosen, run)

    def _preprocessing(self) -> PreprocessingCost:
        project, configuration = self._project, self._plan.configurations[self._names[0]]
        try:
            return probe_preprocessing(
                project.dataset.training,
                project.fingerprint(),
                configuration.preprocessing,
                project.dataset.labels,
                project.store,
                execution=project.execution,
            )
        except StageError:
            project.preprocess()  # does the cases that can be done, and names all others
            raise

    def _left(self) -> float:
        """Return the seconds for preprocessing, trainings and predictions."""
        return self._budget - self._project.seconds() - report_seconds(self._project.fingerprint()) - _AROUND_SECONDS

    def _preprocessing_seconds(self, cost: PreprocessingCost, candidates: Sequence[Candidate] | None = None) -> float:
        """Return how long preprocessing takes: for all candidates, or for the first configuration of the plan."""
        planned = self._plan.configurations[self._names[0]]
        configurations = [planned] if candidates is None else [item.configuration for item in candidates]
        specs = [item.preprocessing for item in configurations]
        return forecast_preprocessing(cost, self._project.fingerprint(), specs).seconds

    def _raced(self, entrants: Sequence[Candidate], cost: PreprocessingCost, sizing: float) -> Outcome | None:
        """Let the entrants race within what sizing has left of the time for finding out what is trained."""
        allowed = _RACE_SHARE * self._budget / self._shares - sizing
        allowed -= self._preprocessing_seconds(cost, entrants[1:])  # that of one of them is needed anyway
        with self._project.stage_log.of("race"):
            return race(self._project, entrants, seconds=allowed)

    def _winner(self, candidate: Candidate, outcome: Outcome) -> Candidate:
        """Return the winner of a race with the time that its steps took there.

        Where that is far less than was measured before, the machine was busy then, and the patch may grow.
        """
        step = replace(candidate.step, seconds_per_step=outcome.seconds_per_step)
        raced = candidate.model_copy(update={"step": step})
        if _HURRIED * step.seconds_per_step > candidate.step.seconds_per_step:
            return raced
        planned = self._project.replanned(candidate.settings).configurations[candidate.name]
        whole = candidate.configuration.model_copy(update={"patch_size": planned.patch_size})
        with self._project.stage_log.of("size"):
            grown = self._sizer.grown(raced, whole, self._left() / self._shares)
        return grown if grown.configuration.network == whole.network else raced

    def _repeated(self, preprocessing: PreprocessingCost) -> list[Candidate] | None:
        """Return what an earlier run trained, measured, if this one goes on with it; None if it is decided anew.

        A network that gets enough steps in the time of this run is not gone on with: a larger one is worth it.
        """
        project, sizer, steps = self._project, self._sizer, self._options.training.steps
        found = earlier_run(project, time_s=None if steps is not None else self._budget, steps=steps)
        if found is None:
            if steps is None:
                require_extended(project, self._budget)
            return None
        plan, names = found.plan, found.run.configurations
        try:
            candidates = [sizer.measurer.measure(plan.configurations[name], plan.training[name]) for name in names]
        except MemoryShortageError:
            project.progress.note("the network of the earlier run no longer fits into memory")
            return None
        if found.step is not None and project.time_before is None:
            seconds = self._left() - self._preprocessing_seconds(preprocessing, candidates)
            seconds /= len(names) * len(found.run.folds)
            if sizer.enough(candidates[0], seconds * (1 - _RACE_SHARE)):
                project.progress.note("it is trained anew, not gone on with: so much time is worth a larger network")
                return None
        self._earlier = found
        project.progress.note(found.words)
        return [
            item.model_copy(update={"recipe": plan.training[item.name], "settings": found.run.settings})
            for item in candidates
        ]

    def _entrants(self, preprocessing: PreprocessingCost) -> list[Candidate] | None:
        """Return what is to be tried, the most promising first; None where the rules decide alone."""
        if self._options.training.steps is not None or self._options.preset != "auto" or self._all_asked:
            return None
        if self._project.start is not None:
            return None  # the model brings the network
        preprocess = self._preprocessing_seconds(preprocessing)
        seconds = (self._left() - preprocess) / self._shares * (1 - _RACE_SHARE)
        started = perf_counter()
        first = self._sized(self._names[0], seconds)
        took = perf_counter() - started
        if self._sizer.enough(first, seconds):
            return None
        found = [first]

        def time_for_another() -> bool:
            return self._project.overrun or self._sizer.leaves_enough(found, self._left() - preprocess, took)

        for name in self._names[1:]:
            if name not in ("3d_lowres", CASCADE) and time_for_another():
                found.append(self._sized(name, seconds))  # a coarser spacing of 3d_fullres stands for these two
        for candidate in tuple(found):
            asked = self._options.planning.of(candidate.name)
            coarse = self._sizer.sees(candidate) < _SEEN_SHARE and asked.target_spacing_mm is None
            if coarse and time_for_another():
                found += self._coarser(candidate.name, seconds)
        return sorted(found, key=lambda item: self._doubts(item, seconds))

    def _possible(self, entrants: list[Candidate] | None, cost: PreprocessingCost) -> list[Candidate] | None:
        """Return the entrants that can be trained in the time, or refuse: before any of it is spent on them."""
        if not entrants:
            return entrants
        seconds = (self._left() - self._preprocessing_seconds(cost)) / self._shares
        possible = [item for item in entrants if self._sizer.steps(item, seconds) >= FEWEST_STEPS]
        if not possible:
            possible = [max(entrants, key=lambda item: self._sizer.steps(item, seconds))]
            if not self._project.overrun:
                self._sizer.require(possible[0], seconds)
        return possible

    def _doubts(self, candidate: Candidate, seconds: float) -> int:
        """Return how much speaks against a candidate: few steps, and a patch that sees a small part of an image."""
        few = self._sizer.steps(candidate, seconds) < 0.8 * TOLERABLE_STEPS
        return few + (self._sizer.sees(candidate) < _SEEN_SHARE)

    def _sized(self, name: str, seconds: float, settings: tuple[str, ...] = ()) -> Candidate:
        """Return the best version of a configuration of the plan, made with further settings."""
        plan = self._project.replanned(settings) if settings else self._plan
        found = self._sizer.best(plan.configurations[name], plan.training[name], seconds)
        return found.model_copy(update={"settings": settings})

    def _coarser(self, name: str, seconds: float) -> list[Candidate]:
        """Return the version of a configuration whose patch sees the image, at a coarser spacing; [] if none does."""
        configuration, recipe = self._plan.configurations[name], self._plan.training[name]
        target = self._sizer.coarser(configuration, recipe, seconds, sampled_labels(self._project, configuration))
        if not target:
            return []
        spec = configuration.preprocessing
        by_axis = [0.0] * len(spec.transpose)
        slices = spec.image_ndim - len(target)
        typical = self._project.fingerprint().typical_spacing
        whole = (*(typical[axis] for axis in spec.transpose[:slices]), *target)
        for axis, value in zip(spec.transpose, whole, strict=True):
            by_axis[axis] = value
        setting = f"planning.{name}.target_spacing_mm={','.join(f'{value:.6g}' for value in by_axis)}"
        return [self._sized(name, seconds, (setting,))]

    def _trainings(self, entrants: Sequence[Candidate] | None, left: float) -> tuple[list[Candidate], tuple[int, ...]]:
        """Return the configurations and folds that are trained in the seconds that are left."""
        steps, asked = self._options.training.steps, self._options.planning.folds
        if entrants and self._earlier is not None:
            kept = [item for item in entrants if item.name != CASCADE or CASCADE in self._names]
            return kept, self._earlier.run.folds if steps is None and asked is None else self._folds
        if steps is not None:
            names = self._names if self._all_asked else self._names[:1]
            return [self._sizer.measurer.planned(*self._planned(name)) for name in names], self._folds
        if entrants:
            chosen = list(entrants)
        else:
            every = self._all_asked
            chosen = [self._best(self._names[0], left / self._shares)]
            enough = ENOUGH_STEPS * self._workload.num_folds * chosen[0].step.seconds_per_step
            if every or left > enough:
                seconds = left / self._shares if every else left
                chosen += [self._sizer.best(*self._planned(name), seconds) for name in self._names[1:]]
            for candidate in chosen:
                if not self._project.overrun:
                    self._sizer.require(candidate, left / self._shares)
        count, folds = choose_trainings(
            left,
            [item.step.seconds_per_step * SLACK for item in chosen],
            self._workload.num_folds,
            folds=None if self._options.planning.folds is None and not self._every_fold else len(self._folds),
        )
        if self._all_asked:
            return chosen, self._folds[:folds]
        chosen = chosen[:count]
        if any(self._sizer.validation(item).cases is not None for item in chosen):  # it sees all cases of 3d_lowres
            chosen = [item for item in chosen if item.name != CASCADE]
        return chosen, self._folds[:folds]

    def _best(self, name: str, seconds: float) -> Candidate:
        """Return the version of a configuration that is trained for so long: one with a network that came is kept."""
        given = self._project.start is not None
        return (
            self._sizer.measurer.planned(*self._planned(name))
            if given
            else self._sizer.best(*self._planned(name), seconds)
        )

    def _planned(self, name: str) -> tuple[Configuration, TrainingSpec]:
        return self._plan.configurations[name], self._plan.training[name]

    def _accelerated(self, chosen: Sequence[Candidate], folds: Sequence[int], left: float) -> list[Candidate]:
        """Return the candidates with what makes their steps faster on this device in trainings of their length."""
        team = self._project.team
        if self._device.type != "cuda" or (team is not None and team.ranks.size > 1):
            # Several processes have none of it. On a CPU compiling takes minutes and gains nothing
            # (docs/decisions/acceleration.md).
            return list(chosen)
        steps, share = self._options.training.steps, left / (len(folds) * len(chosen))
        lengths = [share if steps is None else steps * item.step.seconds_per_step for item in chosen]
        with self._project.stage_log.of("size"):
            return [self._sizer.measurer.accelerated(*pair) for pair in zip(chosen, lengths, strict=True)]

    def _lengths(
        self, chosen: Sequence[Candidate], folds: tuple[int, ...], left: float, *, raced: bool
    ) -> tuple[float | None, dict[str, int]]:
        """Return the seconds of each training (None: by steps) and the steps that are expected, by configuration."""
        asked = self._options.training.steps
        if asked is not None:
            return None, dict.fromkeys((item.name for item in chosen), asked)
        predicting = len(folds) * sum(self._sizer.validation(item).seconds for item in chosen)
        predicting += sum(item.testing(len(folds), self._workload) for item in chosen)
        seconds = (left - predicting) / (len(folds) * len(chosen))
        before = self._earlier
        done = before is not None and before.step is None and set(folds) <= set(before.run.folds)
        if before is not None:
            wanted = before.seconds(self._budget)
            seconds = wanted if done else min(seconds + before.trained_seconds, wanted)
        # What a step took in a slow minute makes no training longer: one that is out of time does its fewest steps.
        seconds = seconds if done else round(max(_SHORTEST, seconds), 1)
        slack = 1.0 if raced else SLACK  # a race measures what training takes
        possible = {item.name: int(seconds / item.step.seconds_per_step / slack) for item in chosen}
        return seconds, {name: max(FEWEST_STEPS, steps) for name, steps in possible.items()}

    def _with_recipe(self, item: Candidate, steps: int, *, tried: bool) -> Candidate:
        """Return a candidate with the recipe for so many steps: what was `tried` already keeps the short one."""
        if self._earlier is not None:
            return item
        recipe = short_recipe(item.recipe, self._options)
        if not tried and (self._options.preset != "auto" or steps >= LONG_STEPS):
            kept = ("precision", "channels_last", "augmentation")
            planned = self._plan.training[item.name]
            recipe = planned.model_copy(update={key: getattr(recipe, key) for key in kept})
        if self._project.start is not None:
            recipe = fine_tuning_recipe(recipe, self._options)
        return item.model_copy(update={"recipe": recipe})

    def _run(
        self,
        chosen: Sequence[Candidate],
        folds: tuple[int, ...],
        seconds: float | None,
        steps: dict[str, int],
        outcome: Outcome | None,
        preprocessing: PreprocessingCost,
        sizing: float,
        *,
        prepared: bool,
    ) -> RunSpec:
        """Return the run, with a forecast of all its stages."""
        options, sizer, fingerprint = self._options, self._sizer, self._project.fingerprint()
        before = self._earlier
        validations = [sizer.validation(item) for item in chosen]
        done = 0.0 if before is None else before.trained_seconds
        lengths = {}
        for item in chosen:
            step = item.step.seconds_per_step
            length = steps[item.name] * step * SLACK if seconds is None else max(seconds, FEWEST_STEPS * step)
            lengths[item.name] = length - done
        on_cpu = self._device.type == "cpu"
        forecast = {
            "size": StageForecast(
                seconds=round(sizing, 1),
                **{"memory_gb" if on_cpu else "device_memory_gb": round(sizer.measurer.peak_gb, 3)},
            ),
            **({} if outcome is None else {"race": StageForecast(seconds=round(outcome.seconds, 1))}),
            "preprocess": forecast_preprocessing(
                preprocessing, fingerprint, [item.configuration.preprocessing for item in chosen]
            ),
            **forecast_stages(
                chosen, validations, lengths, steps, len(folds), self._workload, fingerprint, on_cpu=on_cpu
            ),
        }
        if prepared:
            forecast["preprocess"] = forecast["preprocess"].model_copy(update={"seconds": 0.0})
        return RunSpec(
            configurations=tuple(item.name for item in chosen),
            folds=folds,
            steps=options.training.steps,
            seconds_per_training=seconds,
            expected_steps=steps,
            seconds_per_step={item.name: round(item.step.seconds_per_step, 4) for item in chosen},
            peak_memory_gb={item.name: round(item.step.peak_memory_gb, 3) for item in chosen},
            acceleration={item.name: item.acceleration for item in chosen if item.acceleration != Acceleration()},
            forecast=forecast,
            race=outcome.entries if outcome else before.run.race if before else (),
            start=outcome.start if outcome else before.run.start if before else None,
            start_identity=outcome.identity if outcome else before.run.start_identity if before else None,
            start_fold=self._project.first_fold if outcome else before.run.start_fold if before else None,
            extends=None if before is None else before.told,
            time_s=None if options.training.steps is not None else self._budget,
            course=self._project.course(),
            settings=tuple(dict.fromkeys(setting for item in chosen for setting in item.settings)),
            initial=taken_from_model(self._project, chosen[0].configuration.network),
            validation_cases=min((item.cases for item in validations if item.cases is not None), default=None),
            validation_mirror=all(item.mirror for item in validations),
        )

    def _written(self, chosen: Sequence[Candidate], run: RunSpec) -> Plan:
        """Return the plan with the run and what was sized for it."""
        options = self._options
        plan = self._project.replanned(run.settings) if run.settings else self._plan
        asked = {"time_s": options.time_s, "steps": options.training.steps, "folds": options.planning.folds}
        return with_run(
            plan,
            {item.name: (item.configuration, item.recipe) for item in chosen},
            run,
            asked={key: value for key, value in asked.items() if value is not None},
            memory_gb={item.name: item.memory_gb for item in chosen},
            heads=self._project.dataset.labels.num_declared,
            coarser=[item.name for item in chosen if item.settings],
        )
