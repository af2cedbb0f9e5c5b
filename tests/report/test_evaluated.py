"""The page of an evaluation: its scores, and pictures of label files with or without their images."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from segfit.cli.main import run
from segfit.dataset.manifest import Case
from segfit.evaluation.evaluate import evaluate_folder
from segfit.labels import LabelScheme
from segfit.report.evaluated import write_evaluation

_LABELS = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
_SHAPE = (12, 10, 8)  # x, y, z


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three cases, whose predictions are shifted by 0, 1 and 2 voxels."""
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MRI"},
                "labels": {"background": 0, "a": 1, "b": 2},
                "numTraining": 3,
                "file_ending": ".nii.gz",
            }
        )
    )
    (tmp_path / "cases.csv").write_text("case,site\none,north\ntwo,south\nthree,south\n")
    for folder in ("imagesTr", "labelsTr", "predictions"):
        (tmp_path / folder).mkdir()
    for shift, name in enumerate(("one", "two", "three")):
        labels = np.zeros(_SHAPE, np.uint8)
        labels[3:7, 3:7, 2:6] = 1
        labels[7:9, 3:7, 2:6] = 2
        grey = np.random.default_rng(shift).normal(100, 10, _SHAPE).astype(np.float32)
        arrays = {
            f"imagesTr/{name}_0000": grey,
            f"labelsTr/{name}": labels,
            f"predictions/{name}": np.roll(labels, shift, 0),
        }
        for place, array in arrays.items():
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 2.0, 1.0])), tmp_path / f"{place}.nii.gz")
    return tmp_path


def _shown(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="case-\d+">(.*?)</script>', page)
    return [json.loads(text) for text in found]


def _labels(facts: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(facts["labels"])), np.uint8).reshape(2, *facts["shape"])


def test_label_files_are_shown_with_and_without_images(folders: Path, tmp_path: Path) -> None:
    summary = evaluate_folder(folders / "predictions", folders / "labelsTr", _LABELS, ending=".nii.gz")
    cases = {
        name: Case(
            id=name,
            images=(folders / f"imagesTr/{name}_0000.nii.gz",),
            label=folders / f"labelsTr/{name}.nii.gz",
        )
        for name in ("one", "two", "three")
    }
    seen = {}
    for known in (cases, {}):
        write_evaluation(summary, tmp_path / "page.html", _LABELS, cases=known)
        seen[bool(known)] = _shown((tmp_path / "page.html").read_text(encoding="utf-8"))
    for shown in seen.values():
        assert [facts["case"] for facts in shown] == ["one", "two", "three"]
        reference, prediction = _labels(shown[2])
        assert np.array_equal(prediction, np.roll(reference, -2, 2))  # x runs from right to left
        assert shown[0]["canonical"]
    assert seen[True][0]["sheet"] != seen[False][0]["sheet"]
    assert [facts["labels"] for facts in seen[True]] == [facts["labels"] for facts in seen[False]]
    write_evaluation(summary, tmp_path / "page.html", _LABELS, images=False)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert _shown(page) == []
    assert "data:image" not in page


def test_probabilities_beside_label_files_are_shown(folders: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(0).random((3, *_SHAPE[::-1])).astype(np.float32)
    chance /= chance.sum(0)
    np.savez_compressed(folders / "predictions" / "one.npz", probabilities=chance)
    np.savez_compressed(folders / "predictions" / "two.npz", probabilities=chance[:, 1:])  # of something else
    summary = evaluate_folder(folders / "predictions", folders / "labelsTr", _LABELS, ending=".nii.gz")
    write_evaluation(summary, tmp_path / "page.html", _LABELS)
    first, *others = _shown((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert first["probability"]
    packed = np.frombuffer(gzip.decompress(base64.b64decode(first["labels"])), np.uint8).reshape(3, *first["shape"])
    expected = 255 * (1 - chance[0])[::-1, ::-1, ::-1]  # radiological order
    assert packed[2] == pytest.approx(expected, abs=0.51)
    assert not any(facts["probability"] for facts in others)


def test_empty_references_and_predictions_have_a_page_without_a_mean(tmp_path: Path) -> None:
    """Rightly empty ones have no Dice, in any case."""
    for folder in ("predictions", "references"):
        (tmp_path / folder).mkdir()
        for number in range(6):
            image = nibabel.Nifti1Image(np.zeros(_SHAPE, np.uint8), np.eye(4))
            nibabel.save(image, tmp_path / folder / f"{number}.nii.gz")
    summary = evaluate_folder(tmp_path / "predictions", tmp_path / "references", _LABELS, ending=".nii.gz")
    assert summary.mean_dice is None
    write_evaluation(summary, tmp_path / "page.html", _LABELS)
    assert len(_shown((tmp_path / "page.html").read_text(encoding="utf-8"))) > 0


def test_the_command_writes_a_page(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "out" / "scores.html"
    command = ["evaluate", str(folders), "-p", str(folders / "predictions"), "-r", str(folders / "labelsTr")]
    assert run([*command, "-o", str(page), "--by", "site", "--metrics", "surface"]) == 0
    text = page.read_text(encoding="utf-8")
    assert [facts["case"] for facts in _shown(text)] == ["one", "two", "three"]
    assert "<td>south</td>" in text
    assert "HD95 (mm)" in text
    assert run([*command, "-o", str(page), "--no-images"]) == 0
    assert _shown(page.read_text(encoding="utf-8")) == []
    capsys.readouterr()
    assert run([*command, "-o", str(page), "--observer", str(folders / "labelsTr"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["observer"]["sentence"] in page.read_text(encoding="utf-8")
    assert run([*command, "-o", str(page), "--format", "nnunet"]) == 2
    capsys.readouterr()
