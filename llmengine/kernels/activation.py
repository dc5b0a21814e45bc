"""The gated activation between the MLP's matrices."""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def silu_and_mul(gate_up: Tensor, out: Tensor, pdl: bool = False) -> None:
    """Write silu(gate) * up to `out`, computed in fp32.

    Args:
        gate_up: [num_rows, 2 * intermediate], contiguous, gate then up.
        out: [num_rows, intermediate], contiguous.
        pdl: see `linear.LinearKernels`.
    """
    num_rows, intermediate = out.shape
    assert gate_up.shape == (num_rows, 2 * intermediate)
    assert gate_up.is_contiguous()
    assert out.is_contiguous()
    grid = (num_rows, triton.cdiv(intermediate, _BLOCK))
    _silu_and_mul_kernel[grid](gate_up, out, intermediate, BLOCK=_BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl)


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """The result of `silu_and_mul`, in fp32."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _silu_and_mul_kernel(gate_up, out, intermediate, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < intermediate
    gate = tl.load(gate_up + row * 2 * intermediate + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * intermediate + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * intermediate + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)
