"""Models of any kind opened as one: bundles and projects of segfit, what nnU-Net leaves, and several together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segfit.bundle.bundle import MANIFEST, Bundle, Member, ModelManifest, open_bundle
from segfit.bundle.files import BundleFiles
from segfit.bundle.hub import fetched, is_address
from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError, warning
from segfit.files import path_of, require_there
from segfit.networks.unet import PluginNetwork, UNet, empty_network
from segfit.nnunet.models import is_nnunet_model, read_nnunet_model
from segfit.nnunet.results import is_results, read_results
from segfit.progress import LOGGED, Progress
from segfit.text import listing

__all__ = ["chosen_folds", "fold_names", "is_model", "load_network", "model_paths", "open_model"]

_PROJECT = "project.json"


def is_model(path: Path) -> bool:
    """Return whether `open_model` would try to open a file, folder or address that is no project."""
    return is_address(path) or (path / MANIFEST).is_file() or is_nnunet_model(path) or is_results(path)


def fold_names(folds: Sequence[int | str] | None) -> list[str] | None:
    """Return folds that a caller chose by their names, each once; None: all. `InputError` for what lists none."""
    if folds is None:
        return None
    if isinstance(folds, str) or not isinstance(folds, Sequence) or not folds:
        raise InputError(f"folds must list at least one fold, got {folds!r}", "give [0], or leave it out to use all")
    return list(dict.fromkeys(str(fold) for fold in folds))


def model_paths(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return where models lie on this machine; those of a hub are fetched."""
    given = path if isinstance(path, list | tuple) else [path]
    return [fetched(str(one)) if is_address(one) else path_of(one, "model") for one in given]


def open_model(
    path: str | Path | Sequence[str | Path],
    folds: Sequence[int | str] | None = None,
    *,
    checkpoint: str | None = None,
    trainer: str | None = None,
    verify: bool = True,
    progress: Progress = LOGGED,
) -> Bundle:
    """Open a model, or several as one that averages their probabilities.

    Parameters
    ----------
    path : a model (a folder, a zip, ``hf://ORG/NAME@REVISION``) or a project of segfit; of nnU-Net a model folder (with
        fold_*), the folder of a dataset above it, or the zip that it exports. A dataset folder stands for what nnU-Net
        found to be best, or for its only model
    folds, checkpoint, trainer : of nnU-Net's models, as in `read_nnunet_model`
    verify : whether to compare the weights of segfit's models with their checksums

    Raises `InputError` if one is no model, is damaged, or does not fit the others.
    """
    paths = model_paths(path)
    if not paths:
        raise InputError("no model is given", "give at least one")
    folds = fold_names(folds)
    opened = [_opened(one, folds, verify=verify, checkpoint=checkpoint, trainer=trainer) for one in paths]
    return opened[0] if len(opened) == 1 else averaged(opened, progress=progress)


def _opened(path: Path, folds: Sequence[int | str] | None, *, verify: bool, **how: str | None) -> Bundle:
    require_there(path, "model")
    if (path / _PROJECT).is_file():
        path = path / "model"
        require_there(path, "model of the project")
    if is_nnunet_model(path):
        return read_nnunet_model(path, folds, **how)
    if BundleFiles.of(path, MANIFEST) is not None:
        if asked := [name for name, value in how.items() if value is not None]:
            problem = f"{path} is a model of segfit, and only models of nnU-Net have a {asked[0]}"
            raise InputError(problem, "leave it out")
        return open_bundle(path, verify=verify)
    if is_results(path):
        models, steps = read_results(path, folds, **how)
        return models[0] if len(models) == 1 else averaged(models, steps)
    raise InputError(
        f"{path} is not a model: it has neither {MANIFEST} nor plans.json, dataset.json and fold_*",
        "give the folder of a trained model",
    )


def averaged(
    bundles: Sequence[Bundle], steps: Sequence[PostprocessingStep] | None = None, *, progress: Progress = LOGGED
) -> Bundle:
    """Return models as one that averages their probabilities; `InputError` if they do not fit each other.

    `steps` of post-processing come last; None: those of the models, if all have the same.
    """
    manifests = [bundle.manifest for bundle in bundles]
    first = manifests[0]
    for other in manifests[1:]:
        if other.labels != first.labels:
            classes = [listing([one.name for one in manifest.labels.classes]) for manifest in (first, other)]
            problem = f"{first.name} segments {classes[0]}, {other.name} {classes[1]}: they cannot be averaged"
            raise InputError(problem, "give models with the same classes and values")
        if other.channel_names != first.channel_names:
            channels = [" + ".join(manifest.channel_names) for manifest in (first, other)]
            problem = f"{first.name} takes {channels[0]}, {other.name} {channels[1]}: they cannot be averaged"
            raise InputError(problem, "give models of the same channels in the same order")
    stages = [item for item in manifests if item.previous_stage is not None]
    if len(stages) > 1:
        problem = f"{stages[0].name} and {stages[1].name} each have a first stage of their own"
        raise InputError(f"{problem}: they cannot be averaged in one go", "give one cascade at most")
    if steps is None:
        steps = first.postprocessing
        if any(item.postprocessing != steps for item in manifests):
            problem = f"the post-processing of {listing([item.name for item in manifests])} differs, none is done"
            progress.warn(warning("postprocessing_left_out", problem))
            steps = ()
    manifest = ModelManifest(
        name=" and ".join(item.name for item in manifests),
        labels=first.labels,
        channel_names=first.channel_names,
        file_ending=first.file_ending,
        image_ending=first.image_ending,
        spacing_mm=first.spacing_mm,
        training_images=first.training_images,
        members=tuple(_renamed(member, number) for number, item in enumerate(manifests) for member in item.members),
        previous_stage=next(
            (
                _renamed(item.previous_stage, number)
                for number, item in enumerate(manifests)
                if item.previous_stage is not None
            ),
            None,
        ),
        postprocessing=tuple(steps),
        requires={package: version for item in manifests for package, version in item.requires.items()},
        provenance={"average_of": [item.name for item in manifests]},
    )
    states = {
        _name(number, file): bundle.weights(file)
        for number, bundle in enumerate(bundles)
        for file in bundle.manifest.files
    }
    return Bundle(manifest, bundles[0].source, states)


def _renamed(member: Member, number: int) -> Member:
    """Return a member with names of weights that no other model has."""
    weights = {fold: _name(number, file) for fold, file in member.weights.items()}
    return member.model_copy(update={"weights": weights})


def _name(number: int, file: str) -> str:
    return f"{number}-{file}"


def chosen_folds(bundle: Bundle, member: Member, folds: Sequence[int | str] | None) -> list[str]:
    """Return the folds of a member that a caller chose; `InputError` for one that it lacks."""
    names = fold_names(folds) or list(member.weights)
    for fold in names:
        if fold not in member.weights:
            raise InputError(
                f"{bundle.source} has no fold {fold} of {member.configuration.name}",
                f"it has {', '.join(member.weights)}",
            )
    return names


def load_network(bundle: Bundle, member: Member, fold: str) -> UNet | PluginNetwork:
    """Return the network of one fold, without initialising weights that are replaced anyway."""
    network, state = empty_network(member.configuration.network), bundle.weights(member.weights[fold])
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        problem = f"{bundle.source}: the weights in {member.weights[fold]} are not finite"
        raise InputError(problem, "copy the model again")
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{bundle.source}: {member.weights[fold]} does not fit its configuration ({reason})") from None
    return network.requires_grad_(False)
