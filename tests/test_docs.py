"""The generated pages of the documentation are what the code says; links inside the documentation lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import typer

import segfit
from segfit.cli.main import app
from segfit.options import Options

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "reference_pages.py"


@pytest.mark.parametrize("name", ["api.md", "commands.md", "plan.md", "rules.md"])
def test_generated_pages_are_in_step(name: str) -> None:
    made = runpy.run_path(str(SCRIPT))["pages"]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made[name], "run python scripts/reference_pages.py"


def test_every_public_name_is_described() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    missing = [name for name in segfit.__all__ if name not in page and name != "__version__"]
    assert missing == []


def test_every_verb_and_each_of_its_options_is_described() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = {part.split()[1]: part for part in page.split("\n### ")[1:]}
    verbs = {name: verb for name, verb in typer.main.get_command(app).commands.items() if not verb.hidden}
    assert set(sections) == set(verbs)
    missing = {
        f"{name} {option}"
        for name, verb in verbs.items()
        for item in verb.params
        if item.param_type_name == "option" and not item.hidden
        for option in item.opts
        if not re.search(rf"`[^`]*{option}\b", sections[name])
    }
    assert missing == set()


def test_commands_in_the_pages_have_these_verbs_and_options() -> None:
    verbs = typer.main.get_command(app).commands
    text = "\n".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    lines = [
        *re.findall(r"`segfit ([^`]+)`", text),
        *re.findall(r"^(?:\S*/)?segfit ([a-z][^#\n]*)", text, re.MULTILINE),
    ]
    known = {
        name: {option for item in verb.params for option in (*item.opts, *item.secondary_opts)}
        for name, verb in verbs.items()
    }
    commands = [line.split() for line in lines if line.split()[0] in known]
    assert {verb for verb, *_ in commands} >= {name for name, verb in verbs.items() if not verb.hidden}
    wrong = [
        f"segfit {verb} {part}"
        for verb, *parts in commands
        for part in parts
        if re.match("--?[a-z]", part) and part.partition("=")[0] not in known[verb] | {"--help", "-h"}
    ]
    assert wrong == []


def test_every_option_is_described() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").partition("## Options")[2]
    rows = [line.split("|")[1] for line in page.partition("\n## ")[0].splitlines() if line.startswith("|")]
    named = {name.rpartition(".")[2] for row in rows for name in re.findall("`([^`]+)`", row)}
    patterns = [re.escape(name).replace("NAME", ".+") for name in named]
    keys = {key.rpartition(".")[2] for key in Options.known_keys()}
    assert {key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)} == set()


@pytest.mark.parametrize(
    "page", ["README.md", *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
)
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
