"""The page docs/rules.md, made of the table of rules: ``python -m segfit.planning.rules_page > docs/rules.md``."""

from __future__ import annotations

import sys

from segfit.planning.explain import Filling
from segfit.planning.rules import TABLE

__all__ = ["rules_page"]

_TOP = """# Rules

What `segfit plan --explain` and the report say of the decisions of a plan, by rule. *Words in italics* stand for what
was measured. Made from the table in `segfit.planning.rules` by `python -m segfit.planning.rules_page > docs/rules.md`.
"""


def rules_page() -> str:
    """Return the whole table, with the names of the inputs in its sentences."""
    lines = [_TOP.rstrip()]
    for name, rule in TABLE.items():
        says = rule.says.format_map(Filling())
        bounds = [text.format_map(Filling()) for text in rule.bounds.values()]
        lines += ["", f"## {name}", "", f"{says[0].upper()}{says[1:]}.", ""]
        lines += [f"- bounds: {' | '.join(bounds)}", f"- source: {rule.source}", f"- changes with: {rule.changes}"]
        if rule.again:
            lines.append(f"- followed again with more {' and with more '.join(rule.again)}, to say what changes")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(rules_page())
