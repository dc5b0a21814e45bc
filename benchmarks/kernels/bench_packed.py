"""Times of products with quantized weights, cold, in a CUDA graph, beside bfloat16 on cuBLASLt; results checked.

python -m benchmarks.kernels.bench_packed [8b] [--formats bf16 int4-128 fp8 ...] [--rows 1 8 16 64 256 2048]
    [--configs packed-m8n64w4s4x2 ...] [--budget 140] [--json FILE]
python -m benchmarks.kernels.bench_packed --report FILE...

For each product, format and number of rows (M), every one of the `gemm_candidates`, the fastest marked; then tables of
the fastest, and of a layer's four products together. TB/s counts the packed weights, TFLOP/s the multiplications. Norm
and activation are part of a product. A result is WRONG if it differs from the product with the dequantized weights, in
float32, by more than rounding does; that of activations to 8 bits counts as error too. Ends after `--budget` seconds,
whatever is left; `--report` makes the tables from the records of earlier runs.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels.bench_linear import COLD_BYTES, EPS, shape_of
from benchmarks.kernels.product_tables import BASELINE, LAYER, Result, fastest, tables, wrong_results
from benchmarks.report import add_json, append_record, new_parser, read_records, require_gpu
from benchmarks.shapes import SHAPES
from llmengine.kernels.cuda_program import can_compile
from llmengine.kernels.gemm_candidates import candidates
from llmengine.kernels.gemm_config import GemmShape, LinearConfig, parse_config
from llmengine.kernels.limits import max_shared_bytes, tiled_sms
from llmengine.kernels.linear import LinearKernels, linear_reference
from llmengine.kernels.linear_ops import DeviceMatrix, LinearOps, compile_product, has_kernel, quantized_matrix
from llmengine.kernels.quantized_matrix import QuantizedMatrix
from llmengine.kernels.timing import time_graph
from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import DENSE, Shape, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS, SCALE_OFFSETS, GgufBlocks
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4

FORMATS: Mapping[str, WeightFormat] = {
    BASELINE: DENSE,
    "int4-128": Int4Groups(128, zero_points=False),
    "int4-128z": Int4Groups(128),
    "int8": INT8,
    "int4-64z": Int4Groups(64),
    "int4-32z": Int4Groups(32),
    "mxfp4": Mxfp4(),
    "nvfp4": Nvfp4(),
    "nf4": Bnb4Bit("nf4", 64),
    "fp4": Bnb4Bit("fp4", 64),
    "fp8": Fp8("channel", "token"),
    "fp8-tensor": Fp8("tensor", "token"),
    "fp8-block": Fp8("block", "block"),
    "w8a8": Int8W8A8("channel", "token"),
    "fp8-weights": Fp8("channel", "none"),
    "int8-128z": Int8Groups(128),
    **{name.lower(): GGUF_BLOCKS[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    **{
        name.lower(): GGUF_BLOCKS[name]
        for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "TQ2_0")
    },
}
USUAL = (BASELINE, "int4-128", "fp8", "int4-128z", "int8", "w8a8")
BENCHMARK = "packed products"
TOLERANCE = 0.02
TOLERANCE_8_BITS = 0.08
REPEATS = 3


class PackedBench:
    """One product in one format: copies of a random matrix, more than the L2 holds, and operands of any rows."""

    def __init__(self, kernels: LinearKernels, shape: GemmShape) -> None:
        self.kernels = kernels
        self.shape = shape
        self.weight = (torch.randn(shape.matrix_shape, device="cuda") * shape.k**-0.5).to(shape.dtype)
        first = self._matrix()
        self.size_bytes = first.size_bytes
        self.matrices = [first, *(self._copy(first) for _ in range(max(1, -(-COLD_BYTES // self.size_bytes) - 1)))]
        self.norm_weight = torch.rand(shape.k, device="cuda").to(shape.dtype)
        if isinstance(first, QuantizedMatrix):
            self.weight = first.stored().dequantized()

    def _matrix(self) -> DeviceMatrix:
        shape = self.shape
        matrix = quantized_matrix(shape.weight_format, shape.matrix_shape, shape.dtype, "cuda")
        if matrix is None:
            return Matrix.dense(self.weight)
        if isinstance(shape.weight_format, GgufBlocks):  # ggml's own search quantizes to some of them
            matrix.fill({"weight": random_blocks(shape.weight_format, shape.matrix_shape)})
        else:
            matrix.fill(shape.weight_format.quantize(self.weight))
        return matrix

    def _copy(self, first: DeviceMatrix) -> DeviceMatrix:
        if isinstance(first, Matrix):
            return Matrix.dense(first.weight.clone())
        copy = quantized_matrix(first.format, first.shape, self.shape.dtype, "cuda")
        assert copy is not None
        for name, tensor in first.tensors.items():
            copy.tensors[name].copy_(tensor)
        return copy

    def measure(self, shape: GemmShape, config: LinearConfig) -> tuple[float, float]:
        """Microseconds, and the largest error relative to the largest result."""
        ops = LinearOps(self.kernels, lambda _: config)
        x = (torch.randn(shape.num_rows, shape.k, device="cuda") * 3).to(shape.dtype)
        out = torch.randn(shape.num_rows, shape.n, device="cuda").to(shape.out_dtype)
        added = shape.operation == "linear_add"
        expected = linear_reference(
            *(shape.operation, x, None if added else self.norm_weight, EPS, self.weight, None, out if added else None)
        )
        if added:
            linears = [ops.linear_add(matrix) for matrix in self.matrices]
        else:
            bind = ops.norm_linear_silu if shape.operation == "norm_linear_silu" else ops.norm_linear
            linears = [bind(self.norm_weight, EPS, matrix) for matrix in self.matrices]
        linears[0](x, out)
        error = float((out.float() - expected).abs().max() / expected.abs().max())
        return time_graph([partial(linear, x, out) for linear in linears], REPEATS), error


def random_blocks(blocks: GgufBlocks, shape: Shape) -> Tensor:
    """Blocks of random bytes whose scales and minima are finite and small, on the GPU."""
    rows, columns = shape
    stored = torch.randint(
        *(0, 256), (rows, columns // blocks.block_size, blocks.block_bytes), dtype=torch.uint8, device="cuda"
    )
    for offset in SCALE_OFFSETS[blocks.type_name]:
        scales = torch.rand((*stored.shape[:2], 1), device="cuda").mul_(1e-3).half()
        stored[:, :, offset : offset + 2] = scales.view(torch.uint8)
    return stored


def configs_of(shape: GemmShape, extra: list[LinearConfig]) -> list[LinearConfig]:
    """Every candidate, and `extra` ones for quantized matrices."""
    device = torch.device("cuda", torch.cuda.current_device())
    usual = candidates(shape, max_shared_bytes(device), tiled_sms(device), can_compile())
    return list(dict.fromkeys([*usual, *(extra if shape.is_quantized else ())]))


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured of a product in a format: for each number of rows the configurations, while kernels compile."""

    shapes: Sequence[tuple[GemmShape, list[LinearConfig]]]
    compiled: Sequence[Future[None]]


def plan(
    kernels: LinearKernels, threads: ThreadPoolExecutor, product: str, format_name: str, arguments: Namespace
) -> Plan:
    """Begin to compile the kernels of a product, each once, beside each other."""
    shapes = []
    for num_rows in arguments.rows:
        dense = shape_of(arguments.model, product, num_rows, torch.bfloat16)
        shape = replace(dense, weight_format=FORMATS[format_name])
        shapes.append((shape, configs_of(shape, arguments.configs)))
    jobs = {
        (replace(shape, num_rows=0), config): (shape, config)
        for shape, configs in shapes
        for config in configs
        if has_kernel(shape, config)
    }
    return Plan(shapes, [threads.submit(compile_product, kernels, *job) for job in jobs.values()])


def measure_configs(
    bench: PackedBench,
    product: str,
    format_name: str,
    shape: GemmShape,
    configs: Sequence[LinearConfig],
    args: Namespace,
) -> Iterator[Result]:
    """Yield the result with each configuration that runs, until `args.deadline`; a line is printed for each."""
    most = TOLERANCE_8_BITS if shape.is_scaled else TOLERANCE
    for config in configs:
        if time.monotonic() > args.deadline:
            return
        line = f"{format_name} {product} {shape.n}x{shape.k} M={shape.num_rows:<5}{config!s:24}"
        try:
            us, error = bench.measure(shape, config)
        except Exception as failure:  # one variant must not end the benchmark
            print(f"{line} {failure!r}"[:300], flush=True)
            continue
        flops = 2.0 * shape.num_rows * shape.matrix_shape[0] * shape.k
        is_right = error < most  # NaN is wrong as well
        sizes = bench.size_bytes, flops
        result = Result(args.model, format_name, product, shape.num_rows, str(config), us, *sizes, error, is_right)
        us_text, rate, tflops = result.speed.cells
        wrong = "" if is_right else " WRONG"
        print(f"{line}{us_text:>9} us {rate} TB/s {tflops:>6} TFLOP/s error {error:.1e}{wrong}", flush=True)
        yield result


def measure_all(args: Namespace) -> list[Result]:
    """Measure what the arguments name, and append a record of each result."""
    kernels = LinearKernels("cuda", pdl=torch.cuda.get_device_capability() >= (9, 0))
    results: list[Result] = []
    threads = ThreadPoolExecutor(16)
    wanted = [(product, format_name) for format_name in args.formats for product in LAYER]
    plans = deque(plan(kernels, threads, *names, args) for names in wanted[:2])
    for index, (product, format_name) in enumerate(wanted):
        if time.monotonic() > args.deadline:
            break
        if index + 2 < len(wanted):  # compiled while these are measured
            plans.append(plan(kernels, threads, *wanted[index + 2], args))
        current = plans.popleft()
        wait(current.compiled)
        bench = PackedBench(kernels, current.shapes[0][0])
        for shape, configs in current.shapes:
            measured = list(measure_configs(bench, product, format_name, shape, configs, args))
            for result in measured:
                append_record(args, BENCHMARK, asdict(result))
            for best in fastest(measured).values():
                print(f"* {format_name} {product} M={best.rows}: {best.config} {best.us:.2f} us", flush=True)
            results += measured
        del bench
        torch.cuda.empty_cache()
    threads.shutdown(cancel_futures=True)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments name, or read earlier results, and print the tables; return 1 if one is wrong."""
    began = time.monotonic()
    parser = new_parser("kernels.bench_packed", __doc__)
    parser.add_argument("model", nargs="?", choices=SHAPES, default="8b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=USUAL)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 64, 256, 2048])
    parser.add_argument("--configs", type=parse_config, nargs="+", default=[])
    parser.add_argument("--budget", type=float, default=140.0, metavar="SECONDS")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="measure nothing: tables of these results"
    )
    add_json(parser)
    args = parser.parse_args(argv)
    if args.report is not None:
        results = [Result(**record["results"]) for record in read_records(args.report, BENCHMARK)]
    else:
        require_gpu()
        args.deadline = began + args.budget
        results = measure_all(args)
        print(f"\n{time.monotonic() - began:.1f} s\n")
    print(tables(results))
    return 1 if wrong_results(results) else 0


if __name__ == "__main__":
    sys.exit(main())
