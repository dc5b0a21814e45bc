"""Which TensorRT library is used, the error where none can be, and the way its messages take."""

from __future__ import annotations

import _thread
import dataclasses
import logging
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmengine.backends.tensorrt.library import Library, quote_messages, require_accepted, require_result
from llmengine.backends.tensorrt.spec import BuildTarget
from llmengine.errors import ConfigError, EngineError
from tests import ROOT
from tests.backends.tensorrt.segment_helpers import library_or_skip

LOAD = """
from llmengine.backends.tensorrt.library import load_library
from llmengine.errors import ConfigError
try:
    print(load_library())
except ConfigError as error:
    print(error)
"""


def load_with(directory: Path, **modules: str) -> str:
    """Return loading's message where only these modules are installed: name -> source of its __init__.py."""
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
    (tmp_path / "tensorrt").mkdir()  # a folder of that name is not a library
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
    assert "tensorrt 8.6 is too old: it lacks " in said
    assert "IExecutionContext.update_device_memory_size_for_shapes" in said
    assert "pip install llmengine[tensorrt] -U" in said


@pytest.fixture
def library() -> Library:
    return library_or_skip()


def test_hopper_needs_the_full_library(library: Library) -> None:
    if not library.features.target_capabilities:
        pytest.skip(f"{library} runs there")
    with pytest.raises(ConfigError, match=r"compute capability 9\.0.*pip install llmengine\[tensorrt\]' instead"):
        library.check_device(9, 0)
    library.check_device(8, 9)
    library.check_target(BuildTarget((80, 120)))


def test_a_library_that_builds_for_the_device_at_hand_is_told_no_other(library: Library) -> None:
    features = dataclasses.replace(library.features, target_capabilities=())
    config = library.create_builder().create_builder_config()
    before = getattr(config, "num_compute_capabilities", None)
    dataclasses.replace(library, features=features).set_target(config, BuildTarget((90,)))
    assert getattr(config, "num_compute_capabilities", None) == before


def run_as_thread_of_the_library(function: Callable[[], None]) -> None:
    """Run a function in a thread that `threading` does not know, like the threads that a library starts."""
    done = threading.Event()
    _thread.start_new_thread(lambda: (function(), done.set()), ())
    assert done.wait(30)


def run_as_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


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
        with library.log.capture(pass_on=False):
            library.log.handle.log(severity.ERROR, "of no importance")
        run_as_thread(another_thread)
        run_as_thread(lambda: library.log.handle.log(severity.ERROR, "of code beside us"))
        for text in ("a thread of the library's", "another, known to logging by now"):
            run_as_thread_of_the_library(lambda text=text: library.log.handle.log(severity.ERROR, text))
    library.log.handle.log(severity.ERROR, "too late")
    assert inner == ["second"]
    assert messages == ["first", "second", "a thread of the library's", "another, known to logging by now"]
    assert others == ["its own"]
    levels = {record.getMessage(): record.levelno for record in caplog.records}
    assert levels["not an error"] == logging.WARNING
    assert levels["second"] == logging.ERROR


def test_calls_fail_by_what_they_return_raise_or_log(library: Library) -> None:
    log, error = library.log.handle.log, library.trt.ILogger.Severity.ERROR

    def refuse() -> None:
        log(error, "no room")
        require_result(None, "the call")

    def complain() -> None:
        log(error, "no effect")

    def start() -> None:
        raise RuntimeError("CUDA driver version is insufficient")

    for call, said in (
        (refuse, "it fails: TensorRT refused the call: 'no room'"),
        (complain, "it fails: TensorRT logged 'no effect'"),
        (start, "it fails: CUDA driver version is insufficient; install a newer NVIDIA driver"),
    ):
        with pytest.raises(EngineError) as caught, library.checked_calls("it fails"):
            call()
        assert str(caught.value) == said
    with pytest.raises(ConfigError, match=r"^as it was$"), library.checked_calls("it fails"):
        raise ConfigError("as it was")
    with library.checked_calls("it fails", lambda text: "effect" in text):
        complain()
    with pytest.raises(EngineError, match="no effect"), library.checked_calls("outer"), library.checked_calls("inner"):
        complain()


def test_a_flood_of_messages_does_not_hide_the_first(library: Library) -> None:
    severity = library.trt.ILogger.Severity
    with library.log.capture() as messages:
        for number in range(1000):
            library.log.handle.log(severity.ERROR, f"{number}")
            library.log.handle.log(severity.ERROR, "again")
    assert len(messages) == 64
    assert messages[:2] == ["0", "again"]
    assert messages[-1] == "999"
    assert quote_messages(messages).count(";") == 7


@pytest.mark.parametrize(
    "call",
    [
        lambda network, tensor: setattr(network, "name", "x" * 5000),
        lambda network, tensor: tensor.set_dimension_name(7, "T"),
        lambda network, tensor: network.add_slice(tensor, (0, 0), (1, 1), (1, 1)).set_input(9, tensor),
        lambda network, tensor: network.mark_output(tensor),
    ],
    ids=["name", "dimension", "input", "output"],
)
def test_the_real_library_only_logs_what_is_wrong_and_the_call_fails(
    library: Library, call: Callable[[Any, Any], None]
) -> None:
    network = library.create_network(library.create_builder())
    tensor = network.add_input("x", library.trt.float16, (-1, 8))
    with pytest.raises(EngineError) as caught, library.checked_calls("the network cannot be defined"):
        call(network, tensor)
    assert re.match(r"the network cannot be defined: TensorRT logged ['\"]I\w+::\w+: Error Code", str(caught.value))
    assert not str(caught.value).endswith("driver")


def test_several_threads_use_the_real_library(library: Library) -> None:
    """Only the threads that make a mistake get the error."""
    turns = threading.Barrier(6)

    def define(number: int) -> bool:
        network = library.create_network(library.create_builder())
        tensor = network.add_input("x", library.trt.float16, (-1, 8))
        for _ in range(20):
            turns.wait(30)
            try:
                with library.checked_calls("a mistake"):
                    tensor.set_dimension_name(7 if number % 2 else 0, "T")
            except EngineError:
                assert number % 2
            else:
                assert not number % 2
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(define, range(6)))


def test_a_real_mistake_is_logged_and_quoted(library: Library) -> None:
    network = library.create_network(library.create_builder())
    with library.log.capture() as messages:
        network.add_input("x", library.trt.float16, (-1, 8))
        assert network.add_input("x", library.trt.float16, (-1, 8)) is None
    assert "addInput" in quote_messages(messages)


def test_quote_repeats_nothing() -> None:
    assert quote_messages(["a ", "b", "a "]) == "'a'; 'b'"


@pytest.mark.parametrize(("result", "is_refused"), [(True, False), (False, True), (0, False), (1, False), (-1, True)])
def test_accepted(result: Any, is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(EngineError, match="the call"):
            require_accepted(result, "the call")
    else:
        require_accepted(result, "the call")
    with pytest.raises(EngineError, match="the call"):
        require_result(None, "the call")
