"""What passes between stages on GPUs that cannot map each other's memory, as on several hosts: by NCCL."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from llmengine.backends.cuda.stage_link import PipedLink
from llmengine.backends.shared_cuda.collectives import NcclPair


class NcclPipe:
    """Sends to the rank after this one, and receives from the one before, queued in the current stream of the device.

    A stage that sends waits until the one after receives, so it is at most one step ahead.

    Args:
        store: where all ranks meet.
        before, after: None in the first and in the last stage.
    """

    def __init__(self, store: Store, rank: int, before: int | None, after: int | None, device: torch.device) -> None:
        self._device = device
        self._before: NcclPair | None = None
        self._after: NcclPair | None = None
        if before is not None:
            self._before = NcclPair(PrefixStore(f"{before}-{rank}", store), 1, device)
        if after is not None:
            self._after = NcclPair(PrefixStore(f"{rank}-{after}", store), 0, device)
        self.link: PipedLink = PipedLink(self)

    def connect(self) -> None:
        """Meet both neighbours, which call this too. Blocks without the GIL; `release` ends that."""
        with torch.cuda.device(self._device):
            met = torch.ones(1, device=self._device)
            if self._after is not None:
                self._after.send(met)
            if self._before is not None:
                self._before.receive(met)
            torch.cuda.current_stream(self._device).synchronize()

    def receive(self, x: Tensor) -> None:
        """See `HiddenPipe`."""
        assert self._before is not None, "the first stage receives nothing"
        self._before.receive(x)

    def send(self, x: Tensor) -> None:
        """See `HiddenPipe`."""
        assert self._after is not None, "the last stage sends nothing"
        self._after.send(x)

    def release(self) -> None:
        """End every operation that waits; its result means nothing. From any thread."""
        for pair in (self._before, self._after):
            if pair is not None:
                pair.abort()

    def close(self) -> None:
        """Free the connections. Idempotent."""
        self.release()
        for pair in (self._before, self._after):
            if pair is not None:
                pair.close()
        self._before = self._after = None
