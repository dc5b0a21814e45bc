"""Types of arguments that several commands have."""

from __future__ import annotations

import argparse


def positive_int(text: str) -> int:
    """The value of an argument, which must be an integer of at least 1; anything else is a usage error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)
