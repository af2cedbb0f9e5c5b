"""What makes the steps of a training faster on its GPU, measured with the network that is trained, or as was asked."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from segfit.options import TrainingOptions
from segfit.specs import Acceleration
from segfit.training.probe import StepCost

__all__ = ["asked_acceleration", "fastest_acceleration"]

_LEAST_SECONDS = {"compiled": 1800.0, "graph": 120.0}
"""Of a training, from which it is tried: compiling takes minutes, now and whenever a training goes on (assumption)."""
_GAIN = 0.03  # of the steps, for which it is taken


def asked_acceleration(asked: TrainingOptions, measured: Acceleration | None = None) -> Acceleration:
    """Return what the user set, the rest as `measured`."""
    found = measured or Acceleration()
    return Acceleration(
        compiled=found.compiled if asked.compiled is None else asked.compiled,
        graph=found.graph if asked.cuda_graph is None else asked.cuda_graph,
    )


def fastest_acceleration(
    cost: Callable[[Acceleration], StepCost], asked: TrainingOptions, seconds: float
) -> tuple[Acceleration, float]:
    """Return the way to run steps on a GPU that gives most of them, and how long one then takes, plain ones taking 1.

    Parameters
    ----------
    cost : of a step that is run so
    seconds : of a training; what a way takes to be ready in each is part of them
    """
    first = best = asked_acceleration(asked)
    if asked.deterministic:  # what is measured is not the same every time
        return best, 1.0
    own = {"compiled": asked.compiled, "graph": asked.cuda_graph}
    tried = [name for name, least in _LEAST_SECONDS.items() if own[name] is None and seconds >= least]
    if not tried:
        return best, 1.0
    costs = {first: cost(first)}

    def steps(how: Acceleration) -> float:
        return (seconds - costs[how].setup_s) / costs[how].seconds_per_step

    for name in tried:
        how = best.model_copy(update={name: True})
        costs[how] = cost(how)
        if steps(how) > (1 + _GAIN) * steps(best):
            best = how
    plain = costs[first].seconds_per_step
    return (best, costs[best].seconds_per_step / plain) if plain < inf else (first, 1.0)
