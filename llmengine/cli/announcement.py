"""What a command says once its model is loaded."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmengine.llm import LLM


def announce(llm: LLM) -> None:
    """Print what runs the model, and in which formats, on stderr if that is a terminal."""
    if sys.stderr.isatty():
        print(llm.info.description, file=sys.stderr, flush=True)
