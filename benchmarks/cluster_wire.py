"""What going through a cluster costs: CPU time per token and per request, and throughput by number of replicas.

    python -m benchmarks.cluster_wire
    python -m benchmarks.cluster_wire --ray

Consumers stream requests from an `LLM` itself, and from a cluster whose replicas are in this process, are processes
that are spoken to over a socket, and, with `--ray`, are Ray's actors. The model is `benchmarks.host.NullBackend`, whose
step takes `--step-ms` and no CPU time. CPU time is that of this process and of its replicas' processes. It is taken for
short and for long outputs, which tells what is spent for a token from what is spent for a request.

    this, replicas  CPU time of this process, with the consumers and the cluster's thread, and of the replicas'
    added           what the sum of both is above that of the LLM itself
    steps           share of the tokens per second that the replicas' steps allow
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from benchmarks.host import Device, NullBackend
from benchmarks.process_replicas import ProcessTransport, fork_server
from benchmarks.report import format_table, new_parser
from benchmarks.workloads import StreamingLoad, exact_length
from llmengine import LLM, KvCacheConfig, SchedulerConfig
from llmengine.batch import Batch
from llmengine.cluster import Cluster, ClusterConfig
from llmengine.cluster.transport import LocalTransport, TransportFactory

_PROMPT_TOKENS = 128
_OUTPUTS = (16, 144)
"""Tokens of a short output and of a long one."""

_NAMES = {"local": "in this process", "processes": "processes", "ray": "Ray actors"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What a load took.

    Attributes:
        this_s, replicas_s: CPU seconds of this process and of the replicas' processes.
        wall_s: seconds.
    """

    this_s: float
    replicas_s: float
    wall_s: float

    def per(self, count: int, less: Cost | None = None) -> Cost:
        """Means over `count`, of what is above `less`."""
        base = less or Cost(0.0, 0.0, 0.0)
        return Cost(
            (self.this_s - base.this_s) / count,
            (self.replicas_s - base.replicas_s) / count,
            (self.wall_s - base.wall_s) / count,
        )


def make_llm(batch_size: int, step_s: float, on_step: Callable[[Batch], None] | None = None) -> LLM:
    """An engine whose steps take so long."""
    load = StreamingLoad(batch_size, 0, _PROMPT_TOKENS, max(_OUTPUTS))
    return LLM.from_backend(
        lambda: NullBackend(load, Device(step_s)),
        scheduler_config=SchedulerConfig(max_batch_size=batch_size),
        kv_cache_config=KvCacheConfig(enable_prefix_caching=False),
    )


async def load_llm(batch_size: int, step_s: float) -> LLM:
    """`make_llm` for an actor, whose event loop it does not block."""
    return await asyncio.to_thread(make_llm, batch_size, step_s)


def transports(kind: str, batch_size: int, step_s: float) -> TransportFactory:
    """Makes replicas of a kind of `_NAMES`."""
    make = partial(make_llm, batch_size, step_s)
    if kind == "local":
        return lambda number: LocalTransport(make)
    if kind == "processes":
        context = fork_server()
        return lambda number: ProcessTransport(context, make)
    from llmengine.cluster.ray_transport import actor_transports

    config = ClusterConfig(actor_options={"num_cpus": 0})
    return actor_transports(partial(load_llm, batch_size, step_s), config)


async def serve(llm: LLM | Cluster, concurrency: int, num_requests: int, num_tokens: int) -> None:
    """Stream so many requests, with so many consumers."""
    left = iter(range(num_requests))

    async def consume(index: int) -> None:
        for number in left:
            got = 0
            prompt = [(index * 7919 + number + position) % 30_000 for position in range(_PROMPT_TOKENS)]
            async for output in llm.generate_async(prompt, exact_length(num_tokens), streaming=True):
                got += len(output.token_ids_delta)
            assert got == num_tokens

    async with asyncio.TaskGroup() as group:
        for index in range(concurrency):
            group.create_task(consume(index))


def replica_cpu_s(kind: str) -> float:
    """CPU seconds of all replicas' processes that live."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if kind == "processes" or "ReplicaActor" in " ".join(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.NoSuchProcess:
            pass
    return total


async def measure(llm: LLM | Cluster, kind: str, concurrency: int, num_requests: int, num_tokens: int) -> Cost:
    """Run a load, after a short one."""
    await serve(llm, concurrency, concurrency, 4)
    began, cpu, replicas = time.perf_counter(), time.process_time(), replica_cpu_s(kind)
    await serve(llm, concurrency, num_requests, num_tokens)
    cpu_s = time.process_time() - cpu
    return Cost(cpu_s, replica_cpu_s(kind) - replicas, time.perf_counter() - began)


async def costs(llm: LLM | Cluster, kind: str, concurrency: int, num_requests: int) -> tuple[Cost, Cost]:
    """Means per token and per request."""
    short, long = [await measure(llm, kind, concurrency, num_requests, num_tokens) for num_tokens in _OUTPUTS]
    token = long.per(num_requests * (_OUTPUTS[1] - _OUTPUTS[0]), less=short)
    request = short.per(num_requests)
    rest = Cost(*(getattr(token, name) * _OUTPUTS[0] for name in ("this_s", "replicas_s", "wall_s")))
    return token, request.per(1, less=rest)


async def compare(kinds: Sequence[str], concurrency: int, num_requests: int, step_s: float) -> list[list[str]]:
    """Rows of costs: of an LLM, and of a cluster with one replica of each kind."""
    with make_llm(concurrency, step_s) as llm:
        base = await costs(llm, "local", concurrency, num_requests)
    rows = [_row("`LLM`", base, None)]
    for kind in kinds:
        async with await Cluster.from_transports(transports(kind, concurrency, step_s)) as cluster:
            rows.append(_row(_NAMES[kind], await costs(cluster, kind, concurrency, num_requests), base))
    return rows


def _row(name: str, found: tuple[Cost, Cost], base: tuple[Cost, Cost] | None) -> list[str]:
    cells = [name]
    for index, cost in enumerate(found):
        total = cost.this_s + cost.replicas_s
        added = "" if base is None else f"{(total - base[index].this_s) * 1e6:.1f}"
        cells += [f"{cost.this_s * 1e6:.1f}", f"{cost.replicas_s * 1e6:.1f}", added]
    return cells


async def scale(kinds: Sequence[str], batch_size: int, num_requests: int, step_s: float) -> list[list[str]]:
    """Rows of throughput with 1, 2 and 4 replicas of each kind."""
    rows = []
    for kind in kinds:
        for count in (1, 2, 4):
            make = transports(kind, batch_size, step_s)
            async with await Cluster.from_transports(make, ClusterConfig(num_replicas=count)) as cluster:
                total = num_requests * count
                cost = await measure(cluster, kind, batch_size * count, total, _OUTPUTS[1])
            rate = total * _OUTPUTS[1] / cost.wall_s
            share = rate / (count * batch_size / step_s)
            rows.append([_NAMES[kind], str(count), f"{rate:,.0f}", f"{share:.0%}"])
    return rows


def main() -> None:
    """Print two tables."""
    parser = new_parser("cluster_wire", __doc__)
    parser.add_argument("--concurrency", type=int, default=32, help="consumers of one replica (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=256, help="of one replica (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="(default: %(default)s)")
    parser.add_argument("--ray", action="store_true", help="with Ray's actors too")
    arguments = parser.parse_args()
    kinds = list(_NAMES) if arguments.ray else ["local", "processes"]
    settings: tuple[Any, ...] = (kinds, arguments.concurrency, arguments.requests, arguments.step_ms / 1e3)
    if arguments.ray:
        import ray

        ray.init("local", include_dashboard=False, log_to_driver=False)
    print("Microseconds of CPU time:\n")
    header = ["replicas", "token: this", "replicas", "added", "request: this", "replicas", "added"]
    print(format_table(header, asyncio.run(compare(*settings))))
    print("\nThroughput:\n")
    print(format_table(["replicas", "number", "tokens/s", "steps"], asyncio.run(scale(*settings))))


if __name__ == "__main__":
    main()
