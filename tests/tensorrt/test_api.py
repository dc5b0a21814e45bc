"""Which library is taken, what is said where none can be, and how its messages arrive."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from segment_helpers import library_or_skip

from llmengine.backends.tensorrt.api import Library, accepted, not_none, quote
from llmengine.backends.tensorrt.spec import BuildTarget
from llmengine.errors import ConfigError, EngineError

ROOT = Path(__file__).parents[2]
LOAD = """
from llmengine.backends.tensorrt.api import load_library
from llmengine.errors import ConfigError
try:
    print(load_library())
except ConfigError as error:
    print(error)
"""


def load_with(directory: Path, **modules: str) -> str:
    """Return what loading says where only these modules are installed: name -> source of its __init__.py."""
    for name, source in modules.items():
        package = directory / name
        package.mkdir()
        (package / "__init__.py").write_text(textwrap.dedent(source))
    path = os.pathsep.join([str(ROOT), str(directory)])
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-c", LOAD],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
        cwd=directory,
    )
    return done.stdout.strip()


STUB = """
    class Anything:
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything()
        def __hash__(self):
            return 1
    class ILogger:
        Severity = Anything()
        def __init__(self):
            pass
    __version__ = "99.1"
    def __getattr__(name):
        if name in ("ComputeCapability", "IRuntimeCache"):
            raise AttributeError(name)
        return Anything()
"""


def test_nothing_installed(tmp_path: Path) -> None:
    (tmp_path / "tensorrt").mkdir()  # a folder of that name is no library
    said = load_with(tmp_path)
    assert "tensorrt is not installed (pip install llmengine[tensorrt])" in said
    assert "tensorrt_rtx is not installed (pip install llmengine[tensorrt-rtx])" in said


def test_the_full_library_comes_first(tmp_path: Path) -> None:
    assert load_with(tmp_path, tensorrt=STUB, tensorrt_rtx=STUB) == "tensorrt 99.1"


def test_an_old_or_broken_library_is_named_and_the_other_one_taken(tmp_path: Path) -> None:
    old = "__version__ = '8.6'\nclass Builder:\n    build_serialized_network = 1\n"
    assert load_with(tmp_path, tensorrt=old, tensorrt_rtx=STUB) == "tensorrt_rtx 99.1"
    said = load_with(tmp_path / "tensorrt", tensorrt_rtx="raise OSError('libnvinfer.so: not found')")
    assert "tensorrt_rtx does not load: libnvinfer.so: not found" in said


def test_an_old_library_says_what_it_lacks(tmp_path: Path) -> None:
    said = load_with(tmp_path, tensorrt="__version__ = '8.6'\n")
    assert "tensorrt 8.6 is too old, it has no " in said
    assert "IExecutionContext.update_device_memory_size_for_shapes" in said
    assert "pip install llmengine[tensorrt] -U" in said


@pytest.fixture
def library() -> Library:
    return library_or_skip()


def test_hopper_needs_the_full_library(library: Library) -> None:
    if not library.features.target_capabilities:
        pytest.skip(f"{library} runs there")
    with pytest.raises(ConfigError, match=r"compute capability 9\.0.*pip install llmengine\[tensorrt\] instead"):
        library.check_device(9, 0)
    library.check_device(8, 9)
    library.check_target(BuildTarget((80, 120)))


def test_a_library_that_builds_for_the_device_at_hand_is_told_no_other(library: Library) -> None:
    features = dataclasses.replace(library.features, target_capabilities=())
    config = library.create_builder().create_builder_config()
    before = getattr(config, "num_compute_capabilities", None)
    dataclasses.replace(library, features=features).set_target(config, BuildTarget((90,)))
    assert getattr(config, "num_compute_capabilities", None) == before


def test_messages_arrive_at_the_thread_that_caused_them(library: Library, caplog: pytest.LogCaptureFixture) -> None:
    severity = library.trt.ILogger.Severity
    others: list[str] = []

    def another_thread() -> None:
        with library.log.capture() as messages:
            library.log.handle.log(severity.ERROR, "its own")
            others.extend(messages)

    with caplog.at_level(logging.INFO, "llmengine.tensorrt"), library.log.capture() as messages:
        library.log.handle.log(severity.ERROR, "first")
        library.log.handle.log(severity.WARNING, "not an error")
        with library.log.capture() as inner:
            library.log.handle.log(severity.INTERNAL_ERROR, "second")
        for task in (another_thread, lambda: library.log.handle.log(severity.ERROR, "a thread of the library's")):
            thread = threading.Thread(target=task)
            thread.start()
            thread.join()
    library.log.handle.log(severity.ERROR, "too late")
    assert inner == ["second"]
    assert messages == ["first", "second", "a thread of the library's"]
    assert others == ["its own"]
    levels = {record.getMessage(): record.levelno for record in caplog.records}
    assert levels["not an error"] == logging.WARNING
    assert levels["second"] == logging.ERROR


def test_a_real_mistake_is_logged_and_quoted(library: Library) -> None:
    network = library.create_network(library.create_builder())
    with library.log.capture() as messages:
        network.add_input("x", library.trt.float16, (-1, 8))
        assert network.add_input("x", library.trt.float16, (-1, 8)) is None
    assert "addInput" in quote(messages)


def test_quote_repeats_nothing() -> None:
    assert quote(["a ", "b", "a "]) == "'a'; 'b'"
    assert quote([]) == "the library gave no reason"
    assert quote([], "other") == "other"


@pytest.mark.parametrize(("result", "is_refused"), [(True, False), (False, True), (0, False), (1, False), (-1, True)])
def test_accepted(result: Any, is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(EngineError, match="the call"):
            accepted(result, "the call")
    else:
        accepted(result, "the call")
    with pytest.raises(EngineError, match="the call"):
        not_none(None, "the call")
