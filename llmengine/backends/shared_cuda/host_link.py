"""The memory between stages for ranks on the CPU, as in tests: a file that they map, and the kernels that GPUs run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llmengine.backends.cuda.stage_link import MappedLink, PipedLink
from llmengine.backends.ranks.memory import anonymous_file
from llmengine.backends.ranks.pipe import Pipe
from llmengine.kernels.stage_link import RELEASED_BYTE, LinkLayout, LinkMemory

_PAUSE_S = 100e-6


class Resting(Protocol):
    """See `backends.ranks.progress.Progress`."""

    def mark(self, what: bytes = b"") -> None:
        """Say that this rank goes on."""

    def rest(self) -> None:
        """Say that it waits for others, until the next mark."""


class HostLinkMemory:
    """The memory of all ranks in one file.

    A kernel that waits would keep the interpreter, so the host waits first.

    Args:
        path: of a file of `LinkLayout.size_bytes` for each rank.
        after: the rank that this one writes to.
        progress: where the rank says that it rests while it waits.
        check: called while it waits; what that raises ends it.
    """

    def __init__(
        self, path: str, rank: int, after: int, layout: LinkLayout, progress: Resting, check: Callable[[], None]
    ) -> None:
        self._progress, self._check = progress, check
        mapped = np.memmap(path, dtype=np.uint8, mode="r+")
        each = layout.size_bytes(is_first=False)
        self._own = mapped[rank * each : (rank + 1) * each].view(np.int32)
        start = int(mapped.ctypes.data)
        at = torch.tensor([start + each * one for one in (rank, after)], dtype=torch.int64)
        self._number = torch.zeros(1, dtype=torch.int32)
        self.link: MappedLink = MappedLink(LinkMemory(layout, at, self._number), self._wait)

    def release(self) -> None:
        """End every wait for another stage, now and later; results are junk. From any thread."""
        self._own[RELEASED_BYTE // 4] = 1

    def close(self) -> None:
        """Nothing: the memory is freed with the last tensor that needs it."""

    def _wait(self, lag: int) -> None:
        wanted = int(self._number[0]) + 1 - lag
        while self._own[0] < wanted and not self._own[RELEASED_BYTE // 4]:
            self._progress.rest()
            self._check()
            time.sleep(_PAUSE_S)
        self._progress.mark(b"a stage")


class HostLinkFile:
    """A file for `HostLinkMemory`, which is gone with the process that made it."""

    def __init__(self, num_ranks: int, layout: LinkLayout) -> None:
        self._fd = anonymous_file("stages", num_ranks * layout.size_bytes(is_first=False))
        self.path: str = f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Give up this process's end, when all ranks have mapped it. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class HostPipe:
    """A pipe for ranks on the CPU of several hosts; what waits in it looks for failures itself."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self.link: PipedLink = PipedLink(self)

    def receive(self, x: Tensor) -> None:
        """See `HiddenPipe`."""
        x.copy_(self._pipe.receive(x.shape, x.dtype))

    def send(self, x: Tensor) -> None:
        """See `HiddenPipe`."""
        self._pipe.send(x)

    def release(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing: the pipe is the rank's."""
