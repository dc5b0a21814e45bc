"""`benchmarks.serving` in one format after the other: tokens/s, TTFT and TPOT of each, beside the unquantized model.

    python -m benchmarks.serving_formats --shape 8b --json 8b.jsonl
    python -m benchmarks.serving_formats --shape 8b --formats "unquantized;fp8;int4 g128" --concurrency 1,64
    python -m benchmarks.serving_formats --report 8b.jsonl more.jsonl

Each format has a process of its own, so that it finds the GPU's memory free, and what one leaves behind slows none
down. `--report` makes the tables from the records of earlier runs, of `benchmarks.serving` too: a comparison that takes
longer than a machine can be had is run in parts. Formats are rounded: calibrated ones are as fast.

    load s     until the engine is ready: weights are made or read, and quantized, and products are measured
    host GiB   the most memory of the process until then
    KV tokens  that the cache has room for
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import serving
from benchmarks.models import add_model_or_shape
from benchmarks.report import chosen_rows, format_table, median, median_of_runs, new_parser, read_records

BASELINE = "unquantized"

FORMATS: Mapping[str, tuple[str | None, str]] = {
    BASELINE: (None, "none"),
    "int4 g128": ("int4-rtn", "none"),
    "int4 g128, symmetric": ("int4-rtn,symmetric=true", "none"),
    "int4 g64": ("int4-rtn,group_size=64", "none"),
    "int4 g32": ("int4-rtn,group_size=32", "none"),
    "mxfp4": ("mxfp4", "none"),
    "int8": ("int8", "none"),
    "w8a8": ("w8a8,method=rtn", "none"),
    "fp8": ("fp8", "none"),
    "fp8-block": ("fp8-block", "none"),
    "fp8, weights only": ("fp8,activations=none", "none"),
    "int8 KV": (None, "int8"),
    "fp8 KV": (None, "fp8"),
    "fp8, fp8 KV": ("fp8", "fp8"),
    "w8a8, int8 KV": ("w8a8,method=rtn", "int8"),
    "int4 g128, fp8 KV": ("int4-rtn", "fp8"),
    "int4 g128, int8 KV": ("int4-rtn", "int8"),
}
"""Rows: `--quant` and `--kv-cache` of `benchmarks.serving`."""

ENGINE = ("weights GiB", "load s", "host GiB", "KV tokens")
"""Columns of what `serving.describe` says of an engine."""

Record = Mapping[str, Any]


def measure(arguments: argparse.Namespace, name: str) -> bool:
    """Run a format in a process of its own, which appends its records to `arguments.json`; False if it failed."""
    quant, kv_cache = FORMATS[name]
    chosen = argparse.Namespace(**{**vars(arguments), "quant": quant, "kv_cache": kv_cache})
    print(f"\n{name}:", flush=True)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            print(serving.table(pool.submit(serving.benchmark, chosen).result()), flush=True)
        except (Exception, SystemExit) as error:  # one format must not end the comparison
            what = "its process died" if isinstance(error, BrokenProcessPool) else f"{type(error).__name__}: {error}"
            traceback.print_exception(error)
            print(f"{name} failed: {what}", flush=True)
            return False
    return True


def measure_all(arguments: argparse.Namespace) -> list[str]:
    """Run the formats until `arguments.budget` is spent; return those that have no result."""
    deadline = time.monotonic() + arguments.budget
    without = []
    for name in arguments.formats:
        if time.monotonic() > deadline:
            print(f"{name} was not measured: --budget {arguments.budget:g} is spent", flush=True)
            without.append(name)
        elif not measure(arguments, name):
            without.append(name)
    return without


def format_name(record: Record) -> str:
    """The row that a record belongs to."""
    quant, kv_cache = record["arguments"]["quant"], record["arguments"]["kv_cache"]
    for name, chosen in FORMATS.items():
        if chosen == (quant, kv_cache):
            return name
    return f"{quant or BASELINE}{'' if kv_cache == 'none' else f', {kv_cache} KV'}"


def setting(record: Record) -> str:
    """What rows of one table have in common: model, dtype, lengths, size of steps, device."""
    arguments, machine = record["arguments"], record["machine"]
    name = arguments["shape"] or arguments["model"]
    device = machine["cpu"] if arguments["device"] == "cpu" else machine["gpu"] or machine["cpu"]
    lengths = f"{arguments['prompt_tokens']} -> {arguments['output_tokens']} tokens"
    steps = "" if arguments["tokens_per_step"] is None else f", steps of up to {arguments['tokens_per_step']} tokens"
    deterministic = ", deterministic" if arguments["deterministic"] else ""
    return f"{name}, dtype {arguments['dtype']}, {lengths}{steps}{deterministic}, {device}"


def _grouped(records: Iterable[Record]) -> dict[str, dict[str, list[Record]]]:
    """Setting -> row -> records, rows in the order of `FORMATS`, then others."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        found.setdefault(setting(record), {}).setdefault(format_name(record), []).append(record)
    order = [*FORMATS, *(name for rows in found.values() for name in rows)]
    return {one: dict(sorted(rows.items(), key=lambda row: order.index(row[0]))) for one, rows in found.items()}


def medians_by_concurrency(records: Iterable[Record]) -> dict[int, dict[str, float]]:
    """Concurrency -> medians of the figures, over all runs of one format."""
    runs: dict[int, list[dict[str, float]]] = {}
    for record in records:
        figures = {name: math.nan if value is None else value for name, value in record["results"].items()}
        runs.setdefault(record["concurrency"], []).append(figures)
    return {concurrency: median_of_runs(runs[concurrency]) for concurrency in sorted(runs)}


def tables(records: Iterable[Record]) -> str:
    """Markdown tables of throughput, and of latencies, for each setting, and what is slower than the baseline."""
    parts = []
    for heading, rows in _grouped(records).items():
        medians = {name: medians_by_concurrency(of) for name, of in rows.items()}
        concurrencies = sorted({concurrency for of in medians.values() for concurrency in of})
        counts = [f"N={concurrency}" for concurrency in concurrencies]
        speeds, latencies = [], []
        for name, of in rows.items():
            figures = [medians[name].get(concurrency) for concurrency in concurrencies]
            speeds.append([name, *_engine_cells(of), *("" if one is None else _speed(one) for one in figures)])
            latencies.append([name, *("" if one is None else _latency(one) for one in figures)])
        parts += [
            heading,
            format_table(["output tokens/s", *ENGINE, *counts], speeds),
            format_table(["TTFT p50 / TPOT p50, ms", *counts], latencies),
            *_slower(medians),
        ]
    return "\n\n".join(parts)


def _engine_cells(records: Iterable[Record]) -> list[str]:
    """Cells of `ENGINE`: medians over the records of one format."""
    engines = [record["engine"] for record in records]
    weights, load_s, host, tokens = (
        median([math.nan if engine[name] is None else engine[name] for engine in engines])
        for name in ("weight_bytes", "load_s", "peak_host_bytes", "kv_tokens")
    )
    return [f"{weights / 2**30:.2f}", f"{load_s:.1f}", f"{host / 2**30:.1f}", f"{tokens:,.0f}"]


def _speed(figures: Mapping[str, float]) -> str:
    return f"{figures['output_tokens_per_s']:,.0f}"


def _latency(figures: Mapping[str, float]) -> str:
    return f"{figures['ttft_p50_ms']:.1f} / {figures['tpot_p50_ms']:.2f}"


def _slower(medians: Mapping[str, Mapping[int, Mapping[str, float]]]) -> list[str]:
    """A sentence that names the formats that are slower than the unquantized model, with their share of its speed."""
    baseline = medians.get(BASELINE)
    if baseline is None or len(medians) == 1:
        return []
    shares = {
        f"{name} at N={concurrency}": figures["output_tokens_per_s"] / baseline[concurrency]["output_tokens_per_s"]
        for name, of in medians.items()
        for concurrency, figures in of.items()
        if concurrency in baseline
    }
    slower = [f"{where} ({share:.1%} of its speed)" for where, share in shares.items() if share < 1]
    return [f"Slower than {BASELINE}: {', '.join(slower) or 'none'}."]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the formats, or read earlier runs, and print the tables; return 1 if a format has no result."""
    parser = new_parser("serving_formats", __doc__)
    group = add_model_or_shape(parser)
    group.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="measure nothing: tables of these results"
    )
    serving.add_options(parser)
    parser.set_defaults(dtype="bfloat16", concurrency=[1, 8, 64, 256])
    parser.add_argument(
        "--formats",
        type=partial(chosen_rows, rows=FORMATS),
        default=list(FORMATS),
        metavar="NAMES",
        help=f"separated by semicolons (default: all): {'; '.join(FORMATS)}",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="begin no format later than this (default: no limit)",
    )
    arguments = parser.parse_args(argv)
    if arguments.report is not None:
        print(tables(read_records(arguments.report, "serving")))
        return 0
    with tempfile.TemporaryDirectory() as directory:
        kept = arguments.json is not None
        arguments.json = arguments.json if kept else Path(directory) / "serving.jsonl"
        without = measure_all(arguments)
        if arguments.json.exists():
            print(f"\n{tables(read_records([arguments.json], 'serving'))}")
    if without:
        print(f"\nwithout result: {'; '.join(without)}")
    return 1 if without else 0


if __name__ == "__main__":
    sys.exit(main())
