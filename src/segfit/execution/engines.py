"""Who does work on cases: executors by name, of this package and of others, and what they are handed.

An executor is a module, or any object, with a function ``open_cases(cluster, workers, progress)``: a context manager
that yields a `concurrent.futures.Executor`. One of another package is an entry point of the group `segfit.executors`::

    [project.entry-points."segfit.executors"]
    grid = "my_grid"

and is asked for as ``my-package:grid``. `cluster` is what the user gave to say where or how, None where nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

from segfit.errors import InputError, nearest
from segfit.execution.scheduler import SCHEDULERS
from segfit.plugins import guarded, load_plugin
from segfit.progress import Progress

__all__ = ["POOL", "CaseWork", "ClusterExecutor", "does_cases", "open_executor"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

POOL = "pool"
"""The executor that is this machine: threads and processes, opened anew for each piece of work."""
_OWN: Mapping[str, str] = {"dask": "segfit.execution.dask_cluster"}  # modules that are imported when they are asked for


@dataclass(frozen=True)
class CaseWork(Generic[_Item, _Result]):
    """What an executor is handed: the work on one case, which it calls. Small and picklable if it has a size.

    Parameters
    ----------
    case : its name, which is that of the function too
    num_bytes : memory that it is predicted to take
    device : where its networks run, as in ``--device``; None: it has none
    """

    work: Callable[[_Item], _Result]
    item: _Item
    case: str
    num_bytes: int = 0
    device: str | None = None

    def __call__(self) -> _Result:
        """Do it."""
        return self.work(self.item)

    @property
    def __name__(self) -> str:
        """Name of the case."""
        return self.case


class ClusterExecutor(Executor):
    """An executor on other machines, which itself sees to it that what a worker has in work fits into its memory."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Cases that its workers can have in work at once, as many as there are now; 1 at least."""

    @property
    @abstractmethod
    def memory_bytes(self) -> float:
        """Memory that a case may take: that of the largest worker."""

    @abstractmethod
    def require_shared(self, inputs: Sequence[Path], outputs: Sequence[Path]) -> None:
        """Raise `InputError` if a worker does not see files that are there, or does not see what is written here."""


@contextmanager
def open_executor(name: str, cluster: str | None, workers: int | None, progress: Progress) -> Iterator[Executor]:
    """Open the executor of this name; raise `InputError` where it is not known, or does no work on cases."""
    found = _found(name)
    make = getattr(found, "open_cases", None)
    if make is None:
        raise InputError(f"the executor {name} does no work on cases", f"leave it out, or give {POOL}")
    opened = (
        make(cluster, workers, progress)
        if name in _OWN
        else guarded("executors", name, make)(cluster, workers, progress)
    )
    with opened as executor:
        if not isinstance(executor, Executor):
            problem = f"the executor {name} opened no concurrent.futures.Executor but {type(executor).__name__}"
            raise InputError(problem, "mend it, or leave it out")
        yield executor


def does_cases(name: str) -> bool:
    """Whether the executor of this name does work on cases; `slurm` and its like do whole commands instead."""
    return name == POOL or (name not in SCHEDULERS and hasattr(_found(name), "open_cases"))


def _found(name: str) -> Any:
    if name in _OWN:
        return import_module(_OWN[name])
    if ":" in name:
        return load_plugin("executors", name)
    known = (POOL, *_OWN, *SCHEDULERS)
    problem = f"executors are {', '.join(known)} and PACKAGE:NAME of other packages, got {name!r}"
    if name in SCHEDULERS:
        problem = f"the executor {name} does no work on cases, but whole runs"
    raise InputError(problem + nearest(name, known), "correct --executor")
