"""The planning rules of the presets: the reference's planners as values, and how `auto` chooses among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from segfit.device import Hardware
from segfit.options import Options, Preset
from segfit.planning.plan import Decision

__all__ = ["RULES", "Rules", "choose_rules", "orientation_of", "rules_of_kind", "splits_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What distinguishes one planner of the reference from another.

    `elements_2d` and `elements_3d` are the feature-map elements of one sample (`segfit.feature_maps`) that fill
    `memory_gb` at the reference batch size; they scale linearly with the memory target.
    """

    name: str
    planner: str  # the reference's class
    plans_name: str  # the reference's plans identifier
    kind: Literal["plain", "residual"]
    memory_gb: float
    elements_2d: float
    elements_3d: float
    coverage: float  # largest share of the dataset's voxels in one batch
    encoder_convs: tuple[int, ...]  # per stage; the last entry repeats
    decoder_convs: int
    base_features: int = 32
    max_features_2d: int = 512
    max_features_3d: int = 320

    def features(self, ndim: int, stages: int) -> tuple[int, ...]:
        """Return the features per stage: doubled from stage to stage up to the cap."""
        cap = self.max_features_2d if ndim == 2 else self.max_features_3d
        return tuple([min(cap, self.base_features << stage) for stage in range(stages)])

    def convs(self, stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return convolutions (plain) or blocks (residual) per encoder stage, and convolutions per decoder level."""
        last = len(self.encoder_convs) - 1
        encoder = tuple([self.encoder_convs[min(stage, last)] for stage in range(stages)])
        return encoder, (self.decoder_convs,) * (stages - 1)

    def elements(self, ndim: int, memory_gb: float) -> float:
        """Return the feature-map elements that fit at the reference batch size."""
        return (self.elements_2d if ndim == 2 else self.elements_3d) * (memory_gb / self.memory_gb)


def _residual(name: str, letter: str, memory_gb: float, elements_2d: float, elements_3d: float) -> Rules:
    return Rules(
        name=name,
        planner=f"nnUNetPlannerResEnc{letter}",
        plans_name=f"nnUNetResEncUNet{letter}Plans",
        kind="residual",
        memory_gb=memory_gb,
        elements_2d=elements_2d,
        elements_3d=elements_3d,
        coverage=1.0,
        encoder_convs=(1, 3, 4, 6),
        decoder_convs=1,
    )


RULES: dict[str, Rules] = {
    "stock": Rules(
        name="stock",
        planner="ExperimentPlanner",
        plans_name="nnUNetPlans",
        kind="plain",
        memory_gb=8,
        elements_2d=85e6,
        elements_3d=560e6,
        coverage=0.05,
        encoder_convs=(2,),
        decoder_convs=2,
    ),
    "resenc-m": _residual("resenc-m", "M", 8, 135e6, 680e6),
    "resenc-l": _residual("resenc-l", "L", 24, 380e6, 2100e6),
    "resenc-xl": _residual("resenc-xl", "XL", 40, 560e6, 3600e6),
}
"""The reference's planners by preset, nnU-Net 2.8.1."""


def rules_of_kind(rules: Rules, kind: Literal["plain", "residual"]) -> Rules:
    """Return the rules for the other kind of network: its convolutions, and what of it fills the memory.

    The share of the dataset in a batch stays; the default planner's rules become those of the reference's
    `ResEncUNetPlanner`.
    """
    if kind == rules.kind:
        return rules
    other = RULES["resenc-m" if kind == "residual" else "stock"]
    return replace(
        rules,
        kind=kind,
        memory_gb=other.memory_gb,
        elements_2d=other.elements_2d,
        elements_3d=other.elements_3d,
        encoder_convs=other.encoder_convs,
        decoder_convs=other.decoder_convs,
    )


AUTO_LARGE_GB = 20
AUTO_MEDIUM_GB = 7
AUTO_MOST_GB = 24
"""`auto` plans residual encoders where this much memory is there, and never for more than the last value: beyond it
the published gain is small and the training time is not."""


def orientation_of(options: Options) -> Literal["canonical", "stored"]:
    """Return the orientation in which the fingerprint is to be measured for these options."""
    return options.planning.orientation or ("canonical" if options.preset == "auto" else "stored")


def splits_of(options: Options) -> Literal["balanced", "nnunet"] | Path:
    """Return how the cases are to be split into folds for these options."""
    return options.planning.splits or ("balanced" if options.preset == "auto" else "nnunet")


def choose_rules(options: Options, hardware: Hardware | None) -> tuple[Rules, float, tuple[Decision, ...]]:
    """Return the planning rules, the memory target in GB, and why.

    A named preset keeps its own memory target unless the user gave one. `auto` goes by the memory that is there:
    nine tenths of the free device memory in whole GB, so that small fluctuations do not change the plan. On a CPU, or
    when nothing was measured, it plans like `stock`: time, not memory, is short there.
    """
    if options.preset != "auto":
        rules = RULES[options.preset]
        memory = options.memory_gb or rules.memory_gb
        why = "the preset that was asked for"
        bound = "the preset's own target" if options.memory_gb is None else "asked for"
        decisions = (_preset(options.preset, rules, why, "asked for"), _memory(memory, options, bound))
        return rules, memory, decisions

    accelerated = hardware is not None and hardware.kind != "cpu"
    if options.memory_gb is not None:
        there = options.memory_gb
        source = "asked for"
    elif hardware is not None and accelerated:
        there = float(max(1, math.floor(0.9 * hardware.free_memory_gb)))
        source = f"nine tenths of the {hardware.free_memory_gb:.1f} GB that are free on {hardware.name}, rounded down"
    else:
        there = RULES["stock"].memory_gb
        source = "the reference's target; on a CPU time is short, not memory"
    large, medium = f"resenc-l from {AUTO_LARGE_GB} GB on", f"resenc-m from {AUTO_MEDIUM_GB} GB on"
    if not accelerated:
        rules, why = RULES["stock"], "without a GPU the plain network is trained, which costs least time"
        change = f"a GPU: {medium}, {large}"
    elif there >= AUTO_LARGE_GB:
        rules, why = RULES["resenc-l"], f"there are at least {AUTO_LARGE_GB} GB of device memory"
        change = f"less device memory: {medium}, stock below"
    elif there >= AUTO_MEDIUM_GB:
        rules, why = RULES["resenc-m"], f"there are {AUTO_MEDIUM_GB} to {AUTO_LARGE_GB} GB of device memory"
        change = f"another amount of device memory: {large}, stock below {AUTO_MEDIUM_GB} GB"
    else:
        rules, why = RULES["stock"], f"there are less than {AUTO_MEDIUM_GB} GB of device memory"
        change = f"more device memory: {medium}, {large}"
    memory = min(there, AUTO_MOST_GB)
    if memory < there:
        source = f"auto plans for at most {AUTO_MOST_GB} GB, of {there:g} GB " + (
            "asked for" if options.memory_gb is not None else "there are"
        )
    bound = f"{there:g} GB of device memory" if accelerated else "no GPU"
    return rules, memory, (_preset(options.preset, rules, why, bound, change), _memory(memory, options, source))


def _preset(preset: Preset, rules: Rules, why: str, bound: str, change: str = "") -> Decision:
    others = ", ".join(name for name in RULES if name != rules.name)
    return Decision(
        key="preset",
        value=rules.name,
        rule=f"planning rules of {rules.planner}: {why}",
        inputs={"preset": preset},
        bound=bound,
        source="nnU-Net 2.8.1 planner presets" if preset != "auto" else "segfit preset auto",
        would_change=(f"{change}; or " if change else "") + f"another preset ({others})",
    )


def _memory(memory: float, options: Options, source: str) -> Decision:
    return Decision(
        key="memory_gb",
        value=memory,
        rule="memory in GB that one training may take; the budget of feature maps scales linearly with it",
        inputs={} if options.memory_gb is None else {"asked": options.memory_gb},
        bound=source,
        source="nnU-Net 2.8.1 planning rules, memory target",
        would_change="the option memory_gb (--memory)",
    )
