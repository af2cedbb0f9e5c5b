"""The state before the cool-down is kept, and a longer training goes on from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_divergence import break_above
from test_loop import FakeClock, Watcher, assert_same_weights, interrupt_at, train
from training_fakes import ALWAYS_VALIDATED, SCHEME, disc_cases, tiny_configuration, tiny_recipe

from segfit.specs import TrainingSpec
from segfit.training import loop
from segfit.training.budget import TimeBudget
from segfit.training.checkpoint import Checkpoints, State
from segfit.training.events import read_events
from segfit.training.job import TrainingJob
from segfit.training.result import BEFORE_COOLDOWN, EVENTS, RESULT, STATE, TrainingResult
from segfit.training.schedule import cooldown_start, learning_rate
from segfit.training.starting_state import state_before_cooldown, take_up_other_steps

SHORT = tiny_recipe(optimizer="muon", momentum=0.95, learning_rate=0.05, cooldown_share=0.5)
CONSTANT = SHORT.model_copy(update={"poly_exponent": 0.0})


def kept(folder: Path) -> State:
    state = state_before_cooldown(folder, TrainingResult.load(folder / RESULT).identity)
    assert state is not None
    return state


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / BEFORE_COOLDOWN).glob("*"))


def assert_same_state(a: State, b: State) -> None:
    assert a.step == b.step
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize(("exponent", "warmup", "cooldown"), [(0.9, 0.0, 0.5), (2.0, 0.2, 0.3), (1.0, 0.4, 0.9)])
def test_the_rate_falls_from_there_on(exponent: float, warmup: float, cooldown: float) -> None:
    start = cooldown_start(exponent, warmup, cooldown)
    assert start is not None
    rates = [learning_rate(start + ahead, 1.0, exponent, warmup, cooldown) for ahead in (0.0, 0.01, 0.02)]
    assert rates[0] == pytest.approx(1.0)
    assert rates[0] > rates[1] > rates[2]
    if start > warmup:
        assert learning_rate((start + warmup) / 2, 1.0, exponent, warmup, cooldown) == 1.0


@pytest.mark.parametrize(("exponent", "cooldown"), [(0.0, 0.5), (0.9, 1.0), (0.9, 0.0)])
def test_what_has_no_cool_down_keeps_nothing(exponent: float, cooldown: float) -> None:
    assert cooldown_start(exponent, 0.0, cooldown) is None


def test_an_extension_is_what_a_training_with_a_constant_rate_would_go_on_with(tmp_path: Path) -> None:
    short = train(tmp_path / "short", recipe=SHORT, steps=20)
    train(tmp_path / "constant", recipe=CONSTANT, steps=10, keep_state=True)
    identity = TrainingResult.load(tmp_path / "constant" / RESULT).identity
    constant, _ = Checkpoints(tmp_path / "constant" / STATE, identity).load()
    assert constant is not None
    assert_same_state(kept(tmp_path / "short"), constant)
    assert files(tmp_path / "short") == ["step-000000010.safetensors"]
    assert not (tmp_path / "short" / STATE).exists()

    extended = train(tmp_path / "extended", recipe=SHORT, steps=30, start=tmp_path / "short")
    train(tmp_path / "other", recipe=SHORT, steps=30, start=tmp_path / "constant")
    assert_same_weights(tmp_path / "extended", tmp_path / "other")
    assert (extended.first_step, extended.steps, extended.own_steps) == (10, 40, 30)
    assert (short.first_step, short.own_steps) == (0, 20)
    events = [event for event in read_events(tmp_path / "extended" / EVENTS) if event["kind"] == "step"]
    assert [event["step"] for event in events] == list(range(11, 41))
    assert [event["learning_rate"] for event in events[:16]] == [0.05] * 16  # the last is that of share 0.5

    # The extension has kept one of its own, that is constant from the first step of all to the 25th.
    train(tmp_path / "longer", recipe=CONSTANT, steps=25, keep_state=True)
    longer, _ = Checkpoints(
        tmp_path / "longer" / STATE, TrainingResult.load(tmp_path / "longer" / RESULT).identity
    ).load()
    assert longer is not None
    assert_same_state(kept(tmp_path / "extended"), longer)


@pytest.mark.parametrize("at", [5, 10, 15])
def test_an_interruption_does_not_lose_it(tmp_path: Path, at: int) -> None:
    train(tmp_path / "straight", recipe=SHORT, steps=20)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", recipe=SHORT, steps=20, progress=Watcher(interrupt_at(at, KeyboardInterrupt())))
    assert files(tmp_path / "resumed") == (["step-000000010.safetensors"] if at > 10 else [])
    train(tmp_path / "resumed", recipe=SHORT, steps=20)
    assert_same_state(kept(tmp_path / "resumed"), kept(tmp_path / "straight"))
    assert_same_weights(tmp_path / "resumed", tmp_path / "straight")


def test_going_on_from_an_older_state_makes_it_anew(tmp_path: Path) -> None:
    """Power fails after the cool-down began, and only a state from before it was saved."""
    train(tmp_path / "straight", recipe=SHORT, steps=20)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", recipe=SHORT, steps=20, progress=Watcher(interrupt_at(8, KeyboardInterrupt())))
    folder = tmp_path / "cut" / BEFORE_COOLDOWN
    folder.mkdir()
    for step in (10, 12):
        (folder / f"step-{step:09d}.safetensors").write_bytes(b"of a life that was lost")
    train(tmp_path / "cut", recipe=SHORT, steps=20)
    assert files(tmp_path / "cut") == ["step-000000010.safetensors"]
    assert_same_state(kept(tmp_path / "cut"), kept(tmp_path / "straight"))


@pytest.mark.parametrize("change", [{"recipe": CONSTANT}, {"seed": 4}, {"steps": 24}])
def test_another_training_does_not_take_it_for_its_own(tmp_path: Path, change: dict[str, Any]) -> None:
    train(tmp_path, recipe=SHORT, steps=20)
    first = kept(tmp_path)
    train(tmp_path, **({"recipe": SHORT, "steps": 20} | change))
    if change.get("recipe") == CONSTANT:
        assert files(tmp_path) == []
    else:
        second = kept(tmp_path)
        assert second.step == change.get("steps", 20) // 2
        assert any(not torch.equal(second.tensors[name], tensor) for name, tensor in first.tensors.items())


def test_by_time_it_is_kept_once_when_half_of_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    train(tmp_path, recipe=SHORT, seconds=4.0)
    state = kept(tmp_path)
    assert 2.0 <= state.facts["seconds"] < 2.1
    steps = [event for event in read_events(tmp_path / EVENTS) if event["kind"] == "step"]
    assert all(event["learning_rate"] == 0.05 for event in steps[: state.step])
    assert all(event["learning_rate"] < 0.05 for event in steps[state.step :])


def test_a_divergence_that_goes_back_behind_it_has_it_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_above(monkeypatch, 0.003, from_step=38)
    result = train(tmp_path, recipe=tiny_recipe(cooldown_share=0.5), steps=80)
    (diverged,) = [event for event in read_events(tmp_path / EVENTS) if event["kind"] == "diverged"]
    assert diverged["step"] < 38 < 40 < diverged["at"]
    state = kept(tmp_path)
    assert state.step == 40
    assert result.learning_rate_factor == state.facts["learning_rate_factor"] == 0.25


def test_a_divergence_in_the_cool_down_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_above(monkeypatch, 0.003, from_step=50)
    result = train(tmp_path, recipe=tiny_recipe(cooldown_share=0.5), steps=80)
    (diverged,) = [event for event in read_events(tmp_path / EVENTS) if event["kind"] == "diverged"]
    assert diverged["step"] > 40
    assert result.learning_rate_factor == 0.25
    state = kept(tmp_path)
    assert (state.step, state.facts["learning_rate_factor"]) == (40, 1.0)


def test_the_lowered_rate_goes_into_the_extension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        break_above(patch, 0.003, from_step=30)
        train(tmp_path / "short", recipe=tiny_recipe(cooldown_share=0.5), steps=80)
    extended = train(tmp_path / "long", recipe=tiny_recipe(cooldown_share=0.5), steps=50, start=tmp_path / "short")
    assert (extended.first_step, extended.steps, extended.learning_rate_factor) == (40, 90, 0.25)


def test_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    train(tmp_path, recipe=SHORT, steps=20)
    (tmp_path / BEFORE_COOLDOWN / files(tmp_path)[0]).write_bytes(b"torn")
    assert state_before_cooldown(tmp_path, TrainingResult.load(tmp_path / RESULT).identity) is None


def test_more_time_goes_on_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    short = train(tmp_path, recipe=SHORT, seconds=4.0)
    before = kept(tmp_path)
    assert train(tmp_path, recipe=SHORT, seconds=3.0) == short  # less time changes nothing

    def torn(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "replace", torn)  # killed while the next state before a cool-down is written
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, recipe=SHORT, seconds=8.0, checkpoint_seconds=1e9)
    assert files(tmp_path) == [f"step-{before.step:09d}.safetensors"]
    assert TrainingResult.load(tmp_path / RESULT) == short
    longer = train(tmp_path, recipe=SHORT, seconds=8.0)
    assert longer.identity == short.identity
    assert longer.steps > short.steps
    assert files(tmp_path) == [f"step-{kept(tmp_path).step:09d}.safetensors"]
    assert kept(tmp_path).step > before.step


def test_more_time_is_what_all_of_it_at_once_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that takes each step for the same time: the losses go on as if there had been no end."""
    recipe = SHORT.model_copy(update={"validation_share": 0.0})
    FakeClock(monkeypatch)
    monkeypatch.setattr(loop, "thread_numbers", lambda number: (number,))  # others have other last digits
    short = train(tmp_path / "short", recipe=recipe, seconds=4.0)
    extended = train(tmp_path / "short", recipe=recipe, seconds=8.0)
    straight = train(tmp_path / "straight", recipe=recipe, seconds=8.0)
    assert extended.steps == pytest.approx(straight.steps, abs=1)
    same = min(kept(tmp_path / name).step for name in ("short", "straight"))
    assert same > 0.9 * short.steps
    found, wanted = (_step_events(tmp_path / name) for name in ("short", "straight"))
    assert found[:same] == wanted[:same]
    rates = [[event["learning_rate"] for event in events] for events in (found, wanted)]
    assert rates[0][: straight.steps - 1] == pytest.approx(rates[1][: straight.steps - 1], abs=0.002)


def test_a_state_that_is_kept_outlives_a_second_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    short = train(tmp_path, recipe=SHORT, seconds=4.0)
    before = kept(tmp_path)
    for ahead in (3, 6):  # both times before the cool-down of the longer training
        watcher = Watcher(interrupt_at(ahead, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, recipe=SHORT, seconds=16.0, progress=watcher)
        assert files(tmp_path) == [f"step-{before.step:09d}.safetensors"]
    assert kept(tmp_path).step > before.step  # the state that was saved at the interruption
    assert train(tmp_path, recipe=SHORT, seconds=16.0).identity == short.identity


def _job(steps: int, recipe: TrainingSpec, seed: int = 3) -> TrainingJob:
    """The job of `train`."""
    names = [case.id for case in disc_cases()]
    return TrainingJob(
        configuration=tiny_configuration(),
        recipe=recipe,
        labels=SCHEME,
        cases_train=names,
        cases_validation=names[:1],
        seed=seed,
        budget=TimeBudget(None, steps),
    )


def _folder(root: Path, job: TrainingJob) -> Path:
    return root / job.identity


def _step_events(folder: Path) -> list[dict[str, Any]]:
    """What a log says of the steps themselves: the time and the share of the budget are others in each run."""
    wanted = ("step", "loss", "learning_rate")
    return [{name: event[name] for name in wanted} for event in read_events(folder / EVENTS) if event["kind"] == "step"]


@pytest.mark.parametrize("recipe", [SHORT, SHORT.model_copy(update={"optimizer": "sgd", "weight_average": 0.9})])
@pytest.mark.parametrize(("first", "stop", "then", "taken"), [(20, None, 40, 10), (20, 15, 40, 10), (40, 8, 20, 8)])
def test_other_steps_go_on_and_equal_a_training_in_one_go(
    tmp_path: Path, recipe: TrainingSpec, first: int, stop: int | None, then: int, taken: int
) -> None:
    straight, earlier, job = tmp_path / "straight", _job(first, recipe), _job(then, recipe)
    train(straight, recipe=recipe, steps=then)
    watcher = Watcher() if stop is None else Watcher(interrupt_at(stop, KeyboardInterrupt()))
    try:
        train(_folder(tmp_path, earlier), recipe=recipe, steps=first, progress=watcher)
    except KeyboardInterrupt:
        assert stop is not None
    before = {path: path.read_bytes() for path in _folder(tmp_path, earlier).rglob("*") if path.is_file()}

    assert take_up_other_steps(job, _folder(tmp_path, job), tmp_path.glob("*")) == taken
    with pytest.raises(KeyboardInterrupt):  # the extension is interrupted itself
        train(
            _folder(tmp_path, job),
            recipe=recipe,
            steps=then,
            progress=Watcher(interrupt_at(taken // 2, KeyboardInterrupt())),
        )
    assert take_up_other_steps(job, _folder(tmp_path, job), tmp_path.glob("*")) is None  # it has begun
    result = train(_folder(tmp_path, job), recipe=recipe, steps=then)
    assert (result.steps, result.first_step) == (then, 0)
    assert_same_weights(_folder(tmp_path, job), straight)
    assert_same_state(kept(_folder(tmp_path, job)), kept(straight))
    assert _step_events(_folder(tmp_path, job)) == _step_events(straight)
    assert {path: path.read_bytes() for path in before} == before


FALLING = tiny_recipe()
WARMED = SHORT.model_copy(update={"warmup_share": 0.1})
OTHER = SHORT.model_copy(update={"cooldown_share": 0.4})


@pytest.mark.parametrize(
    ("trained", "wanted", "seed"),
    [(FALLING, FALLING, 3), (WARMED, WARMED, 3), (SHORT, SHORT, 4), (SHORT, OTHER, 3)],
    ids=["the rate falls from the first step on", "warm-up", "another seed", "another cool-down"],
)
def test_a_training_that_would_not_be_the_same_takes_up_nothing(
    tmp_path: Path, trained: TrainingSpec, wanted: TrainingSpec, seed: int
) -> None:
    earlier, job = _job(20, trained), _job(40, wanted, seed=seed)
    stop = Watcher(interrupt_at(4, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):  # what is trained with a falling rate leaves a state too
        train(_folder(tmp_path, earlier), recipe=trained, steps=20, progress=stop)
    assert take_up_other_steps(job, _folder(tmp_path, job), tmp_path.glob("*")) is None
    assert not _folder(tmp_path, job).exists()
    assert (_folder(tmp_path, earlier) / STATE).is_dir()


def _shares(folder: Path, kind: str) -> list[float]:
    return [event["share"] for event in read_events(folder / EVENTS) if event["kind"] == kind]


def test_what_goes_on_longer_is_logged_and_validated_by_its_own_budget(tmp_path: Path) -> None:
    recipe = SHORT.model_copy(update={"validation_share": ALWAYS_VALIDATED})
    earlier, job = _job(200, recipe), _job(400, recipe)
    first = train(_folder(tmp_path, earlier), recipe=recipe, steps=200)
    assert take_up_other_steps(job, _folder(tmp_path, job), tmp_path.glob("*")) == 100
    result = train(_folder(tmp_path, job), recipe=recipe, steps=400)
    shares = _shares(_folder(tmp_path, job), "step")
    assert shares == pytest.approx([step / 400 for step in range(1, 101)] + [step / 400 for step in range(100, 400)])
    assert _shares(_folder(tmp_path, job), "validation") == [point.share for point in result.curve]
    half = [point for point in first.curve if point.step <= 100]
    assert [(point.step, point.dice) for point in result.curve[: len(half)]] == [(one.step, one.dice) for one in half]
    assert [point.share for point in result.curve[: len(half)]] == [one.share / 2 for one in half]
    count = len(first.curve)
    later = [point.share for point in result.curve[len(half) :]]
    assert later == pytest.approx([share for k in range(1, count + 1) if (share := k / count) > 0.25], abs=0.0025)
