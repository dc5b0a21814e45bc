"""`DeviceCollectives`: through NCCL on GPUs, and through the host's memory for ranks on the CPU, as in tests."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import AllgatherOptions  # type: ignore[attr-defined]

from llmengine.backends.cuda.peers import DeviceCollectives
from llmengine.backends.ranks import Collectives
from llmengine.backends.ranks.backend import OpenCollectives
from llmengine.kernels.norm import rms_norm
from llmengine.kernels.peer_sum import RowNorm
from llmengine.kernels.step import NUM_SAMPLES

_torch: Any = distributed  # whose stubs lack most of what is used here

# Rank 0 finds out what is late, and aborts; NCCL's own clock must not end processes before.
_OPERATION_TIMEOUT = timedelta(days=7)
_ABORT_S, _CLOSE_S = 0.2, 10.0
"""For NCCL to end, while there may be CUDA graphs that hold operations of it, and when there are none."""

_NO_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class RankCollectives(DeviceCollectives, OpenCollectives, Protocol):
    """Collectives of tensors on devices."""


class HostCollectives:
    """Collectives of tensors in host memory, done when they are called."""

    description = "shared memory"

    def __init__(self, own: Collectives) -> None:
        self._own = own
        self.rank, self.size = own.rank, own.size

    def all_reduce(self, tensor: Tensor) -> None:
        self._own.all_reduce(tensor)

    def add_sum(self, part: Tensor, x: Tensor, norm: RowNorm | None) -> None:
        add_sum_in_steps(self, part, x, norm)

    def choose(self, logits: Tensor, counts: Tensor, ids: Tensor, failed: Tensor, start: int) -> None:
        choose_on_rank_0(self, logits, counts, ids, failed, start)

    def broadcast(self, tensor: Tensor) -> None:
        if self.rank:
            tensor.zero_()
        self._own.all_reduce(tensor)

    def gather(self, tensor: Tensor, parts: Tensor | None) -> None:
        found = self._own.gather(tensor)
        if parts is not None:
            assert found is not None
            torch.stack(found, out=parts)

    def abort(self) -> None:
        """Nothing: operations that wait look for failures themselves."""

    def close(self) -> None:
        """Nothing: the memory is the group's."""


class NcclCollectives:
    """Collectives by NCCL, queued in the current stream of the device.

    No global process group is made, and torch's watchdog ends no process of ours.

    Args:
        store: where the ranks meet.
        deterministic: sums are in the order of ranks, in float32, whatever the size: NCCL chooses an algorithm, and
            with it an order, by the size of a tensor. Costs a copy of every rank's tensor.
    """

    def __init__(
        self, store: Store, rank: int, size: int, device: torch.device, *, deterministic: bool = False
    ) -> None:
        self.rank, self.size = rank, size
        self._device = device
        self._deterministic = deterministic
        self._group = _NcclGroup(store, rank, size)

    @property
    def description(self) -> str:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        return f"NCCL {version}" + (" in the order of ranks" if self._deterministic else "")

    def connect(self) -> None:
        """Meet the other ranks, which call this too. Blocks without the GIL; `abort` ends that."""
        with torch.cuda.device(self._device):
            met = torch.ones(self.size, dtype=torch.int32, device=self._device)
            self._wait(self._group.own.allreduce([met], _options(_torch.AllreduceOptions())))
            if self.rank == 0:
                self.gather(met, met.new_empty(self.size, self.size))
            else:
                self.gather(met, None)
            torch.cuda.current_stream(self._device).synchronize()

    def all_reduce(self, tensor: Tensor) -> None:
        if not self._deterministic or not tensor.is_floating_point():
            self._wait(self._group.own.allreduce([tensor], _options(_torch.AllreduceOptions())))
            return
        parts = tensor.new_empty(self.size, *tensor.shape)
        outputs = [list(parts.unbind())]
        self._wait(self._group.own.allgather(outputs, [tensor], _options(AllgatherOptions())))
        add_in_order(parts, tensor)

    def add_sum(self, part: Tensor, x: Tensor, norm: RowNorm | None) -> None:
        add_sum_in_steps(self, part, x, norm)

    def choose(self, logits: Tensor, counts: Tensor, ids: Tensor, failed: Tensor, start: int) -> None:
        choose_on_rank_0(self, logits, counts, ids, failed, start)

    def broadcast(self, tensor: Tensor) -> None:
        self._wait(self._group.own.broadcast([tensor], _options(_torch.BroadcastOptions())))

    def gather(self, tensor: Tensor, parts: Tensor | None) -> None:
        outputs = [] if parts is None else [list(parts.unbind())]
        self._wait(self._group.own.gather(outputs, [tensor.contiguous()], _options(_torch.GatherOptions())))

    def abort(self) -> None:
        self._group.abort()

    def close(self) -> None:
        self._group.close()

    def _wait(self, work: Any) -> None:
        """Have the current stream wait; the host does not."""
        if work is not None:
            work.wait()


class NcclPair:
    """Two ranks, 0 of which sends to 1, queued in the current stream of the device."""

    def __init__(self, store: Store, rank: int, device: torch.device) -> None:
        self._device = device
        self._group = _NcclGroup(store, rank, 2)

    def send(self, tensor: Tensor) -> None:
        """Send a contiguous tensor; the stream goes on when it is received."""
        self._group.own.send([tensor], 1, 0).wait()

    def receive(self, tensor: Tensor) -> None:
        """Receive into a contiguous tensor of the same shape and dtype."""
        self._group.own.recv([tensor], 0, 0).wait()

    def abort(self) -> None:
        """End what waits. From any thread."""
        self._group.abort()

    def close(self) -> None:
        """Free the connection. Idempotent."""
        self._group.close()


class _NcclGroup:
    """A group of torch's, and its end.

    Aborted, NCCL ends what waits at once, but it returns only when no CUDA graph holds an operation of it any more.
    Whoever has the graphs may be waiting for these operations or for the caller. So a thread of its own waits for NCCL.

    Attributes:
        own: the group.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        kind: Any = _torch.ProcessGroupNCCL
        options = kind.Options()
        options._timeout = _OPERATION_TIMEOUT
        with _environment(_NO_WATCHDOG):
            self.own: Any = kind(store, rank, size, options)
        self._lock = threading.Lock()
        self._ending: threading.Thread | None = None

    def abort(self, timeout_s: float = _ABORT_S) -> None:
        """End what waits, and wait a little for NCCL's end. From any thread; idempotent."""
        with self._lock:
            if self._ending is None:
                self._ending = threading.Thread(target=self.own.abort, name="llmengine-nccl-end", daemon=True)
                self._ending.start()
        self._ending.join(timeout_s)

    def close(self) -> None:
        """Free everything; the graphs are gone. Idempotent."""
        self.abort(_CLOSE_S)
        self.own = None


def add_in_order(parts: Tensor, out: Tensor) -> None:
    """Write the sum of parts [size, ...] to `out`, added one after the other in float32."""
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    out.copy_(total)


def add_sum_in_steps(collectives: DeviceCollectives, part: Tensor, x: Tensor, norm: RowNorm | None) -> None:
    """`DeviceCollectives.add_sum` by operations of their own."""
    collectives.all_reduce(part)
    x.add_(part)
    if norm is not None:
        rms_norm(x, norm.weight, norm.eps, norm.out)


def choose_on_rank_0(
    collectives: DeviceCollectives, logits: Tensor, counts: Tensor, ids: Tensor, failed: Tensor, start: int
) -> None:
    """`DeviceCollectives.choose` by rank 0, which tells the others."""
    is_row = torch.arange(len(ids), device=ids.device) < counts[NUM_SAMPLES]
    columns = torch.where(is_row, ids, 0).long()
    own = logits.gather(1, columns[:, None]).squeeze(1).masked_fill_(failed != 0, float("inf"))
    is_first = collectives.rank == 0
    values = own.new_empty(collectives.size, len(own)) if is_first else None
    found = ids.new_empty(collectives.size, len(ids)) if is_first else None
    collectives.gather(own, values)
    collectives.gather(ids + start, found)
    choice = torch.stack((ids, failed))
    if values is not None and found is not None:
        best, chosen = values[0], found[0]
        for value, candidate in zip(values[1:], found[1:], strict=True):
            chosen = torch.where(value > best, candidate, chosen)
            best = torch.maximum(best, value)
        is_failed = best.abs() == float("inf")
        torch.stack((chosen.masked_fill(is_failed, 0), is_failed.to(ids.dtype)), out=choice)
    collectives.broadcast(choice)
    torch.where(is_row, choice[0], ids, out=ids)
    torch.where(is_row, choice[1], failed, out=failed)


def _options(options: Any) -> Any:
    """The same, for an operation in the current stream where torch can do that, else in one beside it."""
    if hasattr(options, "asyncOp"):
        options.asyncOp = False
    return options


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment that a constructor reads."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
