"""Paged attention against a plain reference, without leaks; int8 and packed products against F.linear."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmengine.backends.cpu.attention import LayerAttention, PagedAttention
from llmengine.backends.cpu.kv_store import AttentionShape
from llmengine.backends.cpu.linear import DequantizedLinear, Layout, dense_layouts
from llmengine.backends.cpu.step_inputs import BlockTables, HostSlotState
from llmengine.backends.kv_layout import KvLayout, KvPool, byte_kv_layout, split_kv_layout
from llmengine.batch import Batch, BatchRow, SlotInit
from llmengine.models.arch import ModelArch
from llmengine.quant_config import KvQuantization
from llmengine.quantization.formats import DENSE
from llmengine.quantization.int8 import INT8
from llmengine.quantization.matrix import Matrix
from llmengine.sampling_params import SamplingParams
from tests.models.arch_helpers import SMALL_ARCH


def rounded(x: torch.Tensor, kv_cache: KvQuantization) -> torch.Tensor:
    """Return vectors [.., head_dim] as a KV cache holds them."""
    if kv_cache == "none":
        return x
    most = 127 if kv_cache == "int8" else 448
    largest = x.abs().amax(dim=-1, keepdim=True)
    scaled = x * (most / largest)
    return (scaled.round() if kv_cache == "int8" else scaled.to(torch.float8_e4m3fn).float()) * (largest / most)


def kv_layout(arch: ModelArch, block_size: int, kv_cache: KvQuantization) -> KvLayout:
    if kv_cache == "none":
        return split_kv_layout(arch, block_size)
    return byte_kv_layout(arch, block_size, kv_cache)


def reference(
    qkv: torch.Tensor, shape: AttentionShape, window: int | None, start: int, kv_cache: KvQuantization = "none"
) -> torch.Tensor:
    """Return the causal attention of tokens [start, len) over all tokens, without rotation."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    q, k, v = qkv.view(len(qkv), -1, shape.head_dim).split((heads, kv_heads, kv_heads), dim=1)
    k, v = (rounded(x, kv_cache).repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * shape.score_scale
    if shape.soft_cap is not None:
        scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
    ones = torch.ones(len(q), len(q))
    hidden = ones.triu(1) if window is None else ones.triu(1) + ones.tril(-window)
    scores = scores.masked_fill(hidden.bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(q), -1)[start:]


@pytest.mark.parametrize(("kv_cache", "block_size"), [("none", 4), ("int8", 4), ("int8", 2), ("int8", 8), ("fp8", 4)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "scale", "soft_cap"),
    [
        (4, 4, 6, None, 6**-0.5, None),
        (6, 2, 8, None, 8**-0.5, None),
        (3, 1, 10, None, 10**-0.5, None),
        (6, 2, 8, 1, 0.5, None),
        (6, 2, 8, 7, 0.5, 2.0),
        (4, 4, 6, 8, 0.2, None),
        (3, 1, 10, None, 0.4, 3.0),
    ],
)
def test_equals_reference_whatever_the_blocks_held_before(
    heads: int,
    kv_heads: int,
    dim: int,
    window: int | None,
    scale: float,
    soft_cap: float | None,
    kv_cache: KvQuantization,
    block_size: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = AttentionShape(heads, kv_heads, dim, score_scale=scale, soft_cap=soft_cap)
    arch = replace(SMALL_ARCH, num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    pool = KvPool(kv_layout(arch, block_size, kv_cache), num_blocks=240 // block_size, max_model_len=64)
    unrotated = torch.cat((torch.ones(64, dim // 2), torch.zeros(64, dim // 2)), dim=1)
    attention = PagedAttention(shape, pool, [LayerAttention(unrotated, window)])
    table = HostSlotState(BlockTables(6, 64 // block_size))
    free = np.random.default_rng(0).permutation(np.arange(1, pool.num_blocks)).tolist()
    lengths = [1, 5, 8, 30, 50]
    tokens = [torch.randn(n, (heads + 2 * kv_heads) * dim, generator=generator) for n in lengths]
    blocks = [[free.pop() for _ in range(-(-n // block_size))] for n in lengths]

    def attend(parts: list[tuple[int, int, int]], fill: float | None = None) -> dict[int, torch.Tensor]:
        inits = [SlotInit(i, (0,), 1, SamplingParams(), 0, frozenset()) for i, start, _ in parts if start == 0]
        for init in inits:
            table.init_slot(init)
        rows = [BatchRow(i, s, e - s, [0] * (e - s), blocks[i] if s == 0 else (), 0) for i, s, e in parts]
        inputs = table.flatten(Batch(0, rows))
        attention.plan(inputs, table.block_tables)
        by_slot = {i: tokens[i][s:e] for i, s, e in parts}
        qkv = torch.cat([by_slot[slot] for slot in inputs.row_slots.tolist()])
        output = attention.attend(0, qkv if fill is None else torch.full_like(qkv, fill))
        counts = np.diff(inputs.row_starts).tolist()
        return dict(zip(inputs.row_slots.tolist(), output.split(counts), strict=True))

    attend([(i, 0, n) for i, n in enumerate(lengths)], fill=torch.nan)
    steps = [
        [(4, 0, 20), (3, 0, 29), (0, 0, 1)],
        [(4, 20, 49), (3, 29, 30), (1, 0, 4)],
        [(1, 4, 5), (2, 0, 7), (4, 49, 50)],
        [(2, 7, 8)],
    ]
    for parts in steps:
        for (slot, start, end), found in zip(sorted(parts), [x for _, x in sorted(attend(parts).items())], strict=True):
            expected = reference(tokens[slot][:end], shape, window, start, kv_cache)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("item", dense_layouts(torch.float32), ids=lambda item: item.name)
def test_every_layout_multiplies_and_gives_its_weight_back(item: Layout) -> None:
    weight, bias, residual = torch.randn(40, 24), torch.randn(40), torch.randn(5, 40)
    linear = item.pack(Matrix.dense(weight), bias)
    x = torch.randn(5, 24)
    expected = x @ weight.T + bias
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(linear(x, residual.clone()), expected + residual, rtol=0, atol=1e-4)
    assert linear.matrix.format == DENSE
    assert torch.equal(linear.matrix.weight, weight)
    assert linear.bias is bias


def test_int8_is_within_two_percent_and_keeps_rows_apart() -> None:
    weight, bias = torch.randn(64, 200), torch.randn(64)
    matrix = Matrix.dense(weight).quantized(INT8)
    linear = DequantizedLinear(matrix, bias)
    x = torch.randn(9, 200) * torch.logspace(-3, 3, 9)[:, None]
    x[4] = 0
    found, expected = linear(x), x @ weight.T + bias
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.max()) < 0.02
    x[3, 5], x[7, :] = torch.nan, torch.inf
    spoiled = linear(x)
    sound = [0, 1, 2, 4, 5, 6, 8]
    torch.testing.assert_close(spoiled[sound], found[sound])
    assert not torch.isfinite(spoiled[[3, 7]]).any()
    assert linear.matrix is matrix
