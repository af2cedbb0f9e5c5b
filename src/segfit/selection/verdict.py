"""Whether a trained model can be trusted: from measurements to findings with actions. No files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import ceil
from statistics import fmean
from typing import Any, Literal

from segfit.evaluation.cohorts import Behind
from segfit.evaluation.summary import Summary
from segfit.files import Record
from segfit.planning.budget import TOLERABLE_STEPS, WANTED_STEPS
from segfit.planning.plan import Initial, RunSpec, candidate_words
from segfit.selection.evidence import LOST_LOSS, Evidence
from segfit.text import count, dice, duration, listing
from segfit.training.result import TrainingResult

__all__ = ["Finding", "Verdict", "judge"]

_UNLEARNED = 0.1
"""Dice of a case. Painting every voxel gives a class that fills a twentieth of the image this much: chance."""
_MANY = 0.25
"""Share of the classes. One of four is much of what was asked for, one of 37 is a rare class."""
_USELESS = 0.2
"""Mean Dice. Correcting such predictions takes longer than drawing anew (assumption)."""
_POOR = 0.3
"""Mean Dice of a class. Thin ones honestly end at 0.4 to 0.5 (the boundaries of nuclei: 0.39 to 0.53)."""
_MODEST = 0.5
"""Mean Dice of a class, worth a remark below: more voxels are wrong or missing than right."""
_RISING, _STEEP = 0.01, 0.05
"""Dice gained in the last quarter of a training. The falling learning rate alone gives one or two hundredths; five say
that the training was cut short (assumption)."""
_SKIPPED = 0.05
"""Share of the steps. Half precision skips single steps by design; one in twenty has a cause (assumption)."""
_FEW_CASES = 3
"""Training cases with a class. With two, a network is trained on one when the other validates it, or on both and
nothing validates it."""
_BUSY = 0.5
"""Share of the expected steps. On a free machine forecasts of the training are right to a fifth."""
_WORSE, _MUCH_WORSE = 0.05, 0.1
"""Dice lost from cross-validation to the test cases. The folds of nuclei differ by up to 0.07."""
_FEW_TESTED = 3
"""Test cases. Fewer differ from the mean by chance."""
_FEW_VALIDATED = 10
"""Cases. Their mean has a standard error of a third of the spread between cases."""

_Code = Literal[
    "only_background",
    "not_learned",
    "low_dice",
    "poor",
    "too_few_steps",
    "skipped_steps",
    "diverged",
    "few_cases",
    "slow_machine",
    "test_worse",
    "falls_behind",
    "few_validated",
    "not_validated",
    "unfinished",
    "seen_before",
]
_HEADLINES = {
    "good": "good, no problem found",
    "doubtful": "doubtful, check this model before use",
    "failed": "failed, do not use this model",
}


class Finding(Record):
    """One thing that a reader should know. A remark leaves the verdict good."""

    code: _Code
    level: Literal["remark", "doubtful", "failed"]
    classes: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    numbers: dict[str, float] = {}
    cohort: str = ""  # what a table says of the cases that it is about
    text: str  # what was found, one sentence that names no case
    action: str = ""  # what to do and what it costs; names no case but those of `cases`

    @property
    def names_cases(self) -> bool:
        """Whether the action names cases, or where they come from."""
        return bool(self.cohort) or any(case in self.action for case in self.cases)


class Verdict(Record):
    """The judgement on a run: that of its gravest finding. Findings stand gravest first."""

    level: Literal["good", "doubtful", "failed"]
    findings: tuple[Finding, ...] = ()
    doubts_training: bool = False  # it may be at fault where classes are missed; labels are then not to blame

    @property
    def headline(self) -> str:
        """The verdict in a few words."""
        return _HEADLINES[self.level]

    def facts(self) -> dict[str, Any]:
        """Return it as plain values for those who get the model: no case is named."""
        told = [item.text if item.names_cases else f"{item.text} {item.action}".strip() for item in self.findings]
        return {"level": self.level, "headline": self.headline, "findings": told}

    def classes(self, *codes: str) -> frozenset[str]:
        """Return the classes that findings of these codes concern."""
        return frozenset(name for item in self.findings if item.code in codes for name in item.classes)


def judge(evidence: Evidence) -> Verdict:
    """Return the verdict on a run; the same advice is given once, with the gravest finding."""
    order = ("failed", "doubtful", "remark")
    findings = [*_symptoms(evidence), *_unfinished(evidence), *_trainings(evidence), *_data(evidence)]
    once: list[Finding] = []
    for finding in sorted(findings, key=lambda item: order.index(item.level)):
        told = any(finding.action in item.action for item in once)
        once.append(finding.model_copy(update={"action": ""}) if told else finding)
    level = once[0].level if once else "remark"
    return Verdict(
        level="good" if level == "remark" else level,
        findings=tuple(once),
        doubts_training=bool(_training_faults(evidence)),
    )


def _symptoms(evidence: Evidence) -> Iterator[Finding]:
    """Yield what the metrics of cross-validation say; of what comes first where it explains the rest."""
    summary = evidence.validation
    by_class = _with_reference(summary)
    names, mean = list(by_class), summary.mean_dice or 0.0
    total = count(len(summary.cases), "validated case")
    if names and not any(one.n_pred for case in summary.cases for one in case.metrics.values()):
        yield Finding(
            code="only_background",
            level="failed",
            classes=tuple(names),
            cases=_worst_cases(summary, names),
            numbers={"cases": len(summary.cases)},
            text=f"The networks found nothing: every voxel of {total} was predicted as background.",
            action=_mending(evidence, names),
        )
        return
    missed = [name for name, values in by_class.items() if max(values.values()) < _UNLEARNED]
    if missed:
        finding = _not_learned(evidence, by_class, missed)
        yield finding
        if finding.level == "failed":
            return
    if names and mean < _USELESS:
        yield Finding(
            code="low_dice",
            level="failed",
            cases=_worst_cases(summary, names),
            numbers={"dice": mean},
            text=f"Predictions and references hardly overlap: the mean Dice is {dice(mean)} over {total}.",
            action=_mending(evidence, names),
        )
        return
    yield from _poor(evidence, missed)


def _not_learned(evidence: Evidence, by_class: Mapping[str, Mapping[str, float]], missed: Sequence[str]) -> Finding:
    """Say which classes are found in no case; grave where they are many, unless a single case says so."""
    names, mean = list(by_class), evidence.validation.mean_dice or 0.0
    cases = max(len(by_class[name]) for name in missed)
    grave = len(missed) >= _MANY * len(names) and (cases > 1 or mean < _USELESS)
    which = f"{listing(missed)} {'was' if len(missed) == 1 else 'were'} not learned"
    if len(names) > 2 and len(missed) > 1:
        which = f"{len(missed)} of {len(names)} classes were not learned ({listing(missed)})"
    them = "it" if len(missed) == 1 else "them"
    where = "the one validated case" if cases == 1 else "every validated case"
    return Finding(
        code="not_learned",
        level="failed" if grave else "doubtful",
        classes=tuple(missed),
        cases=_worst_cases(evidence.validation, missed),
        numbers={"classes": len(missed), "of": len(names), "cases": cases},
        text=f"{which}: the Dice is below {_UNLEARNED:g} in {where} that has {them}.",
        action=_mending(evidence, missed),
    )


def _poor(evidence: Evidence, missed: Collection[str]) -> Iterator[Finding]:
    """Yield the classes that were learned badly, other than those that were `missed`."""
    means = {name: one.dice for name, one in evidence.validation.mean.items() if name not in missed}
    levels: tuple[tuple[Literal["doubtful", "remark"], float, float], ...]
    levels = (("doubtful", 0.0, _POOR), ("remark", _POOR, _MODEST))
    for level, low, high in levels:
        poor = {name: value for name, value in means.items() if value is not None and low <= value < high}
        if poor:
            told = listing([f"{name} ({dice(value)})" for name, value in poor.items()])
            yield Finding(
                code="poor",
                level=level,
                classes=tuple(poor),
                cases=_worst_cases(evidence.validation, list(poor)),
                numbers={"dice": min(poor.values())},
                text=f"The mean Dice is below {high:g} for {told}; thin and small classes often stay there.",
                action=_mending(evidence, list(poor)) if level == "doubtful" else "",
            )


def _unfinished(evidence: Evidence) -> Iterator[Finding]:
    """Yield that trainings have not ended, if so."""
    states, wanted = evidence.run.unfinished.values(), evidence.run.expected_steps.values()
    if states:
        reached, expected = min(item.steps for item in states), max(wanted, default=0)
        yield Finding(
            code="unfinished",
            level="doubtful",
            numbers={"steps": reached, "expected": expected},
            text=f"The training has not ended: {reached} of about {expected} steps; its learning rate has not fallen.",
            action="Let segfit run go on with it.",
        )


def _trainings(evidence: Evidence) -> Iterator[Finding]:
    """Yield what the trainings say of themselves."""
    chosen, steps, gain = evidence.chosen, evidence.steps, evidence.gain
    if not chosen or steps is None:
        return
    if gain > (_RISING if steps < TOLERABLE_STEPS else _STEEP):
        yield Finding(
            code="too_few_steps",
            level="doubtful" if steps < TOLERABLE_STEPS and gain > _STEEP else "remark",
            numbers={"steps": steps, "gain": gain},
            text=f"Dice still rose by {gain:.2f} in the last quarter of the training ({count(steps, 'step')}).",
            action=_longer(evidence),
        )
    skipped, done = evidence.skipped, sum(item.own_steps for item in chosen)
    if skipped > _SKIPPED * done:
        named = [str(case) for item in chosen for case in item.skipped_cases]
        cases = tuple(dict.fromkeys(named))
        look = f"Look for extreme values in the images of {listing(cases)}. " if cases else ""
        yield Finding(
            code="skipped_steps",
            level="doubtful",
            cases=cases,
            numbers={"skipped": skipped, "steps": done},
            text=f"{skipped} of {done} training steps had no finite gradient and were skipped.",
            action=look + _gentler(evidence),
        )
    if evidence.diverged:
        loss = max((item.final_loss or 0.0 for item in chosen), default=0.0)
        at = f": its final loss is {loss:.3g}" if loss > LOST_LOSS else " and recovered"
        yield Finding(
            code="diverged",
            level="doubtful",
            numbers={"loss": loss},
            text=f"The training diverged{at}.",
            action=_gentler(evidence),
        )
    run = evidence.run
    lost = [entry for entry in run.race if entry.diverged]
    if lost:
        which = listing([candidate_words(entry) for entry in lost])
        yield Finding(
            code="diverged",
            level="remark",
            numbers={"networks": len(lost)},
            text=f"The best candidate of the trial ({which}) diverged later; the next best was trained.",
            action=_gentler(evidence),
        )
    slow = [item for item in chosen if run.steps is None and item.own_steps < _BUSY * _expected(run, item)]
    if slow and not run.unfinished:
        worst = min(slow, key=lambda item: item.own_steps / _expected(run, item))
        yield Finding(
            code="slow_machine",
            level="remark",
            numbers={"steps": worst.own_steps, "expected": _expected(run, worst)},
            text=f"{worst.own_steps} of about {_expected(run, worst)} expected steps were done: the machine was busy.",
            action="Rerun on a free machine in another folder (--out), or give it more --time.",
        )


def _data(evidence: Evidence) -> Iterator[Finding]:
    """Yield what the cases say: too few of them, or others than in training."""
    held, validated, total = evidence.held_by(), len(evidence.validation.cases), len(evidence.fingerprint.cases)
    few = [name for name, cases in held.items() if 0 < cases < _FEW_CASES]  # that of none is warned of in the plan
    if few:
        yield Finding(
            code="few_cases",
            level="doubtful" if len(few) >= _MANY * len(held) else "remark",
            classes=tuple(few),
            numbers={"cases": min(held[name] for name in few)},
            text=f"Fewer than {_FEW_CASES} of {count(total, 'training case')} have {listing(few)}.",
            action=f"Label {'it' if len(few) == 1 else 'them'} in more cases.",
        )
    judged = _with_reference(evidence.validation)
    unknown = [name for name, cases in held.items() if cases and name not in judged]
    if unknown:
        yield Finding(
            code="not_validated",
            level="doubtful",
            classes=tuple(unknown),
            numbers={"cases": max(held[name] for name in unknown)},
            text=f"No validated case has {listing(unknown)}: how good the model is at that is not known.",
            action=_more_validated(evidence) or f"Label {listing(unknown)} in more cases.",
        )
    if evidence.test is not None:
        yield from _tested(evidence.validation, evidence.test)
    yield from _cohorts(evidence.behind)
    if evidence.run.initial is not None:
        yield _seen_before(evidence.run.initial)
    if validated < max(total, _FEW_VALIDATED):
        rough = ": the mean Dice is a rough estimate" if validated < _FEW_VALIDATED else ""
        yield Finding(
            code="few_validated",
            level="remark",
            numbers={"validated": validated, "cases": total},
            text=f"{validated} of {count(total, 'case')} took part in cross-validation{rough}.",
            action=_more_validated(evidence),
        )


def _more_validated(evidence: Evidence) -> str:
    """Say how to validate more cases: those of the trained folds that there was no time for, those of other folds."""
    cases = "" if evidence.run.validation_cases is None else "segfit select predicts the other cases of the fold."
    return " ".join(part for part in (cases, _all_folds(evidence)) if part)


def _seen_before(initial: Initial) -> Finding:
    """Say what cross-validation is worth where the networks start from a model, which may have seen the cases."""
    if not initial.saw_cases:
        text = f"The network starts from {initial.model}: cross-validation counts if that has not seen these cases."
        return Finding(code="seen_before", level="remark", text=text, action="Count on test cases if it may have.")
    text = f"The network starts from {initial.model}, which was trained on these cases: cross-validation is too kind."
    return Finding(code="seen_before", level="doubtful", text=text, action="Count on test cases alone.")


def _tested(validation: Summary, test: Summary) -> Iterator[Finding]:
    """Compare the classes that have a Dice in both."""
    pairs = [
        (one.dice, other.dice)
        for name, one in validation.mean.items()
        if one.dice is not None and (other := test.mean.get(name)) is not None and other.dice is not None
    ]
    if not pairs:
        return
    before, after = fmean(a for a, _ in pairs), fmean(b for _, b in pairs)
    if before - after > _WORSE:
        yield Finding(
            code="test_worse",
            level="doubtful" if before - after > _MUCH_WORSE and len(test.cases) >= _FEW_TESTED else "remark",
            numbers={"validation": before, "test": after, "cases": len(test.cases)},
            text=f"The test Dice ({dice(after)}) is clearly below the cross-validated one ({dice(before)}).",
            action="The test images probably differ from the training images: compare them, and train with cases like "
            "those the model is for.",
        )


def _cohorts(found: Sequence[Behind]) -> Iterator[Finding]:
    """Say on which kinds of cases the model clearly does worse; what the table calls them is in the action alone."""
    for item in found:
        yield Finding(
            code="falls_behind",
            level="doubtful" if item.others - item.dice > _MUCH_WORSE else "remark",
            classes=item.classes,
            numbers={"dice": item.dice, "others": item.others, "cases": item.cases},
            cohort=f"{item.column}={item.value}",
            text=f"{count(item.cases, 'case')} of one {item.column} clearly fall behind in {listing(item.classes)}: "
            f"Dice {dice(item.dice)}, of the others {dice(item.others)}.",
            action=f"Look at the images and labels with {item.column}={item.value}, and train with more like them.",
        )


def _with_reference(summary: Summary) -> dict[str, dict[str, float]]:
    """Return the Dice by class and case, of the cases whose reference has the class."""
    found: dict[str, dict[str, float]] = {}
    for case in summary.cases:
        for name, one in case.metrics.items():
            if one.n_ref and one.dice is not None:
                found.setdefault(name, {})[case.case] = one.dice
    return found


def _expected(run: RunSpec, result: TrainingResult) -> int:
    return run.expected_steps.get(result.configuration, 0)


def _mending(evidence: Evidence, names: Sequence[str]) -> str:
    """Say what is likely to help classes that were not learned well; labels are doubted where nothing else is."""
    faults = _training_faults(evidence)
    if faults:
        return " ".join(faults)
    held = evidence.held_by()
    few = [name for name in names if held.get(name, 0) < _FEW_CASES]
    if few:
        return f"Label {listing(few)} in more cases."
    worst = _worst_cases(evidence.validation, names)
    return (
        f"The training was long enough. Compare the labels of {listing(names)} with the images, first in "
        f"{listing(worst)}; segfit check FOLDER lists doubtful labels."
    )


def _training_faults(evidence: Evidence) -> list[str]:
    """Say what mends a training that may be at fault: unstable, short or with values that were set; else nothing."""
    faults = []
    if evidence.diverged or evidence.skipped > _SKIPPED * sum(item.own_steps for item in evidence.chosen):
        faults.append(_gentler(evidence))
    if (evidence.steps or 0) < WANTED_STEPS or evidence.gain > _RISING:
        faults.append(_longer(evidence))
    if not faults and evidence.set_values:
        faults.append(f"The training was long enough: run again without {listing(evidence.set_values)}, which you set.")
    return faults


def _worst_cases(summary: Summary, names: Sequence[str]) -> tuple[str, ...]:
    """Return the three cases with the lowest Dice of any of the classes."""
    by_class = _with_reference(summary)
    ranked = sorted((value, case) for name in names for case, value in by_class.get(name, {}).items())
    return tuple(dict.fromkeys(case for _, case in ranked))[:3]


def _longer(evidence: Evidence) -> str:
    """Say how to train longer, and what that takes."""
    done = evidence.steps or 0
    wanted = max(WANTED_STEPS, 2 * done)
    seconds = evidence.seconds_for(wanted)
    known = {*evidence.selection.winner, *(entry.configuration for entry in evidence.run.race)}
    flat = "2d" in evidence.plan.configurations and "2d" not in known
    if evidence.run.steps is None:
        how = f"--time {_time(seconds)} (about {wanted} steps)"
    else:
        how = f"--steps {wanted} (about {duration(seconds)})"
    other = ", or with --set planning.configurations=2d (a 2D step costs less)" if flat else ""
    return f"{count(done, 'step')} {'was' if done == 1 else 'were'} too few: run again with {how}{other}."


def _gentler(evidence: Evidence) -> str:
    """Say how to train more carefully: at a fifth of the rate, which takes short trainings to that of nnU-Net."""
    recipe = evidence.plan.training[evidence.selection.winner[0]]
    precision = "" if recipe.precision == "fp32" else " and --set training.precision=fp32"
    return (
        f"Run again with --set training.learning_rate={recipe.learning_rate / 5:.3g}{precision}: a fifth of the rate, "
        "in the same time."
    )


def _all_folds(evidence: Evidence) -> str:
    """Say how to validate all cases, and what that takes."""
    trained, every, run = len(evidence.run.folds), evidence.num_folds, evidence.run
    if not 0 < trained < every:
        return ""
    whole = sum(item.seconds * item.steps / item.own_steps for item in evidence.trainings)  # with what was begun before
    seconds = run.total.seconds + (run.extends.time_s if run.extends else 0.0) + whole * (every / trained - 1)
    how = f"--time {_time(seconds)} " if run.steps is None else ""
    cost = "" if run.steps is None else f" (about {duration(seconds)})"
    return f"To validate all, run again with {how}--set planning.folds={','.join(map(str, range(every)))}{cost}."


def _time(seconds: float) -> str:
    """Return a time for ``--time``, rounded up: ``7m``, ``25m``, ``1h30m``, ``12h``."""
    minutes = seconds / 60
    step = 1 if minutes < 10 else 5 if minutes < 60 else 30 if minutes < 600 else 60
    hours, rest = divmod(max(1, ceil(minutes / step)) * step, 60)
    return (f"{hours}h" if hours else "") + (f"{rest}m" if rest else "")
