"""Training one model on one fold: a loop over steps within a budget, which can be interrupted at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from segfit.errors import DivergedError, StageError, StoppedError, warning
from segfit.execution.processors import available_workers
from segfit.files import hash_file, remove_leftovers
from segfit.networks.unet import build_network
from segfit.progress import SILENT, Progress, Task
from segfit.records import store
from segfit.training.budget import Clock
from segfit.training.checkpoint import Checkpoints, State, write_tensors
from segfit.training.device_cases import DeviceCases
from segfit.training.divergence import Guard
from segfit.training.events import EventLog
from segfit.training.interruption import Interruption
from segfit.training.job import TrainingJob
from segfit.training.learner import training_on
from segfit.training.loss_history import LossHistory, StepFacts
from segfit.training.online_validation import CaseValidation
from segfit.training.pace import Pace
from segfit.training.probe import PeakMemory
from segfit.training.result import (
    BEFORE_COOLDOWN,
    EVENTS,
    RESULT,
    STATE,
    WEIGHTS,
    TrainingResult,
    finished_result,
    remove_foreign_result,
    result_key,
)
from segfit.training.sampler import Batches, TrainingCase
from segfit.training.schedule import cooldown_start, learning_rate
from segfit.training.shortage import learn
from segfit.training.starting_state import state_to_start_from
from segfit.training.team import Step, Team, batches_of, learner_of, sampler_of
from segfit.training.threads import ThreadChoice, kept_threads, thread_numbers
from segfit.training.trackers import Trackers

__all__ = ["train_fold"]

_PLANNED_AT = 0.05  # share of a time budget after which the time of a step is known well enough
_MOST_SKIPPED_CASES = 20  # in the result


def train_fold(
    job: TrainingJob,
    train: Sequence[TrainingCase],
    validation: Sequence[TrainingCase],
    folder: Path,
    device: torch.device,
    *,
    expected_seconds_per_step: float | None = None,
    checkpoint_seconds: float = 60.0,
    title: str = "",
    trackers: Sequence[str] = (),
    keep_state: bool = False,
    progress: Progress = SILENT,
    team: Team | None = None,
) -> TrainingResult:
    """Train one model, or go on with its training, or return the result of a finished one.

    Parameters
    ----------
    train, validation : the cases of the job
    folder : of the training; what other jobs left there is not used, the training starts afresh
    expected_seconds_per_step : when steps take much longer than that, a note says what it costs
    checkpoint_seconds : time between two saved states
    title : what the progress calls it
    trackers : that follow its events, see `segfit.training.trackers`
    keep_state : leave the last state beside the weights, for another training to start from
    team : of processes that train with this one, which need the cases where this one has them; None: it is alone

    A training whose learning rate falls in a part of its budget only leaves the state from before that: given more
    seconds it goes on from there, and what it had reached counts until it is done. One that diverges goes back to its
    last good state, with a quarter of the learning rate, and warns of it; the second time it raises `DivergedError`.

    Ctrl-C and SIGTERM (when called from the main thread) let the running step end, save the state and raise
    `KeyboardInterrupt` or `SystemExit`; a progress that raises `StoppedError` has the state saved too. Raises
    `InputError` where there is nothing to train on, `StageError` when the model does not fit into the device's memory
    or a file cannot be written.
    """
    job.require_cases()
    assert [case.id for case in (*train, *validation)] == [*job.cases_train, *job.cases_validation]
    identity, configuration = job.identity, job.configuration
    finished = finished_result(folder, identity, job.budget)
    if finished is not None:
        return finished
    remove_foreign_result(folder, identity)
    remove_leftovers(folder)
    team = team or Team()
    try:
        with training_on(configuration, job.recipe, device), kept_threads():
            training = _Training(
                job, identity, train, validation, folder, device, expected_seconds_per_step, progress, team
            )
            training.run(title or f"training {configuration.name}", checkpoint_seconds, trackers)
            return training.finish(keep_state=keep_state)
    except OSError as error:  # a full disk and the like
        raise StageError(
            f"the training in {folder} failed ({error.strerror or error})",
            "fix it and rerun to resume from the last saved state",
        ) from error


@dataclass(eq=False)
class _Training:
    """The state of one training and the loop over it."""

    job: TrainingJob
    identity: str
    train: Sequence[TrainingCase]
    validation: Sequence[TrainingCase]
    folder: Path
    device: torch.device
    expected_seconds: float | None
    progress: Progress
    team: Team

    def __post_init__(self) -> None:
        job, device = self.job, self.device
        configuration, recipe, labels = job.configuration, job.recipe, job.labels
        self._memory = PeakMemory(device)
        self._learner = learner_of(job, device, self.team.ranks)
        self._checkpoints = Checkpoints(self.folder / STATE, self.identity)
        self._before_cooldown = Checkpoints(self.folder / BEFORE_COOLDOWN, self.identity)
        self._cools_from = cooldown_start(recipe.falling, recipe.warmup_share, recipe.cooldown_share)
        self._cooling = False  # whether the cool-down has begun
        self._is_longer = False  # whether it goes on with another budget than it began with
        self._begun_with: dict[str, Tensor] | None = None  # weights of a model, until it is known what they reach
        self._sampler = sampler_of(job, self.train, self.team.ranks)
        self._validation = CaseValidation(self._learner, configuration, recipe, labels, self.validation)
        self._on_device = DeviceCases(self.train, self._sampler, device, spared=self._validation.most_bytes())
        self._events: EventLog  # opened when it is known where to go on
        self._losses = LossHistory()
        self._guard = Guard(recipe)
        self._clock = Clock()
        threads = min(torch.get_num_threads(), available_workers())
        # What has counted steps is repeated to the bit.
        clocked = device.type == "cpu" and self.job.budget.seconds is not None
        self._threads = ThreadChoice(thread_numbers(threads) if clocked else (torch.get_num_threads(),))
        self._step = self._first_step = 0  # those of the training that this one started from count
        self._pace = Pace(self.job.budget, self.expected_seconds)
        self._reported = 0.0  # share of the budget reported as progress
        self._checkpoint_safe = True  # False while a step changes the weights

    def run(self, title: str, checkpoint_seconds: float, trackers: Sequence[str] = ()) -> None:
        """Train to the end of the budget."""
        self._resume()
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self._step if self._done else 0
        with (
            Trackers(trackers, self.folder, title, known, self.progress) as followers,
            EventLog(
                self.folder / EVENTS, step=known, share=self._share_at if self._is_longer else None, follower=followers
            ) as self._events,
            self.progress.task(title, self.job.budget.total) as task,
            batches_of(self._sampler, self._learner, start=self._step) as batches,
            Interruption() as interruption,
            self._memory,
            self.team.training(self.job, self.train, self.device),
        ):
            self.team.go_on_from(self._state())
            self._clock.start()
            self._learner.gradients.accelerate(self.job.acceleration, self.progress.warn)
            self._guard.keep(self._share(), self._losses, self._state)
            saved = perf_counter()
            self._report(task)
            try:
                while not self._is_done(batches):
                    self._advance(batches)
                    self._report(task)
                    interruption.raise_if_asked()
                    if perf_counter() - saved > checkpoint_seconds and self._guard.is_healthy(self._losses):
                        self._save()
                        saved = perf_counter()
            except (KeyboardInterrupt, SystemExit, StoppedError):
                # What others were to add to the last step may be missing.
                if self._checkpoint_safe and not self.team.is_parted and self._guard.is_healthy(self._losses):
                    self._save()
                raise
            self._plan(at_end=True)
            self._note(self._pace.early_end(self._done, self._clock.seconds()))
            if self._validation.is_missing_at_end(self._step):
                self._validate()
            self._report(task)

    @property
    def _done(self) -> int:
        """Steps of this training."""
        return self._step - self._first_step

    def _share(self) -> float:
        return self.job.budget.share(self._done, self._clock.seconds())

    def _share_at(self, step: int, seconds: float) -> float:
        """Return which share of the present budget was used then, as it is written down."""
        return round(self.job.budget.share(step - self._first_step, seconds), 6)

    def _is_done(self, batches: Batches) -> bool:
        """Whether the budget is used, or the next step (and the last validation) would exceed it.

        A training that has diverged goes back first, so it ends in a good state.
        """
        seconds = self._pace.step_seconds
        ahead = seconds + self._validation.seconds if seconds else 0.0
        over = self.job.budget.is_over(self._done, self._clock.seconds(), ahead)
        if over:
            self._losses.settle(self._events)
        trouble = self._guard.trouble(self._losses, at_end=over)
        if not trouble:
            return over
        self._go_back(trouble, batches)
        return self._is_done(batches)

    def _advance(self, batches: Batches) -> None:
        """Do one step, and the validation that is due after it."""
        share = self._share()
        if self._cools_from is not None and share >= self._cools_from and not self._cooling:
            self._begin_cooldown()
        started = perf_counter()
        recipe = self.job.recipe
        rate = self._guard.factor * learning_rate(
            share, recipe.learning_rate, recipe.falling, recipe.warmup_share, recipe.cooldown_share
        )
        stall = self._learner.beside.stall()
        batch = next(batches)
        stall.end(read=True)
        torch.set_num_threads(self._threads.number)
        with self.team.step(Step(self._step, rate, self._threads.number)):
            self._checkpoint_safe = False
            values = learn(self._learner, batch, rate, self.job.seed, self._on_device, self._events, self.progress)
        self._step += 1
        self._checkpoint_safe = True
        facts = StepFacts(self._step, self._clock.seconds(), share, rate, batch.cases, stall.seconds)
        self._losses.push(facts, values, self._events)
        self._pace.add(perf_counter() - started)
        self._threads.add(perf_counter() - started)
        self._on_device.after_step(batches)
        self._plan()
        self._note(self._pace.overrun(self._done, self._clock.seconds()))
        if self._validation.is_due(self._share()):
            self._losses.settle(self._events)
            self._validate()
        self._guard.keep(self._share(), self._losses, self._state)

    def _report(self, task: Task) -> None:
        used = self.job.budget.used(self._done, self._clock.seconds())
        facts = []
        if self._losses.last is not None:
            facts.append(f"loss {self._losses.last:.3f}")
        if self._validation.curve and self._validation.curve[-1].mean is not None:
            facts.append(f"Dice {self._validation.curve[-1].mean:.2f}")
        task.advance(used - self._reported, ", ".join(facts))
        self._reported = used

    def _plan(self, *, at_end: bool = False) -> None:
        """Have the validations planned once the time of a step is known; report if it is much longer than expected."""
        seconds = self._pace.step_seconds
        if self._validation.schedule is None and seconds and (at_end or self._share() >= _PLANNED_AT):
            self._validation.plan(seconds, self.job.budget.expected_steps(seconds) * seconds)
            self._note(self._pace.slowness())
            self._validate_before()

    def _validate_before(self) -> None:
        """Score the model that the training started from, on the cases of the validations, once these are known."""
        if self.job.initial is None:
            return
        weights, self._begun_with = self._begun_with, None
        if weights is None:  # it was interrupted meanwhile
            recipe, spec, seed = self.job.recipe, self.job.configuration.network, self.job.seed
            generator = torch.Generator().manual_seed(seed)
            network = build_network(spec, deep_supervision=recipe.deep_supervision, generator=generator)
            weights = network.state_dict() | dict(self.job.initial.for_network(network, self.job.labels).tensors)
        point = self._validation.measure_before(weights, round(self._clock.seconds(), 3))
        if point is not None:
            self._events.write("before", step=self._step, share=0.0, dice=point.dice, mean=point.mean)

    def _note(self, message: str) -> None:
        if message:
            self.progress.note(message)

    def _validate(self) -> None:
        point = self._validation.measure(
            step=self._step, seconds=round(self._clock.seconds(), 3), share=round(self._share(), 6)
        )
        self._events.write("validation", **point.model_dump(mode="json"))

    def _state(self) -> State:
        self._losses.settle(self._events)
        facts: dict[str, Any] = {
            "learner": self._learner.facts(),
            "seconds": self._clock.seconds(),
            "first_step": self._first_step,
            "budget": self.job.budget.total,
            "cooling": self._cooling,
            **self._losses.facts(),
            **self._validation.facts(),
            **self._guard.facts(),
        }
        return State(self._step, self._learner.tensors(), facts)

    def _save(self) -> None:
        self._checkpoints.save(self._state())

    def _begin_cooldown(self) -> None:
        """Keep the state before the first step of the cool-down, unless it is going bad.

        It is whole before any state of the cool-down is saved: what goes on from one of those has it.
        """
        state = self._state()
        if self._guard.is_healthy(self._losses):
            self._before_cooldown.replace(state)
        self._cooling = True

    def _restore(self, state: State) -> None:
        self._learner.restore(state.tensors, state.facts["learner"])
        self._step, self._first_step = state.step, state.facts["first_step"]
        self._cooling = state.facts.get("cooling", True)  # saved by an earlier version: what was before is not known
        self._losses = LossHistory()
        self._losses.restore(state.facts)
        self._validation.restore(state.facts)

    def _go_back(self, trouble: str, batches: Batches) -> None:
        """Go on from the last good state with a lower learning rate, and let an interruption do the same."""
        diverged_at = self._step
        good = self._guard.go_back(trouble, self._losses)
        self._restore(good)
        self.team.go_on_from(good)
        batches.go_back(self._step)
        self._events.go_back(self._step)
        self._events.write(
            "diverged", step=self._step, at=diverged_at, why=trouble, learning_rate_factor=self._guard.factor
        )
        rate = self.job.recipe.learning_rate * self._guard.factor
        resumed = f"it resumes from step {self._step} with learning rate {rate:.2g}"
        self.progress.warn(warning("diverged", f"the training diverged: {trouble}; {resumed}"))
        self._checkpoints.replace(self._state())  # those of later steps have the old rate
        if not self._cooling:
            self._before_cooldown.delete()  # it comes again, with the new rate

    def _resume(self) -> None:
        """Go on from the last saved state, if there is one of this training.

        A cool-down that began too early for the time that there is now is not gone on with, but what was kept from
        before it. That goes if it is of a later step than the one to go on from.
        """
        state, damaged = self._checkpoints.load()
        for item in damaged:
            self.progress.warn(item)
        kept, _ = self._before_cooldown.load()
        if kept is not None and (state is None or self._cooled_early(state)):
            state = kept
        if state is None:
            self._take_over()
            return
        self._restore(state)
        if kept is not None and kept.step > state.step:
            self._before_cooldown.delete()
        self._guard.restore(state.facts)
        self._clock = Clock(state.facts["seconds"])
        self._is_longer = state.facts.get("budget", self.job.budget.total) != self.job.budget.total
        if self._is_longer:
            self._validation.rescale(self._share_at)
        self.progress.note(f"resuming from step {self._step}")

    def _cooled_early(self, state: State) -> bool:
        """Whether a state is of a cool-down that would not have begun yet in the time that there is."""
        done = state.step - state.facts["first_step"]
        share = self.job.budget.share(done, state.facts["seconds"])
        return bool(state.facts.get("cooling", True)) and self._cools_from is not None and share < self._cools_from

    def _take_over(self) -> None:
        """Start from another training or a model, if this one is to.

        From before the cool-down of a training, or from its end if it had none.
        """
        if self.job.initial is not None:
            taken = self.job.initial.for_network(self._learner.network, self.job.labels)
            self._learner.take_over(taken.tensors)
            self._begun_with = self._learner.weights()
        if self.job.start is None:
            return
        state = state_to_start_from(self.job.start)
        self._learner.restore(state.tensors, state.facts["learner"])
        self._guard.factor = state.facts["learning_rate_factor"]
        self._step = self._first_step = state.step

    def finish(self, *, keep_state: bool) -> TrainingResult:
        """Write weights and result, and remove the states or leave the last one."""
        self._learner.gradients.accelerate(None)
        weights = self._learner.weights()
        if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise DivergedError(f"the weights of {self.job.configuration.name} are not finite", "nothing was written")
        if keep_state:
            self._save()
        write_tensors(self.folder / WEIGHTS, weights, {"identity": self.identity})
        result = TrainingResult(
            identity=self.identity,
            configuration=self.job.configuration.name,
            device=str(self.device),
            steps=self._step,
            first_step=self._first_step,
            seconds=round(self._clock.seconds(), 3),
            budget_seconds=self.job.budget.seconds,
            seconds_per_step=round(self._pace.step_seconds, 6),
            skipped_steps=self._losses.skipped,
            skipped_cases=dict(self._losses.skipped_cases.most_common(_MOST_SKIPPED_CASES)),
            diverged=self._guard.times,
            learning_rate_factor=self._guard.factor,
            final_loss=self._losses.final,
            before=self._validation.before,
            curve=tuple(self._validation.curve),
            validation_cases=self._validation.schedule.cases if self._validation.schedule else (),
            peak_memory_gb=round(self._memory.peak_gb(), 3),
            weights=hash_file(self.folder / WEIGHTS),
        )
        store(result, self.folder / RESULT, result_key(self.identity))
        if not keep_state:
            self._checkpoints.delete()
        return result
