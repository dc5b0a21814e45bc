"""Several outputs of one prompt: their streams as one, and the handle that reads them.

To the scheduler each output is a `Request`; those of one prompt are a `request.Family` and share the prompt's blocks.
"""

from __future__ import annotations

import time
from asyncio import get_running_loop
from collections.abc import Callable, Sequence
from typing import Any, cast

from llmengine.engine.handle import RequestHandle
from llmengine.engine.stream import LoopWaiter, OutputStream, Waiter
from llmengine.errors import LLMEngineError
from llmengine.outputs import GenerationOutput

_MASK = 2**64 - 1


class FamilyStream:
    """The streams of all outputs of one prompt, seen as one: it has ended when all have. Any thread."""

    def __init__(self, members: Sequence[OutputStream]) -> None:
        self.members = tuple(members)
        self.log = members[0].log

    @property
    def num_published(self) -> int:
        """Tokens that may be read, of all members."""
        return sum(member.num_published for member in self.members)

    @property
    def ended(self) -> bool:
        """True once nothing more will come from any member."""
        return all(member.ended for member in self.members)

    @property
    def failure(self) -> LLMEngineError | None:
        """What the first failed member's reads raise; None where all are sound."""
        return next((member.failure for member in self.members if member.failure is not None), None)

    @property
    def abort_requested(self) -> bool:
        """As of a single stream; set for all members at once."""
        return self.members[0].abort_requested

    @abort_requested.setter
    def abort_requested(self, value: bool) -> None:
        for member in self.members:
            member.abort_requested = value

    @property
    def consumer(self) -> Any:
        """Kept by each member, of which the engine keeps those that run."""
        return self.members[0].consumer

    @consumer.setter
    def consumer(self, reference: Any) -> None:
        for member in self.members:
            member.consumer = reference

    def fail(self, failure: LLMEngineError) -> list[Waiter]:
        """End all members that have not ended; return the waiters to be woken."""
        return [waiter for member in self.members for waiter in member.fail(failure)]

    def attach(self, *, final_only: bool) -> LoopWaiter:
        """Return one new waiter of the running event loop that hears of every member."""
        waiter = LoopWaiter(cast(OutputStream, self), get_running_loop())
        for member in self.members:
            member.add_waiter(waiter, final_only=final_only)
        return waiter

    def detach(self, waiter: Waiter) -> None:
        """Wake this waiter no more; idempotent."""
        for member in self.members:
            member.detach(waiter)

    def wait_blocking(self, timeout_s: float | None) -> bool:
        """Block this thread until all members have ended; False when `timeout_s` seconds passed first."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        return all(
            member.wait_blocking(None if end is None else max(0.0, end - time.monotonic())) for member in self.members
        )


Stream = OutputStream | FamilyStream
"""What one call of `generate_async` reads from."""


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

    async def __anext__(self) -> GenerationOutput:
        family = self._family
        while not self._exhausted:
            seen = sum(self._num_seen)
            if self._streaming and (output := self._next_delta()) is not None:
                return output
            if family.ended and (not self._streaming or not self._unfinished or family.failure is not None):
                self._exhausted = True
                if self._streaming and family.failure is None:
                    break
                return self._final()
            waiter = self._waiter
            if waiter is None or waiter.resume or not waiter.attached or waiter.loop is not get_running_loop():
                self._waiter = family.attach(final_only=not self._streaming)
                continue  # something may have been published before
            waiter.seen = seen
            try:
                await waiter
            except BaseException:
                # Cancelled, or the loop closes the coroutine: nobody will read on.
                self._exhausted = True
                self.abort()
                raise
        raise StopAsyncIteration

    def _next_delta(self) -> GenerationOutput | None:
        """Return what is new of the next member that has anything new, members in turn."""
        for place, index in enumerate(self._unfinished):
            member = self._family.members[index]
            ended, begin, end = member.ended, self._num_seen[index], member.num_published
            is_last = ended and member.failure is None
            if begin == end and not is_last:
                continue
            self._num_seen[index] = end
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
