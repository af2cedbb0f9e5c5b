"""How help looks: verbs in groups, arguments without the names of Python's types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["MODELS", "PIPELINE", "PROJECTS", "GroupedHelp", "add_verb"]

_LEFT = 25  # characters of options; longer ones have their text in the next line

PIPELINE, PROJECTS, MODELS = "Pipeline", "Projects", "Models"


def add_verb(app: typer.Typer, group: str | None, verb: Callable[..., Any], name: str | None = None) -> None:
    """Register a verb in a group of the help; without a group it works and is not listed."""
    app.command(name, cls=_Verb, rich_help_panel=group, hidden=group is None)(verb)


class GroupedHelp(TyperGroup):
    """Lists the verbs by their group, in the order in which they were registered."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section for each group."""
        verbs = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        width = max(len(name) for name, _ in verbs)
        for group in (PIPELINE, PROJECTS, MODELS):
            rows = [
                (name.ljust(width), verb.get_short_help_str(formatter.width))
                for name, verb in verbs
                if not verb.hidden and getattr(verb, "rich_help_panel", None) == group
            ]
            with formatter.section(group):
                formatter.write_dl(rows)


class _Verb(TyperCommand):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            records = [item.get_help_record(ctx) for item in self.get_params(ctx) if item.param_type_name == kind]
            rows = [(left.partition(" <")[0], right) for left, right in filter(None, records)]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=_LEFT)
