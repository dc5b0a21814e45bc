"""One model on several processes: starting ranks, talking to them, and never leaving one behind.

Knows nothing of models. Rank 0 is a thread of the caller's process and holds a `RankGroup`; the other ranks are
processes of ours that hold a `RankChannel`.
"""

from __future__ import annotations

from llmengine.backends.ranks.channel import RankChannel, RankClosed
from llmengine.backends.ranks.collectives import Collectives
from llmengine.backends.ranks.group import RankGroup
from llmengine.backends.ranks.launcher import Launcher, LocalLauncher

__all__ = ["Collectives", "Launcher", "LocalLauncher", "RankChannel", "RankClosed", "RankGroup"]
