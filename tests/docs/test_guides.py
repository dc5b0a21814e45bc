"""The services of the README and of docs/guides do what the pages say, step by step on a fake model.

`test_pages.py` runs the blocks of the same pages on the real model.
"""

from __future__ import annotations

import ast
import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llmengine import LLM, SamplingParams, SchedulerConfig
from llmengine.batch import Batch
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.docs.helpers import ROOT, python_blocks, run_blocks
from tests.engine.helpers import GatedTokenizer, StepGate, assert_idle, counting_model, make_llm, timeout, tokens

GUIDES = ROOT / "docs" / "guides"


class Client:
    """One HTTP request to an ASGI application, as a server passes it on. `leave()` makes the client go away."""

    def __init__(self, app: Any, path: str, body: dict[str, Any] | None = None, *, spec_version: str = "2.3") -> None:
        self._body: bytes | None = b"" if body is None else json.dumps(body).encode()
        self._spec_version = spec_version
        self._gone = asyncio.Event()
        self._told = asyncio.Event()
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.status = 0
        self.headers: dict[str, str] = {}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "GET" if body is None else "POST",
            "scheme": "http",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self._call = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        body, self._body = self._body, None
        if body is not None:
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        self._told.set()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._gone.is_set() and self._spec_version >= "2.4":
            raise OSError("the client is gone")
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        self._sent.put_nowait(message)

    async def leave(self) -> None:
        """Go away. Returns when the application has been told and has reacted."""
        self._gone.set()
        await self._told.wait()

    @property
    def ended(self) -> bool:
        """True when the application has returned."""
        return self._call.done()

    async def end(self) -> None:
        """Wait until the application has returned."""
        try:
            await self._call
        except Exception:
            if not self._gone.is_set():
                raise

    async def event(self) -> tuple[str, dict[str, Any]]:
        """Return the next Server-Sent Event."""
        while True:
            text = (await self._sent.get()).get("body", b"").decode()
            if text:
                name, data = text.removesuffix("\n\n").split("\n")
                return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    async def answer(self) -> Any:
        """Return the JSON of the whole answer."""
        await self.end()
        messages = [self._sent.get_nowait() for _ in range(self._sent.qsize())]
        return json.loads(b"".join(message.get("body", b"") for message in messages))


@pytest.fixture(scope="module")
def fastapi_guide() -> dict[str, Any]:
    pytest.importorskip("fastapi")
    return run_blocks(GUIDES / "fastapi.md")


@asynccontextmanager
async def serving(
    guide: dict[str, Any], on_step: Callable[[Batch], None] | None = None, **limits: int
) -> AsyncIterator[tuple[Any, LLM]]:
    """Run the guide's application, on a model that goes through the alphabet; yields it and its LLM."""

    async def load() -> LLM:
        tokenizer = GatedTokenizer()
        tokenizer.gate.set()
        return make_llm(
            tokenizer=tokenizer,
            scheduler=SchedulerConfig(**limits),
            next_token=counting_model,
            num_blocks=501,
            max_model_len=2000,
            on_step=on_step,
        )

    app = guide["create_app"](load)
    async with timeout(), app.router.lifespan_context(app):
        try:
            yield app, app.state.llm
        finally:
            if isinstance(on_step, StepGate):
                on_step.open()


async def in_queue(llm: LLM, num_requests: int) -> None:
    """Wait until that many requests have entered the queue since the start; only those are tokenized."""
    for _ in range(num_requests):
        await asyncio.to_thread(llm.tokenizer.wait_begun)


async def test_fastapi_answers(fastapi_guide: dict[str, Any]) -> None:
    async with serving(fastapi_guide) as (app, llm):
        whole = Client(app, "/complete", {"prompt": "a", "max_new_tokens": 4})
        assert await whole.answer() == {"text": "bcde", "finish_reason": "length", "num_tokens": 4}
        streamed = Client(app, "/complete", {"prompt": "a", "max_new_tokens": 4, "stream": True})
        text = ""
        while (event := await streamed.event())[0] == "delta":
            text += event[1]["text"]
        assert event == ("end", {"finish_reason": "length", "num_tokens": 4})
        assert (text, streamed.status) == ("bcde", 200)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        health = Client(app, "/health")
        assert (await health.answer())["state"] == "ready"
    assert llm.health().state == "closed"


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
async def test_fastapi_client_leaves_a_stream(fastapi_guide: dict[str, Any], spec_version: str) -> None:
    gate = StepGate()
    async with serving(fastapi_guide, gate) as (app, llm):
        body = {"prompt": "a", "max_new_tokens": 1000, "stream": True}
        client = Client(app, "/complete", body, spec_version=spec_version)
        await asyncio.to_thread(gate.wait)
        gate.let_go()
        assert await client.event() == ("delta", {"text": "b"})
        await asyncio.to_thread(gate.wait)
        assert llm.stats().num_used_blocks > 0
        await client.leave()
        gate.open()
        await client.end()
        await asyncio.to_thread(assert_idle, llm)
        assert llm.stats().counters.num_generated_tokens <= 4  # of two requests: the probe made one


async def test_fastapi_clients_leave_an_answer_and_the_queue(fastapi_guide: dict[str, Any]) -> None:
    gate = StepGate()
    async with serving(fastapi_guide, gate, max_batch_size=1) as (app, llm):
        running = Client(app, "/complete", {"prompt": "a", "max_new_tokens": 1000})
        await asyncio.to_thread(gate.wait)
        queued = Client(app, "/complete", {"prompt": "b", "max_new_tokens": 1000, "stream": True})
        await in_queue(llm, 2)
        await queued.leave()
        while not queued.ended:
            await asyncio.to_thread(gate.step)
        assert llm.stats().num_queued == 0
        assert llm.stats().num_running == 1
        await running.leave()
        gate.open()
        await running.end()
        await asyncio.to_thread(assert_idle, llm)
        assert llm.stats().counters.num_generated_tokens < 100


async def test_fastapi_full_queue(fastapi_guide: dict[str, Any]) -> None:
    gate = StepGate()
    async with serving(fastapi_guide, gate, max_batch_size=1, max_queued_requests=1) as (app, llm):
        body = {"prompt": "a", "max_new_tokens": 2}
        first = Client(app, "/complete", body)
        await asyncio.to_thread(gate.wait)  # it runs, and has left the queue
        second = Client(app, "/complete", body)
        await in_queue(llm, 2)
        refused = Client(app, "/complete", body)
        assert "max_queued_requests=1" in (await refused.answer())["error"]
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        waiting = Client(app, "/complete", {**body, "wait": True})
        late = Client(app, "/complete", {**body, "wait": True, "first_token_deadline_s": 1e-9})
        await asyncio.to_thread(gate.step)
        gate.open()
        assert (await late.answer())["error"] == "no token before the deadline"
        assert late.status == 504
        assert [(await client.answer())["text"] for client in (first, second, waiting)] == ["bc", "bc", "bc"]


async def test_fastapi_errors(fastapi_guide: dict[str, Any]) -> None:
    gate = StepGate()
    async with serving(fastapi_guide, gate) as (app, llm):
        for body, fault in (
            ({"prompt": "a", "temperature": -1}, "temperature must be a number in [0, 100], not -1.0"),
            ({"prompt": "a" * 3000, "stream": True}, "3000"),
        ):
            client = Client(app, "/complete", body)
            assert fault in (await client.answer())["error"]
            assert client.status == 400
        gate.open()
        await llm.aclose()
        for path, body in (("/complete", {"prompt": "a"}), ("/health", None)):
            client = Client(app, path, body)
            await client.answer()
            assert client.status == 503


async def test_fastapi_engine_dies_in_a_stream(fastapi_guide: dict[str, Any]) -> None:
    gate = StepGate()

    def lose_the_device(batch: Batch) -> None:
        gate(batch)
        if len(gate.batches) == 2:
            raise RuntimeError("device lost")

    async with serving(fastapi_guide, lose_the_device) as (app, _llm):
        client = Client(app, "/complete", {"prompt": "a", "max_new_tokens": 10, "stream": True})
        await asyncio.to_thread(gate.wait)
        gate.let_go()
        assert await client.event() == ("delta", {"text": "b"})
        gate.open()
        name, data = await client.event()
        assert (name, data["status"]) == ("error", 503)
        await client.end()


class ChatBytes(ByteTokenizer):
    """A byte tokenizer whose chat template is the last message alone."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_variables: Any) -> str:
        return str(messages[-1]["content"])


@pytest.fixture(scope="module")
def bot_guide() -> dict[str, Any]:
    return run_blocks(GUIDES / "discord_bot.md", stop_before="## Run it")


@asynccontextmanager
async def chatting(
    guide: dict[str, Any], gate: StepGate, num_tokens: int
) -> AsyncIterator[tuple[LLM, Any, asyncio.Task]]:
    """Run the guide's bot on a model that goes through the alphabet; yields its LLM, the gateway and the bot's task."""
    gateway = guide["Gateway"](seconds_between_edits=0.0)
    llm = make_llm(tokenizer=ChatBytes(), next_token=counting_model, num_blocks=501, max_model_len=2000, on_step=gate)
    async with timeout(), llm:
        try:
            bot = asyncio.create_task(guide["Bot"](llm, gateway, tokens(num_tokens)).run())
            yield llm, gateway, bot
            await asyncio.wait({bot})
            await asyncio.to_thread(assert_idle, llm)
        finally:
            gate.open()


async def step_until(llm: LLM, gate: StepGate, num_rows: int) -> None:
    """Step until a step has that many requests.

    The engine makes no step while they are being tokenized, or the first might end before the last has begun.
    """
    while sum(stats.num_prompt_tokens > 0 for stats in llm.requests()) < num_rows:  # noqa: ASYNC110  # nobody tells
        await asyncio.sleep(0.001)
    while len(gate.batches[-1].rows) != num_rows:
        await asyncio.to_thread(gate.step)
        await asyncio.sleep(0.01)


async def test_bot_answers_channels_at_once_and_one_channel_in_order(bot_guide: dict[str, Any]) -> None:
    gate, message = StepGate(), bot_guide["Message"]
    async with chatting(bot_guide, gate, 60) as (llm, gateway, bot):
        for number, channel in enumerate(("here", "here", "there")):
            gateway.post("create", message(number, channel, "a"))
        await asyncio.to_thread(gate.wait)
        await step_until(llm, gate, 2)
        gateway.disconnect()
        gate.open()
        await bot
    assert max(len(batch.rows) for batch in gate.batches) == 2
    assert len(gate.batches) > 100, "the second answer of a channel began before the first had ended"
    text = "bcdefghijklmnopqrstuvwxyza" * 3
    assert gateway.replies == dict.fromkeys(range(3), text[:60])


async def test_bot_aborts_the_answer_to_an_edited_message(bot_guide: dict[str, Any]) -> None:
    gate, message = StepGate(), bot_guide["Message"]
    async with chatting(bot_guide, gate, 1000) as (llm, gateway, bot):
        gateway.post("create", message(1, "here", "a"))
        gateway.post("create", message(2, "there", "k"))
        await asyncio.to_thread(gate.wait)
        await step_until(llm, gate, 2)
        gateway.post("delete", message(2, "there", "k"))
        await step_until(llm, gate, 1)
        gateway.post("edit", message(1, "here", "u"))
        while not gate.batches[-1].slot_inits:
            await asyncio.to_thread(gate.step)
        assert len(gate.batches[-1].rows) == 1, "both answers run"
        gateway.disconnect()
        gate.open()
        await bot
    assert gateway.replies[1] == ("vwxyzabcdefghijklmnopqrstu" * 40)[:1000]
    assert len(gateway.replies.get(2, "")) < 20


async def test_bot_aborts_everything_when_it_is_cancelled(bot_guide: dict[str, Any]) -> None:
    gate, message = StepGate(), bot_guide["Message"]
    async with chatting(bot_guide, gate, 1000) as (llm, gateway, bot):
        for number in range(4):
            gateway.post("create", message(number, f"channel {number}", "a"))
        await asyncio.to_thread(gate.wait)
        await step_until(llm, gate, 4)
        bot.cancel()
        await asyncio.wait({bot})  # nobody waits for the engine, which still stands in a step
        gate.open()
    assert bot.cancelled()
    assert len(gate.batches) < 100


def readme_service(llm: LLM) -> Callable[..., Any]:
    """Return the README's function `serve` for this `llm`."""
    source = next(source for _, source in python_blocks(ROOT / "README.md") if "async def serve(" in source)
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.AsyncFunctionDef)]
    namespace: dict[str, Any] = {"asyncio": asyncio, "SamplingParams": SamplingParams, "llm": llm}
    exec(compile(ast.Module(functions, type_ignores=[]), "README.md", "exec", dont_inherit=True), namespace)
    service: Callable[..., Any] = namespace["serve"]
    return service


async def test_readme_service_aborts_when_its_client_disconnects() -> None:
    gate = StepGate()
    llm = make_llm(tokenizer=ChatBytes(), next_token=counting_model, num_blocks=501, max_model_len=2000, on_step=gate)
    async with timeout(), llm, await asyncio.start_server(readme_service(llm), "127.0.0.1", 0) as server:
        try:
            neighbour = llm.generate_async("k", tokens(1000))  # so that there is always a next step
            await asyncio.to_thread(gate.wait)
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(b"a\n")
            await step_until(llm, gate, 2)
            answer = asyncio.create_task(reader.read(1))
            while not answer.done():
                await asyncio.to_thread(gate.step)
            writer.close()
            await writer.wait_closed()
            while len(llm.requests()) == 2:
                await asyncio.to_thread(gate.step)
            assert sum(len(batch.rows) == 2 for batch in gate.batches) < 10, "the answer of 16 tokens was finished"
            neighbour.abort()
        finally:
            gate.open()
