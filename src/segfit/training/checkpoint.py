"""The saved state of a training: one safetensors file per generation, whole or absent, checked when it is read.

    state/step-000001200.safetensors      tensors, and in the header: identity, progress, checksum
    state/step-000001350.safetensors      the newest; two generations are kept

A state belongs to one training, named by its identity; states of another identity are not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from segfit.errors import Problem, warning
from segfit.files import remove_leftovers, write_bytes

__all__ = ["GENERATIONS", "Checkpoints", "State", "write_tensors"]

_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError)

GENERATIONS = 2  # a state damaged on disk costs one interval, not the training


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Everything needed to go on: tensors by name and the JSON-able facts of the training's progress."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The states of the training `identity` in one folder, made when the first is saved; others' are passed over."""

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder
        self._identity = identity

    def save(self, state: State) -> None:
        """Write the state and drop generations beyond `GENERATIONS`; a failure leaves the older ones in place."""
        self._write(state)
        for path in self._newest_first()[GENERATIONS:]:
            path.unlink()

    def replace(self, state: State) -> None:
        """Write the state, and drop all others, later ones too, when it is there."""
        written = self._write(state)
        for path in self._newest_first():
            if path != written:
                path.unlink()

    def _write(self, state: State) -> Path:
        header = json.dumps({"identity": self._identity, "step": state.step, "facts": state.facts}, allow_nan=False)
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.tensors.items()}
        path = self._folder / f"step-{state.step:09d}.safetensors"
        write_tensors(path, tensors, {"state": header, "checksum": _checksum(header, tensors)})
        return path

    def load(self) -> tuple[State | None, tuple[Problem, ...]]:
        """Return the newest state that is whole and ours (or None), and a warning for each damaged one.

        Damaged states and states of another identity are deleted, so that they never displace a good generation.
        """
        damaged: list[Problem] = []
        remove_leftovers(self._folder)
        for path in self._newest_first():
            try:
                identity, state = _read(path)
            except _UNREADABLE as error:
                problem = f"the training state {path} is damaged ({error}); an older one is used if there is one"
                damaged.append(warning("damaged_state", problem, file=path))
            else:
                if identity == self._identity:
                    return state, tuple(damaged)
            path.unlink(missing_ok=True)
        return None, tuple(damaged)

    def peek(self) -> State | None:
        """Return the newest state that is whole and ours, or None; it only looks: others may be at work there."""
        for path in self._newest_first():
            with suppress(*_UNREADABLE):
                identity, state = _read(path)
                if identity == self._identity:
                    return state
        return None

    def delete(self) -> None:
        """Remove all states."""
        for path in self._newest_first():
            path.unlink()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _newest_first(self) -> list[Path]:
        return sorted(self._folder.glob("step-*.safetensors"), reverse=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write CPU tensors (contiguous) and string metadata as safetensors, whole or not at all."""
    write_bytes(path, save(dict(tensors), dict(metadata)))


def _read(path: Path) -> tuple[str, State]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if metadata["checksum"] != _checksum(metadata["state"], tensors):
        raise ValueError("its checksum does not match")
    header = json.loads(metadata["state"])
    return header["identity"], State(header["step"], tensors, header["facts"])


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
