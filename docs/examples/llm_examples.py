"""The tasks that most programs begin with, one function each. Every function can be copied by itself.

    python llm_examples.py --task run_llm_from_huggingface_model --hf_model_dir MODEL --prompt "Water boils at"

MODEL is a Hugging Face directory, a `.gguf` file or a directory that holds one. `--task` and `--prompt` may be given
several times. Exit codes: 0 done; 2 wrong arguments; 3 the task needs something that this version or this
machine lacks.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch

from llmengine import LLM, ConfigError, GenerationOutput, ModelConfig, SamplingParams

EXIT_NOT_AVAILABLE = 3
PROMPTS = ("The capital of France is", "Water boils at", "The opposite of hot is")


def run_llm_from_huggingface_model(
    prompts: Sequence[str], hf_model_dir: Path, params: SamplingParams, dump_engine_dir: Path | None = None
) -> None:
    """Load a model, generate for all prompts in one batch, and save the engine if `dump_engine_dir` is given."""
    with LLM(ModelConfig(hf_model_dir)) as llm:
        for output in llm.generate(prompts, params):
            show(output)
        if dump_engine_dir is not None:
            llm.save(dump_engine_dir)


def run_llm_from_engine(prompts: Sequence[str], engine_dir: Path, params: SamplingParams) -> None:
    """Load an engine that `LLM.save()` wrote. Nothing is converted or quantized again."""
    with LLM(ModelConfig(engine_dir)) as llm:
        for output in llm.generate(prompts, params):
            show(output)


def run_llm_generate_async_example(
    prompts: Sequence[str], hf_model_dir: Path, params: SamplingParams, streaming: bool = False
) -> None:
    """Run one task for each prompt. Their requests share the running batch."""

    async def answer(llm: LLM, prompt: str) -> None:
        # Without `streaming` there is only the last output.
        async for output in llm.generate_async(prompt, params, streaming=streaming):
            if streaming:
                print(f"[{prompt}] {output.text_delta!r}")
        show(output)

    async def main() -> None:
        async with await LLM.create(ModelConfig(hf_model_dir)) as llm, asyncio.TaskGroup() as group:
            for prompt in prompts:
                group.create_task(answer(llm, prompt))

    asyncio.run(main())


def run_llm_with_quantization(
    prompts: Sequence[str], hf_model_dir: Path, params: SamplingParams, quant_type: Literal["int8", "int4"] = "int8"
) -> None:
    """Quantize the weights while loading. For int4, AWQ calibrates them first, which takes minutes on a CPU."""
    config = ModelConfig(hf_model_dir)
    if quant_type == "int8":
        config.quant_config.init_from_description(quantize_weights=True)
    else:
        config.quant_config.init_from_description(quantize_weights=True, use_int4_weights=True, per_group=True)
    with LLM(config) as llm:
        print(llm.info.description)
        for output in llm.generate(prompts, params):
            show(output)


def run_llm_on_tensor_parallel(
    prompts: Sequence[str],
    hf_model_dir: Path,
    params: SamplingParams,
    tp_size: int = 2,
    devices: Sequence[str] | None = None,
) -> None:
    """Split each matrix over `tp_size` processes, on GPUs where there are as many, else on the CPU.

    `devices` names one for each process: `["cuda:0", "cuda:2"]`.
    """
    config = ModelConfig(hf_model_dir)
    config.parallel_config.tp_size = tp_size
    if devices is None and torch.cuda.device_count() < tp_size:
        devices = ["cpu"] * tp_size
    config.parallel_config.devices = devices
    with LLM(config) as llm:
        print(llm.info.description)
        for output in llm.generate(prompts, params):
            show(output)


def show(output: GenerationOutput) -> None:
    """Print a finished output on one line."""
    print(f"{output.prompt!r} -> {output.text!r} ({output.finish_reason})", flush=True)


TASKS: dict[str, Callable[[argparse.Namespace, SamplingParams], None]] = {
    "run_llm_from_huggingface_model": lambda given, params: run_llm_from_huggingface_model(
        given.prompt, given.hf_model_dir, params, given.dump_engine_dir
    ),
    "run_llm_from_engine": lambda given, params: run_llm_from_engine(given.prompt, given.dump_engine_dir, params),
    "run_llm_generate_async_example": lambda given, params: run_llm_generate_async_example(
        given.prompt, given.hf_model_dir, params, given.streaming
    ),
    "run_llm_with_quantization": lambda given, params: run_llm_with_quantization(
        given.prompt, given.hf_model_dir, params, given.quant_type
    ),
    "run_llm_on_tensor_parallel": lambda given, params: run_llm_on_tensor_parallel(
        given.prompt, given.hf_model_dir, params, given.tp_size, given.devices
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tasks in the given order. Returns the exit code."""
    given = _parse(argv)
    params = SamplingParams(max_new_tokens=given.max_new_tokens)
    for name in given.task:
        print(f"== {name}", flush=True)
        try:
            TASKS[name](given, params)
        except ConfigError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return EXIT_NOT_AVAILABLE
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Examples of llmengine.")
    parser.add_argument("--task", action="append", required=True, choices=TASKS, help="may be given several times")
    parser.add_argument("--hf_model_dir", type=Path, help="Hugging Face directory, .gguf file or directory with one")
    parser.add_argument("--dump_engine_dir", type=Path, help="where an engine is saved and loaded from")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="for each prompt (%(default)s)")
    parser.add_argument("--streaming", action="store_true", help="print tokens as they come")
    parser.add_argument("--quant_type", choices=("int8", "int4"), default="int8", help="(%(default)s)")
    parser.add_argument("--tp_size", type=int, default=2, help="processes that share the model (%(default)s)")
    parser.add_argument("--devices", nargs="+", metavar="DEVICE", help="one for each process: cuda:0 cuda:2")
    given = parser.parse_args(argv)
    given.prompt = given.prompt or list(PROMPTS)
    for name in given.task:
        needed = "dump_engine_dir" if name == "run_llm_from_engine" else "hf_model_dir"
        if getattr(given, needed) is None:
            parser.error(f"{name} needs --{needed}")
    return given


if __name__ == "__main__":
    sys.exit(main())
