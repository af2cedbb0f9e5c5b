"""A project: one folder, one dataset, the stages in order. Every stage does what is missing and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from segfit.dataset.checks import check_dataset, require_usable
from segfit.dataset.layouts import open_dataset
from segfit.dataset.manifest import Dataset
from segfit.dataset.splits import Splits
from segfit.errors import DatasetError, InputError
from segfit.evaluation.summary import Pair, Summary, evaluate
from segfit.fingerprint.fingerprint import Fingerprint
from segfit.notebook import suitable_progress
from segfit.options import Options
from segfit.planning.plan import Plan
from segfit.progress import Progress
from segfit.project.folder import ProjectFile, ProjectFolder
from segfit.project.preparation import Preparation, load
from segfit.project.status import ProjectStatus, status_of
from segfit.selection.evidence import Evidence
from segfit.selection.select import Selection
from segfit.selection.verdict import Verdict, judge

if TYPE_CHECKING:
    from segfit.training.result import TrainingResult

__all__ = ["Project"]


class Project(Preparation):
    """A project folder; make one with `create` or `open`.

    The methods named after stages stand in pipeline order. Each runs what it needs of the stages before it, skips what
    is done, and may be interrupted at any moment and called again; `predict` and `evaluate` start no training.
    """

    @classmethod
    def create(
        cls,
        folder: Path | str,
        dataset: Dataset | Path | str,
        options: Options | None = None,
        *,
        settings: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Self:
        """Make a project, or take up the one that is there: what its stages did is kept as far as it still applies.

        Parameters
        ----------
        options : None: those the project was made with, or the default ones
        settings : changes to them, ``key=value`` as in `Options.with_settings`
        progress : None: bars in a notebook; elsewhere notes and warnings go to the logger "segfit"

        Raises `InputError` if `folder` belongs to another dataset or holds other things, and `DatasetError` for an
        unusable dataset.
        """
        root = Path(folder).expanduser().absolute()
        before = load(ProjectFile, ProjectFolder(root).project)
        options = (options or (before.options if before is not None else Options())).with_settings(settings)
        skip = options.dataset.skip_incomplete
        if before is not None and not isinstance(dataset, Dataset) and _same_place(dataset, before.dataset):
            dataset = before.dataset  # under the path it is known by, so that nothing looks changed
        opened = dataset if isinstance(dataset, Dataset) else _opened(dataset, skip_incomplete=skip)
        if before is not None and before.dataset != opened.root:
            raise InputError(
                f"{root} is a project on {before.dataset}, not on {opened.root}; choose another folder with --out"
            )
        if root.exists() and not root.is_dir():
            raise InputError(f"{root} is a file; choose a folder with --out")
        if before is None and root.exists() and _holds_something(root):
            raise InputError(f"{root} is not empty and not a segfit project; choose another folder with --out")
        project = cls(root, opened, options, progress=progress or suitable_progress())
        project.save_options()
        return project

    @classmethod
    def open(cls, folder: Path | str, *, settings: Sequence[str] = (), progress: Progress | None = None) -> Self:
        """Open a project and change its options by `settings`; raise `InputError` if there is none."""
        root = Path(folder).expanduser().absolute()
        file = load(ProjectFile, ProjectFolder(root).project)
        if file is None:
            raise InputError(f"{root} is not a segfit project; give the folder that segfit run --out made")
        return cls.create(root, file.dataset, settings=settings, progress=progress)

    def status(self) -> ProjectStatus:
        """Return how far the project is, from its files."""
        return status_of(self.folder.root)

    def __repr__(self) -> str:
        try:
            return repr(self.status())
        except InputError:  # its folder is gone or damaged
            return f"Project({str(self.folder.root)!r})"

    def _repr_html_(self) -> str:
        return self.status()._repr_html_()

    def train(self) -> list[TrainingResult]:
        """Train all folds of all configurations of the run, and validate each; return the trainings' results."""
        from segfit.project import trainings

        return trainings.train_all(self)

    def select(self, *, complete: bool = False) -> Selection:
        """Choose the best configuration or ensemble and its post-processing, and write the model.

        With `complete` from all validation cases, also those that a run had no time to predict.
        """
        from segfit.project import handover

        self.validates_all = complete

        return handover.select_model(self)

    def predict(self) -> list[Path]:
        """Predict the dataset's test images with the model; return the label files.

        Raises `InputError` if the trainings of the project's options are not finished.
        """
        from segfit.project import handover, trainings

        trainings.require_trained(self)
        return handover.predict_test(self)

    def evaluate(self) -> Summary | None:
        """Score the predictions of the test images, made as by `predict`; None if there are none with labels."""
        paths = {path.name.removesuffix(self.dataset.file_ending): path for path in self.predict()}
        pairs = [
            Pair.of_case(case, paths[case.id], self.dataset.labels) for case in self.dataset.test if case.label_files
        ]
        if not pairs:
            return None
        known = load(Summary, self.folder.predictions / "summary.json")
        if known is not None:  # the folder is emptied when the model changes
            return known
        with self.stage("evaluate"):
            summary = evaluate(pairs, self.dataset.labels, workers=self.options.workers, progress=self.progress)
            summary.save(self.folder.predictions / "summary.json")
        return summary

    def verdict(self) -> Verdict | None:
        """Judge the model by what the stages left; None as long as none was selected."""
        from segfit.project.reporting import stored_trainings

        plan, selection = load(Plan, self.folder.plan), load(Selection, self.folder.selection)
        validation, splits = load(Summary, self.folder.validation_summary), load(Splits, self.folder.splits)
        fingerprint = load(Fingerprint, self.folder.fingerprint)
        if plan is None or selection is None or validation is None or splits is None or fingerprint is None:
            return None
        if plan.run is None or not set(selection.winner) <= set(plan.run.configurations):
            return None  # planned anew since
        return judge(
            Evidence(
                validation=validation,
                selection=selection,
                trainings=stored_trainings(self.folder, plan.run),
                plan=plan,
                fingerprint=fingerprint,
                num_folds=len(splits.folds),
                test=load(Summary, self.folder.predictions / "summary.json"),
            )
        )

    def report(self) -> Path:
        """Write ``report.html`` from what there is; return its path."""
        from segfit.project.reporting import report_data
        from segfit.report.page import write_report

        problems = self.check()  # first: it decides which cases count
        with self.stage("report"):
            splits = load(Splits, self.folder.splits)
            folds = () if splits is None else splits.folds
            data = report_data(
                self.folder,
                self.dataset,
                self.options,
                fingerprint=load(Fingerprint, self.folder.fingerprint),
                plan=load(Plan, self.folder.plan),
                selection=load(Selection, self.folder.selection),
                validation=load(Summary, self.folder.validation_summary),
                folds={case: number for number, fold in enumerate(folds) for case in fold.validation},
                test=load(Summary, self.folder.predictions / "summary.json"),
                records=self.accounts.records(),
                hardware=self.hardware,
                verdict=self.verdict(),
                warnings=[f"{item.case}: {item.problem}; {item.action}" for item in problems if not item.fatal],
            )
            write_report(data, self.folder.report)
        return self.folder.report

    def run(self, *, overrun: bool = False) -> Summary | None:
        """Run all stages; return the scores of the test images, None if there are no labels for them.

        With `overrun` a time that is too short is overrun instead of refused.
        """
        self.overrun = overrun
        with self.alone():
            return self._run()

    def _run(self) -> Summary | None:
        for problem in self.check():
            if not problem.fatal:
                self.progress.warn(f"{problem.case}: {problem.problem}; {problem.action}")
        self.size()
        self.preprocess()
        self.train()
        self.select()
        summary = self.evaluate()
        self.report()
        return summary


def _holds_something(folder: Path) -> bool:
    """Whether there is more than what a killed process left of a project that had just begun."""
    return any(path.name != ".lock" and not path.name.startswith(".partial-") for path in folder.iterdir())


def _same_place(path: Path | str, known: Path) -> bool:
    """Whether a path leads to a known place, links followed."""
    return os.path.realpath(os.path.expanduser(path)) == os.path.realpath(known)  # noqa: PTH111 - never raises


def _opened(path: Path | str, *, skip_incomplete: bool) -> Dataset:
    """Open a dataset; where its structure is at fault, look into the files too and tell everything at once."""
    try:
        return open_dataset(path, skip_incomplete=skip_incomplete)
    except DatasetError:
        require_usable(check_dataset(path))
        raise
