"""When a plan's errors are more than rounding: limits that hold for any number of elements.

Errors are looked at in units of their expected size (`rounding.py`), z = error / sqrt(variance). A sum of independent,
uniform errors is sub-Gaussian, with its variance as the proxy (E exp(s z) <= exp(s^2 / 2)). So the root mean square of
`size` independent z exceeds t > 1 with a probability of at most (t * exp((1 - t^2) / 2)) ** size (Chernoff), and the
largest of `count` such root mean squares with `count` times that, however they depend on each other. Nothing is
estimated, and no constant depends on a shape.
"""

from __future__ import annotations

import math

VERSION = 2
"""Of the criterion. What an earlier one found, refusals too, is forgotten; raise it when limits or inputs change."""

FALSE_ALARM = 1e-9
"""Probability, at most, that rounding as it is expected fails one output of one plan at one size."""

PRECISION_LIMIT = 3.5
"""Root mean square of all z. It is 0.5 to 1.1 where products are summed in fp32, wherever results are rounded; sums in
fp16 give 2.3 to 2.8 in a model with hidden states of 576, which does little harm, 4 to 5 with 2048 and 6 with 4096."""

UNEVENNESS = 2.0
"""How much larger than the model, or than the plan's own root mean square where that is larger, one element's
or one column's error may be expected: a plan that sums otherwise than expected has errors of another shape."""


def largest_rms(count: int, size: int, false_alarm: float) -> float:
    """Return what the largest of `count` root mean squares of `size` independent z exceeds with that probability."""
    wanted = math.log(count / false_alarm) / size
    low, high = 1.0, 2.0 + math.sqrt(4.0 * wanted)
    for _ in range(60):
        middle = (low + high) / 2
        if (middle * middle - 1) / 2 - math.log(middle) < wanted:
            low = middle
        else:
            high = middle
    return high


def local_limit(count: int, size: int, rms: float) -> float:
    """Return the limit for the largest of `count` root mean squares of `size` rows each, in a plan whose own is `rms`.

    Two such tests share `FALSE_ALARM`.
    """
    return UNEVENNESS * max(1.0, rms) * largest_rms(count, size, FALSE_ALARM / 2)
