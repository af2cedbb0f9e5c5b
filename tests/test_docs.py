"""The generated pages of the documentation are what the code says; links inside the documentation lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import segfit

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reference_pages.py"


@pytest.mark.parametrize("name", ["api.md", "commands.md", "rules.md"])
def test_generated_pages_are_in_step(name: str) -> None:
    made = runpy.run_path(str(SCRIPT))["pages"]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made[name], "run python scripts/reference_pages.py"


def test_every_public_name_is_described() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in segfit.__all__ if name not in page and name != "__version__"]
    assert missing == []


@pytest.mark.parametrize(
    "page", ["README.md", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
)
def test_links_lead_to_files(page: str) -> None:
    found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in found if not ((ROOT / page).parent / link).exists()] == []
