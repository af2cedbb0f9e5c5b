"""What is served of a running project, to whom, and what is not."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from segfit.errors import InputError, StoppedError
from segfit.options import Options
from segfit.project import watch
from segfit.project.folder import ProjectFile, ProjectFolder
from segfit.project.live import live_state
from segfit.project.stop import StopFile
from segfit.project.watch import WatchServer


def _ask(server: WatchServer, path: str, method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_the_state_is_read_from_the_logs(folder: ProjectFolder) -> None:
    state = live_state(folder.root)
    (curve,) = state.curves
    assert (curve.configuration, curve.fold, curve.steps) == ("2d", 0, 3)
    assert curve.dice == {"a": (0.5,)}
    assert state.left_s == pytest.approx(200 * 0.7 + 5 * 200)
    assert state.silent_s is not None
    assert not state.done
    assert state.status.trained == pytest.approx(0.3 / 6)


def test_before_anything_is_planned_nothing_is_known(tmp_path: Path) -> None:
    ProjectFile(dataset=tmp_path / "Dataset", options=Options()).save(tmp_path / "project.json")
    state = live_state(tmp_path)
    assert (state.curves, state.left_s, state.silent_s, state.done) == ((), None, None, False)
    with pytest.raises(InputError, match="is not a segfit project"):
        WatchServer(tmp_path / "none")


def test_the_page_and_its_part_are_served(server: WatchServer) -> None:
    status, page = _ask(server, f"/{server.token}/")
    assert status == 200
    assert "connect-src 'self'" in page
    assert page.count('class="plot"') == 3
    status, text = _ask(server, f"/{server.token}/live")
    state = json.loads(text)
    assert (status, state["done"]) == (200, False)
    assert "fold 0" in state["html"]


def test_only_who_knows_the_address_is_answered(server: WatchServer, folder: ProjectFolder) -> None:
    own, port = f"/{server.token}/", server.server_port
    assert server.address == f"http://127.0.0.1:{port}{own}"
    assert _ask(server, f"{own}live", host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
        assert _ask(server, own, host=host)[0] == 403
        assert _ask(server, f"{own}stop", "POST", host)[0] == 403
    for path in (
        "/",
        "*",
        "x",
        "/x/",
        f"/{server.token[:-1]}/",
        f"/{server.token}",
        f"{own}project.json",
        f"{own}../plan.json",
    ):
        assert _ask(server, path)[0] == 404
    assert _ask(server, f"{own}stop")[0] == 404
    assert _ask(server, "/x/stop", "POST")[0] == 404
    assert not folder.stop.exists()


def test_the_button_stops_what_is_at_work(server: WatchServer, folder: ProjectFolder) -> None:
    at_work = StopFile(folder.stop)
    assert _ask(server, f"/{server.token}/stop", "POST")[0] == 200
    with pytest.raises(StoppedError):
        at_work.require_none()


@pytest.mark.parametrize(("error", "told"), [(ConnectionResetError, False), (BrokenPipeError, False), (KeyError, True)])
def test_a_browser_that_left_is_no_news(
    server: WatchServer, capsys: pytest.CaptureFixture[str], error: type[Exception], told: bool
) -> None:
    try:
        raise error
    except error:
        server.handle_error(None, ("127.0.0.1", 1))
    assert bool(capsys.readouterr().err) == told


def test_when_all_is_done_the_report_is_served(
    server: WatchServer, folder: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = replace(live_state(folder.root), done=True)
    monkeypatch.setattr(watch, "live_state", lambda _: done)
    folder.report.write_text("the report")
    assert _ask(server, f"/{server.token}/") == (200, "the report")
    assert json.loads(_ask(server, f"/{server.token}/live")[1]) == {"done": True, "html": ""}


def test_a_port_that_is_taken_is_refused(server: WatchServer, folder: ProjectFolder) -> None:
    with pytest.raises(InputError, match="--port"):
        WatchServer(folder.root, server.server_port)


def test_the_command_serves_until_it_is_interrupted(folder: ProjectFolder) -> None:
    # Children of background jobs ignore the signal.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from segfit.cli.main import run\nsys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "report", str(folder.root), "--watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            text = next(lines)
            while text.count("{") != text.count("}"):
                text += next(lines)
            address = json.loads(text)["address"]
            host, path = address.removeprefix("http://").split("/", 1)
            connection = http.client.HTTPConnection(host, timeout=120)
            connection.request("GET", f"/{path}live")
            assert json.loads(connection.getresponse().read())["done"] is False
            connection.close()
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
        finally:
            process.kill()
