"""Importing segfit is silent, light and without side effects; looked at in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import segfit
from segfit.dataset.phantom import make_phantom

# Imports the modules of argv and tells what that changed.
_PROBE = """
import importlib, json, os, sys, threading
environment = dict(os.environ)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps({
    "heavy": sorted({"torch", "matplotlib", "nibabel", "blosc2", "cc3d", "scipy.ndimage"} & set(sys.modules)),
    "optional": sorted({"SimpleITK", "pydicom", "gdcm", "zarr"} & set(sys.modules)),
    "environment": environment == dict(os.environ),
    "threads": threading.active_count(),
}))
"""

# Reads the image of argv, or has the command line of argv done, and tells the readers of formats that this loaded.
_READERS = """
import json, sys
from pathlib import Path

class Missing:
    def find_spec(self, name, *_):
        if name == "pydicom":
            raise ModuleNotFoundError(name)

if sys.argv[1] == "missing":
    sys.meta_path.insert(0, Missing())
if sys.argv[2] == "read":
    from segfit.images.formats import read_image
    assert read_image(Path(sys.argv[3])).array.size
else:
    from segfit.cli.main import run
    assert run(sys.argv[2:]) == 0
readers = {"nibabel", "pydicom", "gdcm", "PIL", "tifffile", "SimpleITK", "zarr", "numcodecs"}
print(json.dumps(sorted(readers & set(sys.modules))))
"""

# Modules that plan, describe or configure: they must start at once and where no torch is installed.
LIGHT = [
    "segfit",
    "segfit.bundle",
    "segfit.dataset.manifest",
    "segfit.errors",
    "segfit.evaluation.metrics",
    "segfit.fingerprint.fingerprint",
    "segfit.options",
    "segfit.planning",
    "segfit.planning.plan",
    "segfit.specs",
]


def fresh(code: str, *arguments: str) -> str:
    """Run code in a new interpreter where warnings are errors; return what it printed."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_package_prints_nothing() -> None:
    assert fresh("import segfit") == ""


def test_light_modules_load_nothing_heavy_and_change_nothing() -> None:
    told = json.loads(fresh(_PROBE, *LIGHT))
    assert told == {"heavy": [], "optional": [], "environment": True, "threads": 1}


def test_a_model_is_loaded_without_the_planner() -> None:
    program = (
        "import sys, segfit.inference.model, segfit.nnunet.models; print([m for m in sys.modules if '.planning' in m])"
    )
    assert fresh(program) == "[]\n"


@pytest.mark.parametrize(
    "module", [f"segfit.{name}" for name in ("evaluation.evaluate", "selection.select", "connected_components")]
)
def test_evaluation_and_selection_need_no_torch(module: str) -> None:
    assert "torch" not in json.loads(fresh(_PROBE, module))["heavy"]


def test_formats_load_no_optional_package_before_a_file_needs_it() -> None:
    assert json.loads(fresh(_PROBE, "segfit.images.formats"))["optional"] == []


@pytest.mark.parametrize("pydicom", ["installed", "missing"])
@pytest.mark.parametrize("verb", ["read", "check", "--help"])
def test_nifti_loads_no_reader_of_another_format(tmp_path: Path, verb: str, pydicom: str) -> None:
    dataset = make_phantom(tmp_path / "dataset", cases=3, test_cases=0, shape=(4, 12, 12))
    given = {"read": [str(next((dataset / "imagesTr").iterdir()))], "check": [str(dataset)], "--help": []}
    arguments = [sys.executable, "-c", _READERS, pydicom, verb, *given[verb]]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    if pydicom == "installed" and verb != "--help":  # nibabel loads it where it can, and it what it decodes with
        loaded -= {"pydicom", "gdcm", "PIL"}
    assert loaded == (set() if verb == "--help" else {"nibabel"})


def test_public_names_are_listed_and_typed_before_anything_is_loaded() -> None:
    code = "import json, sys, segfit; print(json.dumps([dir(segfit), list(sys.modules)]))"
    names, modules = json.loads(fresh(code))
    assert names == sorted(segfit.__all__)
    assert {"Project", "Options", "Model", "Prediction", "Image", "evaluate", "nnunet", "InputError"} <= set(names)
    assert not {"pydantic", "numpy", "torch"} & set(modules)
    assert (Path(segfit.__file__).parent / "py.typed").is_file()


def test_exported_names_exist() -> None:
    code = "import segfit\nfor name in getattr(segfit, '__all__', ()): getattr(segfit, name)"
    assert fresh(code) == ""


def test_torch_is_not_loaded_to_see_that_there_is_only_a_processor() -> None:
    program = """
import sys
from segfit import device
device._may_have_accelerator = lambda: False
assert device.measure_hardware("auto").kind == device.measure_hardware("cpu").kind == "cpu"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
