"""The documentation builds as a site, strictly and without other hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("material", reason="needs segfit[docs]")


def build(folder: Path, out: Path) -> int:
    """Build the site of a checkout as scripts/site does; return the exit code."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    no_hosts = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(command, cwd=folder, env=os.environ | no_hosts, check=False).returncode


def test_the_site_has_every_page_and_asks_no_other_host(tmp_path: Path) -> None:
    assert build(ROOT, tmp_path) == 0
    sources = {path.relative_to(ROOT / "docs").with_suffix("") for path in (ROOT / "docs").rglob("*.md")}
    pages = {(path.parent if path.name == "README" else path) / "index.html" for path in sources}
    assert {page for page in pages if not (tmp_path / page).is_file()} == set()
    for page in pages:
        text = (tmp_path / page).read_text(encoding="utf-8")
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]*\ssrc="([^"]*)|<link[^>]*rel="stylesheet"[^>]*href="([^"]*)', text
        )
        assert loaded
        assert [link for pair in loaded for link in pair if re.match("(https?:)?//", link)] == []


def test_a_link_to_no_heading_ends_it(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "README.md").open("a", encoding="utf-8") as page:
        page.write("\n[lost](how-to.md#no-such-heading)\n")
    assert build(tmp_path, tmp_path / "site") == 1
