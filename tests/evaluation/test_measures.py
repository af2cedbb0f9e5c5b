"""Surfaces, objects and centre lines: closed forms, other ways to count, and masks that are empty."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from skimage.measure import label as label_components

from segfit.errors import InputError
from segfit.evaluation.measures import Measures, Sizes, measure
from segfit.evaluation.metrics import case_metrics
from segfit.evaluation.objects import object_measures
from segfit.evaluation.surfaces import surface_measures
from segfit.labels import LabelScheme

ONE = LabelScheme.from_declaration({"background": 0, "a": 1})
IGNORE = LabelScheme.from_declaration({"background": 0, "a": 1, "ignore": 2})
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
ALL = ("surface", "centreline", "objects")
_SPACINGS = st.sampled_from((0.5, 1.0, 1.7, 3.0))


def measured(
    prediction: np.ndarray, reference: np.ndarray, scheme: LabelScheme = ONE, name: str = "a", **asked: Any
) -> dict[str, float | None]:
    sizes = asked.pop("sizes", Sizes(spacing=(1.0,) * prediction.ndim))
    metrics = case_metrics(prediction, reference, scheme)
    return measure(prediction, reference, scheme, metrics, sizes, Measures.asked(**asked))[name].measures


def ball(radius_mm: float, spacing: tuple[float, ...], offset_mm: float = 0.0) -> np.ndarray:
    axes = [np.arange(math.floor(-26 / size), math.ceil(26 / size) + 1) * size for size in spacing]
    squares = [axis**2 for axis in axes[:-1]] + [(axes[-1] - offset_mm) ** 2]
    return sum(np.ix_(*squares)) <= radius_mm**2  # type: ignore[no-any-return]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.8, 1.2), (0.7, 0.7), (1.0, 2.0)])
def test_concentric_balls_are_the_difference_of_their_radii_apart(spacing: tuple[float, ...]) -> None:
    inner, outer = ball(16.0, spacing), ball(22.0, spacing)
    found = surface_measures(inner, outer, spacing, 1.0)
    voxel = math.hypot(*spacing)
    assert found["average_surface_distance"] == pytest.approx(6.0, abs=voxel / 2)  # corners lie beside the surface
    assert found["hd95"] == pytest.approx(6.0, abs=voxel)
    assert found["surface_dice"] == 0.0
    assert surface_measures(inner, outer, spacing, 6.0 + voxel)["surface_dice"] == 1.0


def test_slabs_of_anisotropic_voxels() -> None:
    """Plates of 40 x 40 voxels whose faces lie one (4 mm) and three slices (12 mm) apart.

    Within 4 mm lie: the near faces; of the reference's far face what is as near to the rim of the other; its rim;
    that of the prediction up to one slice above the reference, and half of one more, the share of a corner.
    """
    reference, prediction = np.zeros((12, 40, 40), bool), np.zeros((12, 40, 40), bool)
    reference[2:6], prediction[3:9] = True, True
    spacing = (4.0, 1.0, 1.0)
    found = surface_measures(prediction, reference, spacing, 4.0)
    top, band, rim = 40 * 40, 40 * 40 - 32 * 32, 160
    assert found["hd95"] == 12.0
    share = found["surface_dice"]
    assert share is not None
    assert share == pytest.approx((2 * top + band + rim * (16 + 18)) / (4 * top + rim * (16 + 24)), abs=0.01)
    assert surface_measures(prediction, reference, spacing, 12.0)["surface_dice"] == 1.0


def test_the_larger_of_the_two_directed_distances_counts() -> None:
    """A far stray is no distance from the reference, but the reference's from it: directed ones differ."""
    reference = np.zeros((60, 20), bool)
    reference[2:12, 5:15] = True
    prediction = reference.copy()
    prediction[50:56, 5:15] = True
    for one, other in ((prediction, reference), (reference, prediction)):
        hd95 = surface_measures(one, other, (1.0, 1.0), 1.0)["hd95"]
        assert hd95 is not None
        assert hd95 > 40


def brute_force(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float], tolerance: float) -> Any:
    """The outline as chords between midpoints of pixel edges, each corner's distance to all others, in 2D."""
    sides = []
    for mask in (prediction, reference):
        padded = np.pad(mask, 1)
        points, lengths = [], []
        for y in range(padded.shape[0] - 1):
            for x in range(padded.shape[1] - 1):
                (a, b), (c, d) = padded[y : y + 2, x : x + 2]
                inside = sum(map(int, (a, b, c, d)))
                if inside in (0, 4):
                    continue
                slant = math.hypot(*spacing) / 2
                straight = spacing[1] if a == b else spacing[0]
                lengths.append(slant if inside in (1, 3) else 2 * slant if a == d else straight)
                points.append((y * spacing[0], x * spacing[1]))
        sides.append((np.array(points), np.array(lengths)))
    (ours, own), (theirs, other) = sides
    apart = cdist(ours, theirs)
    directed = [(apart.min(1), own), (apart.min(0), other)]
    total = own.sum() + other.sum()
    near = sum(size[distance <= tolerance + 1e-6].sum() for distance, size in directed)
    percentiles = []
    for distance, size in directed:
        far = [value for value in sorted(set(distance)) if size[distance <= value].sum() >= 0.95 * size.sum() - 1e-9]
        percentiles.append(far[0])
    return near / total, max(percentiles), sum(distance @ size for distance, size in directed) / total


@given(
    masks=st.tuples(arrays(bool, (6, 7)), arrays(bool, (6, 7))).filter(lambda pair: pair[0].any() and pair[1].any()),
    spacing=st.tuples(_SPACINGS, _SPACINGS),
    tolerance=st.sampled_from((0.6, 1.1, 2.3)),
)
def test_agrees_with_all_distances_one_by_one(
    masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float], tolerance: float
) -> None:
    dice, hd95, average = brute_force(*masks, spacing, tolerance)
    found = surface_measures(*masks, spacing, tolerance)
    assert found["surface_dice"] == pytest.approx(dice)
    assert found["average_surface_distance"] == pytest.approx(average, rel=1e-5)
    assert found["hd95"] == pytest.approx(hd95, rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of that library
@given(
    masks=st.tuples(arrays(bool, (4, 5, 6)), arrays(bool, (4, 5, 6))).filter(
        lambda pair: pair[0].any() and pair[1].any()
    ),
    spacing=st.tuples(_SPACINGS, _SPACINGS, _SPACINGS),
)
def test_agrees_with_deepminds_library(
    masks: tuple[np.ndarray, np.ndarray], spacing: tuple[float, float, float]
) -> None:
    import surface_distance as theirs

    prediction, reference = masks
    apart = theirs.compute_surface_distances(reference, prediction, spacing)
    found = surface_measures(prediction, reference, spacing, 1.05)
    assert found["surface_dice"] == pytest.approx(theirs.compute_surface_dice_at_tolerance(apart, 1.05))
    assert found["hd95"] == pytest.approx(theirs.compute_robust_hausdorff(apart, 95), rel=1e-5)
    sizes = [apart[f"surfel_areas_{name}"] for name in ("gt", "pred")]
    averages = theirs.compute_average_surface_distance(apart)
    mean = sum(one * size.sum() for one, size in zip(averages, sizes, strict=True)) / sum(s.sum() for s in sizes)
    assert found["average_surface_distance"] == pytest.approx(mean, rel=1e-5)


@given(masks=st.tuples(arrays(bool, (5, 6)), arrays(bool, (5, 6))).filter(lambda p: p[0].any() and p[1].any()))
def test_surfaces_are_symmetric_and_those_of_a_mask_and_itself_are_one(masks: tuple[np.ndarray, np.ndarray]) -> None:
    one, other = masks
    assert surface_measures(one, one, (2.0, 1.0), 0.5) == {
        "surface_dice": 1.0, "hd95": 0.0, "average_surface_distance": 0.0,
    }  # fmt: skip
    first, second = surface_measures(one, other, (2.0, 1.0), 1.0), surface_measures(other, one, (2.0, 1.0), 1.0)
    assert first == pytest.approx(second)


def test_threads_change_nothing() -> None:
    one, other = np.random.default_rng(3).random((2, 30, 31, 32)) < 0.01
    alone = surface_measures(one, other, (2.0, 1.0, 0.5), 1.0)
    assert surface_measures(one, other, (2.0, 1.0, 0.5), 1.0, threads=3) == alone


def test_cropping_changes_nothing() -> None:
    small = np.random.default_rng(0).integers(0, 2, (2, 6, 7, 8)).astype(np.uint8)
    large = np.pad(small, ((0, 0), (9, 4), (3, 8), (2, 2)))
    expected = surface_measures(small[0] == 1, small[1] == 1, (3.0, 1.0, 1.0), 1.0)
    found = measured(large[0], large[1], kinds=("surface",), sizes=Sizes(spacing=(3.0, 1.0, 1.0)))
    assert {name: found[name] for name in expected} == expected


def test_empty_masks() -> None:
    empty, some = np.zeros((4, 6, 8), np.uint8), np.zeros((4, 6, 8), np.uint8)
    some[1:3, 2:4, 2:4] = 1
    sizes = Sizes(spacing=(3.0, 1.0, 1.0))
    nothing = measured(empty, empty, kinds=ALL, sizes=sizes)
    assert nothing.pop("false_objects") == 0.0
    assert set(nothing.values()) == {None}
    assert len(nothing) == 9
    diagonal = math.hypot(12, 6, 8)
    far = {"hd95": diagonal, "average_surface_distance": diagonal, "surface_dice": 0.0, "centreline_dice": 0.0}
    missed = {"precision": None, "recall": 0.0, "volume_error": -1.0, "object_sensitivity": 0.0, "false_objects": 0.0}
    assert measured(empty, some, kinds=ALL, sizes=sizes) == far | missed | {"panoptic_quality": 0.0}
    false = {
        "precision": 0.0, "recall": None, "volume_error": None, "object_sensitivity": None, "false_objects": 1.0,
    }  # fmt: skip
    assert measured(some, empty, kinds=ALL, sizes=sizes) == far | false | {"panoptic_quality": 0.0}


def test_what_is_ignored_counts_in_no_mask() -> None:
    """The prediction is wrong where nobody knows, and its surface there is no surface."""
    reference, prediction = np.zeros((20, 30), np.uint8), np.zeros((20, 30), np.uint8)
    reference[5:15, 5:15], prediction[5:15, 5:28] = 1, 1
    plain = measured(prediction, reference, kinds=("surface", "objects"))
    reference[:, 15:] = 2
    found = measured(prediction, reference, IGNORE, kinds=("surface", "objects"))
    assert plain["surface_dice"] != 1.0
    assert (found["surface_dice"], found["hd95"], found["average_surface_distance"]) == (1.0, 0.0, 0.0)
    assert (found["precision"], found["recall"], found["panoptic_quality"]) == (1.0, 1.0, 1.0)
    # a border that is wrong beside the ignored part still counts
    prediction[5:15, 5:9] = 0
    assert measured(prediction, reference, IGNORE, kinds=("surface",))["hd95"] == 4.0


def test_where_no_surface_counts_there_is_no_distance() -> None:
    reference, prediction = np.full((5, 5), 2, np.uint8), np.zeros((5, 5), np.uint8)
    reference[2, 2] = prediction[2, 2] = 1
    found = measured(prediction, reference, IGNORE, kinds=("surface",))
    assert (found["surface_dice"], found["hd95"]) == (None, None)


def test_a_region_is_the_union_of_its_labels() -> None:
    reference = np.zeros((9, 9), np.uint8)
    reference[2:7, 2:7] = 1
    prediction = reference.copy()
    reference[3:5, 3:5] = prediction[4:6, 4:6] = 2
    asked: dict[str, Any] = {"kinds": ("surface", "objects")}
    assert measured(prediction, reference, REGIONS, "whole", **asked)["hd95"] == 0.0
    assert measured(prediction, reference, REGIONS, "core", **asked)["hd95"] == pytest.approx(math.sqrt(2))


def test_the_tolerance_is_a_millimetre_or_two_pixels_unless_set() -> None:
    reference, prediction = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    reference[5:15, 5:15], prediction[5:15, 7:17] = 1, 1
    unknown, known = Sizes(spacing=(1.0, 1.0), known=False), Sizes(spacing=(1.0, 1.0))
    assert measured(prediction, reference, kinds=("surface",), sizes=unknown)["surface_dice"] == 1.0
    found = measured(prediction, reference, kinds=("surface",), sizes=known)["surface_dice"]
    assert found is not None
    assert found < 0.8
    assert measured(prediction, reference, kinds=("surface",), sizes=known, tolerance=2)["surface_dice"] == 1.0


def test_a_volume_of_one_slice_is_a_picture() -> None:
    masks = np.random.default_rng(1).integers(0, 2, (2, 1, 9, 8)).astype(np.uint8)
    flat = measured(masks[0, 0], masks[1, 0], kinds=ALL, sizes=Sizes(spacing=(0.5, 0.7)))
    assert measured(masks[0], masks[1], kinds=ALL, sizes=Sizes(spacing=(5.0, 0.5, 0.7))) == flat


def test_objects_by_hand() -> None:
    reference, prediction = np.zeros((10, 30), bool), np.zeros((10, 30), bool)
    for mask, places in ((reference, ((0, 4), (8, 12), (16, 20))), (prediction, ((0, 3), (10, 14), (25, 27)))):
        for low, high in places:
            mask[2:8, low:high] = True
    found = object_measures(prediction, reference, 0.5)  # IoUs 3/4, 1/3, none
    assert found == {
        "object_sensitivity": 1 / 3, "false_objects": 2.0, "panoptic_quality": pytest.approx(0.75 / 3),
    }  # fmt: skip
    assert object_measures(prediction, reference, 0.3)["object_sensitivity"] == 2 / 3
    assert object_measures(prediction, reference, 0.75)["object_sensitivity"] == 0.0  # above it, not at it


@given(masks=st.tuples(arrays(bool, (9, 9)), arrays(bool, (9, 9))))
def test_objects_agree_with_scikit_image_and_an_optimal_assignment(masks: tuple[np.ndarray, np.ndarray]) -> None:
    (found, expected), (num_found, num_expected) = zip(
        *(label_components(mask, connectivity=2, return_num=True) for mask in masks), strict=True
    )
    ious = np.zeros((num_expected, num_found))
    for row in range(num_expected):
        for column in range(num_found):
            one, other = expected == row + 1, found == column + 1
            ious[row, column] = (one & other).sum() / (one | other).sum()
    ious[ious <= 0.5] = 0
    matched = ious[linear_sum_assignment(-ious)]
    matched = matched[matched > 0]
    ours = object_measures(*masks, 0.5)
    assert ours["false_objects"] == num_found - len(matched)
    assert ours["object_sensitivity"] == (len(matched) / num_expected if num_expected else None)
    either = (num_found + num_expected) / 2
    assert ours["panoptic_quality"] == (pytest.approx(matched.sum() / either) if either else None)


def test_a_centre_line_is_found_however_thick_it_was_drawn() -> None:
    thin, thick, half = (np.zeros((11, 40), np.uint8) for _ in range(3))
    thin[5, 4:36], thick[4:7, 3:37], half[4:7, 3:20] = 1, 1, 1
    found = measured(thick, thin, kinds=("centreline",))
    assert found["centreline_dice"] == pytest.approx(1.0, abs=0.05)
    share = measured(half, thin, kinds=("centreline",))["centreline_dice"]
    assert share == pytest.approx(2 * 0.5 / 1.5, abs=0.05)
    assert case_metrics(thick, thin, ONE)["a"].dice < 0.5  # type: ignore[operator]


@pytest.mark.parametrize(
    "asked",
    [{"kinds": ("surfaces",)}, {"kinds": "surface"}, {"kinds": (), "tolerance": 0}, {"kinds": (), "matched_iou": 1}],
)
def test_what_cannot_be_measured_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Measures.asked(**asked)
