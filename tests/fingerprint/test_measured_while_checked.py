"""Cases that are measured while they are checked: nothing comes out otherwise than of two separate passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from segfit.dataset import case_checks
from segfit.dataset.checks import check_dataset
from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case, Dataset, Mask
from segfit.errors import InputError, Problem
from segfit.execution import pool
from segfit.execution.execution import Execution
from segfit.fingerprint import measure as measure_module
from segfit.fingerprint.measure import look_to_measure, measure
from segfit.geometry import Grid
from segfit.images.formats import write_labels
from segfit.images.image import LabelMap
from segfit.labels import LabelScheme

_LABELS = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
_SHAPE = (6, 7, 8)


def _save(path: Path, array: np.ndarray, *, turned: bool = False, scale: float = 1.0) -> Path:
    """Write an array (x, y, z), maybe with its axes in another order."""
    affine = np.diag([1.0 * scale, 2.0 * scale, 3.0 * scale, 1.0])
    image = nibabel.Nifti1Image(array, affine)
    if turned:
        image = image.as_reoriented(np.array([[1, -1], [0, 1], [2, 1]]))
    nibabel.save(image, path)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Dataset:
    """Cases whose files differ in all that is allowed."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, _SHAPE).astype(np.uint8)

    def images(name: str, **how: bool) -> tuple[Path, ...]:
        return tuple(
            _save(tmp_path / f"{name}_000{n}.nii.gz", rng.uniform(1, 9, _SHAPE).astype(kind), **(how if n else {}))
            for n, kind in enumerate((np.float32, np.int16))
        )

    coarse = _save(tmp_path / "coarse.nii.gz", labels[::2, ::2, ::2], scale=2.0)
    masks = tuple(
        Mask(path=_save(tmp_path / f"m{value}.nii.gz", (labels == value).astype(np.uint8)), value=value)
        for value in (1, 2)
    )
    cases = (
        Case(id="plain", images=images("plain"), label=_save(tmp_path / "plain.nii.gz", labels)),
        Case(
            id="turned", images=images("turned", turned=True), label=_save(tmp_path / "t.nii.gz", labels, turned=True)
        ),
        Case(id="coarse", images=images("coarse"), label=coarse, resample_label=True),
        Case(id="masks", images=images("masks"), masks=masks),
        Case(id="empty", images=images("empty"), label=_save(tmp_path / "empty.nii.gz", np.zeros(_SHAPE, np.uint8))),
    )
    test = Case(id="test", images=images("test"), label=_save(tmp_path / "test.nii.gz", labels))
    return Dataset(
        name="Dataset",
        root=tmp_path,
        layout="nnunet-v2",
        channel_names=("T1", "T2"),
        labels=_LABELS,
        file_ending=".nii.gz",
        num_training=len(cases),
        training=cases,
        test=(test,),
    )


def _with_faults(good: Dataset) -> Dataset:
    root, (plain, *_) = good.root, good.training
    spoilt = np.full(_SHAPE, np.nan, np.float32)
    cut = root / "cut.nii.gz"
    assert plain.label is not None
    cut.write_bytes(plain.label.read_bytes()[:-20])
    channels = dict(zip(("T1", "T2"), plain.images, strict=True))
    faulty = (
        plain.model_copy(update={"id": "nan", "channels": channels | {"T1": _save(root / "nan.nii.gz", spoilt)}}),
        plain.model_copy(update={"id": "cut", "label": cut}),
        plain.model_copy(update={"id": "alone", "channels": channels | {"T2": None}}),
        plain.model_copy(update={"id": "gone", "channels": channels | {"T1": root / "gone.nii.gz"}}),
        plain.model_copy(update={"id": "undeclared", "label": _save(root / "u.nii.gz", np.full(_SHAPE, 9, np.uint8))}),
    )
    return good.model_copy(update={"training": (*good.training, *faulty)})


def _no_reading(*_: object) -> None:
    raise AssertionError("a file was read again")


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("orientation", ["canonical", "stored"])
def test_two_passes_and_one_find_the_same(
    good: Dataset, orientation: measure_module.Orientation, processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = check_dataset(good), measure(good, orientation)
    cache, hashes = good.root / "cache", FileHashes()
    if processes:
        monkeypatch.setattr(pool, "_PROCESSES_FROM", 1)
    looks = [look_to_measure(good, orientation, cache)]
    problems = check_dataset(good, hashes=hashes, looks=looks, execution=Execution(workers=2))
    monkeypatch.setattr(measure_module, "read_case", _no_reading)
    monkeypatch.setattr(measure_module, "num_voxels", _no_reading)
    assert (problems, measure(good, orientation, cache=cache, hashes=hashes)) == apart
    assert {case.content for case in apart[1].cases} == {hashes.case(case) for case in good.training}


def test_a_case_with_a_fatal_problem_is_not_measured(good: Dataset) -> None:
    faulty, cache, hashes = _with_faults(good), good.root / "cache", FileHashes()
    problems = check_dataset(faulty)
    assert {item.case for item in problems if item.fatal} == {"nan", "cut", "alone", "gone", "undeclared"}
    assert check_dataset(faulty, hashes=hashes, looks=[look_to_measure(faulty, "stored", cache)]) == problems
    assert len(list(cache.iterdir())) == len(good.training)


def test_a_case_that_is_known_to_be_incomplete_is_not_measured(good: Dataset) -> None:
    cache = good.root / "cache"
    lacking = good.model_copy(update={"problems": (Problem("plain", "lacks something", "add it"),)})
    check_dataset(lacking, hashes=FileHashes(), looks=[look_to_measure(good, "stored", cache)])
    assert len(list(cache.iterdir())) == len(good.training) - 1


def test_what_changes_after_it_was_read_counts_as_it_was(good: Dataset) -> None:
    hashes = FileHashes()
    check_dataset(good, hashes=hashes)
    read, path = hashes.as_read(), good.training[0].images[0]
    before = read.dataset(good)
    path.write_bytes(good.training[1].images[0].read_bytes())
    assert read.dataset(good) == before
    assert hashes.dataset(good) != before


def _rewrite(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")  # the same file, not another one in its place


def _chunk_gone(path: Path) -> None:
    (path / "0" / "0" / "0" / "0").unlink()


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        (".nii.gz", _rewrite),
        (".mhd", lambda path: _rewrite(path.with_suffix(".zraw"))),
        (".tif", lambda path: path.with_suffix(".json").write_text('{"spacing": [9, 9, 9]}')),
        (".zarr", _chunk_gone),
    ],
)
def test_what_changes_while_it_is_read_is_told_and_not_measured(
    good: Dataset, ending: str, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, plain = "changing", good.training[0]
    image, label = (good.root / f"{name}{part}{ending}" for part in ("", "_label"))
    for path in (image, label):
        write_labels(path, LabelMap(np.ones(_SHAPE, np.uint8), Grid(_SHAPE, (1.0, 1.0, 1.0))))
    case = plain.model_copy(update={"id": name, "channels": {"T1": image}, "label": label})
    one = good.model_copy(update={"training": (case,), "test": (), "channel_names": ("T1",)})
    read = case_checks.read_label

    def meanwhile(path: Path, *rest: Any) -> Any:
        change(image)
        return read(path, *rest)

    cache, hashes = good.root / "cache", FileHashes()
    look = look_to_measure(one, "stored", cache)
    with monkeypatch.context() as patched:
        patched.setattr(case_checks, "read_label", meanwhile)
        problems = check_dataset(one, hashes=hashes, looks=[look])
    assert [(item.case, item.fatal) for item in problems if item.transient] == [(name, True)]
    assert not cache.exists()
    assert not any(item.transient for item in check_dataset(one, hashes=hashes))


def test_what_changes_while_it_is_measured_is_refused(good: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    changing, read = good.training[0], measure_module.read_labels

    def meanwhile(case: Case, *rest: Any) -> Any:
        if case == changing:
            _rewrite(case.images[0])
        return read(case, *rest)

    monkeypatch.setattr(measure_module, "read_labels", meanwhile)
    with pytest.raises(InputError, match=f"case {changing.id}: its files changed"):
        measure(good, "stored", cache=good.root / "cache")
