"""Replica: an `LLM` at the far end of a wire, which runs commands and tells what its requests put out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence

import anyio.to_thread

from llmengine.cluster.wire import (
    Abort,
    ChatCall,
    Command,
    Delta,
    End,
    Failed,
    Fault,
    Head,
    Hold,
    ReplicaInfo,
    Submit,
    Update,
    unpack_request,
)
from llmengine.engine.collector import OutputCollector
from llmengine.engine.handle import RequestHandle
from llmengine.errors import InvalidRequestError, LLMEngineError
from llmengine.llm import LLM
from llmengine.outputs import GenerationOutput

HEARTBEAT_S = 1.0
"""Longest time between two updates."""


class Replica:
    """Serves one cluster with one `LLM`.

    A thread reads all requests, woken once for each step of the engine. What it has read waits for the next update, so
    that an update holds a step, or several where the wire is slower than the engine.

    Args:
        llm: closed with the replica.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._collector = OutputCollector()
        self._begun: set[tuple[int, int]] = set()
        """(key, index) of the outputs whose head was told."""
        self._lock = threading.Lock()
        self._pending: list[Delta | Failed] = []
        self._has_news: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._is_killed = False
        self._thread = threading.Thread(target=self._collect, name="llmengine replica", daemon=True)
        self._thread.start()

    @property
    def info(self) -> ReplicaInfo:
        """Facts about the engine."""
        llm = self._llm
        return ReplicaInfo(llm.info, llm.get_default_sampling_params(), llm.scheduler_config.max_unread_tokens)

    def execute(self, commands: Sequence[Command]) -> None:
        """Run commands in their order; never blocks. Whatever a request is refused for goes into its output."""
        for command in commands:
            match command:
                case Submit():
                    self._submit(command)
                case Abort(key, keep_prefix):
                    if (handle := self._collector.get(key)) is not None:
                        handle.abort(keep_prefix=keep_prefix)
                case Hold(key, held):
                    self._collector.hold(key, held)

    async def updates(self) -> AsyncGenerator[Update, None]:
        """What requests put out, as it comes, and a heartbeat. For one reader."""
        self._has_news = has_news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        while self._thread.is_alive() and not self._is_killed:
            yield self._update()
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await has_news.wait()
            except TimeoutError:
                continue
            has_news.clear()
        yield self._update()

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Close the engine, after `drain_s` seconds in which requests may finish, and end the updates."""
        await self._llm.aclose(drain_s)
        self._is_closed = True
        self._collector.wake()
        await anyio.to_thread.run_sync(self._thread.join)
        self._tell()

    def kill(self) -> None:
        """End the updates at once, and the engine after its step. Never blocks; does nothing after `aclose`."""
        self._is_killed = True
        if not self._is_closed:
            self._is_closed = True
            threading.Thread(target=self._end, name="llmengine replica end", daemon=True).start()
        self._tell()

    def _end(self) -> None:
        self._llm.close()
        self._collector.wake()

    def _update(self) -> Update:
        with self._lock:
            outputs, self._pending = self._pending, []
        return Update(outputs, self._llm.stats(), self._llm.health())

    def _submit(self, command: Submit) -> None:
        try:
            prompt, params, options = unpack_request(command.packed)
            options |= command.limits_s
            handle: RequestHandle
            if isinstance(prompt, ChatCall):
                options |= prompt.keywords
                handle = self._llm.chat_async(prompt.messages, params, streaming=True, **options)
            else:
                handle = self._llm.generate_async(prompt, params, streaming=True, **options)
        except TypeError as error:  # a keyword that the chat template does not have
            self._add([Failed(command.key, Fault(InvalidRequestError(str(error)), None))])
        except Exception as error:
            self._add([Failed(command.key, Fault.of(error))])
        else:
            self._collector.add(command.key, handle)

    def _collect(self) -> None:
        while not self._is_closed or len(self._collector):
            self._collector.wait(None)
            news = [self._said(key, output) for key, output in self._collector.take()]
            if news:
                self._add(news)

    def _add(self, news: list[Delta | Failed]) -> None:
        with self._lock:
            self._pending += news
        self._tell()

    def _tell(self) -> None:
        loop, has_news = self._loop, self._has_news
        if loop is not None and has_news is not None and not loop.is_closed():
            loop.call_soon_threadsafe(has_news.set)

    def _said(self, key: int, output: GenerationOutput | LLMEngineError) -> Delta | Failed:
        if isinstance(output, LLMEngineError):
            self._begun = {place for place in self._begun if place[0] != key}
            return Failed(key, Fault.of(output))
        place = (key, output.index)
        is_first = place not in self._begun
        self._begun.add(place)
        head = _head(output) if is_first else None
        end = None
        if output.finished:
            self._begun.discard(place)
            error = None if output.error is None else Fault.of(output.error)
            assert output.finish_reason is not None
            end = End(output.finish_reason, output.matched_stop, output.timeline.num_preemptions, error)
        logprobs = output.logprobs
        return Delta(
            key,
            output.index,
            output.token_ids_delta,
            output.text_delta,
            None if logprobs is None else logprobs[output.num_tokens - len(output.token_ids_delta) :],
            _token_texts(output, with_prompt=is_first),
            head,
            end,
        )


def _head(output: GenerationOutput) -> Head:
    timeline = output.timeline
    queued_s = None if timeline.first_scheduled is None else timeline.first_scheduled - timeline.queued
    prompt_ids = tuple(output.prompt_token_ids)
    return Head(
        output.prompt,
        prompt_ids,
        output.prompt_logprobs,
        output.num_cached_tokens,
        queued_s,
        output.new_answer_parser,
    )


def _token_texts(output: GenerationOutput, *, with_prompt: bool) -> dict[tuple[int, int], str] | None:
    """The texts of all tokens that new log-probabilities speak of."""
    if output.logprobs is None and (not with_prompt or output.prompt_logprobs is None):
        return None
    decoded = output.decoded_logprobs_delta
    described = list(enumerate(decoded or (), output.num_prompt_tokens + output.num_tokens - len(decoded or ())))
    if with_prompt:
        described += [(at, ids) for at, ids in enumerate(output.decoded_prompt_logprobs or ()) if ids is not None]
    texts = {(at, id_): one.decoded_token for at, ids in described for id_, one in ids.items()}
    return {place: text for place, text in texts.items() if text is not None} or None
