"""Backends: what runs a step's batch on a device. `load_backend` makes the one that a configuration asks for."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

from llmengine.errors import ConfigError

if TYPE_CHECKING:
    from llmengine.batch import SavableBackend
    from llmengine.checkpoints.source import ModelSource
    from llmengine.config import ModelConfig

__all__ = ["choose_device", "load_backend"]

_logger = logging.getLogger("llmengine.backends")


def choose_device(name: str) -> str:
    """Return "cpu" or "cuda:N" for `ModelConfig.device`; "auto" is the first CUDA device where torch finds one.

    Raises `ConfigError` for a CUDA device that is not there.
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
            "install a CUDA build of torch and a driver for it"
        )
    return f"cuda:{index}"


def load_backend(config: ModelConfig, source: ModelSource) -> SavableBackend:
    """Load the weights of `source` and return a backend that is ready for its first step.

    `config` is resolved. Raises `ConfigError` for a device, backend or format that is not here, `OutOfMemoryError` if
    weights or KV cache do not fit, `CorruptFileError` for damaged weights.
    """
    device = choose_device(config.device)
    if device == "cpu":
        if config.backend == "tensorrt":
            raise ConfigError("backend='tensorrt' needs a CUDA device, and device is 'cpu'; use 'auto' or 'torch'")
        if config.attention_backend == "flashinfer":
            raise ConfigError("attention_backend='flashinfer' needs a CUDA device, and device is 'cpu'; use 'auto'")
        from llmengine.backends.cpu.backend import CpuBackend

        return CpuBackend(config, source)
    if config.deterministic and config.backend == "tensorrt":
        raise ConfigError(
            "deterministic=True excludes backend='tensorrt', whose plans add up in an order that depends on the number "
            "of tokens; use 'auto' or 'torch'"
        )
    import torch

    has_tensorrt = not config.deterministic and _has_tensorrt()
    if config.backend == "tensorrt" or (config.backend == "auto" and has_tensorrt):
        from llmengine.backends.tensorrt.backend import load_tensorrt_or_torch

        return load_tensorrt_or_torch(config, source, torch.device(device))
    from llmengine.backends.cuda.backend import CudaBackend
    from llmengine.backends.cuda.generic_segments import cuda_segments_factory

    if config.backend == "torch":
        return CudaBackend(config, source, torch.device(device))
    if config.deterministic:
        return CudaBackend(config, source, torch.device(device), cuda_segments_factory("TensorRT is not deterministic"))
    _logger.info("backend='auto': torch, since TensorRT is not installed (pip install llmengine[tensorrt])")
    return CudaBackend(config, source, torch.device(device), cuda_segments_factory("TensorRT is not installed"))


def _has_tensorrt() -> bool:
    """Say whether there is a TensorRT to import, without importing it."""
    specs = (importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx"))
    # A folder of that name on the path has a spec as well, without an origin.
    return any(spec is not None and spec.origin is not None for spec in specs)
