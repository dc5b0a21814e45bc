"""What it costs to go through Ray Serve: processor time for each token and each request, beside the plain server.

    python -m benchmarks.ray_serve

Both serve one fake engine whose steps take 20 ms, so that each token of 16 streams is a message of its own. Counted is
the processor time of all processes of the server, Ray's included; `llmengine bench` makes the load.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from llmengine import LLM
from llmengine.batch import Batch
from llmengine.testing import ChatByteTokenizer, FakeBackend

STEP_S = 0.02
NUM_CLIENTS, NUM_STREAMS, NUM_TOKENS = 16, 64, 64
NUM_SHORT = 128
"""Requests of one token."""


def letter(token_ids: Sequence[int]) -> int:
    """The next letter of the alphabet."""
    return ord("a") + len(token_ids) % 26


def slow_step(batch: Batch) -> None:
    """Take as long as a step of a model."""
    time.sleep(STEP_S)


async def load() -> LLM:
    """The fake engine."""

    def backend() -> FakeBackend:
        return FakeBackend(letter, num_blocks=4000, block_size=64, max_model_len=1024, on_step=slow_step)

    return LLM.from_backend(backend, tokenizer=ChatByteTokenizer())


def serve_plain(port: int) -> None:
    """Serve with uvicorn until a signal ends the process."""
    import uvicorn

    from llmengine.server import create_app
    from llmengine.server.run import uvicorn_config

    uvicorn.Server(uvicorn_config(create_app(load), host="127.0.0.1", port=port, log_level="warning")).run()


def serve_on_ray(port: int) -> None:
    """Serve with Ray until the standard input ends."""
    import ray
    from ray import serve

    from llmengine.cluster.serve import build_app

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(load))
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


SERVERS = {"llmengine serve": serve_plain, "Ray Serve": serve_on_ray}


def free_port() -> int:
    """A port that nobody listens on, and that the system does not give away before a server has started on it."""
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(lowest_given // 2, lowest_given)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port


def wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until a server answers. Raises `RuntimeError` if it ends before."""
    import httpx

    while server.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=60).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server ended with {server.returncode}")


def make_load(port: int, num_requests: int, num_tokens: int) -> None:
    """Have clients send requests, and wait for their answers. No request of it is a warm-up."""
    lengths = ["--prompt-tokens", "16", "--output-tokens", str(num_tokens), "--ignore-eos", "--warm-up", "0"]
    load = ["--concurrency", str(NUM_CLIENTS), "--requests", str(num_requests)]
    command = [sys.executable, "-m", "llmengine", "bench", "--base-url", f"http://127.0.0.1:{port}/v1", *load, *lengths]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def processor_s(process: psutil.Process) -> float:
    """Processor time of a process and of all that it has started."""
    found = [process, *process.children(recursive=True)]
    return float(sum(times.user + times.system for times in (each.cpu_times() for each in found)))


def measure(kind: str) -> tuple[float, float]:
    """Processor milliseconds for a token of a stream, and for a request of one token."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.ray_serve", "--serve", kind, "--port", str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
        try:
            wait_for(server, port)
            make_load(port, NUM_CLIENTS, 16)
            moments = []
            process = psutil.Process(server.pid)
            for num_requests, num_tokens in ((NUM_STREAMS, NUM_TOKENS), (NUM_SHORT, 1)):
                began = processor_s(process)
                make_load(port, num_requests, num_tokens)
                moments.append((processor_s(process) - began) * 1e3 / (num_requests * num_tokens))
        finally:
            if server.stdin is not None:
                server.stdin.close()
            if kind == "llmengine serve":
                server.terminate()
    return moments[0], moments[1]


def main() -> None:
    """Measure both and print a table; with `--serve`, be one of the servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        SERVERS[arguments.serve](arguments.port)
        return
    print("| server | processor ms a token | a request of one token |\n|---|---|---|")
    for kind in SERVERS:
        token_ms, request_ms = measure(kind)
        print(f"| {kind} | {token_ms:.2f} | {request_ms:.1f} |", flush=True)


if __name__ == "__main__":
    main()
