"""KvEventPublisher: tells routers over ZeroMQ which prefixes an engine has in its KV cache, as vLLM's KV events do.

Each message has three frames: the topic, a sequence number (8 bytes, big-endian, from 0), and a batch in msgpack.
A batch is ``[time, events, 0]``; the time is in seconds since the epoch. An event is an array as well:

- ``["BlockStored", hashes, parent_hash, token_ids, block_size, None, "GPU", None, extra_keys]`` for blocks of which
  each continues the one before, and the first the block `parent_hash` (None: nothing). "GPU" is where the KV cache is
  in vLLM's words, whatever the device. `extra_keys` is None, or for blocks of prompts with a salt ``[[salt], ...]``.
- ``["BlockRemoved", hashes, "GPU"]``
- ``["AllBlocksCleared"]`` at the beginning and at the engine's end.

A hash is an unsigned integer of 64 bits, made of all tokens up to the block's end and the salt, the same in every
process.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import time
import weakref
from array import array
from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from threading import Thread
from typing import TYPE_CHECKING, Any

import msgpack
import zmq

from llmengine.errors import ConfigError
from llmengine.observer import CachedBlock, EngineObserver, PrefixCacheChange

if TYPE_CHECKING:
    from llmengine.llm import LLM

logger = logging.getLogger(__name__)

_MEDIUM = "GPU"
_END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)
_LINGER_MS = 1000
"""How long messages that are on their way may take when the sockets are closed."""

_END_S = 10.0
"""How long `close` waits for the thread."""


class KvEventPublisher(EngineObserver):
    """Publishes the changes of an engine's prefix cache until the `LLM` or the publisher is closed.

    The engine thread only hands over what changed; hashes, messages and sockets are the work of a thread of this
    object's own. Subscribers that are slow or come late miss messages, as always with ZeroMQ; they see it by the
    sequence numbers and ask `replay_endpoint`.

    Attributes:
        endpoint: the address of the PUB socket, with the port that was chosen.
        replay_endpoint: likewise of the ROUTER socket; None if there is none.
    """

    def __init__(
        self,
        llm: LLM,
        endpoint: str = "tcp://127.0.0.1:5557",
        *,
        replay_endpoint: str | None = None,
        topic: str = "",
        num_replayed: int = 10_000,
    ) -> None:
        """Bind the sockets, and begin with the cache's present content.

        Args:
            llm: the engine, which may run already. This object does not keep it alive.
            endpoint: where to listen for subscribers, such as "tcp://*:5557"; port "*" takes a free one.
            replay_endpoint: where to listen for requests for past messages. A request is a sequence number, as a REQ
                socket sends it; the answers are all messages from that one on, and one with the number -1.
            topic: first frame of each message; llm-d expects "kv@ADDRESS@MODEL".
            num_replayed: how many messages are kept for that.

        Raises `ConfigError` for an address where this process cannot listen.
        """
        self._context = zmq.Context()  # its end waits until the ports are free again
        self._sockets: list[zmq.Socket[bytes]] = []
        self.endpoint = self._bind(zmq.PUB, endpoint)
        self.replay_endpoint = None if replay_endpoint is None else self._bind(zmq.ROUTER, replay_endpoint)
        self._topic = topic.encode()
        self._past: deque[tuple[bytes, bytes]] = deque(maxlen=num_replayed)
        self._next_number = 0
        self._hashes: dict[int, int] = {}
        """uid of a block's content -> its hash."""
        self._inbox: queue.SimpleQueue[PrefixCacheChange | None] = queue.SimpleQueue()
        self._awaken, self._awakened = socket.socketpair()
        self._awaken.setblocking(False)
        self._thread = Thread(target=self._run, name="llmengine-kv-events", daemon=True)
        self._llm = weakref.ref(llm)
        self._thread.start()
        llm.add_observer(self)

    def close(self) -> None:
        """Tell subscribers that the cache is gone, and close the sockets. Idempotent."""
        if (llm := self._llm()) is not None:
            llm.remove_observer(self)
        self._hand_over(None)
        self._thread.join(_END_S)
        if self._thread.is_alive():  # seen once: ZeroMQ waited for minutes, with every socket closed
            logger.warning(
                "llmengine: ZeroMQ has not ended within %g s; the thread of KV events is left behind", _END_S
            )

    def prefix_cache_changed(self, change: PrefixCacheChange) -> None:
        """See `EngineObserver`."""
        self._hand_over(change)

    def engine_ended(self, failure: BaseException | None) -> None:
        """See `EngineObserver`."""
        self._hand_over(None)

    def engine_closed(self) -> None:
        """See `EngineObserver`."""
        self._hand_over(None)

    def _bind(self, kind: int, endpoint: str) -> str:
        made: zmq.Socket[bytes] = self._context.socket(kind)
        self._sockets.append(made)
        try:
            made.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot listen at {endpoint}: {error}") from error
        bound = made.last_endpoint
        assert isinstance(bound, bytes)
        return bound.rstrip(b"\0").decode()

    def _hand_over(self, change: PrefixCacheChange | None) -> None:
        self._inbox.put(change)
        with contextlib.suppress(OSError):  # too many calls that the thread has not seen yet, or it has ended
            self._awaken.send(b"\0")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._awakened, zmq.POLLIN)
        for router in self._sockets[1:]:
            poller.register(router, zmq.POLLIN)
        try:
            is_open = True
            while is_open:
                ready = dict(poller.poll())
                if self._awakened.fileno() in ready:
                    self._awakened.recv(65536)
                    is_open = self._publish_changes()
                for router in self._sockets[1:]:
                    if router in ready:
                        self._replay(router)
        except Exception:
            logger.exception("llmengine: KV events end because of a fault")
        finally:
            if (llm := self._llm()) is not None:
                llm.remove_observer(self)
            self._context.destroy(linger=_LINGER_MS)
            self._awaken.close()
            self._awakened.close()

    def _publish_changes(self) -> bool:
        """Publish all that was handed over; False if nothing will follow."""
        while not self._inbox.empty():
            change = self._inbox.get()
            if change is None:
                self._publish([["AllBlocksCleared"]])
                return False
            self._publish(self._events(change))
        return True

    def _publish(self, events: list[list[Any]]) -> None:
        number = self._next_number.to_bytes(8, "big")
        self._next_number += 1
        payload: bytes = msgpack.packb([time.time(), events, 0])
        self._past.append((number, payload))
        self._sockets[0].send_multipart([self._topic, number, payload])

    def _events(self, change: PrefixCacheChange) -> list[list[Any]]:
        events: list[list[Any]] = []
        if change.is_whole:
            self._hashes.clear()
            events.append(["AllBlocksCleared"])
        if change.removed:
            events.append(["BlockRemoved", [self._hashes.pop(uid) for uid in change.removed], _MEDIUM])
        for chain in _chains(change.stored):
            first = chain[0]
            parent = None if first.parent is None else self._hashes[first.parent]
            hashes = [self._hash(block) for block in chain]
            token_ids = [token_id for block in chain for token_id in block.token_ids]
            extra = None if first.salt is None else [[repr(block.salt)] for block in chain]
            events.append(["BlockStored", hashes, parent, token_ids, change.block_size, None, _MEDIUM, None, extra])
        return events

    def _hash(self, block: CachedBlock) -> int:
        digest = blake2b(array("q", block.token_ids).tobytes(), digest_size=8)
        if block.parent is not None:
            digest.update(self._hashes[block.parent].to_bytes(8, "big"))
        elif block.salt is not None:
            digest.update(repr(block.salt).encode())
        found = self._hashes[block.uid] = int.from_bytes(digest.digest(), "big")
        return found

    def _replay(self, router: zmq.Socket[bytes]) -> None:
        frames = router.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            logger.warning("llmengine: a request for past KV events must be a sequence number of 8 bytes")
            return
        client, delimiter, first = frames
        for number, payload in self._past:
            if number >= first:
                router.send_multipart([client, delimiter, number, payload])
        router.send_multipart([client, delimiter, _END_OF_REPLAY, b""])


def _chains(blocks: Sequence[CachedBlock]) -> list[list[CachedBlock]]:
    """The blocks in order, those together of which each continues the one before."""
    chains: list[list[CachedBlock]] = []
    for block in blocks:
        if chains and block.parent == chains[-1][-1].uid:
            chains[-1].append(block)
        else:
            chains.append([block])
    return chains
