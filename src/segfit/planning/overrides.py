"""Values of the network and the loss that the user fixed: put into a configuration in place of the derived ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from segfit.errors import InputError
from segfit.options import PlanningOptions
from segfit.planning.memory import feature_map_elements
from segfit.planning.plan import Configuration, Decision, NetworkSpec

__all__ = ["asked_decisions", "overridden"]

_NETWORK = ("features", "strides", "kernels", "encoder_convs", "decoder_convs")


def overridden(item: Configuration, asked: PlanningOptions, heads: int) -> Configuration:
    """Return the configuration with what was asked for; the patch is rounded up to what other strides divide.

    `heads` are the declared labels, for the memory estimate. Raises `InputError` for values that do not go together.
    """
    network = _network(item, asked)
    patch = tuple(-(-size // d) * d for size, d in zip(item.patch_size, network.divisor, strict=True))
    estimate = item.memory_estimate
    if network != item.network or patch != item.patch_size:
        estimate = feature_map_elements(
            network.kind,
            patch,
            features=network.features,
            strides=network.strides,
            encoder_convs=network.encoder_convs,
            decoder_convs=network.decoder_convs,
            heads=heads,
        )
    return item.model_copy(
        update={
            "network": network,
            "patch_size": patch,
            "memory_estimate": estimate,
            "batch_dice": item.batch_dice if asked.batch_dice is None else asked.batch_dice,
        }
    )


def asked_decisions(decisions: Sequence[Decision], asked: PlanningOptions) -> list[Decision]:
    """Return the decisions, with the reason that the user asked for a value wherever that is the reason."""
    keys = {f"network.{name}": name for name in _NETWORK} | {"batch_dice": "batch_dice", "transpose": "transpose"}
    result = []
    for decision in decisions:
        option = keys.get(decision.key.partition(".")[2], keys.get(decision.key))
        if option is not None and getattr(asked, option) is not None:
            change = {"rule": "the value that was asked for", "inputs": {}, "bound": "asked for", "source": "options"}
            decision = decision.model_copy(update=change | {"would_change": f"the option planning.{option}"})
        result.append(decision)
    return result


def _network(item: Configuration, asked: PlanningOptions) -> NetworkSpec:
    wanted: dict[str, Any] = {name: value for name in _NETWORK if (value := getattr(asked, name)) is not None}
    numbers = [
        number
        for value in wanted.values()
        for entry in value
        for number in (entry if isinstance(entry, tuple) else (entry,))
    ]
    try:
        if any(number < 1 for number in numbers):
            raise ValueError("all numbers must be 1 or more")
        if any(number % 2 == 0 for kernel in wanted.get("kernels", ()) for number in kernel):
            raise ValueError("kernels must be odd")
        if any(number != 1 for number in wanted.get("strides", ((1,),))[0]):
            raise ValueError("the first stride must be 1 along every axis")
        return NetworkSpec.model_validate(item.network.model_dump() | wanted)
    except ValueError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ") if isinstance(error, ValidationError) else error
        raise InputError(
            f"{', '.join(f'planning.{name}' for name in wanted)} cannot be had in {item.name}, a network of "
            f"{item.network.ndim} axes and {item.network.num_stages} stages: {reason}; name one configuration with "
            "planning.configurations, or give all lists"
        ) from None
