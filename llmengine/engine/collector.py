"""OutputCollector: reads many requests on one thread, which passes their outputs on."""

from __future__ import annotations

from collections.abc import Iterator

from llmengine.engine.handle import RequestHandle
from llmengine.engine.stream import ThreadWaiter
from llmengine.errors import LLMEngineError
from llmengine.outputs import GenerationOutput


class OutputCollector:
    """Takes what is new of all requests at once, woken once for each step, however many there are.

    `add`, `discard`, `hold` and `wake` may be called from any thread, the rest from the collecting one.
    """

    def __init__(self) -> None:
        self._waiter = ThreadWaiter()
        self._handles: dict[int, RequestHandle] = {}
        self._held: set[int] = set()

    def __len__(self) -> int:
        return len(self._handles)

    def add(self, key: int, handle: RequestHandle) -> None:
        """Read a request too, until it ends; `key` names it."""
        self._handles[key] = handle
        handle.add_waiter(self._waiter)
        self.wake()  # something may have been published before

    def get(self, key: int) -> RequestHandle | None:
        """The request of that name; None if it has ended."""
        return self._handles.get(key)

    def hold(self, key: int, held: bool) -> None:
        """Do not read a request until it is held no more, so that the engine finds its reader behind."""
        if held:
            self._held.add(key)
            if key not in self._handles:  # it has ended meanwhile
                self._held.discard(key)
        else:
            self._held.discard(key)
            self.wake()

    def wake(self) -> None:
        """Let `wait` return."""
        self._waiter.event.set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until something is new; False if `timeout_s` seconds pass first."""
        return self._waiter.wait(timeout_s)

    def take(self) -> Iterator[tuple[int, GenerationOutput | LLMEngineError]]:
        """What is new of each request, in the order in which they were added; the error of one that failed.

        A request is forgotten with its final output, or with its error.
        """
        for key, handle in list(self._handles.items()):
            if key in self._held and not handle.done:
                continue
            try:
                while (output := handle.poll()) is not None:
                    yield key, output
            except LLMEngineError as error:
                yield key, error
            if handle.exhausted:
                self._handles.pop(key, None)
                self._held.discard(key)
