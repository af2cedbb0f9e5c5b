"""Files appear whole or not at all, and documents say what is wrong with them."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from segfit.errors import InputError
from segfit.files import (
    Document,
    Record,
    content_hash,
    file_system_time,
    hash_file,
    missing_abilities,
    new_folder,
    partial_folder,
    read_arrays,
    read_json,
    remove_leftovers,
    replace_folder,
    write_arrays,
    write_bytes,
    write_file,
    write_json,
    write_text,
)
from segfit.owner import Owner


class Inner(Record):
    size: int


class Paper(Document):
    SCHEMA = 3
    schema_version: int = 3
    title: str
    inner: Inner


PAPER = Paper(title="phantom", inner=Inner(size=2))


def test_write_and_read(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "grün")
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "grün"
    write_bytes(tmp_path / "c", b"\x00\x01")
    assert (tmp_path / "c").read_bytes() == b"\x00\x01"
    write_json(tmp_path / "d.json", {"z": [1, 2.5], "a": None})
    assert read_json(tmp_path / "d.json") == {"z": [1, 2.5], "a": None}


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    write_bytes(path, b"old")

    def fill(handle: BinaryIO) -> None:
        handle.write(b"half of the n")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_file(path, fill)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_failed_write_names_the_file(tmp_path: Path) -> None:
    def fill(handle: BinaryIO) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write_file(tmp_path / "plan.json", fill)
    assert caught.value.filename == str(tmp_path / "plan.json")


def test_names_that_are_no_text_are_read_again(tmp_path: Path) -> None:
    name = os.fsdecode(b"Gef\xe4\xdfe")
    write_json(tmp_path / "a.json", {name: name})
    (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {name: name}


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", float("nan"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_takes_its_place_when_it_is_filled_or_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "above" / "model"
    for content in ("old", "newer"):
        with new_folder(target) as folder:
            (folder / content).touch()
        assert [path.name for path in target.iterdir()] == [content]
    with pytest.raises(FileNotFoundError), new_folder(target) as folder:
        (folder / "missing" / "half").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["above", "model", "newer"]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with new_folder(link) as folder:
        (folder / "new").touch()
    assert [path.name for path in link.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["above", "link"]


def left_by_a_killed_process(folder: Path, host: str) -> None:
    code = f"""
import os, socket
from pathlib import Path
from segfit.files import partial_folder, write_file

socket.gethostname = lambda: {host!r}
folder = Path({str(folder)!r})
(partial_folder(folder) / "a.json").touch()
write_file(folder / "a.json", lambda _: os._exit(9))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert len(list(folder.glob(".partial-*"))) == 2


def test_what_a_killed_process_left_is_removed_at_once(tmp_path: Path) -> None:
    (tmp_path / "whole.json").write_text("{}")
    left_by_a_killed_process(tmp_path, socket.gethostname())
    remove_leftovers(tmp_path.parent)
    assert len(list(tmp_path.iterdir())) == 3
    remove_leftovers(tmp_path.parent, deep=True)
    assert [p.name for p in tmp_path.iterdir()] == ["whole.json"]


@pytest.mark.parametrize("host", ["another", None])
def test_of_what_another_host_left_it_is_not_known_for_an_hour(tmp_path: Path, host: str | None) -> None:
    if host is None:
        (tmp_path / ".partial-as-older-versions-did").touch()
    else:
        left_by_a_killed_process(tmp_path, host)
    before = sorted(tmp_path.iterdir())
    for inside in before[0].rglob("*"):
        os.utime(inside, (0, time.time() - 4000))
    os.utime(before[0], (0, time.time() - 3000))
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    os.utime(before[0], (0, time.time() - 4000))
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == before[1:]


def test_a_folder_that_another_host_fills_stays(tmp_path: Path) -> None:
    folder = tmp_path / ".partial-00000000-1-x"
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "weights").touch()
    for path in (folder / "new", folder):
        os.utime(path, (0, time.time() - 4000))
    remove_leftovers(tmp_path)
    assert folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is not told")
def test_a_process_is_dead_before_its_parent_knows() -> None:
    code = "from segfit.owner import Owner; print(Owner.own().name, flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout is not None
        owner = Owner.of_name(process.stdout.readline())
        assert owner is not None
        assert not owner.is_dead()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert owner.is_dead()


def test_a_process_is_dead_whose_number_another_one_has(tmp_path: Path) -> None:
    own = Owner.own()
    assert Owner.of_name(f"{own.name}-x.json") == own
    assert not own.is_dead()
    assert not replace(own, started=0).is_dead()  # it is not known to be another one
    former = replace(own, started=own.started - 1)
    assert former.is_dead()
    (tmp_path / f".partial-{former.name}-x").touch()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_living_processes_write_stays(tmp_path: Path) -> None:
    partial = partial_folder(tmp_path)
    os.utime(partial, (0, time.time() - 1e6))
    remove_leftovers(tmp_path)
    assert partial.exists()


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_who_may_read_is_what_the_umask_says(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    code = (
        "import os, sys; from pathlib import Path; from segfit.files import new_folder, partial_folder, replace_folder;"
        "from segfit.files import write_json; from segfit.images.formats import write_labels;"
        "from segfit.images.image import LabelMap; from segfit.geometry import Grid; import numpy as np;"
        f"os.umask({umask}); root = Path({str(tmp_path)!r});"
        "write_json(root / 'a' / 'b.json', {}); replace_folder(root / 'a', root / 'c');"
        "made = partial_folder(root); (made / 'd').mkdir(); made.rename(root / 'moved');"
        "label = np.zeros((2, 3, 4), np.uint8); grid = Grid(label.shape, (1.0, 1.0, 1.0));"
        "[write_labels(root / f'e{end}', LabelMap(label, grid)) for end in ('.nii.gz', '.nrrd', '.mha', '.tif')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    found = sorted(tmp_path.rglob("*"))
    assert len(found) >= 10
    for path in found:
        assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EPERM])
def test_files_are_written_where_there_is_no_chmod_and_no_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    assert missing_abilities(tmp_path) == []
    monkeypatch.setattr(os, "chmod", refuse)
    assert missing_abilities(tmp_path) == ["chmod"]
    number = errno.EINVAL
    monkeypatch.setattr(os, "fsync", refuse)
    assert missing_abilities(tmp_path) == ["chmod", "fsync"]
    (tmp_path / "a" / "b").mkdir(parents=True)
    write_json(tmp_path / "a" / "b" / "c.json", {})
    replace_folder(tmp_path / "a", tmp_path / "d")
    replace_folder(tmp_path / "a", tmp_path / "d")
    assert read_json(tmp_path / "d" / "b" / "c.json") == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "d"]


@pytest.mark.parametrize("look", [file_system_time, missing_abilities])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path], object]
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system", "a partial file")

    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        look(tmp_path)
    assert caught.value.filename == str(tmp_path)


def test_a_disk_that_fails_is_no_file_system_without_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"), [(None, "a.json is missing"), (b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON")]
)
def test_unreadable_json(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "a.json")


def test_hashes() -> None:
    assert content_hash({"a": 1, "b": [2, 3]}) == content_hash({"b": [2, 3], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert len(content_hash(None)) == 16
    assert Inner(size=1).content_hash() != Inner(size=2).content_hash()


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert hash_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_document_round_trip(tmp_path: Path) -> None:
    PAPER.save(tmp_path / "paper.json")
    assert Paper.load(tmp_path / "paper.json") == PAPER
    assert json.loads((tmp_path / "paper.json").read_text())["schema_version"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "is not a segfit paper file: it has no schema_version"),
        ({"title": "x"}, "is not a segfit paper file"),
        ({"schema_version": 4}, r"written by a newer segfit \(schema 4, this one reads 3\); update segfit"),
        ({"schema_version": 3, "title": "x", "inner": {"size": "big"}}, "damaged: inner.size: .* delete it"),
        ({"schema_version": 3, "title": "x", "inner": {"size": 1}, "colour": 1}, "damaged: colour"),
    ],
)
def test_damaged_documents_are_explained(tmp_path: Path, content: object, message: str) -> None:
    write_json(tmp_path / "paper.json", content)
    with pytest.raises(InputError, match=message):
        Paper.load(tmp_path / "paper.json")


def test_records_are_frozen_and_strict() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner(size=1).size = 2  # type: ignore[misc]
    with pytest.raises(ValueError, match="Extra inputs"):
        Inner(size=1, weight=2)  # type: ignore[call-arg]


class Letter(Document):
    SCHEMA = 2
    SHARED = True
    schema_version: int = 2
    heading: str
    inner: Inner

    @classmethod
    def migrate(cls, content: dict[str, Any], version: int) -> dict[str, Any]:
        return content if version == 2 else {"heading": content.pop("title"), **content}


def test_shared_documents_ignore_unknown_fields(tmp_path: Path) -> None:
    write_json(
        tmp_path / "letter.json",
        {"schema_version": 2, "heading": "x", "colour": 1, "inner": {"size": 1, "weight": 2}},
    )
    assert Letter.load(tmp_path / "letter.json") == Letter(heading="x", inner=Inner(size=1))
    write_json(tmp_path / "letter.json", {"schema_version": 2, "heading": "x", "inner": {"size": "big"}})
    with pytest.raises(InputError) as caught:
        Letter.load(tmp_path / "letter.json")
    assert "inner.size" in caught.value.problem
    assert caught.value.action == "copy it again from where it came"


def test_documents_of_an_older_schema_are_migrated(tmp_path: Path) -> None:
    write_json(tmp_path / "letter.json", {"schema_version": 1, "title": "x", "inner": {"size": 1}})
    assert Letter.load(tmp_path / "letter.json").heading == "x"


def test_arrays_come_back_or_are_none_whatever_byte_is_damaged(tmp_path: Path) -> None:
    path, arrays = tmp_path / "arrays.npz", {"a": np.arange(200) % 7, "b": np.ones((2, 3), np.float32)}
    write_arrays(path, arrays)
    assert read_arrays(tmp_path / "none.npz") is None
    whole = path.read_bytes()
    unread = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :])
        found = read_arrays(path)
        unread += found is None
        for name, array in {} if found is None else found.items():
            np.testing.assert_array_equal(array, arrays[name])
    assert unread > len(whole) // 2
