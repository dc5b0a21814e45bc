"""Loads small models into the CUDA backend, on the GPU or through Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cuda.backend import CudaBackend
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.backends.ranks.backend import PreparingRanksBackend
from llmengine.backends.shared_cuda.loading import load_shared_cuda_backend
from llmengine.batch import Backend
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.config import KvCacheConfig, ModelConfig, ParallelConfig, SchedulerConfig
from llmengine.rank_hosts import RankHosts
from tests.backends.helpers import BackendDriver, reference_greedy


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


def open_shared(
    directory: Path,
    device: str,
    tp_size: int = 1,
    pp_size: int = 1,
    rank_hosts: RankHosts | None = None,
    num_gpus: int | None = None,
    check_wanted: Callable[[], None] = lambda: None,
    **settings: Any,
) -> PreparingRanksBackend:
    """As `load_cuda`, over `tp_size * pp_size` ranks; skips the test where there are too few GPUs.

    Args:
        num_gpus: on which ranks take turns; None: each has its own.
        check_wanted: see `backends.load_backend`.
    """
    size = tp_size * pp_size
    num_gpus = size if num_gpus is None else num_gpus
    if device == "cuda" and torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")
    config = ModelConfig(
        directory,
        scheduler_config=SchedulerConfig(max_batch_size=4, max_tokens_per_step=32, max_tokens_per_mixed_step=32),
        parallel_config=ParallelConfig(tp_size=tp_size, pp_size=pp_size),
        **{"dtype": "float32", "kv_cache_config": KvCacheConfig(block_size=16, max_bytes=1 << 20), **settings},
    ).resolve()
    source = quantized_source(source_in_use(config, open_model(directory)), config.quant_config)
    devices = [torch.device(device, rank % num_gpus if device == "cuda" else 0) for rank in range(size)]
    return load_shared_cuda_backend(config, source, devices, check_wanted, rank_hosts)


@contextmanager
def load_shared(*arguments: Any, **settings: Any) -> Iterator[PreparingRanksBackend]:
    """`open_shared`, closed in the end."""
    backend = open_shared(*arguments, **settings)
    try:
        yield backend
    finally:
        backend.close()


def check_steps_in_flight(reference: Any, backend: Backend, prompts: Mapping[int, list[int]]) -> None:
    """Steps that need ids of steps which no host has seen give the tokens of the reference.

    Args:
        prompts: slot -> the prompt of a request.
    """
    driver = BackendDriver(backend)
    requests = [driver.add(slot, prompt) for slot, prompt in prompts.items()]
    driver.step(*[(request, len(request.token_ids)) for request in requests])
    for _ in range(2):
        backend.launch(driver.batch(*[(request, 1) for request in requests]))
        for request in requests:
            request.token_ids.append(-1)
    for behind in (2, 1):
        result = backend.collect()
        for request in requests:
            [request.token_ids[-behind]] = result.token_ids[request.slot]
    assert [one.output_ids for one in requests] == [
        reference_greedy(reference, one.token_ids[: one.num_prompt_tokens], 3) for one in requests
    ]


def ranks() -> set[psutil.Process]:
    """Processes of ranks that this one started."""
    found = psutil.Process().children(recursive=True)
    return {one for one in found if any("ranks/process.py" in word for word in one.cmdline())}
