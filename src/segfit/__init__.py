"""segfit: self-configuring segmentation of biomedical images.

    import segfit

    project = segfit.Project.create("work", segfit.open_dataset("Dataset004_Hippocampus"))
    project.plan(time="2h")
    project.run()
    result = segfit.load_model("work/model").predict("image.nii.gz")

Everything is imported when it is first used; importing this module is light and silent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segfit.dataset.layouts import open_dataset
    from segfit.inference.model import load_model
    from segfit.project import Project

__all__ = ["Project", "__version__", "load_model", "open_dataset"]

_HOME = {
    "Project": "segfit.project",
    "load_model": "segfit.inference.model",
    "open_dataset": "segfit.dataset.layouts",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("segfit")
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'segfit' has no attribute {name!r}")
