"""Router: which replica runs a request. Least loaded first, except where another one knows the prompt's beginning.

Every replica that has run a prompt probably still has its prefix in the KV cache. The router remembers which replicas
saw which beginnings, cut into chunks: an approximation, since it does not learn what a replica has evicted. Knowing a
beginning saves its computation, and being loaded costs waiting; both are counted in tokens (or characters, whatever the
chunks are of), so that they can be compared (cf. SGLang's cache-aware router, which switches between two policies).
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

CHUNK_TOKENS = 64
CHUNK_CHARS = 256
"""Length of a chunk of token ids, and of text, which has about four characters to a token."""

_REQUEST_TOKENS = 128
"""What one more request in a replica's batch costs the next, as tokens of a prompt that need not be computed.
`benchmarks.simulate_router` finds 80 to 82 % of prompt tokens with 32 to 128, 74 % with 512 and 65 % with 1,024."""


@dataclass(frozen=True, slots=True)
class PrefixKeys:
    """A prompt as the router sees it.

    Attributes:
        chunks: a key for each beginning of whole chunks, shortest first.
        num_tokens: length of the prompt, estimated for text.
    """

    chunks: tuple[int, ...]
    num_tokens: int


def prefix_keys(prompt: str | Sequence[int], salt: Hashable = None) -> PrefixKeys:
    """The keys of a prompt: equal beginnings of whole chunks with an equal `salt` have equal keys."""
    size = CHUNK_CHARS if isinstance(prompt, str) else CHUNK_TOKENS
    pieces = (prompt[at : at + size] for at in range(0, len(prompt) - size + 1, size))
    parts: Iterable[Hashable] = pieces if isinstance(prompt, str) else map(tuple, pieces)
    chunks = itertools.accumulate(parts, lambda key, part: hash((key, part)), initial=hash(salt))
    next(chunks)
    num_tokens = len(prompt) * CHUNK_TOKENS // CHUNK_CHARS if isinstance(prompt, str) else len(prompt)
    return PrefixKeys(tuple(chunks), num_tokens)


class Router:
    """Chooses replicas. One thread.

    Args:
        max_chunks: beginnings that are remembered for each replica; those that were used longest ago are forgotten.
    """

    def __init__(self, max_chunks: int = 1 << 16) -> None:
        self._max_chunks = max_chunks
        self._seen: dict[int, OrderedDict[int, None]] = {}

    def choose(self, loads: Mapping[int, int], prompt: PrefixKeys) -> int:
        """The replica with the lowest cost; of equals the one with the fewest chunks, then the lowest number.

        Args:
            loads: replica -> requests that it has; all that may be chosen, at least one.
        """

        def cost(replica: int) -> tuple[int, int, int]:
            hit_tokens = self.matched_chunks(replica, prompt) * CHUNK_TOKENS
            return (
                loads[replica] * _REQUEST_TOKENS - hit_tokens,
                len(self._seen.get(replica, ())),
                replica,
            )

        return min(loads, key=cost)

    def matched_chunks(self, replica: int, prompt: PrefixKeys) -> int:
        """How many chunks at the prompt's beginning the replica has seen."""
        seen = self._seen.get(replica)
        if not seen:
            return 0
        return sum(1 for _ in itertools.takewhile(seen.__contains__, prompt.chunks))

    def note(self, replica: int, prompt: PrefixKeys) -> None:
        """Remember that the replica runs the prompt."""
        seen = self._seen.setdefault(replica, OrderedDict())
        # The shortest beginning last, so that it is forgotten last.
        for chunk in reversed(prompt.chunks):
            seen[chunk] = None
            seen.move_to_end(chunk)
        while len(seen) > self._max_chunks:
            seen.popitem(last=False)

    def forget(self, replica: int) -> None:
        """Forget what a replica has seen: it is gone, and one that takes its place begins without."""
        self._seen.pop(replica, None)
