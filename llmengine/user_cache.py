"""The user's cache directory, which keeps what was measured or built on this machine between processes."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

_logger = logging.getLogger("llmengine.user_cache")


def cache_dir() -> Path:
    """The directory LLMENGINE_CACHE_DIR if that is set, else llmengine in the user's cache; it may not exist yet."""
    own = os.environ.get("LLMENGINE_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmengine"


def read_choices(file: Path, version: int) -> dict[str, str]:
    """Choices that `write_choices` kept; none of another version, or if the file cannot be read, which is logged."""
    try:
        stored = json.loads(file.read_text())
        if stored["version"] != version:
            return {}
        return {str(key): str(name) for key, name in dict(stored["choices"]).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("ignoring the measured choices in %s: %r", file, error)
        return {}


def write_choices(file: Path, version: int, choices: Mapping[str, str]) -> None:
    """Keep measured choices in place of those in the file; a failure is logged."""
    text = json.dumps({"version": version, "choices": dict(choices)}, indent=1)
    try:
        replace_file(file, text.encode())
    except OSError as error:
        _logger.warning("measured choices could not be kept in %s: %r", file, error)


def replace_file(file: Path, content: bytes) -> None:
    """Write a file, with its directory, so that no other process ever reads half of it. Raises `OSError`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name, delete=False) as temporary:
        temporary.write(content)
    os.replace(temporary.name, file)
