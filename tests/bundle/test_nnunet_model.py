"""Reading model folders of the reference; what they predict is tested against golden data."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from datetime import datetime
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest
import torch

from segfit.bundle.bundle import open_bundle
from segfit.cli.main import run
from segfit.errors import InputError
from segfit.inference.model import load_model
from segfit.nnunet.models import is_nnunet_model, read_nnunet_model
from segfit.nnunet.trainers import TRAINERS

pytestmark = pytest.mark.golden("inference/models/Dataset602_TinyRegions")

NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"
KEEP = "remove_all_but_largest_component_from_segmentation"


@pytest.fixture
def folder(golden: Path, tmp_path: Path) -> Path:
    shutil.copytree(golden / "inference" / "models" / "Dataset602_TinyRegions" / NAME, tmp_path / NAME)
    return tmp_path / NAME


def test_manifest(folder: Path) -> None:
    assert is_nnunet_model(folder)
    assert not is_nnunet_model(folder.parent)
    bundle = read_nnunet_model(folder)
    manifest = bundle.manifest
    assert manifest.name == f"Dataset602_TinyRegions {NAME}"
    assert manifest.channel_names == ("T1", "T2")
    assert [target.name for target in manifest.labels.classes] == ["whole", "core", "inner"]
    (member,) = manifest.members
    assert member.mirror_axes == (0, 1, 2)
    assert list(member.weights) == ["0", "1"]
    assert member.configuration.preprocessing.orientation == "stored"
    assert member.configuration.preprocessing.transpose == (1, 0, 2)
    first, second = (bundle.weights(name) for name in manifest.files)
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_sizes_of_training_images_come_from_the_fingerprint(folder: Path) -> None:
    path = folder / "dataset_fingerprint.json"
    content = {"shapes_after_crop": [[30, 40, 50], [32, 44, 40]], "spacings": [[2.0, 1.0, 1.0], [3.0, 1.0, 1.0]]}
    path.write_text(json.dumps(content))
    known = read_nnunet_model(folder).manifest.training_images
    assert known is not None
    assert known.spacing_mm == ((2.0, 1.0, 1.0), (3.0, 1.0, 1.0))
    assert known.extent_mm == ((60.0, 40.0, 40.0), (96.0, 44.0, 50.0))
    path.unlink()
    assert read_nnunet_model(folder).manifest.training_images is None
    for broken in ({}, {"shapes_after_crop": 1, "spacings": []}, [], content | {"spacings": [[1, 1]]}):
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match="dataset_fingerprint"):
            read_nnunet_model(folder)


def test_folds(folder: Path) -> None:
    assert list(read_nnunet_model(folder, [1]).manifest.members[0].weights) == ["1"]
    with pytest.raises(InputError, match=r"fold_3/checkpoint_final\.pth is missing"):
        read_nnunet_model(folder, [3])
    (folder / "fold_1").rename(folder / "fold_all")
    assert list(read_nnunet_model(folder).manifest.members[0].weights) == ["0"]
    shutil.rmtree(folder / "fold_0")
    assert list(read_nnunet_model(folder).manifest.members[0].weights) == ["all"]
    with pytest.raises(InputError, match="has no fold_"):
        read_nnunet_model(folder, checkpoint="checkpoint_best.pth")


def test_a_model_is_imported(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["import", str(folder), "-o", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "model")
    imported, original = open_bundle(tmp_path / "model"), read_nnunet_model(folder)
    assert imported.manifest.members == original.manifest.members
    for name in original.manifest.files:
        first, second = imported.weights(name), original.weights(name)
        assert all(torch.equal(first[key], second[key].float()) for key in second)
    assert run(["verify", str(tmp_path / "model")]) == 0


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this code must not run",)


def test_checkpoints_run_no_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"network_weights": Malicious()}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(InputError) as caught:
        read_nnunet_model(folder)
    assert caught.value.problem.endswith("print, which is code)")
    assert caught.value.action == "copy it again, or export plain weights"  # and not torch's advice
    assert capsys.readouterr().out == ""


def test_damaged_folders_are_refused(folder: Path) -> None:
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)  # written by the reference; the safe loader is what is tested
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read safely"):
        read_nnunet_model(folder)
    torch.save({"weights": 1}, checkpoint)
    with pytest.raises(InputError, match="is missing or malformed"):
        read_nnunet_model(folder)
    del content["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
    content["network_weights"] = {
        key: value for key, value in content["network_weights"].items() if "stages.0.0.convs.0" not in key
    }
    torch.save(content, checkpoint)
    with pytest.raises(InputError, match=r"fold_0/checkpoint_final\.pth: the weights lack"):
        read_nnunet_model(folder)
    checkpoint.write_bytes(whole)
    plans = json.loads((folder / "plans.json").read_text())
    del plans["configurations"]["3d_fullres"]
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(InputError, match="no configuration '3d_fullres'"):
        read_nnunet_model(folder)


def test_faults_of_plans_and_dataset_are_told_with_their_file(folder: Path) -> None:
    for name, place, value in (
        ("plans.json", ("configurations", "3d_fullres", "patch_size"), "x"),
        ("dataset.json", ("regions_class_order",), [1, 2, 0]),
        ("dataset.json", ("labels",), {"background": 0, " ": 1}),
    ):
        whole = (folder / name).read_text()
        content = json.loads(whole)
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        (folder / name).write_text(json.dumps(content))
        with pytest.raises(InputError) as caught:
            read_nnunet_model(folder)
        assert str(folder / name) in caught.value.problem
        assert caught.value.action
        (folder / name).write_text(whole)
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    content["network_weights"][3] = torch.zeros(1)
    torch.save(content, checkpoint)
    with pytest.raises(InputError, match=r"fold_0/checkpoint_final\.pth is damaged: its weights have the name 3"):
        read_nnunet_model(folder)


def test_numpy_scalars_are_let_in(tmp_path: Path, folder: Path) -> None:
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    content["logging"] = {"ema": [np.float32(1), np.float64(2), np.int64(3), np.bool_(True)]}
    torch.save(content, checkpoint)
    assert read_nnunet_model(folder, [0]).manifest.members[0].weights


def write(folder: Path, **changes: object) -> None:
    """Change what the checkpoints of a model say; None removes a value."""
    for checkpoint in folder.glob("fold_*/checkpoint_final.pth"):
        content = torch.load(checkpoint, weights_only=False)
        kept = {name: value for name, value in (content | changes).items() if value is not None}
        torch.save(kept, checkpoint)


def plans_with(folder: Path, **changes: object) -> None:
    path = folder / "plans.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_nobody_looks_at_refuses_no_model_and_runs_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_nnunet_model(folder)
    write(folder, logging={"curve": np.arange(5), "where": folder, "code": Malicious(), "when": datetime(2026, 1, 1)})
    after = read_nnunet_model(folder)
    assert capsys.readouterr().out == ""
    assert after.manifest == before.manifest
    for name in before.manifest.files:
        first, second = before.weights(name), after.weights(name)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_is_needed_is_named_where_it_is_code(folder: Path) -> None:
    weights = torch.load(folder / "fold_0/checkpoint_final.pth", weights_only=False)["network_weights"]
    key = "decoder.seg_layers.0.bias"
    for changes, problem in (
        ({"trainer_name": folder}, "trainer_name is pathlib.PosixPath"),
        ({"init_args": Malicious()}, "init_args is print"),
        ({"network_weights": weights | {key: np.zeros(3)}}, f"{key} is numpy"),
        ({"inference_allowed_mirroring_axes": np.arange(3)}, "inference_allowed_mirroring_axes is numpy"),
    ):
        write(folder, **changes)
        with pytest.raises(InputError) as caught:
            read_nnunet_model(folder)
        assert f"({problem}" in caught.value.problem
        write(folder, **{"trainer_name": "nnUNetTrainer", "network_weights": weights, "init_args": ARGUMENTS})
    write(folder, inference_allowed_mirroring_axes=None)
    assert read_nnunet_model(folder).manifest.members[0].mirror_axes == ()


ARGUMENTS = {"configuration": "3d_fullres"}


@pytest.mark.parametrize("how", ["half", "double", "compiled", "parallel"])
def test_weights_of_other_kinds(folder: Path, how: str) -> None:
    before = read_nnunet_model(folder)
    for checkpoint in folder.glob("fold_*/checkpoint_final.pth"):
        content = torch.load(checkpoint, weights_only=False)
        prefix = {"compiled": "_orig_mod.", "parallel": "module."}.get(how, "")
        kind = {"half": torch.float16, "double": torch.float64}.get(how, torch.float32)
        content["network_weights"] = {
            prefix + key: tensor.to(kind) for key, tensor in content["network_weights"].items()
        }
        torch.save(content, checkpoint)
    after = read_nnunet_model(folder)
    rounding = 1e-3 if how == "half" else 0
    for name in before.manifest.files:
        first, second = before.weights(name), after.weights(name)
        for key in first:
            assert second[key].dtype == torch.float32
            torch.testing.assert_close(first[key], second[key], rtol=rounding, atol=rounding * 1e-3)


@pytest.mark.parametrize(
    ("plans", "named"),
    [
        ({"image_reader_writer": "MyReader"}, "MyReader"),
        ({"label_manager": "MyLabels"}, "MyLabels"),
    ],
)
def test_what_segfit_does_not_have_is_refused_by_name(folder: Path, plans: dict[str, object], named: str) -> None:
    plans_with(folder, **plans)
    with pytest.raises(InputError, match=named):
        read_nnunet_model(folder)


def test_trainers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"nnUNetTrainer_250epochs", "nnUNetTrainerDA5", "nnUNetTrainer_2000epochs_NoMirroring"} <= TRAINERS
    write(folder, trainer_name="nnUNetTrainerCELoss")
    assert read_nnunet_model(folder).manifest.provenance["trainer"] == "nnUNetTrainerCELoss"
    write(folder, trainer_name="nnUNetTrainerReLU")
    with pytest.raises(InputError, match="nnUNetTrainerReLU") as caught:
        read_nnunet_model(folder)
    assert "import --trainer nnUNetTrainer" in caught.value.action
    command = ["import", str(folder), "-o", str(tmp_path / "model")]
    assert run(command) == 2
    assert run([*command, "--trainer", "nnUNetTrainer"]) == 0
    assert open_bundle(tmp_path / "model").manifest.provenance["trainer"] == "nnUNetTrainerReLU"


def turned(image: nib.Nifti1Image, axes: str) -> nib.Nifti1Image:
    """Return the same image with its voxels stored along other axes."""
    there = nib.orientations.axcodes2ornt(tuple(axes))
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), there))


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_readers_that_reorient(folder: Path, golden: Path, tmp_path: Path, reader: str) -> None:
    raw = golden / "inference/raw/Dataset602_TinyRegions/imagesTs"
    case = sorted(raw.glob("*_0000.nii.gz"))[0].name.removesuffix("_0000.nii.gz")
    images = [nib.load(raw / f"{case}_{channel:04d}.nii.gz") for channel in range(2)]
    for axes in ("RAS", "LIP"):
        for channel, image in enumerate(images):
            turned(image, axes).to_filename(tmp_path / f"{axes}_{channel:04d}.nii.gz")
    files = {axes: [tmp_path / f"{axes}_{channel:04d}.nii.gz" for channel in range(2)] for axes in ("RAS", "LIP")}
    plain = load_model(folder, "cpu").predict(files["RAS"])
    other = load_model(folder, "cpu").predict(files["LIP"])
    plans_with(folder, image_reader_writer=reader)
    model = load_model(folder, "cpu")
    assert model.manifest.members[0].configuration.preprocessing.orientation == "canonical"
    assert np.array_equal(model.predict(files["RAS"]).labels, plain.labels)
    found = model.predict(files["LIP"])
    found.save(tmp_path / "found.nii.gz")
    back = turned(nib.load(tmp_path / "found.nii.gz"), "RAS")
    assert np.array_equal(np.asarray(back.dataobj).T, plain.labels)
    assert not np.array_equal(found.labels, other.labels)  # a reader that does not reorient sees another image


@pytest.mark.parametrize("pickled", [False, True])
def test_postprocessing(folder: Path, *, pickled: bool) -> None:
    place = folder / "crossval_results_folds_0_1"
    place.mkdir()
    steps = [{"labels_or_regions": [[1, 2, 3], [2, 3], [3]]}, {"labels_or_regions": [2, 3]}]
    write_steps(place, steps, pickled=pickled)
    found = read_nnunet_model(folder).manifest.postprocessing
    assert [step.values for step in found] == [(1, 2, 3), (2, 3)]
    assert found[1].text == "keep only the largest connected component of core"
    assert read_nnunet_model(folder, [0]).manifest.postprocessing == ()  # decided for other folds


def write_steps(folder: Path, steps: list[dict[str, object]], *, pickled: bool) -> None:
    name = KEEP
    if not pickled:
        content = {"postprocessing_fns": [name] * len(steps), "postprocessing_kwargs": steps}
        (folder / "postprocessing.json").write_text(json.dumps(content))
        return
    module = ModuleType("nnunetv2.postprocessing.remove_connected_components")
    exec(f"def {name}(): raise AssertionError", module.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        for part in ("nnunetv2", "nnunetv2.postprocessing"):
            patch.setitem(sys.modules, part, ModuleType(part))
        patch.setitem(sys.modules, module.__name__, module)
        numbers = [
            {key: [tuple(one) if isinstance(one, list) else np.int64(one) for one in value]}  # type: ignore[attr-defined]
            for step in steps
            for key, value in step.items()
        ]
        content = ([module.__dict__[name]] * len(steps), numbers)
        (folder / "postprocessing.pkl").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    "content",
    [
        {"postprocessing_fns": ["smooth"], "postprocessing_kwargs": [{}]},
        {"postprocessing_fns": [KEEP], "postprocessing_kwargs": [{"labels_or_regions": 9}]},
        {"postprocessing_fns": [KEEP], "postprocessing_kwargs": [{"labels_or_regions": 1, "background_label": 2}]},
        {"postprocessing_fns": [KEEP], "postprocessing_kwargs": []},
        {"postprocessing_fns": 1, "postprocessing_kwargs": 1},
        [],
    ],
)
def test_postprocessing_that_cannot_be_done_is_refused(folder: Path, content: object) -> None:
    place = folder / "crossval_results_folds_0_1"
    place.mkdir()
    (place / "postprocessing.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"postprocessing\.json"):
        read_nnunet_model(folder)
