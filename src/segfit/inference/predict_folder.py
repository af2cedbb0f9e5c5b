"""Predicting many cases into a folder: the next is read and the previous one written while the networks are at work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from segfit.dataset.manifest import Case
from segfit.errors import DatasetError, InputError, Problem
from segfit.execution.execution import LOCAL, Execution
from segfit.images.formats import label_ending
from segfit.images.image import CASE_FAILURES, failure_of
from segfit.inference.model import Model, Prepared
from segfit.inference.to_input_grid import LogitField
from segfit.progress import SILENT, KeptWarnings, tasks_only
from segfit.words import count

__all__ = ["is_written", "predict_folder"]

_WRITES_WAITING = 2  # predictions that may wait for their writer, so that memory stays bounded


def is_written(path: Path) -> bool:
    """Return whether a label map is there, and no folder in its place."""
    return path.is_dir() if path.suffix == ".zarr" else path.is_file()


def predict_folder(
    model: Model,
    cases: Sequence[Case],
    output: Path,
    *,
    ending: str | None = None,
    overwrite: bool = False,
    save_probabilities: bool = False,
    previous_stage: Path | None = None,
    execution: Execution = LOCAL,
) -> list[Path]:
    """Predict many cases into ``output/<case id><ending>``; return the paths of all of them, in order.

    Parameters
    ----------
    ending : of the outputs; None: as the labels the model was made from, or .nii.gz where that format holds no labels
    overwrite : predict again what is there already; by default it is left as it is
    save_probabilities : also write ``<case id>.npz``
    previous_stage : folder with the label maps of the previous stage of a cascade
    execution : its `workers`, one unless set, are threads that read and preprocess ahead; each holds one case in memory

    Cases that cannot be read, predicted or written do not stop the others; `DatasetError` names all of them at the end.
    `InputError` if an output would replace an image.
    """
    if previous_stage is not None and not model.takes_previous_stage:
        raise InputError(f"{model.name} is not the second stage of a cascade", "leave previous_stage out")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder", "give another one for the label files")
    ending = ending or label_ending(model.file_ending)
    paths = {case.id: output / f"{case.id}{ending}" for case in cases}
    inputs = {path.resolve() for case in cases for path in case.images}
    for path in paths.values():
        if path.resolve() in inputs:
            raise InputError(f"{path} is an input image and would be overwritten", "write to another folder")
    probabilities = {case.id: output / f"{case.id}.npz" for case in cases}
    waiting = [
        case
        for case in cases
        if overwrite or not is_written(paths[case.id]) or (save_probabilities and not probabilities[case.id].is_file())
    ]

    def prepare(case: Case) -> Prepared:
        earlier = None if previous_stage is None else previous_stage / f"{case.id}{ending}"
        return model.prepare(list(case.images), case.spacing_mm, previous_stage=earlier)

    def write(case: Case, prepared: Prepared, fields: Sequence[LogitField], warnings: Sequence[Problem]) -> None:
        prediction = model.finish(prepared, fields, probabilities=save_probabilities, warnings=warnings)
        for item in prediction.warnings:
            execution.progress.warn(replace(item, case=case.id))
        if save_probabilities:
            prediction.save_probabilities(probabilities[case.id])
        prediction.save(paths[case.id])  # last: its presence says that the case is done

    problems = _predict(model, waiting, prepare, write, execution)
    if problems:
        others = len(cases) - len(problems)
        raise DatasetError(problems, f"{others or 'none'} of {count(len(cases), 'case')} predicted")
    return [paths[case.id] for case in cases]


def _predict(
    model: Model,
    cases: Sequence[Case],
    prepare: Callable[[Case], Prepared],
    write: Callable[[Case, Prepared, Sequence[LogitField], Sequence[Problem]], None],
    execution: Execution,
) -> list[Problem]:
    """Predict cases; return what is wrong with those that cannot be used."""
    workers, problems = execution.workers or 1, list[Problem]()
    inner = tasks_only(execution.progress) if len(cases) == 1 else SILENT  # a single case may be large
    with (
        execution.progress.task("predicting", len(cases)) as task,
        _threads(workers, "segfit-read") as readers,
        _threads(1, "segfit-write") as writers,
    ):
        rest = iter(cases)
        ahead = deque((case, readers.submit(prepare, case)) for case in islice(rest, workers + 1))
        behind: deque[tuple[Case, Future[None]]] = deque()
        while ahead:
            case, future = ahead.popleft()
            try:
                prepared = future.result()
                kept = KeptWarnings(inner)
                fields = model.logits(prepared, progress=kept)
                behind.append((case, writers.submit(write, case, prepared, fields, kept.warnings)))
                del prepared, fields
            except (*CASE_FAILURES, OSError) as error:
                problems.append(failure_of(case.id, error, case.images))
                task.advance(1, case.id)
            del future  # and with it the arrays of the case
            ahead.extend((case, readers.submit(prepare, case)) for case in islice(rest, 1))
            while behind and (len(behind) > _WRITES_WAITING or not ahead):
                case, written = behind.popleft()
                try:
                    written.result()
                except (*CASE_FAILURES, OSError) as error:
                    problems.append(failure_of(case.id, error, case.images))
                task.advance(1, case.id)
    return problems


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Open a thread pool; what has not begun when the block ends, by an error or not, is dropped."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
