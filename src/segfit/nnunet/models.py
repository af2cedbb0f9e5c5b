"""Models of nnU-Net v2, read from their folder as they are.

    <trainer>__<plans>__<configuration>/
      plans.json  dataset.json  fold_<k>/checkpoint_final.pth

What plans, dataset and checkpoint say is followed, or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from segfit.bundle.bundle import Bundle, Member, ModelManifest, weights_name
from segfit.errors import InputError, reason_of
from segfit.files import first_fault, read_json
from segfit.fingerprint.fingerprint import ImageFingerprint
from segfit.fingerprint.training_images import TrainingImages
from segfit.labels import LabelScheme
from segfit.nnunet.checkpoint import EXPORT_WEIGHTS, foreign_name, read_checkpoint
from segfit.nnunet.plans_reader import channel_names_of, read_configurations
from segfit.nnunet.postprocessing import read_postprocessing
from segfit.nnunet.trainers import TRAINERS
from segfit.specs import Configuration, NetworkSpec
from segfit.text import listing, printable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["folds_of", "is_nnunet_model", "read_nnunet_model"]

_FOLD = "fold_"
_FILES = {"final": "checkpoint_final.pth", "best": "checkpoint_best.pth", "latest": "checkpoint_latest.pth"}


def is_nnunet_model(path: Path) -> bool:
    """Return whether a folder looks like a trained model of nnU-Net."""
    return (path / "plans.json").is_file() and (path / "dataset.json").is_file() and any(path.glob(_FOLD + "*"))


def read_nnunet_model(
    path: Path,
    folds: Sequence[int | str] | None = None,
    *,
    checkpoint: str | None = None,
    trainer: str | None = None,
) -> Bundle:
    """Read a model folder of nnU-Net into a bundle in memory.

    Parameters
    ----------
    folds : numbers or "all"; None: every fold with a checkpoint ("all" only if there is no other)
    checkpoint : best, final, latest, or a file name in the fold folders; None: final
    trainer : the trainer that the model is read as one of, whatever its checkpoints say; None: what they say

    Configuration, trainer and mirroring axes come from the first fold. The second stage of a cascade brings the first
    one along where its folder, with the same folds, lies beside it. What nnU-Net decided to do with the predictions of
    exactly these folds is done to them. Raises `InputError` if a file is missing or damaged, if code would have to run,
    if something does not fit the plans, or if the model needs what segfit does not have.
    """
    plans, dataset = read_json(path / "plans.json"), read_json(path / "dataset.json")
    if not isinstance(plans, dict) or not isinstance(dataset, dict):
        raise InputError(f"{path} is not a model of nnU-Net v2: plans.json and dataset.json must be objects")
    file = _FILES.get(checkpoint or "final") or str(checkpoint)
    names = [str(fold) for fold in folds] if folds is not None else folds_of(path, file)
    read = {fold: _Trained.read(path / f"{_FOLD}{fold}" / file) for fold in names}
    first = read[names[0]]
    _require_known_trainer(path, trainer or first.trainer)
    labels, channels, ending = _declared(path, dataset)
    name = first.configuration
    with _told_of(path / "plans.json"):
        configuration = _as_trained(read_configurations(plans, dataset, [name])[name], first.weights)
    weights = {weights_name(name, fold): trained.of(configuration.network) for fold, trained in read.items()}
    called = f"{first.trainer}__{plans.get('plans_name', 'nnUNetPlans')}__{name}"  # and not as the folder is
    first_stage = _first_stage(path, configuration, names, file, trainer)
    if first_stage is not None:
        weights |= first_stage.states or {}
    try:
        member = Member(
            configuration=configuration,
            weights={fold: weights_name(name, fold) for fold in names},
            mirror_axes=first.mirror_axes,
            precision="fp16",  # what nnU-Net predicts with on GPUs
            channels_last=True,  # the same sums in a third to two fifths less time on a processor
        )
        manifest = ModelManifest(
            name=f"{plans.get('dataset_name', dataset.get('name', 'nnU-Net'))} {called}",
            labels=labels,
            channel_names=channels,
            file_ending=ending,
            training_images=_training_images(path / "dataset_fingerprint.json", channels),
            members=(member,),
            previous_stage=None if first_stage is None else first_stage.manifest.members[0],
            postprocessing=read_postprocessing(path / f"crossval_results_folds_{'_'.join(names)}", labels),
            provenance={"imported_from": called, "trainer": first.trainer},
        )
    except ValidationError as error:
        raise InputError(f"{path} cannot be used, {first_fault(error)}") from None
    return Bundle(manifest, path, weights)


def _declared(path: Path, dataset: Mapping[str, Any]) -> tuple[LabelScheme, tuple[str, ...], str]:
    """Return labels, channel names and file ending that ``dataset.json`` declares."""
    try:
        with _told_of(path / "dataset.json"):
            labels = LabelScheme.from_declaration(dataset["labels"], dataset.get("regions_class_order"))
            return labels, channel_names_of(dataset), str(dataset["file_ending"])
    except KeyError as error:
        raise InputError(f"{path} is not a model of nnU-Net v2: {error} is missing from dataset.json") from None


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Name the file in an `InputError` about what it holds."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error.problem}", error.action or "copy the model again") from None


@dataclass(frozen=True, slots=True, eq=False)
class _Trained:
    """What is used of a checkpoint."""

    path: Path
    weights: Mapping[str, Any]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> _Trained:
        content = read_checkpoint(path)
        weights, arguments = (_part(content, key, dict, path) for key in ("network_weights", "init_args"))
        mirrored = "inference_allowed_mirroring_axes"
        axes = _part(content, mirrored, list | tuple, path) if content.get(mirrored) else ()  # old ones do not have it
        if not all(type(axis) is int for axis in axes):
            raise InputError(f"{path} is damaged: it mirrors the axes {axes!r}", "copy it again")
        for name, value in weights.items():
            if not isinstance(name, str):
                raise InputError(f"{path} is damaged: its weights have the name {name!r}", "copy it again")
            if (named := foreign_name(value)) is not None:
                raise InputError(f"{path} cannot be read safely ({name} is {named}, which is code)", EXPORT_WEIGHTS)
            if not hasattr(value, "shape"):
                raise InputError(f"{path} is damaged: {name} of its weights is {value!r}", "copy it again")
        trainer = _part(content, "trainer_name", str, path)
        return cls(path, weights, _part(arguments, "configuration", str, path), trainer, tuple(axes))

    def of(self, network: NetworkSpec) -> Mapping[str, Tensor]:
        """Return the weights under our names; `InputError` if they are not those of the network."""
        from segfit.nnunet.weights import from_nnunet

        with _told_of(self.path):
            return from_nnunet(self.weights, network)


def _part(content: Mapping[str, Any], key: str, kind: type | UnionType, path: Path) -> Any:
    """Return a value of a checkpoint; `InputError` if it is not there or of another kind."""
    value = content.get(key)
    if (named := foreign_name(value)) is not None:
        raise InputError(f"{path} cannot be read safely ({key} is {named}, which is code)", EXPORT_WEIGHTS)
    if not isinstance(value, kind):
        raise InputError(f"{path} is not a checkpoint of nnU-Net v2: '{key}' is missing or malformed")
    return value


def _require_known_trainer(path: Path, trainer: str) -> None:
    if trainer in TRAINERS:
        return
    called = " ".join(printable(trainer).split())
    raise InputError(
        f"{path} was trained by {called}, which is none of the trainers of nnU-Net 2.8.1 with "
        "the network of the plans: the network may compute something else with the same weights",
        "if it changes the training alone, segfit import --trainer nnUNetTrainer makes a model of it",
    )


def _as_trained(configuration: Configuration, state: Mapping[str, Any]) -> Configuration:
    """Return the configuration with batch norm where its weights have it, which plans of nnUNetTrainerBN do not say."""
    if not any(key.endswith(".running_mean") for key in state):
        return configuration
    network = configuration.network.model_copy(update={"norm": "batch"})
    return configuration.model_copy(update={"network": network})


def _first_stage(
    path: Path, configuration: Configuration, folds: Sequence[str], checkpoint: str, trainer: str | None
) -> Bundle | None:
    """Return the model whose labels this one takes, if it lies beside it under nnU-Net's name, with these folds."""
    previous = configuration.previous_stage
    if previous is None or not path.name.endswith(f"__{configuration.name}"):
        return None
    beside = path.with_name(path.name.removesuffix(configuration.name) + previous)
    there = is_nnunet_model(beside) and all((beside / f"{_FOLD}{fold}" / checkpoint).is_file() for fold in folds)
    return read_nnunet_model(beside, folds, checkpoint=checkpoint, trainer=trainer) if there else None


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
        reason = first_fault(error) if isinstance(error, ValidationError) else reason_of(error)
        raise InputError(f"{path} is damaged ({reason})", "copy the model folder again, or remove that file") from None


def folds_of(path: Path, checkpoint: str = _FILES["final"]) -> list[str]:
    """Return the folds of a model folder that have a checkpoint, "all" only if there is no other."""
    found = sorted(file.parent.name.removeprefix(_FOLD) for file in path.glob(f"{_FOLD}*/{checkpoint}"))
    if not found:
        others = sorted({file.name for file in path.glob(f"{_FOLD}*/*.pth")})
        action = "give a trained model"
        if others:
            name = next((short for short, file in _FILES.items() if file in others), others[0])
            action = f"there is {listing(others)}, of a training that has not ended: --checkpoint {name} takes it"
        raise InputError(f"{path} has no {_FOLD}*/{checkpoint}", action)
    return [fold for fold in found if fold != "all"] or found
