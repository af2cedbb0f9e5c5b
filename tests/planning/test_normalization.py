"""Names decide how channels are normalised; in auto values that contradict them do."""

from __future__ import annotations

import pytest
from planning_fakes import STATISTICS, case, fingerprint

from segfit.fingerprint.fingerprint import ChannelIntensities, Fingerprint
from segfit.planning.normalization import ChannelScheme, channel_schemes, normalization_of, scheme_of


def _dataset(name: str, low: float, high: float, deviations: list[float], *, relative_size: float = 1.0) -> Fingerprint:
    cases = [
        case(
            (20, 20, 20),
            (1, 1, 1),
            channels=[ChannelIntensities(min=low, max=high, foreground_mean=1, foreground_std=deviation)],
        )
        for deviation in deviations
    ]
    return fingerprint(cases, channels=[name], relative_size=relative_size)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("CT", "ct"),
        ("ct", "ct"),
        ("MRI", "zscore"),
        ("noNorm", "none"),
        ("rgb_to_0_1", "rgb_to_0_1"),
        ("Rescale_to_0_1", "rescale_to_0_1"),
        ("CT_venous", "zscore"),
    ],
)
def test_names(name: str, scheme: str) -> None:
    assert scheme_of(name) == scheme


@pytest.mark.parametrize(
    ("name", "low", "high", "deviations", "named", "proposed"),
    [
        ("T1", 0, 4000, [10, 500], "zscore", "zscore"),  # any scale will do for z-scores
        ("T1", -3, 8, [1, 1], "zscore", "zscore"),
        ("CT", -1024, 3071, [100, 120], "ct", "ct"),
        ("CT_venous", -1000, 2000, [100, 120], "zscore", "ct"),
        ("phase", -4096, 4095, [100, 120], "zscore", "zscore"),  # below any CT
        ("zscore", -1024, 3071, [100, 120], "zscore", "zscore"),  # a method asked for, not a name
        ("CT", 0, 4095, [100, 120], "ct", "ct"),  # shifted, one scale
        ("CT", 0, 900, [20, 90], "ct", "zscore"),  # not CT at all
        ("rgb_to_0_1", 0, 255, [40, 50], "rgb_to_0_1", "rgb_to_0_1"),
        ("rgb_to_0_1", 0, 4095, [40, 50], "rgb_to_0_1", "zscore"),
        ("nonorm", -1024, 3071, [100, 120], "none", "none"),
    ],
)
def test_values_that_contradict_a_name(
    name: str, low: float, high: float, deviations: list[float], named: str, proposed: str
) -> None:
    data = _dataset(name, low, high, deviations)
    assert channel_schemes(data, propose=False)[0].scheme == named
    (found,) = channel_schemes(data, propose=True)
    assert found.scheme == proposed
    assert bool(found.remark) is (named != proposed or (name == "CT" and low == 0))


def test_the_remark_says_what_was_taken_and_why() -> None:
    data = _dataset("CT", 0, 900, [20, 90])
    remark = 'channel "CT": its values are no Hounsfield units (0 to 900) and the deviations of its cases differ by a '
    remark += "factor of 3.1; it is normalised as "
    assert channel_schemes(data, propose=True)[0].remark == remark + "zscore, as its values say"
    says = "ct, as its name says; its values would ask for zscore"
    assert channel_schemes(data, propose=False)[0].remark == remark + says


def test_air_in_most_images_is_enough() -> None:
    cases = [
        case((9, 9, 9), (1, 1, 1), channels=[ChannelIntensities(min=low, max=900, foreground_mean=1, foreground_std=9)])
        for low in (-1000, -1024, -2000, -1024, -20)
    ]
    assert channel_schemes(fingerprint(cases), propose=True)[0].scheme == "ct"
    assert channel_schemes(fingerprint(cases[2:]), propose=True)[0].scheme == "zscore"


def test_without_measured_values_the_name_decides() -> None:
    assert channel_schemes(fingerprint([case((9, 9, 9), (1, 1, 1))]), propose=True) == (ChannelScheme("zscore"),)


def test_masks_and_statistics() -> None:
    masked = _dataset("T1", 0, 9, [1, 1], relative_size=0.74)
    (normalization,) = normalization_of([ChannelScheme("zscore")], masked)
    assert (normalization.use_mask, normalization.statistics) == (True, None)
    (normalization,) = normalization_of([ChannelScheme("ct")], masked)
    assert (normalization.use_mask, normalization.statistics) == (False, STATISTICS)
    whole = _dataset("T1", 0, 9, [1, 1], relative_size=0.75)
    assert not normalization_of([ChannelScheme("zscore")], whole)[0].use_mask
