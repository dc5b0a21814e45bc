"""How the ranks of a model meet, and what connects each of them to the others.

Ranks of one stage have collectives, and stages have links; with a single one of either there is nothing to connect.
"""

from __future__ import annotations

import logging
import pickle
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from llmengine.backends.cuda.stage_link import StageLink
from llmengine.backends.cuda.weights import activation_dtype
from llmengine.backends.rank_places import RankPlaces
from llmengine.backends.ranks import RankChannel, RankGroup
from llmengine.backends.ranks.layout import receiver_of
from llmengine.backends.ranks.store import MeetingPoint, connect_store, host_store
from llmengine.backends.shared_cuda.collectives import HostCollectives, NcclCollectives, RankCollectives
from llmengine.backends.shared_cuda.host_link import HostLinkFile, HostLinkMemory, HostPipe
from llmengine.backends.shared_cuda.nccl_pipe import NcclPipe
from llmengine.backends.shared_cuda.peer_memory import CannotMapError, IpcLinkMemory
from llmengine.backends.shared_cuda.small_sums import with_small_sums
from llmengine.config import ModelConfig
from llmengine.dtypes import torch_dtype
from llmengine.kernels.stage_link import LinkLayout

_logger = logging.getLogger("llmengine.backends.shared_cuda")

_MEET_TIMEOUT_S = 300.0
_LOOK_S = 0.05
_END_S = 5.0
"""For a rendezvous that was broken off to end."""


class OpenLink(Protocol):
    """A `StageLink`, and what it goes through."""

    @property
    def link(self) -> StageLink:
        """What the model is given."""

    def release(self) -> None:
        """End every wait for another stage, now and later; results are junk. From any thread."""

    def close(self) -> None:
        """Free the memory; nothing may be queued. Idempotent."""


@dataclass(slots=True)
class RankConnections:
    """Implements `ranks.backend.OpenCollectives`.

    Attributes:
        collectives: of the ranks of this one's stage; None if it is alone there.
        open_link: to the stages before and after; None if there is one stage.
        store: where ranks on GPUs met. Rank 0 hosts it, and the others may still read there when it has done so.
    """

    collectives: RankCollectives | None
    open_link: OpenLink | None
    store: Store | None = None

    @property
    def link(self) -> StageLink | None:
        """What the model is given of `open_link`."""
        return None if self.open_link is None else self.open_link.link

    @property
    def sums(self) -> str:
        """Name of what adds up, for people."""
        return "" if self.collectives is None else self.collectives.description

    def abort(self) -> None:
        """End everything that waits for another rank. From any thread; idempotent."""
        if self.open_link is not None:
            self.open_link.release()
        if self.collectives is not None:
            self.collectives.abort()

    def close(self) -> None:
        """Free everything. Idempotent; waits for nobody: what is queued and waits for other ranks ends first."""
        self.abort()
        if self.collectives is not None:
            self.collectives.close()
        if self.open_link is not None:
            self.open_link.close()
        self.store = None


@dataclass(frozen=True, slots=True)
class _Meet:
    """Where the ranks meet, and whether GPUs may map each other's memory, as on one host."""

    host: str
    port: int
    on_one_host: bool


def connect_rank_0(config: ModelConfig, places: RankPlaces, group: RankGroup, device: torch.device) -> RankConnections:
    """Connect rank 0 with the others, which call `connect_rank`. Raises as soon as one fails, and what that raises."""
    if device.type != "cuda":
        return _on_host_0(config, places, group)
    listener = socket.create_server((group.address, 0), backlog=group.size + 16)
    port: int = listener.getsockname()[1]
    store = host_store(listener, _MEET_TIMEOUT_S)
    on_one_host = group.num_on_host == group.size
    group.broadcast(pickle.dumps(_Meet(group.address, port, on_one_host)))
    meeting = Meeting(config, places, 0, device, store, on_one_host)
    return connected(meeting.connect, meeting.abort, group.check)


def connect_rank(
    config: ModelConfig, places: RankPlaces, channel: RankChannel, device: torch.device
) -> RankConnections:
    """Connect a rank other than 0 with the others."""
    if device.type != "cuda":
        return _on_host(config, places, channel)
    torch.cuda.set_device(device)
    meet: _Meet = pickle.loads(channel.receive())
    store = connect_store(meet.host, meet.port, _MEET_TIMEOUT_S)
    return Meeting(config, places, channel.rank, device, store, meet.on_one_host).connect()


class Meeting:
    """A rank on a GPU on its way to the others."""

    def __init__(
        self,
        config: ModelConfig,
        places: RankPlaces,
        rank: int,
        device: torch.device,
        store: Store,
        on_one_host: bool,
    ) -> None:
        self._config, self._places, self._rank = config, places, rank
        self._device, self._store, self._on_one_host = device, store, on_one_host
        self._point = MeetingPoint(store, _MEET_TIMEOUT_S)
        self._nccl: NcclCollectives | None = None
        self._pipe: NcclPipe | None = None
        if places.tp_size > 1:
            shard = places.shard_of(rank)
            own_store = PrefixStore(self._stage, store)
            self._nccl = NcclCollectives(own_store, shard.rank, shard.size, device, deterministic=config.deterministic)

    def connect(self) -> RankConnections:
        """Meet the other ranks, which call this too; blocks."""
        torch.cuda.set_device(self._device)
        # NCCL begins when all are there: its own waiting for a rank that is not cannot be ended.
        self._point.exchange("here", self._rank, self._places.size, "")
        link = None if self._places.pp_size == 1 else self._link()
        try:
            return RankConnections(None if self._nccl is None else self._sums(self._nccl), link, self._store)
        except BaseException:
            if link is not None:
                link.close()
            raise

    def abort(self) -> None:
        """End what waits in `connect`. From any thread."""
        self._point.end()
        if self._nccl is not None:
            self._nccl.abort()
        if self._pipe is not None:
            self._pipe.release()

    @property
    def _stage(self) -> str:
        """The prefix of what the ranks of a stage leave for each other."""
        return f"stage-{self._places.stage_of(self._rank).index}"

    def _sums(self, nccl: NcclCollectives) -> RankCollectives:
        """With kernels of our own for small sums where memory can be mapped."""
        if self._on_one_host:
            return with_small_sums(nccl, self._point.at(self._stage), self._device)
        nccl.connect()
        return nccl

    def _link(self) -> OpenLink:
        """Through memory that can be mapped, else through NCCL."""
        places, rank = self._places, self._rank
        after = _after(places, rank)
        if self._on_one_host:
            layout, is_first = _link_layout(self._config, places), places.stage_of(rank).is_first
            try:
                return IpcLinkMemory(self._point.at("stages"), rank, places.size, self._device, layout, after, is_first)
            except CannotMapError as error:
                _logger.warning("stages use NCCL, since the GPUs cannot map each other's memory: %s", error)
        size = places.tp_size
        before = None if places.stage_of(rank).is_first else (rank - size) % places.size
        store = PrefixStore("stages", self._store)
        self._pipe = NcclPipe(store, rank, before, None if places.stage_of(rank).is_last else after, self._device)
        self._pipe.connect()
        return self._pipe


def _on_host_0(config: ModelConfig, places: RankPlaces, group: RankGroup) -> RankConnections:
    collectives = None if places.tp_size == 1 else HostCollectives(group.collectives)
    if places.pp_size == 1:
        return RankConnections(collectives, None)
    if group.num_on_host < group.size:
        return RankConnections(collectives, HostPipe(group.pipe))
    layout = _link_layout(config, places)
    file = HostLinkFile(places.size, layout)
    try:
        group.broadcast(file.path.encode())
        memory = HostLinkMemory(file.path, 0, _after(places, 0), layout, group.progress, group.check)
        group.replies()  # all have mapped it
    finally:
        file.close()
    return RankConnections(collectives, memory)


def _on_host(config: ModelConfig, places: RankPlaces, channel: RankChannel) -> RankConnections:
    collectives = None if places.tp_size == 1 else HostCollectives(channel.collectives)
    if places.pp_size == 1:
        return RankConnections(collectives, None)
    if channel.num_on_host < channel.size:
        return RankConnections(collectives, HostPipe(channel.pipe))
    path, rank = channel.receive().decode(), channel.rank
    layout = _link_layout(config, places)
    memory = HostLinkMemory(path, rank, _after(places, rank), layout, channel.progress, lambda: None)
    channel.reply(b"")
    return RankConnections(collectives, memory)


def _after(places: RankPlaces, rank: int) -> int:
    """The rank that a rank writes to: of the next stage, or from the last stage of the first."""
    after = receiver_of(rank, places.tp_size, places.size)
    return rank + places.tp_size if after is None else after


def _link_layout(config: ModelConfig, places: RankPlaces) -> LinkLayout:
    scheduler, source = config.scheduler_config, places.source
    return LinkLayout.of(
        scheduler.max_batch_size,
        scheduler.max_tokens_per_step,
        source.arch.hidden_size,
        torch_dtype(activation_dtype(config, source)),
        places.pp_size,
    )


def connected(
    connect: Callable[[], RankConnections], abort: Callable[[], None], check: Callable[[], None]
) -> RankConnections:
    """What `connect` gives, which blocks and is called in a thread.

    Whatever `check` raises meanwhile, once a rank has failed for instance, ends that: `abort` has `connect` return, and
    nothing stays open.
    """
    found: list[RankConnections] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            found.append(connect())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="llmengine-rendezvous", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_LOOK_S)
            check()
        if errors:
            raise errors[0]
    except BaseException:
        abort()
        thread.join(_END_S)
        for connections in found:
            connections.close()
        raise
    return found[0]
