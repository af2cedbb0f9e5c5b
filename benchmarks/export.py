"""Export of logits to labels beside nnU-Net 2.8.1: many classes, half precision, from a file, on the CPU.

    python benchmarks/export.py --reference-python PATH [--work DIR] [--classes 105] [--shape 600,512,512]
                                [--reference-shape 150,128,128]

Smooth logits on a grid half as fine are brought to `shape`; that takes hundreds of gigabytes in nnU-Net, so the two
programs are compared at `reference-shape`, each in a process of its own, on the same logits. Time and peak of anonymous
memory are those of the conversion, without reading and writing files. Labels that differ are ties where the two highest
logits are within 1e-2, the rounding of half precision. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segfit.inference.to_input_grid import LogitField, merged_labels
from segfit.labels import LabelScheme
from segfit.nnunet.plans_writer import configuration_entry
from segfit.preprocessing.pipeline import CaseProperties
from segfit.resampling import new_shape
from segfit.specs import Configuration, NetworkSpec, Normalization, PreprocessingSpec

_FINE, _COARSE = (1.0, 0.75, 0.75), (2.0, 1.5, 1.5)  # mm
_TIE = 1e-2
_MEASURED = """
import json, sys, threading, time

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 2**20

class Measured:
    def __enter__(self):
        self.peak, self.over, self.started = 0.0, threading.Event(), time.perf_counter()
        threading.Thread(target=self.watch, daemon=True).start()
        return self
    def watch(self):
        while not self.over.wait(0.01):
            self.peak = max(self.peak, anonymous())
    def __exit__(self, *_):
        self.over.set()
        print(json.dumps({"wall_s": round(time.perf_counter() - self.started, 2), "peak_gb": round(self.peak, 2)}))
"""
_REFERENCE = """
import numpy as np, torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as convert
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
torch.set_num_threads(2)
facts, logits, output = json.load(open(sys.argv[1])), torch.from_numpy(np.load(sys.argv[2])), sys.argv[3]
plans = PlansManager(facts["plans"])
configuration, labels = plans.get_configuration("3d_fullres"), plans.get_label_manager(facts["dataset"])
with Measured():
    found = convert(logits, plans, configuration, labels, facts["properties"], False, 2)
np.save(output, np.asarray(found))
"""
_SEGFIT = """
import numpy as np, torch
sys.path.insert(0, sys.argv[4])
from export import convert
torch.set_num_threads(2)
with Measured():
    found = convert(sys.argv[2], json.load(open(sys.argv[1])))
np.save(sys.argv[3], found)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for logits; a temporary one when absent")
    parser.add_argument("--classes", type=int, default=105)
    parser.add_argument("--shape", default="600,512,512")
    parser.add_argument("--reference-shape", default="150,128,128")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        compared = prepare(work / "compared", arguments.classes, sizes(arguments.reference_shape))
        theirs = measure(str(arguments.reference_python), _REFERENCE, compared, "reference")
        ours = measure(sys.executable, _SEGFIT, compared, "segfit")
        figures = {
            "reference": theirs | {"shape": arguments.reference_shape},
            "segfit_there": ours | labels_apart(compared),
            "wall_ratio": round(theirs["wall_s"] / ours["wall_s"], 1),
        }
        large = prepare(work / "large", arguments.classes, sizes(arguments.shape))
        figures["segfit"] = measure(sys.executable, _SEGFIT, large, "segfit") | {"shape": arguments.shape}
    print(json.dumps(figures))


def sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def prepare(folder: Path, classes: int, shape: tuple[int, ...]) -> Path:
    """Write logits of blobs and noise in half precision, and what the two programs are told of them."""
    folder.mkdir()
    coarse = new_shape(shape, _FINE, _COARSE)
    logits = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float16, (classes, *coarse))
    generator = torch.Generator().manual_seed(0)
    for channel in logits:
        seeds = torch.randn((1, 1, *(max(2, n // 16) for n in coarse)), generator=generator)
        channel[...] = torch.nn.functional.interpolate(seeds, coarse, mode="trilinear")[0, 0].numpy() * 4
    flat = [[0, n] for n in shape]
    facts = {
        "shape": shape,
        "coarse": coarse,
        "classes": classes,
        "plans": plans(classes),
        "dataset": {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0} | {f"class {number}": number for number in range(1, classes)},
            "file_ending": ".nii.gz",
            "numTraining": 1,
        },
        "properties": {
            "spacing": list(_FINE),
            "shape_before_cropping": list(shape),
            "bbox_used_for_cropping": flat,
            "shape_after_cropping_and_before_resampling": list(shape),
        },
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


def configuration(classes: int) -> Configuration:
    return Configuration(
        name="3d_fullres",
        ndim=3,
        patch_size=(128, 128, 128),
        batch_size=2,
        spacing_mm=_COARSE,
        median_shape=(128.0, 128.0, 128.0),
        batch_dice=False,
        preprocessing=PreprocessingSpec(
            orientation="stored",
            transpose=(0, 1, 2),
            spacing_mm=_COARSE,
            normalization=(Normalization(scheme="zscore"),),
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=3,
            in_channels=1,
            num_outputs=classes,
            features=(8, 16),
            strides=((1, 1, 1), (2, 2, 2)),
            kernels=((3, 3, 3), (3, 3, 3)),
            encoder_convs=(2, 2),
            decoder_convs=(2,),
        ),
        memory_estimate=0,
    )


def plans(classes: int) -> dict[str, Any]:
    return {
        "dataset_name": "Dataset900_Export",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(_FINE),
        "original_median_shape_after_transp": [128, 128, 128],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration_entry(configuration(classes), "nnUNetPlans_3d_fullres")},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def measure(python: str, program: str, folder: Path, name: str) -> dict[str, Any]:
    """Run one of the two programs; return its time and its peak of anonymous memory in GiB."""
    files = (folder / "facts.json", folder / "logits.npy", folder / f"{name}.npy", Path(__file__).parent)
    command = [python, "-c", _MEASURED + program, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} in {folder.name}: {result}", file=sys.stderr)
    return result


def convert(path: str, facts: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Do what is measured of segfit."""
    return merged_labels([field(path, facts)], LabelScheme.from_declaration(facts["dataset"]["labels"]))


def field(path: str, facts: dict[str, Any]) -> LogitField:
    shape = tuple(facts["shape"])
    properties = CaseProperties(
        case="case",
        stored_shape=shape,
        stored_spacing_mm=_FINE,
        affine=None,
        axis_order=(0, 1, 2),
        axis_flip=(False,) * 3,
        transpose=(0, 1, 2),
        spacing_mm=_FINE,
        shape_before_crop=shape,
        crop_box=tuple((0, n) for n in shape),
        shape_after_crop=shape,
        shape=tuple(facts["coarse"]),
    )
    logits = torch.from_numpy(np.load(path, mmap_mode="r+"))
    return LogitField(logits, properties, configuration(facts["classes"]))


def labels_apart(folder: Path) -> dict[str, Any]:
    """Return how many labels of the two programs differ, and how many of those are no ties."""
    first, second = np.load(folder / "reference.npy"), np.load(folder / "segfit.npy")
    apart = np.argwhere(first != second)
    logits = field(str(folder / "logits.npy"), json.loads((folder / "facts.json").read_text()))
    clear = 0
    for place in apart[:1000]:
        box = tuple((int(n), int(n) + 1) for n in place)
        values = [float(logits.read(int(found[tuple(place)]), box)) for found in (first, second)]
        clear += abs(values[0] - values[1]) > _TIE
    return {"voxels": first.size, "labels_differ": len(apart), "of_1000_no_ties": clear}


if __name__ == "__main__":
    main()
