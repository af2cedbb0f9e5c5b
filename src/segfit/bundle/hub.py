"""Models on the Hugging Face hub, by an address that names which state of them is meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from segfit.errors import InputError, reason_of

__all__ = ["fetched", "is_address"]

_ADDRESS = re.compile(r"hf:/{1,2}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # a Path has one slash
_MOVING = {"main", "master", "HEAD", "latest"}  # names of states that are others tomorrow
_USED = ["model.json", "card.md", "*.safetensors"]


def is_address(path: Any) -> bool:
    """Return whether something given as a path is the address of a model on the hub."""
    return isinstance(path, str | Path) and str(path).startswith("hf:/")


def fetched(address: str) -> Path:
    """Return the folder of a model of the hub, fetched into its cache if it is not there yet.

    Raises `InputError` for an address that does not name one state, and if it cannot be fetched.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or ".." in address:
        raise InputError(f"{address} is no address of a model", "write hf://ORG/NAME@REVISION")
    name, revision = found.groups()
    if revision is None or revision in _MOVING:
        problem = f"{address} names no state of the model that stays" + (
            "" if revision is None else f": {revision} moves"
        )
        raise InputError(problem, "write hf://ORG/NAME@REVISION with a tag or a commit of its page")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError("models of the hub need the package huggingface-hub", "pip install 'segfit[hub]'") from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_USED))
    except Exception as error:  # noqa: BLE001 - of the network, the hub, the cache
        problem = f"{address} cannot be fetched ({reason_of(error)})"
        raise InputError(problem, "check the address, the network and who may read it") from None
