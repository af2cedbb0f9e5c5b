"""A model as one zip: read in place, and what no model has is refused before it is read."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_bundle import manifest, states

from segfit.bundle.bundle import MANIFEST, open_bundle, write_bundle, write_zip
from segfit.cli.main import run
from segfit.errors import InputError
from segfit.inference.open_model import is_model, open_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "model"
    write_bundle(path, manifest(), states())
    return path


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zip") / "model.zip"
    bundle = open_bundle(folder)
    write_zip(path, bundle.manifest, {name: bundle.stored(name) for name in bundle.manifest.files})
    return path


def test_a_zip_is_the_folder(folder: Path, packed: Path, tmp_path: Path) -> None:
    first, second = open_bundle(folder), open_bundle(packed)
    assert first.manifest == second.manifest
    for name in first.manifest.files:
        one, two = first.weights(name), second.weights(name)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert is_model(packed)
    assert open_model(packed).manifest == first.manifest
    assert run(["info", str(packed)]) == 0
    bundle = open_bundle(packed)
    write_zip(tmp_path / "again.zip", bundle.manifest, {name: bundle.stored(name) for name in bundle.manifest.files})
    assert open_bundle(tmp_path / "again.zip").manifest.checksums == first.manifest.checksums
    with pytest.raises(InputError, match="exists already"):
        write_zip(tmp_path / "again.zip", bundle.manifest, {})
    assert [path.name for path in tmp_path.iterdir()] == ["again.zip"]
    with zipfile.ZipFile(tmp_path / "nested.zip", "w") as archive:  # as people pack folders
        for file in folder.iterdir():
            archive.write(file, f"my model/{file.name}")
    assert open_bundle(tmp_path / "nested.zip").manifest == first.manifest


def entries(packed: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(packed) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, content: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


OUTSIDE = ["../evil.json", "/tmp/segfit-evil.json", "a/b/evil.json", "..", "C:\\evil", "sub/model.json", "\\\\host\\x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_elsewhere(packed: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.zip"
    rewritten(path, entries(packed) | {name: b"{}"})
    with pytest.raises(InputError, match="which no model has"):
        open_model(path)
    assert [file.name for file in tmp_path.rglob("*")] == ["m.zip"]
    assert not Path("/tmp/segfit-evil.json").exists()


def bomb(content: dict[str, bytes]) -> dict[str, bytes]:
    return content | {"weights-2d-0.safetensors": bytes(2**28)}


def lies_about_its_size(path: Path, content: dict[str, bytes]) -> None:
    """One entry says that it holds more than its bytes."""
    rewritten(path, content)
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    struct.pack_into("<I", data, place + 24, 2**31)
    path.write_bytes(data)


FAULTS: dict[str, Callable[[Path, dict[str, bytes]], None]] = {
    "bomb": lambda path, content: rewritten(path, bomb(content)),
    "size": lies_about_its_size,
    "other packing": lambda path, content: rewritten(path, content, zipfile.ZIP_BZIP2),
    "lzma": lambda path, content: rewritten(path, content, zipfile.ZIP_LZMA),
    "no manifest": lambda path, content: rewritten(path, {k: v for k, v in content.items() if k != MANIFEST}),
    "no weights": lambda path, content: rewritten(path, {MANIFEST: content[MANIFEST]}),
    "manifest of bytes": lambda path, content: rewritten(path, content | {MANIFEST: b"\xff\xfe\0"}),
    "manifest of numbers": lambda path, content: rewritten(path, content | {MANIFEST: b"3"}),
    "manifest deep": lambda path, content: rewritten(path, content | {MANIFEST: b"[" * 100_000}),
    "manifest twice": lambda path, content: rewritten(path, content | {MANIFEST: b'{"a": 1, "a": 2}'}),
    "pickle for weights": lambda path, content: rewritten(path, content | {"weights-2d-0.safetensors": b"\x80\x02."}),
    "empty weights": lambda path, content: rewritten(path, content | {"weights-2d-1.safetensors": b""}),
    "first half": lambda path, content: path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2]),
    "last half": lambda path, content: path.write_bytes(path.read_bytes()[len(path.read_bytes()) // 2 :]),
    "empty": lambda path, content: path.write_bytes(b""),
    "text": lambda path, content: path.write_bytes(b"not a zip"),
    "no entry": lambda path, content: path.write_bytes(b"PK\x05\x06" + bytes(18)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_zips_are_refused_in_a_sentence(packed: Path, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "m.zip"
    shutil.copyfile(packed, path)
    FAULTS[fault](path, entries(packed))
    with pytest.raises(InputError) as refused:
        open_model(path)
    assert "m.zip" in refused.value.problem
    assert "\n" not in refused.value.problem


def test_two_files_of_one_name(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about what this test is for
        for name, data in entries(packed).items():
            archive.writestr(name, data)
        archive.writestr(MANIFEST, b"{}")
    with pytest.raises(InputError, match="two files of one name"):
        open_model(path)


@pytest.mark.parametrize("position", range(0, 100, 4))
def test_no_flipped_byte_goes_unseen(packed: Path, tmp_path: Path, position: int) -> None:
    """Wherever a byte changes the model is refused, or it is what it was."""
    data = bytearray(packed.read_bytes())
    data[len(data) * position // 100] ^= 0xFF
    path = tmp_path / "m.zip"
    path.write_bytes(data)
    try:
        found = open_bundle(path)
    except InputError:
        return
    expected = open_bundle(packed)
    assert found.manifest == expected.manifest
    for name in expected.manifest.files:
        one, two = found.weights(name), expected.weights(name)
        assert all(torch.equal(one[key], two[key]) for key in two)


def header(content: dict[str, object], data: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


WEIGHTS = {
    "longer header": struct.pack("<Q", 2**62) + b"{}",
    "no header": b"\0" * 4,
    "header of text": struct.pack("<Q", 4) + b"what",
    "offsets beyond the end": header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    "offsets backwards": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    "shape of its own": header({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 4]}}, bytes(4)),
    "negative shape": header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    "type of its own": header({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "other names": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "nothing": header({}),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("fault", WEIGHTS)
def test_weights_of_faults_are_refused_where_checksums_agree(
    folder: Path, tmp_path: Path, fault: str, *, zipped: bool
) -> None:
    from segfit.inference.model import load_model

    name = "weights-2d-0.safetensors"
    file = tmp_path / name
    file.write_bytes(WEIGHTS[fault])
    bundle = open_bundle(folder)
    weights = {one: file if one == name else bundle.stored(one) for one in bundle.manifest.files}
    if zipped:
        write_zip(tmp_path / "m.zip", bundle.manifest, weights)
    else:
        write_bundle(tmp_path / "m", bundle.manifest, weights)
    with pytest.raises(InputError) as refused:
        load_model(tmp_path / ("m.zip" if zipped else "m"), "cpu")
    assert name in refused.value.problem
    assert "\n" not in refused.value.problem


def test_weights_that_are_not_finite_or_of_another_type(folder: Path, tmp_path: Path) -> None:
    from segfit.inference.model import load_model

    bundle = open_bundle(folder)
    name = bundle.manifest.files[0]
    for value in (float("nan"), float("inf")):
        state = {key: tensor.clone() for key, tensor in bundle.weights(name).items()}
        next(iter(state.values())).view(-1)[0] = value
        write_bundle(
            tmp_path / "m", bundle.manifest, {one: bundle.stored(one) for one in bundle.manifest.files} | {name: state}
        )
        with pytest.raises(InputError, match="not finite"):
            load_model(tmp_path / "m", "cpu")
