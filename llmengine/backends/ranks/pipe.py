"""What passes between the stages of a pipeline: each rank sends tensors to one rank, and receives from one.

The ranks are divided into stages of `stage_size` consecutive ones. Rank 0's is the last stage: the others come in their
order, and behind the last of them rank 0's::

    ranks with stage_size 2:    2, 3  ->  4, 5  ->  6, 7  ->  0, 1

So what a pipeline ends with is where the caller is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, Protocol

from llmengine.backends.ranks.collectives import PeerLostError
from llmengine.backends.ranks.layout import RankLayout
from llmengine.backends.ranks.memory import anonymous_file
from llmengine.backends.ranks.progress import Progress
from llmengine.backends.ranks.ring import Ring, RingReader, ring_size

if TYPE_CHECKING:
    import torch

__all__ = ["Pipe", "PipeLinks", "TensorPipe"]

# Looking for longer would keep the interpreter's lock from the caller's threads.
_SPIN_S = 50e-6


class Pipe(Protocol):
    """A rank's connections to the stage before its own, and to the stage after. Tensors arrive in their order."""

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor that the stage before sends, in new memory; waits for it.

        Args:
            shape: as it was sent.
        """

    def send(self, tensor: torch.Tensor) -> None:
        """Send a tensor to the stage after. May return before it is received, and the tensor may be changed then."""

    def close(self) -> None:
        """Tell the stage after that nothing follows, and give up this end; idempotent."""


class Inbox(Protocol):
    """What the stage before writes: a `RingReader` or a `SocketReader`."""

    def read_into(self, target: memoryview) -> bool:
        """Fill `target` with the next message, which must be as long; False when the writer has closed."""

    def close(self) -> None:
        """Give up this end."""


class Outbox(Protocol):
    """What the stage after reads: a `RingWriter` or a `SocketWriter`."""

    def write(self, message: bytes | memoryview) -> None:
        """Send a message."""

    def close(self) -> None:
        """Tell the reader that nothing follows."""


class TensorPipe:
    """A pipe of tensors in host memory, through rings in memory that two ranks share, or over connections.

    Args:
        inbox: what the stage before writes; None in the first stage.
        outbox: what the stage after reads; None in the last stage.
        progress: where this rank marks what passes, and rests while it waits.
        when_ended: raises what it means that the rank before has ended.
    """

    def __init__(
        self,
        inbox: Inbox | None,
        outbox: Outbox | None,
        progress: Progress,
        when_ended: Callable[[Exception], NoReturn],
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._progress = progress
        self._when_ended = when_ended

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        import torch

        assert self._inbox is not None, "the first stage receives nothing"
        tensor = torch.empty(*shape, dtype=dtype)
        self._progress.rest()
        if not self._inbox.read_into(_bytes_of(tensor)):
            self._when_ended(PeerLostError("the stage before has ended"))
        self._progress.mark(b"hidden states")
        return tensor

    def send(self, tensor: torch.Tensor) -> None:
        assert self._outbox is not None, "the last stage sends nothing"
        self._progress.rest()
        self._outbox.write(_bytes_of(tensor.contiguous()))
        self._progress.mark()

    def close(self) -> None:
        if self._outbox is not None:
            self._outbox.close()
        if self._inbox is not None:
            self._inbox.close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view


class PipeLinks:
    """The rings between neighbours of one host, and the sockets that wake readers up, until the ranks have them."""

    def __init__(self, layout: RankLayout, host: int) -> None:
        self._layout = layout
        senders = [
            rank
            for rank in layout.on(host)
            if (receiver := layout.receiver(rank)) is not None and layout.hosts[receiver] == host
        ]
        self._rings = {rank: anonymous_file("pipe", ring_size(1)) for rank in senders}
        self._sockets = {rank: socket.socketpair() for rank in senders}

    def ends_of(self, rank: int) -> dict[str, int]:
        """Descriptors of what a rank receives from and sends to; -1 where there is none."""
        sender = self._layout.sender(rank)
        inbox, outbox = (-1, -1), (-1, -1)
        if sender in self._rings:
            inbox = (self._rings[sender], self._sockets[sender][1].fileno())
        if rank in self._rings:
            outbox = (self._rings[rank], self._sockets[rank][0].fileno())
        names = ("inbox", "inbox_waker", "outbox", "outbox_waker")
        return dict(zip(names, (*inbox, *outbox), strict=True))

    def inbox_of_rank_0(self, while_waiting: Callable[[float], None]) -> RingReader | None:
        """What rank 0 receives from; None if there is nothing, or it is on another host."""
        sender = self._layout.sender(0)
        if sender not in self._rings:
            return None
        return RingReader(Ring(self._rings[sender], 1), 0, self._sockets[sender][1].dup(), while_waiting, _SPIN_S)

    def close(self) -> None:
        """Close this process's descriptors, but for rank 0's end."""
        for fd in self._rings.values():
            os.close(fd)
        for pair in self._sockets.values():
            for one in pair:
                one.close()
