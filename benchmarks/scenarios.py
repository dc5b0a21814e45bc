"""Three workloads that complement the closed loop of `benchmarks.serving`, on random weights of a shape.

    python -m benchmarks.scenarios mixed    --shape 8b     `generate` of 1,000 requests of mixed lengths, one call
    python -m benchmarks.scenarios long     --shape 8b     16 streams with prompts of 8,000 tokens
    python -m benchmarks.scenarios arriving --shape 8b     64 streams decode while prompts keep arriving

`arriving` shows what prompts cost the requests that already stream. Two clients send prompts of 256 tokens one after
the other, each of which asks for one token; a step takes at most --prompt-tokens-per-step prompt tokens beside its
decodes.
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

from benchmarks.models import add_quantization, add_shape, add_tuning_budget, load_chosen
from benchmarks.report import add_json, append_record, format_table, median, new_parser, percentile
from benchmarks.serving import Arrivals, consume
from benchmarks.shapes import SHAPES
from benchmarks.workloads import exact_length, random_prompts
from llmengine import LLM, SchedulerConfig

Figures = dict[str, float]

_VOCAB_SIZE = min(shape["vocab_size"] for shape in SHAPES.values())
_ARRIVING_PROMPT = 256
_ARRIVING_CLIENTS = 2


def gaps_while_all_run(arrivals: Sequence[Arrivals]) -> list[float]:
    """Seconds between outputs, counted from the last request's first output on, when no prompt of theirs is left."""
    all_run = max(request.times[0] for request in arrivals)
    gaps = [
        later - earlier
        for request in arrivals
        for earlier, later in itertools.pairwise(request.times)
        if earlier >= all_run
    ]
    if not gaps:
        raise SystemExit(
            "there is nothing to measure: the first streams ended before the last one began; use a smaller --scale"
        )
    return gaps


def run_mixed(llm: LLM, arguments: argparse.Namespace) -> Figures:
    """Generate from prompts of 32 to 1,024 tokens, 16 to 512 tokens each, in one call."""
    rng = random.Random(0)
    scale = arguments.scale
    lengths = [max(1, rng.randint(32, 1024) // scale) for _ in range(arguments.requests)]
    outputs = [max(1, rng.randint(16, 512) // scale) for _ in range(arguments.requests)]
    params = [exact_length(length) for length in outputs]
    prompts = random_prompts(random.Random(1), lengths, _VOCAB_SIZE)
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
    prompts = random_prompts(random.Random(2), [8000 // arguments.scale] * arguments.streams, _VOCAB_SIZE)
    num_outputs = 128 // min(arguments.scale, 16)

    async def serve() -> list[Arrivals]:
        arrivals: list[Arrivals] = []
        async with anyio.create_task_group() as group:
            for prompt in prompts:
                group.start_soon(consume, llm, iter([prompt]), num_outputs, arrivals)
        return arrivals

    llm.generate(prompts[0][:64], exact_length(4))
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
    """Stream while others send prompts, and compare the gaps with those of the same streams alone."""
    num_outputs = 512 // arguments.scale
    lengths = [128 // min(arguments.scale, 16)] * arguments.streams

    async def serve(num_clients: int) -> tuple[list[float], int]:
        arrivals: list[Arrivals] = []
        num_prompts = 0

        async def send() -> None:
            nonlocal num_prompts
            rng = random.Random(num_clients)
            while True:
                (prompt,) = random_prompts(rng, [max(1, _ARRIVING_PROMPT // arguments.scale)], _VOCAB_SIZE)
                await llm.generate_async(prompt, exact_length(1))
                num_prompts += 1

        async with anyio.create_task_group() as clients:
            async with anyio.create_task_group() as streams:
                for prompt in random_prompts(random.Random(3), lengths, _VOCAB_SIZE):
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


def scheduler_config(arguments: argparse.Namespace) -> SchedulerConfig:
    """The limits of the scenario."""
    batch_size = 256 if arguments.scenario == "mixed" else arguments.streams + _ARRIVING_CLIENTS
    mixed = arguments.tokens_per_step
    if arguments.scenario == "arriving":
        mixed = arguments.streams + arguments.prompt_tokens_per_step
    return SchedulerConfig(
        max_batch_size=batch_size,
        max_tokens_per_step=max(arguments.tokens_per_step, mixed),
        max_tokens_per_mixed_step=mixed,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run one scenario and print its figures."""
    parser = new_parser("scenarios", __doc__)
    parser.add_argument("scenario", choices=SCENARIOS)
    add_shape(parser)
    add_quantization(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=1000, metavar="N", help="of mixed")
    parser.add_argument("--streams", type=int, metavar="N", help="16 of long, 64 of arriving by default")
    parser.add_argument("--tokens-per-step", type=int, default=2048, metavar="N")
    parser.add_argument("--prompt-tokens-per-step", type=int, default=256, metavar="N", help="of arriving")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide all lengths by N, for a try on a CPU")
    add_tuning_budget(parser)
    add_json(parser)
    arguments = parser.parse_args(argv)
    if arguments.streams is None:
        arguments.streams = 16 if arguments.scenario == "long" else 64
    limits = scheduler_config(arguments)
    with (
        tempfile.TemporaryDirectory() as directory,
        load_chosen(arguments, Path(directory), limits, device=arguments.device) as llm,
    ):
        description = llm.info.description
        figures = SCENARIOS[arguments.scenario](llm, arguments)
    print(f"{description}\n{arguments.scenario}, {arguments.shape}\n")
    print(format_table(["figure", "value"], [[name, f"{value:,.1f}"] for name, value in figures.items()]))
    append_record(arguments, f"scenarios {arguments.scenario}", figures, engine={"description": description})


if __name__ == "__main__":
    main()
