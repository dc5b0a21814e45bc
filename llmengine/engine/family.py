"""Several outputs of one prompt: the handle that reads them, and their seeds.

To the scheduler each output is a `Request`; those of one prompt are a `request.Family` and share the prompt's blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from llmengine.engine.handle import RequestHandle
from llmengine.engine.stream import FamilyStream, OutputStream, Stream
from llmengine.errors import InvalidRequestError
from llmengine.outputs import GenerationOutput

_MASK = 2**64 - 1


class FamilyHandle(RequestHandle):
    """A `RequestHandle` of several outputs.

    With `streaming` it yields outputs of single members, each with its `index` and deltas of its own, and for each one
    that is `finished`. Otherwise, and when awaited, it gives one output that has all in `outputs`. What aborts the
    request aborts all of them.
    """

    def __init__(
        self,
        family: FamilyStream,
        abort: Callable[[Stream, bool], None],
        *,
        num_returned: int,
        streaming: bool,
        owner: object = None,
    ) -> None:
        # A family has everything that the methods use which are not overridden here.
        super().__init__(cast(OutputStream, family), abort, streaming=streaming, owner=owner)
        self._family = family
        self._num_returned = num_returned
        self._num_seen = [0] * len(family.members)
        self._unfinished = list(range(len(family.members)))

    def _another(self, streaming: bool) -> RequestHandle:
        if streaming and self._num_returned < len(self._family.members):
            raise InvalidRequestError(
                f"streaming=True: which {self._num_returned} of {len(self._family.members)} outputs are the best "
                "(best_of) is known when all are finished"
            )
        return FamilyHandle(
            self._family, self._abort, num_returned=self._num_returned, streaming=streaming, owner=self._owner
        )

    def _final(self) -> GenerationOutput:
        if (failure := self._family.failure) is not None:
            raise failure
        outputs = [
            GenerationOutput(member.log, 0, member.num_published, member.log.finish_reason)
            for member in self._family.members
        ]
        if self._num_returned < len(outputs):
            outputs.sort(key=_rank)
        first = self._family.members[outputs[0].index]
        return GenerationOutput(
            first.log, 0, first.num_published, first.log.finish_reason, tuple(outputs[: self._num_returned])
        )

    def _take(self) -> GenerationOutput | None:
        family = self._family
        ended = family.ended
        if self._streaming and (output := self._next_delta()) is not None:
            self._exhausted = not self._unfinished
            return output
        if ended and (not self._streaming or family.failure is not None):
            self._exhausted = True
            return self._final()
        return None

    def _next_delta(self) -> GenerationOutput | None:
        """Return what is new of the next member that has anything new, members in turn."""
        for place, index in enumerate(self._unfinished):
            member = self._family.members[index]
            ended, begin, end = member.ended, self._num_seen[index], member.num_published
            is_last = ended and member.failure is None
            if begin == end and not is_last:
                continue
            self._num_seen[index] = end
            self._seen += end - begin
            member.mark_read(end)
            self._unfinished = self._unfinished[place + 1 :] + self._unfinished[:place] + ([] if is_last else [index])
            return GenerationOutput(member.log, begin, end, member.log.finish_reason if is_last else None)
        return None


def child_seed(seed: int, index: int) -> int:
    """Return the seed of a prompt's output `index`, in [0, 2**63): `seed` itself for the first.

    For the others splitmix64 (see `backends.sampler`) of both: seeds that callers count up must not meet.
    """
    if index == 0:
        return seed
    state = _splitmix64(_splitmix64(seed) ^ index)
    return _splitmix64(state) >> 1


def _splitmix64(state: int) -> int:
    mixed = (state + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def _rank(output: GenerationOutput) -> tuple[bool, float, int]:
    """Sort key of `best_of`: complete outputs first, the likeliest first, of equals the first index."""
    total = output.cumulative_logprob
    assert total is not None
    return output.finish_reason not in ("stop", "length"), -total, output.index
