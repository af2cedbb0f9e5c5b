"""The benchmark of busy machines, on networks of no size."""

from __future__ import annotations

import json

import pytest

import busy


def test_it_measures_in_fresh_processes_and_ends_in_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = []

    def measured(policy: str) -> dict[str, float]:
        policies.append(policy)
        return {"2d, 1 threads": float(len(policies))}

    monkeypatch.setattr(busy, "measured", measured)
    busy.main(["--rounds", "3", "--busy", "0"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert policies == ["unset", "passive"] * 3
    assert told["seconds"] == {"0 busy, unset, 2d, 1 threads": 3.0, "0 busy, passive, 2d, 1 threads": 4.0}


def test_a_step_is_measured_with_all_threads_and_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "SIZES", {"2d": (16, 16)})
    told = busy.steps()
    assert {"2d, 1 threads", "2d, threads chosen", "2d, choosing"} <= set(told)
    assert min(told.values()) > 0
