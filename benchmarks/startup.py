"""Seconds from the start of a Python process until a model is ready, and until its first token.

    python -m benchmarks.startup --shape 8b --dtype bfloat16             empty caches: kernels are compiled
    python -m benchmarks.startup --shape 8b --dtype bfloat16 --warm      with those that the first run left

Weights are random, so no file is read. What takes long in between is told by the engine's log, which is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import append_json, format_table, machine
from benchmarks.shapes import SHAPES, write_shape

_CODE = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d ms  %(message)s")
from llmengine import LLM, ModelConfig, SamplingParams
options = json.loads(sys.argv[1])
with LLM(ModelConfig(options.pop("model_dir"), load_format="dummy", **options), enable_tokenizer=False) as llm:
    print("ready", flush=True)
    print(llm.generate(list(range(2, 130)), SamplingParams(max_new_tokens=1))[0].num_tokens, flush=True)
"""


def measure(options: Mapping[str, str], caches: Path | None) -> dict[str, float]:
    """Start a process; return its seconds until the model was ready, and until its first token.

    Args:
        options: of `ModelConfig`.
        caches: where compiled kernels and measured choices are kept; None: where they usually are.
    """
    changes = (
        {} if caches is None else {name: str(caches / name) for name in ("TRITON_CACHE_DIR", "LLMENGINE_CACHE_DIR")}
    )
    command = [sys.executable, "-c", _CODE, json.dumps(options)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **changes}) as process:
        assert process.stdout is not None
        figures = {}
        for name, expected in (("ready_s", "ready"), ("first_token_s", "1")):
            line = process.stdout.readline().strip()
            figures[name] = time.perf_counter() - began
            if line != expected:
                process.kill()
                raise SystemExit(f"the process printed {line!r} instead of {expected!r}")
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--warm", action="store_true", help="use what earlier runs have compiled and measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one JSON line")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        model_dir = str(write_shape(arguments.shape, Path(directory)))
        options = {"model_dir": model_dir, "dtype": arguments.dtype, "device": arguments.device}
        figures = measure(options, None if arguments.warm else Path(directory))
    print(
        format_table(["seconds from process start", "s"], [[name, f"{value:.1f}"] for name, value in figures.items()])
    )
    append_json(
        arguments.json,
        {"benchmark": "startup of a shape", "machine": machine(), "arguments": vars(arguments), "results": figures},
    )


if __name__ == "__main__":
    main()
