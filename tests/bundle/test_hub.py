"""Models of the Hugging Face hub: addresses that are taken, and that what is fetched is opened. The hub is a fake."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
from test_bundle import manifest, states

from segfit.bundle.bundle import write_bundle
from segfit.cli.main import run
from segfit.errors import InputError
from segfit.inference.model import load_model
from segfit.inference.open_model import is_model, open_model

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the hub was asked for; it has one model."""
    write_bundle(tmp_path / "cache", manifest(), states())
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **how: Any) -> str:
        calls.append({"name": name, **how})
        if name != "lab/livers":
            raise OSError("Repository Not Found for url")
        return str(tmp_path / "cache")

    module = ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_a_model_of_the_hub_is_fetched(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    address = f"hf://lab/livers@{REVISION}"
    model = load_model(address, "cpu")
    assert model.name == "Livers"
    assert asked[0]["name"] == "lab/livers"
    assert asked[0]["revision"] == REVISION
    assert set(asked[0]["allow_patterns"]) == {"model.json", "card.md", "*.safetensors"}  # nothing that is code
    assert model.source is not None
    assert model.source.paths == (tmp_path / "cache",)  # where workers find it
    assert is_model(Path(address))  # as the command line has it: with one slash
    assert open_model(Path(address)).manifest == model.manifest
    assert run(["info", address]) == 0
    assert run(["verify", address]) == 0
    assert len(open_model([address, "hf://lab/livers@v1.0"]).manifest.members) == 2
    with pytest.raises(InputError, match="cannot be fetched"):
        load_model("hf://lab/kidneys@v1", "cpu")


@pytest.mark.parametrize(
    "address",
    ["hf://lab/livers", "hf://lab/livers@main", "hf://lab/livers@HEAD", "hf://lab/livers@", "hf://livers@v1", "hf://a/b/c@v1",
     "hf://lab/../x@v1", "hf:///lab/livers@v1", "hf://lab/livers@v1 --x",
     "hf://../..@v1", "hf://lab/livers@../../v1"],
)  # fmt: skip
def test_addresses_that_name_no_state_are_refused(asked: list[dict[str, Any]], address: str) -> None:
    with pytest.raises(InputError, match="REVISION") as refused:
        load_model(address, "cpu")
    assert "hf://ORG/NAME@REVISION" in refused.value.action
    assert asked == []


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="huggingface-hub") as refused:
        load_model(f"hf://lab/livers@{REVISION}", "cpu")
    assert "segfit[hub]" in refused.value.action


class _Hub(BaseHTTPRequestHandler):
    """One model at one commit, in the way that the hub serves it."""

    folder: Path

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/lab/livers/tree/{REVISION}"):
            files = [
                {"type": "file", "path": one.name, "size": one.stat().st_size, "oid": one.name} for one in self._files()
            ]
            self._send(json.dumps(files).encode(), {"Content-Type": "application/json"}, body=body)
        elif path.startswith("/api/models/lab/livers"):
            siblings = [{"rfilename": one.name} for one in self._files()]
            facts = {"id": "lab/livers", "sha": REVISION, "siblings": siblings, "private": False, "tags": []}
            self._send(json.dumps(facts).encode(), {"Content-Type": "application/json"}, body=body)
        elif path.startswith(f"/lab/livers/resolve/{REVISION}/") and (self.folder / path.rsplit("/", 1)[1]).is_file():
            content = (self.folder / path.rsplit("/", 1)[1]).read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(content, {"ETag": etag, "X-Repo-Commit": REVISION}, body=body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def _send(self, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_the_library_of_the_hub_fetches_it(tmp_path: Path) -> None:
    """With huggingface-hub itself, in a process that asks a server on this machine."""
    pytest.importorskip("huggingface_hub", reason="huggingface-hub is not installed")
    _Hub.folder = tmp_path / "model"
    write_bundle(_Hub.folder, manifest(), states())
    (_Hub.folder / "setup.py").write_text("raise SystemExit('code ran')")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        there = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        environment = os.environ | there | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

        def info(address: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "segfit", "info", address, "--json"]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

        found = info(f"hf://lab/livers@{REVISION}")
        assert found.returncode == 0, found.stderr
        assert "Livers" in found.stdout
        missing = info("hf://lab/kidneys@v1")
        server.shutdown()
    assert missing.returncode == 2
    assert "Traceback" not in missing.stderr
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert "model.json" in fetched
    assert "setup.py" not in fetched
