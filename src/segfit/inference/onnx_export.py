"""A model for programs without segfit and torch: its networks as ONNX, all else as JSON, and a runner that reads both.

FOLDER/
model.json                      labels, channels, preprocessing, tiles, post-processing: plain numbers and names
network-<configuration>-<fold>.onnx     input "views" (b, c, *patch), output "logits" (b, outputs, *patch)
predict.py                      `segfit.inference.onnx_runner`
requirements.txt                what it needs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segfit.bundle.bundle import Bundle, Member, ModelManifest
from segfit.errors import InputError
from segfit.files import new_folder, write_bytes, write_json, write_text
from segfit.inference.open_model import load_network
from segfit.networks.onnx_graph import as_onnx
from segfit.networks.unet import UNet
from segfit.plugins import package_version

__all__ = ["export_onnx"]

_RUNNER = Path(__file__).with_name("onnx_runner.py")
_FORMAT = 1  # of model.json; it rises where a runner of before would go wrong


def export_onnx(bundle: Bundle, folder: Path) -> Path:
    """Write a model into a new folder; return it.

    Raises `InputError` if the folder is there, a network is that of a plug-in, or the package onnx is missing.
    """
    if not package_version("onnx"):
        raise InputError("networks are written as ONNX by the package onnx", 'pip install "segfit[onnx]"')
    if folder.exists():
        raise InputError(f"{folder} exists already", "choose another folder")
    manifest = bundle.manifest
    with new_folder(folder) as made:
        for member in manifest.stages:
            for fold, name in member.weights.items():
                network = load_network(bundle, member, fold)
                if not isinstance(network, UNet):
                    problem = f"{bundle.source} has a network of the plug-in {member.configuration.network.plugin}"
                    raise InputError(problem, "only U-Nets of segfit and nnU-Net can be written as ONNX")
                graph = as_onnx(network.eval(), member.configuration.patch_size)
                write_bytes(made / _network_file(name), graph.SerializeToString())
        write_json(made / "model.json", _facts(manifest))
        write_text(made / "predict.py", _RUNNER.read_text(encoding="utf-8"))
        write_text(made / "requirements.txt", "numpy\nscipy\nnibabel\nonnxruntime\n")
    return folder


def _network_file(weights: str) -> str:
    return f"network-{weights.removeprefix('weights-').removesuffix('.safetensors')}.onnx"


def _facts(manifest: ModelManifest) -> dict[str, Any]:
    """Return what is around the networks."""
    labels, first = manifest.labels, manifest.previous_stage
    classes = [{"name": one.name, "values": list(one.values)} for one in labels.labels]
    return {
        "format": _FORMAT,
        "name": manifest.name,
        "channels": list(manifest.channel_names),
        "labels": {
            "classes": classes,  # inner values
            "outputs": labels.num_outputs,
            "foreground": list(labels.foreground_values),
            "regions": None if labels.region_order is None else list(labels.region_order),  # value painted for each
            "stored": list(labels.stored_values),  # on disk, by inner value
        },
        "members": [_member(manifest, member) for member in manifest.members],
        "previous_stage": None if first is None else _member(manifest, first),
        "postprocessing": [
            {"kind": step.kind, "values": list(step.values), "min_voxels": step.min_voxels}
            for step in manifest.postprocessing
        ],
        "intended_use": manifest.intended_use,
        "limits": manifest.limits,
        "licence": manifest.licence,
    }


def _member(manifest: ModelManifest, member: Member) -> dict[str, Any]:
    configuration, labels = member.configuration, manifest.labels
    cascade = configuration.previous_stage is not None
    exchange = None
    if member.exchange is not None:
        pairs, channels = member.exchange.pairs, configuration.image_channels
        places = [channels + place for place in labels.exchanged_foreground(pairs)]
        exchange = {
            "axis": member.exchange.axis,
            "inputs": [*range(channels), *places] if cascade else [],
            "outputs": list(labels.exchanged_outputs(pairs)),
        }
    return {
        "name": configuration.name,
        "networks": [_network_file(name) for name in member.weights.values()],
        "patch_size": list(configuration.patch_size),
        "tile_step": member.tile_step,
        "mirror_axes": list(member.mirror_axes),
        "exchange": exchange,
        "takes_previous_stage": cascade,
        "preprocessing": configuration.preprocessing.model_dump(mode="json"),
    }
