"""Which ways of computing a matrix product are worth measuring, the likeliest first.

They depend on the shape with the number of rows of its bucket, one of `ROW_BUCKETS`: all numbers of rows in a bucket
run the same kernel in about the same time. More rows than the last bucket's go to cuBLASLt's first proposal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from llmengine.kernels.cublaslt import TILES, CublasConfig, TileConfig
from llmengine.kernels.gemm_config import (
    GemmShape,
    HopperConfig,
    HopperFewConfig,
    HopperScaledConfig,
    LinearConfig,
    PackedConfig,
    SkinnyConfig,
    fuses_gate,
    parse_config,
    shared_bytes,
)
from llmengine.kernels.hopper_few import STRIP, Cut
from llmengine.kernels.hopper_packed import EVENLY, PROGRAMS, SPLITS, can_share_evenly, has_hopper_product
from llmengine.kernels.hopper_scaled import OUTPUTS, has_hopper_scaled
from llmengine.kernels.hopper_scaled import SPLITS as SCALED_SPLITS
from llmengine.kernels.linear import MAX_SPLIT_TILES
from llmengine.kernels.packed_weights import TILE_ROWS
from llmengine.quantization.fp8 import Fp8

ROW_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

_CANDIDATES: dict[int, dict[str, str]] = {
    1: {
        "small norm_linear": "m1n4k512w2s1 m1n8k512w4s1 m1n4k1024w4s1 cublas:1",
        "large norm_linear": "m1n4k2048w8s1-norm m1n4k1024w4s1-norm m1n16k512w4s1 cublas:2",
        "wide norm_linear": "m1n4k2048w8s1-norm m1n4k1024w4s1-norm m1n8k512w4s1 cublas:1",
        "small norm_linear_silu": "m1n4k512w2s1 m1n4k512w4s1 m1n8k256w4s1 cublas:1",
        "large norm_linear_silu": "m1n4k1024w4s1-norm m1n8k512w4s3 m1n16k256w4s1 cublas:2",
        "small linear_add": "m1n2k512w2s1 m1n4k512w2s1 m1n4k512w4s1 m1n4k1024w4s1 cublas:1",
        "large linear_add": "m1n32k1024w8s1 m1n16k2048w8s1 m1n16k1024w4s1 cublas:2",
    },
    16: {
        "small norm_linear": "m16n16k128w2s5 m16n16k128w2s5-norm m16n32k128w4s5-norm cublas:2",
        "large norm_linear": "m16n64k256w4s4-norm m16n32k256w4s5-norm m16n64k128w4s5-norm cublas:8",
        "wide norm_linear": "m16n64k256w4s4-norm m16n64k128w4s4-norm cublas:2",
        "small norm_linear_silu": "m16n32k128w2s4 m16n32k128w4s4 m16n16k64w2s6 cublas:2",
        "large norm_linear_silu": "m16n32k256w4s3 m16n32k128w4s5-norm m16n64k128w4s4-norm cublas:4",
        "small linear_add": "m16n16k128w2s5 m16n16k64w2s6 m16n64k128w4s4x4 m16n64k128w4s4x2 cublas:4",
        "large linear_add": "m16n32k256w4s6 m16n64k256w4s4x2 cublas:8",
    },
    32: {
        "small norm_linear": "m32n32k64w4s5-norm cublas:4",
        "large norm_linear": "m32n64k128w4s4-norm cublas:8",
        "wide norm_linear": "m32n64k128w4s4-norm m32n64k128w4s5-norm cublas:4",
        "small norm_linear_silu": "m32n16k128w2s4 m32n16k64w2s6-norm m32n16k128w4s4 cublas:2",
        "large norm_linear_silu": "m32n64k128w4s4-norm cublas:8",
        "small linear_add": "m32n16k128w4s6 m32n16k128w4s4x2 m32n16k64w2s6 cublas:4",
        "large linear_add": "m32n32k256w4s5 m32n64k256w4s3x2 cublas:8",
    },
    64: {
        "small norm_linear": "m64n32k64w4s5-norm m64n64k64w4s5-norm cublas:2",
        "large norm_linear": "m64n64k128w4s5-norm m64n64k64w4s5-norm cublas:8 tiles:2",
        "wide norm_linear": "m64n64k128w4s3-norm m64n64k64w4s5-norm cublas:4",
        "small norm_linear_silu": "m64n32k64w4s5-norm m64n16k128w4s4-norm cublas:2",
        "large norm_linear_silu": "m64n32k64w4s5-norm m64n64k128w4s4-norm cublas:8 tiles:2",
        "small linear_add": "m64n16k64w4s6 m64n16k128w4s4x2 m64n16k128w4s4x4 cublas:4 tiles:2",
        "large linear_add": "cublas:8 m64n64k256w4s3x2 m64n64k128w4s6x2 m64n16k128w4s4x2 tiles:2",
    },
    128: {
        "small norm_linear": "m64n32k64w4s5-norm-any m64n64k64w4s5-norm-any cublas:2 tiles:1",
        "small norm_linear_silu": "m64n32k64w4s5-norm-any m64n64k64w4s4-norm-any cublas:2",
        "small linear_add": "m64n16k64w4s6-any m64n16k128w4s4-any cublas:3 tiles:1",
    },
    256: {
        "small norm_linear": "m64n32k64w4s5-norm-any m64n64k64w4s5-norm-any cublas:2 tiles:1",
        "small norm_linear_silu": "m64n32k64w4s5-norm-any m64n64k64w4s4-norm-any cublas:2",
        "small linear_add": "m64n64k64w4s5-any m64n32k64w4s5-any cublas:3 tiles:2",
    },
}
"""By bucket and kind of shape, those that were fast on an H100 with models of 135M, 1B, 7B and 8B parameters; cublas:N
stands for the library's first N proposals, tiles:N for N of its tiles that fill the GPU, in one or three clusters."""

_PACKED: dict[int, str] = {
    1: "packed-m8n64w4s4 packed-m8n64w4s6",
    8: "packed-m8n64w4s4 packed-m8n64w4s6",
    16: "packed-m16n64w4s4 packed-m16n64w4s3 packed-m16n128w8s4",
    32: "packed-m32n64w4s3 packed-m32n64w4s4 packed-m32n128w8s3",
    64: "packed-m64n64w4s3 packed-m64n128w8s3",
    128: "packed-m128n128w8s2 packed-m64n128w8s3",
}
"""By bucket, for packed weights, without the number of programs that share K; the last also for more rows."""

_SHORT_SLICES = "packed-m16n64w4s4"
"""What is likeliest for up to eight rows and slices of 16 columns."""

_SCALED: dict[int, str] = {
    1: "packed-m16n64w4s6 packed-m8n64w4s6",
    16: "packed-m16n64w4s6 packed-m16n128w8s5",
    32: "packed-m32n64w4s6 packed-m32n128w8s5",
    64: "packed-m64n64w4s5 packed-m64n128w8s4",
    128: "packed-m128n128w8s4 packed-m64n128w8s4",
}
"""Likewise where activations are quantized too."""

_SPLITS = (1, 2, 4, 8, 16)
"""Programs that share K, for quantized weights, of which those are tried that give one to three to a multiprocessor."""

_USUAL_SMS = 132

_MOST_FEW, _MOST_STRIPS = 8, 16
"""Rows of `hopper_few`, which reads x once for each program, and strips of a program."""

_FEW_PROGRAMS = {1: ((16, 1), (8, 2)), 8: ((8, 1), (16, 1))}
"""By rows, warps of its programs, and programs that share a multiprocessor."""

_IN_CLUSTERS = {1: 1.0, 2: 1.0, 4: 0.91, 8: 0.85}
"""The share of an H200's multiprocessors that clusters of so many programs can fill at once."""

_MOST_HOPPER, _MOST_OTHERS = 4, 2
"""Candidates of `hopper_packed` and of `hopper_scaled`, and those that are tried beside them where they are the
likeliest."""

_FEW_ROWS, _FEW_WAVES, _MANY_WAVES = "cublas:8", "cublas:3 tiles:4", "cublas:2 tiles:1"
"""Of all other shapes: up to 64 rows, where reading counts; then where a product is a few waves of programs, and how
full the last one is decides; beyond, where three are enough: what is close to the fastest alone is as fast under steady
load, when the power decides, and from one measurement to the next the clock changes by more than they differ."""

_MANY_RESULTS = 1 << 23
"""Results of a product that is many waves: more than two of the largest tiles on an H100."""

_TILE_EDGE = 32
"""What loading a row of either operand costs a tile, in products of a row and an output."""


def unmeasured_config(shape: GemmShape, max_shared: int) -> LinearConfig:
    """The configuration where nothing is measured: cuBLASLt's for dense matrices, the likeliest for quantized ones."""
    return candidates(shape, max_shared)[0] if shape.is_quantized else CublasConfig()


def candidates(shape: GemmShape, max_shared: int, num_sms: int = 0, compiles_cuda: bool = False) -> list[LinearConfig]:
    """The configurations that were fast for a shape's bucket and fit in `max_shared` bytes, the likeliest first.

    Args:
        num_sms: see `GemmChoices`, and for `compiles_cuda`.
    """
    bucketed = bucketed_shape(shape)
    if bucketed is not None and shape.is_quantized:
        quantized = _quantized_candidates(bucketed, num_sms or _USUAL_SMS)
        fitting = [config for config in quantized if shared_bytes(shape, config) <= max_shared]
        has_hopper = num_sms > 0 and compiles_cuda
        if shape.is_scaled:
            scaled = _hopper_scaled_candidates(bucketed, num_sms) if has_hopper and _has_short_biases(shape) else []
            others = fitting[:_MOST_OTHERS] if scaled else fitting
            has_library = any(isinstance(config, CublasConfig) for config in others)
            return [*others, *scaled] if has_library and bucketed.num_rows >= 256 else [*scaled, *others]
        if not has_hopper:
            return fitting
        few = _few_candidates(bucketed, num_sms)
        if few:
            # With as many copies under way as can be, Triton's kernel is the closest.
            fitting.sort(key=lambda config: -config.num_stages if isinstance(config, PackedConfig) else 0)
            others = fitting[:_MOST_OTHERS]
            is_wide = any(config.cut.strips == _MOST_STRIPS for config in few)  # programs in several waves
            return [*others, *few] if is_wide else [*few, *others]
        return _merged(bucketed.num_rows, fitting, _hopper_candidates(bucketed, num_sms))
    if bucketed is None or shape.dtype == torch.float32:
        return [CublasConfig()]
    num_rows = bucketed.num_rows
    usual = _FEW_ROWS if num_rows <= 64 else _MANY_WAVES if _has_many_waves(bucketed) else _FEW_WAVES
    configs: list[LinearConfig] = []
    for name in _CANDIDATES.get(num_rows, {}).get(_kind(shape), usual).split():
        kind, _, number = name.partition(":")
        if kind == "cublas":
            configs += [CublasConfig(index, num_rows) for index in range(int(number))]
        elif kind == "tiles":
            configs += _tiles(bucketed, num_sms, int(number))
        else:
            config = parse_config(name)
            if isinstance(config, SkinnyConfig) and not shape.has_norm:
                config = replace(config, fuse_norm=True)  # there is nothing to fuse: one name for one way
            configs.append(config)
    configs = list(dict.fromkeys(configs))
    return [config for config in configs if shared_bytes(shape, config) <= max_shared]


def _quantized_candidates(shape: GemmShape, num_sms: int) -> list[LinearConfig]:
    """Ways to multiply by a quantized matrix in a bucket; from 128 rows on also by a library."""
    by_rows, layout = _SCALED if shape.is_scaled else _PACKED, shape.layout
    names = by_rows[min(shape.num_rows, max(by_rows))].split()
    if layout is not None and layout.slice_columns == 16 and shape.num_rows <= 8:
        # Of eight rows of x, a thread would load a single number, which is too little for asynchronous copies.
        names = [_SHORT_SLICES, *names]
    configs: list[LinearConfig] = []
    for name in names:
        config = parse_config(name)
        assert isinstance(config, PackedConfig), name
        is_gated = not shape.is_scaled and fuses_gate(config, shape.n)
        num_outputs = shape.n if is_gated else _num_outputs(shape)
        tiles = -(-shape.num_rows // config.block_m) * -(-num_outputs // config.block_n)
        most = 1 if tiles > MAX_SPLIT_TILES else max(1, shape.num_turns // 2)
        splits = [split for split in _SPLITS if split <= most]
        fitting = [split for split in splits if 0.9 * num_sms <= tiles * split <= 3.2 * num_sms]
        if not fitting:
            fitting = splits[:1] if tiles > num_sms else splits[-1:]
        configs += [replace(config, split_k=split) for split in fitting]
    if shape.num_rows >= 128 and _has_library_product(shape):
        # cuBLASLt's products of e4m3 numbers differ; those of packed weights are of parts of the matrix.
        proposals = 2 if shape.is_scaled else 1
        library = [CublasConfig(index, shape.num_rows if shape.is_scaled else 0) for index in range(proposals)]
        configs = [*configs, *library] if shape.num_rows < 512 and not shape.is_scaled else [*library, *configs]
    return configs


def _has_library_product(shape: GemmShape) -> bool:
    """Whether cuBLASLt multiplies by quantized weights, dequantized or as they are; it takes no scales of blocks."""
    if not shape.is_scaled:
        return True
    weight_format = shape.weight_format
    if not isinstance(weight_format, Fp8) or "block" in (weight_format.scales, weight_format.activations):
        return False
    return _has_short_biases(shape)


def _has_short_biases(shape: GemmShape) -> bool:
    """Whether a bias, of which a shape says nothing, would be one of 16 bits: it has the activations' dtype.

    That is what `hopper_scaled` reads, and cuBLASLt in FP8. A float32 result does not tell: a 16-bit model's logits
    are float32 too.
    """
    return shape.dtype != torch.float32


def _hopper_candidates(shape: GemmShape, num_sms: int) -> list[HopperConfig]:
    """The ways to multiply by packed weights with `hopper_packed` that should take the least time, the best first."""
    layout = shape.layout
    if layout is None or shape.num_rows < 32 or not has_hopper_product(layout):
        return []
    boxes = layout.num_blocks * layout.block_columns // 64

    def num_tiles(config: HopperConfig) -> int:
        return -(-_num_outputs(shape) // 128) * -(-shape.num_rows // config.block_m)

    def microseconds(config: HopperConfig) -> float:
        # Fitted to four 8b products on an H200, with INT4 and INT8: a box of 64 columns takes 130 ns and 2.1 for each
        # row of x, a tile 3 us and 12 ns for each row, and 18 where sums come from another program; two on a
        # multiprocessor take 88 % of the time of two in turn.
        a_box, a_tile = 0.13 + 0.0021 * config.block_m, 3.0 + 0.012 * config.block_m
        if config.split_k == EVENLY:
            shared = -(-num_tiles(config) * layout.num_blocks // (num_sms * config.programs))
            of_boxes = shared * boxes / layout.num_blocks * a_box * config.programs
            of_sums = 0.018 * config.block_m * -(-layout.num_blocks // shared)
            turns, a_turn = 1, of_boxes + (1 + shared / layout.num_blocks) * a_tile + of_sums
        else:
            turns = -(-num_tiles(config) * config.split_k // int(num_sms * _IN_CLUSTERS[config.split_k]))
            a_turn = -(-boxes // config.split_k) * a_box + a_tile
        return turns * a_turn * (0.88 if config.programs > 1 else 1.0)

    def is_sensible(config: HopperConfig) -> bool:
        at_once, blocks = num_sms * config.programs, num_tiles(config) * layout.num_blocks
        if config.split_k == EVENLY:  # a few blocks for each program, which is a few tiles at most
            most = (2 if config.programs == 1 else 1) * at_once * layout.num_blocks
            fits = can_share_evenly(layout, config.programs) and 2 * at_once <= blocks <= most
        else:
            programs = num_tiles(config) * config.split_k
            splits = config.split_k == 1 or (programs <= at_once and 2 * config.split_k <= layout.num_blocks)
            fits = splits and (config.programs == 1 or programs > num_sms)
        return config.block_m < 2 * shape.num_rows and fits

    configs = [
        HopperConfig(rows, programs, split)
        for rows, all_programs in PROGRAMS.items()
        for programs in all_programs
        for split in SPLITS
    ]
    configs = [config for config in configs if is_sensible(config)]
    return sorted(configs, key=microseconds)[:_MOST_HOPPER]


def _few_candidates(shape: GemmShape, num_sms: int) -> list[HopperFewConfig]:
    """The ways to multiply by packed weights with `hopper_few`, the likeliest first."""
    layout = shape.layout
    if layout is None or shape.num_rows > _MOST_FEW or not has_hopper_product(layout):
        return []
    is_gated = shape.is_gated and shape.n % TILE_ROWS == 0
    total = -(-_num_outputs(shape) // (2 * STRIP if is_gated else STRIP))
    cuts = []
    for most_programs in (num_sms, 2 * num_sms):
        strips = min((2 if is_gated else 1) * -(-total // most_programs), _MOST_STRIPS)
        chunk = next(chunk for chunk in (2, 3, 1) if strips % chunk == 0)
        cuts += [
            Cut(shape.num_rows, strips, chunk, warps, programs) for warps, programs in _FEW_PROGRAMS[shape.num_rows]
        ]
    return [HopperFewConfig(cut) for cut in dict.fromkeys(cuts) if cut.num_slots(layout) > 0]


def _hopper_scaled_candidates(shape: GemmShape, num_sms: int) -> list[HopperScaledConfig]:
    """The ways to multiply with `hopper_scaled` that should take the fewest cycles, the best first."""
    num_outputs, blocks = _num_outputs(shape), shape.num_turns

    def cycles(config: HopperScaledConfig) -> float:
        # Fitted to four 8b products on an H200: tensor cores at 55 % of their peak, 40 bytes a cycle from the L2 to a
        # multiprocessor, 1,800 from memory to all, 20 between programs; a result takes 0.2 cycles, three times as many
        # where it is added to what is there.
        waves = -(-_num_programs(shape, config) // num_sms)
        results = config.block_m * config.block_n
        copied = (min(config.block_m, max(shape.num_rows, 8)) + config.block_n) * 128
        block = max(1.8 * results / 32, copied / 40)
        products = max(waves * -(-blocks // config.split_k) * block, num_outputs * shape.k / 1800)
        if config.split_k > 1:
            return products + results * 4 / 20 + 200 * (config.split_k.bit_length() - 1) + 300 * waves
        written = results * 0.2 * (0.5 if shape.is_gated else 3 if shape.adds else 1)
        return products + (written + 300) * waves

    def is_sensible(config: HopperScaledConfig) -> bool:
        fits = config.block_m == 64 or config.block_m < 2 * shape.num_rows
        splits = config.split_k == 1 or (4 * config.split_k <= blocks and _num_programs(shape, config) <= num_sms)
        can = has_hopper_scaled(shape.weight_format, shape.k, config.block_m, config.block_n)
        return fits and splits and can

    configs = [
        HopperScaledConfig(rows, outputs, split)
        for rows, all_outputs in OUTPUTS.items()
        for outputs in all_outputs
        for split in SCALED_SPLITS
    ]
    return sorted(filter(is_sensible, configs), key=cycles)[:_MOST_HOPPER]


def _num_programs(shape: GemmShape, config: HopperScaledConfig) -> int:
    """Of a product, if each tile has programs of its own."""
    return -(-shape.num_rows // config.block_m) * -(-_num_outputs(shape) // config.block_n) * config.split_k


def _merged(num_rows: int, others: Sequence[LinearConfig], hopper: Sequence[LinearConfig]) -> list[LinearConfig]:
    """All candidates, the likeliest first: for up to 32 rows, and for very many, those that are not for Hopper."""
    if 32 < num_rows <= 512 and hopper:
        return [*hopper, *others[:_MOST_OTHERS]]
    return [*others, *hopper]


def _tiles(shape: GemmShape, num_sms: int, number: int) -> list[TileConfig]:
    """The `number` tiles with which all waves of programs together take the least time, in their clusters."""
    if num_sms == 0:
        return []
    num_outputs = _num_outputs(shape)

    def cost(tile: tuple[int, int]) -> int:
        outputs, rows = tile
        waves = -(-(-(-num_outputs // outputs) * -(-shape.num_rows // rows)) // num_sms)
        return waves * (outputs * rows + _TILE_EDGE * (outputs + rows))

    clusters = [(2, 1)] if _has_many_waves(shape) else [(1, 1), (2, 1), (1, 2) if shape.num_rows > 64 else (4, 1)]
    return [TileConfig(tile, cluster) for tile in sorted(TILES, key=cost)[:number] for cluster in clusters]


def _has_many_waves(shape: GemmShape) -> bool:
    return shape.num_rows * _num_outputs(shape) >= _MANY_RESULTS


def _num_outputs(shape: GemmShape) -> int:
    return 2 * shape.n if shape.is_gated else shape.n


def _kind(shape: GemmShape) -> str:
    """Key of `_CANDIDATES`: a size class, and the operation or one that is like it.

    "small" is up to 8 MiB of weights, where latency counts more than bandwidth; "wide" is for LM heads.
    """
    is_wide = shape.n >= 6 * shape.k and shape.operation in ("norm_linear", "linear")
    size = "small" if shape.n * shape.k <= 1 << 22 else "wide" if is_wide else "large"
    if shape.operation == "linear":
        return f"{size} norm_linear" if size == "wide" else f"{size} linear_add"
    return f"{size} norm_linear_silu" if shape.is_gated else f"{size} {shape.operation}"


def bucket_of(shape: GemmShape) -> int | None:
    """The rows of the shape's bucket, None if it has more rows than any."""
    rows = next((rows for rows in ROW_BUCKETS if shape.num_rows <= rows), None)
    # Eight rows are what a product with packed weights has at least; others are as fast with sixteen.
    return 16 if rows == 8 and shape.layout is None else rows


def bucketed_shape(shape: GemmShape) -> GemmShape | None:
    """The shape with its bucket's number of rows; None if it has more than any bucket."""
    rows = bucket_of(shape)
    return None if rows is None else replace(shape, num_rows=rows)
