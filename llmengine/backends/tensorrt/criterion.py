"""The criterion of verification: limits beyond which errors are more than rounding, for any number of elements.

Errors are measured in units of their expected size (`expected_outputs.py`), z = error / sqrt(variance). A sum of
independent, uniform errors is sub-Gaussian, with its variance as the proxy (E exp(s z) <= exp(s^2 / 2)). So the root
mean square of `size` independent z exceeds t > 1 with a probability of at most (t * exp((1 - t^2) / 2)) ** size
(Chernoff). The largest of `count` such root mean squares exceeds it with at most `count` times that probability,
however they depend on each other. Nothing is estimated, and no constant depends on a shape.
"""

from __future__ import annotations

import math

VERSION = 3
"""Version of the criterion, to be raised when limits or inputs change. Findings of other versions are forgotten,
refusals too."""

FALSE_ALARM = 1e-9
"""Upper bound of the probability that rounding as expected fails one output of one plan at one size."""

PRECISION_LIMIT = 3.5
"""Limit of the root mean square of all z. Products summed in fp32 give 0.5 to 1.1, wherever results are rounded. Sums
in fp16 give 2.3 to 2.8 in a model with hidden states of 576, which does little harm, 4 to 5 with 2048, 6 with 4096."""

UNEVENNESS = 2.0
"""Factor by which the expected error of one element or column may exceed the model, or the plan's own root mean square
where that is larger. A plan whose sums have an unexpected order distributes its errors differently."""


def largest_rms(count: int, size: int, false_alarm: float) -> float:
    """Bound that the largest of `count` root mean squares of `size` independent z exceeds only by false alarm.

    Args:
        false_alarm: its probability, at most.
    """
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
    """Limit for the largest of `count` root mean squares over `size` rows each; two such tests share `FALSE_ALARM`.

    Args:
        rms: the root mean square over all elements of the plan's output.
    """
    return UNEVENNESS * max(1.0, rms) * largest_rms(count, size, FALSE_ALARM / 2)
