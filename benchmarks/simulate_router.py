"""How a cluster's router does with many replicas: prefix hits, balance and waiting, by simulation.

    python -m benchmarks.simulate_router --replicas 64 --requests 20000

The router is the real one. A replica is a model of an engine: steps that take a constant and a part for each row and
each prompt token, a budget of prompt tokens per step, and a prefix cache of so many tokens that forgets the least
recently used prefix. Requests arrive at random (Poisson) at a fraction `--load` of what the replicas can do without a
prefix cache; half are turns of conversations that grow, half begin with one of `--prefixes` system prompts, which are
as popular as words are (Zipf). Compared with choosing at random, the fewest requests, and the replica by a hash of the
prompt's beginning.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmengine.cluster.router import CHUNK_TOKENS, PrefixKeys, Router

STEP_S, ROW_S, PROMPT_TOKEN_S = 0.008, 0.00004, 0.00004
"""Seconds of a step, of a row more, and of a prompt token more: about an 8b model on one H100."""

STEP_TOKENS = 2048
CACHED_TOKENS = 400_000
OUTPUT_TOKENS = 128

Choose = Callable[[Mapping[int, int], PrefixKeys], int]


@dataclass(slots=True)
class Request:
    """One request: when it came, its prompt, what of it is left to compute, and the tokens it still wants."""

    arrived: float
    prompt: PrefixKeys
    uncached_tokens: int = 0
    output_tokens: int = OUTPUT_TOKENS
    first_token: float = 0.0


@dataclass(slots=True)
class Engine:
    """The model of a replica."""

    prompts: list[Request] = field(default_factory=list)
    rows: list[Request] = field(default_factory=list)
    cache: OrderedDict[int, None] = field(default_factory=OrderedDict)
    is_busy: bool = False
    busy_s: float = 0.0

    @property
    def num_requests(self) -> int:
        """Requests that it has."""
        return len(self.prompts) + len(self.rows)

    def add(self, request: Request) -> int:
        """Take a request; return how many tokens of its prompt are cached."""
        hits = 0
        for chunk in request.prompt.chunks:
            if chunk not in self.cache:
                break
            hits += 1
        for chunk in reversed(request.prompt.chunks):
            self.cache[chunk] = None
            self.cache.move_to_end(chunk)
        while len(self.cache) * CHUNK_TOKENS > CACHED_TOKENS:
            self.cache.popitem(last=False)
        request.uncached_tokens = max(request.prompt.num_tokens - hits * CHUNK_TOKENS, 1)
        self.prompts.append(request)
        return hits * CHUNK_TOKENS

    def step(self, now: float) -> tuple[float, list[Request]]:
        """Run one step; return when it ends, and the requests that end with it."""
        budget = STEP_TOKENS
        rows = self.rows
        begun: list[Request] = []
        for request in self.prompts:
            took = min(budget, request.uncached_tokens)
            request.uncached_tokens -= took
            budget -= took
            if not request.uncached_tokens:
                begun.append(request)
            if not budget:
                break
        took_s = STEP_S + ROW_S * len(rows) + PROMPT_TOKEN_S * (STEP_TOKENS - budget)
        end = now + took_s
        self.busy_s += took_s
        for request in begun:
            request.first_token = end
        self.prompts = [request for request in self.prompts if request.uncached_tokens]
        ended = []
        for request in [*rows, *begun]:
            request.output_tokens -= 1
            if not request.output_tokens:
                ended.append(request)
        self.rows = [request for request in [*rows, *begun] if request.output_tokens]
        return end, ended


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy achieved: fractions, and seconds to the first token."""

    hit_rate: float
    ttft_p50_s: float
    ttft_p99_s: float
    most_busy: float
    """Busiest replica's time in steps, by the mean's."""


def workload(num_requests: int, rate: float, num_prefixes: int, seed: int) -> list[Request]:
    """Requests in the order of their arrival."""
    draw = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(num_prefixes)]
    chats: list[tuple[int, ...]] = []
    fresh = iter(range(1 << 30, 1 << 60))
    now, requests = 0.0, []
    for _ in range(num_requests):
        now += draw.expovariate(rate)
        if draw.random() < 0.5:
            if not chats or draw.random() < 0.15:
                chats.append(())
            place = draw.randrange(max(0, len(chats) - 400), len(chats))
            chats[place] = (*chats[place], *(next(fresh) for _ in range(draw.randint(2, 8))))
            chunks = chats[place]
            if len(chunks) > 100:
                chats[place] = ()
        else:
            prefix = draw.choices(range(num_prefixes), weights)[0]
            shared = tuple(prefix * 1000 + index for index in range(16 + prefix % 32))
            chunks = (*shared, *(next(fresh) for _ in range(draw.randint(1, 6))))
        requests.append(Request(now, PrefixKeys(chunks, len(chunks) * CHUNK_TOKENS)))
    return requests


def simulate(requests: list[Request], num_replicas: int, choose: Choose) -> Result:
    """Run a workload through a policy."""
    engines = [Engine() for _ in range(num_replicas)]
    events: list[tuple[float, int, int]] = []  # (end of a step, order, replica)
    hits = total = order = 0
    ttfts: list[float] = []

    def advance(until: float) -> None:
        nonlocal order
        while events and events[0][0] <= until:
            now, _, replica = heapq.heappop(events)
            engine = engines[replica]
            if engine.num_requests:
                end, _ = engine.step(now)
                order += 1
                heapq.heappush(events, (end, order, replica))
            else:
                engine.is_busy = False

    for request in requests:
        advance(request.arrived)
        loads = {number: engine.num_requests for number, engine in enumerate(engines)}
        replica = choose(loads, request.prompt)
        hits += engines[replica].add(request)
        total += request.prompt.num_tokens
        if not engines[replica].is_busy:
            engines[replica].is_busy = True
            order += 1
            heapq.heappush(events, (request.arrived, order, replica))
    advance(float("inf"))
    ttfts = sorted(request.first_token - request.arrived for request in requests)
    busy = [engine.busy_s for engine in engines]
    return Result(
        hits / total,
        ttfts[len(ttfts) // 2],
        ttfts[len(ttfts) * 99 // 100],
        max(busy) / statistics.mean(busy),
    )


def policies(seed: int) -> dict[str, Choose]:
    """The policies compared, by name; each for one simulation."""
    draw = random.Random(seed)
    router = Router()

    def ours(loads: Mapping[int, int], prompt: PrefixKeys) -> int:
        replica = router.choose(loads, prompt)
        router.note(replica, prompt)
        return replica

    return {
        "at random": lambda loads, prompt: draw.randrange(len(loads)),
        "fewest requests": lambda loads, prompt: min(loads, key=lambda replica: (loads[replica], draw.random())),
        "hash of the beginning": lambda loads, prompt: hash(prompt.chunks[0]) % len(loads),
        "router": ours,
    }


def capacity(num_replicas: int) -> float:
    """Requests per second that the replicas can do without a prefix cache, with full batches."""
    mean_prompt = 2300
    batch = 128
    step_s = STEP_S + ROW_S * batch
    each_s = OUTPUT_TOKENS * step_s / batch + mean_prompt * PROMPT_TOKEN_S
    return num_replicas / each_s


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--prefixes", type=int, default=300)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rate = arguments.load * capacity(arguments.replicas)
    print("| policy | prompt tokens found | TTFT p50, ms | p99, ms | busiest replica / mean |")
    print("|---|---|---|---|---|")
    for name, choose in policies(arguments.seed).items():
        requests = workload(arguments.requests, rate, arguments.prefixes, arguments.seed)
        result = simulate(requests, arguments.replicas, choose)
        print(
            f"| {name} | {result.hit_rate:.0%} | {result.ttft_p50_s * 1e3:.0f} | {result.ttft_p99_s * 1e3:.0f} "
            f"| {result.most_busy:.2f} |"
        )


if __name__ == "__main__":
    main()
