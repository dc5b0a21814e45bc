"""Memory of each rank's GPU that the GPUs of the others map, through handles of CUDA IPC."""

from __future__ import annotations

import ctypes
from contextlib import AbstractContextManager
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


class IpcMemory:
    """Memory on this rank's GPU, of zeros, and that of the others, mapped; all ranks open it together.

    Args:
        meeting: where ranks meet; handles travel through it.
        num_bytes: of this rank.

    Attributes:
        addresses: of each rank's memory, as this rank sees it.

    Raises RuntimeError, on every rank, if the driver refuses on one, and what `MeetingPoint.get` raises. Nothing stays
    allocated then.
    """

    def __init__(self, meeting: MeetingPoint, rank: int, size: int, device: torch.device, num_bytes: int) -> None:
        from cuda.bindings import driver

        self._driver: Any = driver
        self._device = device
        self._own: int | None = None
        self._mapped: list[int] = []
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # there is a context, and it is current
            try:
                failure = self._open(meeting, rank, size, -(-num_bytes // _PAGE) * _PAGE)
                # Nobody goes on alone: a rank that failed says so as well.
                meeting.set(f"peer-opened-{rank}", failure)
                failures = [meeting.get(f"peer-opened-{other}") for other in range(size)]
                if any(failures):
                    raise RuntimeError("; ".join(filter(None, failures)))
            except BaseException:
                self.close()
                raise
            assert self._own is not None
        self.addresses: list[int] = list(self._mapped)
        self.addresses.insert(rank, self._own)
        self._side: torch.cuda.Stream = torch.cuda.Stream(device)

    @property
    def is_closed(self) -> bool:
        """Whether the memory is gone."""
        return self._own is None

    def set_words(self, byte: int, count: int, value: int) -> None:
        """Set `count` words of 32 bits of this rank's memory, whatever is queued elsewhere. From any thread."""
        if self._own is None:
            return
        with torch.cuda.device(self._device):
            self._check(self._driver.cuMemsetD32Async(self._own + byte, value, count, self._side.cuda_stream))

    def side(self) -> AbstractContextManager[None]:
        """A context whose work on the device waits for nothing that is queued elsewhere."""
        return torch.cuda.stream(self._side)

    def close(self) -> None:
        """Unmap and free; nothing may be queued. Idempotent."""
        with torch.cuda.device(self._device):
            for address in self._mapped:
                self._check(self._driver.cuIpcCloseMemHandle(address))
            self._mapped = []
            if self._own is not None:
                self._check(self._driver.cuMemFree(self._own))
                self._own = None

    def _open(self, meeting: MeetingPoint, rank: int, size: int, num_bytes: int) -> str:
        """Allocate, hand over, and map; returns what failed."""
        driver = self._driver
        try:
            self._own = int(self._check(driver.cuMemAlloc(num_bytes)))
            self._check(driver.cuMemsetD8(self._own, 0, num_bytes))
            torch.cuda.synchronize(self._device)
            handle = self._check(driver.cuIpcGetMemHandle(self._own))
            meeting.set(f"peer-handle-{rank}", ctypes.string_at(handle.getPtr(), _HANDLE_BYTES).hex())
        except RuntimeError as error:
            meeting.set(f"peer-handle-{rank}", "none")
            return f"rank {rank}: {error}"
        try:
            for other in range(size):
                theirs = meeting.get(f"peer-handle-{other}")
                if other == rank:
                    continue
                if theirs == "none":
                    return f"rank {rank}: rank {other} has no memory to map"
                handle = driver.CUipcMemHandle()
                ctypes.memmove(handle.getPtr(), bytes.fromhex(theirs), _HANDLE_BYTES)
                flag = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
                self._mapped.append(int(self._check(driver.cuIpcOpenMemHandle(handle, int(flag)))))
        except RuntimeError as error:
            return f"rank {rank}: {error}"
        return ""

    @staticmethod
    def _check(result: tuple[Any, ...]) -> Any:
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
        self._mapped = IpcMemory(meeting, rank, size, device, self._flags_byte + 4 * self._num_flags)
        at = torch.tensor(self._mapped.addresses, dtype=torch.int64, device=device)
        numbers = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)
        flags = at + self._flags_byte
        self.memory: PeerMemory = PeerMemory(rank, size, at, flags, numbers, capacity, has_pdl(device))

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
        self._mapped = IpcMemory(meeting, rank, size, device, layout.size_bytes(is_first=is_first))
        addresses = [self._mapped.addresses[each] for each in (rank, after)]
        at = torch.tensor(addresses, dtype=torch.int64, device=device)
        number = torch.zeros(1, dtype=torch.int32, device=device)
        self.link: MappedLink = MappedLink(LinkMemory(layout, at, number))

    def release(self) -> None:
        """End every wait for another stage, now and later; results are junk. From any thread."""
        self._mapped.set_words(RELEASED_BYTE, 1, 1)

    def close(self) -> None:
        """Unmap and free; nothing may be queued. Idempotent."""
        self._mapped.close()
