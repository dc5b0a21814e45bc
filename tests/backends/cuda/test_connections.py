"""Connections of ranks that fail or are given up: nothing waits for ever, and nothing stays allocated."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from llmengine.backends.rank_places import RankPlaces
from llmengine.backends.ranks.store import MeetingPoint, connect_store, host_store
from llmengine.backends.shared_cuda.collectives import NcclCollectives
from llmengine.backends.shared_cuda.connections import Meeting, RankConnections, connected
from llmengine.backends.shared_cuda.host_link import HostLinkFile, HostLinkMemory
from llmengine.backends.shared_cuda.peer_memory import CannotMapError, IpcMemory
from llmengine.checkpoints.opening import open_model
from llmengine.config import ModelConfig, ParallelConfig
from llmengine.errors import EngineClosedError, EngineDeadError
from llmengine.kernels.stage_link import LinkLayout
from tests.backends.helpers import save_tiny

LAYOUT = LinkLayout.of(2, 3, 16, torch.float32, 2)


class Resting:
    """A rank that waits; `rests` is set when it does."""

    def __init__(self) -> None:
        self.rests = threading.Event()

    def mark(self, what: bytes = b"") -> None:
        pass

    def rest(self) -> None:
        self.rests.set()


def open_point(timeout_s: float = 300.0) -> MeetingPoint:
    return MeetingPoint(host_store(socket.create_server(("127.0.0.1", 0)), timeout_s), timeout_s)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels read memory of the host in the interpreter only")
def test_closing_ends_what_waits_for_another_stage() -> None:
    """On a GPU, memory is freed when the kernels that are queued have ended: freeing it would wait for ever."""
    file, progress = HostLinkFile(2, LAYOUT), Resting()
    memory = HostLinkMemory(file.path, 0, 1, LAYOUT, progress, lambda: None)
    file.close()
    thread = threading.Thread(target=memory.link.take_hidden, args=(torch.zeros(3, 16),), daemon=True)
    thread.start()
    assert progress.rests.wait(60)
    RankConnections(None, memory).close()
    thread.join(60)
    assert not thread.is_alive()


def test_what_no_rank_leaves_is_not_waited_for_after_the_end() -> None:
    point = open_point()
    stage = point.at("stage")
    stage.set("here", "7")
    assert stage.get("here") == "7"
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            stage.get("missing")
        except EngineClosedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    point.end()
    thread.join(60)
    assert len(errors) == 1


def test_what_no_rank_leaves_in_time_is_named() -> None:
    with pytest.raises(EngineDeadError, match=r"'missing' within 0\.1 s"):
        open_point(timeout_s=0.1).get("missing")


def test_waiting_for_a_rank_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither the rank that hosts the store nor another; torch writes from C++."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    hosted = host_store(listener, 60.0)
    for store in (hosted, connect_store("127.0.0.1", port, 60.0)):
        with pytest.raises(EngineDeadError):
            MeetingPoint(store, 0.3).get("missing")
    assert capfd.readouterr() == ("", "")


class Opened:
    """An `OpenLink` that counts how often it is closed."""

    link: Any = None
    num_closed = 0

    def release(self) -> None:
        pass

    def close(self) -> None:
        self.num_closed += 1


def test_connections_that_are_ready_after_a_failure_are_closed() -> None:
    link, aborted = Opened(), threading.Event()

    def connect() -> RankConnections:
        assert aborted.wait(60)
        return RankConnections(None, link)

    def check() -> None:
        raise EngineDeadError("rank 1 of 2 died")

    with pytest.raises(EngineDeadError, match="rank 1"):
        connected(connect, aborted.set, check)
    assert link.num_closed == 1


class Driver:
    """What `IpcMemory` needs of a driver, and what is allocated and mapped by it."""

    OWN, THEIRS = 1 << 21, 1 << 22

    def __init__(self) -> None:
        self.open: list[int] = []
        self._handle = torch.zeros(64, dtype=torch.uint8)
        self.CUipcMem_flags = types.SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=1)

    def _take(self, address: int) -> tuple[int, int]:
        self.open.append(address)
        return 0, address

    def _give(self, address: int) -> tuple[int]:
        self.open.remove(address)
        return (0,)

    def CUipcMemHandle(self) -> Any:
        return types.SimpleNamespace(getPtr=self._handle.data_ptr)

    def cuMemAlloc(self, num_bytes: int) -> tuple[int, int]:
        return self._take(self.OWN)

    def cuMemsetD8(self, *_: int) -> tuple[int]:
        return (0,)

    def cuIpcGetMemHandle(self, address: int) -> tuple[int, Any]:
        return 0, self.CUipcMemHandle()

    def cuIpcOpenMemHandle(self, handle: Any, flags: int) -> tuple[int, int]:
        return self._take(self.THEIRS)

    cuMemFree = cuIpcCloseMemHandle = _give


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver of GPUs whose tensors are on the CPU."""
    driver = Driver()
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return driver


def open_memory(point: MeetingPoint, rank: int = 0) -> IpcMemory:
    return IpcMemory(point, rank, 2, torch.device("cpu"), 100, [(1, 0), (0, 8)], 3)


@pytest.mark.parametrize("is_mapped", [False, True], ids=["before its own is there", "before it has mapped"])
def test_memory_is_freed_if_another_rank_is_gone_before_all_have_mapped_it(driver: Driver, is_mapped: bool) -> None:
    point = open_point(timeout_s=0.2)
    if is_mapped:
        point.set("peer-handle-1", json.dumps(["00" * 64, ""]))
    with pytest.raises(EngineDeadError, match=r"within 0\.2 s"):
        open_memory(point)
    assert not driver.open


@pytest.mark.parametrize("failing", ["zeros", "tensor"], ids=["before the others map", "while all map"])
def test_ranks_decide_together_if_one_has_no_memory_for_a_small_tensor(
    driver: Driver, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would sum by NCCL, and the others by kernels that wait for it."""
    point, make = open_point(60.0), getattr(torch, failing)

    def fail(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread().name.startswith("rank_1"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(*arguments, **named)

    monkeypatch.setattr(torch, failing, fail)
    with ThreadPoolExecutor(1, "rank_0") as first, ThreadPoolExecutor(1, "rank_1") as second:
        for opening in (first.submit(open_memory, point, 0), second.submit(open_memory, point, 1)):
            assert isinstance(opening.exception(60), CannotMapError)
            assert "rank 1: CUDA out of memory" in str(opening.exception())
    assert not driver.open


def test_memory_of_all_ranks_is_mapped(driver: Driver) -> None:
    point = open_point(60.0)
    with ThreadPoolExecutor(2) as threads:
        for rank, memory in enumerate(threads.map(lambda rank: open_memory(point, rank), range(2))):
            own, theirs = driver.OWN, driver.THEIRS
            assert memory.at.tolist() == ([theirs, own + 8] if rank == 0 else [own, theirs + 8])
            assert memory.numbers.tolist() == [0, 0, 0]
            memory.close()
            memory.close()
    assert not driver.open


def test_ranks_can_read_what_rank_0_has_left_when_it_has_met_them(
    tmp_path: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 hosts the store, and is often the first one to have read everything."""
    save_tiny(tmp_path)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    config = ModelConfig(tmp_path, parallel_config=ParallelConfig(pp_size=2)).resolve()
    places = RankPlaces(config.parallel_config, open_model(tmp_path))
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = host_store(listener, 60.0)
    rank_1 = MeetingPoint(connect_store("127.0.0.1", port, 60.0), 60.0)
    rank_1.set("here-1", "")
    rank_1.at("stages").set("peer-handle-1", json.dumps(["00" * 64, ""]))
    rank_1.at("stages").set("peer-mapped-1", json.dumps(["", ""]))
    connections = Meeting(config, places, 0, torch.device("cpu"), store, on_one_host=True).connect()
    del store
    gc.collect()
    assert rank_1.at("stages").get("peer-mapped-0") == json.dumps(["", ""])
    assert connections.link is not None


class WaitingNccl:
    """What NCCL's group of torch does without the other ranks: it waits at the store, and `abort` does not end that."""

    def __init__(self, store: Any, *_: Any) -> None:
        self._store = store

    class Options:
        pass

    def allreduce(self, *_: Any) -> None:
        self._store.get("unique id")

    def abort(self) -> None:
        pass


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (2, 2)])
def test_ranks_that_never_come_leave_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp_size: int, pp_size: int
) -> None:
    save_tiny(tmp_path)
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", WaitingNccl, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    config = ModelConfig(tmp_path, parallel_config=ParallelConfig(tp_size, pp_size)).resolve()
    places = RankPlaces(config.parallel_config, open_model(tmp_path))
    store = host_store(socket.create_server(("127.0.0.1", 0)), 60.0)
    meeting = Meeting(config, places, 0, torch.device("cpu"), store, on_one_host=True)
    before, looks = set(threading.enumerate()), iter(range(4))

    def check() -> None:
        if next(looks) == 3:
            raise EngineDeadError("rank 1 died")

    with pytest.raises(EngineDeadError, match="rank 1 died"):
        connected(meeting.connect, meeting.abort, check)
    assert set(threading.enumerate()) == before


def test_the_end_of_nccl_is_not_waited_for_while_graphs_hold_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ends what waits may be the one whom the owner of the graphs waits for."""
    graphs_are_gone, num_aborts = threading.Event(), 0

    class HeldNccl(WaitingNccl):
        def abort(self) -> None:
            nonlocal num_aborts
            num_aborts += 1
            assert graphs_are_gone.wait(60)

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", HeldNccl, raising=False)
    before = set(threading.enumerate())
    nccl = NcclCollectives(HashStore(), 0, 2, torch.device("cpu"))
    began = time.monotonic()
    nccl.abort()
    nccl.abort()
    assert time.monotonic() - began < 30
    graphs_are_gone.set()
    nccl.close()
    nccl.close()
    assert num_aborts == 1
    assert set(threading.enumerate()) == before
