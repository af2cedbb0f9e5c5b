from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean

import nibabel as nib
import numpy as np
import pytest
from tiny_runs import SET, UNTRUSTED

from segfit.cli.main import run
from segfit.geometry import Grid
from segfit.images.formats import read_label, write_labels
from segfit.images.image import LabelMap
from segfit.selection.verdict import Verdict


def copy(dataset: Path, folder: Path) -> Path:
    return Path(shutil.copytree(dataset, folder / "Dataset009_Broken copy"))


def rewrite(path: Path, values: np.ndarray) -> None:
    image = nib.load(path)
    nib.save(nib.Nifti1Image(values, image.affine), path)  # type: ignore[no-untyped-call, attr-defined]


def test_help_is_fast_and_needs_no_torch() -> None:
    code = "import sys; from segfit.cli.main import run; run(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    verbs = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and line.split()]
    pipeline = ["run", "check", "fingerprint", "plan", "preprocess", "train", "select", "predict", "evaluate", "report"]
    assert [verb for verb in verbs if verb in pipeline] == pipeline


def test_planning_needs_no_torch(dataset: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from segfit.cli.main import run; sys.exit(run(sys.argv[1:]))"
    arguments = ["plan", str(dataset), "--out", str(tmp_path / "p"), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "3d_fullres" in json.loads(done.stdout)["configurations"]


@pytest.mark.parametrize("verb", ["run", "check", "plan", "train", "predict", "evaluate", "info", "demo", "doctor"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert "Usage: " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("segfit 0.")


def test_run_prints_scores_model_and_report(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", "--out", str(project)]) == UNTRUSTED
    out = capsys.readouterr().out
    assert "cross-validation (1 case)" in out
    assert "test (2 cases)" in out
    assert f"report: {project / 'report.html'}" in out


def test_stored_cases_are_verified(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(project), "--json"]) == 0
    total = len([path for path in (project / "cases").iterdir() if path.is_dir()])
    told = json.loads(capsys.readouterr().out)
    assert told == [
        {"what": "stored cases", "state": "good", "found": f"{total} of {total} passed the checksum"},
        {"what": "other results", "state": "good", "found": "all passed the checksum"},
    ]
    image = next((project / "cases").glob("*/image.b2nd"))
    content = bytearray(image.read_bytes())
    content[-100] ^= 4
    image.write_bytes(content)
    case = json.loads((image.parent / "case.json").read_text())["properties"]["case"]
    assert run(["verify", str(project), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(row["what"], row["state"]) for row in told] == [
        (f"case {case}", "damaged"),
        ("stored cases", "damaged"),
        ("other results", "good"),
    ]
    assert str(image.parent) in told[0]["found"]
    assert run(["preprocess", "--out", str(project), "--verify"]) == 1  # an older name
    assert f"{total - 1} of {total} passed the checksum" in capsys.readouterr().out
    assert run(["preprocess", "--out", str(project)]) == 0
    captured = capsys.readouterr()
    assert f"warning: {case}: its preprocessed arrays were damaged on disk" in captured.err
    assert run(["verify", str(project)]) == 0


def test_run_as_json(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", "--out", str(project), "--json"]) == UNTRUSTED
    told = json.loads(capsys.readouterr().out)
    assert set(told["dice"]["test"]) == {"organ", "lesion", "mean"}
    assert told["model"] == str(project / "model")
    assert told["verdict"]["level"] == "failed"
    assert told["verdict"]["headline"] == "failed, do not use this model"
    finding = told["verdict"]["findings"][0]
    assert finding["classes"] == ["organ", "lesion"]
    assert "4 steps were too few: run again with --steps 1000 (about " in finding["action"]


def test_the_verdict_is_told_everywhere(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(["run", "--out", str(project)])
    out = capsys.readouterr().out
    lines = out[out.index("verdict: ") : out.index("model:")].splitlines()
    assert lines[0] == "verdict: failed, do not use this model (1 remark in the report)"
    assert max(map(len, lines)) <= 80
    told = " ".join(line.strip() for line in lines[1:])
    assert "4 steps were too few: run again with --steps 1000" in told
    for path in (project / "report.html", project / "model" / "card.md"):
        text = path.read_text(encoding="utf-8")
        assert "failed, do not use this model" in text
        assert "4 steps were too few: run again with --steps 1000" in text
    assert "a wrong reference label" not in (project / "report.html").read_text(encoding="utf-8")
    assert run(["select", "--out", str(project)]) == 0
    assert lines[0] in capsys.readouterr().out
    monkeypatch.setattr("segfit.project.findings.judge", lambda _: Verdict(level="doubtful"))
    assert run(["run", "--out", str(project)]) == 0
    assert "verdict: doubtful, check this model before use\n" in capsys.readouterr().out


def test_exit_codes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "3 done but not to be trusted" in " ".join(capsys.readouterr().out.split())


def test_single_verbs_on_a_project(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("check", "fingerprint", "plan", "preprocess", "train", "select", "predict", "evaluate", "report"):
        assert run([verb, "--out", str(project)]) == 0, verb
    out = capsys.readouterr().out
    assert "no problem found: the dataset can be used" in out
    assert "3d_fullres is the only candidate" in out
    assert "mean Dice" in out


def test_plan_explains(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(dataset), "--out", str(tmp_path / "p"), "--preset", "stock"]
    assert run([*arguments, "--explain"]) == 0
    text = capsys.readouterr().out
    assert "every decision is nnU-Net's" in text
    assert "patch_size = " in text
    assert "  bound" in text
    assert run([*arguments, "--explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stock"] is True


def test_plans_are_compared(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for preset in ("stock", "resenc-m"):
        assert run(["plan", str(dataset), "--out", str(tmp_path / preset), "--preset", preset]) == 0
    capsys.readouterr()
    assert run(["plan", "--compare", str(tmp_path / "stock"), str(tmp_path / "resenc-m" / "plan.json"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["preset"] == ["stock", "resenc-m"]
    assert run(["plan", "--compare", str(tmp_path), str(tmp_path / "stock")]) == 2
    assert f"{tmp_path / 'plan.json'} is missing" in capsys.readouterr().err


def test_predict_a_folder_files_and_evaluate(
    project: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = dataset / "imagesTs"
    model = ["--model", str(project / "model"), "--device", "cpu"]
    assert run(["predict", *model, "-i", str(images), "-o", str(tmp_path / "all")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(path).name for path in written] == ["phantom_ts_000.nii.gz", "phantom_ts_001.nii.gz"]
    one = images / "phantom_ts_001_0000.nii.gz"
    assert run(["predict", *model, "-i", str(one), "-o", str(tmp_path / "one"), "--probabilities"]) == 0
    capsys.readouterr()
    assert run(["predict", *model, "-i", str(one), "-o", str(tmp_path / "one"), "--json"]) == 0
    assert "left_as_is" in [item["code"] for item in json.loads(capsys.readouterr().out)["warnings"]]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["phantom_ts_001.nii.gz", "phantom_ts_001.npz"]
    folder = str(tmp_path / "scan.zarr")  # a folder that is one image
    write_labels(
        Path(folder), LabelMap(np.arange(24, dtype=np.uint8).reshape(2, 3, 4), Grid((2, 3, 4), (1.0, 1.0, 1.0)))
    )
    assert run(["predict", *model, "-i", folder, "-o", str(tmp_path / "zarr")]) == 0
    assert [path.name for path in (tmp_path / "zarr").iterdir()] == ["scan.nii.gz"]
    both = [str(path) for path in sorted(images.glob("*.nii.gz"))]
    assert run(["predict", *model, "-o", str(tmp_path / "both"), "-i", *both]) == 0
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [Path(path).name for path in written]
    expected = nib.load(tmp_path / "all" / "phantom_ts_001.nii.gz").get_fdata()  # type: ignore[attr-defined]
    found = nib.load(tmp_path / "one" / "phantom_ts_001.nii.gz").get_fdata()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(found, expected)
    capsys.readouterr()
    arguments = ["-p", str(tmp_path / "all"), "-r", str(dataset / "labelsTs"), "-o", str(tmp_path / "scores.json")]
    assert run(["evaluate", str(dataset), *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "scores.json").read_text())
    before = json.loads((project / "predictions" / "summary.json").read_text())
    assert told["mean"] == before["mean"]
    assert [case["metrics"] for case in told["cases"]] == [case["metrics"] for case in before["cases"]]


def test_predictions_are_logged_and_compared(
    project: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, page = tmp_path / "log.jsonl", tmp_path / "drift.html"
    ask = ["predict", "--model", str(project / "model"), "--device", "cpu", "--no-mirror", "--log", str(log)]
    assert run([*ask, str(dataset / "imagesTs"), "-o", str(tmp_path / "first")]) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["phantom_ts_000", "phantom_ts_001"]
    assert len({line["model"] for line in lines}) == 1
    assert {fact["name"] for fact in lines[0]["facts"]} >= {"voxel_size", "extent", "level", "histogram"}
    assert str(tmp_path) not in log.read_text()
    assert lines[0]["quality"] == []  # five cases do not say how good a prediction is likely to be
    assert [one["kind"] for one in lines[0]["measurements"]] == ["volume"] * len(lines[0]["measurements"])
    capsys.readouterr()
    assert run(["drift", str(log)]) == 0
    assert "cannot be told from 2 cases" in capsys.readouterr().out
    image = nib.load(dataset / "imagesTs" / "phantom_ts_000_0000.nii.gz")  # type: ignore[attr-defined]
    voxels = image.get_fdata(dtype=np.float32)  # type: ignore[attr-defined]
    for name, factor, cases in (("usual", 1.0, 10), ("strange", 40.0, 12)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(cases):
            one = nib.Nifti1Image(voxels * factor + number / 100, image.affine)  # type: ignore[no-untyped-call, attr-defined]
            nib.save(one, folder / f"c{number:02}_0000.nii.gz")  # type: ignore[attr-defined]
        assert run([*ask, str(folder), "-o", str(tmp_path / f"{name}-labels")]) == 0
    capsys.readouterr()
    assert run(["drift", str(log), "--json", "-o", str(page)]) == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["cases"], told["damaged_lines"]) == ("moved", 24, 0)
    assert "width" in {one["name"] for one in told["shifts"] if one["moved"]}
    assert page.read_text().count("<svg") == len(told["shifts"])
    assert run(["drift", str(tmp_path / "nothing")]) == 2
    assert run(["drift", str(log), "-o", str(tmp_path / "x.png")]) == 2
    assert run([*ask[:-1], str(page), str(tmp_path / "strange"), "-o", str(tmp_path / "third")]) == 2
    assert not (tmp_path / "third").exists()


def test_predict_draws_overlays_and_says_what_looks_black(
    project: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = dataset / "imagesTs"
    ask = ["predict", "--model", str(project / "model"), "--device", "cpu", "--no-mirror", str(images)]
    assert run([*ask, "-o", str(tmp_path / "a")]) == 0
    assert "--overlays" not in capsys.readouterr().err  # viewers of NIfTI choose the grey values
    assert run([*ask, "-o", str(tmp_path / "b"), "--ending", ".tif"]) == 0
    out, err = capsys.readouterr()
    assert "--overlays" in err
    assert len(out.split()) == 2
    before = (tmp_path / "b" / "phantom_ts_000.tif").read_bytes()
    (tmp_path / "bad").mkdir()
    for path in images.iterdir():
        (tmp_path / "bad" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bad" / "broken_0000.nii.gz").write_bytes(b"")
    ask[-1] = str(tmp_path / "bad")
    assert run([*ask, "-o", str(tmp_path / "b"), "--ending", ".tif", "--overlays"]) == 2
    drawn = sorted(path.name for path in (tmp_path / "b" / "overlays").iterdir())
    assert drawn == ["phantom_ts_000.png", "phantom_ts_001.png"]  # of what was there, and beside what failed
    assert str(tmp_path / "b" / "overlays") in capsys.readouterr().err
    assert (tmp_path / "b" / "phantom_ts_000.tif").read_bytes() == before


def test_evaluate_measures_more_tells_groups_apart_and_compares(
    project: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = dataset / "labelsTr"
    named = [str(dataset), "-r", str(references)]
    for number, path in enumerate(sorted(references.glob("*.nii.gz"))):
        labels = read_label(path)
        for folder, moved in (("same", 0), ("moved", 1 + number % 2)):
            write_labels(tmp_path / folder / path.name, LabelMap(np.roll(labels.array[0], moved, 2), labels.grid))
    asked = ["-p", str(tmp_path / "moved"), "--metrics", "all", "--tolerance", "9", "--match-iou", "0.1", "--json"]
    assert run(["evaluate", *named, *asked]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measures"] == {"kinds": ["surface", "centreline", "objects"], "tolerance": 9.0, "matched_iou": 0.1}
    assert told["unit"] == "mm"
    assert told["mean"]["organ"]["measures"]["surface_dice"] == 1.0
    assert told["estimates"]["organ"]["hd95"]["cases"] == 5
    assert run(["evaluate", *named, "--compare", str(tmp_path / "moved"), str(tmp_path / "same"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["first"], told["second"], told["mean_dice"]["cases"]) == ("moved", "same", 5)
    assert told["mean_dice"]["high"] < 0
    people = ["-p", str(tmp_path / "moved"), "--observer", str(tmp_path / "same")]
    assert run(["evaluate", *named, *people, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["observer"]["mean_dice"] == told["mean_dice"]
    assert run(["evaluate", *named, *people]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the second observer is better than the model by ")
    for name in ("moved", "same"):
        assert run(["evaluate", *named, "-p", str(tmp_path / name), "-o", str(tmp_path / f"{name}.json")]) == 0
    capsys.readouterr()
    files = [str(tmp_path / f"{name}.json") for name in ("moved", "same")]
    assert run(["evaluate", "--compare", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert run(["evaluate", "--compare", *files]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == told["sentence"]
    assert (
        run(["evaluate", *named, "-p", str(tmp_path / "same"), "-o", str(tmp_path / "n.json"), "--format", "nnunet"])
        == 0
    )
    assert json.loads((tmp_path / "n.json").read_text())["foreground_mean"]["Dice"] == 1.0
    capsys.readouterr()
    assert run(["evaluate", str(project), "--metrics", "surface", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    kept = json.loads((project / "predictions" / "summary.json").read_text())
    assert told["mean"]["organ"]["dice"] == kept["mean"]["organ"]["dice"]
    assert "hd95" in told["mean"]["organ"]["measures"]
    assert "hd95" not in kept["mean"]["organ"]["measures"]


def test_info(project: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(project / "model")]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if " " in line.strip())
    assert {"organ", "lesion", "channels", "made", "networks", "cost", "licence", "authors"} <= rows.keys()
    assert rows["made"].startswith("from  ")
    assert run(["info", str(project), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "project"
    assert {row["stage"]: row["state"] for row in told["stages"]}["train"] == "done"
    scores = [json.loads((project / name).read_text()) for name in ("selection.json", "predictions/summary.json")]
    assert told["score"] == scores[0]["dice_after_steps"]
    assert told["test_score"] == pytest.approx(mean(one["dice"] for one in scores[1]["mean"].values()))
    assert told["trained"] == 1
    assert told["next_step"] == f"segfit predict --model {project / 'model'} IMAGES -o FOLDER"
    assert run(["info", str(project)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: {told['next_step']}"
    assert run(["info", str(dataset), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["training_cases"]) == ("dataset", 5)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--device", "cpu", "--json"]) == 0
    told = {row["what"]: row["state"] for row in json.loads(capsys.readouterr().out)}
    assert told["torch"] == told["training step"] == "good"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "give a dataset or a project"),
        (
            ["run", "DATASET", "--set", "planing.folds=0"],
            "unknown option 'planing.folds' (did you mean 'planning.folds'?)",
        ),
        (["run", "DATASET", "--set", "training.steps=many"], "option training.steps"),
        (["run", "DATASET", "--time", "soon"], "90 is 90 seconds), got 'soon'"),
        (["run", "DATASET", "--time", "2h30"], "got '2h30'"),
        (["run", "DATASET", "--time", "2h", "--steps", "5"], "not by both"),
        (["run", "DATASET", "--preset", "best"], "'best' is not one of 'auto', 'stock'"),
        (["plan", "DATASET", "--device", "cuda:7"], "cuda:7"),
        (["train", "DATASET", "--set", "planning.folds=9"], "planning.folds must be among 0 to 4"),
        (["report", "--out", "nowhere"], "is not a segfit project"),
        (["report", "--out", "nowhere", "--watch"], "is not a segfit project"),
        (["report", "--out", "nowhere", "--watch", "--full"], "--watch"),
        (["report", "--out", "nowhere", "--full", "--no-images"], "--no-images"),
        (["predict", "--model", "nowhere", "-i", "x"], "-o"),
        (["predict", "DATASET", "--overwrite", "--folds", "0"], "--model"),
        (["predict", "DATASET"], "train first: segfit run "),
        (["evaluate", "DATASET"], "train first: segfit run "),
        (["evaluate", "DATASET", "--format", "nnunet"], "--format is of the file"),
        (["evaluate", "DATASET", "-o", "scores.xlsx"], "ends in .json or .csv"),
        (["evaluate", "DATASET", "-p", "a", "-r", "b", "--metrics", "surfaces"], "did you mean 'surface'?"),
        (["evaluate", "DATASET", "--compare", ".", ".", "--by", "site"], "leave out -p, --by, --observer and -o"),
        (["evaluate", "DATASET", "--observer", "b"], "give both"),
        (["status", "DATASET"], "is not a segfit project"),
        (["verify", "DATASET"], "neither a model nor a project"),
        (["export", "DATASET", "--to", "dicom", "-o", "x"], "'dicom' is not"),
        (["import", "DATASET", "-o", "x"], "is not a model"),
        (["predict", "--model", "nowhere", "-i", ".", "-o", "y"], "nowhere does not exist"),
        (["info", "nowhere"], "nowhere does not exist"),
        (["frobnicate"], "No such command 'frobnicate'"),
        (["run", "--frobnicate"], "--frobnicate"),
    ],
)
def test_what_a_user_may_get_wrong(
    arguments: list[str],
    message: str,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([str(dataset) if part == "DATASET" else part for part in arguments]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert "Traceback" not in told.err
    assert not list(tmp_path.rglob("runs"))


def test_all_problems_of_a_dataset_in_one_table(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copy(dataset, tmp_path)
    images, labels = broken / "imagesTr", broken / "labelsTr"
    (labels / "phantom_tr_000.nii.gz").unlink()
    values = np.asarray(nib.load(labels / "phantom_tr_001.nii.gz").dataobj).astype(np.uint8)  # type: ignore[attr-defined]
    values.flat[0] = 7
    rewrite(labels / "phantom_tr_001.nii.gz", values)
    rewrite(labels / "phantom_tr_002.nii.gz", np.zeros((3, 4, 5), np.uint8))
    image = images / "phantom_tr_003_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:200])
    voxels = np.asarray(nib.load(images / "phantom_tr_004_0000.nii.gz").dataobj).astype(np.float32)  # type: ignore[attr-defined]
    voxels.flat[5] = np.nan
    rewrite(images / "phantom_tr_004_0000.nii.gz", voxels)
    out = tmp_path / "p"
    for verb in ("check", "run"):
        assert run([verb, str(broken), *([] if verb == "check" else ["--out", str(out), *SET])]) == 2
        told = capsys.readouterr()
        table = told.out if verb == "check" else told.err
        for number in range(5):
            assert any(f"phantom_tr_00{number}" in line and "error" in line for line in table.splitlines()), table
        assert "Traceback" not in told.err
    assert not out.exists()


def test_a_dataset_without_cases(tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "Dataset010_Empty"
    (empty / "imagesTr").mkdir(parents=True)
    (empty / "labelsTr").mkdir()
    shutil.copy(dataset / "dataset.json", empty)
    assert run(["run", str(empty), "--out", str(tmp_path / "p")]) == 2
    assert "imagesTr" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_truncated_image_does_not_stop_the_others(
    project: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(dataset / "imagesTs", images)
    (images / "phantom_ts_000_0000.nii.gz").write_bytes(gzip.compress(b"no image"))
    arguments = ["--model", str(project / "model"), "-i", str(images), "-o", str(tmp_path / "out"), "--device", "cpu"]
    assert run(["predict", *arguments]) == 2
    assert "phantom_ts_000" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["phantom_ts_001.nii.gz"]


def test_folds_can_be_chosen(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [f"phantom_tr_{number:03d}" for number in range(5)]
    folds = [{"train": cases[1:], "val": cases[:1]}, {"train": cases[:-1], "val": cases[-1:]}]
    (tmp_path / "my folds, new.json").write_text(json.dumps(folds))
    monkeypatch.chdir(tmp_path)
    assert run(["plan", str(dataset), "--out", "p", "--splits", "my folds, new.json"]) == 0
    kept = json.loads((tmp_path / "p" / "splits.json").read_text())
    assert kept["source"] == str(tmp_path / "my folds, new.json")
    assert [fold["validation"] for fold in kept["folds"]] == [cases[:1], cases[-1:]]
    assert run(["plan", "--out", "p", "--splits", "nnunet"]) == 0
    assert len(json.loads((tmp_path / "p" / "splits.json").read_text())["folds"]) == 5
    assert run(["plan", "--out", "p", "--splits", "nnunett"]) == 2
    assert "nnunett is none (did you mean 'nnunet'?)" in capsys.readouterr().err


def test_one_fold_can_be_trained(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [str(dataset), "--out", str(tmp_path / "p"), *SET, "--set", "planning.folds=0,1"]
    assert run(["train", *made, "--folds", "1", "--json"]) == 0
    assert [item["fold"] for item in json.loads(capsys.readouterr().out)] == [1]
    assert len(list((tmp_path / "p").glob("runs/*/fold-*/*/training.json"))) == 1
    assert run(["train", str(tmp_path / "p"), "--folds", "one"]) == 2
    assert run(["train", str(tmp_path / "p"), "--configurations", "3d"]) == 2


def test_labels_can_be_resampled(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copy(dataset, tmp_path)
    label = root / "labelsTr" / "phantom_tr_003.nii.gz"
    image = nib.load(label)
    moved = image.affine.copy()  # type: ignore[attr-defined]
    moved[0, 3] += 3 * moved[0, 0]
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), moved), label)  # type: ignore[no-untyped-call, attr-defined]
    assert run(["check", str(root)]) == 2
    assert "--resample-labels" in capsys.readouterr().out
    assert run(["check", str(root), "--resample-labels"]) == 0
    out = capsys.readouterr().out
    assert "0 errors, 1 warning: the dataset can be used" in out
    assert "phantom_tr_003" in out
    assert run(["plan", str(root), "--out", str(tmp_path / "p")]) == 2
    assert run(["plan", str(root), "--out", str(tmp_path / "p"), "--resample-labels"]) == 0
    assert run(["check", "--out", str(tmp_path / "p")]) == 0  # the project remembers
    assert run(["check", "--out", str(tmp_path / "p"), "--no-resample-labels"]) == 2


@pytest.mark.parametrize("verb", ["run", "check", "fingerprint", "plan", "preprocess", "train", "select"])
def test_every_verb_that_reads_labels_can_resample_them(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert "--resample-labels" in capsys.readouterr().out


def broken_pair(dataset: Path, folder: Path) -> Path:
    """Copy a dataset, one label missing and one image unreadable."""
    broken = copy(dataset, folder)
    (broken / "labelsTr" / "phantom_tr_000.nii.gz").unlink()
    (broken / "imagesTr" / "phantom_tr_003_0000.nii.gz").write_bytes(b"")
    return broken


def test_check_says_what_it_understood(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(dataset)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "nnU-Net v2 folder: 5 training cases, 2 test cases",
        "1 channel: MRI; labels (.nii.gz): organ = 1 and lesion = 2",
        "no problem found: the dataset can be used",
    ]
    pairs = tmp_path / "paired folders"
    for new, old in (("images", "imagesTs"), ("labels", "labelsTs")):
        shutil.copytree(dataset / old, pairs / new)
    assert run(["check", str(pairs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dataset"] == {
        "name": "paired folders",
        "layout": "paired",
        "channels": ["image"],
        "classes": {"label 1": [1], "label 2": [2]},
        "groups": {},
        "groups_from_names": False,
        "training_cases": 2,
        "test_cases": 0,
        "file_ending": ".nii.gz",
        "image_ending": ".nii.gz",
    }
    assert [item["problem"] for item in told["problems"]] == ["2 training cases, five folds need 5 or more"]
    assert run(["info", str(pairs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == {"label 1": [1], "label 2": [2]}


def test_skipping_is_offered_only_where_a_case_is_left(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = broken_pair(dataset, tmp_path)
    for label in (broken / "labelsTr").iterdir():
        label.write_bytes(b"damaged")
    assert run(["check", str(broken)]) == 2
    assert "--skip-incomplete" not in capsys.readouterr().out
    assert run(["check", str(broken), "--skip-incomplete"]) == 2


def test_incomplete_cases_can_be_skipped(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = broken_pair(dataset, tmp_path)
    assert run(["check", str(broken)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "2 errors, 0 warnings: the dataset cannot be used as it is",
        "--skip-incomplete leaves out the cases with errors",
    ]
    assert run(["check", str(broken), "--skip-incomplete"]) == 0
    out = capsys.readouterr().out
    assert "nnU-Net v2 folder: 3 training cases, 2 test cases" in out
    assert "left out: its label labelsTr/phantom_tr_000.nii.gz is missing" in out
    assert out.splitlines()[-1] == "0 errors, 2 warnings: the dataset can be used"
    project = tmp_path / "p"
    assert run(["fingerprint", str(broken), "--out", str(project), "--skip-incomplete", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [case["case"] for case in told["cases"]] == [f"phantom_tr_00{number}" for number in (1, 2, 4)]
    assert told["num_training"] == 3
    assert run(["check", "--out", str(project), "--json"]) == 0  # the project remembers it
    assert json.loads(capsys.readouterr().out)["dataset"]["training_cases"] == 3


def test_problems_stand_together(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = broken_pair(dataset, tmp_path)
    (broken / "imagesTr" / "phantom_tr_000_0000.nii.gz").write_bytes(b"")
    declared = json.loads((broken / "dataset.json").read_text())
    declared |= {"channel_names": {"1": "MRI"}}
    (broken / "dataset.json").write_text(json.dumps(declared))
    (broken / "labelsTr" / ".hidden").touch()
    assert run(["check", str(broken)]) == 2
    told = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert told == [["error", "dataset"], ["error", "phantom_tr_000"], ["warning", "dataset"]]
    declared |= {"channel_names": {"0": "MRI"}}
    (broken / "dataset.json").write_text(json.dumps(declared))
    assert run(["check", str(broken)]) == 2
    told = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[3:-2]]
    assert told == [
        ["error", "phantom_tr_000"],
        ["error", "phantom_tr_000"],
        ["error", "phantom_tr_003"],
        ["warning", "dataset"],
    ]


@pytest.mark.parametrize("fault", ["another grid", "not a number", "undeclared"])
def test_export_writes_no_dataset_that_the_check_refuses(
    fault: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty, out = copy(dataset, tmp_path), tmp_path / "Dataset012_Copy"
    image, label = faulty / "imagesTr" / "phantom_tr_001_0000.nii.gz", faulty / "labelsTr" / "phantom_tr_001.nii.gz"
    values = np.asarray(nib.load(label).dataobj).astype(np.uint8)  # type: ignore[attr-defined]
    voxels = np.asarray(nib.load(image).dataobj).astype(np.float32)  # type: ignore[attr-defined]
    if fault == "another grid":
        rewrite(label, values[2:-2, 1:-1, 1:])
    elif fault == "not a number":
        rewrite(image, np.where(voxels < np.median(voxels), np.nan, voxels).astype(np.float32))
    else:
        rewrite(label, values * 100)
    to = ["--to", "nnunet", "-o", str(out)]
    assert run(["export", str(faulty), *to]) == 2
    assert "phantom_tr_001" in capsys.readouterr().err
    assert not out.exists()
    option = "--resample-labels" if fault == "another grid" else "--skip-incomplete"
    assert run(["export", str(faulty), *to, option]) == 0
    assert "phantom_tr_001" in capsys.readouterr().err  # a warning
    assert len(list((out / "labelsTr").iterdir())) == 4 + (fault == "another grid")
    assert run(["check", str(out)]) == 0


def test_folds_that_a_run_would_refuse_are_told_by_the_check(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faulty, project = copy(dataset, tmp_path), tmp_path / "p"
    folds = [{"train": ["phantom_tr_000"], "val": ["phantom_tr_001.nii.gz"]}]
    (faulty / "splits_final.json").write_text(json.dumps(folds))
    assert run(["check", str(faulty), "--json"]) == 2
    (problem,) = [item for item in json.loads(capsys.readouterr().out)["problems"] if item["fatal"]]
    assert problem["case"] == "dataset"
    assert problem["problem"].endswith("names the case 'phantom_tr_001.nii.gz', which is not in the dataset")
    assert problem["action"].endswith("without channel and ending: 'phantom_tr_001', or give --splits balanced")
    for verb in ("plan", "run"):
        assert run([verb, str(faulty), "--out", str(project)]) == 2
        assert "which is not in the dataset" in capsys.readouterr().err
    assert run(["fingerprint", str(faulty), "--out", str(project)]) == 0  # what folds have no part in
    assert run(["export", str(faulty), "--to", "nnunet", "-o", str(tmp_path / "Dataset012_Copy")]) == 0
    assert run(["check", str(project)]) == 2
    assert run(["plan", str(faulty), "--out", str(project), "--splits", "balanced"]) == 0
    assert run(["check", str(project)]) == 0
    (faulty / "splits_final.json").unlink()
    (faulty / "splits_final.json").symlink_to(tmp_path / "not fetched.json")
    capsys.readouterr()
    assert run(["check", str(faulty)]) == 2
    assert "splits_final.json" in capsys.readouterr().out


def test_export_for_nnunet(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, out = broken_pair(dataset, tmp_path), tmp_path / "Dataset012_Copy"
    to = ["--to", "nnunet", "-o", str(out)]
    assert run(["export", str(broken), *to]) == 2
    assert "its label labelsTr/phantom_tr_000.nii.gz is missing" in capsys.readouterr().err
    assert not out.exists()
    assert run(["export", str(broken), *to, "--skip-incomplete"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(path.name for path in (out / "labelsTr").iterdir()) == [
        f"phantom_tr_00{number}.nii.gz" for number in (1, 2, 4)
    ]
    assert run(["check", str(out)]) == 0
    project = tmp_path / "p"  # which remembers it
    assert run(["fingerprint", str(broken), "--out", str(project), "--skip-incomplete"]) == 0
    assert run(["export", str(project), "--to", "nnunet", "-o", str(tmp_path / "Dataset013_Copy")]) == 0
    assert len(list((tmp_path / "Dataset013_Copy" / "labelsTr").iterdir())) == 3
    capsys.readouterr()
    assert run(["export-nnunet", "--dataset", str(dataset), "--out", str(out)]) == 2  # an older name
    assert "exists already" in capsys.readouterr().err
