"""What notebooks show: bars through IPython's display, tables of plans, projects and metrics."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from segfit.errors import warning
from segfit.notebook import NotebookProgress, html_table, in_notebook, suitable_progress
from segfit.progress import LOGGED


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """IPython in a kernel, as far as it is used; what was displayed, in order."""
    shown: list[Any] = []

    def display(value: Any, *, display_id: bool) -> Any:
        assert display_id
        shown.append(value)
        return SimpleNamespace(update=shown.append)

    ipython, displays = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    displays.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", displays)
    return shown


def test_outside_of_notebooks_messages_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    progress = suitable_progress()
    assert progress is LOGGED
    with caplog.at_level(logging.INFO, "segfit"), progress.task("training", 2) as task:
        task.advance()
        progress.note("a fact")
        progress.warn(warning("code", "look", "here"))
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("segfit", "INFO", "a fact"),
        ("segfit", "WARNING", "look; here"),
    ]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_of_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = ModuleType("IPython")
    terminal.get_ipython = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", terminal)
    assert not in_notebook()


def test_a_bar_in_a_notebook(kernel: list[Any]) -> None:
    assert isinstance(suitable_progress(), NotebookProgress)
    clock = _Clock()
    with NotebookProgress(clock).task("training <1>", 4) as task:
        task.advance(1)  # too soon after the beginning to be shown
        clock.now = 10.0
        task.advance(1, "loss 0.5")
    assert [repr(bar) for bar in kernel] == [
        "training <1>: 0%",
        "training <1>: 50% 10 s, 20 s left, loss 0.5",
        "training <1>: 50% done in 10 s",
    ]
    html = kernel[1]._repr_html_()
    assert "training &lt;1&gt; " in html
    assert '<progress value="0.500" max="1">' in html


def test_a_failed_task_says_so(kernel: list[Any]) -> None:
    def work() -> None:
        with NotebookProgress(_Clock()).task("training", 4):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert repr(kernel[-1]) == "training: 0% stopped after 0.0 s"


def test_notes_are_printed_and_warnings_logged(
    kernel: list[Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    progress = suitable_progress()
    progress.note("a fact")
    progress.warn(warning("code", "look", "here"))
    assert capsys.readouterr().out == "a fact\n"
    assert [record.message for record in caplog.records] == ["look; here"]


def test_tables_escape_what_they_hold() -> None:
    html = html_table("a <b>", ("name", "Dice"), [("x & y", "0.5")], ["see <here>"])
    for part in ("a &lt;b&gt;", "<th>Dice</th>", "<td>x &amp; y</td>", "<p>see &lt;here&gt;</p>"):
        assert part in html
    assert "<table>" not in html_table("nothing", ("name",), [])
