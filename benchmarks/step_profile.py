"""Where the GPU's time goes in a step of N decodes: each kernel's part, as `torch.profiler` sees them.

    python -m benchmarks.step_profile --shape 8b --dtype bfloat16 --streams 64

N requests stream meanwhile, so the steps are those of a running engine, with its graphs. What is between the sum of the
kernels and the time of a step are gaps, less what kernels overlap (each may start while the one before ends).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import anyio

from benchmarks.report import append_json, format_table, machine, require_gpu
from benchmarks.shapes import SHAPES, write_shape
from llmengine import LLM, KvCacheConfig, ModelConfig, SamplingParams, SchedulerConfig

_CONTEXT = 4096
_MAX_NAME = 70


def kernel_rows(kernels: Iterable[tuple[str, float]], num_steps: int) -> list[tuple[str, float, float, float]]:
    """Return (name, launches a step, microseconds a launch, microseconds a step), the longest first.

    Args:
        kernels: (name, microseconds) of each launch.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for name, microseconds in kernels:
        found[name].append(microseconds)
    rows = [
        (name, len(times) / num_steps, sum(times) / len(times), sum(times) / num_steps) for name, times in found.items()
    ]
    return sorted(rows, key=lambda row: -row[3])


async def profile_decodes(llm: LLM, arguments: argparse.Namespace) -> tuple[list[tuple[str, float]], int, float]:
    """Let requests stream; return the kernels of some steps, how many steps these were, and their seconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):
        pass  # the first one takes long to begin, and tokens would be generated meanwhile
    params = SamplingParams(max_new_tokens=_CONTEXT - arguments.prompt_tokens, ignore_eos=True)
    prompts = [[2 + stream % 500] * arguments.prompt_tokens for stream in range(arguments.streams)]
    handles = [llm.generate_async(prompt, params, streaming=True) for prompt in prompts]
    for handle in handles:
        await anext(handle)
    await anyio.sleep(arguments.seconds)  # graphs are captured meanwhile
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        before, began = llm.stats().counters.num_steps, time.perf_counter()
        await anyio.sleep(arguments.seconds)
        num_steps, seconds = llm.stats().counters.num_steps - before, time.perf_counter() - began
    if any(handle.done for handle in handles) or num_steps == 0:
        raise SystemExit(f"requests ended before {arguments.seconds} s were over: use fewer --seconds")
    for handle in handles:
        handle.abort()
    device = torch.autograd.DeviceType.CUDA
    return (
        [(event.name, event.device_time) for event in profiled.events() if event.device_type == device],
        num_steps,
        seconds,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Profile and print the table."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.step_profile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--streams", type=int, default=64, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.5, help="of the profile, and of the warm-up before it")
    parser.add_argument("--tuning-budget", type=float, default=ModelConfig(".").tuning_budget_s, metavar="SECONDS")
    parser.add_argument("--most", type=int, default=14, metavar="N", help="rows of the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line")
    arguments = parser.parse_args(argv)
    require_gpu()
    with tempfile.TemporaryDirectory() as directory:
        config = ModelConfig(
            write_shape(arguments.shape, Path(directory)),
            load_format="dummy",
            dtype=arguments.dtype,
            device="cuda",
            max_model_len=_CONTEXT,
            tuning_budget_s=arguments.tuning_budget,
            kv_cache_config=KvCacheConfig(enable_prefix_caching=False),
            scheduler_config=SchedulerConfig(max_batch_size=arguments.streams),
        )
        with LLM(config, enable_tokenizer=False) as llm:
            kernels, num_steps, seconds = anyio.run(profile_decodes, llm, arguments)
            description = llm.info.description
    rows = kernel_rows(kernels, num_steps)
    sum_us, step_us = sum(row[3] for row in rows), 1e6 * seconds / num_steps
    print(f"{description}\n{num_steps} steps of {arguments.streams} decodes, {step_us:.0f} us each")
    print(f"kernels: {sum_us:.0f} us\n")
    columns = ["kernel", "launches a step", "us a launch", "us a step"]
    print(
        format_table(
            columns,
            [
                [name[:_MAX_NAME], f"{count:.1f}", f"{each:.2f}", f"{all_us:.1f}"]
                for name, count, each, all_us in rows[: arguments.most]
            ],
        )
    )
    append_json(
        arguments.json,
        {
            "benchmark": "step profile",
            "machine": machine(),
            "arguments": vars(arguments),
            "engine": {"description": description},
            "results": {"step_us": step_us, "kernels": rows},
        },
    )


if __name__ == "__main__":
    main()
