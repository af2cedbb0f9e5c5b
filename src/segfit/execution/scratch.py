"""Arrays that need not be in memory: large ones are mapped from files that vanish with them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["IN_MEMORY", "Scratch"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class Scratch:
    """Where arrays are made: in memory up to `largest` bytes each, larger ones in a file without a name in `folder`.

    The system keeps as much of such a file in memory as there is room for, and its disk space is reserved when it is
    made: `OSError` if there is none. `folder` None is the system's own for temporary files.
    """

    largest: float = inf
    folder: Path | None = None

    def zeros(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Return a new array of zeros."""
        num_bytes = prod(shape) * np.dtype(dtype).itemsize
        if num_bytes <= self.largest:
            return np.zeros(shape, dtype)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix=".segfit-", dir=self.folder) as file:  # mapped, it outlives its handle
            _reserve(file.fileno(), num_bytes)
            return np.memmap(file, np.dtype(dtype), "w+", shape=tuple(shape))


def _reserve(file: int, num_bytes: int) -> None:
    """Take the disk space of a file where the system can: a full disk later on would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        if error.errno in _FULL:
            raise


IN_MEMORY = Scratch()
