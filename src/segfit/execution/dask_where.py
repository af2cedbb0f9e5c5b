"""Which dask cluster is meant: ``tcp://HOST:PORT``, ``local:N``, or a YAML file that says what makes one."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from segfit.errors import InputError, reason_of

__all__ = ["connected"]

_PATIENCE_S = 60.0  # without a worker, where nobody is known to start one
_RESTART_S = 600.0  # where those that ended are started again here, however busy the machine is
_ANSWER_S = 10.0  # a scheduler that is there answers sooner
_LOOPBACK = "127.0.0.1"
_HERE: dict[str, Any] = {  # what clusters of this machine are made with, unless a file says otherwise
    "dashboard_address": f"{_LOOPBACK}:0",  # else it listens to everybody
    "silence_logs": logging.CRITICAL,
}
_FORMS = "tcp://HOST:PORT, tls://HOST:PORT, local:N or a YAML file"


class _ClusterFile(BaseModel):
    """A YAML file that says which class makes a cluster, as those of dask-ctl do, and how many workers it starts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    module: str
    made_by: Annotated[str, Field(alias="class")]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    workers: Annotated[int, Field(ge=1)] | None = None


@contextmanager
def connected(cluster: str | None) -> Iterator[tuple[Any, float]]:
    """Yield a client of the cluster, and how many seconds it may be without a worker: those of a file may queue."""
    try:
        from distributed import Client
        from distributed.utils import silence_logging_cmgr
    except ImportError:
        problem = "the executor dask needs the packages dask and distributed"
        raise InputError(problem, "pip install 'segfit[cluster]'") from None
    if cluster is None:
        raise InputError("the executor dask needs a cluster", f"give --cluster {_FORMS}")
    with ExitStack() as stack:
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL))  # what bears on cases is told by their executor
        target, patience_s = cluster, _PATIENCE_S
        if local := re.fullmatch(r"local:(\d+)", cluster):
            patience_s = _RESTART_S
            target = stack.enter_context(_local(int(local[1])))
        elif "://" not in cluster:
            patience_s = inf
            target = stack.enter_context(_of_file(Path(cluster).expanduser()))
        else:
            _require_address(cluster)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # versions of other packages; that of segfit is compared
                client = stack.enter_context(Client(target, timeout=_ANSWER_S, set_as_default=False))
        except OSError as error:
            problem = f"no scheduler of dask answers at {cluster} ({reason_of(error)})"
            raise InputError(problem, "correct --cluster, or start one with dask scheduler") from error
        yield client, patience_s


def _require_address(address: str) -> None:
    """Raise `InputError` for what is no address, or where the certificates for it are missing."""
    from distributed import Security

    found = re.fullmatch(r"(tcp|tls)://[^/\s]+:\d+", address)
    if found is None:
        raise InputError(f"--cluster is {_FORMS}, got {address}", "correct it")
    if found[1] == "tls" and Security().get_connection_args("client").get("ssl_context") is None:
        problem = f"{address} asks for a certificate, and the configuration of dask names none"
        raise InputError(problem, "set distributed.comm.tls in it: ca-file, client.cert and client.key")


@contextmanager
def _local(workers: int) -> Iterator[Any]:
    """Make a cluster on this machine that nobody else gets into, nor sees pages of: its certificate stays in memory."""
    import dask
    from distributed import LocalCluster, Security

    if not workers:
        raise InputError("--cluster local:0 has no worker", "give local:1 or more")
    try:
        security = Security.temporary()
    except ImportError:
        problem = "a dask cluster on this machine needs the package cryptography"
        raise InputError(problem, "pip install 'segfit[cluster]'") from None
    configured: dict[str, Any] = {f"distributed.{place}.http.routes": [] for place in ("scheduler", "worker")}
    configured["distributed.deploy.lost-worker-timeout"] = "1 day"  # one that takes 15 s to start again is not given up
    with (
        dask.config.set(configured | _own_threads()),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host=_LOOPBACK,
            protocol="tls",
            security=security,
            preload=["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],  # Ctrl-C is for who started them
            scheduler_kwargs={"allowed_failures": 1},  # one that ends two workers is tried alone
            **_HERE,
        ) as cluster,
    ):
        yield cluster


def _own_threads() -> dict[str, Any]:
    """Return the configuration by which workers set their numbers of threads themselves.

    By default dask sets them in the environment of who starts workers, and a training there would have one thread.
    """
    import dask

    place = "distributed.nanny"
    first, later = (dict(dask.config.get(f"{place}.{key}")) for key in ("pre-spawn-environ", "environ"))
    threads = {name: first.pop(name) for name in list(first) if name.endswith("_THREADS")}
    return {f"{place}.pre-spawn-environ": first, f"{place}.environ": threads | later}


@contextmanager
def _of_file(path: Path) -> Iterator[Any]:
    """Make the cluster that a file describes."""
    import dask
    from distributed import LocalCluster
    from distributed.deploy.cluster import Cluster

    asked = _read(path)
    try:
        make = getattr(import_module(asked.module), asked.made_by)
    except (ImportError, AttributeError) as error:
        problem = f"{path}: there is no class {asked.made_by} in {asked.module} ({reason_of(error)})"
        raise InputError(problem, "correct module and class, or install the package") from error
    if not (isinstance(make, type) and issubclass(make, Cluster)):
        raise InputError(f"{path}: {asked.made_by} of {asked.module} is no cluster of dask", "name a class of clusters")
    given = (_HERE if issubclass(make, LocalCluster) else {}) | asked.kwargs
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(_own_threads()))
        try:
            cluster = stack.enter_context(make(*asked.args, **given))
            if asked.workers is not None:
                cluster.scale(asked.workers)
        except Exception as error:  # whatever the class raises
            first: BaseException = error
            while first.__cause__ is not None:
                first = first.__cause__
            problem = f"{path}: {asked.made_by} cannot be made ({first})"
            raise InputError(problem, "correct args and kwargs in the file") from error
        yield cluster


def _read(path: Path) -> _ClusterFile:
    import yaml

    try:
        return _ClusterFile.model_validate(yaml.safe_load(path.read_bytes()))
    except OSError as error:
        problem = f"--cluster is {_FORMS}, and {path} cannot be read ({reason_of(error)})"
        raise InputError(problem, "correct --cluster") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML ({reason_of(error)})", "correct it") from error
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{path}: {what}: {first['msg']}", "it has module, class, args, kwargs and workers") from error
