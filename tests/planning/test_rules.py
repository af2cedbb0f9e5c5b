"""The table of rules."""

from __future__ import annotations

import pytest

from segfit.planning.rules import TABLE


@pytest.mark.parametrize("name", TABLE)
def test_a_rule_is_complete(name: str) -> None:
    rule = TABLE[name]
    assert all((rule.says, rule.source, rule.changes, rule.bounds))
    assert set(rule.again) <= {"memory", "cases"}
