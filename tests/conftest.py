"""Options and fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from segfit.execution import pool

_SHARED = Path(__file__).resolve().parents[2] / "shared"

# Machines are shared: how long an example takes says nothing.
hypothesis.settings.register_profile("steady", deadline=None)
hypothesis.settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=_SHARED / "golden", help="folder of golden data")
    parser.addoption("--data", type=Path, default=_SHARED / "data", help="folder of real datasets")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, option in (("golden", "--golden"), ("real_data", "--data")):
        folder: Path = config.getoption(option)
        if not folder.is_dir():
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=f"no folder {folder} ({option})"))


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Path:
    """The folder of golden data; tests that use it carry the marker `golden`."""
    return Path(request.config.getoption("--golden"))


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest) -> Path:
    """The folder of real datasets; tests that use it carry the marker `real_data`."""
    return Path(request.config.getoption("--data"))


@pytest.fixture
def done_by_processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have all work that may be done by processes done by them; the names of the cases they were given."""
    cases: list[str] = []

    class Recording(pool.WorkerPool):
        def submit_case(self, case, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            cases.append(case)
            return super().submit_case(case, fn, *args, **kwargs)

    monkeypatch.setattr(pool, "_PROCESSES_FROM", 1)
    monkeypatch.setattr(pool, "WorkerPool", Recording)
    return cases
