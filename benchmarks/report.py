"""Reports of the benchmarks: a description of the machine, JSON lines, and the statistics of `llmengine.load_test`."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmengine.load_test.statistics import median as median
from llmengine.load_test.statistics import median_of_runs as median_of_runs
from llmengine.load_test.statistics import percentile as percentile
from llmengine.load_test.tables import format_table as format_table
from llmengine.load_test.tables import new_plot as new_plot
from llmengine.load_test.tables import save_plot as save_plot
from llmengine.load_test.tables import without_nan


def new_parser(name: str, doc: str | None) -> ArgumentParser:
    """A parser for `python -m benchmarks.NAME` whose help is the module's docstring."""
    return ArgumentParser(prog=f"benchmarks.{name}", description=doc, formatter_class=RawDescriptionHelpFormatter)


def add_json(parser: ArgumentParser) -> None:
    """Add `--json`, the file to which `append_record` writes."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line for each result")


def read_records(paths: Iterable[Path], benchmark: str) -> list[dict[str, Any]]:
    """The records of a benchmark in files that `append_record` wrote.

    Raises `SystemExit` for a file that cannot be read or holds anything else, and where there is no such record.
    """
    records = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            found = [record for record in map(json.loads, lines) if record["benchmark"] == benchmark]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path}: no file of a benchmark's JSON lines: {error!r}") from error
        if not found:
            raise SystemExit(f"{path}: no results of the benchmark {benchmark!r}")
        records += found
    return records


def require_gpu() -> None:
    """Exit with a message if torch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("a GPU is needed: this benchmark measures kernels of the CUDA backend")


def machine() -> dict[str, Any]:
    """Facts that a reader needs to compare figures: processor, cores, versions, load."""
    import torch
    import transformers

    return {
        "cpu": _cpu_model(),
        "num_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average_1m": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def peak_host_bytes() -> float:
    """The most memory that this process has had resident; nan where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((float(int(line.split()[1]) << 10) for line in lines if line.startswith("VmHWM:")), math.nan)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def append_record(arguments: Namespace, benchmark: str, results: Any, **more: Any) -> None:
    """Append one JSON line with machine, arguments and results to the file `arguments.json`, if there is one.

    Args:
        more: further entries of the record.
    """
    if arguments.json is None:
        return
    record = {"benchmark": benchmark, "machine": machine(), "arguments": vars(arguments), **more, "results": results}
    append_json(arguments.json, record)


def append_json(path: Path | None, record: Mapping[str, Any]) -> None:
    """Append one JSON line; nan becomes null, and what JSON has no type for its str. Does nothing without a path."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(without_nan(record), allow_nan=False, default=str) + "\n")


def positive_integers(text: str) -> list[int]:
    """[1, 8] for the argument "1,8"; anything but integers >= 1 is a usage error."""
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ArgumentTypeError(f"must be a list of integers >= 1 such as 1,8,64, not {text!r}")
    return [int(part) for part in parts]


def chosen_rows(text: str, rows: Collection[str]) -> list[str]:
    """The rows that a list names, which semicolons separate: each item is a row's name, or how names begin.

    An item that neither is nor begins a name is a usage error.
    """
    chosen: set[str] = set()
    for item in text.split(";"):
        named = [row for row in rows if row == item] or [row for row in rows if row.startswith(item)]
        if not named:
            raise ArgumentTypeError(f"{item!r} begins the name of no row: {'; '.join(rows)}")
        chosen.update(named)
    return [row for row in rows if row in chosen]


def print_cells(cells: Sequence[object], width: int, first: int | None = None) -> None:
    """Print one row of a table that grows while it is measured.

    Args:
        width: of the right-aligned cells.
        first: width of the first cell, which is then left-aligned.
    """
    label = f"{cells[0]!s:>{width}}" if first is None else f"{cells[0]!s:<{first}}"
    print(label, *(f"{cell!s:>{width}}" for cell in cells[1:]), flush=True)
