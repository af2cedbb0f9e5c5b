"""What is odd about a dataset is said, with its consequence."""

from __future__ import annotations

from collections.abc import Sequence

from planning_fakes import case, fingerprint, scheme

from segfit.fingerprint.fingerprint import CaseFingerprint, ChannelIntensities
from segfit.labels import LabelScheme
from segfit.options import NormalizationScheme
from segfit.planning.notes import dataset_notes
from segfit.specs import Normalization

_MANY = 12


def _notes(
    cases: Sequence[CaseFingerprint], labels: LabelScheme, how: NormalizationScheme = "zscore"
) -> tuple[str, ...]:
    return dataset_notes(fingerprint(cases), labels, [Normalization(scheme=how)])


def test_nothing_odd_nothing_said() -> None:
    cases = [case((20, 50, 50), (1, 1, 1), voxels={0: 49_000, 1: 1000}) for _ in range(_MANY)]
    assert _notes(cases, scheme("liver")) == ()


def test_few_cases() -> None:
    (note,) = _notes([case((20, 50, 50), (1, 1, 1), voxels={1: 1000})] * 6, scheme("liver"))
    assert note.startswith("only 6 training cases: results differ much")


def test_labels_absent_rare_and_tiny() -> None:
    cases = [
        case((20, 100, 100), (1, 1, 1), name=f"c{i}", voxels={0: 1, 1: 1000, 2: 0, 3: 40 * (i < 2)})
        for i in range(_MANY)
    ]
    assert _notes(cases, scheme("liver", "tumour", "vessel")) == (
        'label "tumour" (2) occurs in no case: it cannot be learned',
        'label "vessel" (3) is absent in 10 of 12 cases: it is learned from the other 2 alone',
        'label "vessel" (3) is tiny, 40 voxels in the median case that has it: a few voxels decide its Dice, and a '
        "coarser spacing may lose it",
        'label "vessel" (3) is rare, 3e-05 of all voxels: it is seen mostly in the third of the patches that are '
        "forced to hold foreground, and needs longer training",
    )


def test_values_are_those_on_disk() -> None:
    cases = [case((20, 50, 50), (1, 1, 1), voxels={0: 49_000, 1: 1000, 2: 0}) for _ in range(_MANY)]
    labels = LabelScheme.from_declaration({"background": 0, "liver": 7, "tumour": 500})
    assert _notes(cases, labels) == ('label "tumour" (500) occurs in no case: it cannot be learned',)


def test_cases_without_foreground() -> None:
    cases = [case((20, 50, 50), (1, 1, 1), name=f"c{i}", voxels={0: 49_000, 1: 1000 * (i > 1)}) for i in range(_MANY)]
    (note,) = _notes(cases, scheme("liver"))
    assert note.startswith("2 of 12 cases have no foreground (c0 and c1): they teach background only")


def test_sizes_that_differ() -> None:
    cases = [case((20, 50, 50), (1 if i else 4, 1, 1), voxels={1: 1000}) for i in range(_MANY)]
    notes = _notes(cases, scheme("liver"))
    assert [note.partition(":")[0] for note in notes] == [
        "spacing along z varies from 1 to 4 mm between cases",
        "the extent along z varies from 20 to 80 mm between cases",
    ]


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
    assert _notes(cases, scheme("liver")) == ()  # z-scored: every case may have a scale of its own
    (note,) = _notes(cases, scheme("liver"), "ct")
    assert note.startswith('channel "MRI": the foreground of c12 is far from the usual 106 ± 4.45: look at it')
