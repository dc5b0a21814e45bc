"""Readers: places in a request's output, from which a handle takes what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmengine.errors import InvalidRequestError
from llmengine.outputs import GenerationOutput

if TYPE_CHECKING:
    from llmengine.engine.stream import FamilyStream, OutputStream


class OutputReader:
    """A place in a single output. Used by one thread at a time.

    Attributes:
        streaming: `take()` gives what is new; otherwise it gives the final output only.
        num_seen: tokens that were taken.
        exhausted: the last output was taken, or the reader has left; `take()` must not be called any more.
    """

    __slots__ = ("_stream", "exhausted", "num_seen", "streaming")

    def __init__(self, stream: OutputStream, streaming: bool) -> None:
        self._stream = stream
        self.streaming = streaming
        self.num_seen = 0
        self.exhausted = False

    def take(self) -> GenerationOutput | None:
        """The output up to now with what is new as its delta; None if nothing is new. Never waits.

        Raises the failure of a failed stream once everything before it was taken.
        """
        stream = self._stream
        ended, begin, end = stream.ended, self.num_seen, stream.num_published
        if ended:
            return self._take_last()
        if begin == end or not self.streaming:
            return None
        self.num_seen = end
        if stream.slow_consumer != "coalesce":
            stream.mark_read(end)
        return GenerationOutput(stream.log, begin, end)

    def _take_last(self) -> GenerationOutput:
        stream, begin = self._stream, self.num_seen
        end = self.num_seen = stream.num_published
        failure = stream.failure
        self.exhausted = failure is None or end == begin
        if failure is not None and end == begin:
            raise failure
        return GenerationOutput(stream.log, begin, end, stream.log.finish_reason if self.exhausted else None)

    def final(self) -> GenerationOutput:
        """The whole output of a stream that has ended; raises the failure of a failed one."""
        stream = self._stream
        if stream.failure is not None:
            raise stream.failure
        return GenerationOutput(stream.log, 0, stream.num_published, stream.log.finish_reason)


class FamilyReader:
    """A place in each of several outputs of one prompt. Used by one thread at a time.

    With `streaming`, `take()` gives outputs of single members in turn, each with its `index` and with deltas of its
    own, and for each member one that is `finished`. Otherwise it gives one output that has all in `outputs`.

    The attributes are those of `OutputReader`. Raises `InvalidRequestError` for streaming with `best_of`, since the
    best outputs are known at the end only.
    """

    __slots__ = ("_family", "_num_seen_of", "_unfinished", "exhausted", "num_seen", "streaming")

    def __init__(self, family: FamilyStream, streaming: bool) -> None:
        num_members = len(family.members)
        if streaming and family.num_returned < num_members:
            raise InvalidRequestError(
                f"streaming=True needs every output, and the best {family.num_returned} of best_of={num_members} are "
                "known only when all are finished"
            )
        self._family = family
        self.streaming = streaming
        self.num_seen = 0
        self.exhausted = False
        self._num_seen_of = [0] * num_members
        self._unfinished = list(range(num_members))

    def take(self) -> GenerationOutput | None:
        """What is new of the next member that has anything new, or of all; None if nothing is. Never waits.

        Raises the failure of a failed family once everything before it was taken.
        """
        family = self._family
        ended = family.ended
        if self.streaming and (output := self._take_delta()) is not None:
            self.exhausted = not self._unfinished
            return output
        if ended and (not self.streaming or family.failure is not None):
            self.exhausted = True
            return self.final()
        return None

    def _take_delta(self) -> GenerationOutput | None:
        for place, index in enumerate(self._unfinished):
            member = self._family.members[index]
            ended, begin, end = member.ended, self._num_seen_of[index], member.num_published
            is_last = ended and member.failure is None
            if begin == end and not is_last:
                continue
            self._num_seen_of[index] = end
            self.num_seen += end - begin
            member.mark_read(end)
            self._unfinished = self._unfinished[place + 1 :] + self._unfinished[:place] + ([] if is_last else [index])
            return GenerationOutput(member.log, begin, end, member.log.finish_reason if is_last else None)
        return None

    def final(self) -> GenerationOutput:
        """The outputs of a family that has ended, with `best_of` the best of them; raises the failure of a failed one.

        They are in `outputs`; the output itself is the first of them.
        """
        if (failure := self._family.failure) is not None:
            raise failure
        outputs = [
            GenerationOutput(member.log, 0, member.num_published, member.log.finish_reason)
            for member in self._family.members
        ]
        num_returned = self._family.num_returned
        if num_returned < len(outputs):
            outputs.sort(key=_rank)
        first = self._family.members[outputs[0].index]
        return GenerationOutput(
            first.log, 0, first.num_published, first.log.finish_reason, tuple(outputs[:num_returned])
        )


Reader = OutputReader | FamilyReader


def _rank(output: GenerationOutput) -> tuple[bool, float, int]:
    """Sort key of `best_of`: complete outputs first, the likeliest first, of equals the first index."""
    total = output.cumulative_logprob
    assert total is not None
    return output.finish_reason not in ("stop", "length"), -total, output.index
