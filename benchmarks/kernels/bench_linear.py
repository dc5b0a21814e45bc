"""Times of every implementation of a model's matrix products with cold weights in a CUDA graph; results are checked.

python -m benchmarks.kernels.bench_linear 135m [qkv o gate_up down lm_head] [--rows 1 8 16 32 64 256]
    [--configs m16n32k128w4s4 ...] [--no-pdl] [--fp16]

`--configs` adds configurations to the candidates. TB/s counts only the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from benchmarks.report import new_parser, require_gpu
from benchmarks.shapes import SHAPES, shape_arch
from llmengine.kernels.activation import silu_and_mul
from llmengine.kernels.gemm_candidates import candidates
from llmengine.kernels.gemm_config import GemmShape, LinearConfig, Operation, SkinnyConfig, parse_config
from llmengine.kernels.limits import max_shared_bytes, tiled_sms
from llmengine.kernels.linear import LinearKernels, linear_reference
from llmengine.kernels.norm import rms_norm
from llmengine.kernels.timing import time_graph

PRODUCTS = ("qkv", "o", "gate_up", "down", "lm_head")
EPS = 1e-5
TOLERANCE = 0.02
COLD_BYTES = 160 << 20


def shape_of(model: str, product: str, num_rows: int, dtype: torch.dtype) -> GemmShape:
    """The shape of a model's product."""
    arch = shape_arch(model)
    hidden, intermediate = arch.hidden_size, arch.intermediate_size
    q_size, kv_size = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    operation: Operation
    operation, n, k = {
        "qkv": ("norm_linear", q_size + 2 * kv_size, hidden),
        "o": ("linear_add", hidden, q_size),
        "gate_up": ("norm_linear_silu", intermediate, hidden),
        "down": ("linear_add", hidden, intermediate),
        "lm_head": ("norm_linear", arch.vocab_size, hidden),
    }[product]
    return GemmShape(operation, num_rows, n, k, dtype, torch.float32 if product == "lm_head" else dtype)


def error_of(kernels: LinearKernels, shape: GemmShape, config: LinearConfig) -> float:
    """Largest error of the result relative to the largest element of the fp32 reference, for random operands."""

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, device="cuda") * scale).to(shape.dtype)

    gated = shape.operation == "norm_linear_silu"
    x, norm_weight = draw(shape.num_rows, shape.k, scale=3.0), draw(shape.k)
    weight = draw(shape.n * (2 if gated else 1), shape.k, scale=shape.k**-0.5)
    out = draw(shape.num_rows, shape.n).to(shape.out_dtype)
    if shape.operation == "linear_add":
        expected = linear_reference(shape.operation, x, None, EPS, weight, None, out)
        kernels.linear_add(x, weight, None, out, config)
    else:
        expected = linear_reference(shape.operation, x, norm_weight, EPS, weight, None)
        operation = kernels.norm_linear_silu if gated else kernels.norm_linear
        operation(x, norm_weight, EPS, weight, None, out.fill_(torch.nan), config)
    return float((out.float() - expected).abs().max() / expected.abs().max())


def time_us(kernels: LinearKernels, shape: GemmShape, config: LinearConfig) -> float:
    """Microseconds of the shape's operation with weights that are not in the L2 cache."""
    num_rows = shape.n * (2 if shape.operation == "norm_linear_silu" else 1)
    # Random, since memory and chip are faster with zeros.
    weights = [
        (torch.randn(num_rows, shape.k, device="cuda") * 0.02).to(shape.dtype)
        for _ in range(-(-COLD_BYTES // (num_rows * shape.k * shape.dtype.itemsize)))
    ]
    x = torch.randn(shape.num_rows, shape.k, device="cuda").to(shape.dtype)
    norm_weight = torch.ones(shape.k, device="cuda", dtype=shape.dtype)
    out = torch.zeros(shape.num_rows, shape.n, device="cuda", dtype=shape.out_dtype)

    def run(weight: torch.Tensor) -> None:
        if shape.operation == "linear_add":
            kernels.linear_add(x, weight, None, out, config)
        else:
            operation = getattr(kernels, shape.operation)
            operation(x, norm_weight, EPS, weight, None, out, config)

    return time_graph([partial(run, weight) for weight in weights])


def can_run(shape: GemmShape, config: LinearConfig) -> bool:
    """Whether the configuration supports the shape's rows and operation."""
    if not isinstance(config, SkinnyConfig):
        return True
    takes_rows = config.any_rows or config.block_m >= shape.num_rows
    return takes_rows and (config.split_k == 1 or shape.operation == "linear_add")


def bench_product(kernels: LinearKernels, name: str, shape: GemmShape, extra: Sequence[LinearConfig]) -> None:
    """Print a line for each implementation and mark the fastest."""
    size_bytes = shape.n * shape.k * shape.dtype.itemsize * (2 if shape.operation == "norm_linear_silu" else 1)
    device = torch.device("cuda", torch.cuda.current_device())
    usual = candidates(shape, max_shared_bytes(device), tiled_sms(device))
    configs = [config for config in dict.fromkeys([*usual, *extra]) if can_run(shape, config)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(partial(kernels.compile, shape), (one for one in configs if isinstance(one, SkinnyConfig))))
    times: dict[LinearConfig, float] = {}
    notes: dict[LinearConfig, str] = {}
    for config in configs:
        try:
            times[config] = time_us(kernels, shape, config)
            error = error_of(kernels, shape, config)
            notes[config] = "" if error < TOLERANCE else f" WRONG by {error:.3g}"  # NaN is wrong as well
        except Exception as failure:  # one variant must not end the benchmark
            print(f"{name} M={shape.num_rows} {config}: {failure!r}"[:200])
    best = min(times, key=times.__getitem__, default=None)
    for config, us in times.items():
        speed = size_bytes / us / 1e6
        mark = " *" if config == best else ""
        print(f"{name} M={shape.num_rows:<4}{config!s:28}{us:9.2f} us {speed:5.2f} TB/s{notes[config]}{mark}")


def bench_rows(model: str, dtype: torch.dtype, pdl: bool) -> None:
    """Print the times of the row-wise kernels around cuBLAS."""
    arch = shape_arch(model)
    hidden, intermediate = arch.hidden_size, arch.intermediate_size
    weight = torch.ones(hidden, device="cuda", dtype=dtype)
    for num_rows in (1, 256, 8192):
        x = torch.randn(num_rows, hidden, device="cuda").to(dtype)
        gate_up = torch.randn(num_rows, 2 * intermediate, device="cuda").to(dtype)
        normed, activated = torch.empty_like(x), gate_up.new_empty(num_rows, intermediate)
        norm_us = time_graph([lambda x=x, out=normed: rms_norm(x, weight, EPS, out, pdl)] * 20)
        silu_us = time_graph([lambda x=gate_up, out=activated: silu_and_mul(x, out, pdl)] * 20)
        print(f"{model} M={num_rows:<5} rms_norm {norm_us:7.2f} us, silu_and_mul {silu_us:7.2f} us (warm)")


def main() -> None:
    """Measure the products that the arguments name."""
    parser = new_parser("kernels.bench_linear", __doc__)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("products", nargs="*", metavar="product", help=f"of {', '.join(PRODUCTS)}; all if none")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64, 256])
    parser.add_argument("--configs", type=parse_config, nargs="+", default=[])
    parser.add_argument("--no-pdl", action="store_true")
    parser.add_argument("--fp16", action="store_true")
    arguments = parser.parse_args()
    require_gpu()
    dtype = torch.float16 if arguments.fp16 else torch.bfloat16
    pdl = not arguments.no_pdl and torch.cuda.get_device_capability() >= (9, 0)
    kernels = LinearKernels("cuda", pdl)
    bench_rows(arguments.model, dtype, pdl)
    for product in arguments.products or PRODUCTS:
        for num_rows in arguments.rows:
            shape = shape_of(arguments.model, product, num_rows, dtype)
            name = f"{arguments.model} {product} {shape.n}x{shape.k}"
            bench_product(kernels, name, shape, arguments.configs)


if __name__ == "__main__":
    main()
