"""RMSNorm over rows: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HIDDEN = 16384
"""Columns that a program holds at once."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, pdl: bool = False) -> None:
    """Write x / rms(x) * weight to `out`, computed in fp32.

    Args:
        x: [num_rows, hidden], contiguous, hidden <= `MAX_HIDDEN`.
        weight: [hidden].
        out: like x, in a dtype of its own; may be x.
        pdl: see `linear.LinearKernels`.
    """
    num_rows, hidden = x.shape
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert hidden <= MAX_HIDDEN
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(num_rows,)](
        x,
        weight,
        out,
        eps,
        hidden,
        BLOCK=block,
        PDL=pdl,
        num_warps=row_warps(block),
        launch_pdl=pdl,
    )


def row_warps(block: int) -> int:
    """Warps of a program that normalizes a row of so many columns: kernels with as many add up in the same order."""
    return min(max(block // 512, 1), 16)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The result of `rms_norm`, in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


@triton.jit
def _rms_norm_kernel(x, weight, out, eps, hidden, BLOCK: tl.constexpr, PDL: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    mask = columns < hidden
    scale = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    offset = tl.program_id(0).to(tl.int64) * hidden
    values = tl.load(x + offset + columns, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, 0) / hidden + eps)
    tl.store(out + offset + columns, (values * inverse * scale).to(out.dtype.element_ty), mask=mask)
