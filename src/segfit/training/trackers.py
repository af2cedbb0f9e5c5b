"""Trackers follow the events of a training: TensorBoard, MLflow, and those of other packages (`segfit.trackers`).

The log of a training stays its own file (`segfit.training.events`); a tracker is told each event once it stands there.
One that fails is left out with a warning, and the training goes on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any, Protocol, Self

from segfit.errors import InputError, warning
from segfit.files import read_json, write_json
from segfit.plugins import guarded, load_plugin
from segfit.progress import Progress

__all__ = ["MLflow", "TensorBoard", "Tracker", "Trackers"]

_EXPERIMENT = "segfit"
_RUN_FILE = "mlflow.json"
_NO_NAME = re.compile(r"[^\w\-. /]")  # what MLflow takes in the name of no metric


class Tracker(Protocol):
    """Follows the events of one training; made by a function of the training's folder, its title and the last step.

    That step is 0, or where an interrupted training goes on: later ones will be told again.
    """

    def follow(self, event: Mapping[str, Any]) -> None:
        """Take one event: its "kind", its "step", and facts, numbers or by name of the class."""

    def close(self, *, finished: bool) -> None:
        """Take the end of the training, or its interruption."""


class Trackers:
    """The trackers of one training, by the names that ``training.trackers`` has."""

    def __init__(self, names: Sequence[str], folder: Path, title: str, step: int, progress: Progress) -> None:
        self._progress = progress
        self._open: dict[str, Tracker] = {}
        for name in names:
            make = OWN.get(name) or load_plugin("trackers", name)
            self._open[name] = guarded("trackers", name, make)(folder, title, step)

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Tell an event to all of them."""
        self._tell(lambda tracker: tracker.follow(event))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tell(lambda tracker: tracker.close(finished=kind is None))

    def _tell(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tell(tracker)
            except Exception as error:  # noqa: BLE001 - whatever another package raises, the training goes on
                del self._open[name]
                reason = " ".join(str(error).split()) or type(error).__name__
                problem = f"the tracker {name} failed and follows this training no longer: {reason}"
                self._progress.warn(warning("tracker_failed", problem))


def scalars(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an event by a path: ``step/loss``, ``validation/dice/liver``."""
    for name, value in event.items():
        if isinstance(value, Mapping):
            yield from ((f"{event['kind']}/{path}", number) for path, number in scalars({"kind": name, **value}))
        elif isinstance(value, int | float) and name != "step":
            yield f"{event['kind']}/{name}", float(value)


class TensorBoard:
    """Writes event files of TensorBoard into the folder ``tensorboard`` of the training."""

    def __init__(self, folder: Path, title: str, step: int) -> None:  # noqa: ARG002 - as all are made
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _lacks("tensorboard") from None
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def follow(self, event: Mapping[str, Any]) -> None:
        """Write the numbers of an event."""
        for path, number in scalars(event):
            self._writer.add_scalar(path, number, event["step"])

    def close(self, *, finished: bool) -> None:  # noqa: ARG002 - TensorBoard knows no end
        """Write what is left."""
        self._writer.close()


class MLflow:
    """Logs into a run of MLflow, in the experiment "segfit" of the server or store that MLflow is configured for.

    A training that goes on goes on with its run, whose id stands in its folder.
    """

    def __init__(self, folder: Path, title: str, step: int) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        except ImportError:
            raise _lacks("mlflow") from None
        self._client, self._metric = MlflowClient(), Metric
        file = folder / _RUN_FILE
        if step and file.is_file():
            self._run = str(read_json(file)["run_id"])
            self._client.update_run(self._run, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(_EXPERIMENT)
        experiment = self._client.create_experiment(_EXPERIMENT) if known is None else known.experiment_id
        self._run = self._client.create_run(experiment, run_name=title).info.run_id
        write_json(file, {"run_id": self._run})

    def follow(self, event: Mapping[str, Any]) -> None:
        """Log the numbers of an event."""
        now = int(time() * 1000)
        metrics = [self._metric(_NO_NAME.sub("_", path), value, now, event["step"]) for path, value in scalars(event)]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, finished: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


def _lacks(package: str) -> InputError:
    return InputError(f"the tracker {package} needs the package {package}", "pip install 'segfit[tracking]'")


OWN: Mapping[str, Callable[[Path, str, int], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
"""Those that need no plug-in, by name."""
