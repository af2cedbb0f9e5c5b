"""A training step beside the reference's, and beside the same network fed ready tensors, in turn, in one run.

    python benchmarks/training_step.py --reference-python PATH --dataset FOLDER [--work DIR] [--steps 4] [--rounds 3]
                                       [--configuration 3d_fullres] [--set OPTION=VALUE ...]

`--reference-python` belongs to an environment with nnunetv2 2.8.1, which runs as a program of its own; both plan and
preprocess the dataset by their own commands first (preset `stock`), and take steps of patch sampling, augmentation,
network, loss and optimiser with the same batch on all cores of this machine; `--set` gives segfit's options, such as
`training.precision=fp32`. Ready tensors are of patch size and are not augmented. The first step of each process is not
counted. Medians over the steps of all rounds; `wall_ratio` is reference / segfit in seconds a sample; the memory is
that of the process that trains, and the reference has others that load data. `overhead` is a whole step of segfit in
those fed ready tensors. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from economy import where
from preprocessing import Reference, run

_TIMED = """
import json, resource, sys, time
def timed(steps, step):
    step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
"""

_REFERENCE = """
import torch
from nnunetv2.run.run_training import get_trainer_from_args
dataset, configuration, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
trainer = get_trainer_from_args(dataset, configuration, 0, device=torch.device("cpu"))
trainer.initialize()
batches, _ = trainer.get_dataloaders()
trainer.network.train()
figures = timed(steps, lambda: trainer.train_step(next(batches)))
print(json.dumps({"step": figures, "batch": trainer.batch_size}), flush=True)
import multiprocessing
for process in multiprocessing.active_children():  # those that load data would be waited for
    process.kill()
"""

_SEGFIT = """
import numpy as np, torch
from segfit import Project
from segfit.augmentation.spatial import centre_crop
from segfit.preprocessing.store import CaseStore
from segfit.specs import AugmentationSpec
from segfit.training.batch import Batch
from segfit.training.learner import Learner
from segfit.training.sampler import Batches, PatchSampler, keep_in_memory, stream
folder, name, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
project = Project.open(folder)
plan, labels = project.plan(), project.dataset.labels
configuration, recipe = plan.configurations[name], plan.training[name]
store = CaseStore(project.folder.cases)
cases = keep_in_memory(
    [store.open(key) for key in project.preprocess()[name].values()],
    channels=configuration.network.in_channels, limit_gb=4.0,
)
size = recipe.augmentation.sample_patch or configuration.patch_size
sampler = PatchSampler(
    cases, labels, channels=configuration.network.in_channels, sample_patch=size, patch=configuration.patch_size,
    batch_size=configuration.batch_size, foreground_share=recipe.foreground_share, seed=0, weights=None,
)
learner = Learner(configuration, recipe, labels, torch.device("cpu"), seed=0)
rng = np.random.default_rng(0)
with Batches(sampler) as batches:
    whole = timed(steps, lambda: learner.step(next(batches), learning_rate=1e-3, rng=rng).tolist())
    raw = next(batches)
none = AugmentationSpec(sample_patch=configuration.patch_size, **{
    field: 0.0 for field in AugmentationSpec.model_fields if field.endswith("_probability")
})
bare = Learner(configuration, recipe.model_copy(update={"augmentation": none}), labels, torch.device("cpu"), seed=0)
ready = Batch(*(centre_crop(part, configuration.patch_size).contiguous() for part in (raw.image, raw.labels)))
alone = timed(steps, lambda: bare.step(ready, learning_rate=1e-3, rng=rng).tolist())
print(json.dumps({"step": whole, "ready": alone, "batch": configuration.batch_size}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference-python", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True, help="a dataset folder in the reference's layout")
    parser.add_argument("--work", type=Path, help="folder for data and results; a temporary one when absent")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="OPTION=VALUE")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(where() | compare(arguments, arguments.work or Path(folder))))


def compare(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prepare the dataset by both programs and measure their steps in turn."""
    dataset, name = arguments.dataset, arguments.configuration
    reference, project = Reference(arguments.reference_python, dataset, work / "reference"), work / "segfit"
    shutil.rmtree(project, ignore_errors=True)
    reference.plan()
    reference.preprocess(name)
    options = ["--preset", "stock", "--set", f"planning.configurations={name}"]
    options += [part for setting in arguments.settings for part in ("--set", setting)]
    run([sys.executable, "-m", "segfit", "preprocess", str(dataset), "--out", str(project), *options])
    programs = {
        "reference": (arguments.reference_python, _REFERENCE, dataset.name),
        "segfit": (Path(sys.executable), _SEGFIT, project),
    }
    taken: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for _ in range(arguments.rounds):
        for program, (python, text, where_from) in programs.items():
            given = [str(where_from), name, str(arguments.steps)]
            taken[program].append(figures(python, _TIMED + text, given, reference.environment))
    return summary(taken)


def figures(python: Path, program: str, given: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a program; return what it printed last."""
    done = subprocess.run(
        [python, "-c", program, *given], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(taken: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians over the steps of all rounds, per sample, and their ratios."""
    theirs, ours = taken["reference"], taken["segfit"]

    def seconds(rounds: list[dict[str, Any]], part: str) -> float:
        step: float = median(value for each in rounds for value in each[part]["seconds"])
        return step / int(rounds[0]["batch"])

    memory = [median(each["step"]["memory_gb"] for each in rounds) for rounds in (theirs, ours)]
    return {
        "reference_s": round(seconds(theirs, "step"), 3),
        "segfit_s": round(seconds(ours, "step"), 3),
        "wall_ratio": round(seconds(theirs, "step") / seconds(ours, "step"), 2),
        "memory_ratio": round(memory[0] / memory[1], 2),
        "overhead": round(seconds(ours, "step") / seconds(ours, "ready"), 2),
    }


if __name__ == "__main__":
    main()
