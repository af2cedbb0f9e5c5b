"""Datasets in object storage: a server of S3 on loopback, and fsspec's storage in memory where any will do."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from tiny_runs import SET, UNTRUSTED

from segfit.cli.main import run
from segfit.dataset import object_storage
from segfit.dataset.object_storage import fetch, url_of
from segfit.errors import InputError
from segfit.execution.execution import Execution
from segfit.progress import SILENT
from segfit.project import Project

QUIET = Execution(progress=SILENT)
SECRET = "a-secret-of-this-test"
NO_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": None,
    "AWS_SECRET_ACCESS_KEY": None,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of S3 on loopback; its address."""
    pytest.importorskip("s3fs", reason="needs segfit[s3]")
    served = pytest.importorskip("moto.server", reason="needs moto and flask")
    running = served.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


def use(monkeypatch: pytest.MonkeyPatch, address: str, **changes: str | None) -> Any:
    """Point all that reads the environment to a server; return what writes there."""
    import s3fs

    credentials = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (NO_CREDENTIALS | credentials | {"AWS_ENDPOINT_URL": address} | changes).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return s3fs.S3FileSystem()


@pytest.fixture
def storage(server: str, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The storage with the dataset in the bucket `data`."""
    found = use(monkeypatch, server)
    if not found.exists("data"):
        found.mkdir("data")
    found.put(str(dataset), "data/set/", recursive=True)
    yield found
    found.rm("data", recursive=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_on_a_url_is_the_run_on_the_folder(
    storage: Any, dataset: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, out = f"s3://data/set/{dataset.name}", tmp_path / "p"
    assert run(["run", url, "--out", str(out), *SET]) == UNTRUSTED
    assert contents(out / "dataset" / dataset.name) == contents(dataset)
    ours, theirs = (Project.open(folder).findings().selected for folder in (out, project))
    assert ours is not None
    assert theirs is not None
    assert ours.selection.candidates == theirs.selection.candidates
    assert all(SECRET.encode() not in content for content in contents(out).values())
    use(monkeypatch, "http://127.0.0.1:1", **NO_CREDENTIALS)  # what was fetched needs no storage
    moved = out.rename(tmp_path / "moved")
    assert run(["run", str(moved)]) == UNTRUSTED


@pytest.mark.slow
def test_images_at_a_url_are_predicted_and_no_copy_stays(
    storage: Any, dataset: Path, project: Path, tmp_path: Path
) -> None:
    images = dataset / "imagesTs"
    for place, out in ((f"s3://data/set/{dataset.name}/imagesTs", "a"), (str(images), "b")):
        assert run(["predict", "--model", str(project / "model"), place, "-o", str(tmp_path / out)]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(contents(tmp_path / "a")) == 2
    one = sorted(images.iterdir())[0].name
    there = f"s3://data/set/{dataset.name}/imagesTs/{one}"
    assert run(["predict", "--model", str(project / "model"), there, "-o", str(tmp_path / "c")]) == 0
    assert contents(tmp_path / "c").items() <= contents(tmp_path / "a").items()


def test_a_check_of_a_url_leaves_nothing(
    storage: Any, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(["check", f"s3://data/set/{dataset.name}/", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dataset"]["name"] == dataset.name
    assert facts["dataset"]["training_cases"] == 5
    assert not list(tmp_path.iterdir())


def test_only_what_changed_is_fetched_again(storage: Any, dataset: Path, tmp_path: Path) -> None:
    url = f"s3://data/set/{dataset.name}"
    copy = fetch(url, tmp_path, QUIET)
    assert contents(copy) == contents(dataset)
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    changed, gone, damaged = sorted(path for path in times if path.parent.name == "imagesTr")[:3]
    content = changed.read_bytes()[::-1]  # of the same size
    storage.pipe(f"{url}/imagesTr/{changed.name}", content)
    storage.rm(f"{url}/imagesTr/{gone.name}")
    storage.pipe(f"{url}/extra/", b"")  # as consoles mark folders
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1])
    assert fetch(url, tmp_path, QUIET) == copy
    assert changed.read_bytes() == content
    assert damaged.read_bytes() == whole
    assert not gone.exists()
    assert not (copy / "extra").exists()
    same = times.keys() - {changed, gone, damaged}
    assert {path: path.stat().st_mtime_ns for path in same} == {path: times[path] for path in same}
    with pytest.raises(InputError) as refused:
        fetch("s3://data/set", tmp_path, QUIET)
    assert url in refused.value.problem


@pytest.mark.parametrize("fault", ["endpoint", "bucket", "folder", "credentials", "denied", "gone"])
def test_what_fails_is_one_sentence(
    fault: str, server: str, storage: Any, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url = f"s3://data/set/{dataset.name}"
    if fault == "endpoint":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        use(monkeypatch, f"http://127.0.0.1:{port}")
    elif fault == "bucket":
        url = f"s3://nobody-has-this/{dataset.name}"
    elif fault == "folder":
        url = "s3://data/elsewhere"
    elif fault == "credentials":
        use(monkeypatch, server, **NO_CREDENTIALS)
    elif fault == "denied":
        refusing = SimpleNamespace(invalidate_cache=lambda: None, find=denied)
        monkeypatch.setattr(object_storage, "_opened", lambda _: (refusing, "data/set"))
    else:
        listed = object_storage._listed
        monkeypatch.setattr(object_storage, "_listed", lambda *given: after(listed(*given), storage, url))
    code = run(["run", url, "--out", str(tmp_path / "p"), *SET])
    told = " ".join(capsys.readouterr().err.split())
    assert code == 2
    assert url in told
    assert SECRET not in told
    assert "Traceback" not in told
    assert not (tmp_path / "p" / "project.json").exists()
    if fault == "gone":  # what was fetched is kept, and the same command goes on
        monkeypatch.undo()
        use(monkeypatch, server)
        storage.put(str(dataset / "imagesTr"), f"{url}/imagesTr", recursive=True)
        assert run(["check", url, "--out", str(tmp_path / "p")]) == 0


def denied(*_: Any, **__: Any) -> None:
    raise PermissionError("Access Denied")


def after(listed: Any, storage: Any, url: str) -> Any:
    """Return what was listed when one of the files has gone."""
    storage.rm(next(key for path, (_, _, key) in listed[0].items() if path.startswith("imagesTr/")))
    return listed


@pytest.fixture
def memory(dataset: Path) -> Iterator[str]:
    """The dataset in fsspec's storage in memory."""
    found = fsspec.filesystem("memory")
    for path in dataset.rglob("*"):
        if path.is_file():
            found.pipe(f"/data/{dataset.name}/{path.relative_to(dataset).as_posix()}", path.read_bytes())
    yield f"memory://data/{dataset.name}"
    found.rm("/data", recursive=True)


def test_any_storage_of_fsspec_will_do_and_a_table_brings_its_folder(
    memory: str, dataset: Path, tmp_path: Path
) -> None:
    rows = [
        f"{path.name[:-7]},imagesTr/{path.name[:-7]}_0000.nii.gz,labelsTr/{path.name}"
        for path in sorted((dataset / "labelsTr").iterdir())
    ]
    fsspec.filesystem("memory").pipe(f"/data/{dataset.name}/cases.csv", "\n".join(["case,image,label", *rows]).encode())
    project = Project.create(tmp_path / "p", f"{memory}/cases.csv", execution=QUIET)
    assert project.dataset.root == tmp_path / "p" / "dataset" / dataset.name / "cases.csv"
    assert not any(item.fatal for item in project.check())
    again = Project.open(tmp_path / "p", execution=QUIET)
    assert again.dataset.root == project.dataset.root
    with pytest.raises(InputError):
        Project.create(tmp_path / "p", "memory://data", execution=QUIET)


@pytest.mark.parametrize("url", ["zip://x", "file:///nowhere/at/all", "file:/nowhere/at/all", "memory://nothing"])
def test_other_protocols_are_refused_in_one_sentence(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        fetch(str(url_of(url)), tmp_path, QUIET)
    assert ("file:///nowhere" in refused.value.problem) == url.startswith("file")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "a//b", "back\\slash"])
def test_keys_that_lead_elsewhere_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = f"b/set/{name}"
    fake = SimpleNamespace(
        invalidate_cache=lambda: None, find=lambda *_, **__: {key: {"type": "file", "size": 1, "ETag": "x"}}
    )
    monkeypatch.setattr(object_storage, "_opened", lambda url: (fake, "b/set"))
    with pytest.raises(InputError) as refused:
        fetch("s3://b/set", tmp_path, QUIET)
    assert repr(key) in refused.value.problem
    assert not list(tmp_path.iterdir())


def test_a_copy_that_does_not_fit_is_not_begun(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(InputError):
        fetch(memory, tmp_path, QUIET)
    assert not list(tmp_path.iterdir())


def test_credentials_in_a_url_are_refused() -> None:
    for url in ("s3://key:secret@bucket/x", "https://host/set?X-Amz-Signature=1", "az://set?sv=1&sig=2"):
        with pytest.raises(InputError) as refused:
            url_of(url)
        assert "secret" not in str(refused.value)


def test_what_is_a_url(tmp_path: Path) -> None:
    assert url_of("s3://bucket/a/") == "s3://bucket/a"
    assert url_of(Path("s3://bucket/a")) == "s3://bucket/a"  # which makes one slash of two
    for place in ("C:/data", "data", tmp_path, 3, None, "s3:"):
        assert url_of(place) is None


def test_other_folders_of_that_name_are_left_alone(memory: str, tmp_path: Path) -> None:
    (tmp_path / "p" / "dataset").mkdir(parents=True)
    (tmp_path / "p" / "dataset" / "mine.txt").write_text("mine")
    with pytest.raises(InputError):
        Project.create(tmp_path / "p", memory, execution=QUIET)
    assert [path.name for path in (tmp_path / "p" / "dataset").iterdir()] == ["mine.txt"]
    shutil.rmtree(tmp_path / "p")
