"""Where the GPU spends a step of N decodes: the time of each kernel according to `torch.profiler`.

    python -m benchmarks.step_profile --shape 8b --dtype bfloat16 --streams 64

N requests stream during the profile, so the steps are those of a running engine, with its graphs. The difference
between the sum of the kernels and the time of a step is gaps, less the overlap of kernels that start before their
predecessors end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import anyio

from benchmarks.models import add_quantization, add_shape, add_tuning_budget, load_chosen
from benchmarks.report import add_json, append_record, format_table, new_parser, require_gpu
from benchmarks.workloads import exact_length
from llmengine import LLM, SchedulerConfig

_CONTEXT = 4096
_MAX_NAME = 70


def kernel_rows(kernels: Iterable[tuple[str, float]], num_steps: int) -> list[tuple[str, float, float, float]]:
    """(name, launches per step, microseconds per launch, microseconds per step), the longest first.

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
    """Profile some steps of streaming requests; return their kernels, their number and their seconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):
        pass  # the first profile takes long to begin; tokens would be generated meanwhile
    params = exact_length(_CONTEXT - arguments.prompt_tokens)
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
        raise SystemExit(f"requests ended within the {arguments.seconds} s of the profile; use fewer --seconds")
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
    parser = new_parser("step_profile", __doc__)
    add_shape(parser)
    add_quantization(parser)
    parser.add_argument("--streams", type=int, default=64, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.5, help="of the profile, and of the warm-up before it")
    add_tuning_budget(parser)
    parser.add_argument("--most", type=int, default=14, metavar="N", help="rows of the table")
    add_json(parser)
    arguments = parser.parse_args(argv)
    require_gpu()
    with (
        tempfile.TemporaryDirectory() as directory,
        load_chosen(
            arguments,
            Path(directory),
            SchedulerConfig(max_batch_size=arguments.streams),
            device="cuda",
            max_model_len=_CONTEXT,
        ) as llm,
    ):
        kernels, num_steps, seconds = anyio.run(profile_decodes, llm, arguments)
        description = llm.info.description
    rows = kernel_rows(kernels, num_steps)
    sum_us, step_us = sum(row[3] for row in rows), 1e6 * seconds / num_steps
    print(f"{description}\n{num_steps} steps of {arguments.streams} decodes, {step_us:.0f} us each")
    print(f"kernels: {sum_us:.0f} us\n")
    columns = ["kernel", "launches/step", "us/launch", "us/step"]
    print(
        format_table(
            columns,
            [
                [name[:_MAX_NAME], f"{count:.1f}", f"{each:.2f}", f"{all_us:.1f}"]
                for name, count, each, all_us in rows[: arguments.most]
            ],
        )
    )
    results = {"step_us": step_us, "kernels": rows}
    append_record(arguments, "step profile", results, engine={"description": description})


if __name__ == "__main__":
    main()
