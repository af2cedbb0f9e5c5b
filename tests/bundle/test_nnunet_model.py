"""Reading model folders of the reference; what they predict is tested against golden data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from segfit.bundle.bundle import open_bundle
from segfit.cli.main import run
from segfit.errors import InputError
from segfit.nnunet.models import is_nnunet_model, read_nnunet_model

pytestmark = pytest.mark.golden("inference/models/Dataset602_TinyRegions")

NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"


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


def test_numpy_scalars_are_let_in(tmp_path: Path, folder: Path) -> None:
    checkpoint = folder / "fold_0" / "checkpoint_final.pth"
    content = torch.load(checkpoint, weights_only=False)
    content["logging"] = {"ema": [np.float32(1), np.float64(2), np.int64(3), np.bool_(True)]}
    torch.save(content, checkpoint)
    assert read_nnunet_model(folder, [0]).manifest.members[0].weights
