"""Executors by their names, on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import SET

from segfit.cli.main import run
from segfit.execution.execution import Execution

_TOY = """
from concurrent.futures import ThreadPoolExecutor

asked, done = [], []


class Noting(ThreadPoolExecutor):
    def submit(self, work, /, *args, **kwargs):
        done.append((getattr(work.work, "func", work.work).__module__, work.case, work.num_bytes, work.device))
        return super().submit(work, *args, **kwargs)


class toy:
    @staticmethod
    def open_cases(cluster, workers, progress):
        if cluster == "broken":
            raise RuntimeError("no such wire")
        asked.append((cluster, workers))
        return Noting(2)


class idle:
    pass


class wrong:
    @staticmethod
    def open_cases(cluster, workers, progress):
        return open(__file__)
"""


@pytest.fixture
def toy(plugin_package: Callable[..., Path]) -> str:
    """An executor of another package."""
    plugin_package(_TOY, executors=["toy", "idle", "wrong"])
    return "own-things:toy"


def _done() -> list[tuple[Any, ...]]:
    found = list(sys.modules["own_things"].done)
    sys.modules["own_things"].done.clear()
    return found


def _json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_executor_of_another_package_checks_preprocesses_and_predicts(
    toy: str, dataset: Path, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by = ["--executor", toy, "--cluster", "somewhere"]
    here = _json(capsys, "check", dataset)
    assert _json(capsys, "check", dataset, *by, "--workers", "3") == here
    done = _done()
    assert len(done) == 7
    assert {module for module, *_ in done} == {"segfit.dataset.checks"}
    assert all(num_bytes > 12 * 24 * 24 and device is None for *_, num_bytes, device in done)

    stores = []
    for name, given in (("here", []), ("far", by)):
        told = _json(capsys, "preprocess", dataset, "--out", tmp_path / name, *SET, *given)
        folder = Path(told["folder"])
        stores.append((told["configurations"], {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.b2nd")}))
    assert stores[0] == stores[1]
    done = _done()
    assert {case for module, case, *_ in done if module == "segfit.preprocessing.dataset"} == set(stores[0][0]["2d"])
    assert len(stores[0][0]["2d"]) == 5

    predicted, logged = [], []
    for name, given in (("labels", []), ("far labels", by)):
        out, log = tmp_path / name, tmp_path / f"{name}.jsonl"
        told = _json(
            capsys, "predict", dataset / "imagesTs", "--model", project / "model", "-o", out, "--probabilities",
            "--overlays", "--deterministic", "--log", log, *given,
        )  # fmt: skip
        assert len(told["predictions"]) == 2
        assert set(told["quality"]) == {"phantom_ts_000", "phantom_ts_001"}
        lines = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda line: line["case"])
        logged.append([{key: value for key, value in line.items() if key != "date"} for line in lines])
        predicted.append({path.name: path.read_bytes() for path in out.rglob("*.*")})
    assert predicted[0] == predicted[1]
    assert logged[0] == logged[1]
    assert len(logged[0]) == 2
    assert len(predicted[0]) == 6
    done = _done()
    assert [(module, device) for module, *_, device in done] == [("segfit.inference.predict_folder", "auto")] * 2

    pair = ["-p", tmp_path / "labels", "-r", dataset / "labelsTs", "-m", project / "model"]
    scores = [_json(capsys, "evaluate", *pair, "--metrics", "surface,objects", *given) for given in ([], by)]
    assert scores[0] == scores[1]
    assert {module for module, *_ in _done()} == {"segfit.evaluation.evaluate"}
    assert set(sys.modules["own_things"].asked) == {("somewhere", None)}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--executor", "poll"], "'pool'"),
        (["--executor", "own-things:missing"], "own-things:toy"),
        (["--executor", "own-things:idle"], "does no work on cases"),
        (["--executor", "own-things:wrong"], "TextIOWrapper"),
        (["--executor", "own-things:toy", "--cluster", "broken"], "no such wire"),
        (["--cluster", "local:2"], "--cluster"),
    ],
)
def test_what_is_no_executor_is_told_before_anything_is_made(
    toy: str, dataset: Path, tmp_path: Path, given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["preprocess", str(dataset), "--out", str(tmp_path / "p"), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "p").exists()


def test_executors_open_for_python_too(toy: str) -> None:
    with Execution.by(toy, "there", workers=3) as execution:
        assert dict(execution.map(abs, [-1, -2], description="x", size=lambda _: 7, device="cuda")) == {-1: 1, -2: 2}
        assert not execution.is_here
    assert _done() == [("builtins", "-1", 7, "cuda"), ("builtins", "-2", 7, "cuda")]
    assert sys.modules["own_things"].asked == [("there", 3)]
    with Execution.by("pool", workers=2) as execution:
        assert execution.is_here
        assert execution.workers == 2
