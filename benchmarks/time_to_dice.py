"""Dice against wall time beside the reference, on the same processor cores, scored on the same cases set aside before.

    python benchmarks/time_to_dice.py --nnunet PYTHON_OR_BIN_DIR --data FOLDER --work DIR --results FILE
                                      [--sets hippocampus,nuclei] [--reference-minutes 40] [--minutes 2,5,10,20]

`--nnunet` is the Python, or the folder of the commands, of an environment with nnunetv2 2.8.1, which runs as a program
of its own. It trains fold 0 of `3d_fullres` (`2d` for pictures) for one epoch first; from that follows which of its
trainers of 1, 5, 10, 20, 50, 100 and 250 epochs, each with its whole schedule, ends nearest `--reference-minutes`, and
that one is trained and compared with. Its time is that of fingerprint, plan, preprocessing and training (with its own
validation); segfit's is that of the whole run. Neither counts the prediction of what was set aside.

An epoch takes minutes to half an hour on two cores: plan for twice `--reference-minutes` and the sum of `--minutes` for
each set, on a machine with nothing else to do. Every training and run appends one line of JSON to FILE and is not done
again, so the same command goes on after an interruption; lines of another processor are refused. The last line of
stdout is JSON: `segfit_minutes` is the smallest budget that reached the reference's Dice, and `wall_ratio` how many
times longer the reference took than that run; both are null where no budget did.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from economy import (
    CommandFailedError,
    Line,
    Measured,
    Run,
    add_run_options,
    append,
    complete,
    ended_by_signals,
    measured,
    numbers,
    recorded,
    scores,
    where,
)
from set_aside import SETS, Parted, part

_EPOCHS = (1, 5, 10, 20, 50, 100, 250)  # of the reference's trainers
_EPOCH_TIME = re.compile(r"Epoch time: ([\d.]+) s")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet", type=Path, required=True, help="Python or folder of commands with nnunetv2 2.8.1")
    parser.add_argument("--results", type=Path, required=True, help="file of lines of JSON")
    parser.add_argument("--reference-minutes", type=float, default=40)
    parser.add_argument("--seed", type=int, default=0)
    add_run_options(parser, sets="hippocampus,nuclei", minutes="2,5,10,20")
    arguments = parser.parse_args(given)
    if not (arguments.data and arguments.work):
        parser.error("give the folder of the datasets with --data and a folder to work in with --work")
    refuse_other_machines(arguments.results)
    with ended_by_signals():
        print(json.dumps({name: compare(SETS[name], arguments) for name in arguments.sets.split(",")}))


def refuse_other_machines(results: Path) -> None:
    here = where()
    for line in recorded(results):
        if any(line[key] != here[key] for key in ("processor", "cores")):
            raise SystemExit(f"{results} has lines of {line['cores']} cores of {line['processor']}; give another file")


def compare(dataset: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train both programs on a dataset; return which budget reaches the reference's Dice."""
    parted = part(arguments.data / dataset, arguments.work)
    reference = Reference(arguments.nnunet, parted, arguments.work / "reference")
    theirs = nearest_training(reference, 60 * arguments.reference_minutes, arguments.results)
    settings = ("device=cpu", *arguments.settings)
    budgets = sorted(numbers(arguments.minutes))
    ours = complete([Run(dataset, each, arguments.seed, settings=settings) for each in budgets], arguments)
    reached = [line for line in ours if line["dice"] is not None and line["dice"] >= theirs["dice"]]
    return {
        "reference_epochs": theirs["epochs"],
        "reference_minutes": round(theirs["wall_s"] / 60, 2),
        "reference_dice": theirs["dice"],
        "segfit": [(line["minutes"], line.get("wall_s"), line["dice"]) for line in ours],
        "segfit_minutes": reached[0]["minutes"] if reached else None,
        "wall_ratio": round(theirs["wall_s"] / reached[0]["wall_s"], 2) if reached else None,
    }


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────────


class Reference:
    """The reference as a separate program with folders of its own."""

    def __init__(self, nnunet: Path, parted: Parted, work: Path) -> None:
        self.parted, self._work = parted, work
        self.dataset = parted.dataset.name
        self._commands = nnunet if nnunet.is_dir() else nnunet.parent
        self._id = str(int(self.dataset.removeprefix("Dataset").partition("_")[0]))
        volumes = json.loads((parted.dataset / "dataset.json").read_text())["file_ending"] == ".nii.gz"
        self._configuration = "3d_fullres" if volumes else "2d"
        self._cores = str(where()["cores"])
        for name in ("raw", "preprocessed", "results", "logs"):
            (work / name).mkdir(parents=True, exist_ok=True)
        link = work / "raw" / self.dataset
        link.unlink(missing_ok=True)
        link.symlink_to(parted.dataset.resolve())
        self._environment = os.environ | {
            "nnUNet_raw": str(work / "raw"),
            "nnUNet_preprocessed": str(work / "preprocessed"),
            "nnUNet_results": str(work / "results"),
            "nnUNet_n_proc_DA": self._cores,
            "nnUNet_def_n_proc": self._cores,
        }

    def prepare(self) -> float:
        """Measure fingerprint, plan and preprocessing; return the seconds."""
        shutil.rmtree(self._work / "preprocessed" / self.dataset, ignore_errors=True)
        workers = ("-npfp", self._cores, "-np", self._cores)
        what = ("-d", self._id, "-c", self._configuration, *workers)
        return self._run("nnUNetv2_plan_and_preprocess", *what).wall_s

    def train(self, epochs: int) -> Measured:
        shutil.rmtree(self._work / "results" / self.dataset, ignore_errors=True)
        trainer = self._trainer(epochs)
        return self._run("nnUNetv2_train", self._id, self._configuration, "0", "-tr", trainer, "-device", "cpu")

    def score(self, epochs: int) -> Line:
        """Predict what was set aside with the last training, and score it."""
        predictions = self._work / "predictions" / self.dataset
        shutil.rmtree(predictions, ignore_errors=True)
        files = ("-i", str(self.parted.images), "-o", str(predictions))
        model = ("-d", self._id, "-c", self._configuration, "-f", "0", "-tr", self._trainer(epochs))
        self._run("nnUNetv2_predict", *files, *model, "-device", "cpu", "-npp", "1", "-nps", "1")
        return scores(self.parted, predictions, self._work / "logs" / self.dataset)

    def _trainer(self, epochs: int) -> str:
        return f"nnUNetTrainer_{epochs}epoch{'s' if epochs > 1 else ''}"

    def _run(self, command: str, *arguments: str) -> Measured:
        log = self._work / "logs" / self.dataset / command
        try:
            return measured([str(self._commands / command), *arguments], log, self._environment)
        except CommandFailedError as failure:
            raise SystemExit(f"{command} failed: {failure}; all that it said is in {log}") from failure


def nearest_training(reference: Reference, seconds: float, results: Path) -> Line:
    """Return the line of the training that ends nearest a time."""
    one = training(reference, 1, results)
    besides = one["wall_s"] - one["epoch_s"]
    return training(reference, nearest(seconds, one["epoch_s"], besides), results)


def nearest(seconds: float, epoch_s: float, besides_s: float) -> int:
    """Return the number of epochs whose trainer ends nearest a time, given what an epoch and all else take."""
    return min(_EPOCHS, key=lambda epochs: abs(besides_s + epochs * epoch_s - seconds))


def training(reference: Reference, epochs: int, results: Path) -> Line:
    """Return the line of a training of the reference; it is trained if there is none."""
    lines = [line for line in recorded(results) if line["program"] == "nnunet" and line["dataset"] == reference.dataset]
    for line in lines:
        if line["epochs"] == epochs:
            return line
    prepare_s = lines[0]["prepare_s"] if lines else reference.prepare()
    print(f"{reference.dataset}: the reference trains {epochs} epoch(s)", flush=True)
    done = reference.train(epochs)
    line = {"program": "nnunet", **where(), "dataset": reference.dataset, "epochs": epochs, **done.figures()}
    line |= {"prepare_s": round(prepare_s, 1), "train_s": round(done.wall_s, 1)}
    line["wall_s"] = round(prepare_s + done.wall_s, 1)
    line["epoch_s"] = float(_EPOCH_TIME.findall(done.stdout)[0])
    line |= reference.score(epochs)
    append(results, line)
    print(f"{reference.dataset}: {line['wall_s'] / 60:.1f} min, Dice {line['dice']:.3f}", flush=True)
    return line


if __name__ == "__main__":
    main()
