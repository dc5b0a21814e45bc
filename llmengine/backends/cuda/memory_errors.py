"""Errors of a device that is too small, said so that a reader knows what to change, and memory after errors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton.runtime.errors import OutOfResources

from llmengine.errors import ConfigError, OutOfMemoryError, clear_frames


@contextmanager
def memory_error_context(component: str, device: torch.device, advice: str) -> Iterator[None]:
    """Turn a full device into an `OutOfMemoryError` that names the component, what was left, and what helps.

    A kernel that needs more of a GPU's on-chip memory than there is raises `ConfigError`.
    """
    try:
        yield
    except OutOfResources as failure:
        raise ConfigError(
            f"{device} is too small: a CUDA kernel needs {failure.required} of {failure.name}, of which there are "
            f"{failure.limit}; use device='cpu'"
        ) from failure
    except torch.OutOfMemoryError as failure:
        free, total = torch.cuda.mem_get_info(device)
        raise OutOfMemoryError(
            f"{component} do not fit on {device}: {free / 2**20:.0f} of {total / 2**20:.0f} MiB were left when it was "
            f"full; {advice}, or free memory there"
        ) from failure


@contextmanager
def memory_returned_on_failure() -> Iterator[None]:
    """Whatever ends the loading of a model within, its memory goes back to the GPUs, for other programs too."""
    try:
        yield
    except BaseException as failure:
        clear_frames(failure)
        gc.collect()
        torch.cuda.empty_cache()
        raise
