"""Backends: what runs a step's batch on a device. `load_backend` makes the one that a configuration asks for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llmengine.errors import ConfigError

if TYPE_CHECKING:
    from llmengine.batch import SavableBackend
    from llmengine.config import ModelConfig
    from llmengine.models.source import ModelSource

__all__ = ["load_backend"]

_logger = logging.getLogger("llmengine.backends")


def load_backend(config: ModelConfig, source: ModelSource) -> SavableBackend:
    """Load the weights of `source` and return a backend that is ready for its first step.

    `config` is resolved. device="auto" is the first CUDA device where torch finds one, else the CPU. Raises
    `ConfigError` for a device, backend or format that is not here, `OutOfMemoryError` if weights or KV cache do not
    fit, `CorruptFileError` for damaged weights.
    """
    if config.backend == "tensorrt":
        raise ConfigError("backend='tensorrt' is not in this version; use 'auto' or 'torch'")
    if config.quant_config.weights == "int4":
        raise ConfigError(
            "quant_config.weights='int4' is not in this version; available are 'none' and, on CPUs, 'int8'"
        )
    import torch

    has_cuda = torch.cuda.is_available()
    device = torch.device(config.device if config.device != "auto" else "cuda" if has_cuda else "cpu")
    if config.device == "auto":
        _logger.info("device='auto': %s", device)
    if device.type == "cpu":
        from llmengine.backends.torch.cpu import CpuBackend

        return CpuBackend(config, source)
    if not has_cuda or (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() if has_cuda else 0
        raise ConfigError(
            f"device={config.device!r}: torch {torch.__version__} finds {found} CUDA devices; use 'auto' or 'cpu', or "
            "install a CUDA build of torch and a driver for it"
        )
    from llmengine.backends.torch.cuda import CudaBackend

    return CudaBackend(config, source, torch.device("cuda", device.index or 0))
