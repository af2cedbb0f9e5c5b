"""How a plan differs from the reference's, sentence by sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.options import NormalizationScheme, Options
from segfit.planning.normalization import scheme_of
from segfit.planning.presets import splits_of
from segfit.planning.wording import value_in_words
from segfit.specs import Configuration, TrainingSpec

__all__ = ["changes_of"]


def changes_of(
    fingerprint: Fingerprint,
    options: Options,
    mirrored: tuple[int, ...],
    schemes: Sequence[NormalizationScheme],
    configurations: dict[str, Configuration],
    training: dict[str, TrainingSpec],
    asked_training: Mapping[str, Any],
) -> tuple[str, ...]:
    """Return how a plan differs from what the reference decides for the same rules and memory, in words.

    What the user set in place of derived values is told by `segfit.planning.set_values`.

    Parameters
    ----------
    mirrored : axes that are flipped, in array order
    schemes : of every channel
    asked_training : values of the recipe that the user fixed
    """
    asked = options.planning
    changes: list[str] = []
    if fingerprint.ndim == 3 and fingerprint.orientation == "canonical" and asked.orientation is None:
        changes.append("axes are brought to the canonical orientation")
    if splits_of(options) == "balanced":
        changes.append("folds are balanced over groups, sites and structures")
    if asked.configurations is not None:
        changes.append(
            f"only {', '.join(configurations)} {'is' if len(configurations) == 1 else 'are'} planned, as asked"
        )
    for name, scheme in zip(fingerprint.channel_names, schemes, strict=True):
        if scheme != scheme_of(name) and asked.normalization is None:
            changes.append(f'channel "{name}" is normalised as {scheme}, not as {scheme_of(name)}')
    if asked.mirror_axes is None and mirrored != tuple(range(fingerprint.ndim)):
        names = ", ".join("zyx"[-fingerprint.ndim :][axis] for axis in mirrored) or "no axis"
        changes.append(f"only {names} is mirrored" if len(mirrored) < 2 else f"only {names} are mirrored")
    if any(item.augmentation.exchange is not None for item in training.values()):
        changes.append("left and right labels change places where x is flipped")
    for group, values in (("training", asked_training), ("augmentation", options.augmentation.values)):
        changes += [f"{group}.{key} = {value_in_words(value, key)}" for key, value in values.items()]
    if options.augmentation.strength == "none":
        changes.append("there is no augmentation")
    changes += [
        f"{name} is trained without deep supervision: it has only {item.network.num_stages} stages"
        for name, item in configurations.items()
        if not training[name].deep_supervision and "deep_supervision" not in asked_training
    ]
    return tuple(changes)
