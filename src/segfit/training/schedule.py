"""How a training unfolds: learning rate and oversampling of foreground. Pure numbers.

Rules and constants are those of nnU-Net 2.8.1, written as functions of the share of the budget that is used
up, so that a budget may be steps or seconds.
"""

from __future__ import annotations

from math import cos, pi

__all__ = ["cooldown_start", "forced_foreground", "learning_rate", "poly_learning_rate"]


def poly_learning_rate(share: float, base: float = 1e-2, exponent: float = 0.9) -> float:
    """Return `base * (1 - share) ** exponent`; `share` of the budget is used up, 0 to 1, and clipped to that."""
    remaining: float = (1.0 - min(max(share, 0.0), 1.0)) ** exponent
    return base * remaining


def learning_rate(
    share: float,
    base: float = 1e-2,
    exponent: float | None = 0.9,
    warmup_share: float = 0.0,
    cooldown_share: float = 1.0,
) -> float:
    """Return the learning rate: rising in a line, constant, then falling during `cooldown_share`.

    It falls as a polynomial, without an exponent as half a cosine. Warm-up and cool-down are shares of the budget;
    where they overlap, the rate falls from the end of the warm-up on.
    """
    if share < warmup_share:
        return base * max(share, 0.0) / warmup_share
    falling = min(cooldown_share, 1.0 - warmup_share)
    fallen = 1.0 - (1.0 - share) / falling
    if exponent is None:
        return base * (1.0 + cos(pi * min(max(fallen, 0.0), 1.0))) / 2.0
    return poly_learning_rate(fallen, base, exponent)


def cooldown_start(exponent: float | None, warmup_share: float, cooldown_share: float) -> float | None:
    """Return the share of the budget from which the learning rate falls; None where it never or always does."""
    falls = exponent is None or exponent > 0
    return max(1.0 - cooldown_share, warmup_share) if falls and 0 < cooldown_share < 1 else None


def forced_foreground(batch: int, share: float = 0.33) -> tuple[bool, ...]:
    """Return which samples of a batch must contain foreground: those from position `round(batch * (1 - share))` on."""
    start = round(batch * (1.0 - share))
    return tuple(position >= start for position in range(batch))
