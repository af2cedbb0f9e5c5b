"""What is odd about a dataset is said, with its consequence."""

from __future__ import annotations

from collections.abc import Sequence

from planning_fakes import case, fingerprint, scheme

from segfit.fingerprint.fingerprint import CaseFingerprint, ChannelIntensities
from segfit.labels import LabelScheme
from segfit.options import NormalizationScheme
from segfit.planning.data_warnings import data_warnings
from segfit.specs import Normalization

_MANY = 12


def _notes(
    cases: Sequence[CaseFingerprint], labels: LabelScheme, how: NormalizationScheme = "zscore"
) -> list[tuple[str, str]]:
    found = data_warnings(fingerprint(cases), labels, [Normalization(scheme=how)])
    assert not any(item.fatal for item in found)
    return [(item.code, item.problem) for item in found]


def test_nothing_odd_nothing_said() -> None:
    cases = [case((20, 50, 50), (1, 1, 1), voxels={0: 49_000, 1: 1000}) for _ in range(_MANY)]
    assert _notes(cases, scheme("liver")) == []


def test_few_cases() -> None:
    ((code, problem),) = _notes([case((20, 50, 50), (1, 1, 1), voxels={1: 1000})] * 6, scheme("liver"))
    assert code == "few_cases"
    assert "6" in problem


def test_labels_absent_rare_and_tiny() -> None:
    cases = [
        case((20, 100, 100), (1, 1, 1), name=f"c{i}", voxels={0: 1, 1: 1000, 2: 0, 3: 40 * (i < 2)})
        for i in range(_MANY)
    ]
    found = _notes(cases, scheme("liver", "tumour", "vessel"))
    assert [code for code, _ in found] == ["absent_label", "label_in_few_cases", "tiny_label", "rare_label"]
    said = ('"tumour" (2)', "10 of 12", "40 voxels", "3e-05")
    assert [part in problem for part, (_, problem) in zip(said, found, strict=True)] == [True] * 4
    assert all('"vessel" (3)' in problem for _, problem in found[1:])


def test_values_are_those_on_disk() -> None:
    cases = [case((20, 50, 50), (1, 1, 1), voxels={0: 49_000, 1: 1000, 2: 0}) for _ in range(_MANY)]
    labels = LabelScheme.from_declaration({"background": 0, "liver": 7, "tumour": 500})
    ((code, problem),) = _notes(cases, labels)
    assert code == "absent_label"
    assert '"tumour" (500)' in problem


def test_cases_without_foreground() -> None:
    cases = [case((20, 50, 50), (1, 1, 1), name=f"c{i}", voxels={0: 49_000, 1: 1000 * (i > 1)}) for i in range(_MANY)]
    ((code, problem),) = _notes(cases, scheme("liver"))
    assert code == "no_foreground"
    assert "2 of 12" in problem
    assert "c0 and c1" in problem


def test_sizes_that_differ() -> None:
    cases = [case((20, 50, 50), (1 if i else 4, 1, 1), voxels={1: 1000}) for i in range(_MANY)]
    found = dict(_notes(cases, scheme("liver")))
    assert list(found) == ["spacing_varies", "extent_varies"]
    assert "along z varies from 1 to 4 mm" in found["spacing_varies"]
    assert "along z varies from 20 to 80 mm" in found["extent_varies"]


def test_a_case_of_other_intensity() -> None:
    means = [100.0 + i for i in range(_MANY)] + [900.0]
    cases = [
        case(
            (20, 50, 50),
            (1, 1, 1),
            name=f"c{i}",
            voxels={1: 1000},
            channels=[ChannelIntensities(min=0, max=1000, foreground_mean=mean, foreground_std=10)],
        )
        for i, mean in enumerate(means)
    ]
    assert _notes(cases, scheme("liver")) == []  # z-scored: every case may have a scale of its own
    ((code, problem),) = _notes(cases, scheme("liver"), "ct")
    assert code == "odd_intensity"
    assert all(part in problem for part in ('"MRI"', "c12", "106 ± 4.45"))
