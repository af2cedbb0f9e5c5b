"""The race: candidates are trained for a short while, and what learns fastest on this dataset and machine goes on.

Successive halving (Jamieson and Talwalkar, 2016). All candidates train at a constant rate for the same time and predict
the same few whole cases; the worse half stops, the others go on. These cases are kept out of the race's trainings and
come back for the training of the winner, which goes on from where the race left it and alone cools down. A single
candidate begins its training here, so that what a step takes is known from steps that count.

    plans/<key>/race/race.json    who takes part, for how long, which cases: written before it begins
                     <n>-<name>/round-<r>/   a training, its state, its predictions
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from segfit.dataset.splits import balanced_splits, covering
from segfit.device import resolve_device
from segfit.errors import DivergedError, MemoryShortageError, StageError, warning
from segfit.evaluation.summary import Summary
from segfit.files import Document, content_hash
from segfit.planning.plan import Plan, RaceEntry, candidate_words
from segfit.project.candidate import SLACK, Candidate
from segfit.project.preparation import Preparation
from segfit.project.stages import STAGES
from segfit.project.validation import validate_fold
from segfit.records import Key
from segfit.text import duration
from segfit.training.budget import TimeBudget
from segfit.training.job import TrainingJob
from segfit.training.loop import train_fold
from segfit.training.result import RESULT, WEIGHTS, TrainingResult

__all__ = ["Outcome", "exclude", "race", "remove_losers", "taken_up"]

_LOSERS_ROUNDS = {2: 1, 3: 3, 4: 4}
"""Rounds that losers train, by number of candidates: one of two, or two after one round and the other after two."""
_SHORTEST_SECONDS = 10.0  # of a round; shorter ones tell nothing
_FEWEST_ROUND_STEPS = 30
_MOST_ROUND_STEPS = 400  # of the slowest candidate; then it is known
_ALONE_SHARE = 0.3  # of the time for a race, for a candidate without others
_CASES = (2, 8)  # at least, at most
_PREDICTING_SHARE = 0.3  # of the time for losers may go into predicting
_EVEN = 0.01  # of Dice is no difference: the candidate named first is taken
_AVERAGE = 0.9  # decay of the averaged weights that predict, since nothing cools down in a race


class RaceFile(Document):
    """``race.json``: what a race was decided to be."""

    candidates: tuple[Candidate, ...]
    seconds: float  # of a round
    cases: tuple[str, ...]  # that are predicted
    diverged: tuple[int, ...] = ()  # candidates that won and then could not be trained to the end


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a race ended."""

    winner: int
    entries: tuple[RaceEntry, ...]
    start: str  # folder of the winner's last training, in that of the project
    identity: str  # of that training
    seconds: float  # that the losers and all predictions took
    seconds_per_step: float  # of the winner


def taken_up(project: Preparation) -> list[Candidate] | None:
    """Return the candidates of a race that was begun for the plan."""
    known = _known(project)
    return None if known is None else list(known.candidates)


def race(project: Preparation, candidates: Sequence[Candidate], *, seconds: float) -> Outcome | None:
    """Let candidates race, the losers and all predictions within `seconds`; go on with a race that was begun.

    Returns None if there is no time for a race: the first candidate is the most promising one.
    """
    folder = project.plan_folder.race
    file = _known(project)
    if file is None:
        file = _begun(project, candidates, seconds)
        if file is None:
            return None
        _keep(project, file)
    runners = [_Runner(project, file, number, folder) for number in range(len(file.candidates))]
    winner = _second(runners, file.diverged) if file.diverged else _first(runners)
    entries: tuple[RaceEntry, ...] = ()
    if len(runners) > 1:
        entries = tuple(
            runner.entry(winner=runner is winner, diverged=number in file.diverged)
            for number, runner in enumerate(runners)
        )
        project.progress.note(_told(entries))
    spent = sum(runner.predicting + (0 if runner is winner else runner.training) for runner in runners)
    start = winner.last.relative_to(project.folder.root).as_posix()
    return Outcome(runners.index(winner), entries, start, winner.identity, spent, winner.seconds_per_step)


def exclude(project: Preparation, plan: Plan) -> bool:
    """Take the winner, which cannot be trained, out of the race of a plan; return whether another candidate is left."""
    file = _known(project)
    if file is None or plan.run is None or not plan.run.race:
        return False
    winner = next(number for number, entry in enumerate(plan.run.race) if entry.winner)
    file = file.model_copy(update={"diverged": tuple(sorted({*file.diverged, winner}))})
    _keep(project, file)
    return any(entry.mean is not None for n, entry in enumerate(plan.run.race) if n not in file.diverged)


def remove_losers(project: Preparation, plan: Plan) -> None:
    """Remove what the candidates left that are not trained: nothing goes on from there any more."""
    if plan.run is None or plan.run.start is None:
        return
    for folder in project.plan_folder.race.glob("*/"):
        if not (project.folder.root / plan.run.start).is_relative_to(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _known(project: Preparation) -> RaceFile | None:
    return project.results.recall(RaceFile, project.plan_folder.race / "race.json", _key(project))


def _keep(project: Preparation, file: RaceFile) -> None:
    project.results.store(file, project.plan_folder.race / "race.json", _key(project))


def _key(project: Preparation) -> Key:
    return STAGES["race"].key(project.options, plan=project.plan_folder.root.name)


def _first(runners: Sequence[_Runner]) -> _Runner:
    """Let all of them run, half of them again, and so on; return the winner."""
    running, round_ = list(runners), 0
    while len(running) > 1 or round_ == 0:
        for runner in running:
            runner.run(round_)
        ranked = sorted((runner for runner in running if runner.error is None), key=lambda runner: -runner.dice)
        if not ranked:
            return _best(runners)
        even = [runner for runner in running if runner in ranked and ranked[0].dice - runner.dice < _EVEN]
        ranked = [*even, *(runner for runner in ranked if runner not in even)]
        running = sorted(ranked[: (len(running) + 1) // 2] if len(running) > 2 else ranked[:1], key=running.index)
        round_ += 1
    return running[0]


def _second(runners: Sequence[_Runner], diverged: Collection[int]) -> _Runner:
    """Return the best of those that have not diverged, by the last round that each has done."""
    for runner in runners:
        while runner.error is None and runner.has_done(runner.rounds):
            runner.run(runner.rounds)
    return _best([runner for number, runner in enumerate(runners) if number not in diverged])


def _best(runners: Sequence[_Runner]) -> _Runner:
    """Return the best of those that can be trained, by the last round of each; raise an error if none can."""
    left = [runner for runner in runners if runner.error is None and runner.rounds]
    if not left:
        raise next((runner.error for runner in runners if runner.error), StageError("no candidate could be trained"))
    return max(left, key=lambda runner: (runner.rounds, runner.dice))


def _begun(project: Preparation, candidates: Sequence[Candidate], seconds: float) -> RaceFile | None:
    """Return what a race within so many seconds is to be: fewer candidates where they would be seen too shortly."""
    kept = list(candidates[: max(_LOSERS_ROUNDS)])
    while len(kept) > 1:
        slowest = max(item.step.seconds_per_step for item in kept) * SLACK
        predicting = sum(item.case_seconds for item in kept) * (2 if len(kept) > 2 else 1)
        cases = int(min(_CASES[1], max(_CASES[0], _PREDICTING_SHARE * seconds / predicting)))
        round_ = min((seconds - cases * predicting) / _LOSERS_ROUNDS[len(kept)], _MOST_ROUND_STEPS * slowest)
        if round_ >= max(_SHORTEST_SECONDS, _FEWEST_ROUND_STEPS * slowest):
            return RaceFile(candidates=tuple(kept), seconds=round(round_, 1), cases=_held_out(project, cases))
        kept.pop()
    step = kept[0].step.seconds_per_step * SLACK
    alone = min(max(_ALONE_SHARE * seconds, _FEWEST_ROUND_STEPS * step), _MOST_ROUND_STEPS * step)
    if not _SHORTEST_SECONDS <= alone <= seconds:
        return None
    return RaceFile(candidates=tuple(kept), seconds=round(alone, 1), cases=())


def _held_out(project: Preparation, count: int) -> tuple[str, ...]:
    """Return training cases of the first fold that the race predicts: whole groups are not trained on."""
    train = project.dataset.cases(project.splits().folds[project.first_fold].train)
    present = project.fingerprint().values_by_case
    return covering(balanced_splits(train, present).folds[0].validation, present, count)


class _Runner:
    """One candidate in the race."""

    def __init__(self, project: Preparation, file: RaceFile, number: int, folder: Path) -> None:
        self._project, self._file = project, file
        self.candidate = file.candidates[number]
        self.folder = folder / f"{number}-{self.candidate.name}"
        self.training = self.predicting = 0.0
        self.dice = 0.0  # of the last round; below 0 where it could not be trained
        self.error: StageError | None = None
        self.last = self.folder
        self.rounds = 0
        self._result: TrainingResult | None = None
        self._summary: Summary | None = None
        self._keys: dict[str, str] | None = None

    def run(self, round_: int) -> None:
        """Train for a round and predict."""
        started = perf_counter()
        try:
            self._result = self._train(round_)
            self.training += self._result.seconds
            if self._file.cases:
                self._summary = self._predict()
                self.dice = self._summary.mean_dice or 0.0
            self.rounds = round_ + 1
        except (DivergedError, MemoryShortageError) as error:
            problem = f"{self.candidate.words} is out of the race: {error}"
            self._project.progress.warn(warning("candidate_failed", problem))
            self.dice, self.error = -1.0, error
        trained = self._result.seconds if self._result else 0.0  # in an earlier process, if the race was taken up
        self.predicting += max(0.0, perf_counter() - started - trained)

    def has_done(self, round_: int) -> bool:
        """Whether it trained in that round, in an earlier process."""
        return (self.folder / f"round-{round_}" / RESULT).exists()

    def _train(self, round_: int) -> TrainingResult:
        project, candidate = self._project, self.candidate
        split = project.splits().folds[project.first_fold]
        names = [name for name in split.train if name not in self._file.cases]
        keys = self._stored()
        before = self.last if round_ else None
        self.last = self.folder / f"round-{round_}"
        recipe = candidate.recipe.model_copy(
            update={"schedule": "poly", "poly_exponent": 0.0, "validation_share": 0.0, "weight_average": _AVERAGE}
        )
        job = TrainingJob(
            configuration=candidate.configuration,
            recipe=recipe,
            labels=project.dataset.labels,
            cases_train=names,
            cases_validation=(),
            seed=project.options.seed,
            budget=TimeBudget(self._file.seconds, None),
            weights=project.dataset.weights(names),
            data=content_hash({name: keys[name] for name in names}),
            start=before,
        )
        return train_fold(
            job,
            [project.stored(keys[name]) for name in names],
            (),
            self.last,
            resolve_device(project.options.device),
            checkpoint_seconds=project.options.training.checkpoint_seconds,
            title=f"trying {candidate.words}",
            keep_state=True,
            progress=project.progress,
            team=project.team,
        )

    def _predict(self) -> Summary:
        project, candidate, keys = self._project, self.candidate, self._stored()
        assert self._result is not None
        return validate_fold(
            candidate.configuration,
            candidate.recipe,
            project.dataset,
            [project.stored(keys[name]) for name in self._file.cases],
            self.last / WEIGHTS,
            self.last / f"predicted-{self._result.weights[:16]}",
            device=resolve_device(project.options.device),
            mirror=False,
            tile_step=project.options.inference.tile_step,
            probabilities=False,
            title=f"looking at {candidate.name}",
            execution=project.execution,
        )

    @property
    def identity(self) -> str:
        """What names its last training."""
        assert self._result is not None
        return self._result.identity

    @property
    def seconds_per_step(self) -> float:
        """What a step took in its last round."""
        assert self._result is not None
        return self._result.seconds_per_step

    def _stored(self) -> dict[str, str]:
        """Return the keys of the first fold's training cases, preprocessed for this candidate."""
        if self._keys is None:
            project = self._project
            cases = project.dataset.cases(project.splits().folds[project.first_fold].train)
            self._keys = project.preprocessed(self.candidate.configuration, cases)
        return self._keys

    def entry(self, *, winner: bool, diverged: bool) -> RaceEntry:
        """Return what it reached."""
        configuration, summary = self.candidate.configuration, self._summary
        return RaceEntry(
            configuration=configuration.name,
            spacing_mm=configuration.spacing_mm,
            patch_size=configuration.patch_size,
            features=configuration.network.features[0],
            batch_size=configuration.batch_size,
            steps=self._result.steps if self._result else 0,
            seconds=round(self.training, 1),
            dice={} if summary is None else {name: one.dice for name, one in summary.mean.items()},
            mean=None if summary is None else summary.mean_dice,
            winner=winner,
            unit=self.candidate.unit,
            diverged=diverged,
        )


def _told(entries: Sequence[RaceEntry]) -> str:
    """Say how a race ended."""
    reached = [
        f"{candidate_words(entry)} reached Dice {entry.mean or 0:.2f} in {duration(entry.seconds)} "
        f"({entry.steps} steps)" + (" and diverged later" if entry.diverged else "")
        for entry in entries
    ]
    winner = next(entry for entry in entries if entry.winner)
    return f"{', '.join(reached)}: {candidate_words(winner)} is trained"
