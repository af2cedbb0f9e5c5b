"""Any model as the folders of a trained model of nnU-Net v2, which its commands predict with.

Of one configuration it is the model folder itself. Of several (a cascade, an ensemble), and where it is called as
nnU-Net calls datasets, it is the folder of a dataset in nnUNet_results: a model folder for each configuration, and
beside them what is averaged and what is done to the result.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfit.bundle.bundle import Bundle, Member, ModelManifest
from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError, Problem, StageError, warning
from segfit.files import new_folder, write_bytes, write_json
from segfit.images.formats import described
from segfit.nnunet.dataset_export import ENDING_OF_COPY, declaration
from segfit.nnunet.plans_reader import READER_OF_ENDING, PlansFile, write_plans_file
from segfit.nnunet.postprocessing import KEEP_LARGEST
from segfit.progress import LOGGED, Progress
from segfit.specs import Configuration, PreprocessingSpec
from segfit.text import listing

__all__ = ["FLAT_MM", "export_nnunet_model", "plans_and_dataset"]

_TRAINER = "nnUNetTrainer"
_PLANS = "segfitPlans"
_DATASET = re.compile(r"Dataset\d{3}_.+")
FLAT_MM = 999.0  # what nnU-Net takes for the size of 2D images along the axis that they lack
_MODULE = "nnunetv2.postprocessing.remove_connected_components"


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """What becomes a model folder of its own."""

    member: Member
    plans: dict[str, Any]

    @property
    def folder(self) -> str:
        """Its name, as nnU-Net has it."""
        return f"{_TRAINER}__{self.plans['plans_name']}__{self.member.configuration.name}"

    @property
    def folds(self) -> list[int | str]:
        """Numbers, or "all"."""
        return [int(fold) if fold.isdecimal() else fold for fold in self.member.weights]


def export_nnunet_model(bundle: Bundle, folder: Path | str, *, progress: Progress = LOGGED) -> list[Path]:
    """Write a model as nnU-Net v2 reads it, into a folder that must not exist yet; return the model folders.

    Weights are the same to the bit; what the user has to know is warned of. The folder appears when it is complete.
    Raises `InputError` for what nnU-Net does not have, and if the folder is there; `StageError` if it cannot be
    written.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists():
        raise InputError(f"{target} exists already", "choose another folder")
    manifest = bundle.manifest
    ending = _ending(manifest)
    models = _models(manifest, ending)
    for problem in _remarks(manifest, ending):
        progress.warn(problem)
    dataset = _dataset(manifest, ending)
    alone = len(models) == 1 and not _DATASET.fullmatch(target.name)
    places = [target if alone else target / model.folder for model in models]
    try:
        with new_folder(target) as made:
            for model in models:
                _write_model(made if alone else made / model.folder, model, bundle, dataset)
            last = [model for model in models if model.member in manifest.members]
            if len(last) == 1:
                own = made if alone else made / last[0].folder
                place = own / f"crossval_results_folds_{_joined(last[0].folds)}"
            else:
                together = "___".join(model.folder for model in last)
                place = made / "ensembles" / f"ensemble___{together}___{_joined(last[0].folds)}"
            steps = [step for step in manifest.postprocessing if step.kind == "keep_largest"]
            if steps or len(last) > 1:
                _write_postprocessing(place, steps, last[0].plans, dataset)
            if not alone:
                write_json(
                    made / "inference_information.json", _information(target.name, last, place.relative_to(made))
                )
    except OSError as error:
        raise StageError(
            f"{target} cannot be written ({error.strerror})", "free disk space or choose another folder"
        ) from error
    return places


def plans_and_dataset(manifest: ModelManifest, ending: str, reader: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what plans.json and dataset.json say beside label files that a reader of nnU-Net takes as they are."""
    plans = _plans(manifest.members[:1], manifest, ending, _PLANS)
    return plans | {"image_reader_writer": reader}, _dataset(manifest, ending)


def _dataset(manifest: ModelManifest, ending: str) -> dict[str, Any]:
    cases = manifest.training.get("cases")
    return declaration(
        manifest.name,
        manifest.labels,
        manifest.channel_names,
        num_training=cases if isinstance(cases, int) else 1,
        ending=ending,
    )


def _joined(folds: Sequence[int | str]) -> str:
    return "_".join(str(fold) for fold in folds)


def _models(manifest: ModelManifest, ending: str) -> list[_Model]:
    """Return what becomes a model folder; `InputError` for what nnU-Net's do not hold."""
    models: list[_Model] = []
    for member in manifest.members:
        _require_known(member, manifest)
        previous, first = member.configuration.previous_stage, None
        if previous is not None:
            first = manifest.previous_stage
            if first is None or first.configuration.name != previous:
                problem = f"{manifest.name} is the second stage of a cascade and does not hold the first"
                raise InputError(problem, f"give the model that has {previous} too")
            _require_known(first, manifest)
        name = member.configuration.name
        again = sum(one.member.configuration.name == name for one in models)
        stages = [member] if first is None else [first, member]
        plans = _plans(stages, manifest, ending, f"{_PLANS}{again + 1}" if again else _PLANS)
        models.append(_Model(member, plans))
        if first is not None and all(one.configuration != first.configuration for one in manifest.members):
            models.append(_Model(first, plans))
    if len({tuple(model.folds) for model in models}) > 1:
        folds = " and ".join(dict.fromkeys(", ".join(model.member.weights) for model in models))
        problem = f"the configurations of {manifest.name} have the folds {folds}: nnU-Net averages the same ones of all"
        raise InputError(problem, "export models with the same folds, or each alone")
    return models


def _require_known(member: Member, manifest: ModelManifest) -> None:
    """Raise `InputError` for what neither plans nor checkpoints of nnU-Net can say."""
    where = f"configuration {member.configuration.name} of {manifest.name}"
    if member.exchange is not None and member.exchange.axis in member.mirror_axes:
        raise InputError(
            f"{where} exchanges left and right labels in mirrored views, which nnU-Net does not",
            "make the model without: segfit select PROJECT --set inference.mirror=false",
        )
    spec = member.configuration.preprocessing
    if spec.spacing_mm not in ((1.0, 1.0), (None, None)) and _reader(member, _ending(manifest)) == "NaturalImage2DIO":
        raise InputError(
            f"{where} brings pixels to a size in mm, and nnU-Net reads none from {manifest.input_ending} files",
            "train on images of another format, such as .nii.gz",
        )


def _ending(manifest: ModelManifest) -> str:
    """Return the ending of the images that nnU-Net is to read."""
    flat, ending = manifest.members[0].configuration.preprocessing.image_ndim == 2, manifest.input_ending.lower()
    if flat:
        return ending if ending in READER_OF_ENDING and ending != ".tiff" else ENDING_OF_COPY.get(ending, ".nii.gz")
    pictures = READER_OF_ENDING.get(ending) == "NaturalImage2DIO" and ending != ".tif"
    return ending if ending in READER_OF_ENDING and not pictures else ".nii.gz"


def _reader(member: Member, ending: str) -> str:
    """Return nnU-Net's reader that delivers the axes a configuration sees."""
    spec, nifti = member.configuration.preprocessing, ending in (".nii", ".nii.gz")
    if spec.image_ndim == 2:
        return READER_OF_ENDING[ending]
    if ending in (".tif", ".tiff"):
        return "Tiff3DIO"
    if spec.orientation == "stored":
        return READER_OF_ENDING[ending]
    return "NibabelIOWithReorient" if nifti else "SimpleITKIOWithReorient"


def _remarks(manifest: ModelManifest, ending: str) -> Iterator[Problem]:
    """Yield in what predictions of the copy differ, or what has to be done for them."""
    stored = manifest.labels.stored
    if stored is not None:
        problem = (
            f"label values become consecutive: 0 to {len(stored) - 1} stand for {listing([str(v) for v in stored])}"
        )
        yield warning("label_values", problem)
    if ending != manifest.input_ending.lower():
        own = described(manifest.input_ending, "files")
        yield warning("image_format", f"nnU-Net does not read {own}: give it images in {ending} files")
    steps = {member.tile_step for member in manifest.members} - {0.5}
    if steps:
        yield warning("tile_step", f"nnU-Net has to be told the step of the window: -step_size {min(steps)}")
    for step in manifest.postprocessing:
        if step.kind != "keep_largest":
            yield warning("postprocessing_left_out", f"nnU-Net does not {step.text}: predictions of the copy lack that")


def _plans(stages: Sequence[Member], manifest: ModelManifest, ending: str, name: str) -> dict[str, Any]:
    """Return the content of plans.json of a configuration, after the one whose labels it takes."""
    reader = _reader(stages[-1], ending)
    configurations = {one.configuration.name: _as_read(one.configuration, reader) for one in stages}
    spec = stages[-1].configuration.preprocessing
    if any(one.configuration.preprocessing.transpose != spec.transpose for one in stages):
        problem = f"the stages of the cascade of {manifest.name} see axes in different orders, which nnU-Net's never do"
        raise InputError(problem, "plan both alike")
    flat = spec.image_ndim == 2
    forward = [0, *(axis + 1 for axis in spec.transpose)] if flat else list(spec.transpose)
    return write_plans_file(
        PlansFile(
            header={
                "dataset_name": manifest.name,
                "plans_name": name,
                "original_median_spacing_after_transp": _median_spacing(spec, manifest),
                "image_reader_writer": reader,
                "transpose_forward": forward,
                "transpose_backward": [forward.index(axis) for axis in range(3)],
                "experiment_planner_used": "segfit",
                "label_manager": "LabelManager",
                "foreground_intensity_properties_per_channel": {
                    str(channel): {} if how.statistics is None else how.statistics.model_dump()
                    for channel, how in enumerate(spec.normalization)
                },
            },
            configurations=configurations,
            identifiers={one: f"{name}_{one}" for one in configurations},
        )
    )


def _as_read(item: Configuration, reader: str) -> Configuration:
    """Return a configuration on the axes that the reader delivers: where a format knows no other, on stored ones."""
    if reader.endswith("WithReorient") or item.preprocessing.image_ndim == 2:
        return item
    spec = item.preprocessing.model_copy(update={"orientation": "stored"})
    return item.model_copy(update={"preprocessing": spec})


def _median_spacing(spec: PreprocessingSpec, manifest: ModelManifest) -> list[float]:
    known = manifest.spacing_mm
    turned = [None if known is None else known[axis] for axis in spec.transpose]
    found = [one or other or 1.0 for one, other in zip(turned, spec.spacing_mm, strict=True)]
    return [FLAT_MM * max(1.0, *found), *found] if len(found) == 2 else found


def _write_model(place: Path, model: _Model, bundle: Bundle, dataset: dict[str, Any]) -> None:
    write_json(place / "plans.json", model.plans)
    write_json(place / "dataset.json", dataset)
    for (fold, name), number in zip(model.member.weights.items(), model.folds, strict=True):
        _write_checkpoint(place / f"fold_{fold}" / "checkpoint_final.pth", model, bundle, name, number, dataset)


def _write_checkpoint(
    path: Path, model: _Model, bundle: Bundle, name: str, fold: int | str, dataset: dict[str, Any]
) -> None:
    import torch

    from segfit.nnunet.weights import to_nnunet

    configuration = model.member.configuration
    content = {
        "network_weights": to_nnunet(bundle.weights(name), configuration.network),
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": 0,
        "init_args": {
            "plans": model.plans,
            "configuration": configuration.name,
            "fold": fold,
            "dataset_json": dataset,
        },
        "trainer_name": _TRAINER,
        "inference_allowed_mirroring_axes": model.member.mirror_axes or None,  # it looks for the last of none
    }
    packed = io.BytesIO()  # torch does not tell a full disk from a fault of its own
    torch.save(content, packed)
    write_bytes(path, packed.getvalue())


def _write_postprocessing(
    place: Path, steps: Sequence[PostprocessingStep], plans: dict[str, Any], dataset: dict[str, Any]
) -> None:
    """Write what is done to finished label maps, as both files that nnU-Net has of it."""
    given = [{"labels_or_regions": list(step.values) if len(step.values) > 1 else step.values[0]} for step in steps]
    write_json(
        place / "postprocessing.json",
        {"postprocessing_fns": [KEEP_LARGEST] * len(steps), "postprocessing_kwargs": given},
    )
    write_bytes(place / "postprocessing.pkl", b"".join(_pickled(len(steps), given)))
    write_json(place / "plans.json", plans)
    write_json(place / "dataset.json", dataset)


def _pickled(count: int, given: list[dict[str, Any]]) -> Iterator[bytes]:
    """Yield the pickle of ([function, ...], [arguments, ...]): functions by name, which nobody has here."""
    yield b"\x80\x02]("
    yield f"c{_MODULE}\n{KEEP_LARGEST}\n".encode() * count
    yield b"e"
    yield pickle.dumps(given, 2)[2:-1]  # without its beginning and its end
    yield b"\x86."


def _information(name: str, last: Sequence[_Model], place: Path) -> dict[str, Any]:
    """Return the content of inference_information.json: what is averaged, and where what is done afterwards stands."""
    chosen = [
        {
            "trainer": _TRAINER,
            "plans_identifier": model.plans["plans_name"],
            "configuration": model.member.configuration.name,
        }
        for model in last
    ]
    return {
        "dataset_name_or_id": name,
        "folds": last[0].folds,
        "considered_models": chosen,
        "ensembling_allowed": len(last) > 1,
        "all_results": {},
        "best_model_or_ensemble": {
            "selected_model_or_models": chosen,
            "postprocessing_file": str(place / "postprocessing.pkl"),
            "some_plans_file": str(place / "plans.json"),
        },
    }
