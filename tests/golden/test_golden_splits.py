"""Cross-validation folds of the reference, case by case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segfit.dataset.splits import fallback_split, nnunet_splits

pytestmark = pytest.mark.golden("schedule/splits.json")


def test_splits(golden: Path) -> None:
    sets = json.loads((golden / "schedule" / "splits.json").read_text())
    assert sets
    for entry in sets.values():
        assert nnunet_splits(entry["case_ids"]).to_nnunet() == entry["splits_final"]


def test_folds_that_no_file_lists(golden: Path) -> None:
    sets = json.loads((golden / "schedule" / "splits.json").read_text())
    for entry in sets.values():
        for fold, expected in entry["folds_not_in_file"].items():
            ours = fallback_split(entry["case_ids"], int(fold))
            assert list(ours.train) == expected["train"]
            assert list(ours.validation) == expected["val"]
