"""A dataset and a finished project that the tests of a file share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import SET, UNTRUSTED

from segfit.cli.main import run
from segfit.dataset.phantom import make_phantom


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "Dataset001_Volumes"
    return make_phantom(folder, cases=5, test_cases=2, shape=(12, 24, 24))


@pytest.fixture(scope="module")
def project(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished project."""
    out = tmp_path_factory.mktemp("project") / "p"
    assert run(["run", str(dataset), "--out", str(out), *SET]) == UNTRUSTED
    return out
