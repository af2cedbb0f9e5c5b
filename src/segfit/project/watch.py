"""A server for the browser of this machine: how a run goes, its report when it is done, and a button that stops it.

The standard library's server serves one reader or a few, which is all that is wanted. It listens on the loopback
interface alone, its address holds a secret that no other page or user knows, and requests under another host name are
refused: a page from elsewhere that has its name point to this machine gets nothing.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from markupsafe import Markup

from segfit.errors import InputError, reason_of
from segfit.project.folder import ProjectFolder
from segfit.project.live import Live, live_state
from segfit.project.stop import StopFile
from segfit.report.live import render_live, render_live_part

__all__ = ["WatchServer"]

_LOOPBACK = "127.0.0.1"


class WatchServer(ThreadingHTTPServer):
    """Serves the project in a folder at `address`; `serve_forever` until `shutdown`.

    Raises `InputError` if there is no project, or nothing can listen on the port; port 0 is any that is free.
    """

    daemon_threads = True

    def __init__(self, root: Path, port: int = 0) -> None:
        live_state(root)
        self.folder = ProjectFolder(root)
        self.token = secrets.token_urlsafe(24)
        self.drawing = Lock()  # matplotlib's settings are those of the process
        try:
            super().__init__((_LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"nothing can listen on port {port}: {reason_of(error)}", "give another --port") from error

    def handle_error(self, *asked: Any) -> None:
        """Say nothing of a browser that closed its connection before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*asked)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{_LOOPBACK}:{self.server_port}/{self.token}/"

    @property
    def hosts(self) -> set[str]:
        """Names under which it may be asked."""
        return {f"{name}:{self.server_port}" for name in (_LOOPBACK, "localhost")}

    def page(self) -> tuple[str, str]:
        """Return the type and text of the report if the run is done, else of the live page."""
        state = live_state(self.folder.root)
        if state.done:
            return "text/html", self.folder.report.read_text(encoding="utf-8")
        return "text/html", render_live(state.status.dataset.name, _part(state))

    def live(self) -> tuple[str, str]:
        """Return what changes on the live page."""
        state = live_state(self.folder.root)
        return "application/json", json.dumps({"done": state.done, "html": "" if state.done else _part(state)})

    def stop(self) -> tuple[str, str]:
        """Ask what is at work in the project to stop."""
        StopFile(self.folder.stop).ask()
        return "application/json", json.dumps({"asked": True})


def _part(state: Live) -> Markup:
    status = state.status
    return render_live_part(
        status.rows(), state.curves, share=status.trained, left_s=state.left_s, silent_s=state.silent_s
    )


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    server_version, sys_version = "segfit", ""

    def do_GET(self) -> None:
        self._answer({"": self.server.page, "live": self.server.live})

    def do_POST(self) -> None:
        self._answer({"stop": self.server.stop})

    def _answer(self, known: dict[str, Callable[[], tuple[str, str]]]) -> None:
        """Answer who knows the secret, under our own name."""
        token, *rest = self.path.removeprefix("/").split("/", 1)
        make = known.get("/".join(rest)) if rest else None
        if self.headers.get("Host") not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN)
        elif make is None or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._send(HTTPStatus.NOT_FOUND)
        else:
            try:
                with self.server.drawing:
                    made = make()
            except (InputError, OSError):  # a file that is being replaced
                self._send(HTTPStatus.SERVICE_UNAVAILABLE)
            else:
                self._send(HTTPStatus.OK, *made)

    def _send(self, status: HTTPStatus, kind: str = "text/plain", text: str = "") -> None:
        content = (text or status.phrase).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing: the terminal belongs to the command."""
