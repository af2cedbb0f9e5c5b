"""Small projects that run through all stages in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from segfit.dataset.phantom import make_phantom

TINY = ["training.steps=6", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]


@pytest.fixture(scope="session")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five labelled volumes and two test cases."""
    folder = tmp_path_factory.mktemp("data") / "Dataset001_Volumes"
    return make_phantom(folder, cases=5, test_cases=2, shape=(12, 24, 24))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six RGB pictures and two test pictures."""
    folder = tmp_path_factory.mktemp("data") / "Dataset002_Pictures"
    return make_phantom(folder, cases=6, test_cases=2, shape=(1, 40, 40), kind="picture")


@pytest.fixture
def tiny() -> list[str]:
    """Settings of a training that takes a second."""
    return list(TINY)
