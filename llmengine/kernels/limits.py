"""What a program of a kernel can have on a device."""

from __future__ import annotations

import functools

import torch
import triton


@functools.cache
def max_shared_bytes(device: torch.device) -> int:
    """Bytes of shared memory that a program can have; those of an H100 if there is no GPU."""
    if device.type != "cuda":
        return 227 << 10
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def has_pdl(device: torch.device) -> bool:
    """Whether kernels may start before those ahead of them have ended, see `linear.LinearKernels`."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def tiled_sms(device: torch.device) -> int:
    """Number of multiprocessors of a Hopper GPU, whose tiles `cublaslt` knows; 0 for other devices."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
