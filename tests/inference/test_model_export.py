"""Models as nnU-Net's folders: what is read back is what was written, and what nnU-Net lacks is refused by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from segfit.bundle.bundle import Bundle, Member, open_bundle
from segfit.cli.main import run
from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError, Problem
from segfit.inference.open_model import open_model
from segfit.labels import Exchange
from segfit.nnunet.model_export import export_nnunet_model
from segfit.progress import SILENT, KeptWarnings
from segfit.specs import Configuration, IntensityStatistics, Normalization, ResamplingSpec

MODELS = [
    "Dataset601_TinyBlobs/nnUNetTrainer__nnUNetPlans__2d",
    "Dataset601_TinyBlobs/nnUNetTrainer__nnUNetPlans__3d_fullres",
    "Dataset601_TinyBlobs/nnUNetTrainer__nnUNetResEncUNetMPlans__3d_fullres",
    "Dataset602_TinyRegions/nnUNetTrainer__nnUNetPlans__3d_fullres",
    "Dataset603_TinyCascade/nnUNetTrainer__nnUNetPlans__3d_lowres",
    "Dataset603_TinyCascade/nnUNetTrainer__nnUNetPlans__3d_cascade_fullres",
]
SAME = ("labels", "channel_names", "file_ending", "postprocessing")


def require_same(found: Bundle, expected: Bundle) -> None:
    """All that predictions depend on is the same, weights to the bit."""
    for name in SAME:
        assert getattr(found.manifest, name) == getattr(expected.manifest, name), name
    stages = [(bundle.manifest.previous_stage, *bundle.manifest.members) for bundle in (found, expected)]
    for own, other in zip(*stages, strict=True):
        assert (own is None) == (other is None)
        if own is None or other is None:
            continue
        assert own.mirror_axes == other.mirror_axes
        alone = {"next_stage": None}  # a first stage by itself has none
        assert own.configuration.model_copy(update=alone) == other.configuration.model_copy(update=alone)
        for one, two in zip(own.weights.items(), other.weights.items(), strict=True):
            assert one[0] == two[0]
            first, second = found.weights(one[1]), expected.weights(two[1])
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.golden("inference/models")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_nnunet_comes_back_the_same(golden: Path, tmp_path: Path, name: str) -> None:
    model, out = golden / "inference/models" / name, tmp_path / "out"
    imported = tmp_path / "model"
    assert run(["import", str(model), "-o", str(imported)]) == 0
    assert run(["export", str(imported), "--to", "nnunet", "-o", str(out)]) == 0
    require_same(open_model(out), open_model(model))
    assert run(["export", str(imported), "--to", "nnunet", "-o", str(out)]) == 2  # it is there
    for file in out.rglob("plans.json"):  # as nnU-Net has them: complete, and with what its checkpoints say
        checkpoint = torch.load(file.parent / "fold_0" / "checkpoint_final.pth", weights_only=True)
        assert checkpoint["init_args"]["plans"] == json.loads(file.read_text())
        assert checkpoint["trainer_name"] == "nnUNetTrainer"


def statistics() -> IntensityStatistics:
    names = ("mean", "median", "std", "min", "max", "percentile_00_5", "percentile_99_5")
    return IntensityStatistics(**dict(zip(names, (50.0, 48.0, 20.0, -100.0, 400.0, -50.0, 300.0), strict=True)))


def changed(configuration: Configuration, **changes: Any) -> Configuration:
    return configuration.model_copy(update={"preprocessing": configuration.preprocessing.model_copy(update=changes)})


@pytest.mark.parametrize(
    "changes",
    [
        {"orientation": "stored"},
        {"orientation": "canonical"},
        {"normalization": (Normalization(scheme="ct", statistics=statistics()),)},
        {"normalization": (Normalization(scheme="zscore", use_mask=True),)},
        {"normalization": (Normalization(scheme="rgb_to_0_1"),)},
        {"normalization": (Normalization(scheme="rescale_to_0_1"),)},
        {"normalization": (Normalization(scheme="none"),)},
        {"resample_logits": ResamplingSpec(method="torch", order=1)},
        {"resample_image": ResamplingSpec(order=3, force_separate=True, separate_threshold=2.0)},
        {"resample_image": ResamplingSpec(method="none", order=0)},
        {"transpose": (2, 0, 1)},
    ],
)
def test_what_plans_can_say_comes_back(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    own = changed(configuration(), **changes)
    steps = (PostprocessingStep.largest_of("a", (1,)), PostprocessingStep.largest_of("labels 1 and 2", (1, 2)))
    model = write_model(tmp_path / "model", member(own, folds=2, mirror_axes=(0, 1)), postprocessing=steps)
    export_nnunet_model(open_bundle(model), tmp_path / "out")
    found, expected = open_model(tmp_path / "out"), open_bundle(model)
    assert found.manifest.members[0].configuration.preprocessing == own.preprocessing
    assert [step.values for step in found.manifest.postprocessing] == [(1,), (1, 2)]
    assert found.manifest.members[0].mirror_axes == (0, 1)
    assert found.manifest.labels == expected.manifest.labels
    for one, two in zip(found.manifest.files, expected.manifest.files, strict=True):
        first, second = found.weights(one), expected.weights(two)
        assert all(torch.equal(first[key], second[key]) for key in second)


def test_the_pickle_of_steps_is_what_nnunet_unpickles(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = (PostprocessingStep.largest_of("a", (1,)), PostprocessingStep.largest_of("both", (1, 2)))
    model = write_model(tmp_path / "model", member(configuration()), postprocessing=steps)
    export_nnunet_model(open_bundle(model), tmp_path / "out")
    name = "remove_all_but_largest_component_from_segmentation"
    parts = ["nnunetv2", "nnunetv2.postprocessing", "nnunetv2.postprocessing.remove_connected_components"]
    for part in parts:
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    setattr(sys.modules[parts[-1]], name, print)
    path = tmp_path / "out/crossval_results_folds_0/postprocessing.pkl"
    functions, arguments = pickle.loads(path.read_bytes())
    assert functions == [print, print]
    assert arguments == [{"labels_or_regions": 1}, {"labels_or_regions": [1, 2]}]


def test_several_configurations_become_the_folder_of_a_dataset(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    models = [write_model(tmp_path / name, member(configuration(), folds=2)) for name in ("one", "two")]
    together = open_model(models)
    out = tmp_path / "Dataset007_Pair"
    places = export_nnunet_model(together, out)
    assert [place.name for place in places] == [
        f"nnUNetTrainer__{plans}__{configuration().name}" for plans in ("segfitPlans", "segfitPlans2")
    ]
    found = open_model(out)
    assert len(found.manifest.members) == 2
    for one, two in zip(found.manifest.files, together.manifest.files, strict=True):
        first, second = found.weights(one), together.weights(two)
        assert all(torch.equal(first[key], second[key]) for key in second)
    assert len(list((out / "ensembles").glob("*/postprocessing.pkl"))) == 1
    single = tmp_path / "Dataset008_Single"
    export_nnunet_model(open_bundle(models[0]), single)  # called as nnU-Net calls datasets
    assert [path.name for path in single.iterdir() if path.is_dir()] == [places[0].name]
    found_one = open_model(single).manifest.members[0].configuration
    assert found_one.model_copy(update={"memory_estimate": 0}) == configuration()


def test_what_nnunet_does_not_have_is_refused_by_name(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    plain = configuration()
    sided = member(plain, mirror_axes=(0,)).model_copy(update={"exchange": Exchange(axis=0, pairs=((1, 2),))})
    network = plain.network.model_copy(update={"plugin": "somewhere:Net"})
    other = member(plain.model_copy(update={"network": network}))
    base = open_bundle(write_model(tmp_path / "model", member(plain)))
    for item, named in ((sided, "exchanges left and right"), (other, "somewhere:Net")):
        manifest = base.manifest.model_copy(update={"members": (item,)})
        with pytest.raises(InputError, match=named):
            export_nnunet_model(Bundle(manifest, base.source, files=base.files), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    second = plain.model_copy(update={"previous_stage": "3d_lowres"})
    manifest = base.manifest.model_copy(update={"members": (member(second),)})
    with pytest.raises(InputError, match="does not hold the first"):
        export_nnunet_model(Bundle(manifest, base.source, files=base.files), tmp_path / "out")


@pytest.mark.parametrize(("to", "most"), [("nnunet", 6000), ("bioimageio", 6000), ("zip", 1500)])
def test_a_full_disk_is_told_and_leaves_nothing(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
    to: str,
    most: int,
) -> None:
    """Files that may not be larger than a few KB stand for it."""
    model = write_model(tmp_path / "model", member(configuration()), authors="A", licence="CC0")
    target = tmp_path / "out" / f"model{'.zip' if to == 'zip' else ''}"
    code = f"""
import resource, sys
from segfit.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most}))
sys.exit(run(["export", {str(model)!r}, "--to", {to!r}, "-o", {str(target)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert os.strerror(errno.EFBIG) in done.stderr
    assert str(target) in done.stderr.replace("\n", "")
    assert list(target.parent.iterdir()) == []


def test_what_differs_in_the_copy_is_told(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    labels = {"background": 0, "a": 5, "b": 9}
    slow = member(configuration()).model_copy(update={"tile_step": 0.25})
    steps = [PostprocessingStep.largest_of("a", (1,)), PostprocessingStep.from_size("a", (1,), 9)]
    steps.append(PostprocessingStep.filling("b", 2))
    model = write_model(tmp_path / "model", slow, labels=labels, image_ending="/", postprocessing=steps)
    kept = KeptWarnings(SILENT)
    export_nnunet_model(open_bundle(model), tmp_path / "out", progress=kept)
    told: list[Problem] = list(kept.warnings)
    lacking = ["postprocessing_left_out"] * 2
    assert [item.code for item in told] == ["label_values", "image_format", "tile_step", *lacking]
    assert open_model(tmp_path / "out").manifest.postprocessing == tuple(steps[:1])
    declared = json.loads((tmp_path / "out/dataset.json").read_text())
    assert declared["labels"] == {"background": 0, "a": 1, "b": 2}
    assert declared["file_ending"] == ".nii.gz"
    assert np.isclose(slow.tile_step, 0.25)


@pytest.mark.parametrize(("ending", "reader"), [(".png", "NaturalImage2DIO"), (".nii.gz", "SimpleITKIO")])
def test_pictures(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
    ending: str,
    reader: str,
) -> None:
    def flat(size: float) -> Configuration:
        return configuration("2d", ndim=2, patch=(16, 16), spacing=(size, size))

    size = 1.0 if ending == ".png" else 0.5
    own = flat(size)
    model = write_model(tmp_path / "model", member(own, mirror_axes=(0, 1)), image_ending=ending)
    export_nnunet_model(open_bundle(model), tmp_path / "out")
    assert json.loads((tmp_path / "out/plans.json").read_text())["image_reader_writer"] == reader
    found = open_model(tmp_path / "out").manifest.members[0].configuration
    assert found.preprocessing == own.preprocessing
    assert found.preprocessing.image_ndim == 2
    sized = write_model(tmp_path / "sized", member(flat(0.5)), image_ending=".png")
    with pytest.raises(InputError, match="reads none"):
        export_nnunet_model(open_bundle(sized), tmp_path / "none")


@pytest.mark.golden("inference/models/Dataset601_TinyBlobs")
def test_predictions_with_what_nnunets_commands_need(golden: Path, tmp_path: Path) -> None:
    model = golden / "inference/models/Dataset601_TinyBlobs/nnUNetTrainer__nnUNetPlans__3d_fullres"
    raw, out = golden / "inference/raw/Dataset601_TinyBlobs/imagesTs", tmp_path / "out"
    image = sorted(raw.glob("*_0000.nii.gz"))[0]
    case = image.name.removesuffix("_0000.nii.gz")
    command = ["predict", "--model", str(model), str(image), "-o", str(out), "--no-mirror", "--format", "nnunet"]
    assert run([*command, "--probabilities", "--folds", "0"]) == 0
    assert {file.name for file in out.iterdir()} == {
        "dataset.json", "plans.json", f"{case}.nii.gz", f"{case}.npz", f"{case}.pkl",
    }  # fmt: skip
    known = pickle.loads((out / f"{case}.pkl").read_bytes())
    stored = nib.load(image)
    np.testing.assert_allclose(known["spacing"], np.linalg.norm(stored.affine[:3, :3], axis=0)[::-1], rtol=1e-5)
    stuff = known["sitk_stuff"]
    turned = np.diag([-1, -1, 1]) @ stored.affine[:3]  # nnU-Net's library counts from the other side
    np.testing.assert_allclose(stuff["origin"], turned[:, 3], atol=1e-4)
    direction = np.reshape(stuff["direction"], (3, 3))
    np.testing.assert_allclose(direction * stuff["spacing"], turned[:, :3], atol=1e-5)
    assert np.load(out / f"{case}.npz")["probabilities"].shape[1:] == stored.shape[::-1]
    assert json.loads((out / "plans.json").read_text())["image_reader_writer"] == "SimpleITKIO"
    assert run([*command, "--ending", ".mgz"]) == 2  # which nnU-Net does not read
