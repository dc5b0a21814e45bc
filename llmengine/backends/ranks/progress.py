"""How far each rank is, in shared memory, and which rank is stuck: it neither goes on nor has a reason to take long.

A rank marks its progress when it takes a message, after each collective, and where its target says so. It rests while
it waits for a message or for other ranks. What is left is a rank that works. Then two things tell a hang from a long
computation, and neither depends on how busy the machine is:

- A computation uses a processor, waits for one, or waits for a disk. A rank that sleeps does none of these.
- Ranks have about equal parts, and rank 0 has one as well. So a rank may take a multiple of the longest time that
  rank 0 has lately taken between two marks.

Rejected: a thread of the rank that beats. It beats on while another thread sleeps or loops, and it does not while one
call keeps the interpreter's lock, however useful that call is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmengine.backends.ranks.memory import LINE_WORDS, SharedMemory

__all__ = ["Progress", "Seen", "Stuck", "StuckJudge", "progress_size"]

_COUNT, _WORKING = 0, 1
_TEXT = 64
_TIMES_RANK_0 = 3.0
_HALF_LIFE_S = 60.0
# More time than this between two looks means that the process which looks did not run itself.
_LONGEST_LOOK_S = 1.0


def progress_size(size: int) -> int:
    """Bytes of the file for the progress of so many ranks."""
    return SharedMemory.header_size(size) + _TEXT * size


@dataclass(frozen=True, slots=True)
class Seen:
    """What can be seen of a rank.

    Attributes:
        count: marks so far.
        is_working: it neither waits for other ranks nor for a message.
        what: what it has been doing since its last mark.
    """

    count: int
    is_working: bool
    what: str = ""


class Progress:
    """The end of one rank, which alone calls `mark` and `rest`; everybody may look.

    Args:
        fd: descriptor of a file of `progress_size` zeros; stays the caller's.
        rank: this rank, from 0.
        size: how many ranks there are.
    """

    def __init__(self, fd: int, rank: int, size: int) -> None:
        memory = SharedMemory(fd, size)
        self._words, self._texts = memory.words, memory.data
        self._rank = rank
        self._at = rank * LINE_WORDS
        self._text = slice(rank * _TEXT, (rank + 1) * _TEXT)
        self._size = size

    def mark(self, what: bytes = b"") -> None:
        """Say that this rank goes on, now with `what` (ASCII, the first 64 bytes; empty: as before). Takes 1 us."""
        if what:
            self._texts[self._text] = what[:_TEXT].ljust(_TEXT)
        self._words[self._at + _COUNT] += 1
        self._words[self._at + _WORKING] = 1

    def rest(self) -> None:
        """Say that this rank waits for others, until the next mark."""
        self._words[self._at + _WORKING] = 0

    def others_work(self) -> bool:
        """Whether any other rank is not resting."""
        return any(self._words[rank * LINE_WORDS + _WORKING] for rank in range(self._size) if rank != self._rank)

    def look(self) -> list[Seen]:
        """How far all ranks are."""
        return [
            Seen(
                self._words[rank * LINE_WORDS + _COUNT],
                bool(self._words[rank * LINE_WORDS + _WORKING]),
                bytes(self._texts[rank * _TEXT : (rank + 1) * _TEXT]).decode("ascii", "replace").strip("\0 "),
            )
            for rank in range(self._size)
        ]


@dataclass(frozen=True, slots=True)
class Stuck:
    """A rank that is stuck, for how long it was watched without progress, and whether it has slept since, for the
    greater part.
    """

    rank: int
    for_s: float
    sleeps: bool
    what: str


class StuckJudge:
    """Decides from looks, a fraction of a second apart, which rank is stuck.

    Args:
        size: ranks, including rank 0, which is never stuck.
        sleeps: whether a rank has done nothing at all since it was last asked, not even wait for a processor.
    """

    def __init__(self, size: int, sleeps: Callable[[int], bool]) -> None:
        self._sleeps = sleeps
        self._counts = [-1] * size
        self._still_s = [0.0] * size
        self._asleep_s = [0.0] * size
        """Since it was last seen awake."""
        self._slept_s = [0.0] * size
        """In all since its last mark."""
        self._pace_s = 0.0

    def look(
        self, seen: Sequence[Seen | None], since_s: float, limit_s: float, busy_limit_s: float | None = None
    ) -> Stuck | None:
        """The first rank that is stuck.

        Args:
            seen: of all ranks; None for one on another host of which nothing was said since the last look.
            since_s: time since the last look.
            limit_s: how long a rank may sleep.
            busy_limit_s: what a rank that does not sleep may take beside a multiple of rank 0's time; None: `limit_s`.
        """
        busy_limit_s = limit_s if busy_limit_s is None else busy_limit_s
        since_s = min(since_s, _LONGEST_LOOK_S)
        for rank, now in enumerate(seen):
            if now is not None:
                self._note(rank, now, since_s)
        self._pace_s = max(self._still_s[0], self._pace_s * 0.5 ** (since_s / _HALF_LIFE_S))
        for rank, now in enumerate(seen[1:], 1):
            still_s, asleep_s = self._still_s[rank], self._asleep_s[rank]
            if now is not None and (asleep_s >= limit_s or still_s >= busy_limit_s + _TIMES_RANK_0 * self._pace_s):
                return Stuck(rank, still_s, self._slept_s[rank] > still_s / 2, now.what)
        return None

    def _note(self, rank: int, now: Seen, since_s: float) -> None:
        if not now.is_working or now.count != self._counts[rank]:
            self._counts[rank] = now.count
            self._still_s[rank] = self._asleep_s[rank] = self._slept_s[rank] = 0.0
            return
        self._still_s[rank] += since_s
        if rank and self._sleeps(rank):
            self._asleep_s[rank] += since_s
            self._slept_s[rank] += since_s
        else:
            self._asleep_s[rank] = 0.0
