"""Label rules of the reference: what a declaration means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segfit.errors import InputError
from segfit.labels import LabelScheme

pytestmark = pytest.mark.golden("evaluation/label_rules.json")


def test_label_rules(golden: Path) -> None:
    rules = json.loads((golden / "evaluation" / "label_rules.json").read_text())
    assert rules
    for rule in rules:
        if "error" in rule:
            with pytest.raises(InputError):
                LabelScheme.from_declaration(rule["labels"], rule["regions_class_order"])
            continue
        scheme = LabelScheme.from_declaration(rule["labels"], rule["regions_class_order"])
        assert scheme.has_regions == rule["has_regions"]
        assert list(scheme.all_values) == rule["all_labels"]
        assert list(scheme.foreground_values) == rule["foreground_labels"]
        assert scheme.ignore_value == rule["ignore_label"]
        assert scheme.num_outputs == rule["num_segmentation_heads"]
        if rule["foreground_regions"] is not None:
            regions = [(r,) if isinstance(r, int) else tuple(r) for r in rule["foreground_regions"]]
            assert [target.values for target in scheme.classes] == regions
            assert list(scheme.region_order or ()) == rule["regions_class_order"]
