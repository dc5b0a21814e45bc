"""GrammarSteps: advances the grammars of requests on threads of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from llmengine.batch import TokenLogprobs
from llmengine.engine.request import Request, RequestStatus
from llmengine.errors import RequestFailedError
from llmengine.outputs import FinishReason
from llmengine.structured.grammar import Grammar

_NUM_THREADS = 4
_GRACE_S = 0.001
"""How long a step may wait for the masks of its rows."""

_POOL_HAS_ENDED = "cannot schedule new futures"
"""In the message of `ThreadPoolExecutor.submit` then; it raises RuntimeError for other reasons as well."""

_INTERPRETER_EXITS = "can't create new thread at interpreter shutdown"
"""The message of Python 3.12 and later when a thread is started a moment before pools have ended."""


class GrammarSteps:
    """Computes what a request's grammar allows next, on a thread, as soon as its latest token is known.

    The request is not scheduled meanwhile (`Request.is_awaited`), and the others do not wait. Only for masks that are
    usually quick is a step held up, by a millisecond at most, so that a device which computes one step at a time finds
    the request's row in the next one.

    Args:
        notify: called, on one of the threads, whenever a grammar has advanced.
    """

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "llmengine-grammar-step")
        self._pending: list[tuple[Request, Future[None]]] = []

    @property
    def num_pending(self) -> int:
        """Grammars that are advancing, or have advanced and were not taken yet."""
        return len(self._pending)

    def append(
        self, request: Request, token_ids: int | Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> FinishReason | None:
        """Append a step's tokens to a request, as many as it can have, and have its grammar advance over them.

        Returns why the request ends, if that is known at once. A request without a grammar just gets its tokens.
        """
        if isinstance(token_ids, int):
            token_ids = (token_ids,)
        grammar = request.grammar
        if grammar is None:
            request.is_awaited = False
            return request.extend(token_ids, logprobs)
        if len(token_ids) > 1:
            token_ids = token_ids[: max(1, grammar.num_allowed(token_ids))]
        num_before = len(request.token_ids)
        reason = request.extend(token_ids, logprobs)
        if reason not in (None, "length"):
            return reason
        # The grammar will say whether the text is complete with these tokens.
        self._push(request, grammar, request.token_ids[num_before:])
        return None

    def take(self) -> list[Request]:
        """The unfinished requests whose grammars have advanced since the previous call."""
        quick = [future for request, future in self._pending if is_quick(request.grammar)]
        if not all(future.done() for future in quick):
            wait(quick, timeout=_GRACE_S)
        # Each future is looked at once: one that is done a moment later is taken by the next call.
        done = [future.done() for _, future in self._pending]
        advanced = [request for (request, _), is_done in zip(self._pending, done, strict=True) if is_done]
        self._pending = [item for item, is_done in zip(self._pending, done, strict=True) if not is_done]
        return [request for request in advanced if request.status is not RequestStatus.FINISHED]

    def outcome(self, request: Request) -> tuple[FinishReason | None, RequestFailedError | None]:
        """Why a request ends whose grammar has advanced, and the error of one that failed; None: it goes on."""
        grammar = request.grammar
        assert grammar is not None
        request.is_awaited = False
        if grammar.error is not None:
            return "error", RequestFailedError(f"the grammar of the structured output failed: {grammar.error}")
        if grammar.is_complete:
            return "stop", None
        return ("length" if len(request.token_ids) >= request.max_total_tokens else None), None

    def close(self) -> None:
        """Start no more calls; does not wait for those that run."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _push(self, request: Request, grammar: Grammar, token_ids: Sequence[int]) -> None:
        try:
            future = self._threads.submit(grammar.advance, token_ids)
        except RuntimeError as refusal:
            future = Future()
            if _POOL_HAS_ENDED in str(refusal):
                # The interpreter exits, so pools take no more calls. The engine will be stopped in a moment.
                grammar.advance(token_ids)
                future.set_result(None)
            elif _INTERPRETER_EXITS not in str(refusal):
                raise  # no thread could be started, but the call is in the queue
            # Else the call is in the queue as well, and the request waits until the engine is stopped.
        self._pending.append((request, future))
        future.add_done_callback(lambda _: self._notify())


def is_quick(grammar: Grammar | None) -> bool:
    """Whether the grammar is likely to advance within the time that a step of the engine may wait for it."""
    return grammar is not None and grammar.step_s < _GRACE_S
