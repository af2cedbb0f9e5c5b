"""Cases that are larger than the memory they are to take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from segfit.bundle.bundle import Member
from segfit.dataset.layouts import find_cases
from segfit.errors import DatasetError, InputError
from segfit.execution.execution import Execution
from segfit.files import read_arrays
from segfit.geometry import Grid
from segfit.images import nifti, omezarr
from segfit.images.formats import read_image, read_label
from segfit.images.image import Image
from segfit.inference.model import Model
from segfit.inference.predict_folder import predict_folder
from segfit.inference.predictor import Predictor
from segfit.inference.to_input_grid import LogitStream
from segfit.progress import SILENT, KeptWarnings
from segfit.specs import Configuration

LITTLE = 1e-5  # GB: every array is a file
TURNED = np.array([[0, -0.9, 0, 4], [0, 0, 1.3, 1], [-2.5, 0, 0, 9], [0, 0, 0, 1.0]])

Make = Callable[..., Any]


@pytest.fixture
def model(configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Make) -> Model:
    """Two members whose first axes differ, values that are not consecutive, mirroring."""
    upright = member(configuration(spacing=(2.0, 1.1, 1.2), orientation="canonical"), mirror_axes=(0, 2))
    turned = member(configuration("other", spacing=(1.3, 1.0, 2.0), transpose=(1, 0, 2)))
    built: Model = make_model(upright, turned, labels={"background": 0, "a": 7, "b": 300})
    return built


def volume(folder: Path, ending: str) -> Path:
    folder.mkdir(exist_ok=True)
    array = np.zeros((26, 41, 33), np.uint8)
    array[2:24, 3:40, 1:] = np.random.default_rng(0).integers(1, 250, (22, 37, 32))
    path = folder / f"a{ending}"
    if ending == ".nii.gz":
        nifti.write(path, array, Grid(array.shape, (1.3, 0.9, 2.5), TURNED))
    elif ending == ".ome.zarr":
        omezarr.write(path, array, Grid(array.shape, (2.5, 0.9, 1.3)))
    else:
        tifffile.imwrite(path, array, tile=(16, 16), compression="zlib", photometric="minisblack")
        path.with_suffix(".json").write_text('{"spacing": [2.5, 0.9, 1.3]}')
    return path


@pytest.mark.parametrize("ending", [".nii.gz", ".ome.zarr", ".tif"])
def test_in_little_memory_the_result_is_the_same(model: Model, tmp_path: Path, ending: str) -> None:
    path = volume(tmp_path / "in", ending)
    whole = model.predict(path, probabilities=True)
    streamed = model.predict(path, probabilities=True, memory_gb=LITTLE)
    assert [item.code for item in streamed.warnings] == ["streamed", *(item.code for item in whole.warnings)]
    assert ("read whole" in streamed.warnings[0].problem) == (ending == ".nii.gz")
    assert (streamed.grid, streamed.labels.dtype) == (whole.grid, whole.labels.dtype)
    assert set(np.unique(whole.labels)) == {0, 7, 300}
    assert whole.probabilities is not None
    top = np.sort(whole.probabilities, axis=0)
    clear = top[-1] - top[-2] > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(streamed.labels[clear], whole.labels[clear])
    np.testing.assert_allclose(streamed.probabilities, whole.probabilities, atol=1e-4)


def test_arrays_are_streamed_to_the_bit(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Make
) -> None:
    """They are preprocessed as ever."""
    model = make_model(member(configuration(orientation="canonical")))
    image = Image(
        np.random.default_rng(0).random((1, 26, 41, 33), np.float32), Grid((26, 41, 33), (1.3, 0.9, 2.5), TURNED)
    )
    whole, streamed = model.predict(image), model.predict(image, memory_gb=LITTLE)
    np.testing.assert_array_equal(streamed.labels, whole.labels)


def test_what_needs_the_whole_image_is_told(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Make, tmp_path: Path
) -> None:
    chosen = configuration()
    scheme = chosen.preprocessing.normalization[0].model_copy(update={"use_mask": True})
    spec = chosen.preprocessing.model_copy(update={"normalization": (scheme,)})
    model = make_model(member(chosen.model_copy(update={"preprocessing": spec})))
    path = volume(tmp_path / "in", ".tif")
    streamed = model.predict(path, memory_gb=LITTLE)
    assert "read whole" in streamed.warnings[0].problem
    np.testing.assert_array_equal(streamed.labels, model.predict(path).labels)


@pytest.mark.parametrize("value", [1e200, 1e300])
def test_values_too_large_are_refused_as_in_memory(model: Model, tmp_path: Path, value: float) -> None:
    """Their squares are infinite, which is no reason to say anything else."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.full((5, 20, 20), value), tile=(16, 16), photometric="minisblack")
    for memory in (None, LITTLE):
        with pytest.raises(InputError, match="too large for single precision"):
            model.predict(path, (2.0, 1.0, 1.0), memory_gb=memory)


def test_slices_of_a_volume_are_streamed(
    configuration: Callable[..., Configuration], member: Callable[..., Member], make_model: Make, tmp_path: Path
) -> None:
    model = make_model(member(configuration("2d", ndim=2, patch=(16, 16), spacing=(None, 1.0, 1.0))))
    path = volume(tmp_path / "in", ".tif")
    streamed = model.predict(path, memory_gb=LITTLE)
    assert (streamed.labels != model.predict(path).labels).mean() < 1e-3


def test_folders(model: Model, tmp_path: Path) -> None:
    volume(tmp_path / "in", ".ome.zarr")
    cases = find_cases(tmp_path / "in", ".ome.zarr", 1)
    kept = KeptWarnings(SILENT)
    execution = Execution(progress=kept)
    (whole,) = predict_folder(model, cases, tmp_path / "whole", save_probabilities=True)
    (path,) = predict_folder(
        model, cases, tmp_path / "out", save_probabilities=True, memory_gb=LITTLE, execution=execution
    )
    assert (kept.warnings[0].case, kept.warnings[0].code) == ("a", "streamed")
    assert (read_label(path).array != read_label(whole).array).mean() < 1e-3
    probabilities = [read_arrays(one.with_name("a.npz")) for one in (path, whole)]
    assert probabilities[0] is not None
    assert probabilities[1] is not None
    np.testing.assert_allclose(probabilities[0]["probabilities"], probabilities[1]["probabilities"], atol=1e-4)
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["a.nii.gz", "a.npz"]


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".nrrd", ".mha", ".ome.zarr", ".tif"])
def test_probabilities_as_images(model: Model, tmp_path: Path, ending: str) -> None:
    """They lie on the grid of the input, whether they were made in memory or not."""
    path = volume(tmp_path / "in", ".nii.gz")
    cases = find_cases(tmp_path / "in", ".nii.gz", 1)
    expected = model.predict(path, probabilities=True)
    for memory in (None, LITTLE):
        out = tmp_path / f"{memory}"
        predict_folder(model, cases, out, ending=ending, save_probability_images=True, memory_gb=memory)
        files = [out / "probabilities" / f"a_{number:04d}{ending}" for number in range(3)]
        assert expected.probabilities is not None
        for file, values in zip(files, expected.probabilities, strict=True):
            found = read_image(file)
            assert found.array.dtype == np.float32
            np.testing.assert_allclose(found.array[0], values, atol=1e-4)
            assert not expected.grid.mismatch(found.grid)
        assert predict_folder(model, cases, out, ending=ending, save_probability_images=True) == [out / f"a{ending}"]


def test_cases_wait_where_they_do_not_fit_together(model: Model, tmp_path: Path) -> None:
    """As many are read ahead as fit, and all are predicted."""
    path = volume(tmp_path / "in", ".nii.gz")
    for name in "bcde":
        (tmp_path / "in" / f"{name}.nii.gz").write_bytes(path.read_bytes())
    cases = find_cases(tmp_path / "in", ".nii.gz", 1)
    most = 1.1 * model.forecast_gb(Grid((26, 41, 33), (1.3, 0.9, 2.5), TURNED))
    held: list[int] = []
    prepare = model.prepare

    def counted(*arguments: Any, **options: Any) -> Any:
        held.append(len(list((tmp_path / "out").glob("*"))))
        return prepare(*arguments, **options)

    model.prepare = counted  # type: ignore[method-assign]
    paths = predict_folder(model, cases, tmp_path / "out", memory_gb=most, execution=Execution(workers=3))
    assert held == sorted(held)
    assert held[-1] >= 2  # read after earlier ones were written
    assert all(one.is_file() for one in paths)


def test_what_runs_out_of_memory_is_tried_in_less(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = volume(tmp_path / "in", ".tif")
    whole = model.predict(path)
    tried: list[bool] = []
    stream = Predictor.stream

    def failing(self: Predictor, image: Any, **options: Any) -> Any:
        tried.append(options.get("rows") is not None)
        if len(tried) < 3:
            raise MemoryError
        return stream(self, image, **options)

    monkeypatch.setattr(Predictor, "stream", failing)
    kept = KeptWarnings(SILENT)
    streamed = model.predict(path, memory_gb=1.0, progress=kept)
    assert [item.code for item in kept.warnings if item.code != "no_orientation"] == ["out_of_memory"] * 2
    np.testing.assert_array_equal(streamed.labels, whole.labels)
    tried.clear()
    kept = KeptWarnings(SILENT)
    cases = find_cases(tmp_path / "in", ".tif", 1)
    (out,) = predict_folder(model, cases, tmp_path / "out", ending=".tif", execution=Execution(progress=kept))
    assert [item.code for item in kept.warnings if item.code != "no_orientation"] == ["out_of_memory"]
    np.testing.assert_array_equal(read_label(out).array[0], whole.labels)


def test_memory_that_never_suffices_is_an_error(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Predictor, "stream", failing)
    path = volume(tmp_path / "in", ".tif")
    with pytest.raises(MemoryError):
        model.predict(path)
    with pytest.raises(DatasetError) as told:
        predict_folder(model, find_cases(path.parent, ".tif", 1), tmp_path / "out")
    assert [item.code for item in told.value.problems] == ["out_of_memory"]
    with pytest.raises(InputError):
        model.predict(path, memory_gb=0.0)


def test_a_broken_chunk_is_told_and_nothing_is_left(model: Model, tmp_path: Path) -> None:
    path = volume(tmp_path / "in", ".ome.zarr")
    chunk = next(one for one in (path / "0").rglob("*") if one.is_file() and not one.name.startswith("."))
    chunk.write_bytes(b"damaged")
    with pytest.raises(DatasetError) as told:
        predict_folder(model, find_cases(path.parent, ".ome.zarr", 1), tmp_path / "out", memory_gb=LITTLE)
    assert "a.ome.zarr" in str(told.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_streams_are_read_forwards_only() -> None:
    import torch

    stream = LogitStream((1, 6, 2), torch.arange(12.0).reshape(1, 6, 2).split(2, 1), torch.device("cpu"))
    assert stream.read(0, ((1, 4), (0, 2))).tolist() == [[2, 3], [4, 5], [6, 7]]
    assert stream.read(0, ((2, 5), (1, 2))).tolist() == [[5], [7], [9]]
    with pytest.raises(AssertionError):
        stream.read(0, ((0, 2), (0, 2)))


_PEAK = """
import sys, threading
from pathlib import Path
import torch
from segfit.dataset.layouts import find_cases
from segfit.inference.model import load_model
from segfit.inference.predict_folder import predict_folder

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

torch.set_num_threads(1)
model = load_model(sys.argv[1], "cpu", tile_step=1.0)
peaks = []
for folder in sys.argv[3:]:
    peak, over = [0], threading.Event()
    def watch():
        while not over.wait(0.005):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    [path] = predict_folder(model, find_cases(Path(folder), sys.argv[2], 1), Path(folder) / "out", memory_gb=0.02)
    over.set()
    thread.join()
    peaks.append(peak[0] >> 10)
print(*peaks)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory by kind is told by Linux")
@pytest.mark.parametrize("ndim", [2, 3])
def test_the_peak_does_not_grow_with_the_image(
    configuration: Callable[..., Configuration],
    member: Callable[..., Member],
    write_model: Callable[..., Path],
    tmp_path: Path,
    ndim: int,
) -> None:
    """Anonymous memory, with 400^3 voxels or 4000^2 pixels, which in memory would take 1.4 and 0.4 GB."""
    sizes, ending = ((256, 400), ".ome.zarr") if ndim == 3 else ((1000, 4000), ".tif")
    chosen = configuration(
        ndim=ndim, patch=(64, 64, 64) if ndim == 3 else (256, 256), spacing=(None,) * ndim, outputs=2
    )
    quick = chosen.network.model_copy(update={"kernels": ((1,) * ndim,) * 2})
    chosen = chosen.model_copy(update={"network": quick})
    folder = write_model(tmp_path / "model", member(chosen), labels={"background": 0, "a": 1})
    generator = np.random.default_rng(0)
    for size in sizes:
        array = np.resize(generator.integers(1, 250, 99991, np.uint8), (size,) * ndim)
        (tmp_path / str(size)).mkdir()
        if ndim == 3:
            omezarr.write(tmp_path / str(size) / f"a{ending}", array, Grid(array.shape, (1.0,) * ndim))
        else:
            tifffile.imwrite(tmp_path / str(size) / f"a{ending}", array, tile=(256, 256), compression="zlib")
        del array
    arguments = [str(folder), ending, *(str(tmp_path / str(size)) for size in sizes)]
    peaks = []
    for _ in range(3):  # what the allocator holds varies by as much; what grows with the image does each time
        done = subprocess.run([sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True, check=True)
        small, large = map(int, done.stdout.split())
        peaks.append((small, large))
        if large < small + 100:
            return
    pytest.fail(f"{peaks} MB")
