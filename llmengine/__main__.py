"""`python -m llmengine`."""

from __future__ import annotations

import sys

from llmengine.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
