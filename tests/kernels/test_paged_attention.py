"""Paged attention kernels against their references: ragged rows, scattered blocks, cells that must not be touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor

from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.attention_decode import DecodeLaunch, attention_workspace, decode_attention, decode_launch
from llmengine.kernels.attention_prefill import prefill_attention, query_block_size, rope_and_write
from llmengine.kernels.attention_reference import (
    decode_attention_reference,
    dequantized,
    prefill_attention_reference,
    quantized_reference,
    rope_and_write_reference,
)
from llmengine.kernels.kv_blocks import KvBlocks
from llmengine.kernels.step import NUM_DECODES, NUM_QUERY_BLOCKS, NUM_ROWS, NUM_TOKENS, DeviceStep

MAX_POSITIONS = 1024
MIXED = ([1, 2, 17, 70], [(5, 5), (40, 1), (75, 21)])
"""Context lengths of decodes; (context length, tokens in the step) of chunks."""


@dataclass(frozen=True)
class Case:
    """One layer's tensors: valid where a step reads, NaN in every other cell of the blocks and in `out`."""

    step: DeviceStep
    qkv: Tensor
    kv: KvBlocks
    out: Tensor

    def clone(self) -> Case:
        scales = None if self.kv.scales is None else self.kv.scales.clone()
        kv = KvBlocks(self.kv.numbers.clone(), scales)
        return replace(self, qkv=self.qkv.clone(), kv=kv, out=self.out.clone())


def kv_blocks(vectors: Tensor, dtype: torch.dtype) -> KvBlocks:
    """Vectors in fp32, [..., head_dim], as blocks; NaN has a scale that is NaN."""
    if dtype.itemsize > 1:
        return KvBlocks(vectors.to(dtype))
    numbers, scales = quantized_reference(vectors.flatten(0, -2), dtype)
    return KvBlocks(numbers.view(vectors.shape), scales.view(vectors.shape[:-1]))


def make_case(
    config: AttentionConfig,
    decodes: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    device: str,
    dtype: torch.dtype,
    seed: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> Case:
    """Return a step with two rows, five tokens and three query blocks of padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = [(length, 1) for length in decodes] + list(chunks)
    num_tokens, num_slots, size = sum(tokens for _, tokens in rows), len(rows) + 3, config.block_size
    slots = torch.randperm(num_slots, generator=generator)[: len(rows)].tolist()
    needed = [-(-length // size) for length, _ in rows]
    num_blocks = sum(needed) + 4
    free = (torch.randperm(num_blocks - 1, generator=generator) + 1).tolist()
    shape = (num_blocks, 2, config.num_kv_heads, size, config.head_dim)
    kv, random = torch.full(shape, torch.nan), torch.randn(shape, generator=generator)
    tables = torch.zeros(num_slots + 1, max([1, *needed]) + 1, dtype=torch.int32)
    token_slots, positions, starts, query_blocks = [], [], [0], []
    step_tokens = query_block_size(config, dtype)
    for index, ((length, tokens), slot, count) in enumerate(zip(rows, slots, needed, strict=True)):
        blocks = [free.pop() for _ in range(count)]
        tables[slot, :count] = torch.tensor(blocks)
        for position in range(length - tokens):
            cell = (blocks[position // size], slice(None), slice(None), position % size)
            kv[cell] = random[cell]
        if index >= len(decodes):
            query_blocks += [(index, start) for start in range(starts[-1], starts[-1] + tokens, step_tokens)]
        token_slots += [slot] * tokens
        positions += range(length - tokens, length)
        starts.append(starts[-1] + tokens)

    def padded(values: Sequence[int], size: int, padding: int = 0) -> Tensor:
        return torch.tensor([*values, *[padding] * (size - len(values))], dtype=torch.int32, device=device)

    max_tokens, max_rows, max_query_blocks = num_tokens + 5, len(rows) + 2, len(query_blocks) + 3
    counts = [0] * 8
    counts[NUM_TOKENS], counts[NUM_ROWS], counts[NUM_DECODES] = num_tokens, len(rows), len(decodes)
    counts[NUM_QUERY_BLOCKS] = len(query_blocks)
    used = {
        "counts": padded(counts, 8),
        "positions": padded(positions, max_tokens),
        "token_slots": padded(token_slots, max_tokens, num_slots),
        "row_slots": padded(slots, max_rows, num_slots),
        "row_starts": padded(starts, max_rows + 1, num_tokens),
        "context_lens": padded([length for length, _ in rows], max_rows, 1),
        "query_block_rows": padded([row for row, _ in query_blocks], max_query_blocks),
        "query_block_starts": padded([start for _, start in query_blocks], max_query_blocks),
        "block_tables": tables.to(device),
    }
    step = DeviceStep(**{field.name: used.get(field.name, padded([], 0)) for field in fields(DeviceStep)})
    width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    qkv = torch.randn(max_tokens, width, generator=generator).to(device, dtype)
    out = torch.full((max_tokens, config.num_heads * config.head_dim), torch.nan, dtype=dtype, device=device)
    return Case(step, qkv, kv_blocks(kv.to(device), kv_dtype or dtype), out)


def rotations(config: AttentionConfig, device: str) -> Tensor:
    """Return a rope table [MAX_POSITIONS, head_dim]."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(MAX_POSITIONS).float(), 10000.0**-exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device)


def norms(config: AttentionConfig, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weights = torch.rand(2, config.head_dim, generator=torch.Generator().manual_seed(1)) + 0.5
    q_norm, k_norm = weights.to(device, dtype)
    return q_norm, k_norm


_ROUNDED_EITHER_WAY = 1e-3
"""Share of numbers of 8 bits that may differ by a step: a number in the middle is rounded either way."""


def assert_close(name: str, found: Tensor, expected: Tensor, tolerance: float, is_rounded: bool) -> None:
    """Compare two tensors, including their NaN.

    Args:
        is_rounded: few elements may differ by as much as a number of 8 bits that is rounded the other way.
    """

    def named(text: str) -> str:
        return f"{name}: {text}"

    widest = 0.15 if is_rounded else tolerance
    torch.testing.assert_close(found, expected, rtol=widest, atol=max(widest, tolerance), equal_nan=True, msg=named)
    if is_rounded:
        far = ~found.float().isclose(expected.float(), rtol=tolerance, atol=tolerance, equal_nan=True)
        assert far.float().mean() < _ROUNDED_EITHER_WAY, f"{name}: {int(far.sum())} of {far.numel()} differ"


def assert_equal(found: Case, expected: Case) -> None:
    """Compare all three tensors, including the NaN in cells that neither may touch."""
    tolerance = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}[found.out.dtype]
    pairs = {
        "qkv": (found.qkv, expected.qkv),
        "out": (found.out.float(), expected.out.float()),
        "kv": (dequantized(found.kv), dequantized(expected.kv)),
    }
    if found.kv.scales is not None and expected.kv.scales is not None:
        pairs["kv"] = (found.kv.scales, expected.kv.scales)
        mine, reference = (kv.numbers.float().nan_to_num(500.0) for kv in (found.kv, expected.kv))
        step = 1 if found.kv.dtype == torch.int8 else reference.abs() / 8 + 2**-9
        assert ((mine - reference).abs() <= step).all()
        assert (mine != reference).float().mean() < _ROUNDED_EITHER_WAY
    for name, (mine, reference) in pairs.items():
        is_rounded = name == "out" and found.kv.scales is not None and found.out.dtype != torch.float32
        assert_close(name, mine, reference, tolerance, is_rounded)


def assert_step_equals_reference(
    config: AttentionConfig,
    case: Case,
    device: str,
    norm: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    launch: DecodeLaunch | None = None,
) -> None:
    rope, expected = rotations(config, device), case.clone()
    decode_attention_reference(case.step, expected.qkv, expected.kv, rope, config, expected.out, *norm)
    rope_and_write_reference(case.step, expected.qkv, expected.kv, rope, config, *norm)
    prefill_attention_reference(case.step, expected.qkv, expected.kv, config, expected.out)
    workspace = attention_workspace(config, num_sms=32, device=device)
    decode_attention(case.step, case.qkv, case.kv, rope, config, case.out, workspace, *norm, launch=launch)
    rope_and_write(case.step, case.qkv, case.kv, rope, config, *norm)
    prefill_attention(case.step, case.qkv, case.kv, config, case.out)
    num_tokens = int(case.step.counts[NUM_TOKENS])
    assert case.out[:num_tokens].isfinite().all()
    assert_equal(case, expected)
    assert not workspace.arrivals.any()


BYTES = [torch.int8, torch.float8_e4m3fn]
SHAPES = [(2, 2, 64), (6, 2, 64), (4, 1, 96), (8, 1, 80), (2, 2, 80), (16, 1, 128)]
SHAPES_AND_TYPES = [(*shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype"), [*SHAPES_AND_TYPES, (3, 1, 64, torch.float16)], ids=str)
def test_a_mixed_step_equals_the_reference(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str
) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 dot is wrong")
    config = AttentionConfig(heads, kv_heads, dim)
    assert_step_equals_reference(config, make_case(config, *MIXED, device, dtype), device)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("dim", [96, 256])
def test_norms_windows_caps_and_larger_blocks(heads: int, dim: int, device: str) -> None:
    config = AttentionConfig(heads, 2, dim, block_size=32, scale=0.3, sliding_window=19, soft_cap=3.0)
    case = make_case(config, *MIXED, device, torch.float32)
    assert_step_equals_reference(config, case, device, norms(config, device, torch.float32))


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(2, 2, 100, 1), (3, 1, 18, 8)])
def test_any_even_head_size_and_any_block_size(
    heads: int, kv_heads: int, dim: int, block_size: int, device: str
) -> None:
    config = AttentionConfig(heads, kv_heads, dim, block_size, sliding_window=7)
    case = make_case(config, [1, 17], [(5, 5), (33, 21)], device, torch.float32)
    assert_step_equals_reference(config, case, device, norms(config, device, torch.float32))


@pytest.mark.parametrize(
    ("decodes", "chunks"), [([], []), ([33, 16], []), ([], [(33, 33), (16, 4)])], ids=["empty", "decodes", "chunks"]
)
@pytest.mark.parametrize("heads", [1, 3])
def test_steps_of_one_kind(heads: int, decodes: list[int], chunks: list[tuple[int, int]], device: str) -> None:
    config = AttentionConfig(heads, 1, 64)
    assert_step_equals_reference(config, make_case(config, decodes, chunks, device, torch.float16), device)


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (6, 2, 80), (3, 1, 18)])
def test_keys_and_values_of_8_bits(heads: int, kv_heads: int, dim: int, kv_dtype: torch.dtype, device: str) -> None:
    config = AttentionConfig(heads, kv_heads, dim, sliding_window=19, soft_cap=3.0)
    case = make_case(config, [1, 40], [(5, 5), (33, 9)], device, torch.float32, kv_dtype=kv_dtype)
    assert_step_equals_reference(config, case, device, norms(config, device, torch.float32))


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
@pytest.mark.parametrize("heads", [2, 6])
def test_long_contexts_of_8_bits_are_split_and_combined(heads: int, kv_dtype: torch.dtype, device: str) -> None:
    config = AttentionConfig(heads, 2, 64)
    launch = replace(decode_launch(config, kv_dtype), tile=16, min_split_tokens=32)
    case = make_case(config, [33, 1, 150], [], device, torch.float32, kv_dtype=kv_dtype)
    assert_step_equals_reference(config, case, device, launch=launch)


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_half_precision_attends_to_8_bits(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, kv_dtype: torch.dtype, device: str
) -> None:
    if device == "cpu":
        pytest.skip("the interpreter's bf16 dot is wrong, and it has no inline assembly")
    config = AttentionConfig(heads, kv_heads, dim, block_size=32)
    assert_step_equals_reference(config, make_case(config, *MIXED, device, dtype, kv_dtype=kv_dtype), device)
    long = make_case(config, [33, 900, 200, 1, 150], [(700, 300)], device, dtype, kv_dtype=kv_dtype)
    assert_step_equals_reference(config, long, device)


@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
def test_values_are_rounded_to_the_nearest_number_of_8_bits(kv_dtype: torch.dtype, device: str) -> None:
    """All magnitudes that a vector can have beside its largest element, and vectors of all magnitudes."""
    config = AttentionConfig(1, 1, 128)
    case = make_case(config, [], [(24, 24)], device, torch.float32, kv_dtype=kv_dtype)
    generator = torch.Generator().manual_seed(2)
    steps = torch.cat([torch.linspace(-1, 1, 64), 2.0 ** -torch.linspace(0, 20, 64)])
    size = 10.0 ** torch.linspace(-33, 30, 29)[:, None]
    values = steps[torch.rand(29, 128, generator=generator).argsort(dim=1)] * size
    values[3] = 0.0
    case.qkv[:, 256:] = values.to(device)
    expected = case.clone()
    rope = rotations(config, device)
    rope_and_write_reference(case.step, expected.qkv, expected.kv, rope, config)
    rope_and_write(case.step, case.qkv, case.kv, rope, config)
    numbers, wanted = (kv.numbers[:, 1].float().nan_to_num(500.0) for kv in (case.kv, expected.kv))
    close = (numbers - wanted).abs() <= (1 if kv_dtype == torch.int8 else wanted.abs() / 8 + 2**-9)
    assert close.all()
    assert (numbers != wanted).float().mean() < _ROUNDED_EITHER_WAY
    torch.testing.assert_close(case.kv.scales, expected.kv.scales, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
@pytest.mark.parametrize("kv_dtype", BYTES, ids=str)
def test_a_vector_that_is_not_finite_spoils_its_own_row_only(kv_dtype: torch.dtype, poison: float, device: str) -> None:
    config = AttentionConfig(2, 1, 32)
    case = make_case(config, [20, 9], [(5, 5), (9, 3)], device, torch.float32, kv_dtype=kv_dtype)
    keys, values = 2 * 32, 3 * 32
    case.qkv[0, values + 3] = poison  # a decode's value, and a chunk's key
    case.qkv[2, keys + 3] = poison
    workspace = attention_workspace(config, num_sms=8, device=device)
    rope = rotations(config, device)
    decode_attention(case.step, case.qkv, case.kv, rope, config, case.out, workspace)
    rope_and_write(case.step, case.qkv, case.kv, rope, config)
    prefill_attention(case.step, case.qkv, case.kv, config, case.out)
    finite = case.out[:10].isfinite().all(dim=1).tolist()
    assert finite == [False, True, *[False] * 5, True, True, True]


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("window", [0, 70])
def test_long_contexts_are_split_and_combined(heads: int, window: int, device: str) -> None:
    config = AttentionConfig(heads, 2, 64, sliding_window=window)
    launch = replace(decode_launch(config, torch.float32), tile=16, min_split_tokens=32)
    case = make_case(config, [33, 34, 200, 1, 150], [], device, torch.float32)
    assert_step_equals_reference(config, case, device, launch=launch)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, *BYTES], ids=str)
def test_one_graph_replays_any_step_that_fits(kv_dtype: torch.dtype, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs CUDA graphs")
    config = AttentionConfig(32, 8, 128)
    rope, workspace = rotations(config, device), attention_workspace(config, num_sms=132, device=device)
    captured = make_case(config, [900] * 4, [(900, 300)] * 4, device, torch.bfloat16, kv_dtype=kv_dtype)

    def run() -> None:
        decode_attention(captured.step, captured.qkv, captured.kv, rope, config, captured.out, workspace)
        rope_and_write(captured.step, captured.qkv, captured.kv, rope, config)
        prefill_attention(captured.step, captured.qkv, captured.kv, config, captured.out)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    mixes = [([600, 3], [(700, 250), (129, 128)]), ([1, 880, 512, 257, 64], []), ([], [(801, 800)])]
    for seed, (decodes, chunks) in enumerate(mixes):
        case = make_case(config, decodes, chunks, device, torch.bfloat16, seed, kv_dtype)
        expected = case.clone()
        decode_attention_reference(case.step, expected.qkv, expected.kv, rope, config, expected.out)
        rope_and_write_reference(case.step, expected.qkv, expected.kv, rope, config)
        prefill_attention_reference(case.step, expected.qkv, expected.kv, config, expected.out)
        copy_into(captured, case)
        graph.replay()
        pairs = {
            "qkv": (captured.qkv, expected.qkv),
            "kv": (dequantized(captured.kv), dequantized(expected.kv)),
            "out": (captured.out, expected.out),
        }
        for name, (found, wanted) in pairs.items():
            is_rounded = name != "qkv" and captured.kv.scales is not None
            assert_close(name, found[: len(wanted)], wanted, 3e-2, is_rounded)


def copy_into(target: Case, source: Case) -> None:
    """Put a step that fits into the tensors of another, as the host does between replays."""
    for field in fields(DeviceStep):
        old, new = getattr(target.step, field.name), getattr(source.step, field.name)
        old[tuple(slice(0, size) for size in new.shape)] = new
    pairs = [(target.qkv, source.qkv), (target.out, source.out)]
    pairs.append((target.kv.numbers.view(torch.uint8), source.kv.numbers.view(torch.uint8)))
    if target.kv.scales is not None and source.kv.scales is not None:
        pairs.append((target.kv.scales, source.kv.scales))
    for old, new in pairs:
        old[: len(new)] = new
