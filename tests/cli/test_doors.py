"""The doors of the shell: help, completion, one name for one thing, projects as datasets, nothing trained unasked."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from tiny_runs import SET, UNTRUSTED

from segfit.cli.common import LabelUseName, PresetName
from segfit.cli.main import app, run
from segfit.inference.model import Model, load_model
from segfit.options import LabelUse, Preset
from segfit.project import Project

PIPELINE = ["run", "check", "fingerprint", "plan", "preprocess", "train", "select", "predict", "evaluate", "report"]
PROJECTS = ["info", "status", "stop", "clean", "demo", "doctor"]
MODELS = ["import", "export", "verify"]
REPORTING = [*PIPELINE, *PROJECTS, *MODELS]


def options_of(verb: str) -> dict[str, tuple[str, ...]]:
    """Return the names of the options and the arguments of a verb, by parameter."""
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    return {item.name: tuple(item.opts) for item in command.params}


def test_the_verbs_stand_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-h"]) == 0
    groups: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            groups[line[:-1]] = []
        elif line.startswith("  ") and groups and line.split():
            groups[list(groups)[-1]].append(line.split()[0])
    assert groups["Pipeline"] == PIPELINE
    assert groups["Projects"] == PROJECTS
    assert groups["Models"][: len(MODELS)] == MODELS


@pytest.mark.parametrize("verb", [*REPORTING, "export-nnunet"])
def test_every_verb_has_short_help(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run([verb, "-h"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Usage: segfit {verb} ")
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("verb", REPORTING)
def test_what_reports_has_json(verb: str) -> None:
    assert ("--json",) in options_of(verb).values()


@pytest.mark.parametrize("verb", [*REPORTING])
def test_one_name_for_one_thing(verb: str) -> None:
    options = options_of(verb)
    if verb in PIPELINE or verb == "status":
        assert options["out"] == ("--out",)
        assert not any(name.startswith("-") for name in options.get("dataset", options.get("paths", ("-",))))
    if "output" in options:
        assert set(options["output"]) == {"--output", "-o"}


def test_choices_are_shown_and_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert get_args(PresetName) == get_args(Preset)
    assert get_args(LabelUseName) == get_args(LabelUse)
    assert run(["plan", "-h"]) == 0
    told = capsys.readouterr().out
    assert "|".join(get_args(Preset)) in told
    assert "balanced|nnunet|FILE" in told


def complete(*words: str) -> list[str]:
    """Return what bash is offered for the last word."""
    environment = {
        "_SEGFIT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "segfit"], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_completion() -> None:
    assert complete("segfit", "pre") == ["preprocess", "predict"]
    assert complete("segfit", "plan", "--preset", "resenc-") == ["resenc-m", "resenc-l", "resenc-xl"]
    assert "export-nnunet" not in complete("segfit", "exp")


def test_predict_and_evaluate_train_nothing_unasked(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "segfit.project.train_and_validate.train_fold", lambda *_, **__: pytest.fail("a training was started")
    )
    out = tmp_path / "p"
    assert run(["plan", str(dataset), "--out", str(out), *SET]) == 0
    for verb in ("predict", "evaluate"):
        capsys.readouterr()
        assert run([verb, "--out", str(out)]) == 2
        told = capsys.readouterr()
        assert (told.out, f"segfit run {out}" in told.err) == ("", True)
        assert not (out / "runs").exists()
        assert run([verb, str(dataset), "--out", str(tmp_path / "none")]) == 2
        assert not (tmp_path / "none").exists()


def test_other_options_are_not_trained_by_predict(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Project.open(project).options
    try:
        assert run(["plan", str(project), "--set", "seed=7"]) == 0
        assert run(["predict", str(project)]) == 2
    finally:
        assert run(["plan", str(project), "--set", f"seed={before.seed}"]) == 0
    assert run(["predict", str(project)]) == 0


def test_a_project_is_understood_where_a_dataset_is_expected(
    project: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", str(project), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dataset"]["name"] == dataset.name
    assert run(["run", str(project), "--out", str(project), "--json"]) == UNTRUSTED
    assert json.loads(capsys.readouterr().out)["model"] == str(project / "model")
    assert run(["run", str(project), "--out", str(tmp_path / "other")]) == 2
    assert f"{project} is a project already" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    scores = ["-p", str(project / "predictions"), "-r", str(dataset / "labelsTs"), "--json"]
    assert run(["evaluate", str(project), *scores]) == 0
    assert len(json.loads(capsys.readouterr().out)["cases"]) == 2
    assert run(["export", str(project), "--to", "nnunet", "-o", str(tmp_path / "Dataset012_Copy"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "Dataset012_Copy"), "to": "nnunet"}
    assert len(list((tmp_path / "Dataset012_Copy" / "labelsTr").iterdir())) == 5


def test_status(project: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", str(project), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["stage"] for row in told["stages"]] == PIPELINE[1:]
    assert {row["state"] for row in told["stages"]} == {"done"}
    assert next(row["detail"] for row in told["stages"] if row["stage"] == "predict") == "2 label files"
    assert (told["dataset"], told["verdict"]) == (str(dataset), "failed")
    assert told["model"] == str(project / "model")
    assert run(["plan", str(dataset), "--out", str(tmp_path / "p")]) == 0
    capsys.readouterr()
    assert run(["status", "--out", str(tmp_path / "p"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    done = [row["stage"] for row in told["stages"] if row["state"] == "done"]
    assert (done, told["model"]) == (["check", "fingerprint", "plan"], None)


def test_clean(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "p"
    shutil.copytree(project, copy)
    assert run(["clean", str(copy)]) == 0
    capsys.readouterr()
    assert run(["clean", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": True, "items": []}
    assert run(["plan", "--out", str(copy), "--set", "planning.batch_size=3"]) == 0
    assert run(["clean", str(copy)]) == 2  # a run might go on with what is there
    assert run(["train", "--out", str(copy)]) == 0
    capsys.readouterr()
    assert run(["clean", str(copy), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {Path(item["path"]).parent.name for item in told["items"]} == {"plans", "fold-0"}
    assert not told["removed"]
    assert all(Path(item["path"]).is_dir() and item["bytes"] > 0 for item in told["items"])
    assert run(["clean", str(copy)]) == 0
    assert not any(Path(item["path"]).exists() for item in told["items"])


def test_verbs_that_report_as_json(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {}
    for verb in ("preprocess", "train", "predict", "report"):
        assert run([verb, str(project), "--json"]) == 0
        told[verb] = json.loads(capsys.readouterr().out)
    assert [len(cases) for cases in told["preprocess"]["configurations"].values()] == [5]
    assert [(row["configuration"], row["fold"], row["steps"]) for row in told["train"]] == [("3d_fullres", 0, 4)]
    assert [Path(path).parent for path in told["predict"]["predictions"]] == [project / "predictions"] * 2
    assert told["report"] == {"report": str(project / "report.html")}


def test_a_flipped_bit_in_a_model_is_found(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = next((project / "model").glob("weights-*"))
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for path in (project, project / "model"):
            assert run(["verify", str(path), "--json"]) == 1
            told = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
            assert told["model"]["state"] == "damaged"
            assert weights.name in told["model"]["found"]
    finally:
        weights.write_bytes(content)
    assert run(["verify", str(project / "model")]) == 0


def test_images_are_positional_too(project: Path, dataset: Path, tmp_path: Path) -> None:
    model = ["--model", str(project / "model"), "--device", "cpu"]
    assert run(["predict", *model, str(dataset / "imagesTs"), "-o", str(tmp_path / "o")]) == 0
    assert len(list((tmp_path / "o").iterdir())) == 2


@pytest.mark.parametrize(("arguments", "page"), [(["frobnicate"], "segfit"), (["plan", "--no"], "segfit plan")])
def test_errors_name_the_page_that_helps(arguments: list[str], page: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    assert capsys.readouterr().err.lower().endswith(f"see {page} --help\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["verify"],
        ["import", "-o", "x"],
        ["predict", "-o", "x", "-m"],
        ["evaluate", "-p", "a", "-r", "a", "-m"],
    ],
)
def test_a_path_that_is_nowhere_is_said_to_be_nowhere(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "nowhere")
    images = [str(tmp_path)] if arguments[0] == "predict" else []
    assert run([*arguments, nowhere, *images]) == 2
    assert f"{nowhere} does not exist; correct the path" in capsys.readouterr().err


def test_deterministic_is_kept_by_the_project_and_readies_cublas(
    project: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    load = load_model

    def watched(*arguments: Any, **named: Any) -> Model:
        asked.append(named["deterministic"])
        return load(*arguments, **named)

    monkeypatch.setattr("segfit.inference.model.load_model", watched)
    others = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    images, out = dataset / "imagesTs", str(tmp_path / "p")
    for arguments, wanted in (
        (["plan", str(dataset), "--out", out, *SET], None),
        (["plan", str(dataset), "--out", out, "--deterministic"], ":4096:8"),
        (["plan", out], ":4096:8"),  # it is the project's
        (["plan", out, "--no-deterministic"], None),
        (["predict", "--model", str(project / "model"), str(images), "-o", str(tmp_path / "a")], None),
        (["predict", "--model", str(project / "model"), str(images), "-o", str(tmp_path / "b"), "--deterministic"], 1),
    ):
        monkeypatch.setattr(os, "environ", dict(others))
        assert run(arguments) == 0
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
    assert asked == [False, True]
    monkeypatch.setattr(os, "environ", others | {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    assert run(["plan", out, "--deterministic"]) == 0
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # what the user set stays
    assert run(["predict", str(dataset), "--deterministic"]) == 2  # the project says it
