"""Replicas of a cluster that are processes of this machine with fake backends, without Ray.

They speak the wire of `llmengine.cluster`, pickled, over a socket pair: cheap enough to be killed hundreds of times. A
process is forked from Python's fork server, and ends when its connection does.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import anyio.to_thread

from llmengine import LLM
from llmengine.batch import Batch
from llmengine.cluster.replica import Replica
from llmengine.cluster.wire import Command, ReplicaInfo, Update

_LENGTH = struct.Struct("<I")

MakeLLM = Callable[[Callable[[Batch], None]], LLM]
"""Makes a replica's engine, given what its backend is to call in each step. A function of a module."""


def fork_server() -> ForkServerContext:
    """Where processes come from: one that has imported the engine already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "llmengine.testing"])
    return context


class ProcessTransport:
    """The wire to a replica in a process of its own, see `llmengine.cluster.transport.Transport`."""

    def __init__(self, context: ForkServerContext, make_llm: MakeLLM) -> None:
        self._context = context
        self._make_llm = make_llm
        self._process: BaseProcess | None = None
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None until it was started."""
        return None if self._process is None else self._process.pid

    async def start(self) -> ReplicaInfo:
        """See `Transport`."""
        ours, theirs = socket.socketpair()
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._process = self._context.Process(target=_serve, args=(theirs, self._make_llm), daemon=True)
        await anyio.to_thread.run_sync(self._launch, self._process, theirs)
        info: ReplicaInfo = await self._receive()
        return info

    async def send(self, commands: Sequence[Command]) -> None:
        """See `Transport`."""
        await self._send(list(commands))

    async def updates(self) -> AsyncIterator[Update]:
        """See `Transport`."""
        while (update := await self._receive()) is not None:
            yield update

    async def stop(self, drain_s: float) -> None:
        """See `Transport`."""
        await self._send(drain_s)
        assert self._process is not None
        await anyio.to_thread.run_sync(self._process.join)

    def kill(self) -> None:
        """See `Transport`."""
        self.cut()
        if self._process is not None and self.pid is not None:  # else it sees that the connection is cut
            self._process.kill()

    def cut(self) -> None:
        """Close the connection, and leave it to the process to notice."""
        if self._writer is not None:
            self._writer.transport.abort()

    @staticmethod
    def _launch(process: BaseProcess, theirs: socket.socket) -> None:
        with theirs:  # closed here, since a cancelled `start` does not wait for this thread
            process.start()

    async def _send(self, message: Any) -> None:
        assert self._writer is not None
        _write(self._writer, message)
        await self._writer.drain()

    async def _receive(self) -> Any:
        try:
            return await _read(self._reader)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ConnectionError("its process has ended, or the connection to it") from error


def _serve(connection: socket.socket, make_llm: MakeLLM) -> None:
    """Be a replica. SIGUSR1 makes the next step fail."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    failing = False

    def fail(*_: Any) -> None:
        nonlocal failing
        failing = True

    def on_step(batch: Batch) -> None:
        if failing:
            raise RuntimeError("rank 1 was killed by SIGKILL")

    signal.signal(signal.SIGUSR1, fail)
    logging.getLogger("llmengine").setLevel(logging.CRITICAL + 1)  # the cluster says what was the matter
    asyncio.run(_run(connection, Replica(make_llm(on_step))))
    os._exit(0)


async def _run(connection: socket.socket, replica: Replica) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    _write(writer, replica.info)
    async with asyncio.TaskGroup() as group:
        group.create_task(_obey(reader, replica))
        async for update in replica.updates():
            _write(writer, update)
            await writer.drain()
        _write(writer, None)
        await writer.drain()


async def _obey(reader: asyncio.StreamReader, replica: Replica) -> None:
    try:
        while isinstance(message := await _read(reader), list):
            replica.execute(message)
    except (asyncio.IncompleteReadError, OSError):
        os._exit(1)  # the cluster is gone
    await replica.aclose(message)


def _write(writer: asyncio.StreamWriter, message: Any) -> None:
    data = pickle.dumps(message)
    writer.write(_LENGTH.pack(len(data)) + data)


async def _read(reader: asyncio.StreamReader) -> Any:
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(size))
