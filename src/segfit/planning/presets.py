"""The planning rules of the presets: nnU-Net's planners as values, and how `auto` chooses among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from segfit.device import Hardware
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.options import NetworkKind, Options
from segfit.planning.trace import Trace

__all__ = [
    "RULES",
    "Rules",
    "choose_rules",
    "decide_orientation",
    "orientation_of",
    "rules_of_kind",
    "splits_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What distinguishes one planner of nnU-Net from another, or one kind of network.

    `elements_2d` and `elements_3d` are the feature-map elements of one sample (`segfit.feature_maps`) that fill
    `memory_gb` at nnU-Net's usual batch size; they scale linearly with the memory target.
    """

    name: str
    planner: str  # nnU-Net's class
    plans_name: str  # nnU-Net's plans identifier
    kind: NetworkKind
    memory_gb: float
    elements_2d: float
    elements_3d: float
    coverage: float  # largest share of the dataset's voxels in one batch
    encoder_convs: tuple[int, ...]  # per stage; the last entry repeats
    decoder_convs: int
    base_features: int = 32
    max_features_2d: int = 512
    max_features_3d: int = 320
    expansion: int = 2  # MedNeXt only

    def features(self, ndim: int, stages: int) -> tuple[int, ...]:
        """Return the features per stage: doubled from stage to stage up to the cap."""
        cap = self.max_features_2d if ndim == 2 else self.max_features_3d
        return tuple([min(cap, self.base_features << stage) for stage in range(stages)])

    def convs(self, stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return convolutions (plain) or blocks (others) per encoder stage, and the like per decoder level."""
        last = len(self.encoder_convs) - 1
        encoder = tuple([self.encoder_convs[min(stage, last)] for stage in range(stages)])
        return encoder, (self.decoder_convs,) * (stages - 1)


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
"""The planners of nnU-Net 2.8.1 by preset."""


_MEDNEXT = Rules(
    name="mednext",
    planner="",
    plans_name="",
    kind="mednext",
    memory_gb=8,
    elements_2d=100e6,
    elements_3d=665e6,
    coverage=0.05,
    encoder_convs=(2,),
    decoder_convs=2,
    max_features_3d=512,
)
"""Blocks and features of MedNeXt-S. Its elements are the plain network's by 7.9 / 6.65: so many bytes of each are
kept for the backward pass in float32."""


def rules_of_kind(rules: Rules, kind: NetworkKind) -> Rules:
    """Return the rules for the other kind of network: its convolutions, and what of it fills the memory.

    The share of the dataset in a batch stays; the default planner's rules become those of nnU-Net's
    `ResEncUNetPlanner`.
    """
    if kind == rules.kind:
        return rules
    other = _MEDNEXT if kind == "mednext" else RULES["resenc-m" if kind == "residual" else "stock"]
    return replace(other, name=rules.name, planner=rules.planner, plans_name=rules.plans_name, coverage=rules.coverage)


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


def choose_rules(options: Options, hardware: Hardware | None, trace: Trace) -> tuple[Rules, float]:
    """Return the planning rules and the memory target in GB.

    A named preset keeps its own memory target unless the user gave one. `auto` goes by the memory that is there:
    nine tenths of the free device memory in whole GB, so that small fluctuations do not change the plan. On a CPU, or
    when nothing was measured, it plans like `stock`: time, not memory, is short there.
    """
    asked = options.memory_gb
    if options.preset != "auto":
        rules = RULES[options.preset]
        memory = asked or rules.memory_gb
        trace.decide("preset", rules.name, "preset", "asked", planner=rules.planner)
        trace.decide("memory_gb", memory, "memory", "preset" if asked is None else "asked", planner=rules.planner)
        return rules, memory

    gpu = hardware if hardware is not None and hardware.kind != "cpu" else None
    measured: dict[str, Any] = {}
    if asked is not None:
        there, bound = asked, "asked"
    elif gpu is not None:
        there, bound = float(max(1, math.floor(0.9 * gpu.free_memory_gb))), "free"
        measured = {"device": gpu.name, "free_gb": gpu.free_memory_gb}
    else:
        there, bound = RULES["stock"].memory_gb, "cpu"
    if gpu is None:
        rules, why = RULES["stock"], "no_gpu"
    elif there >= AUTO_LARGE_GB:
        rules, why = RULES["resenc-l"], "large"
    elif there >= AUTO_MEDIUM_GB:
        rules, why = RULES["resenc-m"], "medium"
    else:
        rules, why = RULES["stock"], "small"
    memory = min(there, AUTO_MOST_GB)
    trace.decide("preset", rules.name, "preset_auto", why, planner=rules.planner, memory_gb=there)
    trace.decide("memory_gb", memory, "memory", "capped" if memory < there else bound, there_gb=there, **measured)
    return rules, memory


def decide_orientation(fingerprint: Fingerprint, options: Options, trace: Trace) -> None:
    """Record the axes on which the images are seen."""
    asked = options.planning.orientation
    if fingerprint.ndim == 2:
        trace.decide("orientation", fingerprint.orientation, "orientation_2d", preset=options.preset)
    else:
        value = orientation_of(options)
        option = "" if asked is None else "planning.orientation"
        trace.decide("orientation", value, "orientation_3d", value, option, preset=options.preset)
        if asked is None and value == "canonical":
            trace.differ("canonical")
