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
from pathlib import Path
from secrets import token_hex

from segfit.dataset.manifest import Case
from segfit.device import is_memory_shortage
from segfit.errors import DatasetError, InputError, Problem
from segfit.evaluation.quality import ClassQuality
from segfit.execution.execution import LOCAL, Execution
from segfit.geometry import Grid
from segfit.images.formats import label_ending, read_grid
from segfit.images.image import CASE_FAILURES, failure_of
from segfit.images.values import channel_files, write_channels
from segfit.inference.drift_log import append_case, log_line, require_log
from segfit.inference.model import Model, ModelSource
from segfit.inference.prepared import Prepared
from segfit.inference.room import Room, with_less_each_time
from segfit.inference.to_input_grid import LogitField
from segfit.progress import SILENT, KeptWarnings, Progress, Task, tasks_only
from segfit.text import count

__all__ = ["is_written", "predict_folder"]

_WRITES_WAITING = 2  # predictions that may wait for their writer


Quality = tuple[ClassQuality, ...]
_Told = Callable[[str, Quality], None]
_Written = tuple[list[Problem], Quality]  # warnings about a case, and its quality


def _not_told(case: str, quality: Quality) -> None:
    del case, quality


@dataclass(frozen=True, slots=True)
class _Job:
    """What is made of each case, and where it goes."""

    output: Path
    ending: str
    save_probabilities: bool
    probability_images: int  # how many: one for each output, or none
    previous_stage: Path | None
    memory_gb: float | None
    log: Path | None

    def path(self, case: Case) -> Path:
        """Where the labels of a case go."""
        return self.output / f"{case.id}{self.ending}"

    def probabilities(self, case: Case) -> Path:
        return self.output / f"{case.id}.npz"

    def images(self, case: Case) -> list[Path]:
        return channel_files(self.output / "probabilities", case.id, self.ending, self.probability_images)

    def is_done(self, case: Case) -> bool:
        return (
            is_written(self.path(case))
            and (not self.save_probabilities or self.probabilities(case).is_file())
            and all(map(is_written, self.images(case)))
        )

    def prepare(self, model: Model, case: Case) -> Prepared:
        earlier = None if self.previous_stage is None else self.previous_stage / f"{case.id}{self.ending}"
        return model.prepare(
            list(case.images),
            case.spacing_mm,
            previous_stage=earlier,
            memory_gb=self.memory_gb,
            scratch=self.output.absolute(),
        )

    def predict(self, model: Model, case: Case, progress: Progress) -> _Written:
        """Predict and write a case from beginning to end, in less memory if it runs out; return as `write`."""

        def attempt(gb: float | None) -> _Written:
            kept = KeptWarnings(progress)
            prepared = replace(self, memory_gb=gb).prepare(model, case)
            return self.write(model, case, prepared, model.logits(prepared, progress=kept), kept.warnings)

        retried = KeptWarnings(SILENT)
        warnings, quality = with_less_each_time(attempt, self.memory_gb, retried)
        return [*(replace(item, case=case.id) for item in retried.warnings), *warnings], quality

    def write(
        self, model: Model, case: Case, prepared: Prepared, fields: Sequence[LogitField], warnings: Sequence[Problem]
    ) -> _Written:
        """Write what was predicted of a case; return the warnings about it, and its quality."""
        wanted = self.save_probabilities or self.probability_images > 0
        prediction = model.finish(prepared, fields, probabilities=wanted, warnings=warnings)
        if self.save_probabilities:
            prediction.save_probabilities(self.probabilities(case))
        if self.probability_images and prediction.probabilities is not None:
            write_channels(self.images(case), prediction.probabilities, prediction.grid)
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
    save_probability_images: bool = False,
    previous_stage: Path | None = None,
    memory_gb: float | None = None,
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
    save_probability_images : also write ``probabilities/<case id>_0000<ending>`` and so on, one image for each output
        of the model in the order of its labels, on the grid of the input; TIFF where label files are PNG or BMP
    previous_stage : folder with the label maps of the previous stage of a cascade
    memory_gb : memory that predicting may take, about; None: what is free. No more cases than fit are read ahead or
        wait for their writer; one that is larger is predicted row by row, with arrays in files without a name in
        `output`
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
    outputs, ending = model.labels.num_outputs * save_probability_images, ending or label_ending(model.file_ending)
    job = _Job(output, ending, save_probabilities, outputs, previous_stage, memory_gb, log)
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
    with (
        execution.progress.task("predicting", len(cases)) as task,
        _threads(execution.workers or 1, "segfit-read") as readers,
        _threads(1, "segfit-write") as writers,
    ):
        return _Here(model, cases, job, execution, told, task, readers, writers).predict()


class _Here:
    """Predicts cases in this process, reads the next ones ahead and writes behind, as far as memory allows.

    What is read ahead is taken to be as large as the largest case so far, so that no file is opened to know that.
    """

    def __init__(
        self,
        model: Model,
        cases: Sequence[Case],
        job: _Job,
        execution: Execution,
        told: _Told,
        task: Task,
        readers: ThreadPoolExecutor,
        writers: ThreadPoolExecutor,
    ) -> None:
        self._model, self._job, self._task, self._progress = model, job, task, execution.progress
        self._told = told
        self._readers, self._writers, self._workers = readers, writers, execution.workers or 1
        self._inner = tasks_only(execution.progress) if len(cases) == 1 else SILENT  # a single case may be large
        self._room = Room.of(job.memory_gb, None).gb * 2**30
        self._rest, self._largest = deque(cases), 0
        self._ahead: deque[tuple[Case, Future[Prepared]]] = deque()
        self._behind: deque[tuple[Case, int, Future[_Written]]] = deque()
        self._again: list[Case] = []
        self._problems: list[Problem] = []

    def predict(self) -> list[Problem]:
        """Predict all cases; return what is wrong with those that cannot be used."""
        self._read_ahead()
        while self._ahead:
            self._predict_next()
            self._read_ahead()
            while self._behind and (
                len(self._behind) > _WRITES_WAITING or not self._ahead or self._held() > self._room
            ):
                case, _, written = self._behind.popleft()
                self._finish(case, written.result)
                self._read_ahead()
        for case in self._again:
            self._finish(case, partial(self._job.predict, self._model, case, self._inner), last=True)
        return self._problems

    def _held(self) -> int:
        return len(self._ahead) * self._largest + sum(size for _, size, _ in self._behind)

    def _read_ahead(self) -> None:
        while self._rest and len(self._ahead) <= self._workers:
            if self._ahead and (not self._largest or self._held() + self._largest > self._room):
                return
            case = self._rest.popleft()
            self._ahead.append((case, self._readers.submit(self._job.prepare, self._model, case)))

    def _predict_next(self) -> None:
        case, future = self._ahead.popleft()
        try:
            prepared = future.result()
            size = _bytes_for(self._model, prepared.grid)
            self._largest = max(self._largest, size)
            self._read_ahead()
            kept = KeptWarnings(self._inner)
            fields = self._model.logits(prepared, progress=kept)
            write = partial(self._job.write, self._model, case, prepared, fields, kept.warnings)
            if prepared.streamed is None:
                self._behind.append((case, size, self._writers.submit(write)))
                return
        except (*CASE_FAILURES, OSError) as error:
            self._failed(case, error)
            return
        self._finish(case, write)  # the networks are at work while it is written

    def _finish(self, case: Case, written: Callable[[], _Written], *, last: bool = False) -> None:
        try:
            warnings, quality = written()
            self._told(case.id, quality)
            for item in warnings:
                self._progress.warn(item)
        except (*CASE_FAILURES, OSError) as error:
            self._failed(case, error, last=last)
        else:
            self._task.advance(1, case.id)

    def _failed(self, case: Case, error: Exception, *, last: bool = False) -> None:
        if is_memory_shortage(error) and not last:  # there may be enough when the case is alone
            self._again.append(case)
            return
        self._problems.append(failure_of(case.id, error, case.images))
        self._task.advance(1, case.id)


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


def _predict_case(source: ModelSource, job: _Job, token: str, case: Case) -> tuple[_Written, Problem | None]:
    """Predict a case; return the warnings about it, its quality, and what is wrong with it if it cannot be used."""
    model = _loaded(source, token)
    try:
        return job.predict(model, case, SILENT), None
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
    try:
        return _bytes_for(model, read_grid(case.images[0], case.spacing_mm))
    except InputError:  # told when it is read
        return 1


def _bytes_for(model: Model, grid: Grid) -> int:
    return max(1, int(model.forecast_gb(grid) * 2**30))


@contextmanager
def _threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """Open a thread pool; what has not begun when the block ends, by an error or not, is dropped."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
