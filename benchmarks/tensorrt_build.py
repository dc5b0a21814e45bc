"""Cost of building TensorRT plans: seconds, sizes and host memory. Plans are built but not executed.

    python -m benchmarks.tensorrt_build                          SmolLM2 and the 1b, 8b and 70b shapes, for SM 8.9
    python -m benchmarks.tensorrt_build --shapes 8b --modes constants --sm 86 120

SmolLM2 is built whole, with its real weights. The other shapes have random weights, and one `mid` plan with constants
stands for all of its kind. One plan is built at a time; "seconds each" is the median of a kind. "peak" is the largest
resident memory of the building process, "more" its excess over an idle process that has loaded the library.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import torch

from benchmarks.report import format_table, median, new_parser
from benchmarks.shapes import shape_arch
from llmengine.backends.tensorrt.builder import BuiltPlan, PlanJob, build_plans
from llmengine.backends.tensorrt.constant_weights import spool_constants
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.spec import BuildTarget, PlacedSegment, make_profiles, segments_by_plan
from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.opening import open_model
from llmengine.cli.demo import find_demo_model
from llmengine.errors import EngineError
from llmengine.models.arch import ModelArch, canonical_shapes

SMOLLM2 = "SmolLM2"
MIB = 1 << 20
HEADER = (
    "shape",
    "weights as",
    "plan",
    "plans",
    "weights MiB",
    "plan MiB",
    "seconds each",
    "seconds all",
    "peak MiB",
    "more MiB",
)


def main() -> None:
    """Build and print one table."""
    parser = new_parser("tensorrt_build", __doc__)
    parser.add_argument("--shapes", nargs="+", default=[SMOLLM2, "1b", "8b", "70b"])
    parser.add_argument("--modes", nargs="+", default=["inputs", "constants"])
    parser.add_argument("--kinds", nargs="+", default=["first", "mid", "last"])
    parser.add_argument("--sm", nargs="+", type=int, default=[89])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-batch-size", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--scratch", type=Path, help="directory for temporary weights and plans")
    options = parser.parse_args()
    rows = [row for shape in options.shapes for mode in options.modes for row in measure(shape, mode, options)]
    print(format_table(HEADER, rows))


def measure(shape: str, mode: str, options: argparse.Namespace) -> list[list[str]]:
    """The table's rows for one shape and weight mode; a failure is a row as well."""
    arch = architecture(shape)
    chosen = [item for item in segments(arch, mode, options) if item.spec.kind in options.kinds]
    if shape != SMOLLM2:
        chosen = list({item.spec.kind: item for item in chosen}.values())
    stream = smollm2_weights(options.dtype) if shape == SMOLLM2 else random_weights(arch, chosen, options.dtype)
    target = BuildTarget(tuple(options.sm))
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        idle = PlanJob("idle", segments(arch, "inputs", options)[0].spec, target, scratch / "idle")
        try:
            built = list(build_plans(jobs(idle, chosen, stream, target, scratch), 1))
        except EngineError as error:
            return [[shape, mode, str(error)[:40], *["-"] * (len(HEADER) - 3)]]
    return table(shape, mode, arch, chosen, built)


def jobs(
    idle: PlanJob,
    chosen: Sequence[PlacedSegment],
    stream: Iterator[tuple[str, torch.Tensor]],
    target: BuildTarget,
    scratch: Path,
) -> Iterator[PlanJob]:
    """Yield the jobs; `idle` comes first, since its peak is the memory of the library itself."""
    yield idle
    if chosen[0].spec.weight_mode == "constants":
        for segment, path in spool_constants(chosen, stream, scratch):
            yield PlanJob(segment.plan_name, segment.spec, target, scratch / "plan", path)
    else:
        for segment in chosen:
            yield PlanJob(segment.plan_name, segment.spec, target, scratch / "plan")


def table(
    shape: str, mode: str, arch: ModelArch, chosen: Sequence[PlacedSegment], built: Sequence[BuiltPlan]
) -> list[list[str]]:
    """A row of largest figures for each kind of plan, and for constants the seconds of the whole model."""
    idle = built[0].peak_host_bytes or 0
    rows = []
    for kind in dict.fromkeys(segment.spec.kind for segment in chosen):
        names = {segment.plan_name: segment for segment in chosen if segment.spec.kind == kind}
        plans = [plan for plan in built if plan.name in names]
        weights = max(sum(weight.size_bytes for weight in names[plan.name].spec.weights) for plan in plans)
        num_plans = arch.num_layers - 1 if kind == "mid" and mode == "constants" else 1
        seconds = median([plan.seconds for plan in plans])
        peak = max(plan.peak_host_bytes or 0 for plan in plans)
        size = max(plan.size_bytes for plan in plans)
        figures = [
            num_plans,
            f"{weights / MIB:.1f}",
            f"{size / MIB:.2f}",
            f"{seconds:.2f}",
            f"{seconds * num_plans:.1f}",
        ]
        rows.append([shape, mode, kind, *map(str, figures), f"{peak / MIB:.0f}", f"{(peak - idle) / MIB:.0f}"])
    return rows


def segments(arch: ModelArch, mode: str, options: argparse.Namespace) -> list[PlacedSegment]:
    """One segment for each plan of a model."""
    profiles = make_profiles(options.max_batch_size, options.max_tokens)
    return list(segments_by_plan(segments_of(arch, options.dtype, profiles, mode)).values())  # type: ignore[arg-type]


def architecture(shape: str) -> ModelArch:
    """SmolLM2's architecture, or that of a shape."""
    return open_model(find_demo_model()).arch if shape == SMOLLM2 else shape_arch(shape)


def smollm2_weights(dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream SmolLM2's real weights."""
    return without_blocks(open_model(find_demo_model())).weights(getattr(torch, dtype))


def random_weights(arch: ModelArch, chosen: Sequence[PlacedSegment], dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Stream noise for the weights that the chosen segments read."""
    read = {name for segment in chosen for name in segment.weight_names().values()}
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(getattr(torch, dtype))
    for name, shape in canonical_shapes(arch).items():
        if name in read:
            size = prod(shape)
            yield name, noise.repeat(-(-size // len(noise)))[:size].view(shape)


if __name__ == "__main__":
    main()
