"""Backends: what runs a step's batch on a device. `load_backend` makes the one that a configuration asks for."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from llmengine.errors import ConfigError

if TYPE_CHECKING:
    from llmengine.backends.torch.cpu import CpuBackend
    from llmengine.config import ModelConfig
    from llmengine.models.source import ModelSource

__all__ = ["load_backend"]

_logger = logging.getLogger("llmengine.backends")


def load_backend(config: ModelConfig, source: ModelSource) -> CpuBackend:
    """Load the weights of `source` and return a backend that is ready for its first step.

    `config` is resolved. Raises `ConfigError` for a device, backend or format that is not here, `OutOfMemoryError` if
    the KV cache does not fit, `CorruptFileError` for damaged weights.
    """
    if config.backend == "tensorrt":
        raise ConfigError("backend='tensorrt' is not in this version; use 'auto' or 'torch'")
    if config.device.startswith("cuda"):
        raise ConfigError(f"device={config.device!r}: this version runs on the CPU only; use 'auto' or 'cpu'")
    if config.quant_config.weights == "int4":
        raise ConfigError("quant_config.weights='int4' is not available on the CPU; available are 'none' and 'int8'")
    if config.device == "auto":
        _logger.info("device='auto': the CPU, the one device of this version")
    from llmengine.backends.torch.cpu import CpuBackend

    return CpuBackend(config, source)
