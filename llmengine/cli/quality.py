"""The command `eval`, and how a `QualityReport` is printed."""

from __future__ import annotations

import argparse
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmengine.checkpoints.saved_files import size_text
from llmengine.cli.announcement import announce
from llmengine.cli.arguments import (
    add_kv_cache_argument,
    add_parallel_arguments,
    add_quant_argument,
    chosen_config,
    positive_int,
)
from llmengine.errors import ConfigError
from llmengine.quantization.quality_report import ModelFigures, QualityReport


def add_eval_command(commands: Any) -> None:
    """Add the command to the subparsers of `llmengine`."""
    evaluate = commands.add_parser(
        "eval", help="measure a model's perplexity, size and speed, and how it differs from another"
    )
    evaluate.add_argument(
        "model", type=Path, metavar="MODEL", help="Hugging Face directory, .gguf file or saved engine"
    )
    evaluate.add_argument(
        "--against",
        type=Path,
        metavar="MODEL",
        help="the reference, with the same tokenizer (default with --quant or --kv-cache: the model without them)",
    )
    add_quant_argument(evaluate, "quantize the model's weights first")
    add_kv_cache_argument(evaluate)
    add_parallel_arguments(evaluate)
    evaluate.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to score (default: the text that comes with the package)"
    )
    add_evaluation_arguments(evaluate)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file as JSON")
    evaluate.set_defaults(run=_eval)


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how much text is scored, and whether speed is measured."""
    parser.add_argument(
        "--windows",
        type=positive_int,
        default=32,
        metavar="N",
        help="most windows of text to score, from all over it (default: %(default)s)",
    )
    parser.add_argument(
        "--window-tokens", type=positive_int, default=512, metavar="N", help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument(
        "--stride",
        type=positive_int,
        metavar="N",
        help="tokens between the beginnings of two windows (default: a window, so that none overlap)",
    )
    parser.add_argument("--skip-speed", action="store_true", help="do not measure tokens/s")


def check_evaluation_arguments(arguments: argparse.Namespace) -> None:
    """Raise `ConfigError` for windows that cannot be, before a model is loaded."""
    from llmengine.quantization.evaluation import WindowPlan

    size, stride = arguments.window_tokens, arguments.stride
    WindowPlan(size, size if stride is None else stride, arguments.windows)


def _eval(arguments: argparse.Namespace) -> int:
    from llmengine.checkpoints.opening import open_model
    from llmengine.llm import LLM

    check_evaluation_arguments(arguments)
    if arguments.against is not None:
        open_model(arguments.against)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ConfigError(f"{arguments.json}: cannot be written: {os.strerror(errno.ENOENT)}")
    text = None if arguments.text is None else _read_text(arguments.text)
    with LLM(chosen_config(arguments)) as llm:
        announce(llm)
        report = llm.evaluate(
            arguments.against,
            text=text,
            text_name=None if arguments.text is None else arguments.text.name,
            windows=arguments.windows,
            window_tokens=arguments.window_tokens,
            stride=arguments.stride,
            measure_speed=not arguments.skip_speed,
            progress=True,
        )
    for line in report_lines(report):
        print(line)
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{arguments.json}: cannot be written: {error.strerror or error}") from error
    return 0


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error


def report_lines(report: QualityReport) -> list[str]:
    """A table with a line for each figure, and what the figures were measured on."""
    sides = [report.model] if report.reference is None else [report.model, report.reference]
    names = ["model", "reference", "change"] if len(sides) > 1 else ["model"]
    rows = [["", *names], ["weights", *map(_weights_text, sides)]]
    rows.append(_row("perplexity", sides, lambda side: side.perplexity, lambda value: f"{value:.4f}", decimals=2))
    if report.top1_agreement is not None and report.mean_kl is not None:
        rows.append(["top-1 agreement", f"{report.top1_agreement:.2%}"])
        rows.append(["KL divergence", f"{report.mean_kl:.5f} nats"])
    rows.append(_row("weights in memory", sides, lambda side: side.weight_bytes, size_text))
    if all(side.file_bytes is not None for side in sides):
        rows.append(_row("weights in files", sides, lambda side: side.file_bytes or 0, size_text))
    rows.append(["KV cache", *(side.kv_dtype for side in sides)])
    rows.append(_row("KV cache a token", sides, lambda side: side.kv_bytes_per_token, size_text))
    for count in report.model.tokens_per_s if all(side.tokens_per_s for side in sides) else ():
        name = f"tokens/s, {count} request{'' if count == 1 else 's'}"
        rows.append(_row(name, sides, lambda side, count=count: side.tokens_per_s[count], lambda value: f"{value:.1f}"))  # type: ignore[misc]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(names) + 1)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    text = "the built-in text" if report.text == "built-in" else repr(report.text)
    return [
        *lines,
        f"on {text}: {report.num_windows} window{'' if report.num_windows == 1 else 's'} of {report.window_tokens} "
        f"tokens, stride {report.stride}, {report.num_tokens} token{'' if report.num_tokens == 1 else 's'} scored",
    ]


def _weights_text(side: ModelFigures) -> str:
    return "not quantized" if side.weight_format == "none" else side.weight_format


def _row(
    name: str,
    sides: list[ModelFigures],
    value: Callable[[ModelFigures], Any],
    text: Callable[[Any], str],
    decimals: int = 1,
) -> list[str]:
    values = [value(side) for side in sides]
    row = [name, *map(text, values)]
    if len(values) > 1 and values[1]:
        row.append(f"{values[0] / values[1] - 1:+.{decimals}%}")
    return row
