"""Training one model: budget, interruptions, log, result."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_fakes import ALWAYS_VALIDATED, SCHEME, MemoryCase, disc_case, disc_cases, tiny_configuration, tiny_recipe

from segfit.errors import InputError, Problem, StageError
from segfit.execution.memory import process_bytes, process_peak_bytes
from segfit.inference.predictor import Predictor
from segfit.labels import Exchange, LabelScheme
from segfit.progress import SILENT, Progress
from segfit.specs import AugmentationSpec, TrainingSpec
from segfit.training import budget, checkpoint, loop, online_validation, team
from segfit.training.batch import Batch
from segfit.training.budget import TimeBudget
from segfit.training.device_cases import DeviceCases
from segfit.training.events import read_events
from segfit.training.job import TrainingJob
from segfit.training.learner import Learner, training_on
from segfit.training.loop import train_fold
from segfit.training.result import EVENTS, RESULT, WEIGHTS, TrainingResult
from segfit.training.sampler import Batches

CPU = torch.device("cpu")


@dataclass
class Watcher:
    """Progress that calls `react(step)` after every step and remembers what it was told."""

    react: Callable[[int], None] = lambda step: None
    told: list[str] = field(default_factory=list)
    warned: list[Problem] = field(default_factory=list)
    used: float = 0.0
    calls: int = 0

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Watcher]:
        self.title, self.total = description, total
        yield self

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self.used += amount
        self.told.append(note)
        if self.calls:  # the first call tells what was done before
            self.react(self.calls)
        self.calls += 1

    def note(self, message: str) -> None:
        self.told.append(message)

    def warn(self, warning: Problem) -> None:
        self.warned.append(warning)


def train(
    folder: Path,
    *,
    cases: list[MemoryCase] | None = None,
    recipe: TrainingSpec | None = None,
    progress: Progress = SILENT,
    **changes: Any,
) -> TrainingResult:
    cases = disc_cases() if cases is None else cases
    asked: dict[str, Any] = {"steps": None if "seconds" in changes else 6, "checkpoint_seconds": 1000.0} | changes
    validated = asked.pop("cases_validation", cases[:1])
    given = TimeBudget(
        asked.pop("seconds", None), asked.pop("steps"), asked.pop("fewest_steps", 0), asked.pop("most_steps", None)
    )
    values: dict[str, Any] = {
        "configuration": tiny_configuration(),
        "recipe": recipe or tiny_recipe(),
        "labels": SCHEME,
        "cases_train": [case.id for case in cases],
        "cases_validation": [case.id for case in validated],
        "seed": 3,
        "budget": given,
    }
    known = {one.name for one in fields(TrainingJob)}
    job = TrainingJob(**(values | {name: asked.pop(name) for name in known & set(asked)}))
    return train_fold(job, cases, validated, folder, CPU, progress=progress, **asked)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def interrupt_at(wanted: int, error: BaseException) -> Callable[[int], None]:
    def react(step: int) -> None:
        if step == wanted:
            raise error

    return react


RECIPES = {
    "sgd": tiny_recipe(),
    "adamw averaged": tiny_recipe(optimizer="adamw", momentum=0.9, learning_rate=1e-3, weight_average=0.99),
    "muon": tiny_recipe(optimizer="muon", momentum=0.95, learning_rate=0.05, cooldown_share=0.5),
    "bf16 channels last": tiny_recipe(precision="bf16", channels_last=True),
    "fp16 scaled": tiny_recipe(precision="fp16"),
    "other values": tiny_recipe(loss="tversky+topk", schedule="cosine", oversampling="probabilistic"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_an_interrupted_training_ends_where_a_straight_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: TrainingSpec
) -> None:
    FakeClock(monkeypatch)
    recipe = recipe.model_copy(update={"validation_share": ALWAYS_VALIDATED})
    straight = train(tmp_path / "straight", recipe=recipe)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", recipe=recipe, progress=Watcher(interrupt_at(3, KeyboardInterrupt())))
    assert (tmp_path / "resumed/state/step-000000003.safetensors").exists()
    assert not (tmp_path / "resumed" / RESULT).exists()
    watcher = Watcher()
    resumed = train(tmp_path / "resumed", recipe=recipe, progress=watcher)
    assert "resuming from step 3" in watcher.told
    assert watcher.used == watcher.total == 6
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")
    assert resumed.final_loss == straight.final_loss
    assert resumed.curve[-1].step == straight.curve[-1].step == 6
    assert [point.dice for point in resumed.curve] == [point.dice for point in straight.curve]
    steps = [event["step"] for event in read_events(tmp_path / "resumed" / EVENTS) if event["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_batch_norm_is_averaged_resumed_and_predicts_by_its_running_statistics(tmp_path: Path) -> None:
    plain = tiny_configuration()
    network = plain.network.model_copy(update={"norm": "batch"})
    asked: dict[str, Any] = {
        "configuration": plain.model_copy(update={"network": network}),
        "recipe": tiny_recipe(weight_average=0.9),
    }
    train(tmp_path / "straight", **asked)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", progress=Watcher(interrupt_at(3, KeyboardInterrupt())), **asked)
    train(tmp_path / "resumed", **asked)
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")
    moved = [tensor for name, tensor in weights(tmp_path / "straight").items() if name.endswith("running_mean")]
    assert moved
    assert all(tensor.any() for tensor in moved)


def test_an_error_goes_back_to_the_last_saved_state(tmp_path: Path) -> None:
    train(tmp_path / "straight")
    with pytest.raises(RuntimeError, match="power cut"):
        train(
            tmp_path / "resumed", checkpoint_seconds=0.0, progress=Watcher(interrupt_at(4, RuntimeError("power cut")))
        )
    names = sorted(path.name for path in (tmp_path / "resumed/state").iterdir())
    assert names == ["step-000000002.safetensors", "step-000000003.safetensors"]
    (tmp_path / "resumed/state" / names[1]).write_bytes(b"torn")
    watcher = Watcher()
    train(tmp_path / "resumed", progress=watcher)
    assert "resuming from step 2" in watcher.told
    assert [item.code for item in watcher.warned] == ["damaged_state"]
    assert_same_weights(tmp_path / "straight", tmp_path / "resumed")
    steps = [event["step"] for event in read_events(tmp_path / "resumed" / EVENTS) if event["kind"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_saves_the_state(tmp_path: Path, number: int, error: type[BaseException]) -> None:
    def react(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(error):
        train(tmp_path, progress=Watcher(react))
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000000002.safetensors"]


def test_a_killed_process_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from test_loop import train\n"
        "train(Path(sys.argv[1]), steps=60, checkpoint_seconds=0.0)"
    )
    here = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((here, os.environ.get("PYTHONPATH", "")))}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "killed")], env=environment)
    deadline = time.monotonic() + 600
    while not list((tmp_path / "killed/state").glob("step-*")):
        assert process.poll() is None, "the training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed = train(tmp_path / "killed", steps=60)
    train(tmp_path / "straight", steps=60)
    assert resumed.steps == 60
    assert_same_weights(tmp_path / "straight", tmp_path / "killed")
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [EVENTS, RESULT, WEIGHTS]
    steps = [event["step"] for event in read_events(tmp_path / "killed" / EVENTS) if event["kind"] == "step"]
    assert steps == sorted(set(steps))


class FakeClock:
    """Every look takes 0.1 ms, a step 50 ms, a predicted case 20 ms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (budget, loop, online_validation):
            monkeypatch.setattr(module, "perf_counter", self.look)
        monkeypatch.setattr(Learner, "step", self.slow(Learner.step, 0.05))
        monkeypatch.setattr(Predictor, "logits", self.slow(Predictor.logits, 0.02))

    def look(self) -> float:
        self.now += 1e-4
        return self.now

    def slow(self, work: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return work(*arguments, **named)

        return wrapped


def test_a_time_budget_is_not_exceeded_and_ends_at_learning_rate_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeClock(monkeypatch)
    watcher = Watcher()
    result = train(tmp_path, seconds=4.0, progress=watcher)
    assert 3.92 < result.seconds <= 4.0
    assert 3.92 < watcher.used <= watcher.total == 4.0
    assert 70 < result.steps < 80
    steps = [event for event in read_events(tmp_path / EVENTS) if event["kind"] == "step"]
    assert steps[0]["learning_rate"] > 0.999e-2
    assert steps[-1]["learning_rate"] < 0.04e-2
    for event in steps:
        assert event["learning_rate"] == pytest.approx(1e-2 * (1 - event["share"]) ** 0.9, abs=1e-7)
    assert len(result.curve) == 8  # 5 % of the time are ten predictions, one of which was for planning
    assert result.curve[-1].step == result.steps
    assert result.seconds_per_step == pytest.approx(0.05, abs=0.005)


def test_time_is_counted_over_interruptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    straight = train(tmp_path / "straight", seconds=4.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", seconds=4.0, progress=Watcher(interrupt_at(10, KeyboardInterrupt())))
    resumed = train(tmp_path / "resumed", seconds=4.0)
    assert 3.92 < resumed.seconds <= 4.0
    assert abs(resumed.steps - straight.steps) <= 1


def test_the_log_tells_loss_learning_rate_and_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    watcher = Watcher()
    result = train(
        tmp_path, steps=40, recipe=tiny_recipe(validation_share=0.25), progress=watcher, title="training tiny fold 0"
    )
    assert watcher.title == "training tiny fold 0"
    assert watcher.told[-1].startswith(f"loss {read_events(tmp_path / EVENTS)[-2]['loss']:.3f}, Dice ")
    events = read_events(tmp_path / EVENTS)
    assert [event["step"] for event in events if event["kind"] == "validation"] == list(range(2, 41, 2))
    assert [event["learning_rate"] for event in events if event["kind"] == "step"] == pytest.approx(
        [1e-2 * (1 - step / 40) ** 0.9 for step in range(40)], rel=1e-5
    )
    assert [point.step for point in result.curve] == list(range(2, 41, 2))
    assert all(set(point.dice) == {"disc"} for point in result.curve)
    assert result.dice == result.curve[-1].dice["disc"]


def test_it_learns(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        momentum=0.9, validation_share=ALWAYS_VALIDATED, augmentation=AugmentationSpec(mirror_axes=(0, 1))
    )
    result = train(tmp_path, steps=80, recipe=recipe)
    losses = [event["loss"] for event in read_events(tmp_path / EVENTS) if event["kind"] == "step"]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.5
    assert result.dice is not None
    assert result.dice > 0.7
    assert 0.5 * process_bytes() < result.peak_memory_gb * 2**30 < 1.1 * process_peak_bytes()


@pytest.mark.parametrize(("ndim", "image_ndim"), [(3, 3), (2, 3)])
def test_volumes_and_their_slices(tmp_path: Path, ndim: int, image_ndim: int) -> None:
    cases = disc_cases(2, (14, 20, 20))
    result = train(
        tmp_path,
        cases=cases,
        configuration=tiny_configuration(ndim, image_ndim),
        recipe=tiny_recipe(augmentation=AugmentationSpec(sample_patch=(18,) * ndim, mirror_axes=(0,))),
        steps=2,
    )
    assert result.steps == 2
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


def test_regions_with_an_ignore_label(tmp_path: Path) -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])
    cases = disc_cases(2)
    for case in cases:
        case.label[:3] = 3
        case.label[10:12][case.label[10:12] == 1] = 2
        case.locations = {"whole": case.locations["disc"], "annotated": np.argwhere(case.label < 3).astype(np.int32)}
    result = train(tmp_path, cases=cases, labels=scheme, steps=3, recipe=tiny_recipe(validation_share=ALWAYS_VALIDATED))
    assert list(result.curve[-1].dice) == ["whole", "core"]


def test_without_validation_cases_there_is_no_curve(tmp_path: Path) -> None:
    result = train(tmp_path, cases_validation=[], steps=2)
    assert result.curve == ()
    assert result.dice is None


def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "inline")
    monkeypatch.setattr(team, "_MEMORY_SHARE", 0)
    monkeypatch.setattr(team, "Batches", lambda *args, **kwargs: Batches(*args, **kwargs | {"threads": 2}))
    train(tmp_path / "threads")
    assert_same_weights(tmp_path / "inline", tmp_path / "threads")


def test_cases_that_wait_on_the_device_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class AsOnAGpu(DeviceCases):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            self._steps_left = 2

    train(tmp_path / "host")
    monkeypatch.setattr(loop, "DeviceCases", AsOnAGpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    cases = disc_cases()
    train(tmp_path / "device", cases=cases, cases_validation=[])
    assert_same_weights(tmp_path / "host", tmp_path / "device")
    assert max(case.reads.count("image") for case in cases) == 2  # to memory, then to the device


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = train(tmp_path)
    stamp = (tmp_path / WEIGHTS).stat().st_mtime_ns
    cases = disc_cases()
    assert train(tmp_path, cases=cases) == first
    assert all(case.reads == [] for case in cases)
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"steps": 7}, {"data": "other data"}, {"recipe": tiny_recipe(momentum=0.9)}]
)
def test_another_training_starts_afresh(tmp_path: Path, change: dict[str, Any]) -> None:
    first = train(tmp_path, steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress=Watcher(interrupt_at(1, KeyboardInterrupt())))
    assert not (tmp_path / RESULT).exists()
    watcher = Watcher()
    second = train(tmp_path, **({"steps": 6} | change), progress=watcher)
    assert not any("resuming" in note for note in watcher.told)
    assert second.identity != first.identity


def spoil(case: MemoryCase) -> MemoryCase:
    case.array[...] = np.inf
    return case


def test_steps_without_finite_gradient_are_left_out_and_counted(tmp_path: Path) -> None:
    cases = [spoil(disc_case("spoiled")), *disc_cases(8)]
    result = train(tmp_path, cases=cases, cases_validation=[], steps=20)
    skipped = [event for event in read_events(tmp_path / EVENTS) if event["kind"] == "skipped"]
    assert 0 < result.skipped_steps < 15
    assert len(skipped) == result.skipped_steps
    assert skipped[0]["loss"] is None
    assert "spoiled" in skipped[0]["cases"]
    assert next(iter(result.skipped_cases.items())) == ("spoiled", result.skipped_steps)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())


def test_a_step_without_finite_gradient_changes_nothing() -> None:
    learner = Learner(tiny_configuration(), tiny_recipe(weight_average=0.9), SCHEME, CPU, seed=0)
    image, labels = torch.rand(2, 1, 20, 20), torch.ones(2, 1, 20, 20, dtype=torch.int16)
    learner.step(Batch(image, labels), learning_rate=0.1, rng=np.random.default_rng(0))
    before = {name: tensor.clone() for name, tensor in learner.tensors().items() if "average" not in name}
    _, norm = learner.step(Batch(image * torch.inf, labels), learning_rate=0.1, rng=np.random.default_rng(0)).tolist()
    assert not np.isfinite(norm)
    after = learner.tensors()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_average_of_the_weights_predicts() -> None:
    learner = Learner(tiny_configuration(), tiny_recipe(weight_average=0.999), SCHEME, CPU, seed=0)
    own = {f"network/{name}": parameter for name, parameter in learner.network.named_parameters()}
    image, labels = torch.rand(2, 1, 20, 20), torch.ones(2, 1, 20, 20, dtype=torch.int16)
    expected = {name: tensor.detach().clone() for name, tensor in own.items()}
    for update in range(3):
        learner.step(Batch(image, labels), learning_rate=0.1, rng=np.random.default_rng(update))
        keep = (1 + update) / (10 + update)
        expected = {name: keep * tensor + (1 - keep) * own[name].detach() for name, tensor in expected.items()}
    raw = {name: tensor.detach().clone() for name, tensor in own.items()}
    averaged = learner.weights()
    for name, tensor in expected.items():
        assert torch.allclose(averaged[name.removeprefix("network/")], tensor, atol=1e-6)
        assert torch.equal(own[name], raw[name])  # put back
    assert any(not torch.equal(averaged[name.removeprefix("network/")], tensor) for name, tensor in raw.items())


def test_evaluation_gives_one_output_and_puts_the_network_back() -> None:
    learner = Learner(tiny_configuration(), tiny_recipe(), SCHEME, CPU, seed=0)
    with learner.evaluating() as network:
        assert network(torch.zeros(1, 1, 16, 16)).shape == (1, 2, 16, 16)
        assert not network.training
    assert learner.network.training
    assert learner.network.deep_supervision


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("could not create a primitive"), MemoryError()]
)
def test_running_out_of_memory_is_one_sentence(error: Exception) -> None:
    with (
        pytest.raises(StageError, match=r"tiny \(patch 16 × 16, batch 2\) does not fit into the memory of cpu"),
        training_on(tiny_configuration(), tiny_recipe(), CPU),
    ):
        raise error


def test_what_a_device_cannot_do_is_no_lack_of_memory() -> None:
    message = "could not create a primitive descriptor for a convolution forward propagation primitive"
    with pytest.raises(RuntimeError, match=message), training_on(tiny_configuration(), tiny_recipe(), CPU):
        raise RuntimeError(message)


def test_a_full_disk_is_one_sentence_and_costs_only_what_was_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "straight")
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def fill_disk(step: int) -> None:
            if step == 3:
                patch.setattr(checkpoint, "write_bytes", full)

        with pytest.raises(StageError, match=r"failed \(No space left on device\); fix it and rerun"):
            train(tmp_path / "full", checkpoint_seconds=0.0, progress=Watcher(fill_disk))
    assert (tmp_path / "full/state/step-000000002.safetensors").exists()
    train(tmp_path / "full")
    assert_same_weights(tmp_path / "straight", tmp_path / "full")


def test_budget_and_cases_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in seconds or in steps, exactly one of them"):
        train(tmp_path, seconds=1.0, steps=1)
    with pytest.raises(InputError, match="must be above zero, got 0"):
        train(tmp_path, steps=0)
    with pytest.raises(InputError, match="tiny: there is no case to train on"):
        train(tmp_path, cases=[])


def test_a_training_goes_on_past_its_time_until_it_has_its_fewest_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeClock(monkeypatch)
    watcher = Watcher()
    result = train(tmp_path, seconds=2.0, fewest_steps=60, cases_validation=[], progress=watcher)
    assert result.steps == 60
    assert 3.0 < result.seconds < 3.2
    assert watcher.used == pytest.approx(2.0)
    rates = [event["learning_rate"] for event in read_events(tmp_path / EVENTS) if event["kind"] == "step"]
    assert rates == pytest.approx([1e-2 * (1 - step / 60) ** 0.9 for step in range(60)])
    (note,) = [text for text in watcher.told if "the time is over" in text]
    assert re.match(r"the time is over after (39|40) steps of at least 60; .* about 1\.[01] s$", note)


def test_fewest_steps_that_fit_the_time_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    watcher = Watcher()
    result = train(tmp_path, seconds=2.0, fewest_steps=20, cases_validation=[], progress=watcher)
    assert 36 < result.steps < 40
    assert result.seconds <= 2.0
    assert not any("the time is over" in text for text in watcher.told)


def test_a_training_ends_before_its_time_with_its_most_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)
    watcher = Watcher()
    result = train(tmp_path, seconds=4.0, fewest_steps=5, most_steps=20, cases_validation=[], progress=watcher)
    assert result.steps == 20
    assert result.seconds < 1.1
    assert watcher.used == pytest.approx(4.0)
    rates = [event["learning_rate"] for event in read_events(tmp_path / EVENTS) if event["kind"] == "step"]
    assert rates == pytest.approx([1e-2 * (1 - step / 20) ** 0.9 for step in range(20)])
    assert len([text for text in watcher.told if "before its time: 20 steps" in text]) == 1
    again = train(tmp_path, seconds=8.0, fewest_steps=5, most_steps=20, cases_validation=[])
    assert again == result  # more time has nothing to add
    more = train(tmp_path, seconds=8.0, fewest_steps=5, most_steps=30, cases_validation=[])
    assert more.steps == 30


@pytest.mark.parametrize(("expected", "told"), [(0.02, True), (0.04, False), (None, False)])
def test_steps_that_take_much_longer_than_forecast_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: float | None, told: bool
) -> None:
    FakeClock(monkeypatch)
    watcher = Watcher()
    train(tmp_path, seconds=2.0, expected_seconds_per_step=expected, progress=watcher)
    notes = [text for text in watcher.told if "the machine is busy" in text]
    assert len(notes) == told
    if told:
        assert re.search(r"a step takes 50\.\d ms instead of 20 ms", notes[0])
        assert "about 40 steps instead of 100" in notes[0]


def test_the_second_stage_of_a_cascade_sees_what_the_first_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "disc": 1, "ring": 2})
    tiny = tiny_configuration()
    network = tiny.network.model_copy(update={"in_channels": 3, "num_outputs": 3})
    second = tiny.model_copy(update={"previous_stage": "first", "network": network})
    exchange = Exchange(axis=1, pairs=((1, 2),))
    seen: list[Batch] = []
    monkeypatch.setattr(Learner, "_step", lambda _self, batch, *_: seen.append(batch))
    labels = torch.randint(-1, 3, (8, 2, 16, 16), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    image = labels[:, :1].float()
    none = {name: 0.0 for name in AugmentationSpec.model_fields if name.endswith("_probability")}
    for augmentation in (
        AugmentationSpec(**none, mirror_axes=(1,), exchange=exchange),
        AugmentationSpec(
            **none | {"previous_removal_probability": 1.0, "previous_removal_label_probability": 1.0},
            previous_removed_share=1.0,
        ),
    ):
        recipe = tiny_recipe(augmentation=augmentation)
        learner = Learner(second, recipe, scheme, torch.device("cpu"), seed=0)
        learner.step(Batch(image, labels), learning_rate=0.1, rng=np.random.default_rng(0))
    plain, changed = seen
    assert plain.image.shape == (8, 3, 16, 16)
    assert plain.labels.shape == (8, 1, 16, 16)
    flipped = 0
    for sample, (mine, previous) in enumerate(labels):
        turned = previous.flip(1)
        straight = torch.stack([previous == 1, previous == 2]).float()
        mirrored = torch.stack([turned == 2, turned == 1]).float()
        is_flipped = torch.equal(plain.image[sample, 0], mine.float().flip(1))
        flipped += is_flipped
        assert torch.equal(plain.image[sample, 1:], mirrored if is_flipped else straight)
    assert 0 < flipped < 8
    removed = torch.stack([labels[:, 1] == 1, labels[:, 1] == 2], 1).float() - changed.image[:, 1:]
    assert (removed.flatten(2).sum(2) > 0).all()
    assert set(removed.unique().tolist()) == {0.0, 1.0}
