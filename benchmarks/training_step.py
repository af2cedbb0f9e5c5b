"""A training step beside the reference's, and beside the same network fed ready tensors, in turn, in one run.

    python benchmarks/training_step.py --dataset FOLDER [--reference-python PATH] [--work DIR] [--device cpu]
                                       [--configuration 3d_fullres] [--steps 4] [--rounds 3] [--set OPTION=VALUE ...]

`--reference-python` belongs to an environment with nnunetv2 2.8.1, which runs as a program of its own; without it
segfit is measured alone. Both plan and preprocess the dataset by their own commands first (preset `stock`), and take
steps of patch sampling, augmentation, network, loss and optimiser with the same batch on all cores of this machine, and
on its GPU with `--device cuda`; `--set` gives segfit's options, such as `training.precision=fp32`. Steps of segfit are
those of `steps.py`, where ready tensors are told too; the first step of the reference is not counted, on a GPU as many
as there. Medians over the steps of all rounds; `wall_ratio` is reference / segfit in seconds a sample, `ready_ratio`
that of steps fed ready tensors; the memory is that of the process that trains, on a GPU of the GPU, and the reference
has others that load data. `overhead` is a whole step of segfit in those fed ready tensors. The last line of stdout is
JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from economy import where
from preprocessing import Reference, run

STEPS = Path(__file__).with_name("steps.py")

_REFERENCE = """
import json, resource, sys, time
import torch
from nnunetv2.run.run_training import get_trainer_from_args
dataset, configuration, steps, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), torch.device(sys.argv[4])
on_gpu = device.type == "cuda"
def timed(step):
    for _ in range(8 if on_gpu else 1):
        step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()  # reads the loss
        seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None
    return {"seconds": seconds, "memory_gb": memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
trainer = get_trainer_from_args(dataset, configuration, 0, device=device)
trainer.initialize()
batches, _ = trainer.get_dataloaders()
trainer.network.train()
whole = timed(lambda: trainer.train_step(next(batches)))
ready = next(batches)
ready["data"] = ready["data"].to(device)
ready["target"] = [part.to(device) for part in ready["target"]]
alone = timed(lambda: trainer.train_step(ready))
print(json.dumps({"step": whole, "ready": alone, "batch": trainer.batch_size}), flush=True)
import multiprocessing
for process in multiprocessing.active_children():  # those that load data would be waited for
    process.kill()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", type=Path)
    parser.add_argument("--dataset", type=Path, required=True, help="a dataset folder in the reference's layout")
    parser.add_argument("--work", type=Path, help="folder for data and results; a temporary one when absent")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="OPTION=VALUE")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(where() | compare(arguments, arguments.work or Path(folder))))


def compare(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prepare the dataset by both programs and measure their steps in turn."""
    name, project = arguments.configuration, work / "segfit"
    prepare(arguments.dataset, project, name, [f"device={arguments.device}", *arguments.settings])
    given = [name, "--steps", str(arguments.steps), "--device", arguments.device]
    programs: dict[str, tuple[list[str], dict[str, str] | None]] = {
        "segfit": ([sys.executable, str(STEPS), str(project), *given], None)
    }
    if arguments.reference_python is not None:
        reference = Reference(arguments.reference_python, arguments.dataset, work / "reference")
        reference.plan()
        reference.preprocess(name)
        command = [str(arguments.reference_python), "-c", _REFERENCE, arguments.dataset.name, name]
        command += [str(arguments.steps), arguments.device]
        programs = {"reference": (command, reference.environment)} | programs
    taken: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for _ in range(arguments.rounds):
        for program, (command, environment) in programs.items():
            taken[program].append(figures(command, environment))
    return summary(taken)


def prepare(dataset: Path, project: Path, configuration: str, settings: Sequence[str]) -> None:
    """Plan as nnU-Net does and preprocess anew."""
    shutil.rmtree(project, ignore_errors=True)
    options = [part for one in (f"planning.configurations={configuration}", *settings) for part in ("--set", one)]
    run(
        [
            sys.executable,
            "-m",
            "segfit",
            "preprocess",
            str(dataset),
            "--out",
            str(project),
            "--preset",
            "stock",
            *options,
        ]
    )


def figures(command: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a program; return what it printed last."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(taken: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians over the steps of all rounds, per sample, and their ratios."""
    seconds = {
        (program, part): median(value for each in rounds for value in each[part]["seconds"]) / int(rounds[0]["batch"])
        for program, rounds in taken.items()
        for part in ("step", "ready")
    }
    memory = {program: median(each["step"]["memory_gb"] for each in rounds) for program, rounds in taken.items()}
    waits = median(each["data_wait_s"] for each in taken["segfit"]) / int(taken["segfit"][0]["batch"])
    ours, fed = seconds["segfit", "step"], seconds["segfit", "ready"]
    result = {
        "segfit_s": round(ours, 6),
        "segfit_ready_s": round(fed, 6),
        "overhead": round(ours / fed, 3),
        "data_wait_share": round(waits / ours, 4),
    }
    if "reference" not in taken:
        return result | {"memory_gb": round(memory["segfit"], 3)}
    return result | {
        "reference_s": round(seconds["reference", "step"], 6),
        "reference_ready_s": round(seconds["reference", "ready"], 6),
        "wall_ratio": round(seconds["reference", "step"] / ours, 2),
        "ready_ratio": round(seconds["reference", "ready"] / fed, 2),
        "memory_ratio": round(memory["reference"] / memory["segfit"], 2),
    }


if __name__ == "__main__":
    main()
