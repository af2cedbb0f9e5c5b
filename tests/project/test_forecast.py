"""The forecast of preprocessing: a probe long enough to be believed, and what is left to do after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from segfit.dataset.manifest import Case
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.preprocessing.store import CaseStore
from segfit.project import Project, forecast


def _copies(count: int, case: Case, fingerprint: Fingerprint) -> tuple[list[Case], Fingerprint]:
    """Return `count` cases that are all like one."""
    (measured,) = (one for one in fingerprint.cases if one.case == case.id)
    names = [f"case{i}" for i in range(count)]
    cases = tuple(measured.model_copy(update={"case": name}) for name in names)
    return [case.model_copy(update={"id": name}) for name in names], fingerprint.model_copy(update={"cases": cases})


@pytest.mark.parametrize(("seconds", "done"), [(0.001, 200), (0.02, 56), (0.3, 6), (5.0, 6)])
def test_preprocessing_is_probed_for_a_second(
    seconds: float, done: int, tmp_path: Path, volumes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.create(tmp_path / "p", volumes)
    spec = project.plan().configurations["3d_fullres"].preprocessing
    cases, fingerprint = _copies(200, project.dataset.training[0], project.fingerprint())
    clock = 0.0

    def preprocess(some: Sequence[Case], *, store: CaseStore, **_: Any) -> dict[str, str]:
        nonlocal clock
        clock += seconds * len(some)
        for case in some:
            (store.root / case.id).mkdir(parents=True)
            (store.root / case.id / "image").write_bytes(bytes(1000))
        return {case.id: case.id for case in some}

    monkeypatch.setattr(forecast, "preprocess_dataset", preprocess)
    monkeypatch.setattr(forecast, "perf_counter", lambda: clock)
    store = CaseStore(tmp_path / "cases")
    cost = forecast.probe_preprocessing(cases, fingerprint, spec, project.dataset.labels, store)
    assert len(list(store.root.iterdir())) == done
    left = forecast.forecast_preprocessing(cost, fingerprint, [spec])
    assert left.seconds == pytest.approx(seconds * (200 - done), abs=0.06)
    assert left.disk_gb == pytest.approx(200 * 1000 / 2**30, abs=1e-4)
