"""Seconds from the start of a Python process until a model is ready, and until its first token.

    python -m benchmarks.startup --shape 8b --dtype bfloat16             empty caches: kernels are compiled
    python -m benchmarks.startup --shape 8b --dtype bfloat16 --warm      with those that the first run left

Weights are random, so no file is read. The engine's log, which is shown, says what takes long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.models import add_quantization, add_shape, quant_config
from benchmarks.report import add_json, append_record, format_table, new_parser
from benchmarks.shapes import write_shape

_CODE = """
import json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d ms  %(message)s")
from llmengine import LLM, ModelConfig, QuantConfig, SamplingParams
options = json.loads(sys.argv[1])
options["quant_config"] = QuantConfig(**options.get("quant_config", {}))
with LLM(ModelConfig(options.pop("model_dir"), load_format="dummy", **options), enable_tokenizer=False) as llm:
    print("ready", flush=True)
    print(llm.generate(list(range(2, 130)), SamplingParams(max_new_tokens=1))[0].num_tokens, flush=True)
"""


def time_lines(
    code: str, arguments: Sequence[str], expected: Sequence[str], environment: Mapping[str, str] | None = None
) -> list[float]:
    """Seconds from the start of a Python process that runs `code` until it has printed each of the `expected` lines.

    Args:
        environment: changes to this process's environment.

    Raises `SystemExit` if the process prints anything else or exits with an error.
    """
    command, seconds = [sys.executable, "-c", code, *arguments], []
    began = time.perf_counter()
    changed = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=changed) as process:
        assert process.stdout is not None
        for line in expected:
            printed = process.stdout.readline().strip()
            seconds.append(time.perf_counter() - began)
            if printed != line:
                process.kill()
                raise SystemExit(f"the process printed {printed!r} instead of {line!r}")
    if process.returncode:
        raise SystemExit(f"the process exited with code {process.returncode}")
    return seconds


def measure(options: Mapping[str, Any], caches: Path | None) -> dict[str, float]:
    """Seconds from the start of a process until its model was ready, and until its first token.

    Args:
        options: options of `ModelConfig`, as JSON values.
        caches: directory for compiled kernels and measured choices; None: the usual ones.
    """
    names = () if caches is None else ("TRITON_CACHE_DIR", "LLMENGINE_CACHE_DIR")
    seconds = time_lines(_CODE, [json.dumps(options)], ["ready", "1"], {name: str(caches / name) for name in names})
    return dict(zip(("ready_s", "first_token_s"), seconds, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = new_parser("startup", __doc__)
    add_shape(parser)
    add_quantization(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--warm", action="store_true", help="use what earlier runs have compiled and measured")
    add_json(parser)
    arguments = parser.parse_args(argv)
    options = {"dtype": arguments.dtype, "device": arguments.device, "quant_config": asdict(quant_config(arguments))}
    with tempfile.TemporaryDirectory() as directory:
        options["model_dir"] = str(write_shape(arguments.shape, Path(directory)))
        figures = measure(options, None if arguments.warm else Path(directory))
    print(
        format_table(["seconds from process start", "s"], [[name, f"{value:.1f}"] for name, value in figures.items()])
    )
    append_record(arguments, "startup of a shape", figures)


if __name__ == "__main__":
    main()
