"""When requests are sent: by clients that wait for their answers, or at times that do not depend on the answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

ArrivalProcess = Literal["poisson", "constant"]


@dataclass(frozen=True, slots=True)
class Clients:
    """So many clients, each of which sends its next request when it has the whole answer to the previous one."""

    count: int

    def __str__(self) -> str:
        return f"{self.count} client{'' if self.count == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests a second on average, whether or not earlier ones are answered."""

    per_s: float
    process: ArrivalProcess = "poisson"

    def offsets_s(self, rng: random.Random) -> Iterator[float]:
        """Moments of the requests, in seconds since the start, without end; the first one is 0."""
        offset_s = 0.0
        while True:
            yield offset_s
            offset_s += 1 / self.per_s if self.process == "constant" else rng.expovariate(self.per_s)

    def __str__(self) -> str:
        return f"{self.per_s:g}/s"


Arrivals = Clients | Rate
