"""Where the GPU spends a step of N decodes, or of prompts: the time of each kernel according to `torch.profiler`.

    python -m benchmarks.step_profile --shape 8b --dtype bfloat16 --streams 64
    python -m benchmarks.step_profile --shape 8b --dtype bfloat16 --streams 1 --quant int4-rtn
    python -m benchmarks.step_profile --shape 8b --dtype bfloat16 --prompts 256 --tokens-per-step 4224 --quant fp8

N requests stream during the profile, so the steps are those of a running engine, with its graphs. A step lasts from the
kernel that begins it to the one that begins the next. Many kernels start before their predecessors end, and wait. So a
kernel's time here is what it adds: from the end of all kernels that began before it, or its own begin if that is later,
to its end. These times and the gaps in which no kernel runs add up to the step. With `--prompts`, so many requests for
one token arrive at once, and the steps are those of their prompts but for the last.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio

from benchmarks.models import add_model_or_shape, add_quantization, add_tuning_budget, load_chosen
from benchmarks.report import add_json, append_record, format_table, median, new_parser, positive_integers, require_gpu
from benchmarks.workloads import exact_length, random_prompts
from llmengine import LLM, ParallelConfig, SchedulerConfig

_CONTEXT = 4096
_MAX_NAME = 70
_FIRST_KERNEL = "_begin_step"
_ATTENTION = "_decode_kernel|_prefill_kernel"

GROUPS: Mapping[str, str] = {
    "sums over ranks": "_over_peers|nccl",
    "passing between stages": "_take_ids|_await_hidden|_copy_hidden|_tell_next|_send_ids",
    "attention, rotation, KV write": "_decode_kernel|_prefill_kernel|_rope_and_write|^_gather_kernel|flashinfer",
    "products": "_skinny_kernel|packed|scaled_kernel|hopper|dequantize_kernel|gemm|gemv|nvjet|cutlass|splitK",
    "norms, activations, rounding": "_rms_norm_kernel|_silu_and_mul_kernel|quantize_rows_kernel",
    "sampling": "_argmax|_summarize|_choose|^_edit",
    "begin and end of the step, copies": "_begin_step|_end_step|look_up_kernel|^Mem(cpy|set)",
    "other": "",
}
"""Groups of kernels, and what is found in their names; the first group that fits counts."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel or copy on the device; microseconds on the profiler's clock."""

    name: str
    begin_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """All launches of one kernel.

    Attributes:
        group: one of `GROUPS`.
        launches: per step.
        each_us: mean of what a launch adds.
        lasts_us: mean from its begin to its end, waiting included.
        step_us: what the launches add to a step.
    """

    name: str
    group: str
    launches: float
    each_us: float
    lasts_us: float
    step_us: float


@dataclass(frozen=True, slots=True)
class Place:
    """One kernel of a layer: the median of what it adds, over layers and steps."""

    name: str
    added_us: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Mean of some steps: sum of `kernels` + gaps_us = step_us.

    Attributes:
        kernels: the one that adds most first.
        layer: from one attention to before the next, in the order of launches; empty if layers are not alike.
        gaps_us: time in which none runs.
    """

    num_steps: int
    step_us: float
    kernels: Sequence[KernelTimes]
    layer: Sequence[Place]
    gaps_us: float


def group_of(name: str) -> str:
    """The group of a kernel with this name."""
    return next(group for group, pattern in GROUPS.items() if re.search(pattern, name))


def profile_of(launches: Iterable[Launch]) -> StepProfile:
    """The profile of all steps that began and ended among these launches.

    Raises `SystemExit` if there is none.
    """
    ordered = sorted(launches, key=lambda launch: launch.begin_us)
    begins = [index for index, launch in enumerate(ordered) if _FIRST_KERNEL in launch.name]
    if len(begins) < 2:
        raise SystemExit("no whole step ran during the profile; use more --seconds")
    num_steps, until_us = len(begins) - 1, ordered[begins[-1]].begin_us
    launched = ordered[begins[0] : begins[-1]]
    added = list(_added_us(launched, until_us))
    step_us = (until_us - launched[0].begin_us) / num_steps
    return StepProfile(
        num_steps,
        step_us,
        kernel_times(launched, added, num_steps),
        _layer(launched, added),
        gaps_us=step_us - sum(added) / num_steps,
    )


def _added_us(ordered: Iterable[Launch], until_us: float) -> Iterator[float]:
    """For each launch, the microseconds before `until_us` in which none that began before it runs any more."""
    covered = float("-inf")
    for launch in ordered:
        end = min(launch.end_us, until_us)
        yield max(0.0, end - max(launch.begin_us, covered))
        covered = max(covered, end)


def _layer(ordered: Sequence[Launch], added: Sequence[float]) -> list[Place]:
    """The kernels from one attention to the next, where most are the same kernels."""
    attentions = [index for index, launch in enumerate(ordered) if re.search(_ATTENTION, launch.name)]
    spans = [range(*pair) for pair in pairwise(attentions)]
    names = Counter(tuple(ordered[index].name for index in span) for span in spans)
    if not names:
        return []
    usual, count = names.most_common(1)[0]
    if 2 * count < len(spans):
        return []
    alike = [span for span in spans if tuple(ordered[index].name for index in span) == usual]
    return [Place(name, median([added[span[place]] for span in alike])) for place, name in enumerate(usual)]


def kernel_times(launches: Sequence[Launch], added: Sequence[float], num_steps: int) -> list[KernelTimes]:
    """The times of each kernel, the one that adds most to a step first."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for launch, us in zip(launches, added, strict=True):
        found[launch.name].append((us, launch.end_us - launch.begin_us))
    kernels = []
    for name, times in found.items():
        total, lasts = (sum(column) for column in zip(*times, strict=True))
        count = len(times)
        kernels.append(
            KernelTimes(name, group_of(name), count / num_steps, total / count, lasts / count, total / num_steps)
        )
    return sorted(kernels, key=lambda kernel: -kernel.step_us)


def group_table(profile: StepProfile) -> str:
    """A row for each group of kernels, for overlap and gaps, and for the step."""
    rows = []
    for group in GROUPS:
        kernels = [kernel for kernel in profile.kernels if kernel.group == group]
        if kernels:
            launches = f"{sum(kernel.launches for kernel in kernels):.1f}"
            rows.append((group, launches, sum(kernel.step_us for kernel in kernels)))
    rows += [("gaps", "", profile.gaps_us), ("step", "", profile.step_us)]
    return format_table(
        ["of a step", "launches", "us", "share"],
        [[name, launches, f"{us:,.1f}", f"{us / profile.step_us:.1%}"] for name, launches, us in rows],
    )


def kernel_table(profile: StepProfile, most: int) -> str:
    """A row for each of the kernels that take longest."""
    rows = [
        [
            one.name[:_MAX_NAME],
            one.group.partition(",")[0],
            f"{one.launches:.1f}",
            f"{one.lasts_us:.2f}",
            f"{one.each_us:.2f}",
            f"{one.step_us:.1f}",
        ]
        for one in profile.kernels[:most]
    ]
    return format_table(["kernel", "group", "launches/step", "lasts us", "adds us", "us/step"], rows)


def layer_table(profile: StepProfile) -> str:
    """A row for each kernel of a layer, in order, and one for the layer."""
    rows = [[place.name[:_MAX_NAME], f"{place.added_us:.2f}"] for place in profile.layer]
    rows.append(["a layer", f"{sum(place.added_us for place in profile.layer):.1f}"])
    return format_table(["kernel", "adds us"], rows)


async def profile_decodes(llm: LLM, arguments: argparse.Namespace, num_streams: int) -> list[Launch]:
    """Profile some steps of so many streaming requests; return what ran on the device."""
    from torch.profiler import ProfilerActivity, profile

    params = exact_length(_CONTEXT - arguments.prompt_tokens)
    prompts = [[2 + stream % 500] * arguments.prompt_tokens for stream in range(num_streams)]
    handles = [llm.generate_async(prompt, params, streaming=True) for prompt in prompts]
    for handle in handles:
        await anext(handle)
    await anyio.sleep(arguments.seconds)  # graphs are captured meanwhile
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        await anyio.sleep(arguments.seconds)
    if any(handle.done for handle in handles):
        raise SystemExit(f"requests ended within the {arguments.seconds} s of the profile; use fewer --seconds")
    for handle in handles:
        handle.abort()
    return _launches(profiled)


async def profile_prompts(llm: LLM, arguments: argparse.Namespace, num_prompts: int) -> list[Launch]:
    """Profile the prompts of so many requests; return what ran on the device."""
    from torch.profiler import ProfilerActivity, profile

    lengths = [arguments.prompt_tokens] * num_prompts
    prompts = random_prompts(random.Random(0), lengths, llm.info.vocab_size)

    async def compute() -> None:
        for handle in [llm.generate_async(prompt, exact_length(1)) for prompt in prompts]:
            await handle

    for _ in range(3):  # steps of a new size run without a graph at first, which is captured in the pause
        await compute()
        await anyio.sleep(arguments.seconds)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        await compute()
    return _launches(profiled)


def _launches(profiled: Any) -> list[Launch]:
    return [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type.name == "CUDA"
    ]


def start_profiler() -> None:
    """Let the first profile of the process, which takes long to begin, be an empty one.

    Before there is an engine: the end of a profile waits for the whole device, which fails while a step is captured.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):
        pass


def main(argv: Sequence[str] | None = None) -> None:
    """Profile and print the tables."""
    parser = new_parser("step_profile", __doc__)
    add_model_or_shape(parser)
    add_quantization(parser)
    parser.add_argument("--streams", type=positive_integers, default=[64], metavar="N,N,...")
    parser.add_argument(
        "--prompts", type=positive_integers, metavar="N,N,...", help="that arrive at once, no --streams"
    )
    parser.add_argument(
        "--tokens-per-step", type=int, metavar="N", help="most tokens of a step (default: the engine's)"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share each matrix; rank 0 is shown")
    parser.add_argument("--pp", type=int, default=1, metavar="N", help="stages of layers, of which the last is shown")
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--seconds", type=float, default=0.5, help="of the profile, and of the warm-up before it")
    add_tuning_budget(parser)
    parser.add_argument("--most", type=int, default=14, metavar="N", help="rows of the table of kernels")
    add_json(parser)
    arguments = parser.parse_args(argv)
    require_gpu()
    start_profiler()
    of_prompts = arguments.prompts is not None
    counts, what = (arguments.prompts, "prompts") if of_prompts else (arguments.streams, "decodes")
    measure = profile_prompts if of_prompts else profile_decodes
    scheduler_config = SchedulerConfig(max_batch_size=max(counts))
    if arguments.tokens_per_step is not None:
        scheduler_config.max_tokens_per_step = scheduler_config.max_tokens_per_mixed_step = arguments.tokens_per_step
    with (
        tempfile.TemporaryDirectory() as directory,
        load_chosen(
            arguments,
            Path(directory),
            scheduler_config,
            device="cuda",
            max_model_len=_CONTEXT,
            parallel_config=ParallelConfig(tp_size=arguments.tp, pp_size=arguments.pp),
        ) as llm,
    ):
        description = llm.info.description
        print(description)
        for count in counts:
            profile = profile_of(anyio.run(measure, llm, arguments, count))
            print(f"\n{profile.num_steps} steps of {count} {what}, {profile.step_us:.0f} us each\n")
            print(f"{group_table(profile)}\n\n{kernel_table(profile, arguments.most)}\n\n{layer_table(profile)}")
            engine = {"description": description}
            append_record(arguments, "step profile", asdict(profile), engine=engine, **{f"num_{what}": count})


if __name__ == "__main__":
    main()
