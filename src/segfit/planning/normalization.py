"""How channels are normalised: their names decide, and in `auto` the values where they contradict the name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segfit.errors import InputError
from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint
from segfit.options import NormalizationScheme, StatisticsOptions
from segfit.planning.trace import Asked
from segfit.specs import Normalization

__all__ = [
    "MASK_BELOW",
    "SCHEME_NAMES",
    "SETTABLE",
    "ChannelScheme",
    "channel_schemes",
    "decide_normalization",
    "normalization_of",
    "scheme_of",
]

SETTABLE = ("normalization", "use_mask", "statistics")
"""Options of the normalisation."""

MASK_BELOW = 0.75
"""Cropping to non-zero that leaves less than this share asks for statistics inside the non-zero mask."""
AIR_HU = (-3100, -900)
"""The smallest value of a CT image: air, or what scanners and converters fill the corners with."""
AIR_SHARE = 0.8
"""Images whose smallest value is air must be this share of all cases, or the values are no Hounsfield units."""
SAME_SCALE = 2.0
"""Foreground deviations of cases that differ by more than this factor have no scale in common."""

_BY_NAME: dict[str, NormalizationScheme] = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale_to_0_1",
    "rgb_to_0_1": "rgb_to_0_1",
}
SCHEME_NAMES = tuple(_BY_NAME)
"""The channel names that ask for a scheme; every other name means z-scores."""


@dataclass(frozen=True, slots=True)
class ChannelScheme:
    """The normalisation of one channel; `remark` says how name and values disagree, if they do."""

    scheme: NormalizationScheme
    remark: str = ""


def scheme_of(channel_name: str) -> NormalizationScheme:
    """Return the scheme a channel's name asks for (case does not matter); z-scores for every unknown name."""
    return _BY_NAME.get(channel_name.casefold(), "zscore")


def channel_schemes(
    fingerprint: Fingerprint, *, propose: bool, asked: Sequence[NormalizationScheme] | None = None
) -> tuple[ChannelScheme, ...]:
    """Return the scheme of every channel: the one its name asks for, or with `propose` the one its values ask for.

    Schemes that were asked for, one per channel, are taken as they are; another number of them is an `InputError`.

    Values overrule a name in three cases: Hounsfield units under an unknown name are CT; a channel called CT that holds
    none, and whose cases have no scale in common, is z-scored; values outside 0 to 255 are not scaled as 8-bit colour.
    """
    names = fingerprint.channel_names
    if asked is not None:
        if len(asked) != len(names):
            raise InputError(
                f"planning.normalization needs one scheme for each of the channels {', '.join(names)}, "
                f"got {', '.join(asked)}"
            )
        return tuple(ChannelScheme(scheme) for scheme in asked)
    return tuple(_scheme(name, fingerprint.cases, channel, propose=propose) for channel, name in enumerate(names))


def normalization_of(schemes: Sequence[ChannelScheme], fingerprint: Fingerprint) -> tuple[Normalization, ...]:
    """Return the normalisation of every channel by rule: the scheme with its mask or its statistics."""
    masked = fingerprint.median_relative_size_after_crop < MASK_BELOW
    return tuple(
        Normalization(
            scheme=item.scheme,
            use_mask=item.scheme == "zscore" and masked,
            statistics=statistics if item.scheme == "ct" else None,
        )
        for item, statistics in zip(schemes, fingerprint.intensities, strict=True)
    )


def decide_normalization(
    fingerprint: Fingerprint, schemes: Sequence[ChannelScheme], asked: Asked
) -> tuple[Normalization, ...]:
    """Return the normalisation of a configuration, or of all of them, with masks and statistics that were set.

    `schemes` are those of `channel_schemes` for what was asked.
    """
    found = normalization_of(schemes, fingerprint)
    found = _masked(found, asked.values.use_mask, asked.key("use_mask"))
    found = _measured_otherwise(found, asked.values.statistics, asked.key("statistics"))
    trace = asked.trace
    asked.note("normalization", [how.scheme for how in found])
    asked.note("use_mask", [how.use_mask for how in found])
    asked.note("statistics", [_clipping(how) for how in found])
    if asked.name:
        for leaf in SETTABLE:
            if asked.own(leaf):
                value = trace.values[asked.name, leaf]
                trace.decide(f"{asked.name}.{leaf}", value, "normalization", "", asked.option(leaf))
        return found
    options = [asked.option(leaf) for leaf in SETTABLE]
    for index, (name, how, scheme) in enumerate(zip(fingerprint.channel_names, found, schemes, strict=True)):
        inputs: dict[str, Any] = {"channel": name}
        if how.scheme == "zscore":
            inputs["median_relative_size_after_crop"] = fingerprint.median_relative_size_after_crop
        inputs |= _clipping(how) or {}
        if scheme.remark:
            inputs["remark"] = scheme.remark
        known = "name" if name.casefold() in SCHEME_NAMES else "unknown_name"
        bound = known if how.scheme == scheme_of(name) else "values"
        rule = f"normalization_{how.scheme}" + ("_masked" if how.use_mask else "")
        value = how.scheme + (" inside the non-zero mask" if how.use_mask else "")
        trace.decide(f"normalization.{index}", value, rule, bound, *options, **inputs)
        if bound == "values" and asked.values.normalization is None:
            trace.differ("scheme", channel=name, scheme=how.scheme, by_name=scheme_of(name))
    return found


def _clipping(how: Normalization) -> dict[str, float] | None:
    return None if how.statistics is None else how.statistics.model_dump(include=set(StatisticsOptions.model_fields))


def _masked(
    normalization: tuple[Normalization, ...], asked: tuple[bool, ...] | None, key: str
) -> tuple[Normalization, ...]:
    if asked is None:
        return normalization
    _check_count(asked, normalization, key)
    for channel, (how, mask) in enumerate(zip(normalization, asked, strict=True)):
        if mask and how.scheme != "zscore":
            raise InputError(
                f"{key} asks for the mask in channel {channel}, which is normalised as {how.scheme}",
                "only zscore has one",
            )
    return tuple(how.model_copy(update={"use_mask": mask}) for how, mask in zip(normalization, asked, strict=True))


def _measured_otherwise(
    normalization: tuple[Normalization, ...], asked: tuple[StatisticsOptions | None, ...] | None, key: str
) -> tuple[Normalization, ...]:
    """Return the normalisation with other statistics; those that are not given stay as they were measured."""
    if asked is None:
        return normalization
    _check_count(asked, normalization, key)
    result = []
    for channel, (how, given) in enumerate(zip(normalization, asked, strict=True)):
        values = {} if given is None else given.model_dump(exclude_none=True)
        if values and how.statistics is None:
            raise InputError(
                f"{key} has values for channel {channel}, which is normalised as {how.scheme}", "only ct has statistics"
            )
        statistics = None if how.statistics is None else how.statistics.model_copy(update=values)
        if statistics is not None and statistics.percentile_00_5 >= statistics.percentile_99_5:
            raise InputError(
                f"{key} clips channel {channel} to {statistics.percentile_00_5:g} to {statistics.percentile_99_5:g}",
                "percentile_00_5 must be below percentile_99_5",
            )
        result.append(how.model_copy(update={"statistics": statistics}))
    return tuple(result)


def _check_count(values: Sequence[Any], normalization: Sequence[Normalization], key: str) -> None:
    if len(values) != len(normalization):
        raise InputError(f"{key} needs one value for each of {len(normalization)} channels, got {len(values)}")


def _scheme(name: str, cases: Sequence[CaseFingerprint], channel: int, *, propose: bool) -> ChannelScheme:
    named = scheme_of(name)
    measured = [case.channels[channel] for case in cases if len(case.channels) > channel]
    if not measured:
        return ChannelScheme(named)
    lows, high = np.array([item.min for item in measured]), max(item.max for item in measured)
    between = f"{lows.min():g} to {high:g}"
    hounsfield = np.mean((lows >= AIR_HU[0]) & (lows <= AIR_HU[1])) >= AIR_SHARE
    better, reason = named, ""
    if name.casefold() not in _BY_NAME and hounsfield:
        better, reason = "ct", f"its values are Hounsfield units ({between})"
    elif named == "ct" and not hounsfield:
        reason = f"its values are no Hounsfield units ({between})"
        # The largest foreground deviation of a case over the smallest, the outer tenths of the cases left out.
        deviations = [item.foreground_std for item in measured if item.foreground_std]
        least, most = np.quantile(deviations, (0.1, 0.9)) if deviations else (1.0, 1.0)
        if most / least > SAME_SCALE:
            better = "zscore"
            reason += f" and the deviations of its cases differ by a factor of {most / least:.1f}"
        else:
            reason += ", but all cases have one scale"
    elif named == "rgb_to_0_1" and (lows.min() < 0 or high > 255):
        better, reason = "zscore", f"its values ({between}) are not those of 8-bit colour"
    if not reason:
        return ChannelScheme(named)
    taken = better if propose else named
    how = f"it is normalised as {taken}, as its " + ("name says" if taken == named else "values say")
    change = "" if taken == better else f"; its values would ask for {better}"
    return ChannelScheme(taken, f'channel "{name}": {reason}; {how}{change}')
