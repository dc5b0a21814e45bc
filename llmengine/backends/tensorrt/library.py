"""The TensorRT library that is installed, behind one small surface.

`load_library` takes `tensorrt` if it is there and complete, else `tensorrt_rtx`. Both have the same Python interface
but for what is optional, and that is found out by looking for it: no decision here reads a version number. Everything
that comes from the library is `Any` to the type checker; that ends in this package.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from llmengine.backends.tensorrt.spec import BuildTarget
from llmengine.errors import ConfigError, EngineError

LibraryName = Literal["tensorrt", "tensorrt_rtx"]

_logger = logging.getLogger("llmengine.tensorrt")

_EXTRAS: dict[LibraryName, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}

_REQUIRED = (
    "ActivationType.GELU_TANH",
    "Builder.build_serialized_network",
    "DataType.BF16",
    "ExecutionContextAllocationStrategy.USER_MANAGED",
    "ICudaEngine.device_memory_size_v2",
    "IExecutionContext.execute_async_v3",
    "IExecutionContext.set_device_memory",
    "IExecutionContext.update_device_memory_size_for_shapes",
    "INetworkDefinition.add_cast",
)
"""Without one of these a library is too old."""

_MAX_KEPT = 64
_MAX_QUOTED = 8

_OLD_DRIVER = "CUDA driver version is insufficient"


@dataclass(frozen=True, slots=True)
class Features:
    """Which optional parts of the interface exist.

    Attributes:
        target_capabilities: compute capabilities that can be built for by name, without such a device (80, 89, ...);
            empty where only the device of the building process can be built for.
        strongly_typed_flag: `NetworkDefinitionCreationFlag.STRONGLY_TYPED`; given where it exists, also where networks
            are always strongly typed.
        user_allocation_flag: `BuilderFlag.REQUIRE_USER_ALLOCATION`.
        timing_cache: measurements are kept between builds. False for a library that measures when the plan is run.
        runtime_cache: `IRuntimeCache`: kernels that are compiled when a plan is loaded can be kept.
        cuda_graph_strategy: `CudaGraphStrategy`: the runtime can capture graphs of its own, which must be off.
    """

    target_capabilities: tuple[int, ...]
    strongly_typed_flag: bool
    user_allocation_flag: bool
    timing_cache: bool
    runtime_cache: bool
    cuda_graph_strategy: bool


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded TensorRT.

    Attributes:
        trt: the module.
        log: the process's one logger for it; whatever takes a logger takes `log.handle`.
    """

    name: LibraryName
    version: str
    trt: Any
    features: Features
    log: LibraryLog

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @contextmanager
    def calls(self, what: str, tolerates: Callable[[str], bool] | None = None) -> Iterator[None]:
        """Turn a failure of the library's calls into an `EngineError` that begins with `what` and quotes the library.

        A call fails by what it returns, by what it raises, and also by an error that it only logs: many return nothing,
        and some that do go on regardless. All calls are made in here.

        Args:
            tolerates: says of a logged error that what is returned is sound in spite of it.
        """
        with self.log.capture() as messages:
            try:
                yield
            except ConfigError:
                raise
            except (EngineError, TypeError, RuntimeError) as failure:
                said = f": {quote(messages)}" if messages else ""
                raise EngineError(f"{what}: {failure}{said}{_hint([str(failure), *messages])}") from failure
        errors = [text for text in messages if tolerates is None or not tolerates(text)]
        if errors:
            raise EngineError(f"{what}: TensorRT logged {quote(errors)}{_hint(errors[:1])}")

    def create_builder(self) -> Any:
        """Return a new `Builder`; raises `ConfigError` if the library cannot start here."""
        try:
            with self.calls(f"{self} cannot build on this machine"):
                return self.trt.Builder(self.log.handle)
        except EngineError as failure:
            raise ConfigError(str(failure)) from failure

    def create_network(self, builder: Any) -> Any:
        """Return an empty, strongly typed `INetworkDefinition`."""
        flags = 0
        if self.features.strongly_typed_flag:
            flags |= 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return not_none(builder.create_network(flags), "create_network")

    def set_target(self, config: Any, target: BuildTarget) -> None:
        """Choose what `config` (an `IBuilderConfig`) builds for; raises `ConfigError` for what it cannot build for.

        A library without a choice builds for the device of this process, which `target` then is.
        """
        self.check_target(target)
        if not self.features.target_capabilities or not target.compute_capabilities:
            return
        config.num_compute_capabilities = len(target.compute_capabilities)
        for index, capability in enumerate(target.compute_capabilities):
            value = getattr(self.trt.ComputeCapability, f"SM{capability}")
            accepted(config.set_compute_capability(value, index), f"set_compute_capability({value}, {index})")

    def check_target(self, target: BuildTarget) -> None:
        """Raise `ConfigError` if the library has no plans for a part of `target`, naming what it has."""
        for value in target.compute_capabilities:
            self.check_device(value // 10, value % 10)

    def check_device(self, major: int, minor: int) -> None:
        """Raise `ConfigError` if the library has no plans for a device of this compute capability."""
        known = self.features.target_capabilities
        if known and 10 * major + minor not in known:
            listed = ", ".join(f"{value // 10}.{value % 10}" for value in known)
            raise ConfigError(
                f"{self} does not support compute capability {major}.{minor}, only {listed}: "
                f"{install_hint('tensorrt')} instead, or set backend='torch'"
            )


class LibraryLog:
    """Hands the library's messages to `logging` ("llmengine.tensorrt") and to whoever wants to quote them.

    The first logger that a process registers gets the messages of all its builders and runtimes, so there is one.

    A message belongs to the calls of the thread that brings it. Threads of the library's own say nothing of who set
    them to work, so what they bring belongs to the calls of every thread. What other threads of Python bring belongs
    to none: it comes from code beside us that uses the library.
    """

    def __init__(self, trt: Any) -> None:
        severity = trt.ILogger.Severity
        self._levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.WARNING,
            severity.INFO: logging.DEBUG,
            severity.VERBOSE: logging.DEBUG,
        }
        self._captures: dict[int, list[str]] = {}
        self.handle = _make_handle(trt, self._receive)

    @contextmanager
    def capture(self, *, pass_on: bool = True) -> Iterator[list[str]]:
        """Collect the errors that are logged for this thread's calls meanwhile.

        Args:
            pass_on: to the capture around this one, if there is one.
        """
        thread = threading.get_ident()
        outer = self._captures.get(thread)
        messages: list[str] = []
        self._captures[thread] = messages
        try:
            yield messages
        finally:
            if outer is None:
                del self._captures[thread]
            else:
                self._captures[thread] = outer
                outer += [text for text in messages if pass_on and text not in outer]

    def _receive(self, severity: Any, text: str) -> None:
        level = self._levels.get(severity, logging.ERROR)
        if level >= logging.ERROR:
            for messages in self._captures_here():
                if text not in messages:
                    messages.append(text)
                    del messages[_MAX_KEPT // 2 : -_MAX_KEPT // 2]
        if _logger.isEnabledFor(level):
            _logger.log(level, "%s", text)

    def _captures_here(self) -> list[list[str]]:
        """Return the captures that a message in this thread belongs to."""
        own = self._captures.get(threading.get_ident())
        if own is not None:
            return [own]
        return [] if _is_python_thread() else list(self._captures.values())


def _is_python_thread() -> bool:
    """Say whether Python started this thread. One that it did not is a dummy to it once it has logged something."""
    ident = threading.get_ident()
    return any(
        thread.ident == ident and not isinstance(thread, threading._DummyThread) for thread in threading.enumerate()
    )


def _make_handle(trt: Any, receive: Any) -> Any:
    class Handle(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            receive(severity, msg)

    return Handle()


def _hint(reasons: Sequence[str]) -> str:
    """Return what is to be done about an old driver, if that is among the reasons."""
    return "; install a newer NVIDIA driver" if any(_OLD_DRIVER in reason for reason in reasons) else ""


def quote(messages: Sequence[str]) -> str:
    """Return the library's messages as the end of one of ours."""
    return "; ".join(repr(text.strip()) for text in list(dict.fromkeys(messages))[-_MAX_QUOTED:])


def not_none(value: Any, call: str) -> Any:
    """Return what a call of the library returned, unless it is None: then raise `EngineError`."""
    if value is None:
        raise EngineError(f"TensorRT refused {call}")
    return value


def accepted(result: Any, call: str) -> None:
    """Raise `EngineError` if a call that returns True, or an index from 0 on, did not."""
    if result is False or result < 0:
        raise EngineError(f"TensorRT refused {call}")


def install_hint(name: LibraryName) -> str:
    """Return how a user gets the library."""
    return f"pip install llmengine[{_EXTRAS[name]}]"


@functools.cache
def load_library() -> Library:
    """Return `tensorrt`, else `tensorrt_rtx`; raises `ConfigError` naming what is missing in each.

    The first call imports it, which takes about a second.
    """
    reasons = []
    names: tuple[LibraryName, ...] = ("tensorrt", "tensorrt_rtx")
    for name in names:
        try:
            trt = _import(name)
        except (ImportError, OSError) as failure:
            reasons.append(f"{name} does not load: {failure}")
            continue
        if trt is None:
            reasons.append(f"{name} is not installed ({install_hint(name)})")
            continue
        missing = [part for part in _REQUIRED if not _has(trt, part)]
        if not missing:
            return _describe(name, trt)
        version = getattr(trt, "__version__", "of unknown version")
        reasons.append(f"{name} {version} is too old, it has no {', '.join(missing)} ({install_hint(name)} -U)")
    raise ConfigError(f"TensorRT is not available: {'; '.join(reasons)}")


def _import(name: LibraryName) -> Any:
    """Return the module, None if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # a folder of that name on the path is no package
        return None
    return importlib.import_module(name)


def _has(trt: Any, path: str) -> bool:
    for part in path.split("."):
        trt = getattr(trt, part, None)
        if trt is None:
            return False
    return True


def _describe(name: LibraryName, trt: Any) -> Library:
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    capabilities = tuple(sorted(int(key[2:]) for key in members if key.startswith("SM")))
    features = Features(
        target_capabilities=capabilities,
        strongly_typed_flag=_has(trt, "NetworkDefinitionCreationFlag.STRONGLY_TYPED"),
        user_allocation_flag=_has(trt, "BuilderFlag.REQUIRE_USER_ALLOCATION"),
        timing_cache=_has(trt, "IBuilderConfig.set_timing_cache") and not capabilities,
        runtime_cache=_has(trt, "IRuntimeCache"),
        cuda_graph_strategy=_has(trt, "CudaGraphStrategy"),
    )
    return Library(name, str(trt.__version__), trt, features, LibraryLog(trt))
