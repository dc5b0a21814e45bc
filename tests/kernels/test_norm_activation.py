"""Row-wise kernels against their references."""

from __future__ import annotations

import pytest
import torch

from llmengine.kernels.activation import silu_and_mul, silu_and_mul_reference
from llmengine.kernels.norm import rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 16384), (3, 576), (5, 8)])
def test_rms_norm(device: str, num_rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(num_rows, width, device=device).mul_(5.0).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    expected = rms_norm_reference(x, weight, 1e-6)
    for out in (torch.empty_like(x), torch.empty_like(x, dtype=torch.float32), x):
        rms_norm(x, weight, 1e-6, out)
        torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1536), (3, 1000), (2, 8)])
def test_silu_and_mul(device: str, num_rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(num_rows, 2 * width, device=device).mul_(4.0).to(dtype)
    out = torch.full((num_rows, width), torch.nan, device=device, dtype=dtype)
    silu_and_mul(gate_up, out)
    expected = silu_and_mul_reference(gate_up)
    torch.testing.assert_close(out.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
