"""Runs the engine's tests under every other supported Python version that this machine has.

The engine does not need torch, so torch is not installed: for some interpreters it is a download of gigabytes. Prints
the interpreters that were used and exits with the status of the first failure.
"""

import glob
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
ROOT = Path(__file__).resolve().parents[1]
TEST_PACKAGES = ("pytest", "pytest-asyncio", "pytest-xdist", "hypothesis", "llguidance")
TESTS = (
    *("engine", "chat/test_templates.py", "tokenizer/test_bounds.py", "tokenizer/test_detokenizer.py"),
    *("test_config.py", "test_generate.py", "test_public_api.py", "test_request_options.py", "test_sampling_params.py"),
)
"""Tests that do not need torch."""


def find_python(version: str) -> str | None:
    """Path of an interpreter of this version, from PATH or installed by pyenv; None if there is none."""
    candidates = [shutil.which(f"python{version}")]
    root = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    candidates += sorted(glob.glob(f"{root}/versions/{version}.*/bin/python"))
    for candidate in filter(None, candidates):
        probe = [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        result = subprocess.run(probe, capture_output=True, text=True, check=False)
        if result.returncode == 0 and result.stdout.strip() == version:
            return candidate
    return None


def requirements() -> list[str]:
    """The package's dependencies without torch, and the packages that the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [name for name in project["dependencies"] if not name.startswith("torch>")] + list(TEST_PACKAGES)


def run_tests(version: str, interpreter: str) -> None:
    environment = ROOT / f".venv-{version}"
    subprocess.run([interpreter, "-m", "venv", "--clear", environment], check=True)
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *requirements()], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", "."], check=True)
    subprocess.run([python, "-m", "pytest", "-n", "2", *(f"tests/{name}" for name in TESTS)], check=True)


def main() -> int:
    os.chdir(ROOT)
    for version in VERSIONS:
        if version == "{}.{}".format(*sys.version_info):
            continue
        interpreter = find_python(version)
        if interpreter is None:
            print(f"Python {version}: not found on this machine", flush=True)
            continue
        print(f"Python {version}: {interpreter}", flush=True)
        try:
            run_tests(version, interpreter)
        except subprocess.CalledProcessError as error:
            print(f"Python {version}: {error}", file=sys.stderr)
            return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
