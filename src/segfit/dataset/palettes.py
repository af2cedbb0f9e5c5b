"""Palettes of label pictures: the place in the palette is the label, whatever colour it is shown in.

Programs that reduce colours to a palette may order it anew for every picture. Then one colour stands for different
labels in different files, which nothing but the colours shows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from segfit.errors import Problem

__all__ = ["palette_problems"]


def palette_problems(palettes: Sequence[tuple[str, str, Mapping[int, str]]]) -> list[Problem]:
    """Return a warning for every label file that gives a colour another label than most files give it.

    Parameters
    ----------
    palettes : case, name of the label file, and the colour of each label it holds
    """
    labels_of: dict[str, Counter[int]] = {}
    for _, _, colours in palettes:
        for label, colour in _distinct(colours).items():
            labels_of.setdefault(colour, Counter())[label] += 1
    usual = {colour: counts.most_common(1)[0][0] for colour, counts in labels_of.items()}
    problems: list[Problem] = []
    for case, name, colours in palettes:
        other = [(colour, label) for label, colour in _distinct(colours).items() if usual[colour] != label]
        if other:
            colour, label = other[0]
            problem = f"{name} shows label {label} in {colour}, which is label {usual[colour]} in most files"
            action = "save all labels with one palette; palette indices are the label values"
            problems.append(Problem(case, problem, action, fatal=False))
    return problems


def _distinct(colours: Mapping[int, str]) -> dict[int, str]:
    """Return the labels whose colour no other label of the file has."""
    times = Counter(colours.values())
    return {label: colour for label, colour in colours.items() if times[colour] == 1}
