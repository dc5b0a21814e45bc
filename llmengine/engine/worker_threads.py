"""Threads that prepare requests: they tokenize text, render chats and compile grammars.

A `ThreadPoolExecutor` does not serve. At its exit the interpreter waits for the calls that run there. A submission
holds a lock that the finalizer of an `LLM` takes as well, and a garbage collection within the submission may run that
finalizer. And jobs that take long hold up all jobs behind them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")

_PATIENCE_S = 0.02
"""When jobs have waited for this long and no thread has begun one, another thread is started."""


class Job:
    """A function for a thread to call once."""

    __slots__ = ("_work",)

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work

    def cancel(self) -> None:
        """Never begin, and release what the function refers to; does nothing to a job that has begun. Never blocks."""
        self._work = None

    def run(self) -> None:
        """Call the function unless the job is cancelled."""
        work, self._work = self._work, None
        if work is not None:
            work()


class _Thread(threading.Thread):
    """A daemon, since the interpreter must not wait for results that nobody will read."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(target=work, name=name, daemon=True)


def is_worker() -> bool:
    """True on a thread of any `WorkerThreads`."""
    return isinstance(threading.current_thread(), _Thread)


class WorkerThreads:
    """Up to `num_threads` threads, started when needed, that do jobs in the order of submission.

    When jobs wait and none of the threads has begun one for 20 ms, helpers join in until no job waits, at most
    `num_helpers` at a time. Every method may be called from any thread.
    """

    def __init__(self, name: str, num_threads: int, num_helpers: int = 0) -> None:
        self._name = name
        self._max_threads = num_threads
        self._max_helpers = num_helpers
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._idle: SimpleQueue[None] = SimpleQueue()
        """One entry for each thread that waits for a job."""
        # Reentrant: a garbage collection within it may run code that submits.
        self._lock = threading.RLock()
        self._num_threads = self._num_helpers = 0
        self._num_begun = 0
        self._helper_waits = False
        self._stopped = False

    def submit(self, work: Callable[[], None]) -> Job:
        """Have a thread call `work`, which must not raise. Raises RuntimeError if no thread can be had."""
        job = Job(work)
        try:
            self.put(job)
        except BaseException:
            job.cancel()
            raise
        return job

    def put(self, job: Job) -> None:
        """Have a thread do the job. Raises RuntimeError as `submit()` does."""
        if self._stopped:
            raise RuntimeError("the threads are stopped")
        self._jobs.put(job)
        try:
            self._idle.get_nowait()
        except Empty:
            self._add_thread()

    def stop(self) -> None:
        """Begin no more jobs, and end the threads. Takes no lock, since it may run inside a garbage collection."""
        self._stopped = True
        for _ in range(self._max_threads):
            self._jobs.put(None)

    def _add_thread(self) -> None:
        with self._lock:
            if self._num_threads >= self._max_threads:
                self._add_helper()
                return
            try:
                _Thread(self._work, f"{self._name}-{self._num_threads}").start()
            except RuntimeError:
                if not self._num_threads:
                    raise
                return  # the system refuses, but the existing threads will do the job
            self._num_threads += 1

    def _work(self) -> None:
        while not self._stopped:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                self._idle.put(None)
                job = self._jobs.get()
            if job is None:
                return
            self._num_begun += 1
            job.run()
            del job  # so that what it refers to is not kept until the next one comes

    def _add_helper(self) -> None:
        with self._lock:
            if self._helper_waits or self._num_helpers >= self._max_helpers:
                return
            try:
                _Thread(self._help, f"{self._name}-helper").start()
            except RuntimeError:
                return  # the same as above
            self._num_helpers += 1
            self._helper_waits = True

    def _help(self) -> None:
        num_begun = -1
        while num_begun != self._num_begun and not self._jobs.empty():
            num_begun = self._num_begun
            time.sleep(_PATIENCE_S)
        # Cleared before it looks for a job, so that it finds a job whose submission saw it waiting.
        self._helper_waits = False
        while not self._stopped:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
            if job is None:
                self._jobs.put(None)  # for one of the others
                break
            self._num_begun += 1
            if not self._jobs.empty():
                self._add_helper()
            job.run()
            del job
        with self._lock:
            self._num_helpers -= 1


class PreparationThreads:
    """The threads that prepare one model's requests, in lanes, so that slow jobs hold up only slow jobs.

    Attributes:
        texts: for prompts and chats of usual length.
        long_texts: for longer ones; few threads, since they compete with the engine for the processors.
        grammars: for requests whose grammar must be compiled.
    """

    def __init__(self) -> None:
        self.texts = WorkerThreads("llmengine-tokenizer", 4, 8)
        self.long_texts = WorkerThreads("llmengine-tokenizer-long", 2)
        self.grammars = WorkerThreads("llmengine-grammar", 2, 2)
        self._starter: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "llmengine-starter")

    def submit_from_engine(self, threads: WorkerThreads, work: Callable[[], None]) -> Job:
        """`threads.submit` for the engine thread, which must not wait for a thread to start."""
        if (starter := self._starter) is None:
            raise RuntimeError("the threads are stopped")
        job = Job(work)
        starter.submit(_put_or_run, threads, job)
        return job

    def stop(self) -> None:
        """End all of them; see `WorkerThreads.stop`."""
        self._starter = None  # it ends once nothing refers to it; `shutdown()` would take a lock
        for threads in (self.texts, self.long_texts, self.grammars):
            threads.stop()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function on one of the threads; the future has its result."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as failure:
                future.set_exception(failure)

        self.texts.submit(run)
        return future


def _put_or_run(threads: WorkerThreads, job: Job) -> None:
    try:
        threads.put(job)
    except RuntimeError:  # no other thread can be had
        job.run()
