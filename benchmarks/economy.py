"""What a time budget buys: whole runs of six datasets by the command a user types, scored on cases set aside before.

    python benchmarks/economy.py --data FOLDER --work DIR --results FILE [--sets hippocampus,nuclei] [--minutes 2,5]
                                 [--seeds 0,1,2] [--set KEY=VALUE ...] [--label NAME] [--busy N]
    python benchmarks/economy.py --results FILE --table

FOLDER holds the datasets of `set_aside.SETS`, which also parts them. Each run appends one line of JSON to FILE; what
has a line is not run again, so the same command goes on after an interruption. A run that fails has its exit code and
last message in its line and does not stop the others; it is tried again when its line is deleted. Projects stay under
DIR, without their preprocessed cases. `--busy N` keeps N single-threaded processes busy beside the runs.

`--table` prints the Dice of every variant (label and settings), the mean over its seeds, and how each further variant
differs from the first: paired by set, minutes and seed; mean and standard error over the sets. The last line of stdout
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import segfit
from segfit.device import measure_hardware
from set_aside import SETS, Parted, part

SEGFIT = [sys.executable, "-m", "segfit"]
_BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(10**6):\n        pass"
Line = dict[str, Any]


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="file of lines of JSON")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    parser.add_argument("--label", default="", help="name of the variant")
    parser.add_argument("--busy", type=int, default=0, help="busy processes beside the runs")
    parser.add_argument("--seeds", default="0")
    add_run_options(parser, sets=",".join(SETS), minutes="2,5,10,20")
    arguments = parser.parse_args(given)
    if arguments.table:
        show(recorded(arguments.results))
        return
    runs = [
        Run(SETS.get(name, name), minutes, seed, arguments.label, tuple(arguments.settings), arguments.busy)
        for seed, minutes, name in product(
            map(int, arguments.seeds.split(",")), numbers(arguments.minutes), arguments.sets.split(",")
        )
    ]
    with ended_by_signals(), busy(arguments.busy):
        lines = complete(runs, arguments)
    told = ("dataset", "minutes", "seed", "wall_s", "dice")
    print(json.dumps([{key: line.get(key) for key in told} for line in lines]))


def add_run_options(parser: argparse.ArgumentParser, *, sets: str, minutes: str) -> None:
    """Add the options that say what is run."""
    parser.add_argument("--data", type=Path, help="folder of the datasets")
    parser.add_argument("--work", type=Path, help="folder for parted datasets and projects")
    parser.add_argument("--sets", default=sets, help=f"of {', '.join(SETS)}, or other folders of the data")
    parser.add_argument("--minutes", default=minutes, help="time budgets")
    parser.add_argument("--set", dest="settings", metavar="KEY=VALUE", action="append", default=[], help="repeatable")


def numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",")]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Run:
    """What makes a run the same as another."""

    dataset: str
    minutes: float
    seed: int
    label: str = ""
    settings: tuple[str, ...] = ()
    busy: int = 0

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Run:
        return cls(**{item.name: line[item.name] for item in fields(cls)} | {"settings": tuple(line["settings"])})

    @property
    def variant(self) -> str:
        beside = [f"{self.busy} busy"] if self.busy else []
        return ", ".join([*([self.label] if self.label else []), *self.settings, *beside]) or "default"

    @property
    def folder(self) -> str:
        """A name for its project; settings may hold any character."""
        name = f"{self.dataset}-{self.minutes:g}m-{self.seed}-{self.variant}"
        return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def complete(runs: Iterable[Run], arguments: argparse.Namespace) -> list[Line]:
    """Return the lines of all runs; those that have none are run."""
    if not (arguments.data and arguments.work):
        raise SystemExit("give the folder of the datasets with --data and a folder to work in with --work")
    found = {Run.of(line): line for line in recorded(arguments.results) if line["program"] == "segfit"}
    lines = []
    for run in runs:
        if run not in found:
            parted = part(arguments.data / run.dataset, arguments.work)
            line = measure(run, parted, arguments.work / "projects" / run.folder)
            append(arguments.results, line)
            outcome = f"Dice {line['dice']:.3f}" if line["dice"] is not None else f"failed: {line['error']}"
            print(f"{run.dataset}, {run.minutes:g} min, seed {run.seed}, {run.variant}: {outcome}", flush=True)
        lines.append(found.get(run) or line)
    return lines


def measure(run: Run, parted: Parted, project: Path) -> Line:
    """Run, predict and score; return a line of results."""
    log = project.with_name(f"{project.name}-out")
    for folder in (project, log):
        shutil.rmtree(folder, ignore_errors=True)
    settings = [word for setting in (f"seed={run.seed}", *run.settings) for word in ("--set", setting)]
    command = [*SEGFIT, "run", str(parted.dataset), "--time", f"{run.minutes:g}m", "--out", str(project), "--json"]
    line = {"program": "segfit", **where(), **asdict(run), "exit_code": 0, "error": None, "dice": None}
    try:
        done = measured([*command, *settings], log / "run", accepted=(0, 3))  # 3: its model should not be used
        line["exit_code"] = done.exit_code
        result = json.loads(done.stdout)
        line |= done.figures() | {"verdict": result.get("verdict"), "trained": trained(project)}
        line["internal_dice"] = result.get("dice", {}).get("cross-validation", {}).get("mean")
        predictions = log / "predictions"
        model = result.get("model", str(project / "model"))
        predict = [*SEGFIT, "predict", "--model", model, "-i", str(parted.images), "-o", str(predictions)]
        line["predict_s"] = measured(predict, log / "predict").figures()["wall_s"]
        line |= scores(parted, predictions, log)
    except CommandFailedError as failure:
        line |= failure.figures | line | {"exit_code": failure.exit_code, "error": failure.message}
    shutil.rmtree(project / "cases", ignore_errors=True)
    return line


def scores(parted: Parted, predictions: Path, log: Path) -> Line:
    """Score predictions of what was set aside."""
    command = [*SEGFIT, "evaluate", str(parted.dataset), "-p", str(predictions), "-r", str(parted.labels), "--json"]
    summary = json.loads(measured(command, log / "evaluate").stdout)
    return {
        "dice": summary["mean_dice"],
        "dice_per_class": {name: score["dice"] for name, score in summary["mean"].items()},
        "scored_cases": len(summary["cases"]),
    }


def trained(project: Path) -> list[Line]:
    """Return what was trained, as far as the project's files say."""
    plan = json.loads((project / "plan.json").read_text())
    rows = []
    for path in sorted(project.glob("runs/*/fold-*/*/training.json")):
        training, name = json.loads(path.read_text()), path.parents[2].name
        configuration = plan.get("configurations", {}).get(name, {})
        rows.append(
            {
                "configuration": name,
                "fold": int(path.parents[1].name.removeprefix("fold-")),
                "patch": configuration.get("patch_size"),
                "batch": configuration.get("batch_size"),
                "features": configuration.get("network", {}).get("features"),
                "spacing_mm": configuration.get("spacing_mm"),
                "precision": plan.get("training", {}).get(name, {}).get("precision"),
                "steps": training.get("steps"),
                "seconds": training.get("seconds"),
            }
        )
    return rows


def where() -> Line:
    """Return when, by which version and on which machine something is measured."""
    machine = measure_hardware()
    repository = ["git", "-C", str(Path(segfit.__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(repository, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": segfit.__version__,
        "commit": commit or None,
        "processor": machine.name,
        "bf16": machine.fast_bf16,
        "cores": machine.threads,
    }


def recorded(results: Path) -> list[Line]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append(results: Path, line: Line) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a") as handle:
        handle.write(json.dumps(line) + "\n")


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Measured:
    """What a command took; the peak is that of its largest process."""

    exit_code: int
    wall_s: float
    cpu_s: float
    peak_memory_gb: float
    stdout: str
    stderr: str

    def figures(self) -> Line:
        return {
            "wall_s": round(self.wall_s, 1),
            "cpu_s": round(self.cpu_s, 1),
            "peak_memory_gb": round(self.peak_memory_gb, 2),
        }


class CommandFailedError(Exception):
    """A command ended with an exit code other than 0."""

    def __init__(self, done: Measured) -> None:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        self.exit_code, self.message, self.figures = done.exit_code, lines[-1] if lines else "", done.figures()
        super().__init__(f"exit code {self.exit_code}: {self.message}")


def measured(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    accepted: Sequence[int] = (0,),
) -> Measured:
    """Run a command to its end, which has an accepted exit code; what it says is kept in the folder `log`."""
    log.mkdir(parents=True, exist_ok=True)
    with (log / "stdout.txt").open("wb") as out, (log / "stderr.txt").open("wb") as error:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=error)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    said = [(log / name).read_text(errors="replace") for name in ("stdout.txt", "stderr.txt")]
    cpu = usage.ru_utime + usage.ru_stime
    done = Measured(process.returncode, wall, cpu, usage.ru_maxrss / 2**20, *said)
    if done.exit_code not in accepted:
        raise CommandFailedError(done)
    return done


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Have a termination end the processes that were started, as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keep processes busy; each also ends by itself when this process is gone."""
    command = [sys.executable, "-c", _BUSY, str(os.getpid())]
    processes = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────

Cell = tuple[str, float]  # set, minutes
Scores = dict[int, float]  # Dice by seed


def show(lines: Sequence[Line]) -> None:
    """Print the runs that failed, a table for each variant, and the differences from the first."""
    for line in lines:
        if line["program"] == "segfit" and line["dice"] is None:
            run = Run.of(line)
            print(f"failed: {run.dataset}, {run.minutes:g} min, seed {run.seed}, {run.variant}: {line['error']}\n")
    variants = by_variant(lines)
    printed: Line = {"dice": {}, "difference": {}}
    for name, scored in variants.items():
        cells = {cell: mean(seeds.values()) for cell, seeds in scored.items()}
        print(f"Dice, {name} (mean of {max(map(len, scored.values()))} seed(s))\n")
        print(markdown(cells) + "\n")
        printed["dice"][name] = nested(cells)
    first, *others = variants
    for name in others:
        cells = differences(variants[first], variants[name])
        print(f"Difference of Dice, {name} minus {first}\n")
        print(markdown(cells, signed=True) + "\n")
        over_sets = {minutes: mean_and_error(values) for minutes, values in columns(cells).items()}
        for minutes, (difference, error, number) in over_sets.items():
            print(f"{minutes:g} min: {difference:+.4f}, standard error {error or 0:.4f}, {number} sets")
        printed["difference"][name] = {f"{minutes:g}": figures for minutes, figures in over_sets.items()}
    print(json.dumps(printed))


def by_variant(lines: Sequence[Line]) -> dict[str, dict[Cell, Scores]]:
    """Return the Dice by variant, set and minutes, and seed, of the runs that did not fail."""
    found: dict[str, dict[Cell, Scores]] = {}
    for line in lines:
        if line["program"] == "segfit" and line["dice"] is not None:
            run = Run.of(line)
            found.setdefault(run.variant, {}).setdefault((run.dataset, run.minutes), {})[run.seed] = line["dice"]
    if not found:
        raise SystemExit("no run has a Dice yet")
    return found


def differences(first: Mapping[Cell, Scores], other: Mapping[Cell, Scores]) -> dict[Cell, float]:
    """Return the mean of the other minus the first over the seeds that both have."""
    found = {}
    for cell, seeds in other.items():
        shared = first.get(cell, {}).keys() & seeds.keys()
        if shared:
            found[cell] = mean(seeds[seed] - first[cell][seed] for seed in shared)
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None, int]:
    """Return mean, standard error (None of a single value) and number."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return round(mean(values), 5), None if error is None else round(error, 5), len(values)


def columns(cells: Mapping[Cell, float]) -> dict[float, list[float]]:
    return {minutes: [value for (_, m), value in cells.items() if m == minutes] for minutes in minutes_of(cells)}


def minutes_of(cells: Iterable[Cell]) -> list[float]:
    return sorted({minutes for _, minutes in cells})


def nested(cells: Mapping[Cell, float]) -> Line:
    sets = dict.fromkeys(name for name, _ in cells)
    return {name: {f"{m:g}": round(value, 5) for (n, m), value in cells.items() if n == name} for name in sets}


def markdown(cells: Mapping[Cell, float], *, signed: bool = False) -> str:
    """Return a table: a row a set and one of their means, where no set is missing; a column a budget."""
    names, budgets = sorted({name for name, _ in cells}), minutes_of(cells)
    values = dict(cells)
    for minutes, column in columns(cells).items():
        if len(column) == len(names):
            values["mean", minutes] = mean(column)
    form = "{:+.3f}" if signed else "{:.3f}"
    rows = [["set", *(f"{minutes:g} min" for minutes in budgets)], ["---"] * (len(budgets) + 1)]
    for name in [*names, "mean"]:
        row = [values.get((name, minutes)) for minutes in budgets]
        rows.append([name.partition("_")[2] or name, *("" if value is None else form.format(value) for value in row)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
