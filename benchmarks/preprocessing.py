"""Fingerprint and preprocessing beside the reference: the same files, the same number of workers, in turn, in one run.

    python benchmarks/preprocessing.py --reference-python PATH [--work DIR] [--dataset FOLDER ...]

Without `--dataset` two sets are made: eight CT-like volumes of about 512x512x120 whose spacings differ by case, and
four anisotropic MR pairs. `--reference-python` belongs to an environment with nnunetv2 2.8.1. For each set the whole
way (check, fingerprint, plan and preprocessing, by each program's own commands, start-up included) and preprocessing
alone are measured: seconds, CPU seconds, and the peak memory of all processes together. Ratios are reference / segfit,
above 1 means that segfit needs less. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from scipy import ndimage

_WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder for data and results; a temporary one when absent")
    parser.add_argument("--dataset", type=Path, action="append", help="a dataset folder in the reference's layout")
    parser.add_argument("--volumes", type=int, default=8, help="CT-like volumes that are made")
    parser.add_argument("--size", type=int, default=512, help="their edge in the plane")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        datasets = arguments.dataset or [
            make_ct(work / "raw" / "Dataset901_CT", arguments.volumes, arguments.size),
            make_mr(work / "raw" / "Dataset902_MR", 4),
        ]
        figures = {path.name: compare(path, work, arguments.reference_python) for path in datasets}
    print(json.dumps(figures | {"all": {part: overall(figures, part) for part in ("preprocessing", "whole")}}))


def overall(figures: dict[str, Any], part: str) -> dict[str, float]:
    """Return the ratios of all sets together: sums of time, the largest memory."""

    def cost(program: str) -> Cost:
        each = [one[part] for one in figures.values()]
        return Cost(
            sum(item[f"{program}_wall_s"] for item in each),
            sum(item[f"{program}_cpu_s"] for item in each),
            max(item[f"{program}_memory_gb"] for item in each),
        )

    return ratios(cost("reference"), cost("segfit"))


# ── what is compared ─────────────────────────────────────────────────────────────────────────────────────────────────


def compare(dataset: Path, work: Path, reference_python: Path) -> dict[str, Any]:
    """Run both programs on a dataset, stage by stage in turn."""
    reference, project = Reference(reference_python, dataset, work / "reference"), work / "segfit" / dataset.name
    shutil.rmtree(project, ignore_errors=True)
    segfit = [sys.executable, "-m", "segfit"]
    common = ["--out", str(project), "--preset", "stock", "--set", "planning.configurations=3d_fullres"]
    planning_theirs = reference.plan()
    run([*segfit, "plan", str(dataset), *common, "--set", f"workers={_WORKERS}"])
    take_statistics(project / "plan.json", reference.plans())
    theirs = reference.preprocess()
    ours = run([*segfit, "preprocess", "--out", str(project), "--workers", str(_WORKERS)])
    fresh = project.with_name(project.name + "-whole")
    shutil.rmtree(fresh, ignore_errors=True)
    whole = [*segfit, "preprocess", str(dataset), "--out", str(fresh), *common[2:], "--workers", str(_WORKERS)]
    whole_ours = run(whole)
    voxels, difference, labels_differ = differences(project, reference.folder())
    figures: dict[str, Any] = {
        "preprocessing": ratios(theirs, ours),
        "whole": ratios(planning_theirs + theirs, whole_ours),
        "voxels": voxels,
        "max_difference": difference,
        "labels_differ": labels_differ,
        "store_bytes_ratio": round(reference.stored_bytes() / stored_bytes(project / "cases"), 3),
    }
    show(dataset.name, figures)
    return figures


@dataclass(frozen=True)
class Cost:
    """What some commands took; the peak is that of the process tree."""

    wall_s: float
    cpu_s: float
    memory_gb: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, max(self.memory_gb, other.memory_gb))


def ratios(theirs: Cost, ours: Cost) -> dict[str, float]:
    return {
        "wall_ratio": round(theirs.wall_s / ours.wall_s, 2),
        "cpu_ratio": round(theirs.cpu_s / ours.cpu_s, 2),
        "memory_ratio": round(theirs.memory_gb / ours.memory_gb, 2),
        "reference_wall_s": round(theirs.wall_s, 2),
        "segfit_wall_s": round(ours.wall_s, 2),
        "reference_cpu_s": round(theirs.cpu_s, 2),
        "segfit_cpu_s": round(ours.cpu_s, 2),
        "reference_memory_gb": round(theirs.memory_gb, 2),
        "segfit_memory_gb": round(ours.memory_gb, 2),
    }


def show(name: str, figures: dict[str, Any]) -> None:
    for part in ("preprocessing", "whole"):
        cost = figures[part]
        print(
            f"{name}, {part}: reference {cost['reference_wall_s']} s, {cost['reference_cpu_s']} s CPU, "
            f"{cost['reference_memory_gb']} GB; segfit {cost['segfit_wall_s']} s, {cost['segfit_cpu_s']} s CPU, "
            f"{cost['segfit_memory_gb']} GB; ratios {cost['wall_ratio']}, {cost['cpu_ratio']}, {cost['memory_ratio']}"
        )
    print(
        f"{name}: largest difference {figures['max_difference']:.2g} over {figures['voxels']} voxels, "
        f"{figures['labels_differ']} labels differ, store {figures['store_bytes_ratio']} times smaller"
    )


class Reference:
    """The reference as a separate program with folders of its own."""

    def __init__(self, python: Path, dataset: Path, work: Path) -> None:
        self._commands = python.parent
        self._dataset, self._work = dataset, work
        self._id = str(int(dataset.name.removeprefix("Dataset").partition("_")[0]))
        for name in ("raw", "preprocessed", "results"):
            (work / name).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work / "preprocessed" / dataset.name, ignore_errors=True)
        if not (work / "raw" / dataset.name).exists():
            (work / "raw" / dataset.name).symlink_to(dataset.resolve())
        self.environment = os.environ | {
            "nnUNet_raw": str(work / "raw"),
            "nnUNet_preprocessed": str(work / "preprocessed"),
            "nnUNet_results": str(work / "results"),
        }

    def plan(self) -> Cost:
        extract = self._run("nnUNetv2_extract_fingerprint", "-d", self._id, "-np", str(_WORKERS))
        return extract + self._run("nnUNetv2_plan_experiment", "-d", self._id)

    def preprocess(self, configuration: str = "3d_fullres") -> Cost:
        return self._run("nnUNetv2_preprocess", "-d", self._id, "-c", configuration, "-np", str(_WORKERS))

    def plans(self) -> dict[str, Any]:
        path = self._work / "preprocessed" / self._dataset.name / "nnUNetPlans.json"
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    def folder(self) -> Path:
        return self._work / "preprocessed" / self._dataset.name / "nnUNetPlans_3d_fullres"

    def stored_bytes(self) -> int:
        return stored_bytes(self.folder())

    def _run(self, command: str, *arguments: str) -> Cost:
        return run([str(self._commands / command), *arguments], self.environment)


def take_statistics(plan_file: Path, theirs: dict[str, Any]) -> None:
    """Give our plan the reference's intensity statistics: its own come from a random sample of voxels."""
    statistics = theirs["foreground_intensity_properties_per_channel"]
    plan = json.loads(plan_file.read_text())
    for configuration in plan["configurations"].values():
        for channel, how in enumerate(configuration["preprocessing"]["normalization"]):
            if how.get("statistics") is not None:
                how["statistics"] = {key: statistics[str(channel)][key] for key in how["statistics"]}
    plan_file.write_text(json.dumps(plan))


def differences(project: Path, theirs: Path) -> tuple[int, float, int]:
    """Return voxels compared, the largest difference of intensities, and the number of labels that differ."""
    import blosc2

    voxels, largest, labels = 0, 0.0, 0
    for record in sorted((project / "cases").glob("*/case.json")):
        case = json.loads(record.read_text())["properties"]["case"]
        ours, reference = (
            blosc2.open(str(path), mode="r")[:] for path in (record.parent / "image.b2nd", theirs / f"{case}.b2nd")
        )
        assert ours.shape == reference.shape, (case, ours.shape, reference.shape)
        voxels += ours.size
        largest = max(largest, float(np.abs(ours - reference).max()))
        ours, reference = (
            blosc2.open(str(path), mode="r")[:] for path in (record.parent / "labels.b2nd", theirs / f"{case}_seg.b2nd")
        )
        labels += int(np.count_nonzero(ours != reference.reshape(ours.shape)))
    assert voxels, "nothing was preprocessed"
    return voxels, largest, labels


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a command to its end; its processes are looked at every 20 ms."""
    started = time.perf_counter()
    process = subprocess.Popen(
        list(command), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    peak = 0
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak / 2**30)


def tree_bytes(root: int) -> int:
    """Return the proportional memory of a session's processes: shared pages count once."""
    total = 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == root:
                for line in (folder / "smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):
            continue
    return total


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_ct(folder: Path, volumes: int, size: int) -> Path:
    """Write CT-like volumes, Hounsfield units in int16, with two classes; return the dataset's folder."""
    rng = np.random.default_rng(0)
    cases = {}
    for index in range(volumes):
        shape = (120 + 4 * (index % 4), size, size)
        spacing = (1.5 + 0.5 * (index % 3), 0.65 + 0.05 * index, 0.65 + 0.05 * index)
        z, y, x = np.ogrid[-1 : 1 : 1j * shape[0], -1 : 1 : 1j * shape[1], -1 : 1 : 1j * shape[2]]
        body = (x / 0.85) ** 2 + (y / 0.7) ** 2 + 0 * z < 1
        organ = ((x + 0.3) / 0.3) ** 2 + (y / 0.35) ** 2 + (z / 0.6) ** 2 < 1
        lesion = ((x + 0.3) / 0.08) ** 2 + ((y - 0.1) / 0.08) ** 2 + (z / 0.15) ** 2 < 1
        image = np.where(body, 40.0, -1000.0).astype(np.float32) + 60 * organ - 30 * lesion
        image += ndimage.gaussian_filter(rng.normal(0, 60, shape).astype(np.float32), 0.7)
        cases[f"ct_{index:02d}"] = ([image.round().astype(np.int16)], organ.astype(np.uint8) + lesion, spacing)
    return write(folder, cases, ["CT"])


def make_mr(folder: Path, pairs: int) -> Path:
    """Write MR pairs with thick slices and empty surroundings; return the dataset's folder."""
    rng = np.random.default_rng(1)
    cases = {}
    for index in range(pairs):
        shape = (24 + 2 * index, 320, 320)
        spacing = (5.0 + 0.5 * index, 0.6 + 0.05 * index, 0.6 + 0.05 * index)
        z, y, x = np.ogrid[-1 : 1 : 1j * shape[0], -1 : 1 : 1j * shape[1], -1 : 1 : 1j * shape[2]]
        head = (x / 0.7) ** 2 + (y / 0.8) ** 2 + (z / 1.2) ** 2 < 1
        lesion = ((x - 0.2) / 0.2) ** 2 + (y / 0.2) ** 2 + (z / 0.4) ** 2 < 1
        channels = []
        for contrast in (80, -50):
            noise = ndimage.gaussian_filter(rng.normal(0, 40, shape).astype(np.float32), 0.7)
            channels.append(np.where(head, 300 + contrast * lesion + noise, 0).round().astype(np.int16))
        cases[f"mr_{index:02d}"] = (channels, (lesion & head).astype(np.uint8), spacing)
    return write(folder, cases, ["T1", "T2"])


def write(folder: Path, cases: dict[str, Any], channels: Sequence[str]) -> Path:
    if (folder / "dataset.json").exists():
        return folder
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for case, (images, label, spacing) in cases.items():
        affine = np.diag([*spacing[::-1], 1.0])
        for channel, image in enumerate(images):
            nibabel.save(nibabel.Nifti1Image(image.T, affine), folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label.T, affine), folder / "labelsTr" / f"{case}.nii.gz")
    classes = {"background": 0, "organ": 1, "lesion": 2} if len(channels) == 1 else {"background": 0, "lesion": 1}
    declaration = {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": classes,
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(declaration))
    return folder


if __name__ == "__main__":
    main()
