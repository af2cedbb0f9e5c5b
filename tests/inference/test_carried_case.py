"""The test case of a model: made up by what is known of training images, predicted as where it was made."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from segfit.bundle.bundle import TEST_CASE, Member, open_bundle, write_bundle
from segfit.cli.main import run
from segfit.errors import InputError
from segfit.fingerprint.fingerprint import ImageFingerprint
from segfit.fingerprint.training_images import TrainingImages
from segfit.inference.carried_case import add_test_case, agreement, phantom
from segfit.inference.open_model import open_model
from segfit.specs import Configuration


@pytest.fixture
def folder(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    images = [
        ImageFingerprint(shape=shape, spacing_mm=(2.0, 1.0, 1.0), shape_after_crop=shape, relative_size_after_crop=1.0)
        for shape in ((7, 30, 30), (9, 32, 34))
    ]
    known = TrainingImages.of(images, "stored", ("channel 0",))
    return write_model(tmp_path / "model", member(configuration(), folds=2, mirror_axes=(2,)), training_images=known)


def test_a_model_predicts_its_test_case_as_where_it_was_made(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="no test case"):
        agreement(open_bundle(folder))
    assert run(["verify", str(folder)]) == 0  # it lacks one, which is no damage
    image = phantom(open_bundle(folder).manifest)
    assert image.grid.shape == (8, 12, 12)  # a patch
    assert image.grid.spacing_mm == (2.0, 1.0, 1.0)
    assert add_test_case(folder, open_bundle(folder).manifest).test_case is not None
    share, voxels = agreement(open_bundle(folder), "cpu")
    assert share == 1.0
    assert voxels == 8 * 12 * 12
    assert len(np.unique(load_file(folder / TEST_CASE)["labels"])) > 1
    capsys.readouterr()
    assert run(["verify", str(folder), "--json"]) == 0
    assert [row["state"] for row in json.loads(capsys.readouterr().out)] == ["good", "good"]
    packed = tmp_path / "m.zip"
    stated = ["--set", "model.licence=CC-BY-4.0", "--set", "model.limits=adults only"]
    assert run(["export", str(folder), "--to", "zip", "-o", str(packed), *stated]) == 0
    assert run(["verify", str(packed)]) == 0
    manifest = open_bundle(packed).manifest
    assert (manifest.licence, manifest.limits, manifest.authors) == ("CC-BY-4.0", "adults only", "not stated")
    with zipfile.ZipFile(packed) as archive:
        card = archive.read("card.md").decode()
    for line in ("Licence: CC-BY-4.0", "Authors: not stated", "Origin of the training data: not stated"):
        assert line in card.splitlines()
    for command in (
        ["export", str(folder), "--to", "zip", "-o", str(packed)],  # it is there
        ["export", str(folder), "--to", "zip", "-o", str(tmp_path / "m.7z")],
        ["export", str(folder), "--to", "zip", "-o", str(tmp_path / "n.zip"), "--set", "training.steps=3"],
        ["export", str(folder), "--to", "zip", "-o", str(tmp_path / "n.zip"), "--include-case", "x"],
        ["export", str(folder), "--to", "zip", "-o", str(tmp_path / "n.zip"), "--skip-incomplete"],
        ["export", str(folder), "--to", "nnunet", "-o", str(tmp_path / "n"), "--set", "model.licence=x"],
    ):
        assert run(command) == 2
    assert not list(tmp_path.glob("n*"))


def test_other_weights_and_damage_are_found(folder: Path, tmp_path: Path) -> None:
    add_test_case(folder, open_bundle(folder).manifest)
    bundle = open_bundle(folder)
    content = (folder / TEST_CASE).read_bytes()
    names = bundle.manifest.files
    swapped = {name: bundle.weights(name) for name in names}
    swapped[names[0]] = {key: -tensor for key, tensor in swapped[names[0]].items()}
    write_bundle(tmp_path / "other", bundle.manifest, swapped, content)
    assert agreement(open_bundle(tmp_path / "other"), "cpu")[0] < 0.99
    assert run(["verify", str(tmp_path / "other")]) == 1
    arrays = load_file(folder / TEST_CASE)
    for changed in (
        {"image": arrays["image"]},
        arrays | {"labels": arrays["labels"][:2]},
        arrays | {"image": arrays["image"][0]},
    ):
        save_file({name: np.ascontiguousarray(array) for name, array in changed.items()}, tmp_path / "case")
        write_bundle(tmp_path / "bad", bundle.manifest, swapped, (tmp_path / "case").read_bytes())
        with pytest.raises(InputError, match=TEST_CASE):
            agreement(open_bundle(tmp_path / "bad"), "cpu")
        assert run(["verify", str(tmp_path / "bad")]) == 1
    (folder / TEST_CASE).write_bytes(b"\0" + content[1:])
    with pytest.raises(InputError, match="checksum"):
        open_bundle(folder)


def test_a_second_stage_alone_has_none(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    own = configuration()
    network = own.network.model_copy(update={"in_channels": 3})
    second = own.model_copy(update={"previous_stage": "3d_lowres", "network": network})
    folder = write_model(tmp_path / "model", member(second))
    assert add_test_case(folder, open_bundle(folder).manifest).test_case is None
    assert run(["verify", str(folder)]) == 0


def test_pictures_have_one_too(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    own = configuration("2d", ndim=2, patch=(16, 16), spacing=(1.0, 1.0), channels=3)
    folder = write_model(tmp_path / "model", member(own), image_ending=".png")
    add_test_case(folder, open_bundle(folder).manifest)
    assert agreement(open_bundle(folder), "cpu") == (1.0, 256)
    flat = configuration("2d", ndim=2, patch=(16, 16), spacing=(None, 1.0, 1.0), transpose=(1, 0, 2))
    folder = write_model(tmp_path / "slices", member(flat))
    add_test_case(folder, open_bundle(folder).manifest)
    assert agreement(open_bundle(folder), "cpu") == (1.0, 3 * 256)


SENTINEL = "Sentinel4711"


@pytest.mark.slow
def test_nothing_in_a_model_names_a_case_a_person_or_a_path(tmp_path: Path) -> None:
    from segfit.dataset.phantom import make_phantom

    data = make_phantom(tmp_path / SENTINEL / "Dataset009_Volumes", cases=5, test_cases=1, shape=(12, 24, 24))
    for file in sorted(data.rglob("*.nii.gz")):
        image = nib.load(file)
        copy = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
        copy.header["descrip"] = SENTINEL
        copy.header["aux_file"] = SENTINEL
        copy.header["db_name"] = SENTINEL
        nib.save(copy, file.with_name(file.name.replace("phantom", SENTINEL)))
        file.unlink()
    project, packed = tmp_path / SENTINEL / "project", tmp_path / "m.zip"
    tiny = ["training.steps=4", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]
    settings = [part for setting in (*tiny, "model.authors=The Authors") for part in ("--set", setting)]
    assert run(["run", str(data), "--out", str(project), *settings]) == 3
    model = project / "model"
    assert {file.name for file in model.iterdir()} >= {"model.json", "card.md", TEST_CASE}
    assert open_bundle(model).manifest.authors == "The Authors"
    assert run(["verify", str(model)]) == 0
    case = f"{SENTINEL}_tr_001"
    assert run(["export", str(project), "--to", "zip", "-o", str(packed), "--include-case", case]) == 0
    assert run(["verify", str(packed)]) == 0
    kept = open_model(packed)
    assert kept.manifest.test_case is not None
    assert kept.manifest.test_case.kind == "case"
    assert run(["export", str(model), "--to", "nnunet", "-o", str(tmp_path / "nnunet")]) == 0
    with zipfile.ZipFile(packed) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    files = [*model.rglob("*"), *(tmp_path / "nnunet").rglob("*")]
    contents += [file.read_bytes() for file in files if file.is_file()]
    assert len(contents) > 8
    assert not any(SENTINEL.encode() in content or str(tmp_path).encode() in content for content in contents)
