"""Trackers of their own kind in place of TensorBoard and MLflow, and both as they are where they are installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from test_loop import Watcher, assert_same_weights, interrupt_at, train
from training_fakes import ALWAYS_VALIDATED, tiny_recipe

from segfit.errors import InputError
from segfit.files import read_json
from segfit.options import Options
from segfit.progress import SILENT
from segfit.project.stages import STAGES
from segfit.training.events import read_events
from segfit.training.result import EVENTS
from segfit.training.trackers import Trackers

RECIPE = tiny_recipe(validation_share=ALWAYS_VALIDATED)
CODE = """
made = []

class Kept:
    def __init__(self, folder, title, step):
        self.told, self.facts, self.finished = [], (folder.name, title, step), None
        made.append(self)

    def follow(self, event):
        self.told.append(event)

    def close(self, *, finished):
        self.finished = finished

class Broken(Kept):
    def follow(self, event):
        super().follow(event)
        raise OSError("no route to host")

def refused(*_):
    raise ValueError("no address")
"""


@pytest.fixture
def made(plugin_package: Callable[..., Path]) -> Callable[[], list[Any]]:
    plugin_package(CODE, trackers=["Kept", "Broken", "refused"])
    return lambda: list(sys.modules["own_things"].made)


def test_a_tracker_is_told_every_event_of_the_log(tmp_path: Path, made: Callable[[], list[Any]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(
            tmp_path / "own",
            recipe=RECIPE,
            trackers=["own-things:Kept"],
            title="tiny 0",
            progress=Watcher(interrupt_at(3, KeyboardInterrupt())),
        )
    (first,) = made()
    assert first.facts == ("own", "tiny 0", 0)
    assert first.told == read_events(tmp_path / "own" / EVENTS)
    assert first.finished is False
    train(tmp_path / "own", recipe=RECIPE, trackers=["own-things:Kept"], title="tiny 0")
    _, second = made()
    assert second.facts == ("own", "tiny 0", 3)
    events = read_events(tmp_path / "own" / EVENTS)
    assert second.told == [event for event in events if event["step"] > 3]
    assert {event["kind"] for event in second.told} == {"step", "validation"}
    assert second.finished is True


def test_a_tracker_that_fails_is_left_out_and_changes_nothing(tmp_path: Path, made: Callable[[], list[Any]]) -> None:
    watcher = Watcher()
    train(tmp_path / "own", trackers=["own-things:Broken", "own-things:Kept"], progress=watcher)
    train(tmp_path / "plain")
    broken, kept = made()
    assert len(broken.told) == 1
    assert len(kept.told) == len(read_events(tmp_path / "own" / EVENTS)) > 1
    assert [item.code for item in watcher.warned] == ["tracker_failed"]
    assert "own-things:Broken" in watcher.warned[0].problem
    assert "no route to host" in watcher.warned[0].problem
    assert_same_weights(tmp_path / "own", tmp_path / "plain")


def test_trackers_that_cannot_begin_are_named_before_the_training(
    tmp_path: Path, made: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    for name, told in {
        "own-things:refused": r"own-things:refused \(segfit.trackers\) failed: ValueError: no address",
        "own-things:other": "own-things:other is none of the plug-ins segfit.trackers",
        "tensorboard": r"needs the package tensorboard; pip install 'segfit\[tracking\]'",
        "mlflow": "needs the package mlflow",
    }.items():
        with pytest.raises(InputError, match=told):
            train(tmp_path / "own", trackers=[name])
    assert not list((tmp_path / "own").glob("**/*"))


def test_trackers_are_in_no_key() -> None:
    asked = Options().with_settings(["training.trackers=mlflow,own-things:Kept"])
    assert asked.training.trackers == ("mlflow", "own-things:Kept")
    assert asked.training.values == {}
    facts = dict.fromkeys(STAGES["plan"].needs, "")
    assert STAGES["plan"].key(asked, **facts) == STAGES["plan"].key(Options(), **facts)
    with pytest.raises(InputError, match=r"option training\.trackers"):
        Options().with_settings(["training.trackers=wandb"])


EVENTS_TOLD: list[dict[str, Any]] = [
    {"kind": "step", "step": 2, "loss": 0.5, "cases": ["a"]},
    {"kind": "validation", "step": 4, "mean": None, "dice": {"left (1)": 0.25, "right": None}},
]
SCALARS = {("step/loss", 2): 0.5, ("validation/dice/left (1)", 4): 0.25}


def follow(folder: Path, name: str, *, step: int = 0, finished: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with Trackers([name], folder, "liver 0", step, SILENT) as trackers:
        for event in EVENTS_TOLD:
            trackers(event)
        if not finished:
            raise KeyboardInterrupt


def test_what_tensorboard_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[Any, Any] = {}
    purged = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            purged.append((Path(folder), purge_step))

        def add_scalar(self, path: str, value: float, step: int) -> None:
            written[path, step] = value

        def close(self) -> None:
            written["closed"] = True

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    follow(tmp_path, "tensorboard")
    assert written == SCALARS | {"closed": True}
    follow(tmp_path, "tensorboard", step=7)
    assert purged == [(tmp_path / "tensorboard", None), (tmp_path / "tensorboard", 8)]


class Client:
    """Of MLflow: keeps what it is told."""

    experiments: dict[str, SimpleNamespace] = {}
    runs: list[list[Any]] = []

    def get_experiment_by_name(self, name: str) -> Any:
        return self.experiments.get(name)

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = SimpleNamespace(experiment_id="e1")
        return "e1"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.runs.append([experiment, run_name])
        return SimpleNamespace(info=SimpleNamespace(run_id=str(len(self.runs) - 1)))

    def update_run(self, run: str, status: str) -> None:
        self.runs[int(run)].append(status)

    def log_batch(self, run: str, metrics: list[tuple[str, float, int, int]]) -> None:
        self.runs[int(run)] += [((name, step), value) for name, value, _, step in metrics]

    def set_terminated(self, run: str, status: str) -> None:
        self.runs[int(run)].append(status)


def test_an_mlflow_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Any:
        raise RuntimeError("the store is in maintenance")

    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient, entities.Metric = refuse, None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    with pytest.raises(InputError, match=r"mlflow .*failed: RuntimeError: the store is in maintenance"):
        follow(tmp_path, "mlflow")


def test_what_mlflow_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, entities = ModuleType("mlflow"), ModuleType("mlflow.entities")
    module.MlflowClient, entities.Metric = Client, lambda *facts: facts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(Client, "runs", [])
    told = [(("step/loss", 2), 0.5), (("validation/dice/left _1_", 4), 0.25)]
    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path / "a", "mlflow", finished=False)
    follow(tmp_path / "a", "mlflow", step=3)
    assert Client.runs == [["e1", "liver 0", *told, "KILLED", "RUNNING", *told, "FINISHED"]]
    follow(tmp_path / "a", "mlflow")
    follow(tmp_path / "b", "mlflow", step=3)
    assert [run[-1] for run in Client.runs] == ["FINISHED"] * 3


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_itself(tmp_path: Path) -> None:
    follow(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    found = {(tag, event.step): event.value for tag in read.Tags()["scalars"] for event in read.Scalars(tag)}
    assert {(tag.replace("_1_", "(1)"), step): value for (tag, step), value in found.items()} == SCALARS


@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the client alone has no other
    with pytest.raises(KeyboardInterrupt):
        follow(tmp_path / "a", "mlflow", finished=False)
    follow(tmp_path / "a", "mlflow", step=3)
    from mlflow import MlflowClient

    run = MlflowClient().get_run(read_json(tmp_path / "a/mlflow.json")["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "liver 0"
    assert run.data.metrics == {"step/loss": 0.5, "validation/dice/left _1_": 0.25}
