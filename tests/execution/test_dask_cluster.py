"""Cases done by real workers of dask on loopback."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pool_tasks
import pytest
from dask_processes import DaskProcesses

from segfit.cli.main import run
from segfit.dataset.checks import check_dataset
from segfit.dataset.layouts import open_dataset
from segfit.dataset.phantom import make_phantom
from segfit.errors import CasesFailedError, InputError, StageError
from segfit.evaluation.summary import Summary
from segfit.execution import dask_where
from segfit.execution.execution import Execution
from segfit.progress import SILENT, KeptWarnings, Task
from segfit.project import Project

pytest.importorskip("distributed", reason="the extra cluster is not installed")
pytestmark = pytest.mark.cluster

_LOOPBACK = {"127.0.0.1", "::1"}


def _one(_: object) -> int:
    return 1


def _threads(_: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.endswith("_THREADS")}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "Dataset001_Volumes"
    return make_phantom(folder, cases=8, test_cases=1, shape=(8, 16, 16))


@pytest.fixture
def four(tmp_path: Path) -> Iterator[DaskProcesses]:
    with DaskProcesses(tmp_path) as cluster:
        for _ in range(4):
            cluster.start()
        yield cluster


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskProcesses]:
    """Two workers that nobody kills: one of them is large and has a GPU, and begins four cases at once."""
    with DaskProcesses(tmp_path_factory.mktemp("pair")) as cluster:
        cluster.start("--resources", "MEMORY=1000 GPU=1", "--nthreads", "4")
        cluster.start("--resources", "MEMORY=100 GPU=0")
        yield cluster


@contextmanager
def _open(cluster: DaskProcesses, **options: Any) -> Iterator[Execution]:
    with Execution.by("dask", cluster.address, progress=SILENT, **options) as execution:
        alive = sum(worker.poll() is None for worker in cluster.workers)
        pool_tasks.wait_for(lambda: len(execution.engine._workers) == alive)  # type: ignore[union-attr]
        yield execution


class _Killing(KeptWarnings):
    """Kills workers of a cluster when the first case of a task is done."""

    def __init__(self, cluster: DaskProcesses, *numbers: int) -> None:
        super().__init__(SILENT)
        self._cluster, self._numbers = cluster, list(numbers)

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Task]:
        with super().task(description, total) as task:
            yield self
        del task

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        if self._numbers:
            self._cluster.kill(self._numbers.pop())


def test_two_of_four_workers_are_killed_and_the_results_are_those_of_the_pool(
    four: DaskProcesses, dataset: Path, tmp_path: Path
) -> None:
    settings = ["planning.folds=0", "planning.base_features=4"]
    here = Project.create(tmp_path / "here", dataset, settings=settings)
    with _open(four) as execution:
        killing = Execution(engine=execution.engine, progress=_Killing(four, 0, 1))
        far = Project.create(tmp_path / "far", dataset, settings=settings, execution=killing)
        assert far.check() == here.check() == check_dataset(open_dataset(dataset), execution=killing)
        assert [worker.poll() is None for worker in four.workers] == [False, False, True, True]
        assert far.fingerprint() == here.fingerprint()
        assert far.preprocess() == here.preprocess()
    stored = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.b2nd")}
        for folder in (here.folder.cases, far.folder.cases)
    ]
    assert stored[0] == stored[1]
    assert len(stored[0]) > 8
    assert {path.name for path in far.folder.cases.parent.glob(".segfit-*")} == set()


def test_a_predicted_case_is_the_same_wherever_it_is_done(
    pair: DaskProcesses, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths may be relative, and workers are somewhere else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(dataset)
    tiny = ["--set", "training.steps=2", "--set", "planning.base_features=4", "--set", "planning.folds=0",
            "--set", "planning.configurations=2d"]  # fmt: skip
    assert run(["run", "data", "--out", "p", *tiny]) in (0, 3)
    by, cpu = ["--executor", "dask", "--cluster", pair.address], ["--device", "cpu", "--overlays"]
    for folder, given in (("here", []), ("far", by)):
        assert run(["predict", "data/imagesTs", "--model", "p", "-m", "p/model", "-o", folder, *cpu, *given]) == 0
    names = [str(path.relative_to("here")) for path in Path("here").rglob("*.*")]
    assert len(names) == 2
    assert [Path("here", name).read_bytes() for name in names] == [Path("far", name).read_bytes() for name in names]
    files = [Path(folder) / "scores.json" for folder in ("here", "far")]
    for file, given in zip(files, ([], by), strict=True):
        arguments = ["-p", "far", "-r", "data/labelsTs", "--model", "p/model", "--metrics", "surface", "-o", str(file)]
        assert run(["evaluate", *arguments, *given]) == 0
    here, far = (Summary.load(file) for file in files)
    assert here.mean == far.mean
    assert [case.metrics for case in here.cases] == [case.metrics for case in far.cases]


def test_a_poisonous_case_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    work = partial(pool_tasks.die_if, tmp_path)
    done: dict[str, str] = {}
    before, threads = _listening(), _threads("")
    with Execution.by("dask", "local:2", progress=SILENT) as execution:
        assert _threads("") == threads  # a training of this command has those that it would have
        its = dict(execution.map(_threads, "a", description="x", size=_one))["a"]
        assert its["OMP_NUM_THREADS"] == threads.get("OMP_NUM_THREADS", "1")
        assert execution.engine.slots == 2  # type: ignore[union-attr]
        results = execution.map(work, "abcd", description="x", name=lambda case: f"case-{case}", size=_one)
        with pytest.raises(CasesFailedError) as caught:
            done.update(item for item in results)
        assert done == {"a": "a", "c": "c", "d": "d"}
        (lost,) = caught.value.args[1]
        assert lost.case == "case-b"
        addresses = _listening() - before
        assert addresses
        assert {address.rpartition(":")[0] for address in addresses} <= _LOOPBACK
        assert [address for address in addresses if _answers(address)] == []
    tried = len(list(tmp_path.glob("b-*")))  # twice, and twice alone; where both workers were gone it was sent anew
    assert 4 <= tried <= 12


def _answers(address: str) -> bool:
    """Whether somebody without a certificate gets a page about the cluster."""
    for path in ("health", "info/main/workers.html", "metrics"):
        try:
            with urllib.request.urlopen(f"http://{address}/{path}", timeout=10):
                return True
        except OSError:
            continue
    return False


def _listening() -> set[str]:
    """The addresses that this process and those that it started listen at."""
    import psutil

    own = psutil.Process()
    found = [one for process in (own, *own.children(recursive=True)) for one in process.net_connections("tcp")]
    return {f"{one.laddr.ip}:{one.laddr.port}" for one in found if one.status == psutil.CONN_LISTEN}


def test_memory_and_gpu_decide_where_and_how_many(pair: DaskProcesses) -> None:
    with _open(pair) as execution:
        assert (execution.engine.slots, execution.memory_bytes) == (5, 1000)  # type: ignore[union-attr]
        for device in ("cuda", "auto"):
            found = dict(execution.map(pool_tasks.process, range(6), description="x", size=_one, device=device))
            assert set(found.values()) == {pair.workers[0].pid}
        large = dict(execution.map(pool_tasks.process, range(6), description="x", size=lambda _: 101))
        assert set(large.values()) == {pair.workers[0].pid}
        huge = dict(execution.map(pool_tasks.process, range(2), description="x", size=lambda _: 10**9))
        assert set(huge.values()) == {pair.workers[0].pid}


def test_what_a_worker_has_in_work_fits_into_its_memory(pair: DaskProcesses, tmp_path: Path) -> None:
    """Of its four threads those are used that there is memory for."""
    for size, most in ((400, 2), (200, 4)):
        folder = tmp_path / str(size)
        folder.mkdir()
        work = partial(pool_tasks.count_beside, folder, most)
        with _open(pair) as execution:
            beside = [n for _, n in execution.map(work, range(8), description="x", size=lambda _, size=size: size)]
        assert max(beside) == most


def test_workers_that_come_are_used_also_after_all_have_gone(tmp_path: Path) -> None:
    with DaskProcesses(tmp_path) as cluster:
        cluster.start()
        with _open(cluster) as execution:
            results = execution.map(
                partial(pool_tasks.hold_until, tmp_path / "go"), range(6), description="x", size=_one
            )
            found: list[int] = []
            thread = threading.Thread(target=lambda: found.extend(n for n, _ in results))
            thread.start()
            pool_tasks.wait_for(lambda: len(execution.engine._sent) == 2)  # type: ignore[union-attr]
            cluster.kill(0)
            pool_tasks.wait_for(lambda: not execution.engine._workers)  # type: ignore[union-attr]
            (tmp_path / "go").touch()
            cluster.start()
            cluster.start()
            thread.join(pool_tasks.PATIENCE_S)
            assert sorted(found) == list(range(6))


def test_without_workers_or_scheduler_the_work_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_where, "_PATIENCE_S", 1.0)
    with DaskProcesses(tmp_path) as cluster:
        with pytest.raises(InputError, match="has no worker"), _open(cluster):
            pass
        cluster.start()
        monkeypatch.setattr(dask_where, "_PATIENCE_S", 60.0)
        with _open(cluster) as execution:
            execution.engine._patience_s = 1.0  # type: ignore[union-attr]
            work = execution.map(partial(pool_tasks.hold_alive, str(tmp_path)), range(3), description="x", size=_one)
            threading.Timer(1.0, cluster.kill, [0]).start()
            with pytest.raises(StageError, match="has had no worker for its cases for 1 s"):
                list(work)
        cluster.start()
        with _open(cluster) as execution:
            work = execution.map(partial(pool_tasks.hold_alive, str(tmp_path)), range(3), description="x", size=_one)
            threading.Timer(1.0, cluster.scheduler.kill).start()
            with pytest.raises(StageError, match="the connection to the scheduler"):
                list(work)


def test_errors_and_what_stops_listening_leave_the_cluster_free(pair: DaskProcesses, tmp_path: Path) -> None:
    with _open(pair, workers=1) as execution:
        with pytest.raises(ValueError, match="0 is a bad number"):
            list(execution.map(pool_tasks.fail, range(9), description="x", size=_one))
        results = execution.map(pool_tasks.double, range(9), description="x", size=_one)
        assert next(results) == (0, 0)
        results.close()  # type: ignore[attr-defined]
        pool_tasks.wait_for(lambda: not any(execution.engine._client.processing().values()))  # type: ignore[union-attr]
        assert execution.engine._sent == {}  # type: ignore[union-attr]


def test_a_case_is_sent_again_where_its_result_was_lost(pair: DaskProcesses, tmp_path: Path) -> None:
    with _open(pair) as execution:
        engine: Any = execution.engine
        future = engine.submit(pool_tasks.hold_until, tmp_path / "go", 7)
        (first,) = engine._sent.values()
        first.distant.cancel()
        pool_tasks.wait_for(lambda: any(sent is not first for sent in list(engine._sent.values())))
        (tmp_path / "go").touch()
        assert future.result(pool_tasks.PATIENCE_S) == 7


def test_a_worker_of_another_version_is_refused_at_first_and_passed_over_later(tmp_path: Path, dataset: Path) -> None:
    facts = tmp_path / "old" / "segfit-0.0.9.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: segfit\nVersion: 0.0.9\n")
    with DaskProcesses(tmp_path) as cluster:
        old = {"PYTHONPATH": os.pathsep.join([str(facts.parent), DaskProcesses.places])}
        cluster.start()
        kept = KeptWarnings(SILENT)
        with Execution.by("dask", cluster.address, progress=kept) as execution:
            cluster.start(environment=old)
            pool_tasks.wait_for(lambda: bool(kept.warnings))
            found = dict(execution.map(pool_tasks.process, range(9), description="x", size=_one))
            assert set(found.values()) == {cluster.workers[0].pid}
        assert [item.code for item in kept.warnings] == ["worker_refused"]
        assert "has segfit 0.0.9" in kept.warnings[0].problem
        out = tmp_path / "project"
        assert (
            run(["preprocess", str(dataset), "--out", str(out), "--executor", "dask", "--cluster", cluster.address])
            == 2
        )
        assert not out.exists()


def test_files_that_workers_do_not_see_are_told_before_anything_is_done(
    pair: DaskProcesses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the current folder of a process is elsewhere for another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    own = Path("/proc/self/cwd")
    with _open(pair) as execution:
        execution.require_shared([tmp_path], [tmp_path / "new" / "project"])
        for inputs, outputs in (([own / "file"], []), ([own], []), ([], [own / "project"])):
            with pytest.raises(InputError, match="does not see /proc/self/cwd"):
                execution.require_shared(inputs, outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_worker_that_comes_and_does_not_see_the_files_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = KeptWarnings(SILENT)
    with DaskProcesses(tmp_path) as cluster:
        cluster.start("--resources", "GPU=0", cwd=tmp_path)
        with Execution.by("dask", cluster.address, progress=kept) as execution:
            execution.require_shared([Path("/proc/self/cwd/scheduler.json")], [Path("/proc/self/cwd/new")])
            with pytest.raises(InputError, match="has a GPU"):
                list(execution.map(pool_tasks.double, [1], description="x", size=_one, device="cuda"))
            cluster.start()
            pool_tasks.wait_for(lambda: bool(kept.warnings))
            found = dict(execution.map(pool_tasks.process, range(5), description="x", size=_one, device="auto"))
            assert set(found.values()) == {cluster.workers[0].pid}
    assert [item.code for item in kept.warnings] == ["worker_refused"]
    assert "does not see /proc/self/cwd" in kept.warnings[0].problem


@pytest.mark.parametrize(
    ("cluster", "told"),
    [
        (None, "needs a cluster"),
        ("local:0", "has no worker"),
        ("local:two", "cannot be read"),
        ("tcp://somewhere", "got tcp://somewhere"),
        ("ftp://somewhere:1", "got ftp://somewhere:1"),
        ("tls://127.0.0.1:1", "asks for a certificate"),
        ("absent.yaml", "cannot be read"),
        ("odd.yaml", "is not YAML"),
        ("nothing.yaml", "nothing.yaml"),
        ("unknown.yaml", "clas"),
        ("package.yaml", "no_such_package"),
        ("client.yaml", "no cluster of dask"),
        ("option.yaml", "threds"),
    ],
)
def test_what_is_no_cluster_is_told_in_a_sentence(
    cluster: str | None, told: str, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "odd": "a: [1",
        "nothing": "",
        "unknown": "{module: distributed, class: LocalCluster, clas: 1}",
        "package": "{module: no_such_package, class: LocalCluster}",
        "client": "{module: distributed, class: Client}",
        "option": "{module: distributed, class: LocalCluster, kwargs: {n_workers: 1, processes: false, threds: 1}}",
    }.items():
        Path(f"{name}.yaml").write_text(text)
    given = [] if cluster is None else ["--cluster", cluster]
    assert run(["preprocess", str(dataset), "--out", "p", "--executor", "dask", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not Path("p").exists()


def test_a_scheduler_that_is_not_there_is_told(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    with closing(socket.socket()) as free, pytest.MonkeyPatch.context() as patch:
        free.bind(("127.0.0.1", 0))
        patch.setattr(dask_where, "_ANSWER_S", 1.0)
        given = ["--executor", "dask", "--cluster", f"tcp://127.0.0.1:{free.getsockname()[1]}"]
        assert run(["check", str(dataset), "--out", str(tmp_path / "p"), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no scheduler of dask answers" in line
    assert not (tmp_path / "p").exists()


def test_a_cluster_is_made_as_a_file_says(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("""
version: 1
module: distributed
class: LocalCluster
kwargs: {n_workers: 1, threads_per_worker: 2, processes: false, protocol: tcp, memory_limit: 1GB}
""")
    with Execution.by("dask", str(file), progress=SILENT) as execution:
        assert execution.engine.slots == 2  # type: ignore[union-attr]
        assert execution.memory_bytes == 0.8 * 10**9
        assert dict(execution.map(pool_tasks.double, [4], description="x", size=_one)) == {4: 8}
        assert {address.rpartition(":")[0] for address in _listening()} <= _LOOPBACK


def test_a_client_without_the_certificate_is_refused(tmp_path: Path) -> None:
    import dask
    from distributed import Security

    made = Security.temporary()
    files = {"ca-file": made.tls_ca_file, "cert": made.tls_client_cert, "key": made.tls_client_key}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    options = [part for name in files for part in (f"--tls-{name}", str(tmp_path / name))]
    with DaskProcesses(tmp_path, *options, protocol="tls") as cluster:
        cluster.start()
        host, port = cluster.address.removeprefix("tls://").rsplit(":", 1)
        stranger = ssl.create_default_context(cafile=tmp_path / "ca-file")
        stranger.check_hostname = False
        with (
            pytest.raises(ssl.SSLError),
            closing(socket.create_connection((host, int(port)))) as raw,
            stranger.wrap_socket(raw) as connection,
        ):
            connection.recv(1)  # TLS 1.3 tells it with the first answer
        for address in (cluster.address, f"tcp://{host}:{port}"):
            with pytest.raises(InputError), Execution.by("dask", address, progress=SILENT):
                pass
        names = {f"distributed.comm.tls.{name}": str(tmp_path / name.rpartition(".")[2])
                 for name in ("ca-file", "client.cert", "client.key")}  # fmt: skip
        with dask.config.set(names), Execution.by("dask", cluster.address, progress=SILENT) as execution:
            assert dict(execution.map(pool_tasks.double, [4], description="x", size=_one)) == {4: 8}
