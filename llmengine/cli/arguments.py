"""Types of arguments that several commands have."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, get_args

from llmengine.quant_config import PRESETS, KvQuantization, QuantConfig

if TYPE_CHECKING:
    from llmengine.config import ModelConfig


def positive_int(text: str) -> int:
    """The value of an argument, which must be an integer of at least 1; anything else is a usage error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


def add_quant_argument(parser: argparse._ActionsContainer, text: str) -> None:
    """Add `--quant`, the name of a preset; None if it is not given."""
    parser.add_argument("--quant", choices=tuple(PRESETS), help=f"{text}; stored: keep all that a GGUF file quantizes")


def add_kv_cache_argument(parser: argparse._ActionsContainer) -> None:
    """Add `--kv-cache`, a number format."""
    parser.add_argument(
        "--kv-cache",
        choices=get_args(KvQuantization),
        default="none",
        help="number format of the KV cache; none: as the device computes keys and values (default)",
    )


def add_parallel_arguments(parser: argparse._ActionsContainer) -> None:
    """Add `--tp` and `--pp`, the numbers of processes that share a model."""
    parser.add_argument(
        "--tp", type=positive_int, default=1, metavar="N", help="processes that share each matrix (default: 1)"
    )
    parser.add_argument(
        "--pp", type=positive_int, default=1, metavar="N", help="stages into which the layers are cut (default: 1)"
    )


def chosen_config(arguments: argparse.Namespace) -> ModelConfig:
    """`arguments.model` as `--quant`, `--kv-cache`, `--tp` and `--pp` ask for it."""
    from llmengine.config import ModelConfig, ParallelConfig

    quant = QuantConfig() if arguments.quant is None else QuantConfig.preset(arguments.quant)
    quant.kv_cache = arguments.kv_cache
    parallel = ParallelConfig(tp_size=arguments.tp, pp_size=arguments.pp)
    return ModelConfig(arguments.model, quant_config=quant, parallel_config=parallel)
