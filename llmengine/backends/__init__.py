"""Backends: what runs a step's batch on a device. `load_backend` makes the one that a configuration asks for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llmengine.errors import ConfigError

if TYPE_CHECKING:
    from llmengine.batch import SavableBackend
    from llmengine.config import ModelConfig
    from llmengine.models.source import ModelSource

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
    if config.backend == "tensorrt":
        raise ConfigError("backend='tensorrt' is not in this version; use 'auto' or 'torch'")
    if config.quant_config.weights == "int4":
        raise ConfigError("quant_config.weights='int4' is not in this version; there are 'none' and, on a CPU, 'int8'")
    device = choose_device(config.device)
    if device == "cpu":
        from llmengine.backends.torch.cpu import CpuBackend

        return CpuBackend(config, source)
    import torch

    from llmengine.backends.torch.cuda import CudaBackend

    return CudaBackend(config, source, torch.device(device))
