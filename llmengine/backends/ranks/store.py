"""The store at which ranks on GPUs meet."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from llmengine.errors import EngineClosedError, EngineDeadError

__all__ = ["MeetingPoint", "connect_store", "host_store"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


def host_store(listener: socket.socket, timeout_s: float) -> TCPStore:
    """The store at which ranks meet, on a port that is bound already; takes the listening socket over."""
    host, port = listener.getsockname()[:2]
    timeout = timedelta(seconds=timeout_s)
    fd = listener.detach()
    return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=fd)


def connect_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Connect to the store that rank 0 hosts."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


class MeetingPoint:
    """What ranks leave for each other at a store; unlike the store's own, its waiting can be ended.

    Args:
        timeout_s: how long `get` waits.
    """

    def __init__(self, store: Store, timeout_s: float, ended: threading.Event | None = None) -> None:
        self._store = store
        self._timeout_s = timeout_s
        self._ended = threading.Event() if ended is None else ended

    def at(self, prefix: str) -> MeetingPoint:
        """The same for keys of their own, which ends with this one."""
        return MeetingPoint(PrefixStore(prefix, self._store), self._timeout_s, self._ended)

    def set(self, key: str, value: str) -> None:
        """Leave something for the others."""
        self._store.set(key, value)

    def get(self, key: str) -> str:
        """What a rank has left, as soon as it has.

        Raises `EngineDeadError` if it does not in time, and `EngineClosedError` after `end`.
        """
        until, pause = time.monotonic() + self._timeout_s, _FIRST_PAUSE_S
        # The store's own waiting writes a warning to stderr whenever its time is up.
        while not self._store.check([key]):
            if self._ended.wait(pause):
                break
            if time.monotonic() >= until:
                raise EngineDeadError(f"no rank has left {key!r} within {self._timeout_s:.3g} s")
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        if self._ended.is_set():
            raise EngineClosedError("the ranks are not wanted any more")
        value: bytes = self._store.get(key)
        return value.decode()

    def exchange(self, key: str, rank: int, size: int, value: str) -> list[str]:
        """What each of `size` ranks leaves under a key, in their order; all call this, and raise what `get` raises."""
        self.set(f"{key}-{rank}", value)
        return [self.get(f"{key}-{other}") for other in range(size)]

    def end(self) -> None:
        """End all waiting, now and later. From any thread."""
        self._ended.set()
