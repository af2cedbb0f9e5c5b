"""What the rules decide, recorded where they decide it, and what the user set, asked for in the same place.

A rule calls `Trace.decide` with the value, its own name and the bound that was active; what the user set of a
configuration it gets from `Asked`. What would change a value is found by following the rules again, with more memory
for example, and comparing two traces by key. The sentences for all of it are in `segfit.planning.rules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

from segfit.options import CASCADE, ConfigurationOptions, PlanningOptions, ResamplingOptions
from segfit.planning.plan import Decision, Outcome

__all__ = ["Asked", "Replay", "Trace", "as_json", "decisions_of"]

_T = TypeVar("_T")


class _Found(NamedTuple):
    value: Any
    rule: str
    bound: str
    options: tuple[str, ...]  # that set the value in place of the rule
    inputs: Mapping[str, Any]


_NOTHING = _Found(None, "", "", (), {})


@dataclass(slots=True)
class Trace:
    """Every decision by its key, in order; the values that can be set; and how the plan differs from nnU-Net's."""

    found: dict[str, _Found] = field(default_factory=dict)
    values: dict[tuple[str, str], Any] = field(default_factory=dict)  # by configuration and option
    remarks: dict[tuple[str, str], str] = field(default_factory=dict)  # what became of a value that was set
    changes: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def decide(self, key: str, value: _T, rule: str, bound: str = "", *options: str, **inputs: Any) -> _T:
        """Record a decision and return its value; `options` name what set it in place of the rule, "" names nothing."""
        self.found[key] = _Found(value, rule, bound, tuple([option for option in options if option]), inputs)
        return value

    def differ(self, change: str, **inputs: Any) -> None:
        """Record that the plan is not nnU-Net's here; `segfit.planning.rules` has the sentence."""
        self.changes.append((change, inputs))


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user set of one configuration, or of all of them (`name` is empty)."""

    planning: PlanningOptions
    trace: Trace
    name: str = ""
    values: ConfigurationOptions = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.planning.of(self.name))

    def __call__(self, leaf: str, by_rule: _T) -> _T:
        """Return what was set of a value, else what the rule gives; either is noted."""
        value = getattr(self.values, leaf)
        return self.note(leaf, by_rule if value is None else value)

    def note(self, leaf: str, value: _T, remark: str = "") -> _T:
        """Note what became of a value that can be set."""
        self.trace.values[self.name, leaf] = value
        if remark:
            self.trace.remarks[self.name, leaf] = remark
        return value

    def key(self, leaf: str) -> str:
        """Return the option that sets a value (a dotted name, like ``resample_image.order``) of this configuration."""
        owners = (self.name, "3d_fullres") if self.name == CASCADE else (self.name,)
        for owner in owners:
            for name, values in self.planning.by_configuration.items():
                if name == owner and attrgetter(leaf)(values) is not None:
                    return f"planning.{owner}.{leaf}"
        return f"planning.{leaf}"

    def option(self, leaf: str) -> str:
        """Return the option that set a value; empty where none did."""
        return "" if attrgetter(leaf)(self.values) is None else self.key(leaf)

    def own(self, *leaves: str) -> bool:
        """Whether one of these values was set for this configuration alone."""
        return any(self.key(leaf) != f"planning.{leaf}" for leaf in leaves)

    def leaves(self) -> Iterator[str]:
        """Yield the dotted names of all that was set."""
        for name in ConfigurationOptions.model_fields:
            value = getattr(self.values, name)
            if isinstance(value, ResamplingOptions):
                yield from (f"{name}.{leaf}" for leaf in value.model_dump(exclude_none=True))
            elif value is not None:
                yield name


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the rules decide under other circumstances; no trace: what was set does not fit then."""

    trace: Trace | None
    memory_gb: float | None = None
    cases: int | None = None
    preset: str = ""  # whose rules apply then, where it is another

    def outcome(self, key: str) -> Outcome:
        """Return what becomes of one decision."""
        there = None if self.trace is None else self.trace.found.get(key)
        state = "refused" if self.trace is None else "absent" if there is None else "planned"
        value = None if there is None else as_json(there.value)
        return Outcome(memory_gb=self.memory_gb, cases=self.cases, preset=self.preset, state=state, value=value)


def decisions_of(
    trace: Trace, by_rule: Trace | None, replays: Sequence[Replay], replayed: Mapping[str, Iterable[str]]
) -> tuple[Decision, ...]:
    """Return the decisions of a trace.

    Parameters
    ----------
    by_rule : the trace without anything that was set, whose values stand beside those that were
    replays : what would change a value
    replayed : by rule, what its decisions are followed again with: "memory", "cases"
    """
    result = []
    for key, item in trace.found.items():
        told = _by_rule(by_rule, key) if item.options else item
        kinds = () if item.options else replayed.get(item.rule, ())
        result.append(
            Decision(
                key=key,
                value=as_json(item.value),
                rule=told.rule,
                bound=told.bound,
                inputs=as_json(told.inputs),
                options=item.options,
                by_rule=as_json(told.value) if item.options else None,
                outcomes=tuple(
                    one.outcome(key) for one in replays if ("cases" if one.memory_gb is None else "memory") in kinds
                ),
            )
        )
    return tuple(result)


def _by_rule(trace: Trace | None, key: str) -> _Found:
    """Return what a rule decided, if any; a second stage of a cascade that repeats 3d_fullres has its values."""
    if trace is None:
        return _NOTHING
    found = trace.found.get(key) or trace.found.get(key.replace(f"{CASCADE}.", "3d_fullres."))
    name, _, leaf = key.partition(".")
    if found is None and (name, leaf) in trace.values:  # of all configurations, unless one has its own
        general = trace.found.get(leaf) or trace.found["normalization.0"]
        found = general._replace(value=trace.values[name, leaf])
    return found or _NOTHING


def as_json(value: Any) -> Any:
    """Return the value as JSON has it, so that a plan read back is equal to the one written."""
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value
