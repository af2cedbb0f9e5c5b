"""What was asked, measured and derived: records in, plain values for the template out. None = not done yet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import BaseModel

from segfit.fingerprint.fingerprint import Fingerprint
from segfit.options import CONFIGURATION_NAMES, Options
from segfit.planning.explain import GENERAL, grouped, words_of
from segfit.planning.plan import Decision, Plan
from segfit.report import figures
from segfit.specs import Configuration, TrainingSpec
from segfit.text import duration, extent, gigabytes, listing, number, plain

__all__ = ["asked", "derived", "measured"]

_MAX_LINES = 8  # labels in one figure
_LONGEST = 100  # characters of a value that stands beside its name; longer ones are shown on opening
_STATISTICS = ("min", "percentile_00_5", "median", "mean", "std", "percentile_99_5", "max")
_NORMALIZATION = {
    "ct": "clip to the foreground's 0.5 and 99.5 percentiles, then its mean and standard deviation",
    "zscore": "mean and standard deviation of each image",
    "none": "none",
    "rescale_to_0_1": "minimum to 0, maximum to 1",
    "rgb_to_0_1": "divided by 255",
}


def asked(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options that the user set, and those left alone."""
    if not options:
        return None
    given, defaults, help_texts = _given(options), _flat(Options().model_dump()), dict(_descriptions(Options))
    changed = {key: value for key, value in given.items() if plain(value) != plain(defaults.get(key))}
    kept = {key: value for key, value in given.items() if key not in changed}
    return {
        "changed": [{"key": k, "value": plain(v), "help": help_texts.get(_of_all(k), "")} for k, v in changed.items()],
        "defaults": ", ".join(f"{key} = {plain(value)}" for key, value in kept.items() if value is not None),
        "decided": [key for key, value in kept.items() if value is None],
    }


def measured(fingerprint: Fingerprint | None, label_names: Mapping[int, str]) -> dict[str, Any] | None:
    """Return sizes, spacings, label shares and intensities with their figures."""
    if fingerprint is None or not fingerprint.cases:
        return None
    cases = fingerprint.cases
    axes = ("z", "y", "x")[-fingerprint.ndim :]
    shapes = np.array([case.shape for case in cases], dtype=float)
    spacings = np.array([case.spacing_mm for case in cases], dtype=float)
    histograms = [
        (shapes, "Image size", "voxels" if fingerprint.ndim == 3 else "pixels", "size"),
        (spacings, "Spacing", fingerprint.unit, "spacing"),
    ]
    drawn = [
        figures.histogram(values.T.tolist(), title, unit, f"fp-{key}")
        for values, title, unit, key in histograms
        if np.ptp(values, axis=0).any()
    ]
    labels, volumes = _label_rows(fingerprint, label_names)
    if 0 < len(volumes) <= _MAX_LINES:
        unit = "ml" if fingerprint.ndim == 3 else "pixels"
        drawn.append(figures.histogram(volumes, "Size of the labels", unit, "fp-labels", figures.PALETTE))
    return {
        "cases": len(cases),
        "channels": fingerprint.channel_names,
        "orientation": fingerprint.orientation,
        "cropped": f"{100 * fingerprint.median_relative_size_after_crop:.0f} %",
        "axes": [
            {
                "name": name,
                "colour": figures.fold_colour(i),
                "sizes": [number(v) for v in _range(shapes[:, i])],
                "spacings": [number(v) for v in _range(spacings[:, i])],
            }
            for i, name in enumerate(axes)
        ],
        "same_size": not np.ptp(shapes, axis=0).any(),
        "same_spacing": not np.ptp(spacings, axis=0).any(),
        "figures": drawn,
        "labels": labels,
        "size_unit": "voxels" if fingerprint.ndim == 3 else "pixels",
        "unit": fingerprint.unit,
        "volume_unit": "ml" if fingerprint.ndim == 3 else "pixels",
        "intensities": [
            {"name": name, "values": [number(getattr(statistics, key)) for key in _STATISTICS]}
            for name, statistics in zip(fingerprint.channel_names, fingerprint.intensities, strict=False)
        ],
    }


def derived(plan: Plan | None) -> dict[str, Any] | None:
    """Return the plan: its configurations, network tables and all decisions, grouped by configuration."""
    if plan is None:
        return None
    groups = grouped(plan)
    return {
        "preset": plan.preset,
        "stock": plan.stock,
        "changes": plan.changes,
        "general": [_decision_row(item, item.key, plan.unit) for item in groups.get(GENERAL, ())],
        "configurations": [
            {
                "name": name,
                "facts": _configuration_facts(configuration, plan.training.get(name), plan.channel_names, plan.unit),
                "stages": _stages(configuration),
                "decisions": [
                    _decision_row(item, item.key.removeprefix(f"{name}."), plan.unit) for item in groups.get(name, ())
                ],
            }
            for name, configuration in plan.configurations.items()
        ],
        "run": _run_facts(plan),
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options by the names they are set by; of single configurations only what was set."""
    leaves = _flat(options)
    own = {key: value for key, value in leaves.items() if ".by_configuration" in key}
    others = {key: value for key, value in leaves.items() if key not in own}
    return others | {key.replace(".by_configuration", ""): value for key, value in own.items() if value is not None}


def _of_all(key: str) -> str:
    """Return the option of all configurations for that of one: ``planning.kind`` for ``planning.2d.kind``."""
    return ".".join(part for part in key.split(".") if part not in CONFIGURATION_NAMES)


def _descriptions(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _descriptions(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description or ""


def _range(column: Any) -> tuple[float, float, float]:
    return float(column.min()), float(np.median(column)), float(column.max())


def _label_rows(fingerprint: Fingerprint, names: Mapping[int, str]) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """Return a row per foreground label, and its sizes in ml (3D) or pixels (2D) in the cases that have it."""
    cases = fingerprint.cases
    total = sum(voxels for case in cases for voxels in case.label_voxels.values()) or 1
    values = sorted({value for case in cases for value in case.label_voxels if value > 0} | set(names))
    shares = {value: sum(case.label_voxels.get(value, 0) for case in cases) / total for value in values}
    largest = max(shares.values(), default=0.0) or 1.0
    rows, volumes = [], []
    for i, value in enumerate(values):
        present = [case for case in cases if case.label_voxels.get(value, 0)]
        unit = 1000.0 if fingerprint.ndim == 3 else None  # mm³ in a millilitre
        sizes = [c.label_voxels[value] * (math.prod(c.spacing_mm) / unit if unit else 1.0) for c in present]
        if sizes:
            volumes.append(sizes)
        rows.append(
            {
                "value": value,
                "colour": figures.class_colour(i),
                "name": names.get(value, f"label {value}"),
                "share": f"{100 * shares[value]:.3g} %",
                "bar": f"{100 * shares[value] / largest:.1f}",
                "present": f"{len(present)} of {len(cases)}",
                "sizes": [number(round(v, 3)) for v in _range(np.array(sizes))] if sizes else ["–"] * 3,
            }
        )
    return rows, volumes


def _decision_row(decision: Decision, key: str, unit: str) -> dict[str, str]:
    words = words_of(decision, unit)
    mapping = isinstance(decision.value, Mapping)
    brief = f"{len(decision.value)} values" if mapping and len(words.value) > _LONGEST else words.value
    return {**asdict(words), "key": key, "brief": brief, "value": "" if brief == words.value else words.value}


def _configuration_facts(
    configuration: Configuration, recipe: TrainingSpec | None, channels: Sequence[str], spacing_unit: str
) -> list[tuple[str, str]]:
    patch_mm = [n * s for n, s in zip(configuration.patch_size, configuration.spacing_mm, strict=True)]
    in_mm = f" = {extent([round(v) for v in patch_mm])} mm" if spacing_unit == "mm" else ""
    cover = [min(1.0, p / m) for p, m in zip(configuration.patch_size, configuration.median_shape, strict=True) if m]
    unit = "voxels" if configuration.ndim == 3 else "pixels"
    facts = [
        ("Patch", f"{extent(configuration.patch_size)} {unit}{in_mm}"),
        ("Patch covers", f"{100 * math.prod(cover):.0f} % of the median image"),
        ("Batch", plain(configuration.batch_size)),
        ("Spacing", f"{extent(configuration.spacing_mm)} {spacing_unit}"),
        ("Median image", f"{extent(configuration.median_shape)} {unit} at this spacing"),
    ]
    for channel, normalization in zip(channels, configuration.preprocessing.normalization, strict=False):
        inside = ", inside the non-zero mask" if normalization.use_mask else ""
        facts.append((f"Normalisation, {channel}", _NORMALIZATION[normalization.scheme] + inside))
    if recipe is not None:
        rates = f"learning rate {number(recipe.learning_rate)}, momentum {number(recipe.momentum)}"
        decay = f"weight decay {number(recipe.weight_decay)}"
        facts.append(("Recipe", f"{recipe.optimizer.upper()}, {rates}, {decay}, {recipe.precision}"))
    return facts


def _stages(configuration: Configuration) -> list[dict[str, str]]:
    """Return one row per resolution level of the network."""
    network = configuration.network
    size = list(configuration.patch_size)
    rows = []
    for i, stride in enumerate(network.strides):
        size = [n // s for n, s in zip(size, stride, strict=True)]
        bottleneck = i == network.num_stages - 1
        rows.append(
            {
                "level": "bottleneck" if bottleneck else str(i + 1),
                "size": extent(size),
                "features": str(network.features[i]),
                "stride": extent(stride),
                "kernel": extent(network.kernels[i]),
                "encoder": str(network.encoder_convs[i]),
                "decoder": "–" if bottleneck else str(network.decoder_convs[-1 - i]),
            }
        )
    return rows


def _run_facts(plan: Plan) -> list[tuple[str, str]]:
    run = plan.run
    if run is None:
        return []
    length = f"{number(run.steps)} steps" if run.steps is not None else duration(run.seconds_per_training)
    facts = [
        ("Configurations", listing(run.configurations)),
        ("Folds", ", ".join(map(str, run.folds))),
        ("Length of each training", length),
    ]
    if run.extends is not None:
        facts.append(("Goes on from", f"step {number(run.extends.step)} of the run of {duration(run.extends.time_s)}"))
    for entry in run.race:
        what = (
            f"Tried: {entry.configuration}, {extent(entry.spacing_mm)} {entry.unit}, patch {extent(entry.patch_size)}"
        )
        reached = "nothing" if entry.mean is None else f"Dice {entry.mean:.2f}"
        later = "; its training diverged" if entry.diverged else ""
        facts.append((what, f"{reached} in {duration(entry.seconds)}, {number(entry.steps)} steps{later}"))
    if run.validation_cases is not None or not run.validation_mirror:
        cases = "all" if run.validation_cases is None else number(run.validation_cases)
        facts.append(("Validation cases of each fold", f"{cases}, without mirrored views, to save time"))
    facts += [(f"Measured step, {name}", duration(value)) for name, value in run.seconds_per_step.items()]
    facts += [(f"Measured memory of a step, {name}", gigabytes(value)) for name, value in run.peak_memory_gb.items()]
    return facts
