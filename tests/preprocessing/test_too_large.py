"""A case whose voxel size is in a mistaken unit is named before it is resampled, and the others are done."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from segfit.dataset.manifest import Case
from segfit.errors import DatasetError, InputError, StageError
from segfit.execution.execution import Execution
from segfit.geometry import Grid
from segfit.images.image import Image
from segfit.labels import LabelScheme
from segfit.preprocessing.dataset import preprocess_dataset
from segfit.preprocessing.pipeline import preprocess
from segfit.preprocessing.store import CaseStore
from segfit.specs import Normalization, PreprocessingSpec

SCHEME = LabelScheme.from_declaration({"background": 0, "a": 1})


SPEC = PreprocessingSpec(
    orientation="canonical",
    transpose=(0, 1, 2),
    spacing_mm=(1.0, 1.0, 1.0),
    normalization=(Normalization(scheme="zscore"),),
)


def cases(folder: Path, sizes: dict[str, float]) -> list[Case]:
    """Write cases of 4 x 5 x 6 voxels with cubes of these sizes in mm."""
    found = []
    for name, size in sizes.items():
        affine = np.diag([size, size, size, 1.0])
        image, label = folder / f"{name}_0000.nii.gz", folder / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.arange(1, 121, dtype=np.float32).reshape(6, 5, 4), affine), image)
        nibabel.save(nibabel.Nifti1Image(np.ones((6, 5, 4), np.uint8), affine), label)
        found.append(Case(id=name, images=(image,), label=label))
    return found


def test_others_are_done_and_all_too_large_ones_are_named(tmp_path: Path) -> None:
    found = cases(tmp_path, {"a": 1.0, "b": 3000.0, "c": 0.001, "d": 20000.0})
    store = CaseStore(tmp_path / "cases")
    with pytest.raises(StageError) as caught:
        preprocess_dataset(found, SPEC, SCHEME, store, execution=Execution(workers=1))
    message = str(caught.value)
    assert message.startswith(
        "preprocess: 2 of 4 cases cannot fit into memory, the others are done: case b: 4 × 5 × 6 voxels of "
    )
    assert "mm would become 12\u202f000 × 15\u202f000 × 18\u202f000 of 1 × 1 × 1 mm, which take " in message
    assert ". Case d: 4 × 5 × 6 voxels of 20\u202f000 × " in message
    assert message.endswith("correct the voxel size in its header if the unit was mistaken, or leave the case out")
    assert len(store.keys()) == 2
    assert preprocess_dataset([found[0], found[2]], SPEC, SCHEME, store).keys() == {"a", "c"}


def test_the_bound_is_what_the_results_take() -> None:
    image = Image(np.arange(1, 121, dtype=np.float32).reshape(1, 4, 5, 6), Grid((4, 5, 6), (2.0,) * 3, np.eye(4)))
    bytes_needed = 8 * 120 * (4 + 2)
    assert preprocess(image, None, SPEC, SCHEME, "a", room=bytes_needed).image.shape == (1, 8, 10, 12)
    with pytest.raises(InputError, match=r"^a: 4 × 5 × 6 voxels of 2 × 2 × 2 mm would become 8 × 10 × 12 of 1 × 1 × 1"):
        preprocess(image, None, SPEC, SCHEME, "a", room=bytes_needed - 1)


def test_others_are_done_and_all_unusable_ones_are_named(tmp_path: Path) -> None:
    found = cases(tmp_path, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0})
    found[1].images[0].write_bytes(b"no image")
    nibabel.save(nibabel.Nifti1Image(np.full((6, 5, 4), np.nan, np.float32), np.eye(4)), found[3].images[0])
    store = CaseStore(tmp_path / "cases")
    with pytest.raises(DatasetError) as caught:
        preprocess_dataset(found, SPEC, SCHEME, store, execution=Execution(workers=1))
    assert [problem.case for problem in caught.value.problems] == ["b", "d"]
    assert len(store.keys()) == 2
