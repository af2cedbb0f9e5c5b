"""Which folds a project uses, and that nobody's folds are overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dataset_builder import write_volume

from segfit.dataset.layouts import open_dataset
from segfit.dataset.phantom import make_phantom
from segfit.dataset.splits import SPLITS_FILE, Splits, balanced_splits, nnunet_splits
from segfit.errors import InputError
from segfit.files import read_json, write_json
from segfit.images.formats import read_image
from segfit.planning.plan import Plan
from segfit.project import Project


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_phantom(tmp_path / "Dataset001_Seven", cases=7, test_cases=0, shape=(8, 16, 16))


def ids(project: Project) -> list[str]:
    return [case.id for case in project.dataset.training]


def by_hand(project: Project, folder: Path, name: str = SPLITS_FILE) -> Path:
    """Write two folds in the reference's form."""
    names = ids(project)
    write_json(folder / name, [{"train": names[2:], "val": names[:2]}, {"train": names[:5], "val": names[5:]}])
    return folder / name


def test_presets_choose_how_to_split(tmp_path: Path, dataset: Path) -> None:
    auto = Project.create(tmp_path / "auto", dataset)
    present = {case.case: [v for v in (1, 2) if case.label_voxels[v]] for case in auto.fingerprint().cases}
    assert auto.splits() == balanced_splits(auto.dataset.training, present).sealed("balanced")
    assert "folds are balanced over groups, sites and classes" in auto.plan().changes
    for preset in ("stock", "resenc-m"):
        project = Project.create(tmp_path / preset, dataset, settings=[f"preset={preset}"])
        assert project.splits() == nnunet_splits(ids(project)).sealed("nnunet")
        assert not any("folds" in change for change in project.plan().changes)
    asked = Project.create(tmp_path / "asked", dataset, settings=["preset=stock", "planning.splits=balanced"])
    assert asked.splits() == auto.splits()
    assert asked.plan().changes == ("folds are balanced over groups, sites and classes",)
    assert not asked.plan().stock
    named = Project.create(tmp_path / "named", dataset, settings=[f"planning.splits={by_hand(asked, tmp_path)}"])
    assert not any("folds" in change for change in named.plan().changes)
    assert Splits.load(asked.folder.splits) == asked.splits()


def test_patients_stay_together(tmp_path: Path, dataset: Path) -> None:
    opened = open_dataset(dataset)
    cases = tuple(
        case.model_copy(update={"group": f"patient {number // 3}"}) for number, case in enumerate(opened.training)
    )
    opened = opened.model_copy(update={"training": cases})
    project = Project.create(tmp_path / "p", opened)
    names = [case.id for case in cases]
    assert sorted(fold.validation for fold in project.splits().folds) == [
        tuple(names[:3]),
        tuple(names[3:6]),
        tuple(names[6:]),
    ]
    assert "group_on_both_sides" not in [item.code for item in project.plan().warnings]
    reference = Project.create(tmp_path / "q", opened, settings=["planning.splits=nnunet"])
    warned = [item.problem for item in reference.plan().warnings if item.code == "group_on_both_sides"]
    assert warned
    assert "patient" in warned[0]


def renamed(dataset: Path, names: list[str]) -> None:
    """Give the cases of a phantom other names."""
    for number, name in enumerate(names):
        for folder, channel in (("imagesTr", "_0000"), ("labelsTr", "")):
            path = dataset / folder / f"phantom_tr_{number:03}{channel}.nii.gz"
            path.rename(dataset / folder / f"{name}{channel}.nii.gz")


def test_groups_that_names_say_stay_together(tmp_path: Path) -> None:
    names = [f"exam{number:03}_{part}" for number in range(3, 9) for part in (1, 2)]
    dataset = make_phantom(tmp_path / "Dataset002_Named", cases=12, test_cases=0, shape=(8, 16, 16))
    renamed(dataset, names)
    project = Project.create(tmp_path / "p", dataset)
    assert {case.id: case.group for case in project.dataset.training} == {name: name[:7] for name in names}
    assert all(
        {name[:7] + end for end in ("_1", "_2")} <= set(f.validation)
        for f in project.splits().folds
        for name in f.validation
    )
    assert [item.rule for item in project.plan().decisions if item.key == "num_folds"] == ["folds_named"]
    alone = [["dataset.groups=none"], ["preset=stock"], ["planning.splits=nnunet"]]
    for number, settings in enumerate(alone):
        other = Project.create(tmp_path / str(number), dataset, settings=settings)
        assert {case.group for case in other.dataset.training} == {None}
    by_hand(project, dataset)
    beside = Project.create(tmp_path / "beside", dataset)
    assert {case.group for case in beside.dataset.training} == {None}
    asked = Project.create(tmp_path / "asked", dataset, settings=["preset=stock", "dataset.groups=names"])
    assert {case.group for case in asked.dataset.training} == {name[:7] for name in names}


def test_copies_stay_together(tmp_path: Path) -> None:
    dataset = make_phantom(tmp_path / "Dataset003_Copies", cases=7, test_cases=0, shape=(20, 32, 32))
    for folder, channel in (("imagesTr", "_0000"), ("labelsTr", "")):
        image = read_image(dataset / folder / f"phantom_tr_002{channel}.nii.gz").array[0]
        write_volume(dataset / folder / f"phantom_tr_006{channel}.nii.gz", image[::-1, :, 2:])
    project = Project.create(tmp_path / "p", dataset)
    pair = {"phantom_tr_002", "phantom_tr_006"}
    assert [pair & set(fold.validation) for fold in project.splits().folds if pair & set(fold.validation)] == [pair]
    assert "group_on_both_sides" not in [item.code for item in project.plan().warnings]
    split = Project.create(tmp_path / "q", dataset, settings=["planning.splits=nnunet"])
    assert split.splits() == nnunet_splits(ids(split)).sealed("nnunet")
    assert "group_on_both_sides" in [item.code for item in split.plan().warnings]


def test_folds_in_the_datasets_folder_are_used(tmp_path: Path, dataset: Path) -> None:
    project = Project.create(tmp_path / "p", dataset)
    path = by_hand(project, dataset)
    assert project.splits().to_nnunet() == read_json(path)
    assert project.splits().source == str(path)
    assert "in_no_fold" not in [item.code for item in project.plan().warnings]
    other = Project.create(tmp_path / "q", dataset, settings=["planning.splits=nnunet"])
    assert other.splits() == nnunet_splits(ids(other)).sealed("nnunet")


def test_a_file_of_folds_can_be_asked_for(tmp_path: Path, dataset: Path) -> None:
    project = Project.create(tmp_path / "p", dataset)
    before = project.plan()
    path = by_hand(project, tmp_path, "mine.json")
    again = Project.open(tmp_path / "p", settings=[f"planning.splits={json.dumps(str(path))}"])
    assert again.splits().to_nnunet() == read_json(path)
    assert again.plan() != before
    assert Splits.load(again.folder.splits).source == str(path)
    path.unlink()
    with pytest.raises(InputError, match=r"mine\.json is missing"):
        Project.open(tmp_path / "p").splits()


def test_edited_folds_are_never_overwritten(tmp_path: Path, dataset: Path) -> None:
    project = Project.create(tmp_path / "p", dataset)
    project.plan()
    path = project.folder.splits
    content = read_json(path)
    content["folds"] = content["folds"][:2]
    write_json(path, content)
    edited = path.read_text()
    with pytest.raises(InputError, match=rf"splits\.json was edited .*; give --splits {path} to use its folds, or del"):
        Project.open(tmp_path / "p").plan()
    assert path.read_text() == edited

    asked = Project.open(tmp_path / "p", settings=[f"planning.splits={path}"])
    assert len(asked.splits().folds) == 2
    assert asked.splits().to_nnunet() == [
        {"train": fold["train"], "val": fold["validation"]} for fold in content["folds"]
    ]
    assert Project.open(tmp_path / "p").splits() == asked.splits()

    path.unlink()
    anew = Project.open(tmp_path / "p", settings=["planning.splits=null"])
    assert len(anew.splits().folds) == 5


def test_folds_that_segfit_wrote_follow_the_options(tmp_path: Path, dataset: Path) -> None:
    project = Project.create(tmp_path / "p", dataset)
    first = project.plan()
    kept = project.splits()
    other = Project.open(tmp_path / "p", settings=["planning.splits=reference"])
    assert other.plan() != first
    assert Splits.load(other.folder.splits).source == "nnunet"
    back = Project.open(tmp_path / "p", settings=["planning.splits=null"])
    assert back.plan() == first
    assert back.splits() == kept
    assert Plan.load(back.folder.plan) == first
