"""The store at which ranks on GPUs meet for NCCL."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["connect_store", "host_store"]


def host_store(listener: socket.socket, timeout_s: float) -> TCPStore:
    """The store at which ranks meet, on a port that is bound already; takes the listening socket over."""
    host, port = listener.getsockname()[:2]
    timeout = timedelta(seconds=timeout_s)
    fd = listener.detach()
    return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=fd)


def connect_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Connect to the store that rank 0 hosts."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
