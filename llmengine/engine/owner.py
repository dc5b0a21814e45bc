"""EngineOwner: ends an engine when nothing refers to it any more."""

from __future__ import annotations

import weakref

from llmengine.batch import BackendInfo
from llmengine.engine.engine import Engine
from llmengine.engine.worker_threads import PreparationThreads, is_worker

_EXIT_TIMEOUT_S = 10.0


class EngineOwner:
    """Keeps an engine and its preparation threads running as long as something refers to this object.

    They end when it is closed or collected, and at the interpreter's exit: an engine thread must outlive neither.
    """

    def __init__(self, engine: Engine, threads: PreparationThreads) -> None:
        self._engine = engine
        self._threads = threads
        self._finalizer = weakref.finalize(self, _shut_down, engine, threads)

    def start(self) -> BackendInfo:
        """Start the engine and block until its backend is ready. Raises what making the backend raised."""
        try:
            return self._engine.start()
        except BaseException:  # also Ctrl-C while the engine thread still makes the backend
            self._engine.stop()
            self._threads.stop()
            raise

    def close(self) -> None:
        """Stop both and wait until the backend is closed. Idempotent, on any thread."""
        self._finalizer()  # does nothing while another thread's call is still waiting in it
        self._engine.join()


def _shut_down(engine: Engine, threads: PreparationThreads) -> None:
    """Stop both, and wait for the engine. May run inside a garbage collection, on any thread."""
    if engine.is_forked:
        return  # the threads are in the other process
    engine.stop()
    threads.stop()
    if not is_worker():  # a worker may hold a lock that the engine needs
        engine.join(_EXIT_TIMEOUT_S)
    engine.observers.close()
