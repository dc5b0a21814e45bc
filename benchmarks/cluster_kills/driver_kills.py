"""The process that has a cluster on Ray is killed; its replicas must end, and with them the ranks that they started.

    python -m benchmarks.cluster_kills.driver_kills --kills 20
    python -m benchmarks.cluster_kills.driver_kills --kills 6 --model MODEL   each replica has a rank beside itself
    python -m benchmarks.cluster_kills.driver_kills --kills 6 --model MODEL --hosts   ... on another of two nodes

Ray runs on. Each driver is killed by SIGKILL at a moment that follows from `--seed`: every other one while its replicas
start, the rest while they serve. Within `--bound` seconds all processes of replicas and ranks must be gone, and their
processors free. Without `--model` the replicas' backends are fakes.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.cluster_kills.victims import VOCAB_SIZE, make_llm
from benchmarks.marked_processes import MarkedProcesses
from benchmarks.report import format_table, new_parser
from llmengine import LLM, KvCacheConfig, ModelConfig, ParallelConfig, SamplingParams
from llmengine.cluster import Cluster, ClusterConfig

_NUM_REPLICAS, _NUM_CLIENTS = 2, 6
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class DriverKill:
    """What a killed driver had, and how long it took until that was gone; None: longer than the bound."""

    was_serving: bool
    num_processes: int
    gone_s: float | None


async def _load_fake() -> LLM:
    return await asyncio.to_thread(make_llm, lambda batch: None)


async def _be_driver(address: str, model: str, on_hosts: bool) -> None:
    """Make a cluster and run requests on it, until this process is killed."""
    config = ClusterConfig(
        num_replicas=_NUM_REPLICAS,
        address=address,
        actor_options={"num_cpus": 1},
        ranks_per_host=1 if on_hosts else None,
        placement_strategy="SPREAD",
    )
    print("starting", flush=True)
    if model:
        settings = ModelConfig(
            model,
            device="cpu",
            num_threads=1,
            parallel_config=ParallelConfig(tp_size=2),
            kv_cache_config=KvCacheConfig(max_bytes=16 << 20),
        )
        cluster = await Cluster.create(settings, config, enable_tokenizer=False)
    else:
        from llmengine.cluster.ray_transport import actor_transports

        cluster = await Cluster.from_transports(actor_transports(_load_fake, config), config)

    async def be_client(draw: random.Random) -> None:
        while True:
            prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 30))]
            async for _ in cluster.generate_async(prompt, SamplingParams(max_new_tokens=100), streaming=True):
                pass

    async with asyncio.TaskGroup() as group:
        for number in range(_NUM_CLIENTS):
            group.create_task(be_client(random.Random(number)))
        await asyncio.sleep(0.5)
        print("serving", flush=True)


class DriverKilling:
    """Kills drivers on a Ray that is started for them, see `running`.

    Args:
        address: of Ray.
        marked: all processes of that Ray, and the drivers.
        arguments: of drivers.
    """

    def __init__(self, address: str, marked: MarkedProcesses, arguments: list[str], bound_s: float) -> None:
        self._address = address
        self._marked = marked
        self._arguments = arguments
        self._bound_s = bound_s

    @classmethod
    @contextmanager
    def running(cls, model: str, on_hosts: bool, bound_s: float) -> Iterator[DriverKilling]:
        """Start Ray with two nodes, and end it."""
        import ray
        from ray.cluster_utils import Cluster as Nodes

        with MarkedProcesses.running() as marked:
            nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
            try:
                nodes.add_node(num_cpus=8)
                ray.init(nodes.address, log_to_driver=False)
                yield cls(nodes.address, marked, ["--model", model, *(["--hosts"] if on_hosts else [])], bound_s)
            finally:
                ray.shutdown()
                nodes.shutdown()

    def kill(self, is_serving: bool, after_s: float) -> DriverKill:
        """Start a driver and kill it so many seconds after its replicas have begun to start, or to serve."""
        command = [sys.executable, "-m", __spec__.name, "--be-driver", self._address, *self._arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout is not None
            word = "serving" if is_serving else "starting"
            if not any(line == f"{word}\n" for line in iter(driver.stdout.readline, "")):
                raise RuntimeError(f"the driver ended with {driver.wait()}")
            time.sleep(after_s)
            num_processes = self._num_processes()
            driver.kill()
        began = time.monotonic()
        while self._num_processes() or self._used_cpus():
            if time.monotonic() - began > self._bound_s:
                return DriverKill(is_serving, num_processes, None)
            time.sleep(_POLL_S)
        return DriverKill(is_serving, num_processes, time.monotonic() - began)

    def _num_processes(self) -> int:
        """Processes of replicas, of agents and of ranks on this Ray."""
        return len(self._marked.find("ReplicaActor", "RankAgent", "ranks/process.py"))

    @staticmethod
    def _used_cpus() -> float:
        """Processors of actors, and of placement groups whether they have actors or not."""
        import ray

        return float(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0))


def kill_drivers(
    num_kills: int, *, seed: int = 1, model: str = "", on_hosts: bool = False, bound_s: float = 30.0
) -> list[DriverKill]:
    """Kill so many drivers in turn."""
    draw = random.Random(seed)
    with DriverKilling.running(model, on_hosts, bound_s) as killing:
        moments = [(number % 2 == 1, draw.uniform(0.0, 4.0)) for number in range(num_kills)]
        return [killing.kill(is_serving, after_s) for is_serving, after_s in moments]


def main() -> None:
    """Print a table."""
    parser = new_parser("cluster_kills.driver_kills", __doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="", help="a model that fits on the CPU")
    parser.add_argument("--hosts", action="store_true", help="the ranks of a replica are on two hosts")
    parser.add_argument("--bound", type=float, default=30.0, help="seconds (default: %(default)s)")
    parser.add_argument("--be-driver", metavar="ADDRESS", help="be what is killed, on this Ray")
    arguments = parser.parse_args()
    if arguments.be_driver:
        asyncio.run(_be_driver(arguments.be_driver, arguments.model, arguments.hosts))
        return
    options = {"model": arguments.model, "on_hosts": arguments.hosts, "bound_s": arguments.bound}
    kills = kill_drivers(arguments.kills, seed=arguments.seed, **options)
    rows = []
    for name, is_serving in (("while replicas start", False), ("while they serve", True)):
        mine = [kill for kill in kills if kill.was_serving == is_serving]
        gone_s = [kill.gone_s for kill in mine if kill.gone_s is not None] or [float("nan")]
        most = str(max((kill.num_processes for kill in mine), default=0))
        late = str(sum(kill.gone_s is None for kill in mine))
        rows.append([name, str(len(mine)), most, late, f"{statistics.median(gone_s):.2f}", f"{max(gone_s):.2f}"])
    header = ["a driver is killed", "times", "processes: most", "not gone", "gone, s: median", "most"]
    print(format_table(header, rows))
    sys.exit(1 if any(kill.gone_s is None for kill in kills) else 0)


if __name__ == "__main__":
    main()
