"""Runs the engine's tests under every other supported Python version that this machine has.

The engine does not need torch, so torch is not installed: for some interpreters it is a download of gigabytes. Nor is
the package, which would compile a native decoder that no test here runs. Environments are made side by side, and beside
the tests of an earlier Python. Prints the interpreters that were used and exits with the status of the first failure.
"""

import glob
import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
ROOT = Path(__file__).resolve().parents[1]
TEST_PACKAGES = ("pytest", "pytest-asyncio", "pytest-xdist", "hypothesis", "llguidance")
TESTS = (
    *(
        "engine",
        "cluster/test_cluster.py",
        "cluster/test_router.py",
        "chat/test_templates.py",
        "tokenizer/test_bounds.py",
        "tokenizer/test_detokenizer.py",
    ),
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


def make_environment(version: str, interpreter: str) -> str:
    """The interpreter of a new environment that has what the tests need."""
    environment = ROOT / f".venv-{version}"
    subprocess.run([interpreter, "-m", "venv", "--clear", environment], check=True)
    python = str(environment / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *requirements()], check=True)
    return python


def run_tests(python: str) -> None:
    """Run the tests on the package in this directory."""
    command = [python, "-m", "pytest", "-n", "2", *(f"tests/{name}" for name in TESTS)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def main() -> int:
    os.chdir(ROOT)
    found = {}
    for version in VERSIONS:
        if version != "{}.{}".format(*sys.version_info):
            if (interpreter := find_python(version)) is not None:
                found[version] = interpreter
            print(f"Python {version}: {interpreter or 'not found on this machine'}", flush=True)
    with ThreadPoolExecutor() as threads:
        environments = {version: threads.submit(make_environment, version, path) for version, path in found.items()}
        for version, environment in environments.items():
            try:
                python = environment.result()
                print(f"Python {version}: {python}", flush=True)
                run_tests(python)
            except subprocess.CalledProcessError as error:
                print(f"Python {version}: {error}", file=sys.stderr)
                return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
