"""A project folder: all stages in order, each resumable, each skipping what is done."""

from segfit.project.project import Project

__all__ = ["Project"]
