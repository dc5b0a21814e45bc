"""Types of arguments that several commands have."""

from __future__ import annotations

import argparse

from llmengine.quant_config import PRESETS


def positive_int(text: str) -> int:
    """The value of an argument, which must be an integer of at least 1; anything else is a usage error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


def add_quant_argument(parser: argparse._ActionsContainer, text: str) -> None:
    """Add `--quant`, the name of a preset; None if it is not given."""
    parser.add_argument("--quant", choices=tuple(PRESETS), help=text)
