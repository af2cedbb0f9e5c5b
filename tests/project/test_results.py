"""A result counts for what it was made from, and for as long as it is what was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segfit.dataset.phantom import make_phantom
from segfit.device import Hardware
from segfit.device import measure_hardware as measure
from segfit.errors import InputError, StageError
from segfit.images.formats import read_label, write_labels
from segfit.images.image import LabelMap
from segfit.options import Options
from segfit.project import Project, predicting, preparation, sized
from segfit.project.stages import STAGES
from segfit.project.train_and_validate import held_weights
from segfit.project.upkeep import damage_of, remove, unneeded
from segfit.records import ResultRecord, store

SETTINGS = ["training.steps=6", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a project that ran through."""
    root = tmp_path_factory.mktemp("made")
    make_phantom(root / "Dataset001_Volumes", cases=5, test_cases=2, shape=(12, 24, 24))
    Project.create(root / "p", root / "Dataset001_Volumes", settings=SETTINGS).run()
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path / "copy")
    project = tmp_path / "copy" / "p" / "project.json"
    project.write_text(project.read_text().replace(str(made), str(tmp_path / "copy")))
    return tmp_path / "copy"


def again(root: Path, *settings: str) -> Project:
    return Project.create(root / "p", root / "Dataset001_Volumes", settings=settings)


def stages(root: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (root / "p" / "stages.jsonl").read_text().splitlines()]


def redone(root: Path, *settings: str) -> set[str]:
    """Run again; return the stages that did something, without the report and what is only looked at."""
    before = len(stages(root))
    again(root, *settings).run()
    return set(stages(root)[before:]) - {"report", "preprocess", "results"}


def change_image(path: Path) -> None:
    import nibabel as nib

    image = nib.load(path)  # type: ignore[attr-defined]
    array = np.asarray(image.dataobj).copy()
    array.flat[0] += 1
    nib.save(nib.Nifti1Image(array, image.affine), path)  # type: ignore[attr-defined, no-untyped-call]


def change_label(path: Path) -> None:
    label = read_label(path)
    array = label.array[0].copy()
    array[array == 1] = 0
    array.flat[:5] = 1
    write_labels(path, LabelMap(array, label.grid))


def first(folder: Path) -> Path:
    return sorted(folder.iterdir())[0]


def test_a_copy_in_another_place_is_the_same(root: Path) -> None:
    assert redone(root) == set()


@pytest.mark.parametrize(
    ("part", "change", "stages"),
    [
        ("imagesTs", change_image, {"check", "predict", "evaluate"}),
        ("labelsTs", change_label, {"check", "evaluate"}),
        ("labelsTr", change_label, {"check", "fingerprint", "plan", "size", "train", "validate", "select", "predict"}),
        ("imagesTr", change_image, {"check", "fingerprint", "plan", "size", "train", "validate", "select", "predict"}),
    ],
)
def test_only_what_depends_on_it_is_made_anew(
    root: Path, part: str, change: Callable[[Path], None], stages: set[str]
) -> None:
    change(first(root / "Dataset001_Volumes" / part))
    assert redone(root) - {"evaluate"} == stages - {"evaluate"}
    assert redone(root) == set()


def test_a_selection_of_an_earlier_version_is_told_to_be_made_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(rule: str) -> list[str]:
        project, notes = again(root, f"selection.rule={rule}"), list[str]()
        monkeypatch.setattr(project.progress, "note", notes.append)
        project.select()
        return [note for note in notes if "earlier version" in note]

    assert told("nnunet") == []  # another one of this version
    with monkeypatch.context() as earlier:
        earlier.setitem(STAGES, "select", replace(STAGES["select"], version=1))
        again(root, "selection.rule=beyond-chance").select()
    assert len(told("beyond-chance")) == 1
    assert told("beyond-chance") == []


def test_a_test_case_comes_and_goes(root: Path) -> None:
    data, project = root / "Dataset001_Volumes", root / "p"
    for part in ("imagesTs", "labelsTs"):
        first(data / part).unlink()
    assert redone(root) == {"check", "predict", "evaluate"}
    assert len(list((project / "predictions").glob("*.nii.gz"))) == 1
    assert len(json.loads((project / "predictions" / "summary.json").read_text())["cases"]) == 1
    shutil.rmtree(data / "labelsTs")
    assert redone(root) == {"check"}
    assert not (project / "predictions" / "summary.json").exists()
    shutil.rmtree(data / "imagesTs")
    assert redone(root) == {"check"}
    assert not (project / "predictions").exists()


def test_other_predictions_do_not_train_again(root: Path) -> None:
    assert redone(root, "inference.tile_step=1") >= {"validate", "select", "predict"}
    assert stages(root).count("train") == 1


def test_what_changes_nothing_is_in_no_key(root: Path) -> None:
    assert redone(root, "workers=1", "training.checkpoint_seconds=7") == set()


def test_a_further_fold_keeps_the_finished_one(root: Path) -> None:
    redone(root, "planning.folds=0,1")
    assert stages(root).count("train") == 2
    assert len(list((root / "p" / "runs").glob("*/fold-0/*/weights.safetensors"))) == 1


def test_folds_can_be_trained_one_by_one(root: Path) -> None:
    project = again(root, "planning.folds=0,1,2")
    [result] = project.train(folds=[2])
    assert stages(root).count("train") == 2  # with the one that was there
    assert again(root).train(folds=[2], configurations=["3d_fullres"]) == [result]
    assert stages(root).count("train") == 2
    assert len(again(root).train()) == 3
    assert stages(root).count("train") == 3
    with pytest.raises(InputError) as caught:
        project.train(folds=[4])
    assert caught.value.action is not None
    assert "planning.folds=4" in caught.value.action
    with pytest.raises(InputError):
        project.train(configurations=["3d_lowres"])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    legible = b"23456789bcdfghjklmopqrsuvw"  # stay so with their last bit changed, and are in no word of JSON's own
    places = range(len(content) // 2, len(content))
    content[next(place for place in places if path.suffix != ".json" or content[place] in legible)] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "pattern",
    [
        "check.json",
        "fingerprint.json",
        "plans/*/plan.json",
        "plans/*/selection.json",
        "plans/*/validation.json",
        "plans/*/predictions-*/*.nii.gz",
        "plans/*/predictions-*/summary.json",
        "plans/*/predictions-*/record.json",
        "runs/*/fold-0/*/weights.safetensors",
        "runs/*/fold-0/*/training.json",
        "runs/*/fold-0/*/validation-*/summary.json",
        "runs/*/fold-0/*/validation-*/*.nii.gz",
        "model/model.json",
        "model/weights-3d_fullres-0.safetensors",
        "predictions/*.nii.gz",
        "plan.json",
        "selection.json",
    ],
)
def test_a_flipped_bit_is_found_and_mended(root: Path, made: Path, pattern: str) -> None:
    path = sorted((root / "p").glob(pattern))[0]
    flip(path)
    same = path.read_bytes()
    copies = ("plan.json", "selection.json", "predictions/*.nii.gz")
    project = again(root)
    if pattern not in copies and "summary" not in pattern:
        assert path.is_relative_to(damage_of(project.folder)[0].path.parent)
    project.run()
    assert path.read_bytes() != same
    assert (root / "p" / "predictions" / "summary.json").read_bytes() != b""
    assert damage_of(again(root).folder) == []
    expected = read_label(first(made / "p" / "predictions")).array
    np.testing.assert_array_equal(read_label(first(root / "p" / "predictions")).array, expected)


def test_a_moved_dataset_is_known_by_its_content(root: Path) -> None:
    (root / "Dataset001_Volumes").rename(root / "Dataset002_Elsewhere")
    before = len(stages(root))
    project = Project.create(root / "p", root / "Dataset002_Elsewhere")
    project.run()
    assert set(stages(root)[before:]) <= {"report", "preprocess", "results"}
    assert Project.open(root / "p").dataset.root == root / "Dataset002_Elsewhere"


def test_what_other_options_left_can_be_removed(root: Path) -> None:
    assert unneeded(again(root)) == []
    redone(root, "training.steps=5")
    items = unneeded(again(root))
    assert {item.path.relative_to(root / "p").parts[0] for item in items} == {"plans", "runs"}
    remove(again(root), items)
    assert unneeded(again(root)) == []
    assert redone(root) == set()
    assert redone(root, "training.steps=6") >= {"size", "train", "validate", "select", "predict"}


def test_nothing_is_removed_while_a_command_is_at_work(root: Path) -> None:
    redone(root, "training.steps=5")
    items = unneeded(again(root))
    with again(root, "training.steps=6").at_work():
        with pytest.raises(InputError):
            unneeded(again(root, "training.steps=5"))
        with pytest.raises(InputError):
            remove(again(root, "training.steps=5"), items)
    assert items
    assert all(item.path.exists() for item in items)
    remove(again(root, "training.steps=6"), items)  # they are needed again
    assert all(item.path.exists() for item in items)


def test_nothing_is_removed_that_a_run_may_go_on_with(root: Path) -> None:
    with pytest.raises(InputError, match="nothing was trained"):
        unneeded(again(root, "training.steps=9"))


def test_nothing_is_removed_where_unusable_cases_are_left_out(root: Path) -> None:
    label = first(root / "Dataset001_Volumes" / "labelsTr")
    label.write_bytes(label.read_bytes()[:100])
    assert redone(root, "dataset.skip_incomplete=true") >= {"train"}
    items = unneeded(again(root, "dataset.skip_incomplete=true"))
    assert {item.path.relative_to(root / "p").parts[0] for item in items} == {"plans", "runs", "cases"}
    remove(again(root), items)
    assert redone(root) == set()


def test_the_weight_of_a_case_is_in_the_key_of_the_plan(root: Path) -> None:
    before = again(root).plan_folder.root
    data = root / "Dataset001_Volumes"
    cases = [path.name.removesuffix(".nii.gz") for path in sorted((data / "labelsTr").iterdir())]
    (data / "cases.csv").write_text("case,weight\n" + "".join(f"{case},{n}\n" for n, case in enumerate(cases)))
    assert again(root).plan_folder.root != before


def test_another_device_is_looked_at(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = again(root)
    asked: list[str] = []
    monkeypatch.setattr(preparation, "measure_hardware", lambda device: (asked.append(device), measure(device))[1])
    project.plan(settings=["device=cpu"])
    project.plan(settings=["device=auto"])
    assert asked == ["cpu"]  # the plan for auto is known
    assert project.hardware.machine == measure("auto").machine


@pytest.mark.parametrize("trained", [False, True])
def test_on_another_machine_what_nobody_trained_by_is_planned_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch, trained: bool
) -> None:
    project = again(root, *([] if trained else ["training.steps=7"]))
    before = project.plan()
    assert before.machine == measure("cpu").machine
    gpu = Hardware(device="cuda:0", name="a GPU", threads=8, free_memory_gb=40.0, fast_bf16=True)
    monkeypatch.setattr(preparation, "measure_hardware", lambda _: gpu)
    monkeypatch.setattr(sized, "_decided", lambda _, plan: plan)
    assert again(root).plan() == again(root).findings().plan == before  # who only looks changes nothing
    after = again(root).size()
    assert after.machine == (before.machine if trained else "cuda a GPU, 8 threads")
    assert (after == before) is trained
    memory = next(item for item in after.decisions if item.key == "memory_gb")
    assert ("device" in memory.inputs) is not trained  # a decision that the machine bears on
    assert again(root).plan() == after


def test_a_file_that_changes_while_it_is_measured_is_measured_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = root / "Dataset001_Volumes"
    change_label(sorted((data / "labelsTr").iterdir())[0])
    measured = preparation.measure

    def meanwhile(*args: Any, **named: Any) -> Any:
        result = measured(*args, **named)
        change_label(sorted((data / "labelsTr").iterdir())[1])
        return result

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "measure", meanwhile)
        again(root).fingerprint()
    before = len(stages(root))
    again(root).fingerprint()
    assert "fingerprint" in stages(root)[before:]


def test_a_waiting_command_leaves_what_is_being_written(root: Path) -> None:
    project = again(root)
    [item] = project.findings().trainings
    (item.folder / "training.json").unlink()
    partial = item.folder / ".partial-weights"
    partial.write_bytes(b"being written by another command")
    assert again(root).findings().results == ()
    assert partial.exists()


def test_a_command_gives_way_where_another_one_decided_anew(root: Path) -> None:
    project = again(root, "training.steps=7")
    project.size()
    other = again(root)
    plan = other.size()
    assert plan.run is not None
    recipe = plan.training["3d_fullres"].model_copy(update={"learning_rate": 0.001})
    store(plan.model_copy(update={"training": {**plan.training, "3d_fullres": recipe}}), other.plan_folder.plan,
          other.plan_key)  # fmt: skip
    [result] = project.train()
    assert project.plan().training["3d_fullres"].learning_rate == 0.001
    [item] = project.findings().trainings
    assert result.identity == item.identity


def test_weights_that_were_trained_longer_meanwhile_are_not_taken_for_others(root: Path) -> None:
    project = again(root)
    [item], [result] = project.findings().trainings, project.findings().results
    with held_weights(project, [item], [result.weights]):
        pass
    (item.folder / "weights.safetensors").write_bytes(b"others")
    with pytest.raises(StageError, match="given more time"), held_weights(project, [item], [result.weights]):
        pytest.fail("they are not what was validated")


def test_the_model_that_another_command_hands_over_is_not_predicted_with(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(project: Project) -> bytes:
        return (project.folder.model / "weights-3d_fullres-0.safetensors").read_bytes()

    project = again(root)
    expected, own = [read_label(path).array for path in project.predict()], model(project)
    another = again(root, "training.steps=5")
    another.select()
    assert model(another) != own
    for path in (root / "p" / "plans").glob("*/predictions-*"):
        shutil.rmtree(path)
    project = again(root, "training.steps=6")
    project.select()
    monkeypatch.setattr(predicting, "remove_damaged", lambda *_: another.select())  # before the model is loaded
    for path, array in zip(project.predict(), expected, strict=True):
        np.testing.assert_array_equal(read_label(path).array, array)
    assert model(project) == own


def test_two_commands_share_the_work(tmp_path: Path) -> None:
    data = make_phantom(tmp_path / "Dataset001_Volumes", cases=5, test_cases=1, shape=(12, 24, 24))
    settings = [*SETTINGS, "planning.folds=0,1,2"]
    projects = [Project.create(tmp_path / "p", data, settings=settings) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda project: project.run(), projects))
    assert results[0] == results[1] is not None
    done = [json.loads(line)["stage"] for line in (tmp_path / "p" / "stages.jsonl").read_text().splitlines()]
    assert {stage: done.count(stage) for stage in ("check", "size", "train", "validate", "select", "predict")} == {
        "check": 1, "size": 1, "train": 3, "validate": 3, "select": 1, "predict": 1,
    }  # fmt: skip


def test_a_model_that_is_damaged_in_a_session_is_written_anew_in_it(root: Path) -> None:
    project = again(root)
    project.select()
    (weights,) = project.folder.model.glob("weights-*")
    content = weights.read_bytes()
    for spoil in (lambda: weights.write_bytes(content[:-1]), weights.unlink):
        spoil()
        project.select()
        assert weights.read_bytes() == content


def test_options_that_are_called_otherwise_now_have_the_same_key() -> None:
    options = Options().with_settings(["planning.resample_logits.order=0"])
    key = STAGES["course"].key(options, fingerprint="", labels="", splits="", weights=None)
    assert key.made_of["options"] == {"planning": {"resample_scores": {"order": 0}}}


def test_a_project_of_older_names_goes_on(root: Path) -> None:
    """Its documents had other keys; what they were made from has kept its name, so that nothing is trained again."""
    named = {"resample_logits": "resample_scores", "per_class": "per_target"}
    aged = 0
    for path in (root / "p").rglob("*.json"):
        old = path.read_text()
        for new_name, old_name in named.items():
            old = old.replace(f'"{new_name}"', f'"{old_name}"').replace(f".{new_name}", f".{old_name}")
        if old != path.read_text():
            raw = json.loads(old)
            if (record := raw.pop("record", None)) is not None:
                raw["record"] = ResultRecord(**record).sealed(raw).model_dump(mode="json")
            path.write_text(json.dumps(raw))
            aged += 1
    assert aged > 2
    assert redone(root) <= {"select", "predict", "evaluate"}
    assert redone(root) == set()
