"""What the processes of the fault tests do."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from segfit.dataset.contents import FileHashes
from segfit.dataset.manifest import Case
from segfit.errors import StageError
from segfit.execution.execution import Execution
from segfit.labels import LabelScheme
from segfit.preprocessing import dataset
from segfit.preprocessing.dataset import preprocess_dataset
from segfit.preprocessing.store import CaseStore, DamagedCase
from segfit.specs import Normalization, PreprocessingSpec

SCHEME = LabelScheme.from_declaration({"background": 0, "organ": 1, "lesion": 2})
SPEC = PreprocessingSpec(
    orientation="canonical",
    transpose=(0, 1, 2),
    spacing_mm=(2.0, 1.0, 1.0),
    normalization=(Normalization(scheme="zscore"),),
)


def cases_of(folder: Path) -> tuple[Case, ...]:
    """Return the cases of a phantom dataset."""
    labels = sorted((folder / "labelsTr").iterdir())
    ids = [path.name.removesuffix(".nii.gz") for path in labels]
    return tuple(
        Case(id=name, images=(folder / "imagesTr" / f"{name}_0000.nii.gz",), label=label)
        for name, label in zip(ids, labels, strict=True)
    )


def fill(folder: Path, root: Path, workers: int | None = None) -> dict[str, str]:
    """Preprocess the dataset in `folder` into the store at `root`."""
    return preprocess_dataset(cases_of(folder), SPEC, SCHEME, CaseStore(root), execution=Execution(workers=workers))


def fill_at(folder: Path, root: Path, moment: float) -> dict[str, str]:
    """Do so at a moment, in seconds since 1970."""
    time.sleep(max(0.0, moment - time.time()))
    return fill(folder, root)


def fill_with_small_files(folder: Path, root: Path, most: int) -> int | None:
    """Return why that fails, an error number, where no file may have more than `most` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        fill(folder, root)
    except StageError as error:
        return error.__cause__.errno if isinstance(error.__cause__, OSError) else None
    return None


def kill_at_random_moments(folder: Path, root: Path, kills: int) -> None:
    """Kill `fill` by signal 9 while it is at work, `kills` times, going on each time; print in how many attempts.

    Every case that is there after a kill must be whole. A store that is complete is emptied.
    """
    number = len(cases_of(folder))
    for name in ("imports", "timed"):
        started = time.perf_counter()
        fill(folder, root.with_name(name))
        duration = time.perf_counter() - started
    generator = random.Random(4)
    attempts = 0
    while kills:
        attempts += 1
        child = os.fork()
        if child == 0:
            fill(folder, root)
            os._exit(0)
        time.sleep(generator.uniform(0.0, duration))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills -= os.WIFSIGNALED(status)
        check_whole(CaseStore(root), CaseStore(root).keys())
        if len(CaseStore(root).keys()) == number:
            shutil.rmtree(root)
    sys.stdout.write(str(attempts))


def check_whole(store: CaseStore, keys: Sequence[str]) -> None:
    """Fail if a case is not what was written."""
    for key in keys:
        damage = store.damage(key)
        if damage is not None:
            raise AssertionError(f"{damage.folder}: {damage.problem}")


def preprocess_or_be_killed_once(
    root: Path, spec: PreprocessingSpec, scheme: LabelScheme, room: float, since: float, item: tuple[Case, FileHashes]
) -> object:
    """Be killed in the middle of writing the first case."""
    mark = root.with_name("was-killed")
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return dataset._preprocess_case(root, spec, scheme, room, since, item)

    def killed(_: int) -> None:
        assert any(root.glob(".partial-*/image.b2nd"))
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = killed
    return dataset._preprocess_case(root, spec, scheme, room, since, item)


def damage_or_be_killed(root: Path, key: str) -> DamagedCase | None:
    """Be killed by a case that holds a file "sick"."""
    if (root / key / "sick").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    return CaseStore(root).damage(key)
