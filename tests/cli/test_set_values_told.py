"""Values set on the command line: told by every verb, contradictions refused with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from segfit.cli.main import run
from segfit.dataset.phantom import make_phantom


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "Dataset001_Volumes"
    return make_phantom(folder, cases=5, test_cases=1, shape=(12, 24, 24))


def _plan(dataset: Path, out: Path, *settings: str) -> list[str]:
    given = [part for setting in settings for part in ("--set", setting)]
    return ["plan", str(dataset), "--out", str(out), "--preset", "stock", *given]


def test_the_plan_says_what_was_set(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(_plan(dataset, tmp_path / "stock")) == 0
    assert "\nstock: yes\n" in capsys.readouterr().out
    settings = ("planning.kind=residual", "planning.2d.resample_image.order=1")
    assert run(_plan(dataset, tmp_path / "mine", *settings)) == 0
    out = capsys.readouterr().out
    assert "\nstock: no\n  - kind residual set by you instead of plain\n" in out
    assert "  - 2d: resample_image.order 1 set by you instead of 3\n" in out
    assert json.loads((tmp_path / "mine" / "plan.json").read_text())["stock"] is False
    assert run([*_plan(dataset, tmp_path / "mine", *settings), "--explain"]) == 0
    assert "\nstock: no\n" in capsys.readouterr().out
    assert run(["plan", "--compare", str(tmp_path / "stock"), str(tmp_path / "mine"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["3d_fullres.network.kind"] == ["plain", "residual"]
    assert "2d.resample_image" in rows
    assert "3d_fullres.resample_image" not in rows
    assert run(["report", str(dataset), "--out", str(tmp_path / "mine")]) == 0
    page = (tmp_path / "mine" / "report.html").read_text()
    assert "planning.2d.resample_image.order" in page
    assert "kind residual set by you instead of plain" in page
    assert "bound: set by you" in page


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("planning.nonsense=1", "known under planning: target_spacing_mm, patch_size, batch_size, kind"),
        ("planning.resample_image.order=7", "Input should be 0, 1 or 3, got 7"),
        ("planning.kind=transformer", "Input should be 'plain', 'residual' or 'mednext', got 'transformer'"),
        ("planning.3d_fullres.features=[8,16]", "planning.3d_fullres.features does not fit 3d_fullres"),
        ("planning.3d_lowres.batch_size=4", "planning.3d_lowres has values, but this plan has no configuration"),
    ],
)
def test_contradictions_exit_with_2(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert run(_plan(dataset, tmp_path / "p", setting)) == 2
    assert message in capsys.readouterr().err
