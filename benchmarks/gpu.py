"""One part of what `gpu.sh` measures. The last line of stdout is JSON.

    python benchmarks/gpu.py PART [--device cuda:0] [--quick] [--work DIR] [--dataset FOLDER] [--reference-python PATH]

`peak` is the rate of matrix products; `steps-NETWORK` times steps of a network with nnU-Net's recipe, whole and fed
ready tensors, each switch on and off, and `compiled-NETWORK` those that a training prepares for minutes;
`waiting-NETWORK` what steps wait for samples on disk, in memory and on the device; `reference-NETWORK` nnU-Net's
network and loss of the same sizes, as a separate program; `dataset`, `training` and `inference` are what a user would
type, on a dataset; `tests` are those marked gpu. `--quick` takes tiny networks and few steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from segfit import specs
from segfit.dataset.phantom import make_phantom
from segfit.errors import MemoryShortageError, Problem
from segfit.labels import LabelScheme
from segfit.networks.unet import build_network
from segfit.planning.augmentation import augmentation_for
from segfit.preprocessing.pipeline import CaseProperties, Preprocessed
from segfit.preprocessing.store import CaseStore, StoredCase
from segfit.specs import Configuration, NetworkSpec, Normalization, PreprocessingSpec, TrainingSpec
from segfit.training.learner import Learner
from steps import steps_of, synchronize

LABELS = LabelScheme.from_declaration({"background": 0, "a": 1, "b": 2})
CASES = 6
TRAINING_TIME = "5min"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Network:
    """Sizes that nnU-Net plans."""

    patch: tuple[int, ...]
    batch: int
    channels: int
    features: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.patch)

    def small(self) -> Network:
        """Return a tiny network of as many axes and channels."""
        return replace(self, patch=(16,) * self.ndim, batch=2, features=(4, 8, 8))


NETWORKS = {
    "hippocampus": Network((40, 56, 40), 9, 1, (32, 64, 128, 256)),
    "volume": Network((128, 128, 128), 2, 1, (32, 64, 128, 256, 320, 320)),
    "picture": Network((512, 512), 12, 3, (32, 64, 128, 256, 512, 512, 512, 512)),
}
SWITCHES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16 channels last": {"channels_last": True},
    "fp16": {"precision": "fp16"},
    "fp16 channels last": {"precision": "fp16", "channels_last": True},
    "fp32": {"precision": "fp32"},
}
PREPARED: dict[str, dict[str, bool]] = {
    "bf16 compiled": {"compiled": True},
    "bf16 graph": {"graph": True},
    "bf16 compiled graph": {"compiled": True, "graph": True},
}


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda:0"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, help="folder of projects; a temporary one when absent")
    parser.add_argument("--dataset", type=Path, help="in nnU-Net's layout; made up when absent")
    parser.add_argument("--reference-python", type=Path, default=Path(sys.executable))
    arguments = parser.parse_args(given)
    part, _, name = arguments.part.partition("-")
    task = {
        "peak": peak, "steps": switches, "compiled": prepared, "waiting": waiting, "reference": reference,
        "dataset": whole_dataset, "training": training, "inference": inference, "tests": tests,
    }[part]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = arguments.work or Path(folder)
        arguments.network = NETWORKS.get(name) and (NETWORKS[name].small() if arguments.quick else NETWORKS[name])
        print(json.dumps(machine(arguments.device) | task(arguments)))


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}


# ── how fast the device is ───────────────────────────────────────────────────────────────────────────────────────────


def peak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the rate of products of large matrices in 10^12 operations a second."""
    size = product_size(arguments)
    return {"tflops": {name: round(product_rate(kind, size, arguments.device), 3) for name, kind in PRECISIONS.items()}}


def product_size(arguments: argparse.Namespace) -> int:
    return 256 if arguments.quick else 8192


def product_rate(kind: torch.dtype, size: int, device: torch.device) -> float:
    matrix = torch.randn((size, size), device=device).to(kind)
    seconds = []
    for _ in range(8):
        synchronize(device)
        started = perf_counter()
        for _ in range(4):
            matrix @ matrix
        synchronize(device)
        seconds.append((perf_counter() - started) / 4)
    return 2 * size**3 / median(seconds[2:]) / 1e12


def operations(spec: NetworkSpec, network: Network) -> int:
    """Return the operations of a step: those of a forward pass, and twice as many backwards."""
    model = build_network(spec, deep_supervision=True, generator=torch.Generator()).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty((network.batch, network.channels, *network.patch), device="meta"))
    return 3 * int(counter.get_total_flops())


# ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def switches(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time steps with each switch on and off."""
    return variants(arguments, {name: (switch, id) for name, switch in SWITCHES.items()})


def prepared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time steps of what is compiled, or one graph, first."""
    if not hasattr(Learner, "accelerate"):
        return {"skipped": "steps are not compiled and make no graph"}
    told: list[Problem] = []

    def how(switch: dict[str, bool]) -> Callable[[Learner], object]:
        return lambda learner: learner.gradients.accelerate(specs.Acceleration(**switch), told.append)

    found = variants(arguments, {name: ({}, how(switch)) for name, switch in PREPARED.items()})
    return found | {"problems": [str(problem) for problem in told]}


Made = Callable[[Learner], object]


def variants(arguments: argparse.Namespace, kinds: dict[str, tuple[dict[str, Any], Made]]) -> dict[str, Any]:
    """Time steps by changes of the recipe and by what is done with the learner first."""
    device, network = arguments.device, arguments.network
    configuration, recipe = configuration_of(network), recipe_of(network)
    rate = product_rate(torch.bfloat16, product_size(arguments), device) * 1e12
    work, found = operations(configuration.network, network), {}
    with stored_cases(network) as cases:
        task = LABELS, cases, device
        for name, (changes, made) in kinds.items():
            changed = recipe.model_copy(update=changes)
            options = amount(arguments) | {"where": "device", "made": made}
            try:
                measured = steps_of(configuration, changed, *task, **options)
            except MemoryShortageError as error:
                found[name] = {"problem": str(error)}
                continue
            step, ready = (median(measured[part]["seconds"]) for part in ("step", "ready"))
            found[name] = {
                "step_s": round(step, 6),
                "ready_s": round(ready, 6),
                "overhead": round(step / ready, 4),
                "share_of_bf16_peak": round(work / ready / rate, 4),
                "data_wait_s": round(measured["data_wait_s"], 6),
                "memory_gb": round(measured["step"]["memory_gb"], 3),
            }
    return {"tflop_a_step": round(work / 1e12, 4), "bf16_tflops": round(rate / 1e12, 2), "variants": found}


def waiting(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time steps whose samples come from disk, from memory and from the device; a GPU has four threads that read."""
    network, found = arguments.network, {}
    task = configuration_of(network), recipe_of(network), LABELS
    with stored_cases(network) as cases:
        for where in ("disk", "memory", "device"):
            measured = steps_of(*task, cases, arguments.device, **amount(arguments), where=where)
            step = median(measured["step"]["seconds"])
            found[where] = {
                "step_s": round(step, 6),
                "overhead": round(step / median(measured["ready"]["seconds"]), 4),
                "data_wait_s": round(measured["data_wait_s"], 6),
                "data_wait_share": round(measured["data_wait_s"] / step, 4),
            }
    return {"where": found}


def amount(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.quick:
        return {"steps": 2, "limit_s": 5.0}
    return {"steps": 100 if arguments.device.type == "cuda" else 4, "limit_s": 12.0}


def recipe_of(network: Network) -> TrainingSpec:
    """Return nnU-Net's recipe with the precision that segfit has on a GPU."""
    return TrainingSpec(precision="bf16", augmentation=augmentation_for(network.patch, mirror_axes=range(network.ndim)))


def configuration_of(network: Network) -> Configuration:
    ndim, stages = network.ndim, len(network.features)
    return Configuration(
        name=f"{ndim}d",
        ndim=ndim,
        patch_size=network.patch,
        batch_size=network.batch,
        spacing_mm=(1.0,) * ndim,
        median_shape=tuple(map(float, network.patch)),
        batch_dice=True,
        preprocessing=PreprocessingSpec(
            orientation="stored",
            transpose=tuple(range(ndim)),
            spacing_mm=(1.0,) * ndim,
            normalization=(Normalization(scheme="none"),) * network.channels,
        ),
        network=NetworkSpec(
            kind="plain",
            ndim=ndim,
            in_channels=network.channels,
            num_outputs=LABELS.num_outputs,
            features=network.features,
            strides=((1,) * ndim, *(((2,) * ndim),) * (stages - 1)),
            kernels=((3,) * ndim,) * stages,
            encoder_convs=(2,) * stages,
            decoder_convs=(2,) * (stages - 1),
        ),
        memory_estimate=0,
    )


@contextmanager
def stored_cases(network: Network) -> Iterator[list[StoredCase]]:
    """Give cases a quarter larger than the patch, noise with two boxes in it, as preprocessing stores them."""
    shape = tuple(size + size // 4 for size in network.patch)
    box = tuple((0, size) for size in shape)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = CaseStore(Path(folder))
        for number in range(CASES):
            labels = np.zeros(shape, np.int16)
            for value in (1, 2):
                low = [int(generator.integers(0, size // 2)) for size in shape]
                labels[tuple(slice(a, a + size // 4) for a, size in zip(low, shape, strict=True))] = value
            image = generator.normal(labels, 1.0, (network.channels, *shape)).astype(np.float32)
            where = {class_.name: np.argwhere(labels == class_.values[0]).astype(np.int32) for class_ in LABELS.classes}
            properties = CaseProperties(
                case=f"case{number}",
                stored_shape=shape,
                stored_spacing_mm=(1.0,) * len(shape),
                affine=None,
                axis_order=tuple(range(len(shape))),
                axis_flip=(False,) * len(shape),
                transpose=tuple(range(len(shape))),
                spacing_mm=(1.0,) * len(shape),
                shape_before_crop=shape,
                crop_box=box,
                shape_after_crop=shape,
                shape=shape,
            )
            store.add(str(number), Preprocessed(image, labels, properties, where))
        yield [store.open(str(number)) for number in range(CASES)]


# ── beside nnU-Net ───────────────────────────────────────────────────────────────────────────────────────────────────


def reference(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time steps of nnU-Net's network and loss on ready tensors, in half precision on a GPU, as it trains."""
    network = arguments.network
    task = {
        "device": str(arguments.device),
        "patch": network.patch,
        "batch": network.batch,
        "channels": network.channels,
        "features": network.features,
        "outputs": LABELS.num_outputs,
        **amount(arguments),
    }
    program = str(Path(__file__).with_name("reference_network.py"))
    environment = dict(os.environ)
    if arguments.reference_python != Path(sys.executable):
        environment.pop("PYTHONPATH", None)  # packages there are for the other Python
    return told_last([str(arguments.reference_python), program, json.dumps(task)], environment)


# ── on a dataset ─────────────────────────────────────────────────────────────────────────────────────────────────────


def dataset_of(arguments: argparse.Namespace) -> Path:
    made = arguments.work / "Dataset900_Phantom"
    if arguments.dataset is None and not made.exists():
        make_phantom(made, cases=6, test_cases=2)
    return arguments.dataset or made


def whole_dataset(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time steps on a dataset by `training_step.py`."""
    steps = (
        ["--steps", "2", "--rounds", "1", "--set", "planning.base_features=4"] if arguments.quick else ["--steps", "50"]
    )
    program = str(Path(__file__).with_name("training_step.py"))
    given = ["--dataset", str(dataset_of(arguments)), "--work", str(arguments.work / "steps")]
    return told_last([sys.executable, program, *given, "--device", str(arguments.device), *steps])


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on a dataset and score the validation cases, in five minutes."""
    project = arguments.work / "project"
    size = ["--steps", "4", "--set", "planning.base_features=4"] if arguments.quick else ["--time", TRAINING_TIME]
    command = ["run", str(dataset_of(arguments)), "--out", str(project), "--device", str(arguments.device), *size]
    seconds = segfit(*command, "--json")
    result = next(project.rglob("training.json"))
    told = json.loads(result.read_text())
    events = [json.loads(line) for line in result.with_name("events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    summary = json.loads(next(project.rglob("summary.json")).read_text())
    return {
        "wall_s": round(seconds, 1),
        "configuration": told["configuration"],
        "steps": told["steps"],
        "step_s": told["seconds_per_step"],
        "data_wait_share": round(sum(event["data_wait"] for event in steps) / max(1e-9, steps[-1]["seconds"]), 4),
        "memory_gb": told["peak_memory_gb"],
        "dice": summary["mean_dice"],
    }


def inference(arguments: argparse.Namespace) -> dict[str, Any]:
    """Predict the test images by the model of `training`, with a fresh process."""
    images = dataset_of(arguments) / "imagesTs"
    model = arguments.work / "project" / "model"
    if not model.exists():
        return {"skipped": "there is no model: the part `training` comes before"}
    output = arguments.work / "predictions"
    given = ["--model", str(model), str(images), "-o", str(output), "--device", str(arguments.device), "--overwrite"]
    seconds = segfit("predict", *given)
    number = len(list(images.iterdir()))
    return {"wall_s": round(seconds, 2), "files": number, "s_a_file": round(seconds / number, 3)}


def tests(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    if not (find_spec("pytest") and find_spec("hypothesis")):
        return {"skipped": "pytest and hypothesis are not installed"}
    folder = Path(__file__).resolve().parents[1]
    given = ["-q", "-m", "gpu", "--card", str(arguments.device), "tests/training/test_on_gpu.py"]
    done = subprocess.run([sys.executable, "-m", "pytest", *given], cwd=folder, stdout=subprocess.PIPE, text=True)
    print(done.stdout, file=sys.stderr)
    return {"passed": done.returncode == 0, "outcome": done.stdout.splitlines()[-1]}


def segfit(*given: str) -> float:
    """Run a command; return its seconds. What it says goes to stderr."""
    started = perf_counter()
    subprocess.run([sys.executable, "-m", "segfit", *given], check=True, stdout=sys.stderr)
    return perf_counter() - started


def told_last(command: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{Path(command[0]).name} failed with code {done.returncode}, as told above")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()
