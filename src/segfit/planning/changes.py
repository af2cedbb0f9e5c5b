"""How a plan differs from the reference's, sentence by sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.options import Options
from segfit.planning.normalization import scheme_of
from segfit.planning.plan import Configuration, TrainingSpec
from segfit.planning.presets import splits_of

__all__ = ["changes_of"]


def changes_of(
    fingerprint: Fingerprint,
    options: Options,
    mirrored: tuple[int, ...],
    configurations: dict[str, Configuration],
    training: dict[str, TrainingSpec],
    asked_training: Mapping[str, Any],
) -> tuple[str, ...]:
    """Return how a plan differs from what the reference decides for the same rules and memory, in words.

    Parameters
    ----------
    mirrored : axes that are flipped, in array order
    asked_training : values of the recipe that the user fixed
    """
    asked = options.planning
    changes: list[str] = []
    if fingerprint.ndim == 3 and fingerprint.orientation == "canonical":
        changes.append("axes are brought to the canonical orientation")
    if splits_of(options) == "balanced":
        changes.append("folds are balanced over groups, sites and structures")
    if asked.target_spacing_mm is not None:
        changes.append(f"target spacing {list(asked.target_spacing_mm)} mm was asked for")
    if asked.patch_size is not None:
        changes += _patch_changes(asked.patch_size, configurations)
    if asked.batch_size is not None:
        changes.append(f"batch size {asked.batch_size} was asked for")
    if asked.base_features is not None:
        changes.append(f"{asked.base_features} base features were asked for")
    for key in ("features", "strides", "kernels", "encoder_convs", "decoder_convs", "batch_dice", "transpose"):
        if getattr(asked, key) is not None:
            changes.append(f"{key} {json.dumps(getattr(asked, key), separators=(',', ':'))} asked for")
    if asked.configurations is not None:
        changes.append(
            f"only {', '.join(configurations)} {'is' if len(configurations) == 1 else 'are'} planned, as asked"
        )
    for name, how in zip(
        fingerprint.channel_names, next(iter(configurations.values())).preprocessing.normalization, strict=True
    ):
        if how.scheme != scheme_of(name):
            why = ", as asked" if asked.normalization is not None else ""
            changes.append(f'channel "{name}" is normalised as {how.scheme}, not as {scheme_of(name)}{why}')
    if mirrored != tuple(range(fingerprint.ndim)):
        names = ", ".join("zyx"[-fingerprint.ndim :][axis] for axis in mirrored) or "no axis"
        changes.append(f"only {names} is mirrored" if len(mirrored) < 2 else f"only {names} are mirrored")
    changes += [f"training.{key} = {value}" for key, value in asked_training.items()]
    if options.augmentation.strength == "none":
        changes.append("there is no augmentation")
    changes += [
        f"{name} is trained without deep supervision: it has only {item.network.num_stages} stages"
        for name, item in configurations.items()
        if not training[name].deep_supervision
    ]
    return tuple(changes)


def _patch_changes(asked: tuple[int, ...], configurations: dict[str, Configuration]) -> list[str]:
    changes = []
    for name, item in configurations.items():
        if item.ndim == len(asked):
            axes = item.preprocessing.transpose if len(item.preprocessing.transpose) == item.ndim else (0, 1)
            wanted = tuple(asked[axis] for axis in axes)
            text = f"{name}: patch size {_by_axis(wanted)} was asked for"
            if wanted != item.patch_size:
                text += f" and rounded up to {_by_axis(item.patch_size)}, multiples of {_by_axis(item.network.divisor)}"
            changes.append(text)
    return changes


def _by_axis(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
