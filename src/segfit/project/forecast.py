"""What the stages of a run are going to need, told before they begin: seconds, RAM, device memory, disk.

Time and memory of networks and of preprocessing are measured on this machine; the rest is counted from sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp, prod
from statistics import median
from time import perf_counter

from segfit.dataset.manifest import Case
from segfit.execution.execution import LOCAL, Execution
from segfit.execution.memory import PeakWatch, free_memory_gb, process_bytes
from segfit.fingerprint.fingerprint import CaseFingerprint, Fingerprint
from segfit.labels import LabelScheme
from segfit.planning.plan import RunSpec, StageForecast
from segfit.preprocessing.dataset import preprocess_dataset, preprocessing_in_parts
from segfit.preprocessing.store import CaseStore
from segfit.progress import messages_only
from segfit.project.candidate import CASE_SECONDS, Candidate, ValidationCost, Workload
from segfit.resampling import new_shape
from segfit.specs import Configuration, PreprocessingSpec
from segfit.text import duration, gigabytes, listing

__all__ = [
    "PreprocessingCost",
    "forecast_preprocessing",
    "forecast_stages",
    "forecast_words",
    "probe_preprocessing",
    "report_seconds",
]

SELECT_SECONDS, SELECT_CASE_SECONDS = 0.1, 0.016  # scoring and post-processing, and each small case of it
REPORT_SECONDS = 1.0
REPORT_SECONDS_PER_MEGAVOXEL = 0.15  # of the median case: some twenty predictions are read for their pictures
CASE_SECONDS_PER_MEGAVOXEL = 0.25
_PROBED_CASES = 4  # preprocessed ahead, at least, and for
_PROBED_SECONDS = 1.0
_PREDICTION_ARRAYS = 3  # float32 arrays per channel and output that predicting a case holds at its peak


@dataclass(frozen=True, slots=True)
class PreprocessingCost:
    """What was measured on a few cases."""

    seconds_per_voxel: float  # read or written
    bytes_per_voxel: float  # written
    memory_gb: float  # of the process, the largest case among those in work
    done: int  # voxels that need not be done again
    seconds: float  # that measuring took


def probe_preprocessing(
    cases: Sequence[Case],
    fingerprint: Fingerprint,
    spec: PreprocessingSpec,
    labels: LabelScheme,
    store: CaseStore,
    *,
    execution: Execution = LOCAL,
) -> PreprocessingCost:
    """Preprocess some cases, the largest one first, as all will be, and return what that cost.

    It goes on until a second has been measured: small cases take a few milliseconds, which the system may double.
    """
    sizes = {case.case: _work(case, spec) for case in fingerprint.cases}
    begun = perf_counter()
    first, *left = sorted(cases, key=lambda case: -sizes[case.id])
    probed, seconds = [first], 0.0
    quiet = replace(execution, progress=messages_only(execution.progress))
    with PeakWatch() as memory, preprocessing_in_parts(cases, spec, measured=fingerprint, execution=quiet) as parts:
        do = partial(preprocess_dataset, spec=spec, scheme=labels, store=store, measured=fingerprint, execution=parts)
        keys = do(probed)  # pays for imports
        while left and seconds < _PROBED_SECONDS:
            some = left[:: max(1, len(left) // max(_PROBED_CASES, len(probed)))]  # of all sizes
            started = perf_counter()
            keys |= do(some)
            seconds += perf_counter() - started
            probed += some
            left = [case for case in left if case.id not in keys]
        peak = memory.peak_bytes()
    stored = sum(file.stat().st_size for key in keys.values() for file in (store.root / key).iterdir())
    written = {case.case: _voxels(case, spec) for case in fingerprint.cases}
    timed = sum(sizes[case.id] for case in probed[1:])
    return PreprocessingCost(
        seconds_per_voxel=seconds / timed if timed else 0.0,
        bytes_per_voxel=stored / sum(written[case.id] for case in probed),
        memory_gb=peak / 2**30,
        done=timed + sizes[first.id],
        seconds=perf_counter() - begun,
    )


def forecast_preprocessing(
    cost: PreprocessingCost, fingerprint: Fingerprint, specs: Sequence[PreprocessingSpec]
) -> StageForecast:
    """Return what preprocessing all cases for all `specs` is going to need, the probed cases excepted."""
    different = list(dict.fromkeys(specs))
    work = sum(_work(case, spec) for case in fingerprint.cases for spec in different)
    written = sum(_voxels(case, spec) for case in fingerprint.cases for spec in different)
    return StageForecast(
        seconds=round(cost.seconds_per_voxel * max(0, work - cost.done), 1),
        memory_gb=round(max(cost.memory_gb, process_bytes() / 2**30), 3),  # what sizing took may stay
        disk_gb=round(cost.bytes_per_voxel * written / 2**30, 4),
    )


def forecast_stages(
    trained: Sequence[Candidate],
    validations: Sequence[ValidationCost],
    seconds: Mapping[str, float],
    steps: Mapping[str, int],
    folds: int,
    workload: Workload,
    fingerprint: Fingerprint,
    *,
    on_cpu: bool,
) -> Mapping[str, StageForecast]:
    """Return what training, validation, prediction and report are going to need.

    Parameters
    ----------
    validations : what validating one fold of each takes
    seconds, steps : of each training, by name of the configuration
    on_cpu : the networks run in RAM
    """
    base = process_bytes() / 2**30
    kept = max(_kept_gb(item.configuration, steps[item.name], fingerprint) for item in trained)
    arrays = max(_arrays_gb(item.configuration, fingerprint) for item in trained)
    step, tile = max(item.step.peak_memory_gb for item in trained), max(item.tile.peak_memory_gb for item in trained)
    weights = sum(item.step.state_gb / 2 for item in trained) * folds  # the other half is the optimiser's
    states = sum(item.step.state_gb for item in trained if item.keeps_state) * folds
    device = {} if on_cpu else {"device_memory_gb": round(step, 3)}
    network = max(step, tile)  # what the steps took stays with the process
    predicting = {"memory_gb": round((network if on_cpu else base) + arrays, 3), **device}
    predicted = [item.views * item.case_seconds for item in trained]
    tested = workload.test_cases * (CASE_SECONDS + folds * sum(predicted))
    compared = SELECT_SECONDS + workload.validation_cases * SELECT_CASE_SECONDS * len(trained) * folds
    stages = {
        "train": StageForecast(
            seconds=round(folds * sum(seconds.values()), 1),
            memory_gb=round((step if on_cpu else base) + kept, 3),
            disk_gb=round(weights + states, 4),
            **device,
        ),
        "validate": StageForecast(seconds=round(folds * sum(item.seconds for item in validations), 1), **predicting),
        "select": StageForecast(seconds=round(compared, 1), disk_gb=round(weights, 4)),  # the model has them again
    }
    if workload.test_cases:
        stages["predict"] = StageForecast(seconds=round(tested, 1), **predicting)
    return stages | {"report": StageForecast(seconds=report_seconds(fingerprint))}


def forecast_words(run: RunSpec) -> str:
    """Say what is going to be done and how long it will take."""
    trainings = listing([f"{name} (about {run.expected_steps[name]} steps)" for name in run.configurations])
    stages = ", ".join(f"{stage} {duration(item.seconds)}" for stage, item in run.forecast.items())
    total = run.total
    folds = listing([str(fold) for fold in run.folds])
    amounts = [f"{duration(total.seconds)} in all"]
    for value, kind in ((total.memory_gb, "RAM"), (total.device_memory_gb, "device memory"), (total.disk_gb, "disk")):
        amounts += [f"{gigabytes(value)} of {kind}"] if value is not None else []
    return (
        f"forecast: {trainings}, {'fold' if len(run.folds) == 1 else 'folds'} {folds}; {stages}; {', '.join(amounts)}"
    )


def report_seconds(fingerprint: Fingerprint) -> float:
    """Return the seconds that writing the report takes."""
    megavoxels = median(prod(case.shape) for case in fingerprint.cases) / 1e6
    return round(REPORT_SECONDS + REPORT_SECONDS_PER_MEGAVOXEL * megavoxels, 1)


def _voxels(case: CaseFingerprint, spec: PreprocessingSpec) -> int:
    """Return the voxels of a case after resampling."""
    shape = [case.shape_after_crop[axis] for axis in spec.transpose]
    spacing = [case.spacing_mm[axis] for axis in spec.transpose]
    return prod(new_shape(shape, spacing, spec.spacing_mm))


def _work(case: CaseFingerprint, spec: PreprocessingSpec) -> int:
    """Return the voxels that are read and written for a case."""
    return prod(case.shape) + _voxels(case, spec)


def _kept_gb(configuration: Configuration, steps: int, fingerprint: Fingerprint) -> float:
    """Return the RAM that training takes to keep cases it has seen, at most half of what is free."""
    cases = fingerprint.cases
    voxels = sum(_voxels(case, configuration.preprocessing) for case in cases)
    seen = 1 - exp(-steps * configuration.batch_size / len(cases))
    whole = voxels * (4 * configuration.network.in_channels + 2) / 2**30
    return min(seen * whole, free_memory_gb() / 2)


def _arrays_gb(configuration: Configuration, fingerprint: Fingerprint) -> float:
    """Return the RAM that the arrays of the largest case take in prediction."""
    network = configuration.network
    voxels = max(_voxels(case, configuration.preprocessing) for case in fingerprint.cases)
    return voxels * 4 * _PREDICTION_ARRAYS * (network.in_channels + network.num_outputs) / 2**30
