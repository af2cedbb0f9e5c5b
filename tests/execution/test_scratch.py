from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from segfit.execution.scratch import IN_MEMORY, Scratch


@pytest.mark.parametrize("most", [0, 23, 24])
def test_arrays_are_zeros_that_can_be_written(tmp_path: Path, most: int) -> None:
    folder = tmp_path / "new"
    array = Scratch(most, folder).zeros((2, 3), np.float32)
    assert (array.shape, array.dtype, array.any()) == ((2, 3), np.float32, False)
    array[1] = 5
    assert array.tolist() == [[0, 0, 0], [5, 5, 5]]
    assert isinstance(array, np.memmap) == (most < 24)
    assert folder.exists() == (most < 24)
    assert not list(tmp_path.rglob("*.*"))
    assert not isinstance(IN_MEMORY.zeros((2, 3), np.float32), np.memmap)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="disk space is reserved where the system can")
def test_a_full_disk_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(code: int) -> None:
        def reserve(*_: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", reserve)

    refusing(errno.ENOSPC)
    with pytest.raises(OSError, match="No space"):
        Scratch(0, tmp_path).zeros((2, 3), np.float32)
    refusing(errno.EOPNOTSUPP)
    assert Scratch(0, tmp_path).zeros((2, 3), np.float32).shape == (2, 3)
