"""Damages model files. Readers must raise typed errors that name the file: no crash, no hang, no absurd memory.

`python -m tests.robustness.fuzz --inputs 100000 --seed 1` prints a table and ends with status 1 if anything was found.
Input `index` of a seed is the same on every machine; `--only INDEX` runs it alone and shows its error.

Inputs are made by mutating sound files: bits, cuts, splices, extreme integers, and for JSON its structure. They run in
worker processes with a limit on address space; a watchdog ends a worker whose input takes too long, and the peak of
resident memory is measured for each input.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import faulthandler
import gc
import itertools
import json
import logging
import mmap
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests import ROOT

MAX_SECONDS = 10.0
"""Most that an input may take."""

MAX_EXTRA_BYTES = 24 << 20
"""Resident memory that an input may take beyond four times its size: interpreter, JSON objects, allocator slack."""

ADDRESS_SPACE_BYTES = 1 << 30
"""What a worker may reserve beyond what it starts with."""

TARGETS = (
    *("safetensors", "shards", "index", "bin", "gguf", "gguf_metadata", "config", "generation_config", "engine"),
    *("sealed_engine", "sealed_plans", "plan_files", "tokenizer", "tokenizer_config", "chat_template", "chat_messages"),
    *("quantized", "quantization_config"),
)
"""The kinds of input; `fuzz_targets.py` makes them."""

_READY_SECONDS = 120.0
_EXTREMES = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "\ud800", "../../etc/passwd", "/dev/zero", [], {}, [[]], {"a": {}}, [1, "x"]),
    *(0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**53, 2**63, 10**30, 10**400, 0.0, 0.5, -0.5, 1e-300, 1e300, 1e-45),
    *(float("nan"), float("inf"), "1", "full_attention", "longrope", "yarn", "dynamic", ["sliding_attention"], [0.5]),
)


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        seeds: sound inputs.
        mutate: makes a damaged one of a seed; gets all seeds of the kind to splice from.
        read: reads a damaged input; returns if it is accepted. Gets the number of the seed.
        where: what each error's message must contain, empty for inputs that are no files.
    """

    name: str
    seeds: Sequence[bytes]
    mutate: Callable[[random.Random, bytes, Sequence[bytes]], bytes]
    read: Callable[[int, bytes], object]
    where: str = ""


@dataclass
class Finding:
    """Something that should not have happened, and the input that caused it."""

    target: str
    index: int
    problem: str


@dataclass
class Report:
    """Counts by target and outcome ("accepted" or the error's name), and the most time and memory of an input."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """Add the counts that a worker printed."""
        for name, counts in line["outcomes"].items():
            self.outcomes.setdefault(name, Counter()).update(counts)
        for name, value in line["seconds"].items():
            self.seconds[name] = max(value, self.seconds.get(name, 0.0))
        for name, value in line["memory_bytes"].items():
            self.memory_bytes[name] = max(value, self.memory_bytes.get(name, 0))
        self.findings += [Finding(**finding) for finding in line["findings"]]

    def __str__(self) -> str:
        rows = [("input", "inputs", "accepted", "typed errors", "found", "most ms", "most MiB")]
        found = Counter(finding.target for finding in self.findings)
        for name, counts in sorted(self.outcomes.items()):
            errors = ", ".join(f"{count} {kind}" for kind, count in counts.most_common() if kind != "accepted")
            sizes = (f"{self.seconds[name] * 1e3:.0f}", f"{self.memory_bytes[name] / 2**20:.1f}")
            rows.append((name, str(counts.total()), str(counts["accepted"]), errors, str(found[name]), *sizes))
        rows.append(("total", str(sum(map(Counter.total, self.outcomes.values()))), "", "", str(found.total()), "", ""))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def mutate_bytes(rng: random.Random, seed: bytes, seeds: Sequence[bytes]) -> bytes:
    """Flip, overwrite, cut, repeat, splice; mostly near the beginning, where headers are."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        size = max(1, len(data))
        at = min(rng.randrange(size), rng.randrange(size)) if rng.random() < 0.7 else rng.randrange(min(size, 64))
        length = rng.choice((1, 2, 4, 8, 8, 16, rng.randrange(1, 200)))
        match rng.randrange(8):
            case 0 | 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            case 2 | 3:
                width = rng.choice((1, 2, 4, 8))
                data[at : at + width] = (rng.choice(_EXTREMES) & (1 << 8 * width) - 1).to_bytes(width, "little")
            case 4:
                del data[at:]
            case 5:
                del data[at : at + length]
            case 6:
                data[at:at] = data[at : at + length] * rng.randrange(1, 4)
            case _:
                other = rng.choice(seeds)
                start = rng.randrange(max(1, len(other)))
                data[at : at + rng.choice((0, length))] = other[start : start + length]
    return bytes(data)


def mutate_json(rng: random.Random, seed: bytes, seeds: Sequence[bytes]) -> bytes:
    """Change the structure: replace, drop, copy and rename anywhere in the tree; sometimes the text itself."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, seed, seeds)
    tree = [json.loads(seed)]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _mutate_tree(rng, tree, json.loads(rng.choice(seeds)))
    return json.dumps(tree[0]).encode("utf-8", "surrogatepass")


def _mutate_tree(rng: random.Random, tree: list[Any], other: Any) -> None:
    place: Any = tree
    key: Any = 0
    while isinstance(place[key], dict | list) and place[key] and (place is tree or rng.random() < 0.7):
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    match rng.randrange(8):
        case 0 | 1 | 2:
            place[key] = copy.deepcopy(rng.choice(_VALUES))
        case 3:
            del place[key]
        case 4 if isinstance(place[key], int | float):
            with contextlib.suppress(OverflowError):
                place[key] = rng.choice((place[key] + 1, place[key] - 1, -place[key], place[key] * 2, place[key] / 2))
        case 5 if isinstance(place, dict):
            place[rng.choice(("", "x", key + "x", *map(str, place)))] = place.pop(key)
        case 6:
            place[key] = [place[key]] * rng.choice((1, 2, 3, 200))
        case _:
            if isinstance(place, dict) and isinstance(other, dict) and other:
                taken = rng.choice(list(other))
                place[taken] = other[taken]
            else:
                place[key] = other
    if not tree:
        tree.append(None)


def mutate_text(rng: random.Random, seed: bytes, seeds: Sequence[bytes]) -> bytes:
    """Move, drop and repeat words, and take some from other seeds."""
    words = re.split(r"(\W)", seed.decode())
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at, count = rng.randrange(len(words)), rng.choice((1, 1, 2, 4, 10))
        source = re.split(r"(\W)", rng.choice(seeds).decode()) if rng.random() < 0.5 else words
        start = rng.randrange(len(source))
        words[at : at + rng.choice((0, 1, count))] = source[start : start + rng.choice((0, 1, count))]
        words = words or [""]
    return "".join(words).encode()


class Worker:
    """Runs inputs one after another in this process, and counts the outcomes."""

    def __init__(self, targets: Sequence[Target], seed: int) -> None:
        self._targets, self._seed = targets, seed
        self.report = Report()

    def make(self, index: int) -> tuple[Target, int, bytes]:
        """Return the input `index`: its kind, the number of its seed, and the damaged bytes."""
        rng = random.Random(f"{self._seed}:{index}")
        target = self._targets[index % len(self._targets)]
        number = rng.randrange(len(target.seeds))
        return target, number, target.mutate(rng, target.seeds[number], target.seeds)

    def run(self, index: int) -> BaseException | None:
        """Read input `index`; returns its error."""
        from llmengine.errors import LLMEngineError

        target, number, data = self.make(index)
        before = _reset_peak()
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        begin = time.perf_counter()
        error, problem = None, ""
        try:
            target.read(number, data)
        except LLMEngineError as caught:
            error = caught
            if target.where not in str(caught):
                problem = f"the message does not name the file: {type(caught).__name__}: {caught}"
        except BaseException as caught:
            error, problem = caught, f"{type(caught).__name__}: {caught}"
        seconds = time.perf_counter() - begin
        faulthandler.cancel_dump_traceback_later()
        memory = _peak() - before
        if memory > MAX_EXTRA_BYTES + 4 * len(data):
            problem += f" took {memory >> 20} MiB for {len(data)} bytes"
        self._count(target.name, error, seconds, memory)
        if problem:
            self.report.findings.append(Finding(target.name, index, problem))
        return error

    def _count(self, name: str, error: BaseException | None, seconds: float, memory: int) -> None:
        kind = "accepted" if error is None else type(error).__name__
        self.report.outcomes.setdefault(name, Counter())[kind] += 1
        self.report.seconds[name] = max(seconds, self.report.seconds.get(name, 0.0))
        self.report.memory_bytes[name] = max(memory, self.report.memory_bytes.get(name, 0))


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{key}:")[2].split(maxsplit=1)[0]) << 10


def _reset_peak() -> int:
    """Return the resident bytes, and begin to measure their peak."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def run_inputs(num_inputs: int, seed: int, num_workers: int = 1, names: Sequence[str] = ()) -> Report:
    """Run inputs 0 to `num_inputs` - 1 of a seed in worker processes; those that end a worker are findings too."""
    report = Report()
    bounds = [num_inputs * worker // num_workers for worker in range(num_workers + 1)]
    with ThreadPoolExecutor(num_workers) as pool:
        ranges = itertools.pairwise(bounds)
        for lines in pool.map(lambda part: _run_range(*part, seed, names), ranges):
            for line in lines:
                report.add(line)
    return report


def _run_range(begin: int, end: int, seed: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return what the workers for [begin, end) printed; each that dies is followed by one for the rest."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        progress = Path(scratch) / "progress"
        while begin < end:
            progress.write_bytes(b"")
            command = [sys.executable, "-m", "tests.robustness.fuzz", "--seed", str(seed), "--targets", ",".join(names)]
            command += ["--range", str(begin), str(end), scratch]
            quiet = {**os.environ, "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=quiet, cwd=ROOT)
            printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            lines += printed
            if done.returncode == 0:
                return lines
            reached = progress.read_bytes()
            if not reached or (done.returncode == 1 and "Timeout (" not in done.stderr):
                raise RuntimeError(f"a worker failed by itself:\n{done.stderr}")
            index = int.from_bytes(reached, "little")
            problem = f"the worker ended with status {done.returncode}: {done.stderr[:1500]}"
            chosen = names or TARGETS
            finding = Finding(chosen[index % len(chosen)], index, problem)
            empty: dict[str, Any] = {"outcomes": {}, "seconds": {}, "memory_bytes": {}}
            lines.append({**empty, "findings": [asdict(finding)]})
            begin = index + 1
    return lines


_FLUSH = 100


def _work(begin: int, end: int, seed: int, names: Sequence[str], scratch: Path) -> None:
    """Be a worker: print a JSON line of counts every so often, and note in `progress` the input that is being run."""
    from tests.robustness.fuzz_targets import make_targets

    faulthandler.enable()
    faulthandler.dump_traceback_later(_READY_SECONDS, exit=True)
    worker = Worker(make_targets(Path(tempfile.mkdtemp(dir=scratch)), names), seed)
    gc.freeze()
    limit = _status("VmSize") + ADDRESS_SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    progress = scratch / "progress"
    progress.write_bytes(bytes(8))
    with progress.open("r+b") as file, mmap.mmap(file.fileno(), 8) as reached:
        for index in range(begin, end):
            reached[:] = index.to_bytes(8, "little")
            worker.run(index)
            if (index + 1) % _FLUSH == 0 or index + 1 == end:
                findings = [asdict(finding) for finding in worker.report.findings]
                print(json.dumps({**vars(worker.report), "findings": findings}), flush=True)
                worker.report = Report()


def main() -> int:
    logging.getLogger("llmengine").setLevel(logging.ERROR)  # damaged files are warned of, by the thousand
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--targets", default="", help="kinds of input, separated by commas; all if empty")
    parser.add_argument("--only", type=int, help="run this input alone and show its error")
    parser.add_argument("--range", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [name for name in options.targets.split(",") if name]
    if options.range is not None:
        begin, end, scratch = options.range
        _work(int(begin), int(end), options.seed, names, Path(scratch))
        return 0
    if options.only is not None:
        return _show(options.only, options.seed, names)
    begin_s = time.perf_counter()
    report = run_inputs(options.inputs, options.seed, options.workers, names)
    print(f"{report}\n\nseed {options.seed}, {time.perf_counter() - begin_s:.0f} s")
    for finding in {finding.problem[:60]: finding for finding in report.findings}.values():
        print(f"\n{finding.target} --only {finding.index}: {finding.problem}")
    return 1 if report.findings else 0


def _show(index: int, seed: int, names: Sequence[str]) -> int:
    from tests.robustness.fuzz_targets import make_targets

    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        worker = Worker(make_targets(Path(scratch), names), seed)
        target, number, data = worker.make(index)
        print(f"{target.name}, seed file {number}, {len(data)} bytes: {data[:3000]!r}")
        error = worker.run(index)
        if error is not None:
            sys.excepthook(type(error), error, error.__traceback__)
        print(worker.report)
        print(*worker.report.findings, sep="\n")
    return 1 if worker.report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
