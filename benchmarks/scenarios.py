"""Three loads beside the closed loop of `benchmarks.serving`, on random weights of a shape.

    python -m benchmarks.scenarios mixed    --shape 8b     `generate` of 1,000 requests of mixed lengths, one call
    python -m benchmarks.scenarios long     --shape 8b     16 streams with prompts of 8,000 tokens
    python -m benchmarks.scenarios arriving --shape 8b     64 streams decode while prompts arrive all the time

`arriving` says what prompts cost those who already stream: prompts of 256 tokens, each asking for one token, are sent
one after the other by two clients; a step takes at most --prompt-tokens-per-step of them beside the decodes.
"""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio

from benchmarks.report import append_json, format_table, machine, median, percentile
from benchmarks.serving import Arrivals, consume
from benchmarks.shapes import SHAPES, write_shape
from llmengine import LLM, KvCacheConfig, ModelConfig, SamplingParams, SchedulerConfig

Figures = dict[str, float]

_VOCAB = 512  # of the smallest shape
_ARRIVING_PROMPT = 256
_ARRIVING_CLIENTS = 2


def prompts_of(lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Return random prompts of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(_VOCAB) for _ in range(length)] for length in lengths]


def gaps_while_all_run(arrivals: Sequence[Arrivals]) -> list[float]:
    """Return the seconds between outputs from the last request's first output on: then no prompt of theirs is left."""
    all_run = max(request.times[0] for request in arrivals)
    gaps = [
        later - earlier
        for request in arrivals
        for earlier, later in itertools.pairwise(request.times)
        if earlier >= all_run
    ]
    if not gaps:
        raise SystemExit("the first streams ended before the last one began: nothing to measure; use a smaller --scale")
    return gaps


def run_mixed(llm: LLM, arguments: argparse.Namespace) -> Figures:
    """Generate from prompts of 32 to 1,024 tokens, 16 to 512 tokens each, in one call."""
    rng = random.Random(0)
    scale = arguments.scale
    lengths = [max(1, rng.randint(32, 1024) // scale) for _ in range(arguments.requests)]
    outputs = [max(1, rng.randint(16, 512) // scale) for _ in range(arguments.requests)]
    params = [SamplingParams(max_new_tokens=length, ignore_eos=True) for length in outputs]
    prompts = prompts_of(lengths, seed=1)
    llm.generate(prompts[:8], params[:8])
    began = time.perf_counter()
    results = llm.generate(prompts, params)
    wall_s = time.perf_counter() - began
    assert [result.num_tokens for result in results] == outputs, "a request ended early"
    return {
        "requests": len(prompts),
        "prompt_tokens": sum(lengths),
        "output_tokens": sum(outputs),
        "wall_s": wall_s,
        "output_tokens_per_s": sum(outputs) / wall_s,
        "tokens_per_s": (sum(lengths) + sum(outputs)) / wall_s,
    }


def run_long(llm: LLM, arguments: argparse.Namespace) -> Figures:
    """Stream from long prompts, all sent at once."""
    prompts = prompts_of([8000 // arguments.scale] * arguments.streams, seed=2)
    num_outputs = 128 // min(arguments.scale, 16)

    async def serve() -> list[Arrivals]:
        arrivals: list[Arrivals] = []
        async with anyio.create_task_group() as group:
            for prompt in prompts:
                group.start_soon(consume, llm, iter([prompt]), num_outputs, arrivals)
        return arrivals

    llm.generate(prompts[0][:64], SamplingParams(max_new_tokens=4, ignore_eos=True))
    began = time.perf_counter()
    arrivals = anyio.run(serve)
    wall_s = time.perf_counter() - began
    first = [request.times[0] - request.sent for request in arrivals]
    return {
        "streams": len(prompts),
        "ttft_p50_ms": 1e3 * median(first),
        "ttft_max_ms": 1e3 * max(first),
        "prompt_tokens_per_s": sum(map(len, prompts)) / max(first),
        "decode_itl_p50_ms": 1e3 * median(gaps_while_all_run(arrivals)),
        "wall_s": wall_s,
    }


def run_arriving(llm: LLM, arguments: argparse.Namespace) -> Figures:
    """Stream while others send prompts; compare the gaps with those of the same streams alone."""
    num_outputs = 512 // arguments.scale

    async def serve(num_clients: int) -> tuple[list[float], int]:
        arrivals: list[Arrivals] = []
        num_prompts = 0

        async def send() -> None:
            nonlocal num_prompts
            rng = random.Random(num_clients)
            while True:
                prompt = [rng.randrange(_VOCAB) for _ in range(max(1, _ARRIVING_PROMPT // arguments.scale))]
                await llm.generate_async(prompt, SamplingParams(max_new_tokens=1, ignore_eos=True))
                num_prompts += 1

        async with anyio.create_task_group() as clients:
            async with anyio.create_task_group() as streams:
                for prompt in prompts_of([128 // min(arguments.scale, 16)] * arguments.streams, seed=3):
                    streams.start_soon(consume, llm, iter([prompt]), num_outputs, arrivals)
                for _ in range(num_clients):
                    clients.start_soon(send)
            clients.cancel_scope.cancel()
        return gaps_while_all_run(arrivals), num_prompts

    anyio.run(serve, _ARRIVING_CLIENTS)
    alone, _ = anyio.run(serve, 0)
    began = time.perf_counter()
    beside, num_prompts = anyio.run(serve, _ARRIVING_CLIENTS)
    wall_s = time.perf_counter() - began
    return {
        "streams": arguments.streams,
        "itl_p50_alone_ms": 1e3 * median(alone),
        "itl_p50_ms": 1e3 * median(beside),
        "itl_p99_ms": 1e3 * percentile(beside, 99),
        "arriving_prompt_tokens_per_s": num_prompts * _ARRIVING_PROMPT / arguments.scale / wall_s,
    }


SCENARIOS: dict[str, Callable[[LLM, argparse.Namespace], Figures]] = {
    "mixed": run_mixed,
    "long": run_long,
    "arriving": run_arriving,
}


def load_llm(arguments: argparse.Namespace, directory: Path) -> LLM:
    """Return the shape's model with the limits of the scenario."""
    streams = {"mixed": 256}.get(arguments.scenario, arguments.streams + _ARRIVING_CLIENTS)
    per_step = arguments.tokens_per_step
    mixed = per_step
    if arguments.scenario == "arriving":
        mixed = arguments.streams + arguments.prompt_tokens_per_step
    scheduler = SchedulerConfig(
        max_batch_size=streams, max_tokens_per_step=max(per_step, mixed), max_tokens_per_mixed_step=mixed
    )
    return LLM(
        ModelConfig(
            write_shape(arguments.shape, directory),
            load_format="dummy",
            dtype=arguments.dtype,
            device=arguments.device,
            tuning_budget_s=arguments.tuning_budget,
            kv_cache_config=KvCacheConfig(enable_prefix_caching=False),
            scheduler_config=scheduler,
        ),
        enable_tokenizer=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run one scenario and print its figures."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.scenarios", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="of mixed")
    parser.add_argument("--streams", type=int, metavar="N", help="16 of long, 64 of arriving by default")
    parser.add_argument("--tokens-per-step", type=int, default=2048, metavar="N")
    parser.add_argument("--prompt-tokens-per-step", type=int, default=256, metavar="N", help="of arriving")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divides all lengths, for a try on a CPU")
    parser.add_argument("--tuning-budget", type=float, default=ModelConfig(".").tuning_budget_s, metavar="SECONDS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line")
    arguments = parser.parse_args(argv)
    if arguments.streams is None:
        arguments.streams = 16 if arguments.scenario == "long" else 64
    with tempfile.TemporaryDirectory() as directory, load_llm(arguments, Path(directory)) as llm:
        description = llm.info.description
        figures = SCENARIOS[arguments.scenario](llm, arguments)
    print(f"{description}\n{arguments.scenario}, {arguments.shape}\n")
    print(format_table(["figure", "value"], [[name, f"{value:,.1f}"] for name, value in figures.items()]))
    append_json(
        arguments.json,
        {
            "benchmark": f"scenarios {arguments.scenario}",
            "machine": machine(),
            "arguments": vars(arguments),
            "engine": {"description": description},
            "results": figures,
        },
    )


if __name__ == "__main__":
    main()
