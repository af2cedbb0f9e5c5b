"""The table of stages: what the key of each result is made of.

A result counts under its key alone, so whatever bears on it stands here, and nothing else: options that change nothing
(workers, the interval of saved states) are in no key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from segfit.options import Options
from segfit.records import Key

__all__ = ["STAGES", "Stage"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Parameters
    ----------
    needs : what its result is made of, by name; `key` is given a hash of each
    options : the options that it reads, dotted, or the parents of several
    without : those among them that it does not read
    version : of what the stage makes; a change makes its stored results stale
    """

    name: str
    needs: tuple[str, ...]
    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    version: int = 1

    def key(self, options: Options, **made_of: Any) -> Key:
        """Return the key of a result made of these things."""
        assert set(made_of) == set(self.needs), (self.name, sorted(made_of))
        read = {name: value for name in self.options if (value := self._read(options, name)) is not None}
        return Key(stage=self.name, version=self.version, made_of={**made_of, **({"options": read} if read else {})})

    def _read(self, options: Options, name: str) -> Any:
        """Return what was asked for; None for a default."""
        tree = options.model_dump(mode="json", exclude_defaults=True, by_alias=True)
        for hidden in self.without:
            *parents, leaf = hidden.split(".")
            node: Any = tree
            for parent in parents:
                node = node.get(parent, {})
            node.pop(leaf, None)
        node = tree
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node or None if isinstance(node, dict) else node


_TRAINED_FROM = ("preset", "memory_gb", "device", "seed", "dataset", "planning", "training", "augmentation")
_PLANNED_ON = ("fingerprint", "labels", "splits", "weights")
_NOT_PLANNED_FROM = (
    "dataset.skip_incomplete",  # cases tell of this
    "dataset.labels",  # and of this
    "training.checkpoint_seconds",
    "training.compiled",
    "training.cuda_graph",
    "training.trackers",
)

STAGES = {
    stage.name: stage
    for stage in (
        Stage("check", ("dataset",), ("dataset.labels",), version=2),
        Stage("fingerprint", ("cases", "labels", "orientation"), version=2),
        Stage("plan", _PLANNED_ON, (*_TRAINED_FROM, "inference", "time_s"), _NOT_PLANNED_FROM),
        Stage("course", _PLANNED_ON, _TRAINED_FROM, (*_NOT_PLANNED_FROM, "dataset.groups", "planning.folds")),
        Stage("race", ("plan",)),
        Stage("validate", ("weights", "cases", "mirror"), ("inference.tile_step", "inference.mirror")),
        Stage("next_stage", ("validation", "grids")),  # labels that the second stage of a cascade sees
        Stage("select", ("validations", "labels"), version=2),
        Stage("model", ("selection", "weights", "plan"), version=2),
        Stage("predict", ("model", "images")),
        Stage("evaluate", ("predictions", "references")),
    )
}
