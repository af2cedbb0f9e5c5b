"""Models for programs without segfit: refusals, and a runner that stands alone; its predictions: the golden tests."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from segfit.bundle.bundle import Member, open_bundle
from segfit.connected_components import PostprocessingStep, apply_steps
from segfit.errors import InputError
from segfit.files import read_json
from segfit.inference import onnx_export
from segfit.inference.onnx_export import export_onnx
from segfit.labels import Exchange
from segfit.specs import Configuration


@pytest.fixture
def folder(
    tmp_path: Path,
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
) -> Path:
    one = member(configuration(), folds=2, mirror_axes=(0, 2))
    return write_model(tmp_path / "model", one.model_copy(update={"exchange": Exchange(axis=2, pairs=((1, 2),))}))


def test_networks_and_facts_are_written(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    made = export_onnx(open_bundle(folder), tmp_path / "exported")
    facts = read_json(made / "model.json")
    (one,) = facts["members"]
    assert {path.name for path in made.iterdir()} == {"model.json", "predict.py", "requirements.txt", *one["networks"]}
    assert len(one["networks"]) == 2
    assert one["mirror_axes"] == [0, 2]
    assert one["exchange"] == {"axis": 2, "inputs": [], "outputs": [0, 2, 1]}
    assert facts["labels"]["stored"] == [0, 1, 2]


def test_nothing_is_replaced_and_a_missing_package_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "package_version", lambda name: "1")
    with pytest.raises(InputError):
        export_onnx(open_bundle(folder), folder)
    monkeypatch.setattr(onnx_export, "package_version", lambda name: "")
    with pytest.raises(InputError) as refused:
        export_onnx(open_bundle(folder), tmp_path / "exported")
    assert "segfit[onnx]" in refused.value.action
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("shape", [(30, 40), (12, 14, 16)])
@pytest.mark.parametrize(
    "step",
    [
        PostprocessingStep.largest_of("a", (1,)),
        PostprocessingStep.largest_of("both", (1, 2)),
        PostprocessingStep.from_size("a", (1, 2), 5),
        PostprocessingStep.filling("b", 2),
    ],
)
def test_the_runner_does_what_is_done_to_label_maps(
    monkeypatch: pytest.MonkeyPatch, step: PostprocessingStep, shape: tuple[int, ...]
) -> None:
    name = "segfit.inference.onnx_runner"
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    runner = import_module(name)
    monkeypatch.delitem(sys.modules, name)
    sparse = 0.1 if step.kind != "fill_holes" else 0.4
    labels = np.random.default_rng(0).choice([0, 1, 2], shape, p=[1 - 2 * sparse, sparse, sparse]).astype(np.uint8)
    expected = apply_steps(labels, (step,))
    assert (expected != labels).any()
    given = {"kind": step.kind, "values": list(step.values), "min_voxels": step.min_voxels}
    np.testing.assert_array_equal(runner.postprocessed(labels, given), expected)
    nothing = np.zeros(shape, np.uint8)
    np.testing.assert_array_equal(runner.postprocessed(nothing, given), nothing)


def test_the_runner_is_short_and_stands_alone() -> None:
    text = Path(onnx_export.__file__).with_name("onnx_runner.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    imported = {
        name.partition(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    standard = {"__future__", "argparse", "collections", "itertools", "json", "math", "pathlib", "typing"}
    assert imported - standard == {"nibabel", "numpy", "onnxruntime", "scipy"}
