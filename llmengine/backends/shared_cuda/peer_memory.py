"""Memory of each rank's GPU that the GPUs of the others map, through handles of CUDA IPC."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from llmengine.backends.cuda.stage_link import MappedLink
from llmengine.backends.ranks.store import MeetingPoint
from llmengine.kernels.limits import has_pdl
from llmengine.kernels.peer_sum import MAX_PROGRAMS, PeerMemory, data_bytes, flags_size
from llmengine.kernels.stage_link import RELEASED_BYTE, LinkLayout, LinkMemory

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_LEAD = 1 << 30
_PAGE = 1 << 21  # smaller pieces of memory may share one, and with it a handle


class CannotMapError(RuntimeError):
    """GPUs cannot map each other's memory, or one lacks the memory; raised on all ranks that try together."""


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Ranks that open memory together, as one of them sees them."""

    meeting: MeetingPoint
    rank: int
    size: int

    def all_do(self, name: str, do: Callable[[], str]) -> list[str]:
        """What `do` returns on each rank; all call this.

        If it raises ImportError or RuntimeError on one, no rank may go on: every one raises `CannotMapError`.
        """
        try:
            own, failed = do(), ""
        except (ImportError, RuntimeError) as error:
            own, failed = "", f"rank {self.rank}: {error}"
        found = self.meeting.exchange(f"peer-{name}", self.rank, self.size, json.dumps([own, failed]))
        values, failures = zip(*map(json.loads, found), strict=True)
        if any(failures):
            raise CannotMapError("; ".join(filter(None, failures)))
        return list(values)


class IpcMemory:
    """Memory on this rank's GPU, of zeros, and that of the others, mapped; all ranks open it together.

    Args:
        meeting: where ranks meet; handles travel through it.
        num_bytes: of this rank.
        places: ranks, and bytes of their memory.
        num_numbers: of `numbers`.

    Attributes:
        at: int64 [places], their addresses as this rank sees them; on its GPU.
        numbers: int32 [num_numbers], zeros on this rank's GPU.

    Raises `CannotMapError`, on every rank, if one cannot allocate or map something, and what `MeetingPoint.get` raises.
    Nothing stays allocated then.
    """

    at: torch.Tensor
    numbers: torch.Tensor

    def __init__(
        self,
        meeting: MeetingPoint,
        rank: int,
        size: int,
        device: torch.device,
        num_bytes: int,
        places: Sequence[tuple[int, int]],
        num_numbers: int,
    ) -> None:
        self._device = device
        self._places = places
        self._own: int | None = None
        self._mapped: list[int] = []
        self._num_bytes = -(-num_bytes // _PAGE) * _PAGE
        self._num_numbers = num_numbers
        ranks = _Ranks(meeting, rank, size)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # there is a context, and it is current
            try:
                handles = ranks.all_do("handle", self._allocate)
                ranks.all_do("mapped", lambda: self._map(handles, rank))
            except BaseException:
                self.close()
                raise

    @property
    def is_closed(self) -> bool:
        """Whether the memory is gone."""
        return self._own is None

    def set_words(self, byte: int, count: int, value: int) -> None:
        """Set `count` words of 32 bits of this rank's memory, whatever is queued elsewhere. From any thread."""
        if self._own is None:
            return
        with torch.cuda.device(self._device):
            _check(self._driver.cuMemsetD32Async(self._own + byte, value, count, self._side.cuda_stream))

    def side(self) -> AbstractContextManager[None]:
        """A context whose work on the device waits for nothing that is queued elsewhere."""
        return torch.cuda.stream(self._side)

    def close(self) -> None:
        """Unmap and free; nothing may be queued. Idempotent."""
        with torch.cuda.device(self._device):
            for address in self._mapped:
                _check(self._driver.cuIpcCloseMemHandle(address))
            self._mapped = []
            if self._own is not None:
                _check(self._driver.cuMemFree(self._own))
                self._own = None

    def _allocate(self) -> str:
        """Allocate whatever is needed; the handle of what the other ranks map."""
        from cuda.bindings import driver

        self._driver: Any = driver
        self._side: torch.cuda.Stream = torch.cuda.Stream(self._device)
        self.numbers = torch.zeros(self._num_numbers, dtype=torch.int32, device=self._device)
        self._own = int(_check(driver.cuMemAlloc(self._num_bytes)))
        _check(driver.cuMemsetD8(self._own, 0, self._num_bytes))
        torch.cuda.synchronize(self._device)
        handle = _check(driver.cuIpcGetMemHandle(self._own))
        return ctypes.string_at(handle.getPtr(), _HANDLE_BYTES).hex()

    def _map(self, handles: Sequence[str], rank: int) -> str:
        driver = self._driver
        flag = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        for other, theirs in enumerate(handles):
            if other == rank:
                continue
            handle = driver.CUipcMemHandle()
            ctypes.memmove(handle.getPtr(), bytes.fromhex(theirs), _HANDLE_BYTES)
            self._mapped.append(int(_check(driver.cuIpcOpenMemHandle(handle, flag))))
        starts = list(self._mapped)
        assert self._own is not None
        starts.insert(rank, self._own)
        addresses = [starts[owner] + byte for owner, byte in self._places]
        self.at = torch.tensor(addresses, dtype=torch.int64, device=self._device)
        return ""


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of `cuda.bindings` returned; raises RuntimeError if it failed."""
    status, *values = result
    if int(status):
        raise RuntimeError(f"{getattr(status, 'name', status)}")
    return values[0] if values else None


class IpcPeerMemory:
    """The memory of `kernels.peer_sum` on this rank's GPU, and that of the others, mapped; all ranks open it together.

    Args:
        meeting: where ranks meet; handles travel through it.
        capacity: bytes of the largest tensor.

    Raises as `IpcMemory` does.
    """

    def __init__(self, meeting: MeetingPoint, rank: int, size: int, device: torch.device, capacity: int) -> None:
        self._flags_byte = data_bytes(capacity, size)
        self._num_flags = flags_size(size, MAX_PROGRAMS)
        num_bytes = self._flags_byte + 4 * self._num_flags
        places = [(owner, byte) for byte in (0, self._flags_byte) for owner in range(size)]
        mapped = self._mapped = IpcMemory(meeting, rank, size, device, num_bytes, places, MAX_PROGRAMS)
        data, flags = mapped.at.view(2, size)
        self.memory: PeerMemory = PeerMemory(rank, size, data, flags, mapped.numbers, capacity, has_pdl(device))

    def release(self) -> None:
        """End every sum that waits for another rank, now and later; results are junk. From any thread."""
        if self._mapped.is_closed:
            return
        with self._mapped.side():
            # As if all others were far ahead. Signed numbers wrap around, so half of their range is "later".
            later = (int(self.memory.numbers[0].item()) + _LEAD) % (1 << 32)
        self._mapped.set_words(self._flags_byte, self._num_flags, later)

    def close(self) -> None:
        """Unmap and free; nothing may be queued. Idempotent."""
        self._mapped.close()


class IpcLinkMemory:
    """The memory of `kernels.stage_link` on this rank's GPU, and that of the rank after it; all ranks open it together.

    Args:
        meeting: where ranks meet; handles travel through it.
        after: the rank that this one writes to.
        is_first: this rank is of the first stage.

    Raises as `IpcMemory` does.
    """

    def __init__(
        self,
        meeting: MeetingPoint,
        rank: int,
        size: int,
        device: torch.device,
        layout: LinkLayout,
        after: int,
        is_first: bool,
    ) -> None:
        num_bytes = layout.size_bytes(is_first=is_first)
        self._mapped = IpcMemory(meeting, rank, size, device, num_bytes, [(rank, 0), (after, 0)], 1)
        self.link: MappedLink = MappedLink(LinkMemory(layout, self._mapped.at, self._mapped.numbers))

    def release(self) -> None:
        """End every wait for another stage, now and later; results are junk. From any thread."""
        self._mapped.set_words(RELEASED_BYTE, 1, 1)

    def close(self) -> None:
        """Unmap and free; nothing may be queued. Idempotent."""
        self._mapped.close()
