"""How channels are normalised: their names decide."""

from __future__ import annotations

from collections.abc import Sequence

from segfit.fingerprint.fingerprint import IntensityStatistics
from segfit.planning.plan import Normalization, NormalizationScheme

__all__ = ["normalization_of", "scheme_of"]

MASK_BELOW = 0.75
"""Cropping to non-zero that leaves less than this share asks for statistics inside the non-zero mask."""

_BY_NAME: dict[str, NormalizationScheme] = {
    "ct": "ct",
    "nonorm": "none",
    "zscore": "zscore",
    "rescale_to_0_1": "rescale_to_0_1",
    "rgb_to_0_1": "rgb_to_0_1",
}


def scheme_of(channel_name: str) -> NormalizationScheme:
    """Return the scheme a channel's name asks for (case does not matter); z-scores for every unknown name."""
    return _BY_NAME.get(channel_name.casefold(), "zscore")


def normalization_of(
    channel_names: Sequence[str], relative_size: float, intensities: Sequence[IntensityStatistics]
) -> tuple[Normalization, ...]:
    """Return the normalisation of every channel.

    Parameters
    ----------
    relative_size : median over cases of the share of voxels left by cropping to non-zero
    intensities : foreground statistics per channel; CT channels use them
    """
    schemes = [scheme_of(name) for name in channel_names]
    return tuple(
        Normalization(
            scheme=scheme,
            use_mask=scheme == "zscore" and relative_size < MASK_BELOW,
            statistics=statistics if scheme == "ct" else None,
        )
        for scheme, statistics in zip(schemes, intensities, strict=True)
    )
