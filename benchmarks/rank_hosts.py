"""Microseconds that two ranks take to tell each other things: through memory that they share, and over TCP.

    python -m benchmarks.rank_hosts

Over TCP the ranks are as on two hosts, but on this one, so what a network would add is missing. "Telling" is what rank
0 spends on the message of a step of 256 requests. "Step" lasts from that until both have joined a sum of one number.
Then sums of so many bytes, and hidden states that one stage of a pipeline passes to the next.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.pretended_hosts import PretendedHosts
from benchmarks.report import add_json, append_record, format_table, new_parser
from llmengine.backends.cpu.step_inputs import StepInputs
from llmengine.backends.ranks import RankChannel, RankGroup
from llmengine.backends.shared_cpu_passes import Forward

NUM_REQUESTS = 256
SIZES = (2304, 16 << 10, 256 << 10, 4 << 20)
"""Bytes of tensors: one token of SmolLM2-135M, one of a model of 4,096 float32, 16 of these, 256 of them."""

_STOP = b"stop"


def serve(channel: RankChannel, payload: bytes) -> None:
    """Be rank 1: do what each message says, `Forward` like a step without a model."""
    torch.set_num_threads(1)
    while (message := channel.receive()) != _STOP:
        if message.startswith(b"pass "):
            channel.pipe.send(torch.zeros(int(message[5:]) // 4))
        elif message.startswith(b"sum "):
            channel.collectives.all_reduce(torch.ones(int(message[4:]) // 4))
        else:
            pickle.loads(message)
            channel.collectives.all_reduce(torch.ones(1))


def step_message() -> bytes:
    """What ranks are told of a step that decodes, in which every 32nd request takes a new block."""
    each = np.arange(NUM_REQUESTS)
    inputs = StepInputs(
        token_ids=each * 97 % 49152,
        positions=each + 500,
        token_slots=each,
        row_slots=each,
        context_lens=each + 501,
        row_starts=np.arange(NUM_REQUESTS + 1),
        num_decodes=NUM_REQUESTS,
        sample_tokens=each,
        sample_slots=each,
        sample_positions=each + 501,
    )
    tables = [(slot, [slot + 1000]) for slot in range(0, NUM_REQUESTS, 32)]
    return pickle.dumps(Forward(tables, inputs, ends=True))


@dataclass(frozen=True)
class Times:
    """Of many calls, in microseconds: the median, and the time in which the fastest tenth was done."""

    median: float
    fast: float

    def __str__(self) -> str:
        return f"{self.median:,.0f} ({self.fast:,.0f})"


def measure(hosts: tuple[int, int], count: int) -> dict[str, Times]:
    """What ranks take that share each matrix, and two stages."""
    found = {}
    with _open(hosts, stage_size=2) as group:
        message = step_message()

        def tell() -> None:
            group.broadcast(message)

        def add_up(size: int) -> None:
            group.collectives.all_reduce(torch.ones(size // 4))

        found["telling"] = _time(count, tell, after=lambda: add_up(4))
        found["step"] = _time(count, lambda: (tell(), add_up(4)))
        for size in SIZES:
            told = b"sum %d" % size
            found[f"sum of {size:,} B"] = _time(count, partial(add_up, size), before=partial(group.broadcast, told))
    with _open(hosts, stage_size=1) as group:
        for size in SIZES:
            found[f"passing {size:,} B"] = _time(
                count,
                partial(group.pipe.receive, (size // 4,), torch.float32),
                partial(group.broadcast, b"pass %d" % size),
            )
    return found


@contextmanager
def _open(hosts: tuple[int, int], stage_size: int) -> Iterator[RankGroup]:
    where = PretendedHosts(hosts) if any(hosts) else None
    group = RankGroup(2, "benchmarks.rank_hosts:serve", b"", hosts=where, stage_size=stage_size)
    group.start()
    try:
        yield group
        group.broadcast(_STOP)
    finally:
        group.close()


def _time(
    count: int,
    call: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> Times:
    """Time so many calls, after a tenth as many that do not count."""
    seconds = []
    for _ in range(count + count // 10):
        before()
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
        after()
    counted = sorted(seconds[count // 10 :])
    return Times(1e6 * counted[count // 2], 1e6 * counted[count // 10])


def main() -> None:
    parser = new_parser("rank_hosts", __doc__)
    parser.add_argument("--count", type=int, default=1000, help="calls of each kind")
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"shared memory": (0, 0), "TCP": (0, 1)}
    results = {name: measure(hosts, arguments.count) for name, hosts in ways.items()}
    print(f"the message of a step has {len(step_message()):,} bytes; us, medians (and the fastest tenth)")
    rows = [[what, *(str(result[what]) for result in results.values())] for what in results["TCP"]]
    print(format_table(["", *ways], rows))
    append_record(arguments, "rank_hosts", results)


if __name__ == "__main__":
    main()
