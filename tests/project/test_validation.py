from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segfit.errors import CasesFailedError, StageError
from segfit.project import validation
from segfit.project.validation import SUMMARY, validate_fold


def test_cases_that_fail_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def case(name: str, error: Exception) -> Any:
        def image() -> None:
            seen.append(name)
            raise error

        return SimpleNamespace(id=name, image=image)

    seen: list[str] = []
    monkeypatch.setattr(validation, "_predictor", lambda *_, **__: SimpleNamespace(logits=lambda *_, **__: None))
    (tmp_path / "done.nii.gz").touch()
    (tmp_path / "done.traits.json").touch()
    cases = [
        case("overflows", StageError("the network output is not finite")),
        case("done", StageError("is not read")),
        case("large", MemoryError()),
        case("crashes", RuntimeError("device lost")),
    ]
    dataset: Any = SimpleNamespace(file_ending=".nii.gz")
    unused: Any = None
    with pytest.raises(CasesFailedError) as caught:
        validate_fold(
            unused,
            unused,
            dataset,
            cases,
            tmp_path / "weights",
            tmp_path,
            device=torch.device("cpu"),
            mirror=False,
            tile_step=0.5,
            probabilities=False,
            title="validate fold 0",
        )
    assert seen == ["overflows", "large", "crashes"]
    assert all(name in caught.value.problem for name in seen)
    assert not (tmp_path / SUMMARY).exists()
