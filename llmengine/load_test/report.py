"""The report of several loads: a table, what went wrong, and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmengine.load_test.figures import LATENCIES
from llmengine.load_test.statistics import PERCENTS
from llmengine.load_test.tables import format_table, new_plot, save_plot

_NAMES = {"ttft_ms": "TTFT", "itl_ms": "ITL", "tpot_ms": "TPOT", "e2e_ms": "end to end", "gap_ms": "gap"}


def report_text(runs: Sequence[Mapping[str, Any]]) -> str:
    """Tables of throughput and of latencies, then errors, the client's own cost and warnings of each load."""
    parts = [_throughput_table(runs), _latency_table(runs)]
    for run in runs:
        parts += _remarks(run)
    return "\n\n".join(parts)


def _throughput_table(runs: Sequence[Mapping[str, Any]]) -> str:
    header = [
        "load",
        "requests",
        "failed",
        "prompt tokens",
        "output tokens",
        "requests/s",
        "output tok/s",
        "total tok/s",
    ]
    has_goodput = any("goodput" in run for run in runs)
    rows = [
        [
            run["arrivals"],
            str(run["num_requests"]),
            str(run["num_requests"] - run["num_successful"]),
            f"{run['prompt_tokens']['mean']:.1f}",
            f"{run['output_tokens']['mean']:.1f}",
            f"{run['requests_per_s']:.2f}",
            f"{run['output_tokens_per_s']:.1f}",
            f"{run['total_tokens_per_s']:.1f}",
            *([f"{run['goodput']['requests_per_s']:.2f} ({run['goodput']['share']:.0%})"] if has_goodput else []),
        ]
        for run in runs
    ]
    return format_table([*header, *(["within objectives/s"] if has_goodput else [])], rows)


def _latency_table(runs: Sequence[Mapping[str, Any]]) -> str:
    places = ["mean", *(f"p{percent}" for percent in PERCENTS), "max"]
    rows = [
        [run["arrivals"], _NAMES[name], *(f"{run[name][place]:.2f}" for place in places)]
        for run in runs
        for name in LATENCIES
    ]
    return format_table(["load", "latency, ms", *places], rows)


def _remarks(run: Mapping[str, Any]) -> list[str]:
    client = run["client"]
    lines = [
        f"{run['arrivals']}: {run['wall_s']:.1f} s; this client used {client['cpu_share']:.0%} of a core, "
        f"{client['cpu_us_per_token']:.0f} µs a token, and its loop was {client['lag_p99_ms']:.1f} ms late (p99)"
    ]
    lines += [f"  failed: {error['count']} x {kind}: {error['example']}" for kind, error in run["errors"].items()]
    lines += [f"  warning: {warning}" for warning in run["warnings"]]
    return ["\n".join(lines)]


def plot_runs(runs: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw throughput and latencies over the loads. The file's ending says the format; needs matplotlib."""
    figure, (throughput, *panels) = new_plot(4, title)
    loads = range(len(runs))
    throughput.plot(loads, [run["output_tokens_per_s"] for run in runs], marker="o")
    throughput.set_ylabel("output tokens/s")
    for panel, name in zip(panels, ("ttft_ms", "itl_ms", "e2e_ms"), strict=True):
        for percent, style in ((50, "o-"), (90, "s--"), (99, "^:")):
            panel.plot(loads, [run[name][f"p{percent}"] for run in runs], style, label=f"p{percent}")
        panel.set_ylabel(f"{_NAMES[name]}, ms")
        panel.legend(frameon=False)
    for panel in (throughput, *panels):
        panel.set_xticks(loads, [run["arrivals"] for run in runs])
        panel.set_ylim(bottom=0)
    save_plot(figure, path)
