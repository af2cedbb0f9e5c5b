"""Predicting many cases into a folder.

Here the next is read and the previous one written while the networks are at work; workers elsewhere load the model
themselves and do a case from beginning to end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from secrets import token_hex

from segfit.dataset.manifest import Case
from segfit.errors import DatasetError, InputError, Problem
from segfit.evaluation.quality import ClassQuality
from segfit.execution.execution import LOCAL, Execution
from segfit.images.formats import label_ending
from segfit.images.image import CASE_FAILURES, failure_of
from segfit.inference.drift_log import append_case, log_line, require_log
from segfit.inference.model import Model, ModelSource, Prepared
from segfit.inference.to_input_grid import LogitField
from segfit.preprocessing.dataset import largest_grid
from segfit.progress import SILENT, KeptWarnings, tasks_only
from segfit.text import count

__all__ = ["is_written", "predict_folder"]

_WRITES_WAITING = 2  # predictions that may wait for their writer, so that memory stays bounded
_ARRAYS = 3  # float32 arrays per channel and output that predicting a case holds at its peak


Quality = tuple[ClassQuality, ...]
_Told = Callable[[str, Quality], None]


def _not_told(case: str, quality: Quality) -> None:
    del case, quality


@dataclass(frozen=True, slots=True)
class _Job:
    """What is made of each case, and where it goes."""

    output: Path
    ending: str
    save_probabilities: bool
    previous_stage: Path | None
    log: Path | None

    def path(self, case: Case) -> Path:
        """Where the labels of a case go."""
        return self.output / f"{case.id}{self.ending}"

    def probabilities(self, case: Case) -> Path:
        return self.output / f"{case.id}.npz"

    def is_done(self, case: Case) -> bool:
        return is_written(self.path(case)) and (not self.save_probabilities or self.probabilities(case).is_file())

    def prepare(self, model: Model, case: Case) -> Prepared:
        earlier = None if self.previous_stage is None else self.previous_stage / f"{case.id}{self.ending}"
        return model.prepare(list(case.images), case.spacing_mm, previous_stage=earlier)

    def write(
        self, model: Model, case: Case, prepared: Prepared, fields: Sequence[LogitField], warnings: Sequence[Problem]
    ) -> tuple[list[Problem], Quality]:
        """Write what was predicted of a case; return the warnings about it, and its quality."""
        prediction = model.finish(prepared, fields, probabilities=self.save_probabilities, warnings=warnings)
        if self.save_probabilities:
            prediction.save_probabilities(self.probabilities(case))
        if self.log is not None:
            append_case(self.log, log_line(case.id, model.manifest.identity, prediction))
        prediction.save(self.path(case))  # last: its presence says that the case is done
        return [replace(item, case=case.id) for item in prediction.warnings], prediction.quality


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
    log: Path | None = None,
    told: _Told = _not_told,
    device: str | None = None,
    execution: Execution = LOCAL,
) -> list[Path]:
    """Predict many cases into ``output/<case id><ending>``; return the paths of all of them, in order.

    Parameters
    ----------
    ending : of the outputs; None: as the labels the model was made from, or .nii.gz where that format holds no labels
    overwrite : predict again what is there already; by default it is left as it is
    save_probabilities : also write ``<case id>.npz``
    previous_stage : folder with the label maps of the previous stage of a cascade
    log : drift log to which a line is appended for each case that is predicted
    told : is given the predicted quality of each case that is predicted
    device : where networks run on workers elsewhere; None: as the model was loaded
    execution : its `workers`, one unless set, are threads that read and preprocess ahead; each holds one case in
        memory. Those of another executor than this machine load the model from its folder, which they must see

    Cases that cannot be read, predicted or written do not stop the others; `DatasetError` names all of them at the end.
    `InputError` if an output would replace an image.
    """
    if previous_stage is not None and not model.takes_previous_stage:
        raise InputError(f"{model.name} is not the second stage of a cascade", "leave previous_stage out")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder", "give another one for the label files")
    job = _Job(output, ending or label_ending(model.file_ending), save_probabilities, previous_stage, log)
    if log is not None:
        require_log(log)
    inputs = {path.resolve() for case in cases for path in case.images}
    for case in cases:
        if job.path(case).resolve() in inputs:
            raise InputError(f"{job.path(case)} is an input image and would be overwritten", "write to another folder")
    waiting = [case for case in cases if overwrite or not job.is_done(case)]
    if execution.is_here or model.source is None or not waiting:
        problems = _predict_here(model, waiting, job, execution, told)
    else:
        source = model.source if device is None else model.source._replace(device=device)
        problems = _predict_elsewhere(model, source, waiting, job, execution, told)
    if problems:
        others = len(cases) - len(problems)
        raise DatasetError(problems, f"{others or 'none'} of {count(len(cases), 'case')} predicted")
    return [job.path(case) for case in cases]


def _predict_here(model: Model, cases: Sequence[Case], job: _Job, execution: Execution, told: _Told) -> list[Problem]:
    """Predict cases; return what is wrong with those that cannot be used."""
    workers, problems = execution.workers or 1, list[Problem]()
    inner = tasks_only(execution.progress) if len(cases) == 1 else SILENT  # a single case may be large
    with (
        execution.progress.task("predicting", len(cases)) as task,
        _threads(workers, "segfit-read") as readers,
        _threads(1, "segfit-write") as writers,
    ):
        rest = iter(cases)
        ahead = deque((case, readers.submit(job.prepare, model, case)) for case in islice(rest, workers + 1))
        behind: deque[tuple[Case, Future[tuple[list[Problem], Quality]]]] = deque()
        while ahead:
            case, future = ahead.popleft()
            try:
                prepared = future.result()
                kept = KeptWarnings(inner)
                fields = model.logits(prepared, progress=kept)
                behind.append((case, writers.submit(job.write, model, case, prepared, fields, kept.warnings)))
                del prepared, fields
            except (*CASE_FAILURES, OSError) as error:
                problems.append(failure_of(case.id, error, case.images))
                task.advance(1, case.id)
            del future  # and with it the arrays of the case
            ahead.extend((case, readers.submit(job.prepare, model, case)) for case in islice(rest, 1))
            while behind and (len(behind) > _WRITES_WAITING or not ahead):
                case, written = behind.popleft()
                try:
                    warnings, quality = written.result()
                    told(case.id, quality)
                    for item in warnings:
                        execution.progress.warn(item)
                except (*CASE_FAILURES, OSError) as error:
                    problems.append(failure_of(case.id, error, case.images))
                task.advance(1, case.id)
    return problems


def _predict_elsewhere(
    model: Model, source: ModelSource, cases: Sequence[Case], job: _Job, execution: Execution, told: _Told
) -> list[Problem]:
    """Have cases predicted by workers; return what is wrong with those that cannot be used."""
    problems: list[Problem] = []
    earlier = None if job.previous_stage is None else job.previous_stage.absolute()
    log = None if job.log is None else job.log.absolute()
    job = replace(job, output=job.output.absolute(), previous_stage=earlier, log=log)
    cases = [
        case.model_copy(update={"channels": {name: path and path.absolute() for name, path in case.channels.items()}})
        for case in cases
    ]
    execution.require_shared([*source.paths, *cases[0].images], [job.output, *([log.parent] if log else [])])
    for case, ((warnings, quality), problem) in execution.map(
        partial(_predict_case, source, job, token_hex(8)),
        cases,
        description="predicting",
        name=lambda case: case.id,
        size=partial(_predicted_bytes, model),
        device=source.device,
        lost=lambda case, error: (([], ()), failure_of(case.id, error)),
    ):
        if problem is None:
            told(case.id, quality)
        for item in warnings:
            execution.progress.warn(item)
        problems += [] if problem is None else [problem]
    return problems


def _predict_case(
    source: ModelSource, job: _Job, token: str, case: Case
) -> tuple[tuple[list[Problem], Quality], Problem | None]:
    """Predict a case; return the warnings about it, its quality, and what is wrong with it if it cannot be used."""
    model = _loaded(source, token)
    try:
        kept = KeptWarnings(SILENT)
        prepared = job.prepare(model, case)
        return job.write(model, case, prepared, model.logits(prepared, progress=kept), kept.warnings), None
    except MemoryError:  # there may be enough when the case is alone
        raise
    except (*CASE_FAILURES, OSError) as error:
        return ([], ()), failure_of(case.id, error, case.images)


@lru_cache(maxsize=1)
def _loaded(source: ModelSource, token: str) -> Model:
    """Load a model once for all cases of a call, which `token` names: the next one may find another in the folder."""
    del token
    return source.load()


def _predicted_bytes(model: Model, case: Case) -> int:
    """Return the memory that predicting a case takes, about; 1 where that cannot be told."""
    configurations = [member.configuration for member in model.manifest.members]
    return max(
        max(
            1, largest_grid(case, one.preprocessing) * 4 * _ARRAYS * (one.network.in_channels + one.network.num_outputs)
        )
        for one in configurations
    )


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Open a thread pool; what has not begun when the block ends, by an error or not, is dropped."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
