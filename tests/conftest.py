"""Options and fixtures shared by all tests."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from segfit.execution import pool

_SHARED = Path(__file__).resolve().parents[2] / "shared"

# Machines are shared: how long an example takes says nothing, and a run must not fail by the draw of its examples.
# Others are tried with --hypothesis-profile=default --hypothesis-seed=random.
hypothesis.settings.register_profile(
    "steady", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("steady")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=_SHARED / "golden", help="folder of golden data")
    parser.addoption("--data", type=Path, default=_SHARED / "data", help="folder of real datasets")
    parser.addoption("--card", default="cuda:0", help="device of the tests marked gpu; cpu rehearses them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, option in (("golden", "--golden"), ("real_data", "--data")):
        folder: Path = config.getoption(option)
        for item in items:
            found = item.get_closest_marker(marker)
            if found and not folder.joinpath(*found.args).exists():
                item.add_marker(pytest.mark.skip(reason=f"{folder.joinpath(*found.args)} does not exist ({option})"))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and (reason := _absent(config.getoption("--card"))):
        for item in needing:
            item.add_marker(pytest.mark.skip(reason=reason))


def _absent(card: str) -> str:
    """Why the tests marked gpu cannot run on this device; empty if they can."""
    import torch

    device = torch.device(card)
    there = device.type == "cpu" or (device.index or 0) < torch.cuda.device_count()
    return "" if there else f"there is no CUDA device {card} (--card)"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the marker `golden_each` for whatever the golden data hold, whichever names they have."""
    marker = metafunc.definition.get_closest_marker("golden_each")
    if marker:
        folder: Path = metafunc.config.getoption("--golden")
        paths = sorted(folder.glob(marker.args[0]))
        missing = pytest.mark.skip(reason=f"{folder / marker.args[0]} does not exist (--golden)")
        cases = [pytest.param(path, id=path.relative_to(folder).as_posix()) for path in paths]
        metafunc.parametrize("path", cases or [pytest.param(None, id="none", marks=missing)])


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
        def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
            cases.append(fn.__name__)
            return super().submit(fn, *args, **kwargs)

    monkeypatch.setattr(pool, "_PROCESSES_FROM", 1)
    monkeypatch.setattr(pool, "WorkerPool", Recording)
    return cases


class Elsewhere(Executor):
    """Does work as another machine would: functions, arguments and results arrive as bytes. Keeps the functions."""

    def __init__(self) -> None:
        self.functions: list[Any] = []

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        function, given, named = pickle.loads(pickle.dumps((fn, args, kwargs)))
        self.functions.append(function)
        future: Future[Any] = Future()
        try:
            future.set_result(pickle.loads(pickle.dumps(function(*given, **named))))
        except Exception as error:  # noqa: BLE001 - as any executor does
            future.set_exception(pickle.loads(pickle.dumps(error)))
        return future

    @property
    def modules(self) -> set[str]:
        """The modules whose functions were called."""
        return {getattr(one.work, "func", one.work).__module__ for one in self.functions}


@pytest.fixture
def elsewhere() -> Elsewhere:
    """An executor that is none of ours."""
    return Elsewhere()


@pytest.fixture
def plugin_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a package ``own-things 1.2`` with these entry points, by group, and this code; return its folder."""

    def install(code: str, **points: list[str]) -> Path:
        folder = tmp_path / "site"
        facts = folder / "own_things-1.2.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: own-things\nVersion: 1.2\n")
        groups = [
            f"[segfit.{group}]\n" + "".join(f"{name} = own_things:{name}\n" for name in names)
            for group, names in points.items()
        ]
        (facts / "entry_points.txt").write_text("\n".join(groups))
        (folder / "own_things.py").write_text(code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "own_things", raising=False)
        return folder

    return install
