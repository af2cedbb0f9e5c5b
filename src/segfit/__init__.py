"""segfit: self-configuring segmentation of biomedical images.

    import segfit

    project = segfit.Project.create("work", segfit.open_dataset("Dataset004_Hippocampus"))
    project.plan(time="2h")
    project.run()
    result = segfit.load_model("work/model").predict("image.nii.gz")

Everything is imported when it is first used; importing this module is light and silent. Warnings go to the logger
"segfit" and stand in the results that they concern.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segfit import nnunet
    from segfit.dataset.layouts import open_dataset
    from segfit.errors import (
        DatasetError,
        DivergedError,
        InputError,
        MemoryShortageError,
        Problem,
        SegfitError,
        StageError,
        StoppedError,
    )
    from segfit.evaluation.evaluate import evaluate_folder as evaluate
    from segfit.execution.execution import Execution
    from segfit.images.image import Image
    from segfit.inference.model import Model, Prediction, load_model
    from segfit.options import Options
    from segfit.project import Project

__all__ = [
    "DatasetError",
    "DivergedError",
    "Execution",
    "Image",
    "InputError",
    "MemoryShortageError",
    "Model",
    "Options",
    "Prediction",
    "Problem",
    "Project",
    "SegfitError",
    "StageError",
    "StoppedError",
    "__version__",
    "evaluate",
    "load_model",
    "nnunet",
    "open_dataset",
]

_HOME = {
    "Execution": "segfit.execution.execution",
    "Image": "segfit.images.image",
    "Model": "segfit.inference.model",
    "Options": "segfit.options",
    "Prediction": "segfit.inference.model",
    "Project": "segfit.project",
    "load_model": "segfit.inference.model",
    "open_dataset": "segfit.dataset.layouts",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        from importlib.metadata import version

        return version("segfit")
    if name == "evaluate":
        return import_module("segfit.evaluation.evaluate").evaluate_folder
    if name == "nnunet":
        return import_module("segfit.nnunet")
    if name in __all__:
        return getattr(import_module(_HOME.get(name, "segfit.errors")), name)
    raise AttributeError(f"module 'segfit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
