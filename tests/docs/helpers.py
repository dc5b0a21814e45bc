"""Runs the Python blocks of a page of the documentation."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

from tests import ROOT

_PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def page_name(page: Path) -> str:
    """Return the page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Return (line, source) of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in _PYTHON_BLOCK.finditer(text)]


def run_blocks(page: Path, stop_before: str | None = None) -> dict[str, Any]:
    """Run the blocks of a page in order, in one namespace and one running event loop, as a notebook does.

    Returns the namespace. `stop_before` is a line of the page, a heading say, that ends the run.
    """
    end = None if stop_before is None else page.read_text(encoding="utf-8").splitlines().index(stop_before)
    namespace: dict[str, Any] = {"__name__": "docs"}

    async def run() -> None:
        for line, source in python_blocks(page):
            if end is not None and line > end:
                break
            tree = ast.parse(source, filename=page_name(page))
            ast.increment_lineno(tree, line)
            code = compile(tree, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            result = eval(code, namespace)
            if inspect.iscoroutine(result):
                await result

    asyncio.run(run())
    return namespace
