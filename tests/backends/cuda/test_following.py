"""What rank 0 tells the others arrives as it was said."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from llmengine.backends.cuda.buckets import Bucket
from llmengine.backends.cuda.following import (
    Finish,
    Inputs,
    Message,
    NextWeight,
    Run,
    RunLast,
    RunToLast,
    Sampled,
    decode,
    encode,
)

MIXED, DECODES = Bucket(96, 8, mixed=True, draws=True), Bucket(16, 16, mixed=False)


@pytest.mark.parametrize(
    "messages",
    [
        [Inputs(True, 3, b"\0\1\2\3"), Run(MIXED, captures=False)],
        [Inputs(False, 0, b""), Run(DECODES, captures=True)],
        [Run(DECODES, captures=True)],
        [Inputs(True, 8, b"some"), RunToLast(MIXED, samples=False)],
        [RunLast([4, 0, 2])],
        [Finish(MIXED)],
        [Sampled([3, 1], [70, 8]), Inputs(False, 2, b"some"), Run(DECODES, captures=False)],
        [NextWeight(1, restarts=True)],
    ],
)
def test_messages_arrive_as_they_were(messages: Sequence[Message]) -> None:
    assert list(decode(encode(messages))) == list(messages)
