"""The verb ``doctor``: what this machine and installation are able to do."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter

import typer

from segfit.cli.common import AsJson, Device, print_states
from segfit.cli.help_pages import PROJECTS, add_verb
from segfit.errors import InputError, SegfitError

__all__ = ["add_to"]

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # all that OpenMP runtimes read about it


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    add_verb(app, PROJECTS, doctor)


def doctor(device: Device = None, as_json: AsJson = False) -> int:
    """Look at this machine and installation."""
    rows = _diagnosis(device or "auto")
    print_states(rows, as_json=as_json)
    return int(any(state == "bad" for _, state, _ in rows))


def _diagnosis(device: str) -> list[tuple[str, str, str]]:
    """Return (what, "good", "note" or "bad", what was found)."""
    import platform
    import shutil
    from importlib import metadata

    rows = [("python", "good", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for package in ("segfit", "torch", "numpy", "nibabel", "blosc2", "connected-components-3d"):
        try:
            rows.append((package, "good", metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "bad", "not installed; pip install segfit again"))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    rows.append(("disk", "good" if free > 5 else "note", f"{free:.0f} GB free in {Path.cwd()}"))
    try:
        rows += _machine(device)
    except InputError as error:
        rows.append(("device", "bad", str(error)))
    return rows


def _machine(device: str) -> list[tuple[str, str, str]]:
    from segfit.device import measure_hardware
    from segfit.text import duration

    machine = measure_hardware(device)
    memory = machine.free_memory_gb
    rows = [
        ("device", "good", f"{machine.device}: {machine.name}, {machine.threads} threads"),
        _waiting(),
        ("memory", "good" if memory > 4 else "note", f"{memory:.1f} GB free"),
        (
            "bf16",
            "good" if machine.fast_bf16 else "note",
            "fast here" if machine.fast_bf16 else "not in this hardware; trained in full precision",
        ),
    ]
    try:
        seconds = _trial_step(device)
        rows.append(("training step", "good", f"{duration(seconds)} for a small 3D network"))
    except SegfitError as error:
        rows.append(("training step", "bad", str(error)))
    return rows


def _waiting() -> tuple[str, str, str]:
    """Say how threads wait for each other; what spins takes the time of other processes and loses its own."""
    said = {name: os.environ[name] for name in _WAITING if name in os.environ}
    if [(name, value.lower()) for name, value in said.items()] == [("OMP_WAIT_POLICY", "passive")]:
        return "waiting threads", "good", "sleep (OMP_WAIT_POLICY=passive)"
    told = ", ".join(f"{name}={value}" for name, value in said.items()) or "OMP_WAIT_POLICY is not set"
    return "waiting threads", "note", f"may spin ({told}); slow beside other busy processes"


def _trial_step(device: str) -> float:
    """Train a tiny network for a moment, to see that it works."""
    import torch

    from segfit.device import resolve_device
    from segfit.networks.unet import build_network
    from segfit.specs import NetworkSpec

    spec = NetworkSpec(
        kind="plain",
        ndim=3,
        in_channels=1,
        num_outputs=2,
        features=(8, 16),
        strides=((1, 1, 1), (2, 2, 2)),
        kernels=((3, 3, 3), (3, 3, 3)),
        encoder_convs=(2, 2),
        decoder_convs=(2,),
    )
    target = resolve_device(device)
    network = build_network(spec, deep_supervision=False, generator=torch.Generator().manual_seed(0)).to(target)
    started = perf_counter()
    network(torch.zeros((1, 1, 32, 32, 32), device=target)).float().square().mean().backward()
    return perf_counter() - started
