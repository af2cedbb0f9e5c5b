"""Prediction beside nnU-Net 2.8.1: the same weights, tiles and mirrored views, by each program's own command, in turn.

    python benchmarks/inference.py --reference-python PATH --data FOLDER [--work DIR] [--rounds 3] [--sets small,ct]
        [--busy 1] [--engine openvino] [--size 512]

FOLDER holds Dataset004_Hippocampus, of which ten images are predicted with the network of nnU-Net's plan and mirrored
views. The other set is one CT-like volume of about 512x512x120, made, with the network of its plan at a quarter of the
width and without mirrored views: nnU-Net takes hours for more on two cores. Weights are drawn at random, which costs
what trained ones cost. Wall time, CPU time and the peak memory of all processes together are measured, start-up
included, both on the CPU, beside `--busy` processes that keep a processor each busy. `--size` is the edge of the
CT-like volume in the plane. Ratios are nnU-Net / segfit, medians over the rounds; `labels_differ` is a share of voxels.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import nibabel
import numpy as np
import torch

from economy import busy
from preprocessing import Cost, Reference, make_ct, ratios, run
from segfit.networks.unet import build_network
from segfit.nnunet.plans_reader import read_configurations
from segfit.nnunet.weights import to_nnunet

_MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
_SMALL_CASES = 10
_CT_WIDTH = 4  # divides the features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for data and results; a temporary one when absent")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sets", default="small,ct")
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--size", type=int, default=512)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        datasets = {
            "small": lambda: arguments.data / "Dataset004_Hippocampus",
            "ct": lambda: make_ct(work / "raw" / "Dataset903_OneCT", 1, arguments.size),
        }
        with busy(arguments.busy):
            figures = {name: compare(name, datasets[name](), work, arguments) for name in arguments.sets.split(",")}
    print(json.dumps(figures | {"busy": arguments.busy, "load": os.getloadavg()[0]}))


def compare(name: str, dataset: Path, work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict with both programs in turn."""
    reference = Reference(arguments.reference_python, dataset, work / "reference")
    reference.plan()
    small = name == "small"
    model = write_model(reference, dataset, work / "results" / dataset.name / _MODEL, 1 if small else _CT_WIDTH)
    images = work / "images" / name
    images.mkdir(parents=True, exist_ok=True)
    for path in sorted((dataset / "imagesTr").glob("*.nii.gz"))[: _SMALL_CASES if small else 1]:
        shutil.copy(path, images)
    theirs, ours = work / "theirs" / name, work / "ours" / name
    environment = reference.environment | {"nnUNet_results": str(work / "results")}
    command = str(arguments.reference_python.parent / "nnUNetv2_predict_from_modelfolder")
    mirror = ([], []) if small else (["--disable_tta"], ["--no-mirror"])
    costs: dict[str, list[Cost]] = {"theirs": [], "ours": []}
    for _ in range(arguments.rounds):
        for folder in (theirs, ours):
            shutil.rmtree(folder, ignore_errors=True)
        given = ["-i", str(images), "-o", str(theirs), "-m", str(model), "-f", "0", "-device", "cpu"]
        costs["theirs"].append(run([command, *given, "-npp", "1", "-nps", "1", *mirror[0]], environment))
        given = ["--model", str(model), str(images), "-o", str(ours), "--device", "cpu", "--engine", arguments.engine]
        costs["ours"].append(run([sys.executable, "-m", "segfit", "predict", *given, *mirror[1]]))
    figures: dict[str, Any] = ratios(middle(costs["theirs"]), middle(costs["ours"]))
    figures["labels_differ"] = share_of_differences(theirs, ours)
    print(f"{name}: {figures}", flush=True)
    return figures


def middle(costs: list[Cost]) -> Cost:
    """Return the median of each figure."""
    return Cost(*(median(getattr(cost, name) for cost in costs) for name in ("wall_s", "cpu_s", "memory_gb")))


def write_model(reference: Reference, dataset: Path, folder: Path, narrower: int) -> Path:
    """Write a model of nnU-Net's plan with random weights, its features divided by `narrower`."""
    plans, declared = reference.plans(), json.loads((dataset / "dataset.json").read_text())
    layers = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    layers["features_per_stage"] = [features // narrower for features in layers["features_per_stage"]]
    (folder / "fold_0").mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(declared))
    spec = read_configurations(plans, declared, ["3d_fullres"])["3d_fullres"].network
    network = build_network(spec, deep_supervision=False, generator=torch.Generator().manual_seed(0))
    content = {
        "network_weights": to_nnunet(network.state_dict(), spec),
        "init_args": {"configuration": "3d_fullres"},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def share_of_differences(theirs: Path, ours: Path) -> float:
    """Return the share of voxels with another label."""
    differ = total = 0
    for path in sorted(theirs.glob("*.nii.gz")):
        first, second = (np.asarray(nibabel.load(one).dataobj) for one in (path, ours / path.name))
        differ, total = differ + int(np.count_nonzero(first != second)), total + first.size
    if not total:
        raise SystemExit(f"nothing was predicted into {theirs}")
    return differ / total


if __name__ == "__main__":
    main()
