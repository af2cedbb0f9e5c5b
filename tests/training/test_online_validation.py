"""Validation during training: which cases, how often, and what Dice it tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_loop import FakeClock, spoil, train
from training_fakes import ALWAYS_VALIDATED, SCHEME, MemoryCase, disc_case, disc_cases, tiny_configuration, tiny_recipe

from segfit.evaluation.evaluate import evaluate
from segfit.evaluation.pairs import Pair
from segfit.inference.predictor import Predictor
from segfit.labels import LabelScheme
from segfit.networks.unet import build_network
from segfit.specs import AugmentationSpec, Configuration
from segfit.training.learner import Learner
from segfit.training.online_validation import TILE_STEP, CaseValidation, ValidationSchedule, tile_count, varied
from segfit.training.result import WEIGHTS

CPU = torch.device("cpu")
REGIONS = LabelScheme.from_declaration({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2])


def predicted(folder: Path, configuration: Configuration, labels: LabelScheme, case: MemoryCase) -> NDArray[Any]:
    network = build_network(configuration.network, deep_supervision=False)
    network.load_state_dict(load_file(folder / WEIGHTS))
    predictor = Predictor(configuration, labels, [network], (), CPU, TILE_STEP)
    return labels.to_labels(predictor.logits(case.image()).numpy())


def with_regions(cases: list[MemoryCase]) -> list[MemoryCase]:
    for case in cases:
        case.label[:3] = 3
        case.label[-2:] = -1
        case.label[10:12][case.label[10:12] == 1] = 2
        case.locations = {"whole": case.locations["disc"], "annotated": np.argwhere(case.label < 3).astype(np.int32)}
    return cases


@pytest.mark.parametrize(
    ("ndim", "shape", "labels"),
    [(2, (40, 36), SCHEME), (3, (20, 20, 18), SCHEME), (2, (9, 24, 20), SCHEME), (2, (40, 36), REGIONS)],
    ids=["2d", "3d", "slices", "regions with ignore"],
)
def test_the_dice_is_that_of_the_evaluation_on_whole_cases(
    tmp_path: Path, ndim: int, shape: tuple[int, ...], labels: LabelScheme
) -> None:
    cases = disc_cases(3, shape)
    cases = with_regions(cases) if labels is REGIONS else cases
    configuration = tiny_configuration(ndim, len(shape))
    recipe = tiny_recipe(
        momentum=0.9,
        weight_average=0.9,
        validation_share=ALWAYS_VALIDATED,
        augmentation=AugmentationSpec(sample_patch=(18,) * ndim),
    )
    result = train(
        tmp_path,
        cases=cases,
        cases_validation=cases,
        configuration=configuration,
        recipe=recipe,
        labels=labels,
        steps=30,
    )
    used = [case for case in cases if case.id in result.validation_cases]
    pairs = [
        Pair(
            case.id,
            lambda case=case: predicted(tmp_path, configuration, labels, case),  # type: ignore[misc]
            lambda case=case: np.maximum(case.label, 0),  # type: ignore[misc]
        )
        for case in used
    ]
    summary = evaluate(pairs, labels)
    assert result.curve[-1].step == 30
    assert result.curve[-1].dice == {name: mean.dice for name, mean in summary.mean.items()}
    assert result.dice == summary.mean_dice
    assert result.dice is not None


def test_a_case_that_cannot_be_predicted_is_left_out(tmp_path: Path) -> None:
    result = train(
        tmp_path, cases_validation=[spoil(disc_case("bad"))], recipe=tiny_recipe(validation_share=ALWAYS_VALIDATED)
    )
    assert result.curve[-1].dice == {"disc": None}
    assert result.dice is None


@pytest.mark.parametrize(
    ("allowance", "cost", "expected"),
    [
        (1000.0, 1.0, (20, 8)),  # the most of both
        (50.0, 1.0, (6, 8)),
        (30.0, 1.0, (5, 6)),  # fewer cases rather than less than five validations
        (4.5, 1.0, (4, 1)),
        (1.0, 1.0, (1, 1)),
    ],
)
def test_validations_take_their_share(allowance: float, cost: float, expected: tuple[int, int]) -> None:
    schedule = ValidationSchedule.within(allowance, {f"case{number}": cost for number in range(9)})
    assert (schedule.count, len(schedule.cases)) == expected
    assert schedule.count * schedule.seconds <= allowance


def planned(cases: list[MemoryCase], share: float, step_seconds: float, seconds: float) -> ValidationSchedule:
    recipe, configuration = tiny_recipe(validation_share=share), tiny_configuration()
    learner = Learner(configuration, recipe, SCHEME, CPU, seed=0)
    validation = CaseValidation(learner, configuration, recipe, SCHEME, cases)
    validation.plan(step_seconds, seconds)
    assert validation.schedule is not None
    return validation.schedule


def test_what_a_case_takes_is_measured_on_the_smallest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClock(monkeypatch)  # a prediction takes 20 ms, whatever its size
    small, large = disc_case("small", (16, 16)), disc_case("large", (160, 160))
    schedule = planned([small, large], 0.05, 0.05, 12.0)  # 0.6 s allowed
    assert schedule.cases == ("small",)  # 100 tiles of the large one would take 2 s
    assert schedule.count == 20
    assert schedule.seconds == pytest.approx(0.02, abs=1e-3)
    assert large.reads == []
    assert set(planned([small, large], 0.05, 0.05, 250.0).cases) == {"small", "large"}


def test_one_case_at_the_end_may_take_twice_the_share() -> None:
    case = disc_case("large", (160, 160))  # 100 tiles, two in a batch: a third of 50 steps
    assert planned([case], 0.05, 1.0, 1000 / 6) == ValidationSchedule(1, ("large",), pytest.approx(50 / 3))
    assert planned([case], 0.05, 1.0, 990 / 6) == ValidationSchedule()
    assert case.reads == []


def test_what_a_case_takes_of_memory_is_that_of_the_largest() -> None:
    configuration, recipe = tiny_configuration(), tiny_recipe()
    learner = Learner(configuration, recipe, SCHEME, CPU, seed=0)
    cases = [disc_case("small"), disc_case("large", (40, 36))]
    assert CaseValidation(learner, configuration, recipe, SCHEME, cases).most_bytes() == 40 * 36 * 4 * (1 + 2)
    assert CaseValidation(learner, configuration, recipe, SCHEME, []).most_bytes() == 0


def test_no_share_and_no_cases_mean_no_validation() -> None:
    assert planned(disc_cases(), 0.0, 0.05, 100.0) == ValidationSchedule()
    assert planned([], 0.05, 0.05, 100.0) == ValidationSchedule()


def test_validations_are_spread_evenly() -> None:
    schedule = ValidationSchedule(4, ("case",), 1.0)
    done, seen = 0, []
    for step in range(1, 101):
        if schedule.is_due(done, step / 100):
            done += 1
            seen.append(step)
    assert seen == [25, 50, 75, 100]


def test_structures_come_first_and_then_sizes() -> None:
    scheme = LabelScheme.from_declaration({"background": 0, "disc": 1, "rare": 2})
    cases = [disc_case(f"case{size}", (size, 16)) for size in range(10, 40)]
    cases[2].locations = {"rare": np.zeros((1, 2), np.int32)}
    chosen = [case.id for case in varied(cases, scheme)]
    assert chosen[:2] == ["case25", "case12"]
    assert len(chosen) == len(set(chosen)) == 8
    assert "case39" in chosen
    assert [case.id for case in varied(list(reversed(cases)), scheme)] == chosen
    assert varied([], scheme) == []


@pytest.mark.parametrize(
    ("shape", "patch", "tiles"), [((16, 16), (16, 16), 1), ((17, 40), (16, 16), 6), ((5, 10, 32), (16, 16), 10)]
)
def test_tiles_are_counted(shape: tuple[int, ...], patch: tuple[int, ...], tiles: int) -> None:
    assert tile_count(shape, patch) == tiles
