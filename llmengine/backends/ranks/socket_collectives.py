"""Collectives of tensors in host memory among ranks on several hosts, over a connection for each two of them.

Each rank sends its tensor to all others and adds all up itself, in the order of ranks, in float32 for shorter floats:
as in `shared_collectives.py`, the sum is the same on all ranks and in every run. With two ranks nothing can send less.

Rejected: gloo, which knows no secret, waits where a lost host cannot be noticed, and adds in an order that depends on
an element's place in its tensor; a ring for many ranks, in which each turn takes the link's latency.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from llmengine.backends.ranks.collectives import PeerLostError, Waiting, add_up
from llmengine.backends.ranks.progress import Progress

if TYPE_CHECKING:
    import torch

__all__ = ["SocketCollectives"]

_NAP_MS = 50.0
_MAX_DIMS = 7
# A tensor that is larger is added up in parts, which bounds the memory for those of others.
_PART = 4 << 20


class SocketCollectives:
    """The end of one rank.

    Args:
        rank: this rank, from 0, in its stage.
        connections: to each other rank of the stage.
        while_waiting: called again and again while other ranks are awaited, with those and the seconds waited so far;
            raises to give up.
        when_lost: raises what it means that a connection has ended.
        progress: where this rank marks what arrives.
    """

    def __init__(
        self,
        rank: int,
        connections: Mapping[int, socket.socket],
        while_waiting: Callable[[Sequence[int], float], None],
        when_lost: Callable[[Exception], NoReturn],
        progress: Progress,
    ) -> None:
        self.rank = rank
        self.size = 1 + len(connections)
        self._connections = connections
        self._while_waiting = while_waiting
        self._when_lost = when_lost
        self._progress = progress
        self._rooms: dict[torch.dtype, torch.Tensor] = {}

    def all_reduce(self, tensor: torch.Tensor) -> None:
        flat = tensor.view(-1)
        for mine in flat.split(_PART // tensor.element_size()):
            parts = self._room_for(mine)
            if self.size > 2:
                parts[self.rank].copy_(mine)  # which is written to before all has been added up
            else:
                parts[self.rank] = mine
            data = _bytes_of(mine)
            incoming = {rank: _bytes_of(parts[rank]) for rank in self._connections}
            self._exchange(dict.fromkeys(self._connections, data), incoming)
            add_up(parts, mine)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        tensor = tensor.contiguous()
        if self.rank:
            for data in (_bytes_of(_shape_of(tensor)), _bytes_of(tensor)):
                self._exchange({0: data}, {})
            return None
        import torch

        shapes = {rank: torch.empty(1 + _MAX_DIMS, dtype=torch.int64) for rank in self._connections}
        self._exchange({}, {rank: _bytes_of(shape) for rank, shape in shapes.items()})
        parts = {rank: tensor.new_empty(shape[1 : 1 + int(shape[0])].tolist()) for rank, shape in shapes.items()}
        self._exchange({}, {rank: _bytes_of(part) for rank, part in parts.items()})
        return [tensor, *(parts[rank] for rank in range(1, self.size))]

    def close(self) -> None:
        """Close the connections; idempotent."""
        for connection in self._connections.values():
            connection.close()

    def _room_for(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Memory for the parts of all ranks, which the next sum uses again: pages that are new take longer to come than
        what fills them."""
        import torch

        room = self._rooms.get(mine.dtype)
        if room is None or room.shape[1] < mine.numel():
            with torch.inference_mode(False):  # otherwise it could be written to in that mode only
                room = self._rooms[mine.dtype] = torch.empty(self.size, mine.numel(), dtype=mine.dtype)
        return [part[: mine.numel()] for part in room]

    def _exchange(self, outgoing: Mapping[int, memoryview], incoming: Mapping[int, memoryview]) -> None:
        """Send to some ranks and fill what is for others, all at once."""
        sends, receives = dict(outgoing), dict(incoming)
        waiting = Waiting()
        while True:
            if self._move(sends, _send) | self._move(receives, _receive):
                waiting = Waiting()
                self._progress.mark()
                continue
            if not sends and not receives:
                return
            if not waiting.spins():
                self._progress.rest()
                self._while_waiting(sorted({*sends, *receives}), waiting.waited_s)
                self._nap(sends, receives)

    def _move(self, pending: dict[int, memoryview], move: Callable[[socket.socket, memoryview], int]) -> bool:
        """Send or receive what is possible now, and forget what is done; whether anything was."""
        has_moved = False
        for rank, data in list(pending.items()):
            try:
                count = move(self._connections[rank], data)
            except BlockingIOError:
                continue
            except OSError as error:
                self._when_lost(PeerLostError(f"rank {rank} of the stage is gone: {error}"))
            if not count and data:
                self._when_lost(PeerLostError(f"rank {rank} of the stage is gone"))
            has_moved = True
            if count == len(data):
                del pending[rank]
            else:
                pending[rank] = data[count:]
        return has_moved

    def _nap(self, sends: Mapping[int, memoryview], receives: Mapping[int, memoryview]) -> None:
        poll = select.poll()
        with contextlib.suppress(OSError, ValueError):  # closed by another thread
            for rank in {*sends, *receives}:
                events = (select.POLLOUT if rank in sends else 0) | (select.POLLIN if rank in receives else 0)
                poll.register(self._connections[rank], events)
            poll.poll(_NAP_MS)


def _send(connection: socket.socket, data: memoryview) -> int:
    return connection.send(data, socket.MSG_DONTWAIT)


def _receive(connection: socket.socket, data: memoryview) -> int:
    return connection.recv_into(data, flags=socket.MSG_DONTWAIT)


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim > _MAX_DIMS:
        raise ValueError(f"a tensor has {tensor.ndim} dimensions; {_MAX_DIMS} can be gathered")
    import torch

    values = [tensor.ndim, *tensor.shape]
    return torch.tensor(values + [0] * (1 + _MAX_DIMS - len(values)))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view
