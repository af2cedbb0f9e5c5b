"""What the machine offers: device, memory, arithmetic; whether its kernels are to repeat themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

from segfit.errors import InputError
from segfit.execution.memory import free_memory_gb
from segfit.execution.processors import available_workers
from segfit.text import count

if TYPE_CHECKING:
    import torch

__all__ = ["Hardware", "deterministic_kernels", "is_memory_shortage", "measure_hardware", "resolve_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """The machine as the planner sees it.

    `free_memory_gb` is RAM on a CPU; on a GPU it is device memory, with what torch holds there without using it.
    """

    device: str  # "cpu", "cuda:0", "mps"
    name: str
    threads: int
    free_memory_gb: float
    fast_bf16: bool  # bf16 matrix arithmetic in hardware

    @property
    def kind(self) -> Literal["cpu", "cuda", "mps"]:
        """Device family."""
        return self.device.split(":")[0]  # type: ignore[return-value]

    @property
    def machine(self) -> str:
        """What steps are measured on, in words."""
        return f"{self.kind} {self.name}, {self.threads} threads"


def resolve_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; raise `InputError` if it is absent."""
    import torch

    if not isinstance(name, str):
        raise InputError(f"a device is named by text, got {name!r}", "known are auto, cpu, cuda, cuda:N and mps")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}", "known are auto, cpu, cuda, cuda:N and mps") from None
    if device.type == "cuda":
        there = torch.cuda.device_count()
        if (device.index or 0) >= there:
            raise InputError(
                f"device {name} was asked for, this machine has {count(there, 'CUDA device')}", "use --device cpu"
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps was asked for and is not available here", "use --device cpu")
    if device.type not in ("cpu", "mps"):
        raise InputError(f"unknown device {name!r}", "known are auto, cpu, cuda, cuda:N and mps")
    return device


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Have torch use only kernels that give the same bits again, in the whole process; when all who want it are
    done, all is as it was.

    Without `wanted` nothing is changed. Raises `InputError` where there is no such kernel, and on CUDA where the
    environment lacks `CUBLAS_WORKSPACE_CONFIG`, which has to be set before matrices are first multiplied there.
    """
    if not wanted:
        yield
        return
    _SWITCHES.use()
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "CUBLAS_WORKSPACE_CONFIG" in text:
            raise InputError(
                "deterministic kernels need the environment variable CUBLAS_WORKSPACE_CONFIG on CUDA",
                "set it to :4096:8 before the program starts",
            ) from None
        if "does not have a deterministic implementation" in text:
            raise InputError(
                f"{text.split()[0]} has no deterministic kernel on this device",
                "leave out training.deterministic, or the plug-in that needs it",
            ) from None
        raise
    finally:
        _SWITCHES.give_back()


def is_memory_shortage(error: Exception) -> bool:
    """Whether an allocation failed: torch has an exception of its own for GPUs only."""
    import torch

    text = str(error)
    words = ["can't allocate memory", "out of memory", "could not create a memory object", "can't start new thread"]
    words.append("ALLOC_FAILED")  # of cuDNN and cuBLAS
    # oneDNN says more of a primitive that it does not have; in these words alone it had no room for one.
    alone = text == "could not create a primitive"
    return alone or isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in text for word in words)


class _Switches:
    """Torch's switches, the whole process's: the first thread sets them, the last one has them as they were."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, (0, False, False)

    def use(self) -> None:
        import torch

        memory: Any = torch.utils.deterministic
        with self._lock:
            if not self._users:
                mode = torch.get_deterministic_debug_mode()
                self._before = mode, torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
                torch.use_deterministic_algorithms(True)
                torch.backends.cudnn.benchmark = False
                memory.fill_uninitialized_memory = False  # it is for finding what reads too early
            self._users += 1

    def give_back(self) -> None:
        import torch

        memory: Any = torch.utils.deterministic
        with self._lock:
            self._users -= 1
            if not self._users:
                mode, torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory = self._before
                torch.set_deterministic_debug_mode(mode)


_SWITCHES = _Switches()


def measure_hardware(name: str = "auto") -> Hardware:
    """Look at the machine; `name` as in `resolve_device`. Where torch is not installed, only the CPU is seen.

    torch is not loaded to find out that there is nothing but a CPU.
    """
    if name == "cpu" or (name == "auto" and (find_spec("torch") is None or not _may_have_accelerator())):
        return _processor()
    import torch

    device = resolve_device(name)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        fast = torch.cuda.get_device_capability(device)[0] >= 8
        return Hardware(
            device=str(device),
            name=torch.cuda.get_device_name(device),
            threads=available_workers(),
            free_memory_gb=free / 2**30,
            fast_bf16=fast,
        )
    return _processor() if device.type == "cpu" else replace(_processor(), device=str(device), fast_bf16=False)


def _may_have_accelerator() -> bool:
    """Whether torch could find an accelerator: on Linux each has a device file."""
    if sys.platform != "linux":
        return True
    return any(any(Path("/dev").glob(pattern)) for pattern in ("nvidia*", "nvhost*", "kfd", "dxg"))


def _processor() -> Hardware:
    return Hardware(
        device="cpu",
        name=_processor_name(),
        threads=available_workers(),
        free_memory_gb=free_memory_gb(),
        fast_bf16=_cpu_has_bf16(),
    )


def _cpu_flags() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.exists() else ""


def _cpu_has_bf16() -> bool:
    flags = _cpu_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _processor_name() -> str:
    for line in _cpu_flags().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"
