"""The benchmarks of economy, with small programs in the places of segfit's training and of nnU-Net."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import economy
import time_to_dice
from set_aside import part, set_aside

# Trains nothing; predicts the truth, less well with less time; evaluates in earnest.
_SEGFIT = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
verb, given = sys.argv[1], sys.argv[2:]
value = lambda name: given[given.index(name) + 1]
if verb == "run":
    if value("--time") == "1m":
        sys.exit("segfit: too short")
    run = Path(value("--out")) / "runs/2d/fold-0/key"
    run.mkdir(parents=True)
    (run / "training.json").write_text('{"steps": 7, "seconds": 1.5}')
    (run.parents[3] / "plan.json").write_text('{"configurations": {"2d": {"patch_size": [8, 8]}}}')
    print(json.dumps({"dice": {"cross-validation": {"mean": 0.5}}, "model": value("--time"), "verdict": "good"}))
elif verb == "predict":
    images, output = Path(value("-i")), Path(value("-o"))
    output.mkdir(parents=True)
    for label in images.with_name(images.name + "-labels").iterdir():
        array = np.array(Image.open(label))
        array[: {"2m": 5, "5m": 2}[value("--model")]] = 0
        Image.fromarray(array).save(output / label.name)
else:
    from segfit.cli.main import main
    main()
"""

_NNUNET = """#!{python}
import os, shutil, sys
from pathlib import Path
given = sys.argv[1:]
value = lambda name: given[given.index(name) + 1]
with Path(os.environ["nnUNet_results"], "calls").open("a") as calls:
    calls.write(" ".join([Path(sys.argv[0]).name, *given]) + "\\n")
if "train" in sys.argv[0]:
    print("Epoch time: 12.5 s")
elif "predict" in sys.argv[0]:
    images, output = Path(value("-i")), Path(value("-o"))
    shutil.copytree(images.with_name(images.name + "-labels"), output)
    for label in output.iterdir():
        from PIL import Image
        image = Image.open(label)
        image.paste(0, (0, 0, 16, 3))
        image.save(label)
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "Dataset203_Retina"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    label = np.zeros((16, 16), np.uint8)
    label[:8, 4:12] = 1
    for child in range(1, 11):
        for eye in "LR":
            Image.fromarray(100 * label + child).save(folder / "imagesTr" / f"Image_{child:02d}{eye}_0000.png")
            Image.fromarray(label).save(folder / "labelsTr" / f"Image_{child:02d}{eye}.png")
    declaration = {
        "channel_names": {"0": "red"},
        "labels": {"background": 0, "vessel": 1},
        "numTraining": 20,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(declaration))
    return folder.parent


@pytest.fixture
def segfit_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "segfit_stub.py"
    script.write_text(_SEGFIT)
    monkeypatch.setattr(economy, "SEGFIT", [sys.executable, str(script)])


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for verb in ("plan_and_preprocess", "train", "predict"):
        command = folder / f"nnUNetv2_{verb}"
        command.write_text(_NNUNET.format(python=sys.executable))
        command.chmod(0o755)
    return folder


def test_groups_stay_together_and_kinds_are_set_aside_in_proportion() -> None:
    eyes = [f"Image_{child:02d}{eye}" for child in range(10) for eye in "LR"]
    aside = set_aside(eyes, {})
    assert len(aside) == 6
    assert {name[:-1] + "L" for name in aside} | {name[:-1] + "R" for name in aside} == aside
    mice = [f"m{number}_{'WT' if number % 2 else 'UT'}" for number in range(20)]
    aside = set_aside(mice, {})
    assert sorted(name[-2:] for name in aside) == ["UT", "UT", "WT", "WT"]
    assert set_aside(mice[::-1], {}) == aside
    assert len(set_aside(mice, dict.fromkeys(mice[:10], "litter"))) >= 4


def test_a_table_is_parted_with_its_cases(data: Path, tmp_path: Path) -> None:
    source = data / "Dataset203_Retina"
    rows = [f"Image_{child:02d}{eye},child{child % 5},1.5\n" for child in range(1, 11) for eye in "LR"]
    (source / "cases.csv").write_text("".join(["case,group,pixel_mm\n", *rows]))
    parted = part(source, tmp_path / "work")
    header, *lines = (parted.dataset / "cases.csv").read_text().splitlines()
    assert header == "case,group,pixel_mm"
    assert len(lines) == len(list((parted.dataset / "labelsTr").iterdir())) == 8
    assert len({line.split(",")[1] for line in lines}) == 2
    names = {path.name.removesuffix(".png") for path in parted.labels.iterdir()}
    assert {line.split(",")[0] for line in (parted.images / "cases.csv").read_text().splitlines()[1:]} == names
    assert len(list(parted.images.glob("*.png"))) == len(names) == 12


@pytest.mark.usefixtures("segfit_stub")
def test_runs_are_recorded_once_and_compared(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    given = ["--results", str(results), "--data", str(data), "--work", str(tmp_path / "work"), "--sets", "retina"]
    economy.main([*given, "--minutes", "1,2,5", "--seeds", "0,1", "--label", "a", "--busy", "1"])
    lines = economy.recorded(results)
    assert [(line["minutes"], line["exit_code"]) for line in lines[:3]] == [(1, 1), (2, 0), (5, 0)]
    assert lines[0]["error"] == "segfit: too short"
    assert lines[1]["trained"][0] | {"patch": [8, 8], "steps": 7} == lines[1]["trained"][0]
    assert lines[1]["dice_per_class"] == {"vessel": pytest.approx(2 * 3 / (3 + 8))}
    assert (lines[1]["internal_dice"], lines[1]["verdict"], lines[1]["scored_cases"]) == (0.5, "good", 6)
    economy.main([*given, "--minutes", "1,2,5", "--seeds", "0,1", "--label", "a", "--busy", "1"])
    assert economy.recorded(results) == lines
    capsys.readouterr()

    economy.append(results, lines[1] | {"label": "b", "dice": lines[1]["dice"] + 0.1})
    economy.main(["--results", str(results), "--table"])
    printed = capsys.readouterr().out
    assert "| Retina | 0.545 | 0.857 |" in printed
    assert "| Retina | +0.100 |" in printed
    told = json.loads(printed.splitlines()[-1])
    assert told["difference"] == {"b, 1 busy": {"2": [0.1, None, 1]}}


@pytest.mark.usefixtures("segfit_stub")
def test_the_budget_that_reaches_the_reference(
    data: Path, nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.jsonl"
    given = ["--results", str(results), "--data", str(data), "--work", str(tmp_path / "work"), "--sets", "retina"]
    given += ["--nnunet", str(nnunet), "--reference-minutes", "2", "--minutes", "1,2,5"]
    time_to_dice.main(given)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["retina"]
    assert figures["reference_epochs"] == 10  # of 12.5 s
    assert figures["reference_dice"] == pytest.approx(2 * 5 / (5 + 8))
    assert [dice for _, _, dice in figures["segfit"]] == [None, pytest.approx(6 / 11), pytest.approx(12 / 14)]
    assert figures["segfit_minutes"] == 5
    calls = tmp_path / "work" / "reference" / "results" / "calls"
    called = calls.read_text().splitlines()
    assert [line.split()[0].removeprefix("nnUNetv2_") for line in called] == [
        "plan_and_preprocess", "train", "predict", "train", "predict",
    ]  # fmt: skip
    assert called[3] == "nnUNetv2_train 203 2d 0 -tr nnUNetTrainer_10epochs -device cpu"
    time_to_dice.main(given)
    assert calls.read_text().splitlines() == called
    lines = [line | {"processor": "another"} for line in economy.recorded(results)]
    results.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(SystemExit, match="another"):
        time_to_dice.main(given)


def test_the_nearest_training_of_the_reference() -> None:
    assert time_to_dice.nearest(2400, 1740, 120) == 1
    assert time_to_dice.nearest(2400, 280, 60) == 10
    assert time_to_dice.nearest(2400, 1, 0) == 250
