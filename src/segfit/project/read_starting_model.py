"""Reading a model that a training is to start from: a bundle, a model of nnU-Net, or a file of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from segfit.bundle.bundle import MANIFEST, Bundle, open_bundle
from segfit.bundle.files import BundleFiles
from segfit.errors import InputError, reason_of
from segfit.files import first_fault, require_there
from segfit.labels import LabelScheme
from segfit.networks.transfer import network_of
from segfit.nnunet.checkpoint import read_checkpoint
from segfit.nnunet.models import folds_of, is_nnunet_model, read_nnunet_model
from segfit.nnunet.plans_reader import channel_names_of, read_configurations
from segfit.nnunet.weights import our_names
from segfit.options import Options
from segfit.planning.taken_over import name_here
from segfit.project.starting_model import OTHER, StartingModel

__all__ = ["read_starting_model", "serialized"]

_ANY_TRAINER = "nnUNetTrainer"  # whose weights are a start, whatever else another trainer did with them


def read_starting_model(path: Path, options: Options) -> tuple[StartingModel, dict[str, Tensor]]:
    """Return what a model of any kind is, and the weights of one of its networks; `InputError` if it cannot be read."""
    require_there(path, "model")
    if (path / "project.json").is_file():
        path = path / "model"
        require_there(path, "model of the project")
    if BundleFiles.of(path, MANIFEST) is not None:
        return _of_bundle(open_bundle(path), "segfit", options)
    if path.is_dir():
        if not is_nnunet_model(path):
            raise InputError(
                f"{path} is not a model: it has neither {MANIFEST} nor plans.json, dataset.json and fold_*",
                "give the folder of a trained model, or a file of weights",
            )
        return _of_bundle(read_nnunet_model(path, folds_of(path)[:1], trainer=_ANY_TRAINER), "nnunet", options)
    return _of_file(path)


def _of_bundle(
    bundle: Bundle, kind: Literal["segfit", "nnunet"], options: Options
) -> tuple[StartingModel, dict[str, Tensor]]:
    manifest, asked = bundle.manifest, options.planning.configurations
    members = [item for item in manifest.members if item.configuration.previous_stage is None]
    chosen = [item for item in members if asked is None or name_here(item.configuration.ndim) in asked]
    if not members:
        raise InputError(f"{bundle.source} is the second stage of a cascade, which nothing can start from", OTHER)
    member = (chosen or members)[0]
    state = bundle.weights(next(iter(member.weights.values())))
    model = _described(
        state,
        name=manifest.name,
        kind=kind,
        network=member.configuration.network,
        configuration=member.configuration,
        labels=manifest.labels,
        channel_names=manifest.channel_names,
        data=str(manifest.provenance.get("data", "")),
    )
    return model, state


def _of_file(path: Path) -> tuple[StartingModel, dict[str, Tensor]]:
    """Read a file of weights: a checkpoint of nnU-Net or nnssl, or a plain state dict."""
    content = _content(path)
    weights = content.get("network_weights", content.get("state_dict", content))
    state = our_names({str(name): tensor for name, tensor in _tensors(weights, path).items()})
    facts: dict[str, Any] = {"name": path.name, "kind": "weights"}
    described = content.get("init_args")
    if "nnssl_adaptation_plan" in content:
        facts["kind"] = "nnssl"
        state = {name: tensor for name, tensor in state.items() if not name.startswith("heads.")}
    elif isinstance(described, Mapping) and {"plans", "configuration", "dataset_json"} <= described.keys():
        facts |= _declared(described, path)
    try:
        network = network_of(state)
    except InputError as error:
        raise InputError(f"{path}: {error}", OTHER) from None
    return _described(state, network=network, **facts), state


def _declared(described: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return what a checkpoint of nnU-Net says of itself."""
    declared, name = described["dataset_json"], described["configuration"]
    try:
        configuration = read_configurations(described["plans"], declared, [name])[name]
        labels = LabelScheme.from_declaration(declared["labels"], declared.get("regions_class_order"))
        channels = channel_names_of(declared)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {first_fault(error)}", OTHER) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: its plans lack {error}", OTHER) from None
    if configuration.previous_stage is not None:
        raise InputError(f"{path} is the second stage of a cascade, which nothing can start from", OTHER)
    return {"kind": "nnunet", "configuration": configuration, "labels": labels, "channel_names": channels}


def _content(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)})", "copy it again") from None


def _tensors(weights: Any, path: Path) -> dict[str, Tensor]:
    found = weights if isinstance(weights, Mapping) else {}
    tensors = {name: item for name, item in found.items() if _is_weight(item)}
    if not tensors:
        raise InputError(f"{path} holds no weights", OTHER)
    return tensors


def _is_weight(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.is_floating_point() and item.layout == torch.strided


def _described(state: Mapping[str, Tensor], **facts: Any) -> StartingModel:
    name = facts["name"]
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        raise InputError(f"the weights of {name} are not finite", OTHER)
    return StartingModel(checksum=hashlib.sha256(serialized(state)).hexdigest(), **facts)


def serialized(state: Mapping[str, Tensor]) -> bytes:
    """Return weights as the content of a safetensors file, float32, the same for the same weights."""
    return save({name: state[name].detach().cpu().float().contiguous().clone() for name in sorted(state)})
