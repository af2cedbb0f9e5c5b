"""Training on several devices: the first process does what the command line says, the others train with it.

Either torchrun starts all of them, or a command starts the others (``--devices``) as torchrun would.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from segfit.errors import InputError

if TYPE_CHECKING:
    from segfit.training.team import Team

__all__ = ["TEAM", "let_cublas_repeat", "on_devices", "with_team"]

_Exit = TypeVar("_Exit")

TEAM: ContextVar[Team | None] = ContextVar("TEAM", default=None)
"""The processes that train with the one that does the command."""

_LEAVING_S = 30.0  # then a process that was told to end is ended


def let_cublas_repeat() -> None:
    """Set what cuBLAS needs for it in the environment, before it is first used; what the user set stays."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def with_team(command: Callable[[], _Exit]) -> _Exit | int:
    """Do a command and return its exit code; a process that torchrun started as a further one helps until it ends."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        return command()
    if os.environ["RANK"] == "0":
        with _leading():
            return command()
    from segfit.training.distributed import Ranks
    from segfit.training.team import follow

    let_cublas_repeat()  # whether a training needs it is told when it is begun
    for number in (signal.SIGINT, signal.SIGTERM):  # the first process heeds them, and tells
        signal.signal(number, signal.SIG_IGN)
    with Ranks.joined() as ranks:
        follow(ranks, int(os.environ["LOCAL_RANK"]))
    return 0


@contextmanager
def _leading(place: str = "env://") -> Iterator[None]:
    """Meet the others, where the environment says or in another place, and lead them."""
    from segfit.training.distributed import Ranks
    from segfit.training.team import Team

    with Ranks.joined(place) as ranks, Team(ranks) as team:
        token = TEAM.set(team)
        try:
            yield
        finally:
            TEAM.reset(token)


@contextmanager
def on_devices(number: int | None) -> Iterator[None]:
    """Train on so many devices of this machine, by as many processes; None: by this one, or as torchrun has it."""
    if number is None or (number == 1 and TEAM.get() is None):
        yield
        return
    if TEAM.get() is not None:
        raise InputError("torchrun says how many processes there are", "leave out --devices")
    import torch

    from segfit.training.threads import kept_threads

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "segfit"}
    with kept_threads(max(1, torch.get_num_threads() // number)), ExitStack() as stack:
        for rank in range(1, number):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)}
            stack.enter_context(_helper(place | numbers))
        with _leading(f"tcp://localhost:{port}?rank=0&world_size={number}"):
            yield


@contextmanager
def _helper(environment: Mapping[str, str]) -> Iterator[None]:
    """Have a process that trains with this one, and wait for its end."""
    process = subprocess.Popen(  # Ctrl-C is for the first one
        [sys.executable, "-m", "segfit"], env={**os.environ, **environment}, start_new_session=True
    )
    try:
        yield
    finally:
        try:
            process.wait(_LEAVING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
