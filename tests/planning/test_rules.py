"""The table of rules, and the page of the documentation that is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from segfit.planning.rules import TABLE
from segfit.planning.rules_page import rules_page


def test_the_page_is_made_of_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "rules.md"
    assert page.read_text() == rules_page()


@pytest.mark.parametrize("name", TABLE)
def test_a_rule_is_complete(name: str) -> None:
    rule = TABLE[name]
    assert all((rule.says, rule.source, rule.changes, rule.bounds))
    assert set(rule.again) <= {"memory", "cases"}
