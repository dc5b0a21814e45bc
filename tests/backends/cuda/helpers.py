"""Loads small models into the CUDA backend, on the GPU or through Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmengine.backends.cuda.backend import CudaBackend
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.config import KvCacheConfig, ModelConfig, SchedulerConfig


def load_cuda(directory: Path, device: str, max_tokens_per_step: int = 32, **settings: Any) -> CudaBackend:
    """Return the backend for a directory's checkpoint, for up to four requests a step; by default in float32."""
    config = ModelConfig(
        directory,
        scheduler_config=SchedulerConfig(
            max_batch_size=4, max_tokens_per_step=max_tokens_per_step, max_tokens_per_mixed_step=max_tokens_per_step
        ),
        **{"dtype": "float32", "kv_cache_config": KvCacheConfig(block_size=16, max_bytes=1 << 20), **settings},
    ).resolve()
    source = quantized_source(open_model(directory), config.quant_config)
    return load_cuda_backend(config, source, torch.device(device, 0))
