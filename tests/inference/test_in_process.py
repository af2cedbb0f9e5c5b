"""Prediction inside another program: no file, no child process, any thread, no memory that grows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from segfit.bundle.bundle import Member
from segfit.inference.model import Model, load_model
from segfit.specs import Configuration

_PREAMBLE = """
import sys
import numpy as np
import segfit
model = segfit.load_model(sys.argv[1], "cpu")
rng = np.random.default_rng(0)
image = rng.random((24, 40, 40), np.float32), (2.0, 1.0, 1.0)
"""

_AUDITED = (
    _PREAMBLE
    + """
model.predict(image)
model.predict(sys.argv[2])  # what readers import may look for a network, once
seen, started = [], ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "os.system", "pty.spawn")
changed = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "shutil.", "socket.")
def hook(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3):
            seen.append((event, str(path)))
    elif event in started or event.startswith(changed) or event.startswith("tempfile."):
        seen.append((event, str(arguments)))
sys.addaudithook(hook)
model.predict(image, probabilities=True)
model.predict(sys.argv[2])
open(sys.argv[3], "w").close()  # the hook sees it
print(len(seen), seen[0][1] == sys.argv[3])
"""
)

_GROWTH = (
    _PREAMBLE
    + """
from pathlib import Path
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
for _ in range(20):
    model.predict(image)
grown = []  # what is kept grows each time, what the allocator holds does not
for _ in range(3):
    before = resident()
    for _ in range(200):
        model.predict(image)
    grown.append((resident() - before) * 4096)
print(min(grown))
"""
)


@pytest.fixture
def folder(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> Path:
    return write_model(tmp_path / "model", member(configuration(), mirror_axes=(2,)))


def told(code: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_nothing_is_written_and_no_process_started(folder: Path, tmp_path: Path) -> None:
    import nibabel as nib

    image = nib.Nifti1Image(np.random.default_rng(1).random((20, 20, 12), np.float32), np.diag([1, 1, 2, 1]))
    nib.save(image, tmp_path / "image.nii.gz")
    assert told(_AUDITED, folder, tmp_path / "image.nii.gz", tmp_path / "witness") == ["1", "True"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the platform has no /proc")
def test_two_hundred_calls_take_no_more_memory(folder: Path) -> None:
    (grown,) = told(_GROWTH, folder)
    one_image = 24 * 40 * 40 * 4
    assert int(grown) < 100 * one_image  # 200 kept images, labels or logits would be more


def test_threads_predict_as_one_does(folder: Path) -> None:
    model = load_model(folder, "cpu")
    rng = np.random.default_rng(2)
    images = [(rng.random((10 + n, 20, 24 - n), np.float32), (2.0, 1.0, 1.0)) for n in range(8)]
    expected = [model.predict(image, probabilities=True) for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: model.predict(image, probabilities=True), images * 3))
    for own, other in zip(found, expected * 3, strict=True):
        assert np.array_equal(own.labels, other.labels)
        assert own.probabilities is not None
        assert other.probabilities is not None
        np.testing.assert_allclose(own.probabilities, other.probabilities, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.int16, torch.uint8, torch.bool])
def test_tensors_are_taken_and_left_as_they_are(folder: Path, kind: torch.dtype) -> None:
    model: Model = load_model(folder, "cpu")
    values = torch.arange(10 * 16 * 16).reshape(10, 16, 16) % 200
    tensor = (values if kind != torch.bool else values > 100).to(kind)
    copy = tensor.clone()
    found = model.predict((tensor, (2.0, 1.0, 1.0)))
    expected = model.predict((tensor.float().numpy(), (2.0, 1.0, 1.0)))
    assert np.array_equal(found.labels, expected.labels)
    assert torch.equal(tensor, copy)
    turned = model.predict((tensor.permute(2, 1, 0).contiguous().permute(2, 1, 0), (2.0, 1.0, 1.0)))  # strides
    assert np.array_equal(turned.labels, expected.labels)
