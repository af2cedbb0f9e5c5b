from __future__ import annotations

import errno
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Condition
from typing import Any

import blosc2
import nibabel
import numpy as np
import pytest

from segfit.dataset.annotation import read_labels
from segfit.dataset.manifest import Case
from segfit.errors import InputError, StageError
from segfit.execution.execution import Execution
from segfit.files import content_hash, hash_file
from segfit.geometry import Grid
from segfit.images.formats import read_grid
from segfit.images.image import Image
from segfit.labels import LabelScheme
from segfit.preprocessing import dataset as dataset_module
from segfit.preprocessing import store as store_module
from segfit.preprocessing.dataset import preprocess_dataset, verify_store
from segfit.preprocessing.pipeline import Preprocessed, preprocess
from segfit.preprocessing.store import CaseStore, StoredCase
from segfit.progress import SILENT, KeptWarnings
from segfit.records import record_of
from segfit.specs import Normalization, PreprocessingSpec, ResamplingSpec

_SCHEME = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
_SPEC = PreprocessingSpec(
    orientation="stored",
    transpose=(0, 1, 2),
    spacing_mm=(2.0, 1.0, 1.0),
    normalization=(Normalization(scheme="zscore"),),
)


def _preprocessed(shape: tuple[int, ...] = (40, 50, 60), channels: int = 2, *, label: bool = True) -> Preprocessed:
    rng = np.random.default_rng(0)
    grid = Grid(shape, (1.0,) * len(shape))
    image = Image(rng.standard_normal((channels, *shape)).astype(np.float32), grid)
    labels = Image(rng.integers(0, 3, (1, *shape)).astype(np.int16), grid) if label else None
    spec = PreprocessingSpec(
        orientation="stored",
        transpose=tuple(range(len(shape))),
        spacing_mm=(None,) * len(shape),
        normalization=(Normalization(scheme="none"),) * channels,
    )
    return preprocess(image, labels, spec, _SCHEME, "case")


def _dataset(folder: Path, count: int = 3) -> tuple[Case, ...]:
    rng = np.random.default_rng(5)
    cases = []
    for index in range(count):
        image, label = folder / f"c{index}_0000.nii.gz", folder / f"c{index}.nii.gz"
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        voxels = rng.uniform(1, 100, (12, 11, 10)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(voxels, affine), image)
        nibabel.save(nibabel.Nifti1Image((voxels > 60).astype(np.uint8), affine), label)
        cases.append(Case(id=f"c{index}", images=(image,), label=label))
    return tuple(cases)


@pytest.mark.parametrize("shape", [(40, 50, 60), (3, 130, 70), (70, 90), (1, 1, 5), (2, 1)])
@pytest.mark.parametrize("slicewise", [False, True])
def test_what_is_added_is_read_back_whole_and_in_part(tmp_path: Path, shape: tuple[int, ...], slicewise: bool) -> None:
    case = _preprocessed(shape)
    store = CaseStore(tmp_path / "cases")
    store.add("key", case, slicewise=slicewise)
    assert store.has("key")
    assert store.verify("key")
    stored = store.open("key")
    assert (stored.id, stored.shape, stored.channels) == ("case", shape, 2)
    assert stored.properties == case.properties
    assert case.labels is not None
    image, labels = stored.image(), stored.labels()
    assert labels is not None
    assert (image.dtype, labels.dtype) == (np.float32, np.int16)
    np.testing.assert_array_equal(image, case.image)
    np.testing.assert_array_equal(labels, case.labels)
    region = tuple(slice(n // 4, n // 4 + max(1, n // 2)) for n in shape)
    np.testing.assert_array_equal(stored.image(region), case.image[(slice(None), *region)])
    np.testing.assert_array_equal(stored.labels(region), case.labels[region])
    assert stored.locations.keys() == case.locations.keys()
    for name, found in case.locations.items():
        np.testing.assert_array_equal(stored.locations[name], found)


def test_case_without_label(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.add("key", _preprocessed(label=False))
    stored = store.open("key")
    assert stored.labels() is None
    assert stored.locations == {}


def test_a_patch_touches_few_chunks() -> None:
    assert store_module._block_shape((200, 300, 300), slicewise=False) == (32, 32, 32)
    assert store_module._block_shape((10, 300, 300), slicewise=False) == (10, 32, 64)
    assert store_module._block_shape((200, 300, 300), slicewise=True) == (1, 128, 256)
    assert store_module._block_shape((3, 1), slicewise=False) == (3, 1)


def test_a_case_goes_to_other_processes_as_its_place(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.add("a", _preprocessed())
    case = replace(store.open("a"), previous=tmp_path / "before.b2nd")
    sent = pickle.dumps(case)
    assert len(sent) < 1000
    assert len(sent) < sum(rows.nbytes for rows in case.locations.values())
    there: StoredCase = pickle.loads(sent)
    assert (there.id, there.shape, there.previous) == (case.id, case.shape, case.previous)
    np.testing.assert_array_equal(there.image(), case.image())
    assert there.locations.keys() == case.locations.keys()
    store.discard("a")
    with pytest.raises(StageError):
        pickle.loads(sent)


def test_many_threads_may_read_one_case(tmp_path: Path) -> None:
    case = _preprocessed()
    store = CaseStore(tmp_path)
    store.add("key", case)
    stored = store.open("key")

    def read(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        region = tuple(slice(start := int(rng.integers(0, n - 8)), start + 8) for n in case.image.shape[1:])
        return bool(np.array_equal(stored.image(region), case.image[(slice(None), *region)]))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(60)))


def test_threads_that_add_the_same_key_do_no_harm(tmp_path: Path) -> None:
    case = _preprocessed((10, 12, 14))
    barrier = Barrier(4)

    def add(_: int) -> None:
        barrier.wait()
        CaseStore(tmp_path).add("key", case)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert CaseStore(tmp_path).verify("key")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_what_a_killed_process_leaves_is_not_there(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    case = _preprocessed((10, 12, 14))
    store.add("whole", case)
    (tmp_path / "no-record").mkdir()
    (tmp_path / "no-record" / "image.b2nd").write_bytes(b"half")
    assert not store.has("no-record")
    with pytest.raises(StageError):
        store.open("no-record")
    store.add("no-record", case)  # replaces the ruin
    assert store.verify("no-record")
    assert store.keys() == ["no-record", "whole"]


def test_truncated_and_flipped_files_are_found(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.add("key", _preprocessed((10, 12, 14)))
    path = tmp_path / "key" / "image.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    assert store.has("key")
    assert not store.verify("key")
    path.write_bytes(content[:-1])
    assert not store.has("key")
    path.unlink()
    assert not store.verify("key")


def test_unreadable_chunk_is_one_clear_error(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.add("key", _preprocessed((10, 12, 14)))
    stored = store.open("key")
    (tmp_path / "key" / "image.b2nd").write_bytes(b"nothing of use")
    with pytest.raises(StageError) as raised:
        stored.image()
    assert isinstance(raised.value.__cause__, OSError | RuntimeError | ValueError)


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    store = CaseStore(tmp_path)
    with pytest.raises(StageError) as raised:
        store.add("key", _preprocessed((10, 12, 14)))
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_key_follows_content_not_names_of_folders(tmp_path: Path) -> None:
    (case,) = _dataset(tmp_path, 1)
    store = CaseStore(tmp_path / "cases")
    key = store.key(case, _SPEC, _SCHEME)
    other = tmp_path / "elsewhere"
    other.mkdir()
    moved = []
    for path in (*case.images, case.label):
        assert path is not None
        (other / path.name).write_bytes(path.read_bytes())
        moved.append(other / path.name)
    assert store.key(Case(id="c0", images=(moved[0],), label=moved[1]), _SPEC, _SCHEME) == key
    scores = _SPEC.model_copy(update={"resample_logits": ResamplingSpec(order=0)})
    assert store.key(case, scores, _SCHEME) == key
    finer = _SPEC.model_copy(update={"spacing_mm": (1.0, 1.0, 1.0)})
    assert store.key(case, finer, _SCHEME) != key
    assert store.key(case.model_copy(update={"label": None}), _SPEC, _SCHEME) != key
    (tmp_path / "c0.json").write_text('{"spacing": [1, 1, 1]}')
    assert store.key(case, _SPEC, _SCHEME) != key


def test_keys_of_stored_cases_stay(tmp_path: Path) -> None:
    """They are in the identities of trainings: the value is that of the version which kept no annotation."""
    for name, content in (("a_0000.png", b"image"), ("a.png", b"label")):
        (tmp_path / name).write_bytes(content)
    case = Case(id="a", images=(tmp_path / "a_0000.png",), label=tmp_path / "a.png")
    spec = PreprocessingSpec(orientation="stored", transpose=(0, 1), spacing_mm=(1.0, 1.0), normalization=())
    labels = LabelScheme.from_declaration({"background": 0, "one": 1})
    assert CaseStore(tmp_path / "cases").key(case, spec, labels) == "016750a7f476b572"


@pytest.mark.parametrize("version", [1, 2])
def test_cases_of_an_earlier_version_are_stored_anew_under_their_keys(tmp_path: Path, version: int) -> None:
    cases, store, warnings = _dataset(tmp_path, 1), CaseStore(tmp_path / "cases"), KeptWarnings(SILENT)
    keys = preprocess_dataset(cases, _SPEC, _SCHEME, store)
    folder = store.root / keys["c0"]
    old = json.loads((folder / "case.json").read_text())
    files, sizes = old.pop("record")["files"], old.pop("sizes")
    old |= {"key": keys["c0"], "files": {name: {"size": sizes[name], "sha256": files[name]} for name in files}}
    old |= {"schema_version": version}
    if version == 1:
        (folder / "annotation.b2nd").unlink()
        del old["files"]["annotation.b2nd"], old["properties"]["header"], old["properties"]["spacing_known"]
    old["seal"] = content_hash(old)
    (folder / "case.json").write_text(json.dumps(old))
    assert store.is_outdated(keys["c0"])
    assert not store.has(keys["c0"])
    assert verify_store(store) == ()
    assert preprocess_dataset(cases, _SPEC, _SCHEME, store, execution=Execution(progress=warnings)) == keys
    assert warnings.warnings == []
    assert not store.is_outdated(keys["c0"])
    assert store.verify(keys["c0"])
    assert store.open(keys["c0"]).annotation is not None


def test_a_case_has_the_record_of_what_it_was_made_from(tmp_path: Path) -> None:
    (case,) = _dataset(tmp_path, 1)
    store = CaseStore(tmp_path / "cases")
    key = preprocess_dataset((case,), _SPEC, _SCHEME, store)["c0"]
    record = record_of(store.root / key / "case.json")
    assert record is not None
    assert (record.stage, record.key) == ("preprocess", key)
    assert record.made_of == store.made_of(case, _SPEC, _SCHEME)
    assert content_hash(record.made_of) == key
    assert record.files == {
        path.name: hash_file(path) for path in (store.root / key).iterdir() if path.name != "case.json"
    }


def test_no_changed_version_makes_a_damaged_case_an_old_one(tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.add("key", _preprocessed((10, 12, 14)))
    path = tmp_path / "key" / "case.json"
    content = path.read_text()
    for version in range(10):
        path.write_text(content.replace('"schema_version": 3', f'"schema_version": {version}'))
        assert not store.is_outdated("key")
        assert store.verify("key") == (version == 3)


def test_dataset_is_done_once_and_mended(tmp_path: Path) -> None:
    cases = _dataset(tmp_path)
    store = CaseStore(tmp_path / "cases")
    keys = preprocess_dataset(cases, _SPEC, _SCHEME, store, execution=Execution(workers=2))
    assert list(keys) == ["c0", "c1", "c2"]
    stored = store.open(keys["c1"])
    assert stored.shape == (15, 11, 12)
    assert stored.properties.source_files == (str(cases[1].images[0]), str(cases[1].label))
    before = {key: (store.root / key / "case.json").stat().st_mtime_ns for key in keys.values()}
    expected = stored.image()

    again = CaseStore(tmp_path / "cases")  # another process
    assert preprocess_dataset(cases, _SPEC, _SCHEME, again, execution=Execution(workers=1)) == keys
    assert {key: (store.root / key / "case.json").stat().st_mtime_ns for key in keys.values()} == before

    path = store.root / keys["c1"] / "image.b2nd"
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    warnings = KeptWarnings(SILENT)
    assert preprocess_dataset(cases, _SPEC, _SCHEME, store, execution=Execution(progress=warnings)) == keys
    assert [(item.code, item.case) for item in warnings.warnings] == [("damaged_case", "c1")]
    np.testing.assert_array_equal(store.open(keys["c1"]).image(), expected)
    assert store.verify(keys["c1"])


def test_annotations_are_kept_on_the_grid_of_their_image(tmp_path: Path) -> None:
    cases = _dataset(tmp_path, 2)
    bare = Case(id="bare", images=cases[1].images)
    store = CaseStore(tmp_path / "cases")
    keys = preprocess_dataset([cases[0], bare], _SPEC, _SCHEME, store)
    assert store.open(keys["bare"]).annotation is None
    stored = store.open(keys["c0"])
    assert stored.annotation is not None
    np.testing.assert_array_equal(stored.annotation(), read_labels(cases[0], _SCHEME).array[0])
    assert stored.annotation.predicted_bytes() >= 12 * 11 * 10
    grid, source = stored.properties.grid, read_grid(cases[0].images[0])
    assert (grid.shape, grid.spacing_mm, grid.header) == (source.shape, source.spacing_mm, source.header)
    np.testing.assert_array_equal(grid.affine, source.affine)
    path = stored.folder / "annotation.b2nd"
    for position in range(0, path.stat().st_size, 97):
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(StageError):
            stored.annotation()
        content[position] ^= 1
        path.write_bytes(content)
    assert store.verify(keys["c0"])


def test_changed_file_is_preprocessed_anew(tmp_path: Path) -> None:
    cases = _dataset(tmp_path, 1)
    store = CaseStore(tmp_path / "cases")
    first = preprocess_dataset(cases, _SPEC, _SCHEME, store)
    nibabel.save(nibabel.Nifti1Image(np.ones((12, 11, 10), np.float32), np.eye(4)), cases[0].images[0])
    nibabel.save(nibabel.Nifti1Image(np.ones((12, 11, 10), np.uint8), np.eye(4)), cases[0].label)
    assert preprocess_dataset(cases, _SPEC, _SCHEME, store) != first


def test_what_changes_while_it_is_read_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, read = _dataset(tmp_path, 2), dataset_module.read_labels
    before = cases[0].images[0].read_bytes()

    def meanwhile(case: Case, *rest: Any) -> Image:
        if case == cases[0]:
            case.images[0].write_bytes(cases[1].images[0].read_bytes())
        return read(case, *rest)

    store = CaseStore(tmp_path / "cases")
    with monkeypatch.context() as patched:
        patched.setattr(dataset_module, "read_labels", meanwhile)
        with pytest.raises(InputError) as raised:
            preprocess_dataset(cases, _SPEC, _SCHEME, store, execution=Execution(workers=1))
    assert raised.type is InputError  # no `DatasetError`, of files that cannot be used
    cases[0].images[0].write_bytes(before)
    assert not CaseStore(store.root).has(CaseStore(store.root).key(cases[0], _SPEC, _SCHEME))


def test_missing_file_is_named_and_finished_cases_stay(tmp_path: Path) -> None:
    cases = _dataset(tmp_path, 2)
    store = CaseStore(tmp_path / "cases")
    keys = preprocess_dataset(cases[:1], _SPEC, _SCHEME, store)
    cases[1].images[0].unlink()
    with pytest.raises(InputError) as raised:
        preprocess_dataset(cases, _SPEC, _SCHEME, store)
    assert cases[1].images[0].name in raised.value.problem
    assert store.has(keys["c0"])


def test_memory_is_predicted_from_headers(tmp_path: Path) -> None:
    (case,) = _dataset(tmp_path, 1)
    need = 4 * dataset_module._WORKING_COPIES
    assert dataset_module._predicted_bytes(case, _SPEC) == 15 * 11 * 12 * need  # after resampling
    coarse = _SPEC.model_copy(update={"spacing_mm": (6.0, 4.0, 4.0)})
    assert dataset_module._predicted_bytes(case, coarse) == 10 * 11 * 12 * need  # as stored


def test_memory_limits_the_cases_in_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = _dataset(tmp_path, 6)
    need = dataset_module._predicted_bytes(cases[0], _SPEC) / 2**30
    changed, at_work, most, expected = Condition(), 0, 0, 0

    def watched(*arguments: object, **named: object) -> Preprocessed:
        nonlocal at_work, most
        with changed:
            at_work += 1
            most = max(most, at_work)
            changed.notify_all()
            assert changed.wait_for(lambda: most >= expected, timeout=120)
        time.sleep(0.05)  # time for others to start that should not
        result = preprocess(*arguments, **named)  # type: ignore[arg-type]
        with changed:
            at_work -= 1
        return result

    monkeypatch.setattr(dataset_module, "preprocess", watched)
    for free, expected in ((0.5 * need, 1), (2.5 * need, 2), (100 * need, 3)):
        most = 0
        execution = Execution(workers=3, memory_gb=free)
        preprocess_dataset(cases, _SPEC, _SCHEME, CaseStore(tmp_path / f"cases-{expected}"), execution=execution)
        assert most == expected


def test_memory_that_compression_lacks_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Error while getting the cframe")

    monkeypatch.setattr(blosc2, "asarray", refuse)
    with pytest.raises(MemoryError) as raised:
        CaseStore(tmp_path).add("key", _preprocessed((4, 5, 6)))
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert list(tmp_path.iterdir()) == []
