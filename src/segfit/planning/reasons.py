"""How a `Decision` is put together, and the sentence about what another memory target would change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from segfit.planning.plan import Decision, RaceEntry
from segfit.specs import Configuration

__all__ = ["REFERENCE", "SET", "Alternative", "by_axis", "candidate_words", "reason", "with_more_memory"]

REFERENCE = "nnU-Net 2.8.1 planning rules"
SET = "set by you"
"""The bound of a value that the user set."""


_REFUSED = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """What the same request gives with another memory target: the counterfactual that a decision tells."""

    memory_gb: float
    preset: str  # whose rules apply then; `auto` changes them with the memory
    configurations: Mapping[str, Configuration] | None  # None: what was set cannot be had then


def with_more_memory(
    now: Any,
    alternatives: Sequence[Alternative],
    value: Callable[[Mapping[str, Configuration]], Any],
    *,
    preset: str,
    absent: str = "",
) -> str:
    """Return what `value` would be with more memory: ``memory: with 16 GB it would be 192x160x160, with ...``.

    Parameters
    ----------
    now : the value as it is, and `value` reads the same from other configurations; both as they are to be printed
    preset : whose rules apply now
    absent : what to say where `value` gives None: there would be no such configuration
    """
    outcomes = [
        (item, _REFUSED if item.configurations is None else value(item.configurations)) for item in alternatives
    ]
    if not outcomes:
        return "another preset: auto plans for no more memory"
    if all(then == now for _, then in outcomes):
        return "more memory would not change it"
    parts = []
    for then, group in groupby(outcomes, key=lambda outcome: outcome[1]):
        names = " or ".join(_target(item, preset) for item, _ in group)
        fate = absent if then is None else f"it would {'still ' if then == now else ''}be {then}"
        if then is _REFUSED:
            fate = "what you set could not be had"
        parts.append(f"with {names} {fate}")
    return "memory: " + ", ".join(parts)


def _target(item: Alternative, preset: str) -> str:
    return f"{item.memory_gb:g} GB" + (f" (then by {item.preset})" if item.preset != preset else "")


def by_axis(values: Sequence[float]) -> str:
    """Return ``128x96x96``; one number per axis."""
    return "x".join(f"{n:.6g}" for n in values)


def candidate_words(entry: RaceEntry) -> str:
    """Return which candidate of a race an entry is about, in a few words."""
    return f"{entry.configuration} with voxels of {by_axis(entry.spacing_mm)} mm"


def reason(
    key: str,
    value: Any,
    rule: str,
    *,
    inputs: Mapping[str, Any] | None = None,
    bound: str,
    source: str,
    would_change: str,
) -> Decision:
    """Return the decision with plain JSON values."""
    return Decision(
        key=key,
        value=_plain(value),
        rule=rule,
        inputs=_plain(inputs or {}),
        bound=bound,
        source=source,
        would_change=would_change,
    )


def _plain(value: Any) -> Any:
    """Return the value as JSON has it, so that a plan read back is equal to the one written."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
