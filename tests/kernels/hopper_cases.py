"""What the tests of the kernels for Hopper share: formats and layouts that they read, and products that are exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmengine.kernels.cuda_program import can_compile
from llmengine.kernels.hopper_packed import has_hopper_product
from llmengine.kernels.packed_weights import PackedLayout, PackedMatrix
from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups, pack_nibbles
from llmengine.quantization.int8 import INT8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import Mxfp4

MAX_SHARED = 227 << 10
FORMATS: list[WeightFormat] = [
    *(Int4Groups(size, zero_points) for size in (32, 64, 128, -1) for zero_points in (False, True)),
    Int4Groups(128, scale_dtype="bfloat16"),
    Int4Groups(64, scale_dtype="float32"),
    Int4Groups(64, input_order=True, input_scale=True),
    INT8,
    Int8Groups(64),
    Int8Groups(128, zero_points=False),
    Fp8("channel", "none"),
    Fp8("block", "none"),
    Mxfp4(),
    Bnb4Bit("nf4"),
]
LAYOUTS = [
    layout
    for weight_format in FORMATS
    for dtype in (torch.bfloat16, torch.float16)
    if (layout := PackedLayout.of(weight_format, (4096, 4096), dtype)) is not None and has_hopper_product(layout)
]
SHORT_LAYOUTS = [
    layout
    for weight_format in FORMATS
    for dtype in (torch.bfloat16, torch.float16)
    if (layout := PackedLayout.of(weight_format, (960, 576), dtype)) is not None and has_hopper_product(layout)
]
"""Of a matrix whose columns are no multiple of 128, as SmolLM2's."""

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and can_compile()
needs_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU and NVRTC")


class ExactCase:
    """A product of small integers, whose sums are exact in float32 in any order: one wrong operand shows."""

    def __init__(self, device: str, weight_format: WeightFormat, num_rows: int, n: int, k: int) -> None:
        layout = PackedLayout.of(weight_format, (n, k), torch.bfloat16)
        assert layout is not None
        self.matrix = PackedMatrix(weight_format, layout, device)
        weights = torch.randint(-7, 8, (n, k), dtype=torch.int8, device=device)
        stored = weight_format.quantize(torch.zeros(n, k))
        tensors = {name: tensor.to(device) for name, tensor in stored.items()}
        if weight_format == INT8:
            tensors |= {"weight": weights, "weight_scale": torch.ones(n, device=device)}
        else:
            tensors["weight"] = pack_nibbles((weights + 7).to(torch.uint8))
            tensors["weight_scale"] = torch.ones_like(tensors["weight_scale"])
            tensors["zero_point"] = torch.full_like(tensors["zero_point"], 7)
        self.matrix.fill(tensors)
        rows = torch.randint(-3, 4, (num_rows, k), dtype=torch.int8, device=device)
        self.x = rows.bfloat16()
        self.expected = torch._int_mm(rows, weights.t()).float()

    def num_wrong(self, multiply: Callable[[Tensor, Tensor], None], repeats: int, num_rows: int | None = None) -> int:
        """How many of `repeats` products of the first rows, which `multiply` writes, differ from the expected one."""
        x, expected = self.x[:num_rows], self.expected[:num_rows]
        wrong = torch.zeros((), dtype=torch.int64, device=x.device)
        for _ in range(repeats):
            out = torch.full_like(expected, torch.nan)
            multiply(x, out)
            wrong += (out != expected).any()
        return int(wrong)
