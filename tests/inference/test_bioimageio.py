"""A network for bioimage.io: it computes what the model does, and bioimage.io's own library takes its description."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from segfit.bundle.bundle import Bundle, Member, open_bundle
from segfit.cli.main import run
from segfit.files import hash_file
from segfit.inference.open_model import load_network
from segfit.specs import Configuration

STATED = ["--set", "model.authors=A. Nobody, B. Somebody", "--set", "model.licence=CC-BY-4.0"]


@pytest.fixture(params=["volume", "picture"])
def model(
    request: pytest.FixtureRequest,
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    flat = {"name": "2d", "ndim": 2, "patch": (16, 16), "spacing": (1.0, 1.0), "channels": 3}
    own = configuration(**flat) if request.param == "picture" else configuration()
    return write_model(tmp_path / "model", member(own, folds=2))


def expected(bundle: Bundle, image: np.ndarray) -> torch.Tensor:
    (own,) = bundle.manifest.members
    axes = tuple(range(2, image.ndim))
    normal = (image - image.mean(axes, keepdims=True)) / image.std(axes, keepdims=True)
    with torch.inference_mode():
        logits = [load_network(bundle, own, fold).eval()(torch.from_numpy(normal)) for fold in own.weights]
    return torch.stack(logits).mean(0).softmax(1)


def test_it_computes_what_the_model_does(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["export", str(model), "--to", "bioimageio", "-o", str(out)]
    assert run(command) == 2  # neither authors nor licence are stated
    assert not out.exists()
    assert run([*command, *STATED]) == 0
    assert run([*command, *STATED]) == 2  # it is there
    image, found = np.load(out / "test_input.npy"), np.load(out / "test_output.npy")
    torch.testing.assert_close(torch.from_numpy(found), expected(open_bundle(model), image), rtol=1e-3, atol=1e-4)
    described = json.loads((out / "rdf.yaml").read_text())
    assert [author["name"] for author in described["authors"]] == ["A. Nobody", "B. Somebody"]
    assert described["weights"]["torchscript"]["sha256"] == hash_file(out / "weights.pt")
    assert described["inputs"][0]["test_tensor"]["sha256"] == hash_file(out / "test_input.npy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.load(out / "weights.pt")
    sizes = [axis["size"] for axis in described["inputs"][0]["axes"] if axis["type"] == "space"]
    larger = [size["min"] + (index + 1) * size["step"] for index, size in enumerate(sizes)]
    image = np.random.default_rng(1).standard_normal((3, image.shape[1], *larger)).astype(np.float32)
    axes = tuple(range(2, image.ndim))  # other sizes and numbers of images than it was traced with
    normal = (image - image.mean(axes, keepdims=True)) / image.std(axes, keepdims=True)
    with torch.inference_mode():
        found = traced(torch.from_numpy(normal))
    torch.testing.assert_close(found, expected(open_bundle(model), image), rtol=1e-3, atol=1e-4)


def test_several_configurations_are_refused(model: Path, tmp_path: Path) -> None:
    bundle = open_bundle(model)
    (own,) = bundle.manifest.members
    stage = own.configuration.model_copy(update={"previous_stage": "3d_lowres"})
    changed = bundle.manifest.model_copy(update={"members": (own.model_copy(update={"configuration": stage}),)})
    (model / "model.json").write_text(json.dumps(changed.model_dump(mode="json") | {"seal": ""}))
    assert run(["export", str(model), "--to", "bioimageio", "-o", str(tmp_path / "out"), *STATED]) == 2


_VALIDATE = """
import sys
from bioimageio.spec import load_description
found = load_description(sys.argv[1])
print(found.validation_summary.status)
print(found.validation_summary.format(), file=sys.stderr)
"""


def test_their_library_takes_it(model: Path, tmp_path: Path) -> None:
    """In a process of its own: it leaves files open, which is a warning."""
    pytest.importorskip("bioimageio.spec", reason="bioimageio.spec is not installed")
    out = tmp_path / "out"
    assert run(["export", str(model), "--to", "bioimageio", "-o", str(out), *STATED]) == 0
    command = [sys.executable, "-c", _VALIDATE, str(out / "rdf.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] in ("passed", "valid-format"), done.stderr
