"""From what was measured and what was asked to the plan. Pure: no file, no device, no clock, no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from segfit.device import Hardware
from segfit.errors import InputError, Problem, warning
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.labels import LabelScheme
from segfit.options import CASCADE, AugmentationOptions, Options, PlanningOptions, TrainingOptions
from segfit.planning.checks import check_request
from segfit.planning.configurations import configuration
from segfit.planning.data_warnings import data_warnings
from segfit.planning.drafts import Draft, Images, chosen, drafts
from segfit.planning.explain import change_in_words, set_in_words
from segfit.planning.mirroring import AxisEvidence, axis_evidence
from segfit.planning.normalization import SETTABLE, ChannelScheme, channel_schemes, decide_normalization
from segfit.planning.patch import MemoryBudget
from segfit.planning.plan import Plan
from segfit.planning.presets import choose_rules, decide_orientation
from segfit.planning.recipe import decide_common_recipe, decide_flips, flips_of, recipe_of, scaling_of, size_spread
from segfit.planning.rules import REPLAYED
from segfit.planning.trace import Asked, Replay, Trace, as_json, decisions_of
from segfit.specs import Configuration, Normalization, TrainingSpec
from segfit.text import listing

__all__ = ["derive"]

_MORE_MEMORY = (2, 3)
"""How many times the memory the rules are followed again with."""
_SLICE_MM = 999.0
"""Thickness of the single slice that pictures get while the rules, which know three axes, are followed."""


def derive(fingerprint: Fingerprint, labels: LabelScheme, options: Options, hardware: Hardware | None = None) -> Plan:
    """Return the plan for a dataset, with a reason for every derived value.

    Presets `stock` and `resenc-*` decide exactly as nnU-Net's planners. `auto` takes their rules by the memory that is
    there, plans on canonical axes, and does not flip axes along which labels keep their order; pairs of left and right
    change places with a flip. Whatever the options fix is taken over and listed in `Plan.changes`. `Plan.run` stays
    None: it needs a measured step.

    Raises `InputError` when fingerprint and options do not go together or nothing fits.
    """
    check_request(fingerprint, options)
    data = _Data(fingerprint, labels, _images(fingerprint, options.planning))
    made = _follow(data, options, hardware)
    by_rule = _by_rule(data, options, hardware)
    trace = made.trace
    changes = (
        *(change_in_words(change, inputs) for change, inputs in trace.changes),
        *_set_changes(trace, by_rule, options.planning, list(made.configurations)),
    )
    return Plan(
        dataset=fingerprint.dataset,
        preset=options.preset,
        stock=options.preset != "auto" and not changes,
        changes=changes,
        fingerprint_hash=fingerprint.content_hash(),
        channel_names=fingerprint.channel_names,
        unit=fingerprint.unit,
        configurations=made.configurations,
        training=made.training,
        decisions=decisions_of(trace, by_rule, _replays(data, options, hardware), REPLAYED),
        warnings=(
            *data_warnings(fingerprint, labels, made.normalization),
            *(warning("normalization", item.remark) for item in made.schemes if item.remark),
            *(warning("left_out", text) for text in trace.found["configurations"].inputs.get("left_out", ())),
            *_memory_warnings(made, hardware),
        ),
    )


@dataclass(frozen=True)
class _Data:
    """What was measured, and what all followings of the rules share of it."""

    fingerprint: Fingerprint
    labels: LabelScheme
    images: Images

    @cached_property
    def spread(self) -> float | None:
        """How much the sizes of what is segmented differ between cases."""
        return size_spread(self.fingerprint)

    @cached_property
    def evidence(self) -> tuple[AxisEvidence, ...]:
        """What the cases say against flipping an axis."""
        fingerprint = self.fingerprint
        sides_known = fingerprint.ndim == 2 or fingerprint.orientation == "canonical"
        return axis_evidence(fingerprint.cases, self.labels, fingerprint.ndim, sides_known=sides_known)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """What following the rules once gives."""

    trace: Trace
    drafted: Mapping[str, Draft]
    configurations: dict[str, Configuration]
    training: dict[str, TrainingSpec]
    schemes: tuple[ChannelScheme, ...]
    normalization: tuple[Normalization, ...]


def _images(fingerprint: Fingerprint, planning: PlanningOptions) -> Images:
    """Return the cases for the rules. Only here pictures become volumes of one slice, thicker than any pixel."""
    spacings = np.array([case.spacing_mm for case in fingerprint.cases], dtype=np.float64)
    shapes = np.array([case.shape_after_crop for case in fingerprint.cases], dtype=np.float64)
    if fingerprint.ndim == 2:
        targets = [one.target_spacing_mm or () for one in (planning, *planning.by_configuration.values())]
        thickness = _SLICE_MM * max(1.0, float(spacings.max()), *(mm for target in targets for mm in target))
        slices = np.ones((len(shapes), 1))
        spacings, shapes = np.hstack([thickness * slices, spacings]), np.hstack([slices, shapes])
    return Images(
        spacings=spacings,
        shapes=shapes,
        num_training=fingerprint.num_training,
        ndim=fingerprint.ndim,
        orientation=fingerprint.orientation,
    )


def _follow(data: _Data, options: Options, hardware: Hardware | None) -> _Made:
    """Follow the rules from the first to the last."""
    trace, planning, fingerprint = Trace(), options.planning, data.fingerprint
    rules, memory_gb = choose_rules(options, hardware, trace)
    decide_orientation(fingerprint, options, trace)
    budget = MemoryBudget(rules=rules, memory_gb=memory_gb, heads=data.labels.num_declared)
    drafted = drafts(data.images, budget, planning, trace)
    planned = chosen(drafted, fingerprint.ndim, planning, trace)
    common = Asked(planning, trace)
    schemes = channel_schemes(fingerprint, propose=options.preset == "auto", asked=planning.normalization)
    normalization = decide_normalization(fingerprint, schemes, common)
    evidence = data.evidence if options.preset == "auto" and planning.mirror_axes is None else ()
    flips = decide_flips(fingerprint, data.labels, options, common, evidence)
    configurations: dict[str, Configuration] = {}
    training: dict[str, TrainingSpec] = {}
    scaling = scaling_of(data.spread, options)
    for name in planned:
        asked = Asked(planning, trace, name)
        item = configurations[name] = _configured(name, drafted, planned, data, normalization, options, asked)
        own = flips_of(fingerprint, data.labels, options, asked, evidence) if asked.own("mirror_axes") else flips
        training[name] = recipe_of(item, own, scaling, options, asked)
    decide_common_recipe(training, scaling, options, trace)
    return _Made(
        trace=trace,
        drafted=drafted,
        configurations=configurations,
        training=training,
        schemes=schemes,
        normalization=normalization,
    )


def _configured(
    name: str,
    drafted: Mapping[str, Draft],
    planned: Collection[str],
    data: _Data,
    normalization: tuple[Normalization, ...],
    options: Options,
    asked: Asked,
) -> Configuration:
    """Return one configuration; the second stage of a cascade tells only what is not as in 3d_fullres."""
    fingerprint, labels, trace = data.fingerprint, data.labels, asked.trace
    cascade = name == CASCADE
    if asked.own(*SETTABLE):
        schemes = channel_schemes(fingerprint, propose=options.preset == "auto", asked=asked.values.normalization)
        normalization = decide_normalization(fingerprint, schemes, asked)
    else:
        for leaf in SETTABLE:
            asked.note(leaf, trace.values["", leaf])
    repeats = cascade and "3d_fullres" in planned and name not in options.planning.by_configuration
    untold = replace(asked, trace=replace(trace, found={}))  # what it decides is not told again
    channels = len(fingerprint.channel_names)
    item = configuration(
        name,
        drafted,
        data.images,
        untold if repeats else asked,
        normalization=normalization,
        in_channels=channels + (len(labels.foreground_values) if cascade else 0),
        num_outputs=labels.num_outputs,
        next_stage=CASCADE if name == "3d_lowres" and CASCADE in planned else None,
    )
    network, inputs = item.network, {"image_channels": channels}
    if cascade:
        trace.decide(f"{name}.previous_stage", item.previous_stage, "cascade", previous_stage=item.previous_stage)
        inputs["foreground_labels"] = len(labels.foreground_values)
    trace.decide(f"{name}.network.in_channels", network.in_channels, "inputs", "cascade" if cascade else "", **inputs)
    ignored = {} if labels.ignore_value is None else {"ignore_label": labels.ignore_value}
    trace.decide(
        f"{name}.network.num_outputs",
        network.num_outputs,
        "outputs",
        "regions" if labels.has_regions else "labels",
        labels_with_background=len(labels.labels),
        **ignored,
    )
    return item


def _by_rule(data: _Data, options: Options, hardware: Hardware | None) -> Trace | None:
    """Return what the rules decide without anything that was set; None where nothing was, or they find nothing."""
    planning = options.planning
    without = options.model_copy(
        update={
            "planning": PlanningOptions(folds=planning.folds, splits=planning.splits),
            "training": TrainingOptions(),
            "augmentation": AugmentationOptions(),
        }
    )
    if without == options:
        return None
    with suppress(InputError):
        return _follow(data, without, hardware).trace
    return None


def _replays(data: _Data, options: Options, hardware: Hardware | None) -> list[Replay]:
    """Follow the rules again: with two and three times the memory, if that is another target, and twice the cases."""
    found: dict[tuple[str, float], Replay] = {}
    first = choose_rules(options, hardware, Trace())
    for factor in _MORE_MEMORY:
        more = options.model_copy(update={"memory_gb": factor * first[1]})
        rules, memory_gb = choose_rules(more, hardware, Trace())
        if (rules, memory_gb) == first or (rules.name, memory_gb) in found:
            continue
        trace: Trace | None = None
        with suppress(InputError):
            trace = _follow(data, more, hardware).trace
        preset = "" if rules == first[0] else rules.name
        found[rules.name, memory_gb] = Replay(trace=trace, memory_gb=memory_gb, preset=preset)
    cases = 2 * data.images.num_training
    twice = _Data(data.fingerprint, data.labels, replace(data.images, num_training=cases))
    return [*found.values(), Replay(trace=_follow(twice, options, hardware).trace, cases=cases)]


def _set_changes(trace: Trace, by_rule: Trace | None, planning: PlanningOptions, names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for every value that was set and is not what the rules give.

    It is told once for all configurations in which it is alike.
    """
    for key in ("orientation", "target_spacing_mm"):
        if getattr(planning, key) is not None:
            now, before = trace.found[key].value, None if by_rule is None else by_rule.found[key].value
            if as_json(now) != as_json(before):
                yield set_in_words(key, now, before)
    said: dict[str, list[str]] = {}
    for name in names:
        asked = Asked(planning, trace, name)
        for leaf in asked.leaves():
            value = as_json(trace.values[name, leaf])
            before = None if by_rule is None else as_json(by_rule.values.get((name, leaf)))
            of_all = leaf == "target_spacing_mm" and not asked.own(leaf)  # told above
            of_others = leaf == "patch_size" and len(asked.values.patch_size or ()) != len(value)
            if value != before and not of_all and not of_others:
                sentence = set_in_words(leaf, value, before, trace.remarks.get((name, leaf), ""))
                said.setdefault(sentence, []).append(name)
    for sentence, where in said.items():
        yield sentence if len(where) == len(names) > 1 else f"{listing(where)}: {sentence}"


def _memory_warnings(made: _Made, hardware: Hardware | None) -> Iterator[Problem]:
    memory_gb = made.trace.found["memory_gb"].value
    for name, item in made.configurations.items():
        budget = made.drafted[name].budget
        if budget.exceeded(item.ndim, item.memory_estimate):
            times = item.memory_estimate / budget.elements(item.ndim)
            problem = (
                f"the patch that was asked for needs about {times:.1f} times the memory target of {memory_gb:g} GB"
            )
            yield warning("patch_exceeds_memory", f"{name}: {problem}")
    if hardware is not None and hardware.kind != "cpu" and memory_gb > hardware.free_memory_gb:
        problem = f"planned for {memory_gb:g} GB, {hardware.name} has {hardware.free_memory_gb:.1f} GB free"
        yield warning("memory_not_free", problem)
