from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case, Dataset
from segfit.errors import InputError
from segfit.execution import pool
from segfit.execution.execution import Execution
from segfit.fingerprint import measure as measure_module
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.fingerprint.measure import measure
from segfit.labels import LabelScheme

_LABELS = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2, "ignore": 3})


def _save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    """Write an array (z, y, x)."""
    nibabel.save(nibabel.Nifti1Image(array.T, affine), path)
    return path


def _dataset(folder: Path, arrays: list[tuple[np.ndarray, np.ndarray]], affine: np.ndarray | None = None) -> Dataset:
    affine = np.diag([1.0, 2.0, 3.0, 1.0]) if affine is None else affine
    cases = tuple(
        Case(
            id=f"c{index}",
            images=(_save(folder / f"c{index}_0000.nii.gz", image.astype(np.float32), affine),),
            label=_save(folder / f"c{index}.nii.gz", label.astype(np.uint8), affine),
        )
        for index, (image, label) in enumerate(arrays)
    )
    return Dataset(
        name="Dataset",
        root=folder,
        layout="nnunet-v2",
        channel_names=("MRI",),
        labels=_LABELS,
        file_ending=".nii.gz",
        num_training=len(cases),
        training=cases,
    )


def _case(value: int = 10) -> tuple[np.ndarray, np.ndarray]:
    image, label = np.zeros((6, 7, 8)), np.zeros((6, 7, 8))
    image[1:5, 2:6, 0:8] = value
    label[1, 2, 0:2] = 1
    label[4, 5, 7] = 3
    image[4, 5, 7] = 3 * value
    return image, label


def test_one_case_in_numbers(tmp_path: Path) -> None:
    result = measure(_dataset(tmp_path, [_case()]), "stored")
    (case,) = result.cases
    assert (case.shape, case.spacing_mm, case.shape_after_crop) == ((6, 7, 8), (3.0, 2.0, 1.0), (4, 4, 8))
    assert case.relative_size_after_crop == result.median_relative_size_after_crop == 128 / 336
    assert case.label_voxels == {0: 125, 1: 2, 2: 0, 3: 1}
    assert case.label_centroids == {1: (0.125, 0.125, 0.125)}
    (statistics,) = result.intensities
    assert statistics.mean == pytest.approx((10 + 10 + 30) / 3)  # the ignore label counts as foreground
    assert (statistics.min, statistics.median, statistics.max) == (10, 10, 30)
    assert (result.ndim, result.num_training, result.channel_names) == (3, 1, ("MRI",))


def test_centroids_do_not_depend_on_the_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    dataset = _dataset(tmp_path, [(rng.uniform(1, 2, (9, 8, 7)), rng.integers(0, 3, (9, 8, 7)))])
    whole = measure(dataset, "stored").cases[0].label_centroids
    monkeypatch.setattr(measure_module, "_SLAB", 60)
    sliced = measure(dataset, "stored").cases[0].label_centroids
    for value in (1, 2):
        np.testing.assert_allclose(sliced[value], whole[value], rtol=1e-12)
    label = nibabel.load(tmp_path / "c0.nii.gz").get_fdata().T
    np.testing.assert_allclose(whole[1], (np.argwhere(label == 1).mean(axis=0) + 0.5) / label.shape, rtol=1e-12)


def test_canonical_orientation_turns_shapes_spacings_and_centroids(tmp_path: Path) -> None:
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -3, 1, 2, 1  # x runs down, y right, z forward
    case = measure(_dataset(tmp_path, [_case()], affine), "canonical").cases[0]
    assert (case.shape, case.spacing_mm) == ((8, 6, 7), (3.0, 2.0, 1.0))
    assert case.label_centroids[1] == (1 - 0.125, 0.125, 0.125)


def test_case_order_workers_and_cache_change_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = [(rng.uniform(1, 9, (5, 6, 7)), rng.integers(0, 4, (5, 6, 7))) for _ in range(6)]
    arrays[2] = (arrays[2][0], np.zeros((5, 6, 7)))  # contributes no intensities
    dataset = _dataset(tmp_path, arrays)
    first = measure(dataset, "stored", execution=Execution(workers=1))
    assert [case.case for case in first.cases] == [f"c{i}" for i in range(6)]
    cache = tmp_path / "cache"
    assert measure(dataset, "stored", execution=Execution(workers=3), cache=cache) == first
    assert measure(dataset, "stored", execution=Execution(workers=2), cache=cache) == first
    first.save(tmp_path / "fingerprint.json")
    assert Fingerprint.load(tmp_path / "fingerprint.json") == first


def test_processes_measure_the_same_and_remember_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    dataset = _dataset(tmp_path, [(rng.uniform(1, 9, (5, 6, 7)), rng.integers(0, 4, (5, 6, 7))) for _ in range(4)])
    first = measure(dataset, "stored")
    monkeypatch.setattr(pool, "_PROCESSES_FROM", 1)
    cache = tmp_path / "cache"
    hashed, two = FileHashes(cache / "hashes.json"), Execution(workers=2)
    assert measure(dataset, "stored", execution=two, cache=cache, hashes=hashed) == first
    assert len(list(cache.glob("*.npz"))) == 4
    hashes = json.loads((cache / "hashes.json").read_text())["files"]
    assert {Path(name).name for name in hashes} == {
        f"c{i}{end}" for i in range(4) for end in ("_0000.nii.gz", ".nii.gz")
    }
    dataset.training[2].images[0].write_bytes(b"no image")
    with pytest.raises(InputError, match=r"c2_0000\.nii\.gz"):
        measure(dataset, "stored", execution=Execution(workers=2))


def test_cache_is_keyed_by_content_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = _dataset(tmp_path, [_case(10), _case(20)])
    cache = tmp_path / "cache"
    first = measure(dataset, "stored", cache=cache)
    read: list[str] = []
    original = measure_module.read_case
    monkeypatch.setattr(measure_module, "read_case", lambda paths, _: (read.append(paths[0].name), original(paths))[1])
    assert measure(dataset, "stored", cache=cache) == first
    assert read == []
    _save(dataset.training[1].images[0], _case(40)[0].astype(np.float32), np.diag([1.0, 2.0, 3.0, 1.0]))
    changed = measure(dataset, "stored", cache=cache)
    assert read == ["c1_0000.nii.gz"]
    assert changed.intensities[0].max == 120
    for path in cache.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:50])
    (tmp_path / "hashes.json").write_text("[1, 2")
    assert measure(dataset, "stored", cache=cache, hashes=FileHashes(tmp_path / "hashes.json")) == changed


def test_useless_datasets_are_refused(tmp_path: Path) -> None:
    image, label = _case()
    with pytest.raises(InputError, match="no case has a label above 0"):
        measure(_dataset(tmp_path, [(image, 0 * label)]), "stored")
    with pytest.raises(InputError, match="no training case"):
        measure(_dataset(tmp_path, []), "stored")
    image[0, 0, 0] = np.nan
    with pytest.raises(InputError, match="case c0 contains NaN"):
        measure(_dataset(tmp_path, [(image, label)]), "stored")
    dataset = _dataset(tmp_path, [_case()]).model_copy(update={"channel_names": ("a", "b")})
    with pytest.raises(InputError, match=r"case c0 has 1 channel, the dataset declares 2"):
        measure(dataset, "stored")
    short = _dataset(tmp_path, [(_case()[0], _case()[1][:4])])
    with pytest.raises(InputError, match="case c0: the label has shape"):
        measure(short, "stored")
