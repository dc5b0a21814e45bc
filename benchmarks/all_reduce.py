"""Microseconds of a sum over ranks by its size: NCCL, torch's symmetric memory, and kernels of our own.

    python -m benchmarks.all_reduce --ranks 2

Each rank has a GPU. Calls are made in a CUDA graph, as in steps, and every way's result is checked before it is timed.
NVLink multicast stays off. With `--device cpu` ranks are on the CPU and sum through shared memory, which says nothing
of GPUs but that the benchmark works.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from benchmarks.report import add_json, append_record, format_table, new_parser
from llmengine.backends.ranks import Collectives, RankChannel, RankGroup
from llmengine.backends.ranks.store import MeetingPoint, connect_store, host_store
from llmengine.backends.shared_cuda.collectives import HostCollectives, NcclCollectives
from llmengine.backends.shared_cuda.peer_memory import IpcPeerMemory
from llmengine.backends.shared_cuda.small_sums import CAPACITY, time_together
from llmengine.kernels.peer_sum import can_sum, sum_over_peers

SIZES = tuple(1 << bits for bits in range(13, 26))
"""Bytes: 8 KiB to 32 MiB."""

_TIMEOUT_S = 300.0
_HOST_CALLS = 20

Sum = Callable[[Tensor], Tensor]
"""A tensor -> its sum over the ranks, which may be the same tensor."""


@dataclass(frozen=True)
class Rank:
    """What a rank measures with."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    ways: dict[str, Sum | str]


def serve(channel: RankChannel, payload: bytes) -> None:
    """Measure as a rank other than 0."""
    device, port, sizes = json.loads(payload)
    store = connect_store("127.0.0.1", port, _TIMEOUT_S) if device == "cuda" else None
    measure(make_rank(channel.rank, channel.size, device, store, channel.collectives), sizes)
    channel.reply(b"")
    channel.receive()  # a rank that ends before the group is closed has failed


def make_rank(rank: int, size: int, device_name: str, store: TCPStore | None, host: Collectives) -> Rank:
    """Connect a rank to the others, which do so at the same time."""
    if store is None:
        collectives = HostCollectives(host)
        ways: dict[str, Sum | str] = {"shared memory": _in_place(collectives.all_reduce)}
        return Rank(rank, size, torch.device(device_name), torch.float32, ways)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    nccl = NcclCollectives(store, rank, size, device)
    nccl.connect()
    ordered = NcclCollectives(_prefixed(store, "ordered"), rank, size, device, deterministic=True)
    ordered.connect()
    ways = {"NCCL": _in_place(nccl.all_reduce), "NCCL, ordered": _in_place(ordered.all_reduce)}
    for name in ("one_shot", "two_shot"):
        ways[f"symmetric {name}"] = _attempt(partial(_symmetric, store, rank, size, device, name))
    ours = _attempt(lambda: IpcPeerMemory(MeetingPoint(store, _TIMEOUT_S), rank, size, device, CAPACITY))
    for shots in (1, 2):
        ways[f"ours, {shots} shot{'s' * (shots > 1)}"] = ours if isinstance(ours, str) else _ours(ours, shots)
    return Rank(rank, size, device, torch.bfloat16, ways)


def measure(rank: Rank, sizes: Sequence[int]) -> dict[str, list[float | None]]:
    """Microseconds by way and size; None where a way does not take it. All ranks call this together."""
    times: dict[str, list[float | None]] = {}
    for name, way in rank.ways.items():
        times[name] = [None if isinstance(way, str) else _time_us(rank, way, size) for size in sizes]
    return times


def _time_us(rank: Rank, way: Sum, size: int) -> float | None:
    tensor = torch.full((size // rank.dtype.itemsize,), float(rank.rank + 1), dtype=rank.dtype, device=rank.device)
    try:
        result = way(tensor)
    except ValueError:  # too large for it, on all ranks
        return None
    expected = float(sum(range(1, rank.size + 1)))
    assert bool((result == expected).all()), f"a sum of {size} bytes is wrong: {result}"
    tensor.zero_()

    def call(tensor: Tensor) -> None:
        way(tensor)

    if rank.device.type == "cuda":
        return time_together(call, tensor)
    began = time.perf_counter()
    for _ in range(_HOST_CALLS):
        call(tensor)
    return 1e6 * (time.perf_counter() - began) / _HOST_CALLS


def _in_place(function: Callable[[Tensor], None]) -> Sum:
    def apply(tensor: Tensor) -> Tensor:
        function(tensor)
        return tensor

    return apply


def _ours(memory: IpcPeerMemory, shots: int) -> Sum:
    def apply(tensor: Tensor) -> Tensor:
        if not can_sum(tensor):
            raise ValueError(tensor.nbytes)
        sum_over_peers(memory.memory, tensor, shots)
        return tensor

    return apply


def _symmetric(store: TCPStore, rank: int, size: int, device: torch.device, name: str) -> Sum:
    """A sum by an operation of torch's symmetric memory, of which a private interface is used."""
    from torch._C import _distributed_c10d

    group = f"benchmark-{name}"
    private: Any = _distributed_c10d
    memory: Any = private._SymmetricMemory
    own_group: Any = torch.distributed.ProcessGroup(_prefixed(store, group), rank, size)
    own_group._set_group_name(group)
    private._register_process_group(group, own_group)
    memory.set_group_info(group, rank, size, store)
    shape = (SIZES[-1] // 2,)
    whole: Tensor = memory.empty_strided_p2p(shape, (1,), torch.bfloat16, device, group)
    memory.rendezvous(whole, group)
    operations: Any = torch.ops.symm_mem

    def apply(tensor: Tensor) -> Tensor:
        own = whole[: tensor.numel()]
        own.copy_(tensor)
        if name == "one_shot":
            found: Tensor = operations.one_shot_all_reduce(own, "sum", group)
            return found
        operations.two_shot_all_reduce_(own, "sum", group)
        return own

    return apply


def _attempt(make: Callable[[], Any]) -> Any:
    """What `make` returns, or why it could not."""
    try:
        return make()
    except (RuntimeError, ImportError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def _prefixed(store: TCPStore, prefix: str) -> Any:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    return PrefixStore(prefix, store)


def run(device: str, size: int, sizes: Sequence[int]) -> tuple[dict[str, list[float | None]], dict[str, str]]:
    """Measure with `size` ranks, of which this process is the first: (microseconds, what could not be used)."""
    listener = socket.create_server(("127.0.0.1", 0))
    payload = json.dumps([device, listener.getsockname()[1], sizes]).encode()
    group = RankGroup(size, "benchmarks.all_reduce:serve", payload)
    try:
        store = host_store(listener, _TIMEOUT_S) if device == "cuda" else None
        group.start()
        rank = make_rank(0, size, device, store, group.collectives)
        times = measure(rank, sizes)
        group.replies()
        return times, {name: way for name, way in rank.ways.items() if isinstance(way, str)}
    finally:
        listener.close()
        group.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = _parse(argv)
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    sizes = [size for size in SIZES if size <= arguments.largest]
    times, failures = run(arguments.device, arguments.ranks, sizes)
    rows = [
        [f"{size >> 10} KiB", *("-" if row[index] is None else f"{row[index]:.1f}" for row in times.values())]
        for index, size in enumerate(sizes)
    ]
    print(f"{arguments.ranks} ranks, us a call\n")
    print(format_table(["size", *times], rows))
    for name, why in failures.items():
        print(f"{name}: {why}")
    append_record(arguments, "all_reduce", {"sizes": sizes, "times_us": times})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("all_reduce", __doc__)
    parser.add_argument("--ranks", type=int, default=2, metavar="N")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--largest", type=int, default=SIZES[-1], metavar="BYTES")
    add_json(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
