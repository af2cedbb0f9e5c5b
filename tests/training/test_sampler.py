"""Where patches are cut, how they are read, and reading ahead."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_fakes import SCHEME, MemoryCase, disc_cases

from segfit.augmentation.policy import apply, draw
from segfit.labels import LabelScheme
from segfit.specs import AugmentationSpec
from segfit.training.batch import Batch
from segfit.training.device_cases import DeviceCase, DeviceCases
from segfit.training.sampler import Batches, PatchSampler, corner_bounds, keep_in_memory, read_patch, stream

IGNORING = LabelScheme.from_declaration({"background": 0, "disc": 1, "ignore": 2})


def numbered_case(shape: tuple[int, ...], locations: dict[str, list[tuple[int, ...]]] | None = None) -> MemoryCase:
    """Every voxel's value is its number; the label is 1 where the number is odd."""
    numbers = np.arange(np.prod(shape)).reshape(shape)
    rows = {key: np.array(rows, np.int32).reshape(-1, len(shape)) for key, rows in (locations or {}).items()}
    return MemoryCase("numbered", numbers[None].astype(np.float32), (numbers % 2).astype(np.int16), rows)


def sampler(cases: list[MemoryCase], scheme: LabelScheme = SCHEME, **changes: object) -> PatchSampler:
    values: dict[str, object] = {
        "channels": 1,
        "sample_patch": (8, 8),
        "patch": (6, 6),
        "batch_size": 3,
        "foreground_share": 0.33,
        "seed": 5,
    }
    return PatchSampler(cases, scheme, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "lowest", "highest"),
    [(150, -39, -16), (90, -58, -57), (205, -39, 39), (300, -39, 134)],
)
def test_bounds_of_the_reference_for_205_cut_and_128_seen(size: int, lowest: int, highest: int) -> None:
    assert corner_bounds((size,), (205,), (128,)) == ((lowest,), (highest,))


@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 30))
def test_bounds_always_leave_a_place_and_cover_a_large_image(size: int, seen: int, more: int) -> None:
    (low,), (high,) = corner_bounds((size,), (seen + more,), (seen,))
    assert low <= high
    if size >= seen:  # the centre of the patch, what the network sees, can reach both ends
        assert low + more // 2 <= 0
        assert high + more // 2 + seen >= size


def test_bounds_of_the_slice_axis_are_all_slices() -> None:
    assert corner_bounds((7, 50, 50), (1, 20, 20), (1, 16, 16))[0][0] == 0
    assert corner_bounds((7, 50, 50), (1, 20, 20), (1, 16, 16))[1][0] == 6


def test_random_corners_take_every_value_between_the_bounds() -> None:
    cut = sampler([numbered_case((9, 12))], foreground_share=0.0)
    corners = {cut.draw(step, 0)[1] for step in range(900)}
    assert {c[0] for c in corners} == set(range(-1, 3))
    assert {c[1] for c in corners} == set(range(-1, 6))


def test_only_the_last_samples_are_forced_and_hold_their_voxel() -> None:
    case = numbered_case((40, 40), {"disc": [(11, 30)]})
    cut = sampler([case])
    assert {cut.draw(step, 2)[1] for step in range(20)} == {(11 - 4, 30 - 4)}
    assert len({cut.draw(step, 1)[1] for step in range(20)}) > 15


def test_probabilistic_samples_are_forced_each_for_itself() -> None:
    case = numbered_case((40, 40), {"disc": [(11, 30)]})
    cut = sampler([case], foreground_share=0.3, probabilistic=True)
    forced = [[cut.draw(step, sample)[1] == (7, 26) for step in range(1000)] for sample in range(3)]
    for sample in forced:
        assert sum(sample) == pytest.approx(300, abs=60)
    assert sum(map(all, zip(*forced, strict=True))) == pytest.approx(27, abs=20)
    never = sampler([case], foreground_share=0.0, probabilistic=True)
    assert len({never.draw(step, 2)[1] for step in range(20)}) > 15


def test_forced_corners_are_held_at_the_lower_bound_but_not_at_the_upper_one() -> None:
    low = sampler([numbered_case((40, 40), {"disc": [(0, 1)]})])
    high = sampler([numbered_case((40, 40), {"disc": [(39, 38)]})])
    assert low.draw(0, 2)[1] == (-1, -1)
    assert high.draw(0, 2)[1] == (35, 34)  # the highest random corner is 33


def test_forced_foreground_chooses_the_class_first_then_the_voxel() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2, "c": 3})
    case = numbered_case((60, 60), {"a": [(20, 20)], "b": [(30 + i % 5, 40) for i in range(500)], "c": []})
    cut = sampler([case], scheme, batch_size=1, foreground_share=1.0)
    from_a = sum(cut.draw(step, 0)[1] == (16, 16) for step in range(400))
    assert 150 < from_a < 250  # one of two classes with voxels, however few they are


def test_without_foreground_a_forced_sample_is_a_random_one() -> None:
    cut = sampler([numbered_case((40, 40), {"disc": []})], foreground_share=1.0)
    assert len({cut.draw(step, 0)[1] for step in range(30)}) > 20


def test_with_an_ignore_label_free_samples_come_from_annotated_voxels() -> None:
    case = numbered_case((40, 40), {"disc": [(20, 20)], "annotated": [(30, 10)]})
    cut = sampler([case], IGNORING)
    assert {cut.draw(step, 0)[1] for step in range(10)} == {(26, 6)}
    assert {cut.draw(step, 2)[1] for step in range(10)} == {(16, 16)}  # classes win over the annotated key
    only = sampler([numbered_case((40, 40), {"disc": [], "annotated": [(30, 10)]})], IGNORING)
    assert {only.draw(step, 2)[1] for step in range(10)} == {(26, 6)}
    nothing = sampler([numbered_case((40, 40), {"disc": [], "annotated": []})], IGNORING)
    assert len({nothing.draw(step, 0)[1] for step in range(30)}) > 20


def test_cases_are_drawn_by_their_weights() -> None:
    cases = [numbered_case((9, 12)) for _ in range(3)]
    cut = sampler(cases, foreground_share=0.0, weights=[1.0, 0.0, 3.0])
    drawn = [next(i for i, case in enumerate(cases) if case is cut.draw(step, 0)[0]) for step in range(2000)]
    assert drawn.count(1) == 0
    assert 0.7 < drawn.count(2) / len(drawn) < 0.8


@pytest.mark.parametrize("scale", [1e308, 2.0**-1060, 3e-5])
def test_weights_of_any_size_count_relative_to_each_other(scale: float) -> None:
    cases = [numbered_case((9, 12)) for _ in range(4)]

    def drawn(factor: float) -> list[int]:
        weights = [1.5 * factor, 0.0, 0.75 * factor, factor]
        cut = sampler(cases, foreground_share=0.0, weights=weights)
        return [next(i for i, case in enumerate(cases) if case is cut.draw(step, 0)[0]) for step in range(200)]

    assert drawn(scale) == drawn(1.0)
    assert set(drawn(scale)) == {0, 2, 3}


def test_cases_are_drawn_uniformly() -> None:
    cases = disc_cases(3)
    cut = sampler(cases, foreground_share=0.0)
    names = [cut.draw(step, 0)[0].id for step in range(600)]
    assert all(150 < names.count(case.id) < 250 for case in cases)


@given(st.tuples(st.integers(-8, 12), st.integers(-8, 12)))
def test_a_patch_is_the_padded_image(corner: tuple[int, int]) -> None:
    case = numbered_case((9, 7))
    image, labels = np.zeros((1, 8, 5), np.float32), np.full((8, 5), -1, np.int16)
    read_patch(case, corner, image, labels[None])
    window = tuple(slice(c + 20, c + 20 + n) for c, n in zip(corner, (8, 5), strict=True))
    assert (image[0] == np.pad(case.array[0], 20)[window]).all()
    assert (labels == np.pad(case.label, 20, constant_values=-1)[window]).all()


def test_labels_of_a_previous_stage_are_a_second_channel() -> None:
    case = numbered_case((9, 7))
    case.previous = case.label + 100
    for kept in (case, *keep_in_memory([case], channels=1, limit_gb=1)):
        batch = sampler([kept], previous_stage=True).batch(0)
        labels, previous = batch.labels.unbind(1)
        inside = labels >= 0
        assert batch.labels.shape[1] == 2
        assert (previous[inside] == labels[inside] + 100).all()
        assert (previous[~inside] == -1).all()
        assert (~inside).any()


def test_slices_of_a_volume_lose_their_axis() -> None:
    case = numbered_case((5, 12, 12), {"disc": [(3, 6, 6)]})
    batch = sampler([case], batch_size=2, foreground_share=0.5).batch(0)
    assert batch.image.shape == (2, 1, 8, 8)
    assert batch.labels.shape == (2, 1, 8, 8)
    assert batch.image.dtype == torch.float32
    assert batch.labels.dtype == torch.int16
    assert (batch.image[1, 0].numpy() == case.array[0, 3, 2:10, 2:10]).all()
    assert (batch.labels[1, 0].numpy() == case.label[3, 2:10, 2:10]).all()


def test_a_patch_depends_on_seed_step_and_sample_only() -> None:
    cases = disc_cases(3)
    first, other = sampler(cases), sampler(cases, seed=6)
    assert first.draw(7, 1) == sampler(cases).draw(7, 1)
    assert [first.draw(s, 0)[1] for s in range(9)] != [other.draw(s, 0)[1] for s in range(9)]
    assert [first.draw(s, 0)[1] for s in range(9)] != [first.draw(s, 1)[1] for s in range(9)]


KINDS = {
    "pictures": ((24, 20), (13, 16), (10, 9)),
    "volumes": ((9, 12, 11), (10, 12, 9), (7, 9, 6)),
    "slices": ((5, 24, 20), (13, 16), (10, 9)),
}


def augmented(batch: Batch, spec: AugmentationSpec, patch: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = draw(spec, patch, len(batch.image), 1, stream(5, "augmentation", batch.step))
    return apply(parameters, batch.image, batch.labels, batch.whole)


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_are_only_cropped_are_read_at_the_size_of_the_patch(kind: str, previous: bool) -> None:
    shape, cut, seen = KINDS[kind]
    cases = disc_cases(3, shape)
    for case in cases:
        case.previous = case.label + 1
    spec = AugmentationSpec(sample_patch=cut, mirror_axes=(0,))
    sizes = {"sample_patch": cut, "patch": seen, "batch_size": 4, "previous_stage": previous}
    whole, small = sampler(cases, **sizes), sampler(cases, **sizes, augmentation=spec)
    turned = 0
    for step in range(12):
        first, second = whole.batch(step), small.batch(step)
        assert first.image.shape[2:] == cut
        assert second.image.shape[2:] == seen
        assert second.whole is not None
        assert second.whole[0].shape[2:] == cut
        assert second.cases == first.cases
        turned += len(second.whole[0])
        (images, labels), (others, other_labels) = (augmented(one, spec, seen) for one in (first, second))
        assert torch.equal(labels, other_labels)
        torch.testing.assert_close(images, others, rtol=0, atol=1e-6)  # their place in memory decides the last bit
    assert 0 < turned < 48


@pytest.mark.parametrize("augmentation", [None, AugmentationSpec(sample_patch=(13, 16))])
@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_patches_cut_on_the_device_are_those_read(
    kind: str, previous: bool, augmentation: AugmentationSpec | None
) -> None:
    shape, cut, seen = KINDS[kind]
    cases = disc_cases(3, shape)
    for case in cases:
        case.previous = case.label + 1
    sizes = {"sample_patch": cut, "patch": seen, "previous_stage": previous, "augmentation": augmentation}
    plain = sampler(cases, **sizes)
    there = plain.on_device([DeviceCase(case, torch.device("cpu")) for case in cases], torch.device("cpu"))
    expected = [plain.batch(step) for step in range(10)]
    for case in cases:
        case.reads.clear()
    for batch in expected:
        own = there.batch(batch.step)
        assert own.cases == batch.cases
        for a, b in zip(parts(own), parts(batch), strict=True):
            assert torch.equal(a, b)
    assert [sorted(case.reads) for case in cases] == [["image", "labels"]] * 3


def parts(batch: Batch) -> list[torch.Tensor]:
    """Image and labels of all samples, only those that are looked at."""
    if batch.whole is None:
        return [batch.image, batch.labels]
    spec = AugmentationSpec(sample_patch=tuple(batch.whole[0].shape[2:]))
    return [*batch.whole, *augmented(batch, spec, tuple(batch.image.shape[2:]))]


@pytest.mark.parametrize(("free", "spared", "kept"), [(1.9, 0, False), (2.1, 0, True), (2.9, 1, False), (3.1, 1, True)])
def test_cases_go_to_a_gpu_when_all_fit_into_half_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, free: float, spared: int, kept: bool
) -> None:
    cases = disc_cases(2)
    plain = sampler(cases)
    size = 2 * 24 * 20 * (4 + 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * size), 100 * size))
    with Batches(plain) as batches:
        ours = DeviceCases(cases, plain, torch.device("cuda:0"), spared=spared * size)
        for _ in range(9):
            ours.after_step(batches)
            assert batches.sampler is plain
        for _ in range(3):
            ours.after_step(batches)
            assert (batches.sampler is not plain) == kept
        assert batches.sampler.draw(3, 1)[1] == plain.draw(3, 1)[1]
        assert ours.give_back() == kept
        assert batches.sampler is plain
        assert not ours.give_back()
        ours.after_step(batches)
        assert batches.sampler is plain  # for good
        on_a_processor = DeviceCases(cases, plain, torch.device("cpu"), spared=0)
        batches.sampler = plain
        for _ in range(20):
            on_a_processor.after_step(batches)
        assert batches.sampler is plain


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_yield_the_same_batches_in_the_same_order(threads: int) -> None:
    cases = disc_cases(3)
    with Batches(sampler(cases), start=4) as plain, Batches(sampler(cases), start=4, threads=threads) as ahead:
        for step in range(4, 12):
            a, b = next(plain), next(ahead)
            assert a.step == b.step == step
            assert torch.equal(a.image, b.image)
            assert torch.equal(a.labels, b.labels)


def test_batches_go_on_from_the_device_where_they_were() -> None:
    cases = disc_cases(3)
    plain = sampler(cases, augmentation=AugmentationSpec(sample_patch=(8, 8)))
    with Batches(plain) as expected, Batches(plain, threads=2) as batches:
        for step in range(12):
            if step == 3:
                there = [DeviceCase(case, torch.device("cpu")) for case in cases]
                batches.sampler = plain.on_device(there, torch.device("cpu"))
            a, b = next(expected), next(batches)
            assert a.step == b.step == step
            assert a.cases == b.cases
            for one, other in zip(parts(a), parts(b), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_while_reading_reaches_the_consumer_and_threads_end(threads: int) -> None:
    class Broken(MemoryCase):
        def image(self, region: tuple[slice, ...] | None = None) -> np.ndarray:
            raise OSError("chunk is damaged")

    case = disc_cases(1)[0]
    broken = Broken(case.id, case.array, case.label, case.locations)
    with (
        pytest.raises(OSError, match="chunk is damaged"),
        Batches(sampler([broken]), threads=threads) as batches,
    ):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("segfit-batches")]


def test_reading_ahead_is_bounded() -> None:
    case = disc_cases(1)[0]
    with Batches(sampler([case]), threads=1) as batches:
        next(batches)
    assert len(case.reads) <= 2 * 3 * 2  # two batches of three samples, image and labels each


def test_cases_that_fit_are_read_once_and_the_others_in_part() -> None:
    cases = disc_cases(3)
    size_gb = 24 * 20 * 6 / 2**30
    kept = keep_in_memory(cases, channels=1, limit_gb=2.5 * size_gb)
    plain, cached = sampler(cases), sampler(list(kept))  # type: ignore[arg-type]
    expected = [plain.batch(step) for step in range(20)]
    for case in cases:
        case.reads.clear()
    for step in range(20):
        batch = cached.batch(step)
        assert torch.equal(batch.image, expected[step].image)
        assert torch.equal(batch.labels, expected[step].labels)
    assert [len(case.reads) for case in cases[:2]] == [2, 2]
    assert len(cases[2].reads) > 10
