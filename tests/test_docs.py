"""The generated pages of the documentation are what the code says; links inside the documentation lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

import segfit
from segfit.options import Options

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


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_to_files(page: str) -> None:
    found = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in found if not ((ROOT / page).parent / link).exists()] == []


def test_every_command_and_option_of_nnunet_has_its_counterpart() -> None:
    """The page has a section for each command, and in it a row for each option that says something."""
    page = (ROOT / "docs" / "from-nnunet.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", page, flags=re.MULTILINE | re.DOTALL))
    known = json.loads((ROOT / "tests" / "nnunet_commands.json").read_text(encoding="utf-8"))
    for command, options in known.items():
        rows = dict(re.findall(r"^\| `([^`]+)` \| ([^\n]+) \|$", sections[command], flags=re.MULTILINE))
        assert [option for option in options if not rows.get(option, "").strip()] == [], command
        assert [option for option in rows if option not in options] == [], command


def test_the_migration_page_names_options_that_exist() -> None:
    page = (ROOT / "docs" / "from-nnunet.md").read_text(encoding="utf-8")
    answers = "\n".join(re.findall(r"^\| `[^`]+` \| ([^\n]+) \|$", page, flags=re.MULTILINE))
    commands = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    others = {"--master-port"}  # of torchrun
    assert {option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", answers) if option not in commands} <= others
    keys = Options.known_keys()
    for key in re.findall(r"--set ((?:planning|training|augmentation|model)\.[\w.]+\w)(?=[=`])", answers):
        assert key in keys, key
