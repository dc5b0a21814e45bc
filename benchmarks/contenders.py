"""Contenders of a comparison, each in a process of its own: llmengine, transformers, llama.cpp and OpenVINO GenAI.

OpenMP's threads belong to the thread that started them, and libgomp stops spinning once a process has more of them than
the machine has cores. Two engines in one process would therefore slow each other down even while one of them is idle.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]

PEERS = ("generate", "continuous")


class Contender(Protocol):
    """An engine in another process."""

    def run(self, prompts: Prompts, num_tokens: int) -> float:
        """Seconds of generating exactly `num_tokens` tokens for each of the prompts."""

    def close(self) -> None:
        """End the process."""


class EngineRunner:
    """llmengine without tokenizer and prefix cache.

    Args:
        options: further options of `ModelConfig`, such as {"quant": "int8"}.
    """

    def __init__(self, model: Path, threads: int, options: Mapping[str, Any]) -> None:
        from benchmarks.models import load_llm
        from llmengine import SchedulerConfig

        self.llm = load_llm(
            model,
            # For throughput: nobody watches single tokens here, so prompts need not be split into small chunks.
            SchedulerConfig(max_tokens_per_step=1024, max_tokens_per_mixed_step=1024),
            device="cpu",
            num_threads=threads,
            **options,
        )

    def describe(self) -> str:
        """The engine's description of itself."""
        return self.llm.info.description

    def warm_up(self, prompts: Prompts, num_tokens: int) -> str:
        """Run once, briefly, and return `describe()`."""
        self.run(prompts, min(num_tokens, 8))
        return self.describe()

    def run(self, prompts: Prompts, num_tokens: int) -> float:
        """Seconds of one `generate` call."""
        from benchmarks.workloads import exact_length

        began = time.perf_counter()
        outputs = self.llm.generate(list(prompts), exact_length(num_tokens))
        seconds = time.perf_counter() - began
        assert {output.num_tokens for output in outputs} == {num_tokens}, "a request ended early"
        return seconds

    def overhead(self, num_requests: int, num_tokens: int) -> tuple[float, float]:
        """Share of the step time outside of the forward pass with so many requests, and its milliseconds per step."""
        vocab_size = self.llm.info.vocab_size
        prompts = [[(7919 * (i + 1) * (j + 1)) % vocab_size for j in range(16)] for i in range(num_requests)]
        before = self.llm.stats().counters
        self.run(prompts, num_tokens)
        after = self.llm.stats().counters
        step_s, forward_s = after.step_s - before.step_s, after.forward_s - before.forward_s
        return 1 - forward_s / step_s, 1e3 * (step_s - forward_s) / (after.num_steps - before.num_steps)


class TransformersRunner:
    """transformers on the same weights; kind: "generate" or "continuous"."""

    def __init__(self, model: Path, threads: int, kind: str) -> None:
        import torch

        from benchmarks.transformers_peer import Transformers

        torch.set_num_threads(threads)
        self._kind = kind
        self._transformers = Transformers(model)

    def warm_up(self, prompts: Prompts, num_tokens: int) -> str:
        """Find the fastest variant for this workload and return its name."""
        chosen = self._transformers.choose_variant(self._kind, prompts, num_tokens)
        limit = f" and {chosen.max_batch_tokens} tokens a step" if chosen.max_batch_tokens else ""
        return f"{chosen.attention} attention{limit}"

    def run(self, prompts: Prompts, num_tokens: int) -> float:
        """Seconds of one run."""
        return self._transformers.run(self._kind, prompts, num_tokens)


class WorkerProcess:
    """A `Contender`: a runner that is created in a worker process and runs there."""

    def __init__(self, make_runner: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            1, mp_context=context, initializer=_start_runner, initargs=(make_runner, *arguments)
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the runner and return its result."""
        return self._pool.submit(_call_runner, method, *arguments).result()

    def run(self, prompts: Prompts, num_tokens: int) -> float:
        seconds: float = self.call("run", prompts, num_tokens)
        return seconds

    def close(self) -> None:
        self._pool.shutdown()


class OtherInterpreter:
    """A `Contender`: an engine in another Python interpreter, which has that engine's package.

    Args:
        script: a file beside this one that reads and answers lines as `llama_cpp_server.py` does.
    """

    def __init__(self, python: Path, script: str, model: Path, threads: int) -> None:
        command = [str(python), str(Path(__file__).with_name(script)), str(model), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._script = script
        self._read_answer()

    def run(self, prompts: Prompts, num_tokens: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._process.stdin.flush()
        return float(self._read_answer())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read_answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer: "):
                return line.removeprefix("answer: ")
        raise SystemExit(
            f"{self._script} exited with code {self._process.wait()}; is its package installed in that environment?"
        )


def llama_cpp(python: Path, model: Path, threads: int) -> OtherInterpreter:
    """llama.cpp with a GGUF file, in an interpreter that has the package xllamacpp."""
    return OtherInterpreter(python, "llama_cpp_server.py", model, threads)


def openvino(python: Path, model: Path, threads: int) -> OtherInterpreter:
    """OpenVINO GenAI with a GGUF file, in an interpreter that has openvino-genai and openvino-tokenizers."""
    return OtherInterpreter(python, "openvino_server.py", model, threads)


def write_gguf_like(model: Path, tensor_type: str, directory: Path) -> Path:
    """Write a copy of the GGUF file `model` whose matrices have the type `tensor_type`, and return its path."""
    import gguf

    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    path = directory / f"{tensor_type}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    wanted = gguf.GGMLQuantizationType[tensor_type]
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


_runner: Any = None


def _start_runner(make_runner: Callable[..., Any], *arguments: Any) -> None:
    global _runner
    _runner = make_runner(*arguments)


def _call_runner(method: str, *arguments: Any) -> Any:
    return getattr(_runner, method)(*arguments)
