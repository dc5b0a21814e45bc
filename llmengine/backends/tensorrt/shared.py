"""TensorRT on GPUs that share a model: rank 0 gets the plans of all ranks before any other rank is started.

So no rank waits for a build, and all of them run plans or none does::

    rank 0    plans of all ranks ── start ranks ── load, verify ──┐ what all found ── load, verify further, or torch
    rank 1..                         .... import ── load, verify ─┘ ──────────────── likewise
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llmengine.backends.cuda.backend import CudaBackend, CudaParts
from llmengine.backends.cuda.fused_segments import SegmentsFactory
from llmengine.backends.ranks.backend import PreparingRanksBackend
from llmengine.backends.shared_cuda.loading import load_shared_cuda_backend, stored_source
from llmengine.backends.shared_cuda.segments import Exchange, RankSegments, TorchSegments
from llmengine.backends.shared_weights import is_calibrated
from llmengine.backends.tensorrt.backend import SegmentsChoice, TensorRtBackend, plan_request, reason_for_torch
from llmengine.backends.tensorrt.build_progress import BuildProgress
from llmengine.backends.tensorrt.builder import default_num_processes
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.library import Library, load_library
from llmengine.backends.tensorrt.obtain import PlanRequest, has_constants, needed_segments, obtain_plans
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.checkpoints.saved_files import SavedFile
from llmengine.checkpoints.sharded_source import ShardPlan
from llmengine.checkpoints.source import ModelSource
from llmengine.config import ModelConfig
from llmengine.errors import ConfigError, EngineError
from llmengine.rank_hosts import RankHosts


def load_shared_tensorrt_or_torch(
    config: ModelConfig,
    source: ModelSource,
    devices: Sequence[torch.device],
    check_wanted: Callable[[], None] = lambda: None,
    rank_hosts: RankHosts | None = None,
) -> PreparingRanksBackend:
    """The backend for GPUs that share a model, where `config.backend` is "auto" or "tensorrt".

    Raises as `load_shared_cuda_backend` does, and `ConfigError` if TensorRT was asked for by name and cannot be used:
    of what is known in advance, before a process is started.
    """
    ShardPlan(source.arch, source.formats, len(devices))  # which torch cannot do without either
    segments: RankSegments
    try:
        segments = prepare_shared_plans(config, source, devices, rank_hosts)
    except EngineError as failure:
        segments = TorchSegments(reason_for_torch(config, failure))
    return load_shared_cuda_backend(config, source, devices, check_wanted, rank_hosts, segments)


def prepare_shared_plans(
    config: ModelConfig, source: ModelSource, devices: Sequence[torch.device], rank_hosts: RankHosts | None = None
) -> PlannedSegments:
    """The plans of all ranks, from a saved engine, the cache, or built here; raises as `obtain_plans` does.

    Raises `ConfigError` for GPUs of this host that differ, for weights that are calibrated while they load if plans
    contain them, and for ranks on other hosts then.
    """
    library = load_library()
    _check_devices(devices, rank_hosts)
    request = plan_request(config, source, library, devices[0])
    if has_constants(needed_segments(request, source)):
        _check_constants(config, request, rank_hosts)
    plans = obtain_plans(request, source, default_num_processes(library), cache=PlanCache(), progress=BuildProgress())
    return PlannedSegments(plans if rank_hosts is None else _in_memory(plans), config.backend == "tensorrt")


@dataclass(slots=True)
class PlannedSegments:
    """`RankSegments` of plans that there are.

    Attributes:
        plan_set: the plans of all ranks.
        is_required: see `SegmentsChoice`.
        find_library: see `SegmentsChoice`; can be pickled.
    """

    plan_set: PlanSet
    is_required: bool
    find_library: Callable[[], Library] = load_library
    _choice: SegmentsChoice | None = field(default=None, init=False)

    def factory(self, source: ModelSource, exchange: Exchange) -> SegmentsFactory:
        self._choice = SegmentsChoice(
            self.find_library, self.plan_set, source, PlanCache(), is_required=self.is_required, exchange=exchange
        )
        return self._choice.build

    def backend(self, parts: CudaParts) -> CudaBackend:
        assert self._choice is not None
        return TensorRtBackend(parts, self._choice)


def _check_devices(devices: Sequence[torch.device], rank_hosts: RankHosts | None) -> None:
    """Raise `ConfigError` unless this host's GPUs are of one kind, as the plans are built for one."""
    hosts = [0] * len(devices) if rank_hosts is None else rank_hosts.hosts
    names = {
        rank: torch.cuda.get_device_name(device)
        for rank, (device, host) in enumerate(zip(devices, hosts, strict=True))
        if host == 0
    }
    for rank, name in names.items():
        if name != names[0]:
            raise ConfigError(
                f"TensorRT plans are built for GPUs of one kind, but rank 0 has {names[0]} and rank {rank} has {name}; "
                "set parallel_config.devices"
            )


def _check_constants(config: ModelConfig, request: PlanRequest, rank_hosts: RankHosts | None) -> None:
    """Raise `ConfigError` where plans that contain weights cannot be made, or cannot reach their ranks."""
    of_them = f"plans of {request.producer.flavour} contain weights in these formats"
    if is_calibrated(stored_source(config), config.quant_config):
        raise ConfigError(
            f"{of_them}, and tp_size={request.tp_size} excludes calibrating such weights while they load; save the "
            "quantized model first (llmengine build --quant), and load that"
        )
    if rank_hosts is not None:
        raise ConfigError(f"{of_them}, which are not sent to ranks on other hosts")


def _in_memory(plans: PlanSet) -> PlanSet:
    """The same without files, which other hosts do not have."""
    content = {name: dataclasses.replace(plan, file=SavedFile.of(plan.read())) for name, plan in plans.plans.items()}
    return plans.replace(plans=content)
