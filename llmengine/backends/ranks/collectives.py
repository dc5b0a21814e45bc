"""What ranks compute together: sums and gathers of tensors. Here over a process group of torch.distributed.

No global process group is made: the caller may have one, and several engines may share a process.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, Protocol

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    AllreduceOptions,
    GatherOptions,
    ProcessGroupGloo,
    TCPStore,
)

__all__ = ["Collectives", "GlooCollectives", "PeerLostError", "connect_store", "host_store", "join_gloo"]


class PeerLostError(RuntimeError):
    """A collective failed because another rank is gone or late: a consequence, whose cause is that rank's."""


class Collectives(Protocol):
    """Operations that every rank must call in the same order, with tensors of the same dtype.

    An operation that cannot end because of another rank raises. Afterwards none can be used.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace the contiguous tensor, of one shape on all ranks, by its sum over them."""

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """The tensors of all ranks in their order; None on ranks other than 0."""

    def close(self) -> None:
        """Close the connections; idempotent."""


class GlooCollectives:
    """Collectives of tensors in host memory, by gloo over TCP; `gather` wants tensors of one shape.

    Args:
        group: this rank's `ProcessGroupGloo`, whose operations torch's stubs do not have.
        timeout_s: what an operation may wait for other ranks.
        when_failed: raises what the error of an operation means.
    """

    def __init__(self, group: Any, timeout_s: float, when_failed: Callable[[Exception], NoReturn]) -> None:
        self._group = group
        self._sum = AllreduceOptions()
        self._sum.timeout = timedelta(seconds=timeout_s)
        self._to_rank_0 = GatherOptions()
        self._to_rank_0.timeout = timedelta(seconds=timeout_s)
        self._when_failed = when_failed
        self.rank: int = group.rank()
        self.size: int = group.size()

    def all_reduce(self, tensor: torch.Tensor) -> None:
        try:
            self._open_group().allreduce([tensor], self._sum).wait()
        except RuntimeError as error:
            self._when_failed(error)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        tensor = tensor.contiguous()
        outputs = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        try:
            self._open_group().gather([] if outputs is None else [outputs], [tensor], self._to_rank_0).wait()
        except RuntimeError as error:
            self._when_failed(error)
        return outputs

    def close(self) -> None:
        self._group = None

    def _open_group(self) -> Any:
        if self._group is None:
            raise PeerLostError("the collectives are closed")
        return self._group


def host_store(listener: socket.socket, timeout_s: float) -> TCPStore:
    """The store at which ranks meet, on a port that is bound already; takes the listening socket over."""
    host, port = listener.getsockname()[:2]
    timeout = timedelta(seconds=timeout_s)
    fd = listener.detach()
    return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=fd)


def connect_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Connect to the store that rank 0 hosts."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def join_gloo(store: TCPStore, rank: int, size: int, host: str, timeout_s: float) -> Any:
    """Connect to all other ranks, which call this too; blocks until all have.

    Args:
        host: an address of this host, at which the other ranks reach this one.
        timeout_s: how long this may take.
    """
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [gloo.create_device(hostname=host)]
    return gloo(store, rank, size, options)
