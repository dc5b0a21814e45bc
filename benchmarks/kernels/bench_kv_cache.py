"""Times of attention on the GPU with keys and values in bf16 and in 8 bits; every kernel is checked first.

python -m benchmarks.kernels.bench_kv_cache [8b 7b 135m] [--decodes 16x8192 ...] [--usual] [--block-size 32]

Cells are microseconds a layer, TB/s of what is read (for prefills TFLOP/s of the causal half), and the speed beside
bf16. Contexts are cold, and calls are in a CUDA graph, as steps are. Besides the parameters that each format usually
has, fp8 is measured with some others, unless `--usual` is given. `bench_attention` says how launches are named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from benchmarks.kernels.bench_attention import (
    DTYPE,
    Layers,
    attempt,
    check_decode,
    check_prefill,
    name_of,
    parse_decodes,
    parse_launch,
    query_block_of,
)
from benchmarks.report import new_parser, print_cells, require_gpu
from benchmarks.shapes import shape_arch
from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.attention_decode import DecodeLaunch, decode_launch
from llmengine.kernels.attention_prefill import PrefillLaunch, prefill_launch
from llmengine.kernels.limits import max_shared_bytes

MODELS = ["8b", "7b"]
FORMATS = {"bf16": DTYPE, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
DECODES = [(1, 1024), (1, 8192), (16, 1024), (16, 8192), (64, 200), (64, 2048), (256, 200)]
PREFILLS = [(16, 128), (1, 2048)]
CHUNKS = [(8192, 512)]
GQA_LAUNCHES = ["d32x64w1s3", "d32x256w1s3p8", "d32x64w1s3p12", "d32x64w1s5p8", "d64x64w2s3p8", "d64x128w2s5p8"]
MHA_LAUNCHES = ["v32x64w2s1", "v16x64w1s1", "v16x64w2s1p8", "d32x64w1s3", "d32x64w1s3p8"]
WIDTH, FIRST = 20, 26


def speed_cell(time_us: float, rate: str, bf16_us: float | None) -> str:
    """Microseconds, a rate, and how many times as fast as bf16."""
    return f"{time_us:.1f}, {rate}" + (f", {bf16_us / time_us:.2f}x" if bf16_us else "")


class Formats:
    """The cells of one row of a table, in which the first column is bf16."""

    def __init__(self) -> None:
        self.bf16_us: float | None = None

    def cell(self, run: Callable[[], tuple[float, str]]) -> str:
        """A cell of what `run` measures: microseconds and a rate."""

        def measured() -> str:
            time_us, rate = run()
            text = speed_cell(time_us, rate, self.bf16_us)
            self.bf16_us = self.bf16_us or time_us
            return text

        return attempt(measured)


def failures_of(checks: Sequence[Callable[[], None]]) -> list[str]:
    """What each check failed with, or empty; kernels are compiled on threads."""

    def failure(check: Callable[[], None]) -> str:
        def run() -> str:
            check()
            return ""

        return attempt(run)

    first, *others = checks
    found = [failure(first)]  # alone: with its first kernel Triton hashes itself
    with ThreadPoolExecutor(8) as threads:
        return found + list(threads.map(failure, others))


def bench_decodes(
    model: str,
    config: AttentionConfig,
    variants: Sequence[tuple[str, DecodeLaunch]],
    decodes: Sequence[tuple[int, int]],
) -> None:
    """Print a table of decodes: rows x context by variants, which are formats with their launches."""

    failures = failures_of(
        [partial(check_decode, config, launch, pdl=True, kv_dtype=FORMATS[kv]) for kv, launch in variants]
    )
    print_cells([f"{model} decode: us, TB/s", *(kv for kv, _ in variants)], WIDTH, first=FIRST)
    print_cells(["", *(name_of(launch) for _, launch in variants)], WIDTH, first=FIRST)
    for rows, context in decodes:

        def measured(kv: str, launch: DecodeLaunch, rows: int = rows, context: int = context) -> tuple[float, str]:
            layers = Layers(config, [(context, 1)] * rows, kv_dtype=FORMATS[kv])
            time_us = layers.time(lambda layer: layers.decode(layer, launch, True))
            return time_us, f"{layers.kv_bytes / time_us * 1e-6:.2f}"

        row = Formats()
        cells = [
            failure or row.cell(lambda kv=kv, launch=launch: measured(kv, launch))
            for (kv, launch), failure in zip(variants, failures, strict=True)
        ]
        print_cells([f"{rows:4} rows x {context:<5} tokens", *cells], WIDTH, first=FIRST)


def bench_prefills(model: str, config: AttentionConfig, variants: Sequence[tuple[str, PrefillLaunch]]) -> None:
    """Print a table of prompts, and of a chunk at the end of a long one, by variants; then of the KV write."""

    failures = failures_of(
        [partial(check_prefill, config, launch, pdl=True, kv_dtype=FORMATS[kv]) for kv, launch in variants]
    )
    print_cells([f"{model} prefill: us, TFLOP/s", *(kv for kv, _ in variants)], WIDTH, first=FIRST)
    names = [f"r{launch.rows}t{launch.tile}w{launch.num_warps}s{launch.num_stages}" for _, launch in variants]
    print_cells(["", *names], WIDTH, first=FIRST)
    steps = [[(length, length)] * rows for rows, length in PREFILLS] + [[chunk] for chunk in CHUNKS]
    for step in steps:

        def measured(kv: str, launch: PrefillLaunch, step: Sequence[tuple[int, int]] = step) -> tuple[float, str]:
            layers = Layers(config, step, query_block_of(config, launch), FORMATS[kv])
            time_us = layers.time(lambda layer: layers.prefill(layer, launch, True))
            pairs = sum(tokens * length - tokens * (tokens - 1) // 2 for length, tokens in step)
            return time_us, f"{4 * pairs * config.num_heads * config.head_dim / time_us * 1e-6:.0f}"

        row = Formats()
        cells = [
            failure or row.cell(lambda kv=kv, launch=launch: measured(kv, launch))
            for (kv, launch), failure in zip(variants, failures, strict=True)
        ]
        length, tokens = step[0]
        print_cells([f"{len(step):4} x {tokens} tokens of {length}", *cells], WIDTH, first=FIRST)


def bench_writes(model: str, config: AttentionConfig) -> None:
    """Print a table of rotation and KV write."""
    print_cells([f"{model} rotate and write: us", *FORMATS], WIDTH, first=FIRST)
    for num_tokens in (64, 2048):

        def measured(kv: str, num_tokens: int = num_tokens) -> tuple[float, str]:
            layers = Layers(config, [(num_tokens, num_tokens)], kv_dtype=FORMATS[kv])
            time_us = layers.time(lambda layer: layers.write(layer, True))
            return time_us, f"{2 * 2 * layers.qkv.numel() / time_us * 1e-6:.2f}"

        row = Formats()
        print_cells(
            [f"{num_tokens:4} tokens", *(row.cell(lambda kv=kv: measured(kv)) for kv in FORMATS)], WIDTH, first=FIRST
        )


def prefill_variants(config: AttentionConfig, compare: bool) -> list[tuple[str, PrefillLaunch]]:
    """Formats with the launches that they take, or with several."""
    shared = max_shared_bytes(torch.device("cuda"))
    usual = {kv: prefill_launch(config, DTYPE, dtype, shared) for kv, dtype in FORMATS.items()}
    variants = list(usual.items())
    if compare:
        launch = usual["fp8"]
        others = [
            dataclasses.replace(launch, num_stages=8 - launch.num_stages),
            dataclasses.replace(launch, tile=launch.tile // 2),
            dataclasses.replace(launch, rows=64, num_warps=4, num_stages=3),
            dataclasses.replace(launch, num_warps=4),
        ]
        variants += [("fp8", other) for other in others]
    return variants


def main() -> None:
    """Print the tables of each model."""
    parser = new_parser("kernels.bench_kv_cache", __doc__)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument(
        "--decodes", nargs="+", type=parse_decodes, default=[], help="rows x tokens of context, and no prefills"
    )
    parser.add_argument("--usual", action="store_true", help="only the parameters that each format usually has")
    parser.add_argument("--block-size", type=int, default=32, help="tokens per KV block")
    args = parser.parse_args()
    require_gpu()
    torch.manual_seed(0)
    for model in args.models:
        arch = shape_arch(model)
        config = AttentionConfig(arch.num_heads, arch.num_kv_heads, arch.head_dim, block_size=args.block_size)
        variants = [(kv, decode_launch(config, dtype)) for kv, dtype in FORMATS.items()]
        if not args.usual:
            names = map(parse_launch, MHA_LAUNCHES if config.group == 1 else GQA_LAUNCHES)
            variants += [("fp8", launch) for launch in names]
        bench_decodes(model, config, variants, args.decodes or DECODES)
        if not args.decodes:
            bench_prefills(model, config, prefill_variants(config, compare=not args.usual))
            bench_writes(model, config)


if __name__ == "__main__":
    main()
