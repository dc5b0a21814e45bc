"""Backends run batches on a device. `load_backend` loads the one that a configuration asks for."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

from llmengine.checkpoints.quantized_source import loaded_formats
from llmengine.errors import ConfigError
from llmengine.rank_hosts import hosts_of_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from llmengine.batch import SavableBackend
    from llmengine.checkpoints.source import ModelSource
    from llmengine.config import ModelConfig
    from llmengine.rank_hosts import RankHosts

__all__ = ["choose_device", "load_backend"]

_logger = logging.getLogger("llmengine.backends")


def choose_device(name: str) -> str:
    """Resolve `ModelConfig.device` to "cpu" or "cuda:N"; "auto" is the first CUDA device if torch finds any.

    Raises `ConfigError` for a CUDA device that does not exist.
    """
    import torch

    has_cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
        _logger.info("device='auto': %s", name)
    if name == "cpu":
        return name
    num_devices = torch.cuda.device_count() if has_cuda else 0
    index = torch.device(name).index or 0
    if index >= num_devices:
        raise ConfigError(
            f"device={name!r}: torch {torch.__version__} finds {num_devices} CUDA devices; use 'auto' or 'cpu', or "
            "install a CUDA build of torch and its driver"
        )
    return f"cuda:{index}"


def load_backend(
    config: ModelConfig,
    source: ModelSource,
    check_wanted: Callable[[], None] = lambda: None,
    rank_hosts: RankHosts | None = None,
) -> SavableBackend:
    """Load the weights of `source` into a backend that is ready for its first step.

    `config` is resolved; what its `quant_config` asks of weights, `quantized_source` has done to `source` already.
    While ranks are awaited, `check_wanted` is called again and again, and what that raises ends loading.
    `rank_hosts` are the hosts of the ranks that `parallel_config` asks for; None: all are on this host.
    Raises `ConfigError` for a device, backend or weight format that is not available, `OutOfMemoryError` if weights or
    KV cache do not fit, and `CorruptFileError` for damaged weights.
    """
    assert loaded_formats(source, config.quant_config) == source.formats, "quantized_source() was not called"
    device = choose_device(config.device)
    num_ranks = config.parallel_config.tp_size * config.parallel_config.pp_size
    if rank_hosts is not None and num_ranks == 1:
        raise ConfigError("rank_hosts needs parallel_config.tp_size or pp_size above 1: a single rank is on this host")
    hosts = hosts_of_ranks(rank_hosts, num_ranks)
    if device == "cpu":
        if config.backend == "tensorrt":
            raise ConfigError("backend='tensorrt' needs a CUDA device, but device is 'cpu'; use 'auto' or 'torch'")
        if config.attention_backend == "flashinfer":
            raise ConfigError("attention_backend='flashinfer' needs a CUDA device, but device is 'cpu'; use 'auto'")
        if num_ranks > 1:
            from llmengine.backends.shared_cpu import load_shared_cpu_backend

            return load_shared_cpu_backend(config, source, check_wanted, rank_hosts)
        from llmengine.backends.cpu.loading import load_cpu_backend

        return load_cpu_backend(config, source)
    from llmengine.backends.cuda.memory_errors import memory_returned_on_failure

    with memory_returned_on_failure():
        return _load_on_gpus(config, source, device, hosts, check_wanted, rank_hosts)


def _load_on_gpus(
    config: ModelConfig,
    source: ModelSource,
    device: str,
    hosts: Sequence[int],
    check_wanted: Callable[[], None],
    rank_hosts: RankHosts | None,
) -> SavableBackend:
    """`load_backend` on the CUDA device `device`, or on those of the ranks that lie on `hosts`."""
    import torch

    from llmengine.backends.cuda.loading import check_kv_cache, load_cuda_backend

    check_kv_cache(config, torch.device(device))
    if config.deterministic and config.backend == "tensorrt":
        raise ConfigError(
            "deterministic=True excludes backend='tensorrt': the order in which its plans add numbers depends on the "
            "number of tokens; use 'auto' or 'torch'"
        )
    if config.parallel_config.pp_size > 1 and config.backend == "tensorrt":
        raise ConfigError(
            f"backend='tensorrt' runs models that are not cut into stages, but parallel_config.pp_size="
            f"{config.parallel_config.pp_size}; use 'auto' or 'torch', or tp_size alone"
        )
    can_be_tensorrt = not config.deterministic and config.parallel_config.pp_size == 1
    wants_tensorrt = config.backend == "tensorrt" or (config.backend == "auto" and can_be_tensorrt and _has_tensorrt())
    if config.parallel_config.tp_size * config.parallel_config.pp_size > 1:
        devices = _devices_of_ranks(config, torch.device(device), hosts)
        if wants_tensorrt:
            from llmengine.backends.tensorrt.shared import load_shared_tensorrt_or_torch

            return load_shared_tensorrt_or_torch(config, source, devices, check_wanted, rank_hosts)
        from llmengine.backends.shared_cuda.loading import load_shared_cuda_backend

        return load_shared_cuda_backend(config, source, devices, check_wanted, rank_hosts)
    if wants_tensorrt:
        from llmengine.backends.tensorrt.backend import load_tensorrt_or_torch

        return load_tensorrt_or_torch(config, source, torch.device(device))
    from llmengine.backends.cuda.generic_segments import cuda_segments_factory

    if config.backend == "torch":
        return load_cuda_backend(config, source, torch.device(device))
    reason = "TensorRT is not deterministic" if config.deterministic else "TensorRT is not installed"
    if not config.deterministic:
        _logger.info("backend='auto' uses torch: %s (pip install llmengine[tensorrt])", reason)
    return load_cuda_backend(config, source, torch.device(device), cuda_segments_factory(reason))


def _devices_of_ranks(config: ModelConfig, first: torch.device, hosts: Sequence[int]) -> list[torch.device]:
    """The device of each rank on its host, one of `hosts`: those that are named, or all from the first one on.

    Raises `ConfigError` if there are too few on this host.
    """
    import torch

    parallel = config.parallel_config
    found = torch.cuda.device_count()
    sizes = ", ".join(f"{name}={value}" for name in ("tp_size", "pp_size") if (value := getattr(parallel, name)) > 1)
    if config.parallel_config.devices is not None:
        if any(hosts):
            raise ConfigError("parallel_config.devices names GPUs of one host; with rank_hosts it must be None")
        return [torch.device(choose_device(name)) for name in config.parallel_config.devices]
    index, num_here = first.index or 0, hosts.count(0)
    if index + num_here > found:
        there_are = f"there are {found - index}" + (f" from device={config.device!r} on" if index else "")
        raise ConfigError(f"parallel_config with {sizes} needs {num_here} GPUs here, but {there_are}; lower it")
    return [torch.device("cuda", index + hosts[:rank].count(host)) for rank, host in enumerate(hosts)]


def _has_tensorrt() -> bool:
    """Whether a TensorRT is installed, without importing it."""
    specs = (importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx"))
    # A folder of that name on the path also has a spec, but no origin.
    return any(spec is not None and spec.origin is not None for spec in specs)
