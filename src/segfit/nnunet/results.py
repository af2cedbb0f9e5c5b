"""What nnU-Net leaves of a dataset: the folder of its models, and the zip that it exports.

Dataset123_Name/
inference_information.json            which model, or pair of them, was best in cross-validation
ensembles/<pair>/postprocessing.json
<trainer>__<plans>__<configuration>/
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from segfit.bundle.bundle import Bundle
from segfit.bundle.files import opened_zip, require_no_bomb
from segfit.connected_components import PostprocessingStep
from segfit.errors import InputError, reason_of
from segfit.files import read_json
from segfit.nnunet.models import is_nnunet_model, read_nnunet_model
from segfit.nnunet.postprocessing import read_postprocessing
from segfit.text import gigabytes, listing

__all__ = ["is_results", "read_results"]

_INFORMATION = "inference_information.json"
_USED = (".json", ".pth", ".pkl")


def is_results(path: Path) -> bool:
    """Return whether a path is the folder of a dataset with models in it, or a zip."""
    return path.suffix.lower() == ".zip" if path.is_file() else bool(_models(path))


def read_results(
    path: Path, folds: Sequence[int | str] | None = None, **how: str | None
) -> tuple[list[Bundle], tuple[PostprocessingStep, ...] | None]:
    """Read the models that nnU-Net found to be best, or the only one there is, and what is done to their average.

    What is done to a single model stands in its manifest; `how` is for `read_nnunet_model`. Raises `InputError` if it
    cannot be told which is meant.
    """
    if path.is_file():
        with _unpacked(path) as folder:
            return _read(folder, path, folds, how)
    return _read(path, path, folds, how)


def _read(
    folder: Path, source: Path, folds: Sequence[int | str] | None, how: dict[str, str | None]
) -> tuple[list[Bundle], tuple[PostprocessingStep, ...] | None]:
    there = _models(folder)
    information = folder / _INFORMATION
    if not information.is_file():
        if len(there) > 1:
            found = listing([model.name for model in there])
            action = "give one of them, several to average them, or run nnUNetv2_find_best_configuration"
            raise InputError(f"{source} holds {len(there)} models, {found}, and nothing says which is best", action)
        return [read_nnunet_model(there[0], folds, **how)], None
    raw = read_json(information)
    try:
        best = raw["best_model_or_ensemble"]
        chosen = best["selected_model_or_models"]
        names = [f"{one['trainer']}__{one['plans_identifier']}__{one['configuration']}" for one in chosen]
        folds = [str(fold) for fold in raw["folds"]] if folds is None else folds
        together = PurePosixPath(str(best["postprocessing_file"])).parent.name
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{information} is damaged ({reason_of(error)})", "give the folder of one model") from None
    missing = [name for name in names if folder / name not in there]
    if missing or not names:
        problem = f"{source} lacks {listing(missing) or 'models'}, which its {_INFORMATION} names as best"
        raise InputError(problem, "give the folder of one model")
    bundles = [read_nnunet_model(folder / name, folds, **how) for name in names]
    return bundles, read_postprocessing(folder / "ensembles" / together, bundles[0].manifest.labels)


def _models(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*__*__*") if is_nnunet_model(path)) if folder.is_dir() else []


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """Unpack what is used of an exported model; yield the folder of its dataset."""
    with tempfile.TemporaryDirectory(prefix="segfit-") as place:
        with opened_zip(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(_USED)]
            size, free = sum(entry.file_size for entry in entries), shutil.disk_usage(place).free
            if size > free:
                problem = f"{path} takes {gigabytes(size / 2**30)}, and {place} has {gigabytes(free / 2**30)} free"
                raise InputError(problem, "make room, or unpack it elsewhere and give the folder")
            for entry in entries:
                require_no_bomb(entry, path)
                archive.extract(entry, place)  # never outside of it
        datasets = [folder for folder in Path(place).iterdir() if _models(folder)]
        if len(datasets) != 1:
            problem = f"{path} is not a model that nnU-Net exported: it has {len(datasets)} datasets with models"
            raise InputError(problem, "export it again, or give the folder of a model")
        yield datasets[0]
