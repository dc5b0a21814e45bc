"""The exported names, and that neither importing nor using the package changes anything around it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import llmengine
from tests.engine.helpers import WAIT_S

PUBLIC = {
    "LLM",
    "BackendInfo",
    "BeamOutput",
    "BeamSearchOutput",
    "CachedBlock",
    "ChatKeywords",
    "ConfigError",
    "CorruptFileError",
    "EngineClosedError",
    "EngineDeadError",
    "EngineError",
    "EngineHealth",
    "EngineObserver",
    "EngineStats",
    "FinishReason",
    "GenerationOutput",
    "InvalidRequestError",
    "KvCacheConfig",
    "LLMEngineError",
    "Logprob",
    "ModelConfig",
    "ModelLoadError",
    "OutOfMemoryError",
    "ParallelConfig",
    "PlacementError",
    "PrefixCacheChange",
    "PromptTooLongError",
    "QualityError",
    "QualityReport",
    "QuantConfig",
    "QueueFullError",
    "RequestEnd",
    "ReplicaDeadError",
    "RequestError",
    "RequestFailedError",
    "RequestHandle",
    "RequestKeywords",
    "RequestOptions",
    "RequestStats",
    "RequestTimeline",
    "SamplingParams",
    "SchedulerConfig",
    "StepRecord",
    "StructuredOutput",
    "SubmittedRequest",
    "TokenLogprobs",
    "UnsupportedModelError",
}

STATE = """
import asyncio, faulthandler, gc, logging, signal, sys, threading, warnings

def state():
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "policy": type(asyncio.get_event_loop_policy()),
        "handlers": {logger.name: list(logger.handlers) for logger in loggers if logger.handlers},
        "levels": {logger.name: logger.level for logger in loggers if logger.level},
        "excepthook": sys.excepthook,
        "unraisablehook": sys.unraisablehook,
        "thread hook": threading.excepthook,
        "display": sys.displayhook,
        "asyncgen hooks": sys.get_asyncgen_hooks(),
        "streams": (sys.stdout, sys.stderr),
        "threads": set(threading.enumerate()),
        "faulthandler": faulthandler.is_enabled(),
        "switch interval": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "gc": (gc.isenabled(), gc.get_threshold(), list(gc.callbacks)),
        "tracing": (sys.gettrace(), sys.getprofile()),
        "filters": list(warnings.filters),
    }

def check(before):
    after = state()
    assert after == before, [(name, before[name], after[name]) for name in before if before[name] != after[name]]
"""

IMPORT = (
    STATE
    + """
before = state()
import llmengine
check(before)
heavy = {"torch", "transformers", "tensorrt", "numpy", "tokenizers", "safetensors", "rich", "uvloop", "anyio"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
llmengine.SamplingParams, llmengine.ModelConfig, llmengine.LLMEngineError, llmengine.LLM
check(before)
heavy -= {"anyio", "uvloop"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print("ok")
"""
)

USE = (
    STATE
    + """
from llmengine import LLM, SamplingParams
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer

async def main():
    loop = asyncio.get_running_loop()
    handler, debug, factory = loop.get_exception_handler(), loop.get_debug(), loop.get_task_factory()
    before = state()
    llm = LLM.from_backend(FakeBackend, tokenizer=ByteTokenizer())
    used = state()
    outputs = llm.generate(["a", "b"], SamplingParams(max_new_tokens=3))
    outputs += [output async for output in llm.generate_async("c", SamplingParams(max_new_tokens=3), streaming=True)]
    for now in (used, state()):
        # While an LLM is open it has threads, and nothing else.
        assert before["threads"] < now["threads"]
        assert {**now, "threads": 0} == {**before, "threads": 0}
    llm.close()
    for thread in threading.enumerate():
        if thread.name.startswith("llmengine"):
            thread.join(60)
    check(before)
    assert asyncio.get_running_loop() is loop
    assert (handler, debug, factory) == (loop.get_exception_handler(), loop.get_debug(), loop.get_task_factory())
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not {"torch", "transformers", "tensorrt", "numpy"} & set(sys.modules)

asyncio.run(main())
print("ok")
"""
)


def test_exported_names() -> None:
    assert set(llmengine.__all__) == PUBLIC
    assert len(llmengine.__all__) == len(PUBLIC)
    for name in PUBLIC:
        assert getattr(llmengine, name) is not None
    assert set(dir(llmengine)) >= PUBLIC | {"__version__"}
    assert llmengine.__version__.count(".") == 2


def test_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="'llmengine' has no attribute 'LMM'"):
        llmengine.LMM  # noqa: B018


def test_star_import_gives_the_exported_names() -> None:
    names: dict[str, object] = {}
    exec("from llmengine import *", names)
    assert set(names) - {"__builtins__"} == PUBLIC


def test_errors_are_a_tree_with_two_branches() -> None:
    errors = [getattr(llmengine, name) for name in PUBLIC if name.endswith("Error")]
    for error in errors:
        assert issubclass(error, llmengine.LLMEngineError)
        if error is not llmengine.LLMEngineError:
            assert issubclass(error, llmengine.RequestError) != issubclass(error, llmengine.EngineError)
            assert (error.status < 500) == issubclass(error, llmengine.RequestError)
    assert issubclass(llmengine.InvalidRequestError, ValueError)
    assert issubclass(llmengine.ConfigError, ValueError)


@pytest.mark.parametrize("script", [IMPORT, USE], ids=["import", "use"])
def test_nothing_around_the_package_changes(script: str) -> None:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
