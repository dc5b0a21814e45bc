"""A target whose module takes longer to import than any test waits."""

from __future__ import annotations

import time

from llmengine.backends.ranks.channel import RankChannel

time.sleep(600)


def run(channel: RankChannel, payload: bytes) -> None:
    """Never reached."""
