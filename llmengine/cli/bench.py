"""The command `bench`: a load test of any OpenAI endpoint, or of a model in this process."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmengine.cli.arguments import (
    add_kv_cache_argument,
    add_parallel_arguments,
    add_quant_argument,
    chosen_config,
    positive_int,
)
from llmengine.cli.serve import KEY_VARIABLE
from llmengine.errors import ConfigError
from llmengine.load_test.arrivals import Arrivals, Clients, Rate
from llmengine.load_test.workload import Lengths, Synthetic

if TYPE_CHECKING:
    from llmengine.load_test.figures import Objectives
    from llmengine.load_test.records import LoadRequest, Target


_SECONDS_AT_A_RATE = 30


def add_bench_command(commands: Any) -> None:
    """Add the command to the subparsers of `llmengine`."""
    bench = commands.add_parser(
        "bench",
        help="measure an OpenAI endpoint, or a model in this process, under load",
        description="Send requests to an OpenAI endpoint (--base-url), or to a model in this process (--library), and "
        "print throughput and latencies. Latencies count from the moment at which a request was due.",
    )
    _add_target_arguments(bench)
    _add_load_arguments(bench)
    bench.add_argument("--slo", type=_objectives, metavar="NAME:MS,...", help="count requests within ttft, tpot, e2e")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures; needs matplotlib")
    bench.set_defaults(run=_bench)


def _add_target_arguments(bench: argparse.ArgumentParser) -> None:
    target = bench.add_argument_group("target")
    target.add_argument(
        "--base-url", default="http://127.0.0.1:8000/v1", metavar="URL", help="of the endpoint (default: %(default)s)"
    )
    target.add_argument("--model", metavar="NAME", help="at the endpoint (default: the first that it lists)")
    target.add_argument("--api-key", metavar="KEY", help=f"default: the environment's {KEY_VARIABLE}, else none")
    target.add_argument("--library", type=Path, metavar="MODEL", help="load this model here, and use no endpoint")
    add_quant_argument(target, "with --library: quantize the weights")
    add_kv_cache_argument(target)
    add_parallel_arguments(target)


def _add_load_arguments(bench: argparse.ArgumentParser) -> None:
    load = bench.add_argument_group("load")
    load.add_argument("--api", choices=("chat", "completions"), default="chat", help="default: chat")
    kinds = load.add_mutually_exclusive_group()
    kinds.add_argument(
        "--concurrency",
        type=_list_of(positive_int, Clients),
        default=[Clients(1), Clients(8)],
        metavar="N,...",
        help="clients that send one request after the other (default: 1,8)",
    )
    kinds.add_argument("--rate", type=_list_of(_positive_number, float), metavar="R,...", help="requests a second")
    load.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson", help="with --rate")
    load.add_argument(
        "--requests",
        type=positive_int,
        metavar="N",
        help=f"measured at each load (default: 4 a client, or those of {_SECONDS_AT_A_RATE} s at a rate)",
    )
    load.add_argument(
        "--warm-up", type=_count, metavar="N", help="requests before, not measured (default: one a client, at most 16)"
    )
    load.add_argument("--prompt-tokens", type=_lengths, default=Lengths(128, 128), metavar="N[-M]", help="default: 128")
    load.add_argument("--output-tokens", type=_lengths, default=Lengths(128, 128), metavar="N[-M]", help="default: 128")
    load.add_argument("--shared-prefix", type=_count, default=0, metavar="N", help="tokens that prompts begin with")
    load.add_argument("--prefixes", type=positive_int, default=1, metavar="N", help="different ones (default: 1)")
    load.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt" or "messages" instead')
    load.add_argument("--ignore-eos", action="store_true", help="generate all output tokens; not an OpenAI option")
    load.add_argument("--temperature", type=float, default=0.0, help="default: 0")
    load.add_argument("--body", type=_json_object, default={}, metavar="JSON", help="more fields of each HTTP request")
    load.add_argument(
        "--timeout", type=_positive_number, default=600.0, metavar="S", help="of a request (default: 600)"
    )
    load.add_argument("--seed", type=int, default=0, help="of prompts and arrivals (default: 0)")


def _bench(arguments: argparse.Namespace) -> int:
    import anyio

    from llmengine.load_test.report import plot_runs, report_text

    if arguments.plot is not None:
        _require_matplotlib()
    _synthetic(arguments)  # raises before anything is loaded
    options = {"use_uvloop": sys.platform != "win32"}
    report = anyio.run(_measure, arguments, backend="asyncio", backend_options=options)
    runs = report["runs"]
    if arguments.json:
        from llmengine.load_test.tables import without_nan

        print(json.dumps(without_nan(report), ensure_ascii=False, allow_nan=False))
    else:
        print(f"{report['target']}, {report['workload']}\n\n{report_text(runs)}")
    if arguments.plot is not None:
        plot_runs(runs, f"{report['target']}, {report['workload']}", arguments.plot)
    return 0 if all(run["num_successful"] for run in runs) else 1


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; install llmengine[bench]") from error


async def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of all loads at the target that the arguments name."""
    if arguments.library is not None:
        return await _measure_library(arguments)
    try:
        from llmengine.load_test.openai_target import EndpointOptions, HttpTarget
    except ImportError as error:
        raise ConfigError("a load test of an endpoint needs httptools; install llmengine[bench]") from error
    ignore_eos = {"ignore_eos": True} if arguments.ignore_eos else {}
    body = {"temperature": arguments.temperature, **ignore_eos, **arguments.body}
    key = arguments.api_key or os.environ.get(KEY_VARIABLE)
    target = await HttpTarget.connect(arguments.base_url, arguments.model, EndpointOptions(arguments.api, key, body))
    try:
        return await _measure_target(arguments, target, f"{target.model} at {arguments.base_url}")
    finally:
        await target.aclose()


async def _measure_library(arguments: argparse.Namespace) -> dict[str, Any]:
    from llmengine.llm import LLM
    from llmengine.load_test.library_target import LibraryTarget
    from llmengine.sampling_params import SamplingParams

    if arguments.body:
        raise ConfigError("--library excludes --body, which has fields of HTTP requests")
    params = SamplingParams(temperature=arguments.temperature, ignore_eos=arguments.ignore_eos)
    config = chosen_config(argparse.Namespace(**{**vars(arguments), "model": arguments.library}))
    async with await LLM.create(config) as llm:
        return await _measure_target(arguments, LibraryTarget(llm, params), f"{arguments.library}, in process")


async def _measure_target(arguments: argparse.Namespace, target: Target, name: str) -> dict[str, Any]:
    """Run one load after the other. Each has prompts of its own, so none finds those of an earlier one cached."""
    from llmengine.load_test.figures import figures
    from llmengine.load_test.runner import run_load

    requests, workload = await _requests(arguments, target)
    runs = []
    for index, arrivals in enumerate(_loads(arguments)):
        result = await run_load(
            target,
            requests,
            arrivals,
            num_requests=arguments.requests or _default_requests(arrivals),
            warm_up_requests=_default_warm_up(arrivals) if arguments.warm_up is None else arguments.warm_up,
            timeout_s=arguments.timeout,
            seed=arguments.seed + index,
        )
        runs.append(figures(result, arguments.slo))
    return {"target": name, "api": arguments.api, "workload": workload, "runs": runs}


async def _requests(arguments: argparse.Namespace, target: Target) -> tuple[Iterator[LoadRequest], str]:
    """Requests without end, and what they are in words."""
    from llmengine.load_test.workload import cycle_requests, measure_scale, read_prompts

    chat = arguments.api == "chat"
    if arguments.prompts is not None:
        found = read_prompts(arguments.prompts, arguments.output_tokens, chat=chat, seed=arguments.seed)
        return cycle_requests(found), f"{len(found)} prompts of {arguments.prompts}"
    load = _synthetic(arguments)
    return load.requests(await measure_scale(target, chat), chat=chat, seed=arguments.seed), str(load)


def _synthetic(arguments: argparse.Namespace) -> Synthetic:
    return Synthetic(arguments.prompt_tokens, arguments.output_tokens, arguments.shared_prefix, arguments.prefixes)


def _loads(arguments: argparse.Namespace) -> list[Arrivals]:
    if arguments.rate is None:
        return list(arguments.concurrency)
    return [Rate(rate, arguments.arrivals) for rate in arguments.rate]


def _default_requests(arrivals: Arrivals) -> int:
    return 4 * arrivals.count if isinstance(arrivals, Clients) else math.ceil(_SECONDS_AT_A_RATE * arrivals.per_s)


def _default_warm_up(arrivals: Arrivals) -> int:
    return min(16, arrivals.count if isinstance(arrivals, Clients) else math.ceil(arrivals.per_s))


def _list_of(item: Callable[[str], Any], make: Callable[[Any], Any]) -> Callable[[str], list[Any]]:
    """The type of an argument that is a list such as 1,8,64."""
    return lambda text: [make(item(part)) for part in text.split(",")]


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, not {text!r}")
    return int(text)


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _lengths(text: str) -> Lengths:
    low, _, high = text.partition("-")
    try:
        lengths = Lengths(positive_int(low), positive_int(high or low))
    except argparse.ArgumentTypeError:
        lengths = Lengths(1, 0)
    if lengths.low > lengths.high:
        raise argparse.ArgumentTypeError(f"must be a length such as 128, or a range such as 100-200, not {text!r}")
    return lengths


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text!r}")
    return value


def _objectives(text: str) -> Objectives:
    from llmengine.load_test.figures import Objectives

    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, limit = part.partition(":")
        if name not in ("ttft", "tpot", "e2e"):
            raise argparse.ArgumentTypeError(f"must be limits in ms such as ttft:500,tpot:50,e2e:9000, not {text!r}")
        limits[f"{name}_ms"] = _positive_number(limit)
    return Objectives(**limits)
