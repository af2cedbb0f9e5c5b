"""The benchmark for GPUs, tried on a processor with networks of no size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpu_packages
import training_step

SCRIPT = Path(gpu_packages.__file__).with_name("gpu.sh")


def measure(work: Path, *parts: str) -> tuple[int, list[dict[str, Any]]]:
    """Run parts; return the exit code and the lines that there are by then."""
    command = [SCRIPT, "--device", "cpu", "--quick", "--python", sys.executable, "--work", work, *parts]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=False)
    return done.returncode, [json.loads(line) for line in (work / "gpu.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_part_leaves_a_line_and_is_run_once(tmp_path: Path) -> None:
    code, lines = measure(tmp_path, "packages", "peak", "nonsense", "waiting-picture")
    assert code == 1  # of the part that does not exist
    assert [line["part"] for line in lines] == ["packages", "peak", "waiting-picture"]
    assert lines[1]["tflops"]["fp32"] > 0
    assert all(0 <= where["data_wait_share"] <= 1 for where in lines[2]["where"].values())
    assert measure(tmp_path, "packages", "peak", "waiting-picture") == (0, lines)


@pytest.mark.slow
def test_steps_are_timed_with_each_switch(tmp_path: Path) -> None:
    code, lines = measure(tmp_path, "steps-hippocampus")
    assert code == 0
    variants = lines[0]["variants"]
    assert {"bf16", "bf16 channels last", "fp16", "fp32"} <= set(variants)
    assert all(one["step_s"] > 0 and one["share_of_bf16_peak"] > 0 for one in variants.values())


def test_packages_that_are_missing_are_named() -> None:
    assert gpu_packages.lacking("segfit") == []
    assert gpu_packages.lacking("no-such-package") == ["no-such-package"]


def test_ratios_are_of_seconds_a_sample() -> None:
    def rounds(step: float, ready: float, batch: int) -> list[dict[str, Any]]:
        times = {"step": {"seconds": [step], "memory_gb": 1.0}, "ready": {"seconds": [ready]}}
        return [times | {"batch": batch, "data_wait_s": 0.25}]

    alone = training_step.summary({"segfit": rounds(1.0, 0.5, 2)})
    assert (alone["segfit_s"], alone["overhead"], alone["data_wait_share"]) == (0.5, 2.0, 0.25)
    both = training_step.summary({"segfit": rounds(1.0, 0.5, 2), "reference": rounds(9.0, 6.0, 3)})
    assert (both["wall_ratio"], both["ready_ratio"], both["memory_ratio"]) == (6.0, 8.0, 1.0)
