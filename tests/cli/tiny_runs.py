"""Settings of runs that take seconds, for the tests of the shell."""

from __future__ import annotations

TINY = ["training.steps=4", "planning.base_features=4", "planning.batch_size=2", "planning.folds=0"]
SET = [part for setting in TINY for part in ("--set", setting)]
UNTRUSTED = 3  # four steps teach nothing
