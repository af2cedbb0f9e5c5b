"""Trainings that diverge, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import FakeClock, Watcher, assert_same_weights, interrupt_at, spoil, train
from torch import Tensor
from training_fakes import disc_case, tiny_recipe

from segfit.errors import DivergedError
from segfit.training.events import read_events
from segfit.training.learner import Learner
from segfit.training.result import EVENTS, RESULT, WEIGHTS


def break_above(monkeypatch: pytest.MonkeyPatch, rate: float, from_step: int, loss: float = 50.0) -> None:
    """Let steps with a higher rate wreck the network once `from_step` steps were made."""
    step: Callable[..., Tensor] = Learner.step
    made = 0

    def breaking(self: Learner, *arguments: Any, learning_rate: float, **named: Any) -> Tensor:
        nonlocal made
        made += 1
        values = step(self, *arguments, learning_rate=learning_rate, **named)
        if made > from_step and learning_rate > rate:
            with torch.no_grad():
                for parameter in self.network.parameters():
                    parameter.mul_(1.5)
            values = torch.tensor([loss, 1.0])
        return values

    monkeypatch.setattr(Learner, "step", breaking)


def test_a_rate_far_too_high_ends_the_training_without_a_result(tmp_path: Path) -> None:
    watcher = Watcher()
    recipe = tiny_recipe(learning_rate=1000.0)
    with pytest.raises(DivergedError) as caught:
        train(tmp_path, recipe=recipe, steps=60, progress=watcher)
    assert "learning rate of 2.5e+02" in caught.value.problem
    assert "--set training.learning_rate=0.01" in caught.value.action
    (warned,) = watcher.warned
    assert warned.code == "diverged"
    assert "from step 0 with learning rate 2.5e+02" in warned.problem
    assert not (tmp_path / WEIGHTS).exists()
    assert not (tmp_path / RESULT).exists()


@pytest.mark.parametrize("budget", [{"steps": 5}, {"seconds": 0.3}])
def test_a_short_training_is_judged_at_its_end(tmp_path: Path, budget: dict[str, Any]) -> None:
    with pytest.raises(DivergedError):
        train(tmp_path, recipe=tiny_recipe(learning_rate=1000.0, precision="bf16"), **budget)
    assert not (tmp_path / WEIGHTS).exists()


def test_it_goes_back_to_a_good_state_with_a_quarter_of_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_above(monkeypatch, 0.004, from_step=30)
    watcher = Watcher()
    result = train(tmp_path, steps=80, progress=watcher)
    assert (result.diverged, result.learning_rate_factor, result.steps) == (1, 0.25, 80)
    assert result.final_loss is not None
    assert result.final_loss < 1.0
    assert all(torch.isfinite(tensor).all() for tensor in torch_weights(tmp_path).values())
    events = read_events(tmp_path / EVENTS)
    (diverged,) = [event for event in events if event["kind"] == "diverged"]
    back = diverged["step"]
    assert 20 <= back <= 26  # good losses followed
    assert 30 < diverged["at"] <= 50
    assert diverged["learning_rate_factor"] == 0.25
    assert "the loss was" in diverged["why"]
    (warned,) = watcher.warned
    assert warned.code == "diverged"
    assert all(part in warned.problem for part in (diverged["why"], f"from step {back}", "rate 0.0025"))
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 81))
    assert [event["learning_rate"] for event in steps[back:]] == pytest.approx(
        [0.25e-2 * (1 - step / 80) ** 0.9 for step in range(back, 80)]
    )


def test_the_lower_rate_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        break_above(patch, 0.004, from_step=10)
        straight = train(tmp_path / "straight", steps=60)
    with monkeypatch.context() as patch:
        break_above(patch, 0.004, from_step=10)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "resumed", steps=60, progress=Watcher(interrupt_at(50, KeyboardInterrupt())))
    resumed = train(tmp_path / "resumed", steps=60)
    assert (resumed.diverged, resumed.learning_rate_factor) == (straight.diverged, straight.learning_rate_factor)
    assert (resumed.diverged, resumed.learning_rate_factor) == (1, 0.25)
    assert resumed.final_loss == straight.final_loss
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")


def test_a_state_that_is_going_bad_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_above(monkeypatch, 0.0, from_step=10)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, steps=60, checkpoint_seconds=0.0, progress=Watcher(interrupt_at(14, KeyboardInterrupt())))
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == ["step-000000009.safetensors", "step-000000010.safetensors"]


@pytest.mark.parametrize("steps", [5, 50])
def test_images_without_finite_values_are_named(tmp_path: Path, steps: int) -> None:
    cases = [spoil(disc_case("bad"))]
    with pytest.raises(
        DivergedError, match=r"training steps in a row \(up to step \d+\) had no finite gradient"
    ) as got:
        train(tmp_path, cases=cases, steps=steps)
    assert str(got.value).endswith("and look at the images of bad")


def test_a_training_by_time_that_is_bad_at_its_end_hands_over_its_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_above(monkeypatch, 0.0, from_step=68)
    FakeClock(monkeypatch)
    watcher = Watcher()
    result = train(tmp_path, seconds=4.0, progress=watcher)
    assert (result.diverged, result.learning_rate_factor) == (1, 0.25)
    assert 55 <= result.steps <= 68
    assert result.seconds <= 4.0
    assert result.final_loss is not None
    assert result.final_loss < 1.0


def test_a_state_counts_as_good_when_good_losses_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)  # six steps: the first wrecks the network, the loss of the second shows it
    with pytest.raises(DivergedError):
        train(tmp_path, recipe=tiny_recipe(learning_rate=1000.0), cases_validation=[], seconds=0.35)
    assert not (tmp_path / WEIGHTS).exists()


def test_an_outlying_loss_is_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step: Callable[..., Tensor] = Learner.step
    made = 0

    def outlying(self: Learner, *arguments: Any, **named: Any) -> Tensor:
        nonlocal made
        made += 1
        values = step(self, *arguments, **named)
        return values * 1000 if made % 15 == 0 else values

    monkeypatch.setattr(Learner, "step", outlying)
    assert train(tmp_path, steps=60).diverged == 0


def torch_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)
