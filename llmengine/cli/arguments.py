"""Types of arguments that several commands have."""

from __future__ import annotations

import argparse
from typing import get_args

from llmengine.quant_config import PRESETS, KvQuantization, QuantConfig


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


def chosen_quantization(arguments: argparse.Namespace) -> QuantConfig:
    """What `--quant` and `--kv-cache` ask for."""
    if arguments.quant is None:
        return QuantConfig(kv_cache=arguments.kv_cache)
    return QuantConfig.preset(arguments.quant, kv_cache=arguments.kv_cache)
