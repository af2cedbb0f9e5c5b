"""Models of nnU-Net of every kind predict what the same network predicts as a model of segfit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture

from segfit.bundle.bundle import Member, open_bundle
from segfit.errors import InputError
from segfit.geometry import Grid
from segfit.images import tiff
from segfit.inference.model import load_model
from segfit.inference.open_model import open_model
from segfit.nnunet.model_export import export_nnunet_model
from segfit.specs import Configuration

Configure = Callable[..., Configuration]
Make = Callable[..., Member]
Write = Callable[..., Path]


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).integers(1, 250, shape).astype(np.uint8)


def nifti(folder: Path) -> Path:
    path = folder / "case_0000.nii.gz"
    nib.save(nib.Nifti1Image(noise(20, 18, 12).astype(np.int16), np.diag([1.5, 1.5, 3, 1])), path)
    return path


def flat_nifti(folder: Path) -> Path:
    path = folder / "case_0000.nii.gz"
    nib.save(nib.Nifti1Image(noise(30, 26).astype(np.int16), np.diag([0.5, 0.5, 1, 1])), path)
    return path


def stack(folder: Path) -> Path:
    path = folder / "case_0000.tif"
    tiff.write(path, noise(12, 20, 18), Grid((12, 20, 18), (3.0, 1.5, 1.5)))
    return path


def colours(folder: Path) -> Path:
    path = folder / "case_0000.png"
    Picture.fromarray(noise(40, 36, 3)).save(path)
    return path


VOLUME = {"spacing": (2.0, 1.0, 1.0)}
KINDS: dict[str, tuple[dict[str, Any], str, str, Callable[[Path], Path]]] = {
    "SimpleITKIO": (VOLUME, ".nii.gz", "SimpleITKIO", nifti),
    "NibabelIO": (VOLUME, ".nii.gz", "NibabelIO", nifti),
    "NibabelIOWithReorient": (VOLUME | {"orientation": "canonical"}, ".nii.gz", "NibabelIOWithReorient", nifti),
    "SimpleITKIOWithReorient": (VOLUME | {"orientation": "canonical"}, ".nii.gz", "SimpleITKIOWithReorient", nifti),
    "Tiff3DIO": (VOLUME, ".tif", "Tiff3DIO", stack),
    "slices": (
        {"name": "2d", "ndim": 2, "patch": (16, 16), "spacing": (None, 1.0, 1.0), "transpose": (1, 0, 2)},
        ".nii.gz", "SimpleITKIO", nifti,
    ),
    "flat NIfTI": (
        {"name": "2d", "ndim": 2, "patch": (16, 16), "spacing": (0.75, 0.75)}, ".nii.gz", "SimpleITKIO", flat_nifti,
    ),
    "colours": (
        {"name": "2d", "ndim": 2, "patch": (16, 16), "spacing": (1.0, 1.0), "channels": 3},
        ".png", "NaturalImage2DIO", colours,
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def pair(
    request: pytest.FixtureRequest, configuration: Configure, member: Make, write_model: Write, tmp_path: Path
) -> tuple[Path, Path, Path]:
    """A model of segfit, the same as one of nnU-Net, and an image."""
    shape, ending, reader, image = KINDS[request.param]
    own = member(configuration(**shape), folds=2, mirror_axes=(0, 1))
    model = write_model(tmp_path / "model", own, image_ending=ending)
    theirs = tmp_path / "theirs"
    export_nnunet_model(open_bundle(model), theirs)
    edited(theirs / "plans.json", lambda plans: plans.update(image_reader_writer=reader))
    return model, theirs, image(tmp_path)


def same(first: Path, second: Path, image: Path) -> bool:
    one, two = (load_model(path, "cpu").predict(image, probabilities=True) for path in (first, second))
    assert one.probabilities is not None
    assert two.probabilities is not None
    assert len(np.unique(one.labels)) > 1
    np.testing.assert_allclose(one.probabilities, two.probabilities, atol=1e-5)  # channels lie otherwise
    return bool((one.labels == two.labels).mean() > 0.999)


def test_every_reader(pair: tuple[Path, Path, Path]) -> None:
    assert same(*pair)


def test_plans_of_older_versions(pair: tuple[Path, Path, Path]) -> None:
    """Before 2.3 there was no architecture, intensities were those of modalities, and channels were modalities too."""
    model, theirs, image = pair

    def old(plans: dict[str, Any]) -> None:
        for entry in plans["configurations"].values():
            kwargs = entry.pop("architecture")["arch_kwargs"]
            entry |= {
                "UNet_class_name": "PlainConvUNet",
                "UNet_base_num_features": kwargs["features_per_stage"][0],
                "unet_max_num_features": 320,
                "conv_kernel_sizes": kwargs["kernel_sizes"],
                "pool_op_kernel_sizes": kwargs["strides"],
                "n_conv_per_stage_encoder": kwargs["n_conv_per_stage"],
                "n_conv_per_stage_decoder": kwargs["n_conv_per_stage_decoder"],
            }
        plans["foreground_intensity_properties_by_modality"] = plans.pop("foreground_intensity_properties_per_channel")

    edited(theirs / "plans.json", old)
    edited(theirs / "dataset.json", lambda content: content.update(modality=content.pop("channel_names")))
    for file in theirs.glob("fold_*/*.pth"):
        content = torch.load(file, weights_only=True)
        content.pop("_best_ema")
        content["network_weights"] = {f"_orig_mod.{name}": one for name, one in content["network_weights"].items()}
        torch.save(content, file)
    assert same(model, theirs, image)


def test_an_ignored_label_has_no_output(
    configuration: Configure, member: Make, write_model: Write, tmp_path: Path
) -> None:
    labels = {"background": 0, "a": 1, "b": 2, "ignore": 3}
    model = write_model(tmp_path / "model", member(configuration()), labels=labels)
    export_nnunet_model(open_bundle(model), tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/dataset.json").read_text())["labels"] == labels
    assert load_model(tmp_path / "theirs", "cpu").labels.ignore_value == 3
    assert same(model, tmp_path / "theirs", nifti(tmp_path))


def test_all_as_a_fold(configuration: Configure, member: Make, write_model: Write, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", member(configuration()))
    export_nnunet_model(open_bundle(model), tmp_path / "theirs")
    (tmp_path / "theirs/fold_0").rename(tmp_path / "theirs/fold_all")
    assert same(model, tmp_path / "theirs", nifti(tmp_path))
    again = tmp_path / "again"
    export_nnunet_model(open_model(tmp_path / "theirs"), again)
    assert [path.name for path in again.glob("fold_*")] == ["fold_all"]


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("plans.json", "image_reader_writer", "DicomIO"),
        ("plans.json", "label_manager", "MyLabelManager"),
        ("plans.json", "configurations.preprocessor_name", "MyPreprocessor"),
        ("plans.json", "configurations.normalization_schemes", ["MyNormalization"]),
        ("plans.json", "configurations.resampling_fn_data", "my_resampling"),
        ("plans.json", "configurations.resampling_fn_seg", "my_resampling"),
        ("plans.json", "configurations.resampling_fn_probabilities", "my_resampling"),
        ("plans.json", "configurations.architecture", {"network_class_name": "a.MyNet", "arch_kwargs": {}}),
        ("checkpoint", "trainer_name", "nnUNetTrainerMine"),
    ],
)
def test_what_segfit_does_not_have_is_refused_by_its_name(
    configuration: Configure, member: Make, write_model: Write, tmp_path: Path, file: str, key: str, value: Any
) -> None:
    export_nnunet_model(open_bundle(write_model(tmp_path / "model", member(configuration()))), tmp_path / "theirs")

    def change(plans: dict[str, Any]) -> None:
        *inside, last = key.split(".")
        (plans["configurations"]["3d_fullres"] if inside else plans)[last] = value

    if file == "checkpoint":
        path = tmp_path / "theirs/fold_0/checkpoint_final.pth"
        torch.save(torch.load(path, weights_only=True) | {key: value}, path)
    else:
        edited(tmp_path / "theirs" / file, change)
    named = (
        value[0] if isinstance(value, list) else value["network_class_name"][2:] if isinstance(value, dict) else value
    )
    with pytest.raises(InputError, match=named):
        load_model(tmp_path / "theirs", "cpu")
