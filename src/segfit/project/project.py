"""A project: one folder, one dataset, the stages in order. Every stage does what is missing and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from segfit.dataset.checks import check_dataset, require_usable
from segfit.dataset.layouts import open_dataset
from segfit.dataset.manifest import Dataset
from segfit.dataset.object_storage import ORIGIN, fetch, url_of
from segfit.errors import DatasetError, InputError, reason_of
from segfit.evaluation.summary import Summary
from segfit.execution.execution import LOCAL, Execution
from segfit.files import path_of
from segfit.options import Options, time_setting
from segfit.project.added_time import with_added_time
from segfit.project.documents import load
from segfit.project.folder import ProjectFile, ProjectFolder
from segfit.project.preparation import Preparation
from segfit.project.sharing import Locks
from segfit.project.starting_model import resolved
from segfit.project.status import ProjectStatus, status_of
from segfit.records import record_of
from segfit.selection.select import Selection
from segfit.selection.verdict import Verdict

if TYPE_CHECKING:
    from segfit.evaluation.measures import MeasureKind
    from segfit.project.findings import Findings
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
        execution: Execution = LOCAL,
    ) -> Self:
        """Make a project, or take up the one that is there: what its stages did is kept as far as it still applies.

        Parameters
        ----------
        options : None: those the project was made with, or the default ones
        settings : changes to them, ``key=value`` as in `Options.with_settings`
        execution : how work on cases is done and reported; its `workers` go before those of the options

        Raises `InputError` if `folder` belongs to another dataset or holds other things, and `DatasetError` for an
        unusable dataset.
        """
        root = _root(folder)
        if not isinstance(dataset, Dataset):
            dataset = path_of(dataset, "dataset")
        if not isinstance(options, Options | None):
            raise InputError(f"options are an Options, got {options!r}", "give settings as KEY=VALUE texts")
        before = load(ProjectFile, ProjectFolder(root).project)
        settings, time_before = with_added_time(ProjectFolder(root), before, settings)
        options = (options or (before.options if before is not None else Options())).with_settings(settings)
        skip = options.dataset.skip_incomplete
        if root.exists() and not root.is_dir():
            raise InputError(f"{root} is a file", "choose a folder with --out")
        if before is None and root.exists() and _holds_something(root):
            raise InputError(f"{root} is not empty and not a segfit project", "choose another folder with --out")
        if not isinstance(dataset, Dataset) and (url := url_of(dataset)) is not None:
            dataset = _fetched(url, root, before, execution)
        if before is not None and not isinstance(dataset, Dataset) and _same_place(dataset, before.dataset):
            dataset = before.dataset  # under the path it is known by, so that nothing looks changed
        opened = dataset if isinstance(dataset, Dataset) else _opened(dataset, skip_incomplete=skip)
        moved = before is not None and before.dataset != opened.root
        if before is not None and moved and not cls(root, opened, _self_contained(options)).holds_results_of_dataset():
            raise InputError(
                f"{root} is a project on {before.dataset}, not on {opened.root}", "choose another folder with --out"
            )
        execution.require_shared([opened.root], [root])
        options = resolved(root, options, opened, settings)
        project = cls(root, opened, options, execution=execution)
        if before is not None and moved:
            project.progress.note(f"{opened.root} is the dataset that was at {before.dataset}")
        project.time_before = time_before
        project.save_options()
        project.folder.remove_leftovers()
        return project

    @classmethod
    def open(cls, folder: Path | str, *, settings: Sequence[str] = (), execution: Execution = LOCAL) -> Self:
        """Open a project and change its options by `settings`; raise `InputError` if there is none."""
        root = _root(folder)
        file = load(ProjectFile, ProjectFolder(root).project)
        if file is None:
            raise InputError(f"{root} is not a segfit project", "give the folder that segfit run --out made")
        copy = ProjectFolder(root).dataset / file.dataset.name  # the project may have been moved
        dataset = copy if file.dataset.parent.name == copy.parent.name and copy.exists() else file.dataset
        return cls.create(root, dataset, settings=settings, execution=execution)

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

    def holds_results_of_dataset(self) -> bool:
        """Whether the project was checked on this very dataset, wherever that was then."""
        record = record_of(self.folder.check)
        return record is not None and record.made_of.get("dataset") == self._check_key(self.hashes).made_of["dataset"]

    def stop(self) -> None:
        """Ask all that is at work in this project to stop, in this process (in another thread) and in others.

        The calls that are at work save what they have and raise `StoppedError`; the same calls go on where they were.
        """
        self.stop_file.ask()

    def train(
        self,
        *,
        folds: Sequence[int] | None = None,
        configurations: Sequence[str] | None = None,
        validate: bool = False,
    ) -> list[TrainingResult]:
        """Train the run's folds and configurations, all or those that are named; return the trainings' results.

        With `validate` their validation cases are predicted too, which `select` does otherwise. Raises `InputError` for
        a fold or configuration that the run does not have.
        """
        from segfit.project import selecting, train_and_validate

        train = selecting.train_and_validate if validate else train_and_validate.train_all
        with self.at_work():
            return train(self, folds, configurations)

    def select(self, *, complete: bool = False, so_far: bool = False) -> Selection:
        """Validate, choose the best configuration or ensemble and its post-processing, and write the model.

        Parameters
        ----------
        complete : from all validation cases, also those that a run had no time to predict
        so_far : from the last saved states of trainings that are not finished; nothing is trained, and they go on later
        """
        from segfit.project import handing_over
        from segfit.project import so_far as reached

        self.validates_all = complete
        with self.at_work():
            if so_far:
                return reached.select_so_far(self)
            return handing_over.select_model(self).selection

    def predict(self) -> list[Path]:
        """Predict the dataset's test images with the model; return the label files.

        Raises `InputError` if the trainings of the project's options are not finished.
        """
        from segfit.project import predicting, trainings

        with self.at_work():
            trainings.require_trained(self)
            return predicting.predict_test(self)

    def evaluate(
        self,
        *,
        metrics: Sequence[MeasureKind] = (),
        tolerance: float | None = None,
        matched_iou: float = 0.5,
        by: str = "",
    ) -> Summary | None:
        """Score the predictions of the test images, made as by `predict`; None if there are none with labels.

        Parameters are those of `segfit.evaluate`. What they ask for, and intervals of means with it, is not kept.
        """
        from segfit.evaluation.measures import Measures
        from segfit.project import predicting, trainings

        measures = Measures.asked(metrics, tolerance, matched_iou)
        with self.at_work():
            trainings.require_trained(self)
            kept = predicting.evaluate_test(self)
            asked = kept is not None and (measures.kinds or by)
            return predicting.measure_test(self, measures, by) if asked else kept

    def findings(self) -> Findings:
        """Return what counts of what the stages left, without making anything."""
        from segfit.project.findings import find

        return find(self)

    def verdict(self) -> Verdict | None:
        """Judge the model by what the stages left; None as long as none was selected."""
        return self.findings().verdict

    def report(self, *, images: bool = True, full: bool = False) -> Path:
        """Write ``report.html`` from what there is; return its path.

        Parameters
        ----------
        images : with pictures of cases
        full : also write ``report-cases/``, pages that show each of them whole
        """
        from segfit.project.reporting import overlays_of, report_data
        from segfit.report.page import write_case_pages, write_report

        problems = self.check()  # first: it decides which cases count
        found = self.findings()
        with self.stage_log.of("report"):
            overlays = partial(overlays_of, self.folder, self.dataset, found, self.hashes, self.execution)
            data = report_data(
                self.folder,
                self.dataset,
                self.asked,
                found,
                records=self.stage_log.records(),
                hardware=self.hardware,
                warnings=[item for item in problems if not item.fatal],
                overlays=overlays() if images else (),
            )
            pages = {}
            if images and full:
                pages = write_case_pages(overlays(whole=True), data.label_names, self.folder.report_cases)
            elif self.folder.report_cases.exists():
                shutil.rmtree(self.folder.report_cases)
            write_report(replace(data, pages=pages, no_images=not images), self.folder.report)
        return self.folder.report

    def methods(self) -> str:
        """Return a paragraph on methods, with references, for a paper; `InputError` before there is a model."""
        from segfit.report.methods import methods_of

        found = self.findings()
        if found.selected is None or found.plan is None or found.fingerprint is None:
            raise InputError(
                "there is no model yet to tell the methods of", f"run it first: segfit run {self.folder.root}"
            )
        chosen = found.selected
        return methods_of(found.plan, found.fingerprint, self.dataset.labels, chosen.selection, chosen.results)

    def run(self, *, time: str | float | None = None, overrun: bool = False) -> Summary | None:
        """Run all stages; return the metrics of the test images, None if there are no labels for them.

        Parameters
        ----------
        time : of the whole run from now on, as in `plan`
        overrun : a time that is too short is overrun instead of refused
        """
        from segfit.project.decide import require_possible

        if time is not None:
            self.change([time_setting(time)])
        self.overrun = overrun
        with self.at_work():
            require_possible(self.options, overrun=overrun)
            problems = self.check()
            require_usable(problems)
            for problem in problems:
                self.progress.warn(problem)
            self.size()
            self.preprocess()
            self.train()
            self.select()
            summary = self.evaluate()
            self.report()
            return summary


def _root(folder: Any) -> Path:
    """Return the folder of a project; `InputError` for what is no path."""
    path = path_of(folder, "project")
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # the home folder of nobody
        raise InputError(f"{path} cannot be opened ({reason_of(error)})", "correct the path") from None


def _self_contained(options: Options) -> Options:
    """Return the options without what lies elsewhere."""
    return options.model_copy(update={"training": options.training.model_copy(update={"start_from": None})})


def _holds_something(folder: Path) -> bool:
    """Whether there is more than what a process left that was killed, or refused its dataset, before it was saved."""
    own = [".locks"] + ["dataset"] * (folder / "dataset" / ORIGIN).exists()
    return any(path.name not in own and not path.name.startswith(".partial-") for path in folder.iterdir())


def _fetched(url: str, root: Path, before: ProjectFile | None, execution: Execution) -> Path:
    """Return the copy of a dataset in the project, as it is in object storage now."""
    folder = ProjectFolder(root)
    if before is not None and not (folder.dataset / ORIGIN).exists():
        raise InputError(f"{root} is a project on {before.dataset}, not on {url}", "choose another folder with --out")
    with Locks(folder, execution.progress).held("dataset"):
        return fetch(url, folder.dataset, execution)


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
