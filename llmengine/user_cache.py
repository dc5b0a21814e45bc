"""Where what was measured or built on this machine is kept between processes."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return LLMENGINE_CACHE_DIR, else llmengine in the user's cache directory; it may not exist."""
    own = os.environ.get("LLMENGINE_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmengine"
