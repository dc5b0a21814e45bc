"""Times of attention on the GPU with cold KV in a CUDA graph; every variant is first checked against the reference.

python -m benchmarks.kernels.bench_attention [135m 1b 7b 8b] [--launch v64x256w4s1 ...] [--decodes 64x200 ...] [--pdl]

The name of a decode launch is v (vector) or d (dot), tile x least tokens of a split, w warps, s stages, and p programs
on an SM unless it is 4. If FlashInfer is installed, its kernel is a column as well, including the rotation and KV write
that must precede it. TB/s counts the KV of the contexts, TFLOP/s the causal half of the products. `bench_kv_cache`
compares keys and values of 8 bits with bf16.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from benchmarks.report import new_parser, print_cells, require_gpu
from benchmarks.shapes import shape_arch
from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.attention_decode import DecodeLaunch, attention_workspace, decode_attention, decode_launch
from llmengine.kernels.attention_prefill import PrefillLaunch, prefill_attention, prefill_launch, rope_and_write
from llmengine.kernels.attention_reference import (
    decode_attention_reference,
    dequantized,
    prefill_attention_reference,
)
from llmengine.kernels.flashinfer_attention import FlashInferDecode, is_installed
from llmengine.kernels.kv_blocks import KvBlocks
from llmengine.kernels.limits import max_shared_bytes
from llmengine.kernels.step import NUM_DECODES, NUM_QUERY_BLOCKS, NUM_ROWS, NUM_TOKENS, DeviceStep
from llmengine.kernels.timing import time_graph

MODELS = ["135m", "1b", "7b", "8b"]
DECODES = [(rows, context) for context in (192, 1024) for rows in (1, 8, 64, 256)]
FLASHINFER = "flashinfer"
PREFILLS = [(16, 128), (1, 2048)]
MHA_LAUNCHES = ["v16x64w2s1", "v16x256w1s1", "v32x256w2s1", "v64x256w4s1", "d64x256w4s5"]
GQA_LAUNCHES = ["d32x64w1s3", "d64x64w4s3", "d32x256w4s5", "d64x256w4s5", "d16x256w2s5"]
DTYPE = torch.bfloat16
MAX_POSITIONS = 8192
COLD_BYTES = 120e6
MAX_LAYERS = 600


def parse_launch(name: str) -> DecodeLaunch:
    """The launch with a name like v64x256w4s1."""
    match = re.fullmatch(r"([vd])(\d+)x(\d+)w(\d+)s(\d+)(?:p(\d+))?", name)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like v64x256w4s1 or d32x64w1s3p8, not {name!r}")
    tile, split, warps, stages = map(int, match.groups()[1:5])
    return DecodeLaunch(tile, split, warps, stages, match[1] == "v", programs_per_sm=int(match[6] or 4))


def parse_decodes(name: str) -> tuple[int, int]:
    """Rows and context of a name like 64x200."""
    match = re.fullmatch(r"(\d+)x(\d+)", name)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be like 64x200, not {name!r}")
    return int(match[1]), int(match[2])


def name_of(launch: DecodeLaunch) -> str:
    """The name of a launch, which `parse_launch` reads."""
    kind = "v" if launch.vector else "d"
    programs = f"p{launch.programs_per_sm}" if launch.programs_per_sm != 4 else ""
    return f"{kind}{launch.tile}x{launch.min_split_tokens}w{launch.num_warps}s{launch.num_stages}{programs}"


def make_step(config: AttentionConfig, rows: Sequence[tuple[int, int]], query_block: int) -> tuple[DeviceStep, int]:
    """A step of rows (context length, tokens), and the number of blocks that it uses; the blocks are scattered."""
    counts = [-(-length // config.block_size) for length, _ in rows]
    num_blocks = sum(counts) + 1
    blocks = (torch.randperm(num_blocks - 1) + 1).int().split(counts)
    tables = torch.zeros(len(rows) + 1, max(counts), dtype=torch.int32)
    starts, positions, slots, query_blocks = [0], [], [], []
    for row, (length, tokens) in enumerate(rows):
        tables[row, : counts[row]] = blocks[row]
        if tokens > 1:
            query_blocks += [(row, start) for start in range(starts[-1], starts[-1] + tokens, query_block)]
        positions += range(length - tokens, length)
        slots += [row] * tokens
        starts.append(starts[-1] + tokens)
    num_decodes = sum(tokens == 1 for _, tokens in rows)
    sizes = {NUM_TOKENS: starts[-1], NUM_ROWS: len(rows), NUM_DECODES: num_decodes, NUM_QUERY_BLOCKS: len(query_blocks)}
    values = {
        "counts": [sizes.get(index, 0) for index in range(8)],
        "positions": positions,
        "token_slots": slots,
        "row_slots": range(len(rows)),
        "row_starts": starts,
        "context_lens": [length for length, _ in rows],
        "query_block_rows": [row for row, _ in query_blocks],
        "query_block_starts": [start for _, start in query_blocks],
    }
    tensors = {
        field.name: torch.tensor(list(values.get(field.name, ())), dtype=torch.int32, device="cuda")
        for field in fields(DeviceStep)
    }
    return DeviceStep(**(tensors | {"block_tables": tables.cuda()})), num_blocks


def random_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> KvBlocks:
    """Normal vectors, [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]."""
    if dtype.itemsize > 1:
        return KvBlocks(torch.randn(shape, dtype=dtype, device="cuda"))
    spread = {torch.int8: 40.0, torch.float8_e4m3fn: 140.0}[dtype]
    numbers = torch.empty(shape, dtype=dtype, device="cuda")
    for layer in numbers:
        layer.copy_((torch.randn(shape[1:], device="cuda") * spread).clamp_(-3.1 * spread, 3.1 * spread))
    return KvBlocks(numbers, (0.9 + 0.2 * torch.rand(shape[:-1], device="cuda")) / spread)


class Layers:
    """Tensors for one step of as many layers as it takes to exceed the L2 cache."""

    def __init__(
        self,
        config: AttentionConfig,
        rows: Sequence[tuple[int, int]],
        query_block: int = 1,
        kv_dtype: torch.dtype = DTYPE,
    ) -> None:
        self.config = config
        self.step, num_blocks = make_step(config, rows, query_block)
        self.num_tokens = sum(tokens for _, tokens in rows)
        shape = (num_blocks, 2, config.num_kv_heads, config.block_size, config.head_dim)
        vector_bytes = config.head_dim * kv_dtype.itemsize + (4 if kv_dtype.itemsize == 1 else 0)
        self.kv_bytes = 2 * config.num_kv_heads * vector_bytes * sum(length for length, _ in rows)
        size = kv_dtype.itemsize * torch.Size(shape).numel()
        self.num_layers = min(max(2, int(COLD_BYTES // size) + 1), MAX_LAYERS)
        self.kv = random_blocks((self.num_layers, *shape), kv_dtype)
        width = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = torch.randn(self.num_tokens, width, dtype=DTYPE, device="cuda")
        self.out = torch.full((self.num_tokens, config.num_heads * config.head_dim), torch.nan, device="cuda").to(DTYPE)
        angles = torch.outer(torch.arange(MAX_POSITIONS), 10000.0 ** -torch.linspace(0, 1, config.head_dim // 2))
        self.rope = torch.cat((angles.cos(), angles.sin()), dim=1).cuda()
        num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.workspace = attention_workspace(config, num_sms, "cuda")
        self.flashinfer: FlashInferDecode | None = None
        if is_installed() and kv_dtype == DTYPE:
            max_blocks = self.step.block_tables.shape[1]
            self.flashinfer = FlashInferDecode(config, DTYPE, len(rows), max_blocks, num_sms, "cuda")
            self.flashinfer.begin(self.step, len(rows))

    def decode(self, layer: int, launch: DecodeLaunch | None, pdl: bool) -> None:
        """Run decode attention of a layer; a launch of None stands for FlashInfer."""
        if launch is None:
            assert self.flashinfer is not None
            self.flashinfer.attend(self.step, self.qkv, self.kv.layer(layer), self.rope, self.config, self.out, pdl=pdl)
            return
        decode_attention(
            self.step,
            self.qkv,
            self.kv.layer(layer),
            self.rope,
            self.config,
            self.out,
            self.workspace,
            pdl=pdl,
            launch=launch,
        )

    def prefill(self, layer: int, launch: PrefillLaunch, pdl: bool) -> None:
        prefill_attention(self.step, self.qkv, self.kv.layer(layer), self.config, self.out, pdl=pdl, launch=launch)

    def write(self, layer: int, pdl: bool) -> None:
        rope_and_write(self.step, self.qkv, self.kv.layer(layer), self.rope, self.config, pdl=pdl)

    def time(self, call: Callable[[int], None]) -> float:
        """Microseconds per layer."""
        return time_graph([lambda layer=layer: call(layer) for layer in range(self.num_layers)])


def check(found: Tensor, expected: Tensor) -> None:
    """Raise if the result is wrong, which includes NaN."""
    error = (found.float() - expected.float()).abs().max().item()
    if not error < 0.03:
        raise AssertionError(f"error {error:.3g}")


def check_blocks(kv: KvBlocks, expected: Tensor) -> None:
    """Raise if blocks do not hold what they should; few numbers of 8 bits may be rounded the other way."""
    if kv.scales is None:
        check(kv.numbers, expected)
    elif not ((dequantized(kv) - expected).abs() < 1e-5).float().mean().item() > 1 - 1e-5:
        raise AssertionError("wrong numbers are written")


def check_decode(
    config: AttentionConfig, launch: DecodeLaunch | None, pdl: bool, kv_dtype: torch.dtype = DTYPE
) -> None:
    lengths = (1, 2, 17, 64, 65, 193, 700, 3000)
    layers = Layers(config, [(length, 1) for length in lengths], kv_dtype=kv_dtype)
    expected, kv = torch.empty_like(layers.out), layers.kv.layer(1)
    decode_attention_reference(layers.step, layers.qkv, kv, layers.rope, config, expected)
    wanted = dequantized(kv)
    layers.decode(1, launch, pdl)
    check(layers.out, expected)
    check_blocks(kv, wanted)


def check_prefill(config: AttentionConfig, launch: PrefillLaunch, pdl: bool, kv_dtype: torch.dtype = DTYPE) -> None:
    layers = Layers(config, [(70, 70), (300, 33), (129, 129)], query_block_of(config, launch), kv_dtype)
    expected = torch.empty_like(layers.out)
    prefill_attention_reference(layers.step, layers.qkv, layers.kv.layer(0), config, expected)
    layers.prefill(0, launch, pdl)
    check(layers.out, expected)


def query_block_of(config: AttentionConfig, launch: PrefillLaunch) -> int:
    return launch.rows // (1 << (config.group - 1).bit_length())


def attempt(run: Callable[[], str]) -> str:
    """The result of `run`, or the kind of its failure: one variant must not end the benchmark."""
    try:
        return run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:40]}"


def bench_decode(
    model: str,
    config: AttentionConfig,
    launches: Sequence[DecodeLaunch | None],
    decodes: Sequence[tuple[int, int]],
    pdl: bool,
) -> None:
    def checked(launch: DecodeLaunch | None) -> str:
        check_decode(config, launch, pdl)
        return ""

    failures = {launch: attempt(lambda launch=launch: checked(launch)) for launch in launches}
    names = [name_of(launch) if launch else FLASHINFER for launch in launches]
    print_cells([f"{model} decode: us, TB/s", *names], 17, first=26)
    for rows, context in decodes:
        layers = Layers(config, [(context, 1)] * rows)

        def measured(launch: DecodeLaunch | None, layers: Layers = layers) -> str:
            time_us = layers.time(lambda layer: layers.decode(layer, launch, pdl))
            return f"{time_us:.1f}, {layers.kv_bytes / time_us * 1e-6:.2f}"

        cells = [failures[launch] or attempt(lambda launch=launch: measured(launch)) for launch in launches]
        print_cells([f"{rows:4} rows x {context:<5} tokens", *cells], 17, first=26)


def bench_prefill(model: str, config: AttentionConfig, pdl: bool) -> None:
    usual = prefill_launch(config, DTYPE, DTYPE, max_shared_bytes(torch.device("cuda")))
    launches = [
        usual,
        replace(usual, num_stages=3),
        replace(usual, tile=32),
        replace(usual, rows=64, num_warps=4),
        replace(usual, rows=64, num_warps=4, num_stages=3),
    ]
    names = [f"r{launch.rows}t{launch.tile}w{launch.num_warps}s{launch.num_stages}" for launch in launches]
    print_cells([f"{model} prefill: us, TFLOP/s", *names, "rope, TB/s"], 17, first=26)
    for rows, length in PREFILLS:

        def measured(launch: PrefillLaunch, rows: int = rows, length: int = length) -> str:
            check_prefill(config, launch, pdl)
            layers = Layers(config, [(length, length)] * rows, query_block_of(config, launch))
            time_us = layers.time(lambda layer: layers.prefill(layer, launch, pdl))
            flops = 2 * rows * length * (length + 1) * config.num_heads * config.head_dim
            return f"{time_us:.1f}, {flops / time_us * 1e-6:.0f}"

        def written(rows: int = rows, length: int = length) -> str:
            layers = Layers(config, [(length, length)] * rows)
            time_us = layers.time(lambda layer: layers.write(layer, pdl))
            return f"{time_us:.1f}, {2 * 2 * layers.qkv.numel() / time_us * 1e-6:.2f}"

        cells = [attempt(lambda launch=launch: measured(launch)) for launch in launches]
        cells.append(attempt(written))
        print_cells([f"{rows:4} x {length} tokens", *cells], 17, first=26)


def main() -> None:
    """Print one table for each model."""
    parser = new_parser("kernels.bench_attention", __doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument(
        "--launch", nargs="+", type=parse_launch, default=[], help="decode launches instead of the usual ones"
    )
    parser.add_argument(
        "--decodes", nargs="+", type=parse_decodes, default=[], help="rows x tokens of context, and no prefills"
    )
    parser.add_argument("--block-size", type=int, default=16, help="tokens per KV block")
    parser.add_argument("--pdl", action="store_true", help="programmatic dependent launch")
    args = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    for model in args.models:
        arch = shape_arch(model)
        config = AttentionConfig(arch.num_heads, arch.num_kv_heads, arch.head_dim, block_size=args.block_size)
        usual = map(parse_launch, MHA_LAUNCHES if config.group == 1 else GQA_LAUNCHES)
        launches = args.launch or list(dict.fromkeys([decode_launch(config, DTYPE), *usual]))
        launches = [*launches, None] if is_installed() else launches
        decodes = args.decodes or [*DECODES, *([(16, 8192)] if model == "8b" else [])]
        bench_decode(model, config, launches, decodes, args.pdl)
        if not args.decodes:
            bench_prefill(model, config, args.pdl)


if __name__ == "__main__":
    main()
