"""Code of other packages, found by their entry points: losses, networks, augmentations, trackers, executors.

A package declares them in its pyproject.toml::

    [project.entry-points."segfit.losses"]
    boundary = "my_losses:boundary"

and they are asked for as ``my-losses:boundary``: the package, as it is installed, and the name of the entry point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Annotated, Any, Literal

from pydantic import Field

from segfit.errors import InputError, SegfitError, reason_of

__all__ = ["PluginKind", "PluginName", "guarded", "load_plugin", "package_of", "package_version"]

PluginKind = Literal["losses", "networks", "augmentations", "trackers", "executors"]
PluginName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*:\w[\w.-]*$", max_length=200)]
"""``PACKAGE:NAME``."""


def load_plugin(kind: PluginKind, name: str) -> Any:
    """Return what a plug-in is; raise `InputError`, which names it, where it is not installed or cannot be imported."""
    package, _, entry = name.partition(":")
    known = entry_points(group=f"segfit.{kind}")
    found = next((item for item in known if item.name == entry and _same(item, package)), None)
    if found is None:
        there = sorted(f"{item.dist.name}:{item.name}" for item in known if item.dist is not None)
        installed = f"installed are {', '.join(there)}" if there else "none is installed"
        raise InputError(f"{name} is none of the plug-ins segfit.{kind}; {installed}", f"install the package {package}")
    with _blamed(kind, name):
        return found.load()


def guarded(kind: PluginKind, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a plug-in whose failures are `InputError` and name it; those of memory stay as they are."""

    def call(*args: Any) -> Any:
        with _blamed(kind, name):
            return function(*args)

    return call


def package_of(name: str) -> str:
    """Return the package that a plug-in is from."""
    return name.partition(":")[0]


def package_version(package: str) -> str:
    """Return the installed version of a package; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@contextmanager
def _blamed(kind: PluginKind, name: str) -> Iterator[None]:
    try:
        yield
    except (SegfitError, MemoryError):
        raise
    except Exception as error:
        if "memory" in str(error).lower():
            raise
        problem = f"the plug-in {name} (segfit.{kind}) failed: {type(error).__name__}: {reason_of(error)}"
        raise InputError(problem, "mend it, or leave it out") from error


def _same(item: EntryPoint, package: str) -> bool:
    return item.dist is not None and _normal(item.dist.name) == _normal(package)


def _normal(package: str) -> str:
    return package.lower().replace("_", "-").replace(".", "-")
