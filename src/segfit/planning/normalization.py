"""How channels are normalised: their names decide, and in `auto` the values where they contradict the name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from segfit.errors import InputError
from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint
from segfit.options import NormalizationScheme
from segfit.specs import Normalization

__all__ = ["MASK_BELOW", "SCHEME_NAMES", "ChannelScheme", "channel_schemes", "normalization_of", "scheme_of"]

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


@dataclass(frozen=True, slots=True)
class _Values:
    """What the values of a channel are like over all cases."""

    lowest: float
    highest: float
    hounsfield: bool
    spread: float  # the largest foreground deviation of a case over the smallest; outer tenths of the cases left out

    @property
    def range(self) -> str:
        return f"{self.lowest:g} to {self.highest:g}"


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
    return tuple(
        _decide(name, _values(fingerprint.cases, channel), propose=propose) for channel, name in enumerate(names)
    )


def normalization_of(schemes: Sequence[ChannelScheme], fingerprint: Fingerprint) -> tuple[Normalization, ...]:
    """Return the normalisation of every channel: the scheme with its mask or its statistics."""
    masked = fingerprint.median_relative_size_after_crop < MASK_BELOW
    return tuple(
        Normalization(
            scheme=item.scheme,
            use_mask=item.scheme == "zscore" and masked,
            statistics=statistics if item.scheme == "ct" else None,
        )
        for item, statistics in zip(schemes, fingerprint.intensities, strict=True)
    )


def _decide(name: str, values: _Values | None, *, propose: bool) -> ChannelScheme:
    named = scheme_of(name)
    if values is None:
        return ChannelScheme(named)
    better, reason = named, ""
    if name.casefold() not in _BY_NAME and values.hounsfield:
        better, reason = "ct", f"its values are Hounsfield units ({values.range})"
    elif named == "ct" and not values.hounsfield:
        reason = f"its values are no Hounsfield units ({values.range})"
        if values.spread > SAME_SCALE:
            better = "zscore"
            reason += f" and the deviations of its cases differ by a factor of {values.spread:.1f}"
        else:
            reason += ", but all cases have one scale"
    elif named == "rgb_to_0_1" and (values.lowest < 0 or values.highest > 255):
        better, reason = "zscore", f"its values ({values.range}) are not those of 8-bit colour"
    if not reason:
        return ChannelScheme(named)
    taken = better if propose else named
    how = f"it is normalised as {taken}, as its " + ("name says" if taken == named else "values say")
    change = "" if taken == better else f"; its values would ask for {better}"
    return ChannelScheme(taken, f'channel "{name}": {reason}; {how}{change}')


def _values(cases: Sequence[CaseFingerprint], channel: int) -> _Values | None:
    """Return what the values of a channel are like; None if that was not measured."""
    measured = [case.channels[channel] for case in cases if len(case.channels) > channel]
    if not measured:
        return None
    lows = np.array([item.min for item in measured])
    deviations = np.array([item.foreground_std for item in measured if item.foreground_std])
    low, high = np.quantile(deviations, (0.1, 0.9)) if deviations.size else (1.0, 1.0)
    return _Values(
        lowest=float(lows.min()),
        highest=max(item.max for item in measured),
        hounsfield=bool(np.mean((lows >= AIR_HU[0]) & (lows <= AIR_HU[1])) >= AIR_SHARE),
        spread=float(high / low),
    )
