"""Small projects that run through all stages in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


@pytest.fixture
def data_of_discs(tmp_path: Path) -> Path:
    """Six pictures of 256 x 256 pixels with one large disc each."""
    folder = tmp_path / "Dataset009_Discs"
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        y, x = np.ogrid[:256, :256]
        disc = (y - rng.integers(100, 156)) ** 2 + (x - rng.integers(100, 156)) ** 2 < 80**2
        Image.fromarray((disc * 120 + rng.integers(0, 90, disc.shape)).astype(np.uint8)).save(
            folder / "imagesTr" / f"disc_{number}_0000.png"
        )
        Image.fromarray(disc.astype(np.uint8)).save(folder / "labelsTr" / f"disc_{number}.png")
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "grey"},
                "labels": {"background": 0, "disc": 1},
                "numTraining": 6,
                "file_ending": ".png",
            }
        )
    )
    return folder
