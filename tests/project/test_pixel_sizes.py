"""Pictures whose pixel size stands in a table, through all stages."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from segfit.fingerprint.training_images import TrainingImages
from segfit.images.formats import read_grid
from segfit.planning.explain import words_of
from segfit.preprocessing.store import CaseStore
from segfit.project import Project
from segfit.report.sections import derived, measured


def write_table(root: Path, size: float) -> None:
    lines = [f"phantom_tr_{n:03d},p{n // 2},{size * (1 + n % 2)}" for n in range(6)]
    (root / "cases.csv").write_text("\n".join(["case,group,pixel_mm", *lines, f"phantom_ts_000,q,{2 * size}", ""]))


@pytest.fixture
def sized(pictures: Path, tmp_path: Path) -> Path:
    root = Path(shutil.copytree(pictures, tmp_path / "Dataset003_Sized"))
    write_table(root, 0.1)
    return root


def test_sizes_of_a_table_reach_every_stage(tmp_path: Path, sized: Path, tiny: list[str]) -> None:
    project = Project.create(tmp_path / "out", sized, settings=tiny)
    assert [case.spacing_mm for case in project.fingerprint().cases] == [(0.1, 0.1), (0.2, 0.2)] * 3
    spacing = project.plan().configurations["2d"].spacing_mm
    assert spacing == pytest.approx((0.15, 0.15))
    groups = {f"phantom_tr_{n:03d}": n // 2 for n in range(6)}
    for fold in project.splits().folds:
        assert not {groups[case] for case in fold.train} & {groups[case] for case in fold.validation}
    project.run()
    store = CaseStore(project.folder.cases)
    for case, key in project.preprocess()["2d"].items():
        properties = store.open(key).properties
        size = project.dataset.case(case).spacing_mm
        assert properties.stored_spacing_mm == (size[0], size[0])
        assert properties.shape == tuple(round(n * size[0] / 0.15) for n in properties.shape_after_crop)
    for case in project.dataset.test:
        predicted = project.folder.predictions / f"{case.id}.png"
        assert read_grid(predicted).shape == read_grid(case.images[0]).shape


@pytest.mark.parametrize(("pixel_mm", "unit"), [(None, "px"), (1.0, "mm")])
def test_sizes_are_told_in_pixels_where_no_picture_says_how_large_they_are(
    tmp_path: Path, pictures: Path, pixel_mm: float | None, unit: str
) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "Dataset003_Sized"))
    if pixel_mm:
        write_table(root, pixel_mm)
    project = Project.create(tmp_path / "out", root, settings=["planning.target_spacing_mm=[2,2]"])
    fingerprint, plan = project.fingerprint(), project.plan()
    assert {case.sized for case in fingerprint.cases} == {unit == "mm"}
    assert (fingerprint.unit, plan.unit, plan.table()[0][1]) == (unit, unit, f"spacing ({unit})")
    told = [words_of(item, plan.unit).inputs for item in plan.decisions]
    assert {size for text in told for size in ("mm", "px") if f"({size})" in text} == {unit}
    page = derived(plan)
    assert page is not None
    assert dict(page["configurations"][0]["facts"])["Spacing"] == f"2 × 2 {unit}"
    rows = measured(fingerprint, {})
    assert rows is not None
    assert rows["unit"] == unit
    assert TrainingImages.of(fingerprint.cases, "stored", fingerprint.channel_names).unit == unit


def test_a_changed_table_is_a_changed_dataset(tmp_path: Path, sized: Path, tiny: list[str]) -> None:
    first = Project.create(tmp_path / "out", sized, settings=tiny).plan()
    write_table(sized, 0.25)
    second = Project.create(tmp_path / "out", sized, settings=tiny).plan()
    assert second.fingerprint_hash != first.fingerprint_hash
    assert second.configurations["2d"].spacing_mm == pytest.approx((0.375, 0.375))
