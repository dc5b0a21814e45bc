"""Settings of the whole test suite: hypothesis's examples are the same in every run, and files run in parallel."""

import gc
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

MAX_PROCESSES = 4
"""More would need memory for as many models, and gain little: the longest file is about a quarter of the whole."""

# Hypothesis also draws the constants of local modules that happen to be imported, which would make a test's examples
# depend on the tests that ran before it in its process.
vars(providers)["is_local_module_file"] = lambda path: False
settings.register_profile("llmengine", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("llmengine")

LONGEST = (
    "test_smollm2_short.py",
    "test_static.py",
    "test_ray.py",
    "test_pages.py",
    "test_shared_cpu.py",
)
"""Files that take about a minute or more and that no process should begin last; slow tests make a file one of them."""

NEEDS_DEVICE = ("kernels", "cuda", "tensorrt")
"""Directories whose tests run on the GPU where there is one, by the fixture `device`."""

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
HAS_GPU = Path("/dev/nvidiactl").exists()

# A shell's background jobs ignore it, and so would the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if IS_WORKER:  # read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if not HAS_GPU:  # read when triton is imported, which may be in a file without the fixture `device`
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Where pytest-xdist is installed, spread directories' files over processes, unless `-n` says otherwise (`-n 0`).

    Single files, debugging (`--pdb`) and a GPU, whose memory the tests measure, are left to one process.
    """
    option = config.option
    if IS_WORKER or not config.pluginmanager.hasplugin("xdist") or option.numprocesses is not None or option.usepdb:
        return
    if all(argument.split("::")[0].endswith(".py") for argument in config.args):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    option.numprocesses = 0 if HAS_GPU else min(cores, MAX_PROCESSES)
    option.dist = "loadfile"  # fixtures of a module are made once
    option.loadscopereorder = False  # that would leave files of few, long tests for the end


@pytest.fixture(autouse=True, scope="module")
def the_cpu_unless_a_device_is_named(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let `device="auto"` be the CPU, so that a test expects the same on a machine with a GPU as on one without."""
    from llmengine import backends

    choose = backends.choose_device
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name not in NEEDS_DEVICE:
            patch.setattr(backends, "choose_device", lambda name: choose("cpu" if name == "auto" else name))
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that none runs alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST and item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while tests are collected, and keep what that has imported out of later garbage collections.

    It is 800,000 objects, which each of them would look at for 0.7 s.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries say at the exit that theirs leaked
