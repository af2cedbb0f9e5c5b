"""A network as bioimage.io's programs take it: TorchScript, a description, and a pair of arrays to try it with.

They know no spacing and no crop: what they run is one configuration, its folds averaged, on images that have its voxel
size, normalised where their description can say how. rdf.yaml is JSON, which YAML includes.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segfit.bundle.bundle import Bundle, Member, ModelManifest, card
from segfit.errors import InputError
from segfit.files import hash_file, new_folder, write_bytes, write_json, write_text
from segfit.inference.open_model import load_network
from segfit.specs import Configuration

__all__ = ["export_bioimageio"]

_FORMAT = "0.5.4"
_AXES = ("z", "y", "x")
_SMALLEST = 1e-6  # what bioimage.io adds to deviations
_PAPER = {
    "text": "Isensee et al., nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation",
    "doi": "10.1038/s41592-020-01008-z",
}


class _Averaged(nn.Module):
    """Networks whose logits are averaged, as probabilities."""

    def __init__(self, networks: list[nn.Module], regions: bool) -> None:
        super().__init__()
        self.networks, self.regions = nn.ModuleList(networks), regions

    def forward(self, image: Tensor) -> Tensor:
        """Return the probabilities (b, outputs, *patch) of an image (b, channels, *patch)."""
        logits = torch.stack([network(image) for network in self.networks]).mean(0)
        return logits.sigmoid() if self.regions else logits.softmax(1)


def export_bioimageio(bundle: Bundle, folder: Path) -> None:
    """Write a model for bioimage.io into a folder that must not exist yet.

    Raises `InputError` if it is there, if authors and licence are not stated, and for models of several configurations.
    """
    manifest = bundle.manifest
    if folder.exists():
        raise InputError(f"{folder} exists already", "choose another folder")
    for key in ("authors", "licence"):
        if getattr(manifest, key) == "not stated":
            problem = f"bioimage.io asks for the {key} of a model, and {manifest.name} does not state them"
            raise InputError(problem, f"give --set model.{key}=...")
    if len(manifest.members) > 1 or manifest.members[0].configuration.previous_stage is not None:
        problem = f"{manifest.name} has several configurations, and one network is all that bioimage.io runs"
        raise InputError(problem, "export a model of one configuration")
    (member,) = manifest.members
    network = _Averaged([load_network(bundle, member, fold) for fold in member.weights], manifest.labels.has_regions)
    image = _image(manifest, member.configuration)
    steps = _preprocessing(member)
    with new_folder(folder) as made, torch.inference_mode():
        network.eval()
        given = torch.from_numpy(_preprocessed(image, member))[None]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing, and of TorchScript, which is what bioimage.io takes
            traced = torch.jit.trace(network, given, check_trace=False)  # type: ignore[no-untyped-call]
            content = io.BytesIO()  # on a full disk torch ends the process
            torch.jit.save(traced, content)
        write_bytes(made / "weights.pt", content.getvalue())
        np.save(made / "test_input.npy", image[None])
        np.save(made / "test_output.npy", network(given).numpy())
        write_text(made / "README.md", card(manifest))
        write_json(made / "rdf.yaml", _description(made, manifest, member, steps))


def _image(manifest: ModelManifest, configuration: Configuration) -> NDArray[np.float32]:
    """Return a made-up patch (channels, *patch)."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((len(manifest.channel_names), *configuration.patch_size))
    statistics = [how.statistics for how in configuration.preprocessing.normalization]
    for channel, known in zip(values, statistics, strict=True):
        channel *= 50 if known is None else known.std
        channel += 100 if known is None else known.mean
    return values.astype(np.float32)


def _preprocessing(member: Member) -> list[dict[str, Any]]:
    """Return how channels are normalised, in the words of bioimage.io; nothing where it has none for it."""
    normal = member.configuration.preprocessing.normalization
    first, axes = normal[0], list(_AXES[-member.configuration.ndim :])
    if all(how.scheme == "zscore" and not how.use_mask for how in normal):
        return [{"id": "zero_mean_unit_variance", "kwargs": {"axes": axes, "eps": _SMALLEST}}]
    if all(how.scheme == "rgb_to_0_1" for how in normal):
        return [{"id": "scale_linear", "kwargs": {"gain": 1 / 255, "offset": 0.0}}]
    if len(normal) == 1 and first.scheme == "ct" and first.statistics is not None:
        known = first.statistics
        clip = {"min": known.percentile_00_5, "max": known.percentile_99_5}
        scale = {"mean": known.mean, "std": max(known.std, _SMALLEST)}
        return [{"id": "clip", "kwargs": clip}, {"id": "fixed_zero_mean_unit_variance", "kwargs": scale}]
    return []


def _preprocessed(image: NDArray[np.float32], member: Member) -> NDArray[np.float32]:
    result = image.astype(np.float64)
    for step in _preprocessing(member):
        how = step["kwargs"]
        if step["id"] == "zero_mean_unit_variance":
            axes = tuple(range(1, result.ndim))
            deviation = result.std(axes, keepdims=True) + how["eps"]
            result = (result - result.mean(axes, keepdims=True)) / deviation
        elif step["id"] == "scale_linear":
            result = result * how["gain"]
        elif step["id"] == "clip":
            result = result.clip(how["min"], how["max"])
        else:
            result = (result - how["mean"]) / how["std"]
    return result.astype(np.float32)


def _description(folder: Path, manifest: ModelManifest, member: Member, steps: list[dict[str, Any]]) -> dict[str, Any]:
    configuration = member.configuration
    axes = _AXES[-configuration.ndim :]
    size = list(
        zip(axes, configuration.patch_size, configuration.spacing_mm, configuration.network.divisor, strict=True)
    )
    outputs = [one.name for one in manifest.labels.classes]
    outputs = outputs if manifest.labels.has_regions else ["background", *outputs]

    def file(name: str) -> dict[str, str]:
        return {"source": name, "sha256": hash_file(folder / name)}

    def channels(names: list[str]) -> dict[str, Any]:
        return {"type": "channel", "channel_names": [_identifier(name, i) for i, name in enumerate(names)]}

    unit = {"unit": "millimeter"} if manifest.training_images is None or manifest.training_images.unit == "mm" else {}
    spaces = [
        {"type": "space", "id": axis, "size": {"min": patch, "step": step}, "scale": spacing, **unit}
        for axis, patch, spacing, step in size
    ]
    same = [
        {"type": "space", "id": axis, "size": {"tensor_id": "image", "axis_id": axis}, "scale": spacing, **unit}
        for axis, _, spacing, _ in size
    ]
    return {
        "type": "model",
        "format_version": _FORMAT,
        "name": re.sub(r"[^\w +()-]+", " ", manifest.name)[:100] + " (segfit)",  # five letters are the least
        "description": f"Segments {', '.join(one.name for one in manifest.labels.classes)}. {manifest.intended_use}"[
            :1024
        ],
        "authors": [{"name": name.strip()} for name in re.split(r"[,;]", manifest.authors) if name.strip()],
        "license": manifest.licence,
        "cite": [_PAPER],
        "documentation": "README.md",
        "tags": ["segmentation", "nnu-net", "segfit"],
        "inputs": [
            {
                "id": "image",
                "axes": [{"type": "batch"}, channels(list(manifest.channel_names)), *spaces],
                "data": {"type": "float32"},
                "preprocessing": steps,
                "test_tensor": file("test_input.npy"),
            }
        ],
        "outputs": [
            {
                "id": "probabilities",
                "axes": [{"type": "batch"}, channels(outputs), *same],
                "data": {"type": "float32"},
                "test_tensor": file("test_output.npy"),
            }
        ],
        "weights": {"torchscript": {**file("weights.pt"), "pytorch_version": torch.__version__.partition("+")[0]}},
    }


def _identifier(name: str, number: int) -> str:
    """Return a name of letters, digits and underscores that no other of the list has."""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return f"{plain or 'channel'}_{number}"
