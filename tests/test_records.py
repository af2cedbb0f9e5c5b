"""Results as a session knows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from segfit import records
from segfit.files import Document
from segfit.records import Key, Results, store

KEY, OTHER = (Key(stage="stage", version=1, made_of={"number": number}) for number in (1, 2))


class _Number(Document):
    value: int


class _Named(Document):
    name: str


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The JSON files that were read."""
    found: list[Path] = []

    def reading(path: Path) -> object:
        found.append(path)
        return original(path)

    original = records.read_json
    monkeypatch.setattr(records, "read_json", reading)
    return found


def test_a_result_is_read_once_and_counts_under_its_key_alone(tmp_path: Path, read: list[Path]) -> None:
    path, results = tmp_path / "a.json", Results()
    assert results.recall(_Number, path, KEY) is None
    assert store(_Number(value=1), path, KEY) == _Number(value=1)
    for _ in range(3):
        assert results.recall(_Number, path, KEY) == _Number(value=1)
        assert results.recall(_Number, path, OTHER) is None
        assert results.recall(_Number, path) == _Number(value=1)
    assert read == [path]
    assert results.recall(_Named, path) is None  # another kind is not what was read


def test_what_a_session_stored_itself_is_not_read(tmp_path: Path, read: list[Path]) -> None:
    path, results = tmp_path / "a.json", Results()
    results.store(_Number(value=1), path, KEY)
    assert results.recall(_Number, path, KEY) == _Number(value=1)
    assert read == []


def test_what_others_stored_meanwhile_is_read(tmp_path: Path) -> None:
    path, results = tmp_path / "a.json", Results()
    for value in range(3):
        results.store(_Number(value=value), path, KEY)
        store(_Number(value=value + 1), path, OTHER)
        assert results.recall(_Number, path, KEY) is None
        assert results.recall(_Number, path, OTHER) == _Number(value=value + 1)
    path.unlink()
    assert results.recall(_Number, path, OTHER) is None


def test_a_bit_that_is_flipped_meanwhile_is_found(tmp_path: Path) -> None:
    path, results = tmp_path / "a.json", Results()
    results.store(_Number(value=1), path, KEY)
    path.write_bytes(path.read_bytes().replace(b'"value": 1', b'"value": 3'))
    assert results.recall(_Number, path, KEY) is None


def test_any_file_may_be_looked_into_once(tmp_path: Path) -> None:
    path, results = tmp_path / "a", Results()
    assert results.read(path, Path.read_bytes) is None
    path.write_bytes(b"one")
    assert results.read(path, Path.read_bytes) is results.read(path, Path.read_bytes)
    assert results.read(path, lambda _: b"else", "else") == b"else"
    path.write_bytes(b"other")
    assert results.read(path, Path.read_bytes) == b"other"
