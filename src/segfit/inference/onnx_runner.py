"""Predict with a model that segfit exported: this file, model.json and its networks are all there is to it.

    python predict.py IMAGE [IMAGE ...] -o LABELS.nii.gz [--probabilities FILE.npz]

IMAGE is one NIfTI file per channel of a case, in order, or one with all of them. Needs numpy, scipy, nibabel and
onnxruntime. A reference, not a product: plain, all in memory. Other images: `Model(folder).predict(array, spacing)`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import combinations, product
from math import ceil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnxruntime
from scipy import ndimage

Array = np.ndarray[Any, Any]
Case = dict[str, Any]  # how an image was brought to a network: shapes, crop, spacings


class Model:
    """The networks of a folder and what is done around them."""

    def __init__(self, folder: str | Path) -> None:
        self.facts: dict[str, Any] = json.loads((Path(folder) / "model.json").read_text(encoding="utf-8"))
        self.labels: dict[str, Any] = self.facts["labels"]
        files = {name for one in self._all_members() for name in one["networks"]}
        self.sessions = {name: onnxruntime.InferenceSession(str(Path(folder) / name)) for name in sorted(files)}

    def _all_members(self) -> list[dict[str, Any]]:
        first = self.facts["previous_stage"]
        return [*self.facts["members"], *([first] if first else [])]

    def predict(self, image: Array, spacing_mm: Sequence[float], previous: Array | None = None) -> tuple[Array, Array]:
        """Return labels ``(*spatial)`` and probabilities ``(outputs, *spatial)`` of an image.

        Parameters
        ----------
        image : (channels, z, y, x), its axes pointing to RAS+ where `needs_canonical`; 2D: without z
        spacing_mm : of its voxels, array order
        previous : inner labels of the first stage, for the second one of a cascade that lacks it
        """
        if len(image) != len(self.facts["channels"]):
            raise SystemExit(f"the model takes {len(self.facts['channels'])} channels, the image has {len(image)}")
        first = self.facts["previous_stage"]
        if first and previous is None:
            previous = self._decide(self._probabilities(first, image, spacing_mm, None))
        maps = [self._probabilities(one, image, spacing_mm, previous) for one in self.facts["members"]]
        mean = sum(maps[1:], maps[0]) / len(maps)
        labels = self._decide(mean)
        for step in self.facts["postprocessing"]:
            labels = postprocessed(labels, step)
        return np.asarray(self.labels["stored"])[labels], mean

    @property
    def needs_canonical(self) -> bool:
        """Whether images must be brought to RAS+ axes first."""
        return any(one["preprocessing"]["orientation"] == "canonical" for one in self._all_members())

    def _probabilities(
        self, member: dict[str, Any], image: Array, spacing_mm: Sequence[float], previous: Array | None
    ) -> Array:
        """Return the probabilities of one configuration on the grid of the image; outside the crop background is 1."""
        given, case = preprocess(member, image, spacing_mm, previous, self.labels["foreground"])
        logits = self._slide(member, given)
        spec = member["preprocessing"]["resample_logits"]
        logits = resample(logits, case["cropped"], case["target_mm"], case["spacing_mm"], spec, clip=False)
        if self.labels["regions"] is None:
            powers = np.exp(logits - logits.max(0))
            inside = powers / powers.sum(0)
        else:
            inside = 1 / (1 + np.exp(-logits))
        result = np.zeros((len(logits), *case["shape"]), np.float32)
        if self.labels["regions"] is None:
            result[0] = 1
        result[:, *case["crop"]] = inside
        return result.transpose(0, *(1 + np.argsort(member["preprocessing"]["transpose"])))

    def _decide(self, probabilities: Array) -> Array:
        """Return the inner labels that probabilities say."""
        if self.labels["regions"] is None:
            return np.asarray(probabilities.argmax(0))
        result = np.zeros(probabilities.shape[1:], int)
        for channel, value in zip(probabilities, self.labels["regions"], strict=True):
            result[channel > 0.5] = value
        return result

    def _slide(self, member: dict[str, Any], image: Array) -> Array:
        """Return the mean logits of all tiles, mirrored views and networks."""
        space = image.shape[1:]
        patch = [1] * (len(space) - len(member["patch_size"])) + member["patch_size"]
        missing = [max(0, p - n) for n, p in zip(space, patch, strict=True)]
        image = np.pad(image, [(0, 0), *((m // 2, m - m // 2) for m in missing)])
        importance = np.ones(patch)
        for axis, p in enumerate(patch):
            profile = np.exp(-0.5 * ((np.arange(p) - p // 2) / (p / 8)) ** 2)
            importance = importance * profile.reshape([-1 if a == axis else 1 for a in range(len(patch))])
        total, weight = np.zeros((self.labels["outputs"], *image.shape[1:])), np.zeros(image.shape[1:])
        lead, axes, exchange = len(patch) - len(member["patch_size"]), member["mirror_axes"], member["exchange"]
        subsets = [subset for size in range(len(axes) + 1) for subset in combinations(axes, size)]
        steps = zip(image.shape[1:], patch, strict=True)
        for corner in product(*(starts(n, p, member["tile_step"]) for n, p in steps)):
            region = tuple(slice(a, a + p) for a, p in zip(corner, patch, strict=True))
            for subset in subsets:
                flips = tuple(1 + lead + axis for axis in subset)
                view = np.flip(image[:, *region], flips)
                turned = exchange is not None and exchange["axis"] in subset
                if turned and exchange["inputs"]:
                    view = view[exchange["inputs"]]
                view = np.ascontiguousarray(view.reshape(1, -1, *member["patch_size"]), dtype=np.float32)
                logits = sum(self.sessions[name].run(None, {"views": view})[0][0] for name in member["networks"])
                logits = logits[exchange["outputs"]] if turned else logits
                total[:, *region] += np.flip(logits.reshape(-1, *patch), flips) * importance
            weight[region] += importance
        inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, space, strict=True))
        mean = total / (weight * len(subsets) * len(member["networks"]))
        return np.asarray(mean[:, *inside], dtype=np.float32)


def starts(size: int, patch: int, step: float) -> list[int]:
    """Return where tiles begin along an axis."""
    if size == patch:
        return [0]
    count = ceil((size - patch) / max(1.0, patch * step)) + 1
    return [round((size - patch) / (count - 1) * i) for i in range(count)]


def preprocess(
    member: dict[str, Any], image: Array, spacing_mm: Sequence[float], previous: Array | None, values: Sequence[int]
) -> tuple[Array, Case]:
    """Return what the networks of a member see of an image, and how it came about."""
    spec = member["preprocessing"]
    order = spec["transpose"]
    image = image.transpose(0, *(1 + axis for axis in order)).astype(np.float32)
    spacing = [float(spacing_mm[axis]) for axis in order]
    mask = (image != 0).any(0)
    if mask.ndim == 3 and min(mask.shape) > 2:
        mask = ndimage.binary_fill_holes(mask)
    crop = ndimage.find_objects(mask.astype(np.uint8))[0] if mask.any() else tuple(slice(0, n) for n in mask.shape)
    case: Case = {"shape": mask.shape, "crop": crop, "spacing_mm": spacing, "cropped": mask[crop].shape}
    target = case["target_mm"] = [s if t is None else t for s, t in zip(spacing, spec["spacing_mm"], strict=True)]
    shape = case["cropped"]
    if spec["resample_image"]["method"] != "none":
        shape = tuple(max(1, round(s / t * n)) for n, s, t in zip(shape, spacing, target, strict=True))
    channels = [
        normalized(channel, mask[crop], how)
        for channel, how in zip(image[:, *crop], spec["normalization"], strict=True)
    ]
    result = resample(np.stack(channels), shape, spacing, target, spec["resample_image"], clip=True)
    if not member["takes_previous_stage"]:
        return result, case
    if previous is None:
        raise SystemExit("the model is the second stage of a cascade: give the labels of the first one")
    earlier = previous.transpose(order)[crop]
    votes = np.stack([earlier == value for value in (0, *values)]).astype(np.float32)
    votes = resample(votes, shape, spacing, target, spec["resample_label"], clip=False)
    winner = votes.argmax(0)
    masks = [(winner == number)[None].astype(np.float32) for number in range(1, 1 + len(values))]
    return np.concatenate([result, *masks]), case


def normalized(channel: Array, mask: Array, how: dict[str, Any]) -> Array:
    """Return a channel with its intensities as the networks expect them."""
    smallest, scheme, known = np.float32(1e-8), how["scheme"], how["statistics"]
    if scheme == "zscore" and how["use_mask"]:
        result = channel.copy()
        result[mask] = (channel[mask] - channel[mask].mean()) / max(channel[mask].std(), smallest)
        return result
    if scheme == "zscore":
        return np.asarray((channel - channel.mean()) / max(channel.std(), smallest))
    if scheme == "ct":
        clipped = np.clip(channel, np.float32(known["percentile_00_5"]), np.float32(known["percentile_99_5"]))
        return np.asarray((clipped - np.float32(known["mean"])) / max(np.float32(known["std"]), smallest))
    if scheme == "rescale_to_0_1":
        risen = channel - channel.min()
        return np.asarray(risen / max(risen.max(), smallest))
    return channel / np.float32(255) if scheme == "rgb_to_0_1" else channel


def resample(
    array: Array,
    shape: Sequence[int],
    now_mm: Sequence[float],
    new_mm: Sequence[float],
    spec: dict[str, Any],
    clip: bool,
) -> Array:
    """Resample ``(c, *spatial)`` to a spatial shape; a coarse axis is treated on its own."""
    if array.shape[1:] == tuple(shape) or spec["method"] == "none":
        return array
    order = 1 if spec["method"] == "torch" else spec["order"]
    own, coarse = 0 if spec["method"] == "torch" else spec["order_separate_axis"], None
    if len(shape) == 3 and spec["force_separate"] is not False:
        limit = spec["separate_threshold"]
        ways = [mm for mm in (now_mm, new_mm) if spec["force_separate"] or max(mm) / min(mm) > limit]
        largest = [axis for axis, mm in enumerate(ways[0]) if mm == max(ways[0])] if ways else []
        coarse = largest[0] if len(largest) == 1 else None
    result = []
    for channel in array:
        factors = [new / old for new, old in zip(shape, channel.shape, strict=True)]
        if coarse is None:
            result.append(zoomed(channel, factors, order, clip=clip))
            continue
        slices = np.moveaxis(channel, coarse, 0)
        plane = factors[:coarse] + factors[coarse + 1 :]
        moved = np.stack([zoomed(one, plane, order, clip=clip) for one in slices])
        result.append(np.moveaxis(zoomed(moved, [factors[coarse], 1, 1], own, clip=False), 0, coarse))
    return np.stack(result).astype(np.float32)


def zoomed(values: Array, factors: Sequence[float], order: Any, *, clip: bool) -> Array:
    """Resize by factors as skimage.transform.resize does, with the edge repeated."""
    if all(factor == 1 for factor in factors):
        return values
    result: Array = ndimage.zoom(values.astype(float), factors, order=order, mode="nearest", grid_mode=True)
    return np.clip(result, values.min(), values.max()) if clip and order else result


def postprocessed(labels: Array, step: dict[str, Any]) -> Array:
    """Keep the largest connected component of all voxels with one of some values, remove small ones, or fill holes."""
    mask = np.isin(labels, step["values"])
    if step["kind"] == "fill_holes":
        return np.where(ndimage.binary_fill_holes(mask) & (labels == 0), step["values"][0], labels)
    parts, _ = ndimage.label(mask, np.ones((3,) * labels.ndim))
    sizes = np.bincount(parts.ravel())[1:]
    least = step["min_voxels"] if step["kind"] == "remove_small" else sizes.max(initial=0)
    return np.where(np.isin(parts, 1 + np.flatnonzero(sizes < least)), 0, labels)


def main() -> None:
    """Predict one case of NIfTI files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("-o", "--output", required=True, metavar="LABELS.nii.gz")
    parser.add_argument("--probabilities", metavar="FILE.npz")
    parser.add_argument("--previous-stage", metavar="LABELS.nii.gz", help="for the second stage of a cascade")
    given = parser.parse_args()
    model = Model(Path(__file__).parent)
    files = [nibabel.load(path) for path in given.images]
    affine = files[0].affine
    ways = nibabel.orientations.io_orientation(affine)
    if not model.needs_canonical:
        ways = np.array([[0, 1], [1, 1], [2, 1]])
    back = nibabel.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), ways)

    def read(file: Any) -> list[Array]:
        values = np.asarray(file.dataobj, dtype=np.float32)
        volumes = np.moveaxis(values, 3, 0) if values.ndim == 4 else values[None]
        return [nibabel.orientations.apply_orientation(volume, ways).T for volume in volumes]

    image = np.stack([volume for file in files for volume in read(file)])
    sizes = np.asarray(files[0].header.get_zooms()[:3], dtype=float)
    turned = [0.0] * 3
    for axis, (place, _) in enumerate(ways):
        turned[int(place)] = float(sizes[axis])
    earlier = None
    if given.previous_stage:
        (stored,) = read(nibabel.load(given.previous_stage))
        earlier = np.searchsorted(model.labels["stored"], stored.astype(int))
    labels, probabilities = model.predict(image, turned[::-1], earlier)
    kind = np.uint8 if labels.max() < 255 and labels.min() >= 0 else np.int32
    turned_back = nibabel.orientations.apply_orientation(labels.astype(kind).T, back)
    nibabel.save(nibabel.Nifti1Image(turned_back, affine), given.output)
    if given.probabilities:
        volumes = [nibabel.orientations.apply_orientation(one.T, back).T for one in probabilities]
        np.savez_compressed(given.probabilities, probabilities=np.stack(volumes))


if __name__ == "__main__":
    main()
