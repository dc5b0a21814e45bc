"""Processes behind Ray Serve are killed while clients stream; every stream must end well, and Serve must come back.

    python -m benchmarks.serve_kills --kills 50

Serve runs on a Ray cluster of two nodes on this machine, with two replicas of a fake engine, one on each node, and two
gateways. Clients stream completions over HTTP all the while. A stream ends well if it brings its whole text, or the
beginning of it and then an error event, a status of 5xx, or a broken connection, each within `--bound` seconds. After
each kill there must be two replicas, and each kind of process as before, within `--back` seconds. What is killed, and
when, follows from `--seed`.

    engine      the process of a replica, by SIGKILL, as all others
    gateway     that of a gateway
    proxy       Serve's HTTP proxy of one of the nodes
    controller  Serve's controller
    node        Ray's node without the head, and all on it; another one is added

The exit code is 1 if a stream ended otherwise or too late, or if a process is left when Serve has been shut down.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import httpx
import psutil

from benchmarks.kills import Kill
from benchmarks.marked_processes import MarkedProcesses
from benchmarks.ray_serve import free_port, letter, load
from benchmarks.report import format_table, new_parser

KINDS = ("engine", "gateway", "proxy", "controller", "node")

_NUM_REPLICAS, _NUM_GATEWAYS = 2, 2
_TITLES = {
    "engine": "ServeReplica:default:engine",
    "gateway": "ServeReplica:default:gateway",
    "proxy": "ProxyActor",
    "controller": "ServeController",
}
"""Kind of process -> what is in its title."""

_POLL_S = 0.1
_START_S = 300.0
_MODEL = "default"


def serve_on_two_nodes(port: int) -> None:
    """Serve until the standard input ends. Each line of it has the second node killed and another one added."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster as Nodes

    from llmengine.cluster.serve import ServeConfig, build_app

    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = nodes.add_node(num_cpus=1)
    ray.init(nodes.address, log_to_driver=False)
    config = ServeConfig(
        num_replicas=_NUM_REPLICAS,
        num_gateways=_NUM_GATEWAYS,
        health_check_period_s=1.0,
        health_check_timeout_s=5.0,
        actor_options={"num_cpus": 1},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(load, config))
    print("ready", flush=True)
    for _ in sys.stdin:
        nodes.remove_node(second, allow_graceful=False)
        print("killed", flush=True)
        second = nodes.add_node(num_cpus=1)
    serve.shutdown()
    ray.shutdown()
    nodes.shutdown()


class ServeKilling:
    """Clients, and what kills under them.

    Args:
        server: the process that runs `serve_on_two_nodes`.
        marked: all processes of that Ray.
        bound_s: within this time every stream must end.
        back_s: within this time everything must be there again.

    Attributes:
        kills: what was killed, in order.
        faults: what went wrong, in words.
    """

    def __init__(
        self,
        server: subprocess.Popen[str],
        port: int,
        marked: MarkedProcesses,
        *,
        seed: int = 1,
        num_clients: int = 8,
        bound_s: float = 60.0,
        back_s: float = 120.0,
    ) -> None:
        self.kills: list[Kill] = []
        self.faults: list[str] = []
        self._server = server
        self._address = f"http://127.0.0.1:{port}"
        self._marked = marked
        self._draw = random.Random(seed)
        self._num_clients = num_clients
        self._bound_s = bound_s
        self._back_s = back_s
        self._num_ended = 0
        self._is_over = False

    async def run(self, kinds: Sequence[str]) -> None:
        """Kill in this order under load."""
        await self._until(self._is_back, "the application is not there")
        counts = {kind: len(self._find(kind)) for kind in _TITLES}
        async with asyncio.TaskGroup() as group:
            for _ in range(self._num_clients):
                group.create_task(self._be_client(random.Random(self._draw.getrandbits(32))))
            for kind in kinds:
                await self._kill(kind, counts)
            self._is_over = True

    def _find(self, kind: str) -> list[psutil.Process]:
        return self._marked.find(_TITLES[kind])

    async def _kill(self, kind: str, counts: dict[str, int]) -> None:
        await asyncio.sleep(self._draw.uniform(1.0, 4.0))
        self.kills.append(Kill(kind))
        began, num_ended = time.monotonic(), self._num_ended
        gone = await self._strike(kind)

        async def is_back() -> bool:
            if any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in gone):
                return False
            found = {each: len(self._find(each)) for each in counts}
            return found == counts and self._num_ended > num_ended and await self._is_back()

        await self._until(is_back, f"{kind}: not everything is back")
        self.kills[-1].whole_s = time.monotonic() - began

    async def _strike(self, kind: str) -> list[psutil.Process]:
        """Kill; return the processes that must be gone before Serve counts as back."""
        if kind == "node":
            assert self._server.stdin is not None
            self._server.stdin.write("\n")
            self._server.stdin.flush()
            await asyncio.to_thread(wait_for, self._server, "killed")
            return []
        victim = self._draw.choice(self._find(kind))
        victim.kill()
        return [victim]

    async def _is_back(self) -> bool:
        """Whether a request is served, and all replicas tell their metrics."""
        with suppress(httpx.HTTPError):
            async with httpx.AsyncClient(timeout=self._bound_s) as http:
                body = {"model": _MODEL, "prompt": "ready?", "max_tokens": 1}
                answer = await http.post(f"{self._address}/v1/completions", json=body)
                metrics = await http.get(f"{self._address}/metrics")
                lines = [line for line in metrics.text.splitlines() if line.startswith("llmengine_requests_running{")]
                return answer.status_code == 200 and len(lines) == _NUM_REPLICAS
        return False

    async def _until(self, condition: Callable[[], object], otherwise: str) -> None:
        try:
            async with asyncio.timeout(self._back_s):
                while not await condition():  # type: ignore[misc]  # noqa: ASYNC110 - other processes tell nobody
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            self.faults.append(f"{otherwise} after {self._back_s:g} s")

    async def _be_client(self, draw: random.Random) -> None:
        while not self._is_over:
            began = time.monotonic()
            try:
                async with asyncio.timeout(self._bound_s), httpx.AsyncClient(timeout=None) as http:
                    ending = await self._stream(http, draw)
            except httpx.TransportError as error:
                ending = "broken" if not isinstance(error, httpx.ConnectError) else "refused"
            except TimeoutError:
                ending = "hangs"
                self.faults.append(f"a stream has not ended after {self._bound_s:g} s")
            kill = self.kills[-1] if self.kills else Kill("")
            kill.note(ending, time.monotonic() - began)
            self._num_ended += 1
            if ending == "refused":
                await asyncio.sleep(_POLL_S)  # nobody listens

    async def _stream(self, http: httpx.AsyncClient, draw: random.Random) -> str:
        """Stream one completion; return how it ended, in a word."""
        prompt, num_tokens = "x" * draw.randint(1, 60), draw.randint(1, 120)
        body = {"model": _MODEL, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        text, ending = "", "cut"
        async with http.stream("POST", f"{self._address}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                content = await answer.aread()
                if answer.status_code < 500:
                    self.faults.append(f"status {answer.status_code}: {content[:200]!r}")
                return "status 5xx"
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    ending = "whole" if ending == "cut" else ending
                elif data:
                    said = json.loads(data)
                    if "error" in said:
                        ending = "error event"
                    else:
                        text += said["choices"][0]["text"]
        expected = "".join(chr(letter(range(len(prompt) + at))) for at in range(num_tokens))
        if not expected.startswith(text) or (ending == "whole" and text != expected):
            self.faults.append(f"wrong text, which ended as {ending!r}: {text!r} for {expected!r}")
        if ending == "cut":
            self.faults.append(f"a stream ended after {len(text)} of {num_tokens} tokens, and nothing said why")
        return ending


def wait_for(server: subprocess.Popen[str], word: str) -> None:
    """Wait for a line of a server's output, among what Ray writes there. Raises `RuntimeError` if it ends before."""
    assert server.stdout is not None
    if not any(line == f"{word}\n" for line in iter(server.stdout.readline, "")):
        raise RuntimeError(f"the server ended with {server.wait()}")


@contextmanager
def _server(port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.serve_kills", "--serve", str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            wait_for(server, "ready")
            yield server
            assert server.stdin is not None
            server.stdin.close()
            server.wait(_START_S)
        finally:
            server.kill()


def kill_all(kinds: Sequence[str], **settings: int | float) -> tuple[list[Kill], list[str]]:
    """Run `ServeKilling` on a Serve of its own; return the kills, and what went wrong or was left, in words."""
    port = free_port()
    with MarkedProcesses.running() as marked:
        with _server(port) as server:
            killing = ServeKilling(server, port, marked, **settings)  # type: ignore[arg-type]
            asyncio.run(killing.run(kinds))
        until = time.monotonic() + 30.0
        while (left := marked.find("")) and time.monotonic() < until:
            time.sleep(_POLL_S)
    killing.faults += [f"left behind: {' '.join(process.cmdline())[:200]}" for process in left]
    for process in left:
        process.kill()
    return killing.kills, killing.faults


def order_of(num_kills: int, seed: int) -> list[str]:
    """So many kinds in a random order, with each at least once if there are enough."""
    return [*KINDS, *random.Random(seed).choices(KINDS, k=num_kills)][:num_kills]


def table(kills: Sequence[Kill]) -> str:
    """A row for each kind of kill, as Markdown."""
    names = ("whole", "error event", "status 5xx", "broken", "refused")
    rows = []
    for kind in KINDS:
        if mine := [kill for kill in kills if kill.kind == kind]:
            endings = sum((kill.endings for kill in mine), Counter())
            counts = [*(endings[name] for name in names), endings.total() - sum(endings[name] for name in names)]
            back_s = [kill.whole_s for kill in mine]
            times = [max(kill.slowest_s for kill in mine), statistics.median(back_s), max(back_s)]
            rows.append([kind, *map(str, (len(mine), *counts)), *(f"{value:.1f}" for value in times)])
    return format_table(
        ["killed", "times", *names, "others", "slowest stream, s", "back again, s: median", "most"], rows
    )


def main() -> None:
    """Print a table."""
    parser = new_parser("serve_kills", __doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="kill these, in this order")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--bound", type=float, default=60.0, help="seconds (default: %(default)s)")
    parser.add_argument("--back", type=float, default=120.0, help="seconds (default: %(default)s)")
    parser.add_argument("--serve", type=int, metavar="PORT", help="be the server")
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve_on_two_nodes(arguments.serve)
        return
    kinds = arguments.kinds or order_of(arguments.kills, arguments.seed)
    settings = {"seed": arguments.seed, "num_clients": arguments.clients, "bound_s": arguments.bound}
    kills, faults = kill_all(kinds, back_s=arguments.back, **settings)
    print(table(kills))
    print(*faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
