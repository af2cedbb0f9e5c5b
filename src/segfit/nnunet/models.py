"""Models of nnU-Net v2, read from their folder as they are.

    <trainer>__<plans>__<configuration>/
      plans.json  dataset.json  fold_<k>/checkpoint_final.pth

Checkpoints are pickles. They are read by torch's safe loader, which runs no code of theirs; all that is allowed beyond
tensors are numpy's plain scalars.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from segfit.bundle.bundle import Bundle, Member, ModelManifest, weights_name
from segfit.errors import InputError, reason_of
from segfit.files import first_fault, read_json
from segfit.fingerprint.fingerprint import ImageFingerprint
from segfit.fingerprint.training_images import TrainingImages
from segfit.labels import LabelScheme
from segfit.nnunet.plans_reader import channel_names_of, read_configurations
from segfit.specs import Configuration

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["folds_of", "is_nnunet_model", "read_checkpoint", "read_nnunet_model"]

_FOLD = "fold_"


def is_nnunet_model(path: Path) -> bool:
    """Return whether a folder looks like a trained model of nnU-Net."""
    return (path / "plans.json").is_file() and (path / "dataset.json").is_file() and any(path.glob(_FOLD + "*"))


def read_nnunet_model(
    path: Path, folds: Sequence[int | str] | None = None, *, checkpoint: str = "checkpoint_final.pth"
) -> Bundle:
    """Read a model folder of nnU-Net into a bundle in memory.

    Parameters
    ----------
    folds : numbers or "all"; None: every fold with a checkpoint ("all" only if there is no other)
    checkpoint : file name in the fold folders

    Configuration, trainer and mirroring axes come from the first fold. The second stage of a cascade brings the first
    one along where its folder, with the same folds, lies beside it. Raises `InputError` if a file is missing, damaged,
    wants to run code, or does not fit the plans.
    """
    from segfit.nnunet.weights import from_nnunet

    plans, dataset = read_json(path / "plans.json"), read_json(path / "dataset.json")
    if not isinstance(plans, dict) or not isinstance(dataset, dict):
        raise InputError(f"{path} is not a model of nnU-Net v2: plans.json and dataset.json must be objects")
    names = [str(fold) for fold in folds] if folds is not None else folds_of(path, checkpoint)
    checkpoints = {fold: read_checkpoint(path / f"{_FOLD}{fold}" / checkpoint) for fold in names}
    first = checkpoints[names[0]]
    try:
        name = first["init_args"]["configuration"]
        mirror_axes = tuple(int(axis) for axis in first["inference_allowed_mirroring_axes"] or ())
        states: dict[str, Mapping[str, Any]] = {fold: found["network_weights"] for fold, found in checkpoints.items()}
        labels = LabelScheme.from_declaration(dataset["labels"], dataset.get("regions_class_order"))
        ending = str(dataset["file_ending"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is not a model of nnU-Net v2: {error} is missing or malformed") from None
    configuration = _as_trained(read_configurations(plans, dataset, [name])[name], states[names[0]])
    weights: dict[str, Mapping[str, Tensor]] = {}
    for fold, state in states.items():
        try:
            weights[weights_name(name, fold)] = from_nnunet(state, configuration.network)
        except InputError as error:
            raise InputError(f"{path / (_FOLD + fold) / checkpoint}: {error}") from None
    first_stage = _first_stage(path, configuration, names, checkpoint)
    if first_stage is not None:
        weights |= first_stage.states or {}
    try:
        member = Member(
            configuration=configuration,
            weights={fold: weights_name(name, fold) for fold in names},
            mirror_axes=mirror_axes,
            precision="fp16",  # what nnU-Net predicts with on GPUs
        )
        manifest = ModelManifest(
            name=f"{plans.get('dataset_name', path.parent.name)} {path.name}",
            labels=labels,
            channel_names=channel_names_of(dataset),
            file_ending=ending,
            training_images=_training_images(path / "dataset_fingerprint.json", channel_names_of(dataset)),
            members=(member,),
            previous_stage=None if first_stage is None else first_stage.manifest.members[0],
            provenance={"imported_from": path.name, "trainer": str(first.get("trainer_name", "unknown"))},
        )
    except ValidationError as error:
        raise InputError(f"{path} cannot be used, {first_fault(error)}") from None
    return Bundle(manifest, path, weights)


def _as_trained(configuration: Configuration, state: Mapping[str, Any]) -> Configuration:
    """Return the configuration with batch norm where its weights have it, which plans of nnUNetTrainerBN do not say."""
    if not any(key.endswith(".running_mean") for key in state):
        return configuration
    network = configuration.network.model_copy(update={"norm": "batch"})
    return configuration.model_copy(update={"network": network})


def _first_stage(path: Path, configuration: Configuration, folds: Sequence[str], checkpoint: str) -> Bundle | None:
    """Return the model whose labels this one takes, if it lies beside it under nnU-Net's name, with these folds."""
    previous = configuration.previous_stage
    if previous is None or not path.name.endswith(f"__{configuration.name}"):
        return None
    beside = path.with_name(path.name.removesuffix(configuration.name) + previous)
    there = is_nnunet_model(beside) and all((beside / f"{_FOLD}{fold}" / checkpoint).is_file() for fold in folds)
    return read_nnunet_model(beside, folds, checkpoint=checkpoint) if there else None


def _training_images(path: Path, channel_names: tuple[str, ...]) -> TrainingImages | None:
    """Return the sizes of the training images, if the fingerprint of nnU-Net is there."""
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        sizes = list(zip(content["shapes_after_crop"], content["spacings"], strict=True))
        images = [
            ImageFingerprint(shape=shape, spacing_mm=spacing, shape_after_crop=shape, relative_size_after_crop=1.0)
            for shape, spacing in sizes
        ]
        return TrainingImages.of(images, "stored", channel_names)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error})", "copy the model folder again, or remove that file") from None


def folds_of(path: Path, checkpoint: str = "checkpoint_final.pth") -> list[str]:
    """Return the folds of a model folder that have a checkpoint, "all" only if there is no other."""
    found = sorted(file.parent.name.removeprefix(_FOLD) for file in path.glob(f"{_FOLD}*/{checkpoint}"))
    if not found:
        raise InputError(f"{path} has no {_FOLD}*/{checkpoint}", "give a trained model or another checkpoint name")
    return [fold for fold in found if fold != "all"] or found


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a file of torch holds, read without running code of its own; `InputError` if it wants to run some."""
    import torch

    if not path.is_file():
        raise InputError(f"{path} is missing", "choose among the folds that are there")
    try:
        with torch.serialization.safe_globals(_plain_numpy()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is told in one sentence
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks for {named[1]}, which is code" if named else "it is damaged, or holds more than numbers"
        raise InputError(f"{path} cannot be read safely ({reason})", "copy it again, or export plain weights") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = reason_of(error)
        raise InputError(f"{path} cannot be read safely ({reason})", "copy it again, or export plain weights") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a checkpoint: it holds no names")
    return content


def _plain_numpy() -> list[Any]:
    """Return what numpy scalars need to be unpickled, under the names of numpy 1 and 2."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")}
    return [
        (scalar, "numpy._core.multiarray.scalar"),
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        *sorted(kinds, key=lambda kind: kind.__name__),
    ]
