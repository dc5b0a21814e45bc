"""Memory of each rank's GPU that the GPUs of the others map, through handles of CUDA IPC."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llmengine.kernels.limits import has_pdl
from llmengine.kernels.peer_sum import MAX_PROGRAMS, PeerMemory, data_bytes, flags_size

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_LEAD = 1 << 30


class IpcPeerMemory:
    """The memory of `kernels.peer_sum` on this rank's GPU, and that of the others, mapped; all ranks open it together.

    Args:
        store: where ranks meet; handles travel through it.
        capacity: bytes of the largest tensor.

    Raises RuntimeError, on every rank, if the driver refuses on one.
    """

    def __init__(self, store: TCPStore, rank: int, size: int, device: torch.device, capacity: int) -> None:
        from cuda.bindings import driver

        self._driver: Any = driver
        self._device = device
        self._own: int | None = None
        self._mapped: list[int] = []
        data, flags = data_bytes(capacity, size), 4 * flags_size(size, MAX_PROGRAMS)
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # there is a context, and it is current
            failure = self._open(store, rank, size, data + flags)
            # Nobody goes on alone: a rank that failed says so as well.
            store.set(f"peer-opened-{rank}", failure)
            failures = [store.get(f"peer-opened-{other}").decode() for other in range(size)]
            if any(failures):
                self.close()
                raise RuntimeError("; ".join(filter(None, failures)))
            assert self._own is not None
            addresses = list(self._mapped)
            addresses.insert(rank, self._own)
            at = torch.tensor(addresses, dtype=torch.int64, device=device)
            numbers = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device)
            self.memory: PeerMemory = PeerMemory(rank, size, at, at + data, numbers, capacity, has_pdl(device))
        self._flags_at: int = self._own + data
        self._num_flags: int = flags_size(size, MAX_PROGRAMS)
        self._side: torch.cuda.Stream = torch.cuda.Stream(device)

    def release(self) -> None:
        """End every sum that waits for another rank, now and later; results are junk. From any thread."""
        if self._own is None:
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            # As if all others were far ahead. Signed numbers wrap around, so half of their range is "later".
            later = (int(self.memory.numbers[0].item()) + _LEAD) % (1 << 32)
            stream = self._side.cuda_stream
            self._check(self._driver.cuMemsetD32Async(self._flags_at, later, self._num_flags, stream))

    def close(self) -> None:
        """Unmap and free; nothing may be queued. Idempotent."""
        with torch.cuda.device(self._device):
            for address in self._mapped:
                self._check(self._driver.cuIpcCloseMemHandle(address))
            self._mapped = []
            if self._own is not None:
                self._check(self._driver.cuMemFree(self._own))
                self._own = None

    def _open(self, store: TCPStore, rank: int, size: int, num_bytes: int) -> str:
        """Allocate, hand over, and map; returns what failed."""
        driver = self._driver
        try:
            self._own = int(self._check(driver.cuMemAlloc(num_bytes)))
            self._check(driver.cuMemsetD8(self._own, 0, num_bytes))
            torch.cuda.synchronize(self._device)
            handle = self._check(driver.cuIpcGetMemHandle(self._own))
            store.set(f"peer-handle-{rank}", ctypes.string_at(handle.getPtr(), _HANDLE_BYTES).hex())
        except RuntimeError as error:
            store.set(f"peer-handle-{rank}", "none")
            return f"rank {rank}: {error}"
        try:
            for other in range(size):
                theirs = store.get(f"peer-handle-{other}").decode()
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
