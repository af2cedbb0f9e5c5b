"""What is learned from validation predictions about the quality of new ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from segfit.evaluation.quality import QualityFit, Traits
from segfit.files import write_json
from segfit.project.out_of_fold import quality_of
from segfit.project.trainings import Validation
from segfit.project.validation import traits_path
from segfit.selection.select import Selection
from summaries import make_summary


def validation(folder: Path, name: str, soft: dict[str, float]) -> Validation:
    """What is looked at of the validation of a configuration, with the expected Dice of each case."""
    for case, value in soft.items():
        traits = Traits(soft_dice=value, step=0.3, size=100.0)
        write_json(traits_path(folder / name, case), {"a": traits.model_dump()})
    found = SimpleNamespace(training=SimpleNamespace(name=name), cases=tuple(soft), folder=folder / name)
    return cast("Validation", found)


def selection(*winner: str) -> Selection:
    return Selection(
        candidates=(), winner=winner, reason="", notes=(), steps=(), dice_before_steps=None, dice_after_steps=None,
        folds=(0,),
    )  # fmt: skip


def fit_of(found: dict[str, QualityFit], soft: float) -> float | None:
    return found["a"].predict("a", Traits(soft_dice=soft, step=0.3, size=100.0)).dice


def test_an_ensemble_is_known_by_the_mean_of_its_members(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = ({f"c{i}": float(value) for i, value in enumerate(rng.uniform(0.4, 0.9, 12))} for _ in range(2))
    mean = {case: (first[case] + second[case]) / 2 for case in first}
    summary = make_summary({case: {"a": value, "b": None} for case, value in mean.items()})
    validations = [validation(tmp_path, "x", first), validation(tmp_path, "y", second)]
    both = quality_of(validations, selection("x", "y"), summary, {})
    assert set(both) == {"a"}
    assert fit_of(both, 0.6) == pytest.approx(0.6, abs=1e-3)
    assert both["a"].margin.groups == 12
    assert both["a"].margin.factor_90 == pytest.approx(1.0, abs=0.01)
    alone = quality_of(validations, selection("x"), summary, {})
    assert (alone["a"].margin.factor_90 or 0) > 1.2


def test_without_traits_or_groups_nothing_is_known(tmp_path: Path) -> None:
    soft = {f"c{i}": 0.5 + i / 50 for i in range(12)}
    summary = make_summary({case: {"a": value} for case, value in soft.items()})
    one: Any = validation(tmp_path, "x", soft)
    assert quality_of([one], selection("x"), summary, dict.fromkeys(soft, "same")) == {}
    one.folder = tmp_path / "older"  # validated before there were any
    assert quality_of([one], selection("x"), summary, {}) == {}
