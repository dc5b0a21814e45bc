"""What follows when something is killed under load."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Kill:
    """What followed a kill, until the next.

    Attributes:
        kind: what was killed.
        endings: how many streams ended in which way.
        whole_s: seconds until all was there again.
        slowest_s: seconds of the slowest stream.
    """

    kind: str
    endings: Counter[str] = field(default_factory=Counter)
    whole_s: float = 0.0
    slowest_s: float = 0.0

    def note(self, ending: str, took_s: float) -> None:
        """Count a stream that ended in this way, after so many seconds."""
        self.endings[ending] += 1
        self.slowest_s = max(self.slowest_s, took_s)
