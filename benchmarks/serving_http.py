"""What the HTTP server adds to a streamed token: CPU time of the library's process alone, and with the server.

    python -m benchmarks.serving_http                        # FakeBackend: what the host does for each token
    python -m benchmarks.serving_http --model DIR_OR_GGUF    # with a model's own work

The clients run in a process of their own, whose time does not count. Times are CPU seconds of all threads of the
measured process, so they hardly depend on what else the machine does; the parts of a chunk are timed by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from llmengine import LLM, ModelConfig, SamplingParams, SchedulerConfig
from llmengine.server import ServerConfig, create_app
from llmengine.server.openai.chunks import Chunks, json_string
from llmengine.server.run import uvicorn_config
from llmengine.server.sse import event
from llmengine.testing import ChatByteTokenizer, FakeBackend

MESSAGES = [{"role": "user", "content": "Tell me about rivers."}]


def letters(token_ids: Sequence[int]) -> int:
    """The next letter of the alphabet."""
    return ord("a") + len(token_ids) % 26


def load(model: Path | None, num_streams: int, step_s: float) -> LLM:
    """The model, or a fake one whose steps take a while, with room for all streams in one step."""
    scheduler = SchedulerConfig(max_batch_size=num_streams)
    if model is not None:
        return LLM(ModelConfig(model, scheduler_config=scheduler))
    return LLM.from_backend(
        lambda: FakeBackend(
            letters,
            num_blocks=num_streams * 20 + 1,
            block_size=32,
            max_model_len=512,
            on_step=lambda batch: time.sleep(step_s),
        ),
        tokenizer=ChatByteTokenizer(),
        scheduler_config=scheduler,
    )


async def read_from_library(llm: LLM, num_streams: int, num_tokens: int) -> int:
    """Read all streams in this process, as an application that embeds the library does; return the tokens."""
    params = SamplingParams(max_new_tokens=num_tokens, temperature=1.0, seed=1, ignore_eos=True)

    async def read() -> int:
        output = None
        async for output in llm.chat_async(MESSAGES, params, streaming=True):
            assert output.text_delta is not None
        assert output is not None
        return output.num_tokens

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read()) for _ in range(num_streams)]
    return sum(task.result() for task in tasks)


def run_clients(port: int, num_streams: int, num_tokens: int) -> None:
    """Read all streams of a server; for a process of its own."""
    fields = {"messages": MESSAGES, "max_tokens": num_tokens, "seed": 1, "ignore_eos": True, "stream": True}
    content = json.dumps(fields).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(content) + content

    async def read() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        received = await reader.read()
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), received[:500]
        writer.close()

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(num_streams):
                group.create_task(read())

    asyncio.run(main())


async def read_from_server(llm: LLM, num_streams: int, num_tokens: int) -> int:
    """Serve all streams to clients in another process; return the tokens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(num_streams)
        config = ServerConfig(max_concurrent_requests=num_streams)
        server = uvicorn.Server(uvicorn_config(create_app(llm, config), log_level="critical"))
        serving = asyncio.create_task(server.serve([listener]))
        arguments = (listener.getsockname()[1], num_streams, num_tokens)
        clients = multiprocessing.get_context("spawn").Process(target=run_clients, args=arguments)
        clients.start()
        await asyncio.to_thread(clients.join)
        assert clients.exitcode == 0
        server.should_exit = True
        await serving
    return num_streams * num_tokens


def cpu_per_token_us(llm: LLM, read: Callable[..., Any], num_streams: int, num_tokens: int) -> float:
    """CPU microseconds of this process for each token."""
    begin = time.process_time()
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        num_read = runner.run(read(llm, num_streams, num_tokens))
    return (time.process_time() - begin) * 1e6 / num_read


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    return uvloop.new_event_loop()


def chunk_parts_us(num_calls: int = 100_000) -> dict[str, float]:
    """CPU microseconds of what makes a token's event: its text as JSON, the chunk around it, the event's frame."""
    chunks = Chunks("chatcmpl-" + 32 * "0", "chat.completion.chunk", 1_800_000_000, "model", include_usage=False)
    choice = '{"index": 0, "delta": {"content": " river"}, "logprobs": null, "finish_reason": null}'

    def timed(function: Callable[[str], object], argument: str) -> float:
        begin = time.process_time()
        for _ in range(num_calls):
            function(argument)
        return (time.process_time() - begin) * 1e6 / num_calls

    plain = {"choices": [{"index": 0, "delta": {"content": " river"}, "finish_reason": None}], "id": "x" * 41}
    return {
        "text as JSON": timed(json_string, " river"),
        "chunk around it, and SSE frame": timed(chunks.chunk, choice),
        "SSE frame alone": timed(event, choice),
        "for comparison, json.dumps of a chunk": timed(lambda _: json.dumps(plain), ""),
    }


def main() -> None:
    """Measure by turns, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=20.0, help="duration of the fake model's steps")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {"library": [], "server": []}
    with load(arguments.model, arguments.streams, arguments.step_ms / 1e3) as llm:
        print(llm.info.description)
        for _ in range(arguments.runs):
            for name, read in (("library", read_from_library), ("server", read_from_server)):
                found[name].append(cpu_per_token_us(llm, read, arguments.streams, arguments.tokens))
    library, server = (sorted(times)[len(times) // 2] for times in found.values())
    print(f"{arguments.streams} streams of {arguments.tokens} tokens, CPU for each token, medians of {arguments.runs}:")
    print(f"  library alone {library:8.1f} us")
    print(f"  with server   {server:8.1f} us, {server - library:.1f} us more ({(server / library - 1):.1%})")
    for name, cost in chunk_parts_us().items():
        print(f"    {name}: {cost:.2f} us")


if __name__ == "__main__":
    main()
