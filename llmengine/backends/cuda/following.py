"""What rank 0 tells the other ranks of a shared model, and how they follow.

Rank 0 decides; the others queue the same work in the same order, so that none enters a collective alone, or the same
steps, if they are of another stage. They get a step as the bytes that rank 0 copies to its own device, and never see a
request::

    rank 0     fill N, tell, send, replay | fill N+1, tell, send, replay | wait for N, ...
    rank 1     ....... take, send, replay ....... take, send, replay
    devices    ....... step N: sums and ids with each other | step N+1 ...

A mirror of the step buffer is written again when rank 0 has seen its step end. The others have copied it by then, as
rank 0's step ends with sums that they take part in after their copy, or begins with what they send after it.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmengine.backends.cuda.buckets import Bucket

if TYPE_CHECKING:
    from llmengine.backends.cuda.graphs import GraphCache
    from llmengine.backends.cuda.step_program import StepProgram
    from llmengine.backends.cuda.stream import StepStream


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the next step computes: what `StepBuffer.fill` wrote into the mirror `ring_index`."""

    mixed: bool
    ring_index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Run:
    """A whole step; `captures`: it also becomes a graph, for which it is queued a second time."""

    bucket: Bucket
    captures: bool


@dataclass(frozen=True, slots=True)
class RunToLast:
    """A step up to its last attention; stages before the last run it to its end.

    Attributes:
        samples: `Finish` follows; else the step samples nothing.
    """

    bucket: Bucket
    samples: bool


@dataclass(frozen=True, slots=True)
class RunLast:
    """The logits of some tokens of the step that was run up to the last attention."""

    tokens: Sequence[int]


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of that step: logits of the sampled tokens, and their choice."""

    bucket: Bucket


@dataclass(frozen=True, slots=True)
class Sampled:
    """Ids that slots sampled and that the next step needs, for a first stage that does not get them from the last."""

    slots: Sequence[int]
    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class NextWeight:
    """Each rank of a stage answers with its part of the next canonical weight, or of the first if `restarts`.

    Ranks of other stages, and those that have no more, answer with nothing.
    """

    stage: int
    restarts: bool


StepMessage = Inputs | Run | RunToLast | RunLast | Finish | Sampled
Message = StepMessage | NextWeight

Tell = Callable[[Message], None]
"""Tells the other ranks, in order."""


_STEP = struct.Struct("<4?3i")
"""The head of a step that is run whole, as almost all messages are; others are pickled behind a zero."""


def encode(messages: Sequence[Message]) -> bytes:
    """Bytes for `decode`."""
    if len(messages) == 2 and isinstance(messages[0], Inputs) and isinstance(messages[1], Run):
        inputs, bucket = messages[0], messages[1].bucket
        flags = (True, inputs.mixed, bucket.draws, messages[1].captures)
        return _STEP.pack(*flags, inputs.ring_index, bucket.num_tokens, bucket.num_samples) + inputs.data
    return b"\0" + pickle.dumps(messages)


def decode(data: bytes) -> Sequence[Message]:
    """Inverse of `encode`; only for bytes of a process of ours, for they may run code."""
    if not data[0]:
        messages: Sequence[Message] = pickle.loads(memoryview(data)[1:])
        return messages
    _, mixed, draws, captures, ring_index, num_tokens, num_samples = _STEP.unpack_from(data)
    bucket = Bucket(num_tokens, num_samples, mixed, draws)
    return Inputs(mixed, ring_index, data[_STEP.size :]), Run(bucket, captures)


class Follower:
    """Queues what rank 0 says, on the parts of another rank."""

    def __init__(self, program: StepProgram, stream: StepStream, graphs: GraphCache[Bucket]) -> None:
        self._program = program
        self._stream = stream
        self._graphs = graphs
        self._begun: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def follow(self, message: StepMessage) -> None:
        """Queue the work of one message."""
        program = self._program
        if isinstance(message, Inputs):
            buffer = program.buffer_of(message.mixed)
            buffer.take(message.ring_index, message.data)
            buffer.send(message.ring_index, self._stream)
        elif isinstance(message, Run):
            bucket = message.bucket
            self._graphs.follow(bucket, partial(program.run, bucket), captures=message.captures)
        elif isinstance(message, Sampled):
            to_device = program.sampler.to_device
            slots, ids = to_device(message.slots, torch.int64), to_device(message.token_ids, torch.int32)
            program.state.last_token_ids.index_copy_(0, slots, ids)
        elif isinstance(message, RunToLast):
            self._begun = program.begin(message.bucket, samples=message.samples)
        elif not program.model.has_head:
            pass  # the stage has done its part
        elif isinstance(message, RunLast):
            assert self._begun is not None
            program.model.last(*self._begun, program.sampler.to_device(message.tokens, torch.int32))
        else:
            assert self._begun is not None
            program.run_last(message.bucket, *self._begun)
            self._begun = None

    def close(self) -> None:
        """Drop the graphs; nothing may be running."""
        self._graphs.clear()
        self._stream.close()
