"""The installed TensorRT library, behind one small surface.

`load_library` takes `tensorrt` if it is there and complete, else `tensorrt_rtx`. Both have the same Python interface
except for optional parts, which are looked up; no decision here reads a version number. Everything that comes from the
library is `Any` to the type checker, and none of it leaves this folder.
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

Flavour = Literal["tensorrt", "tensorrt_rtx"]
"""NVIDIA's two libraries. Neither runs the plans of the other."""

_logger = logging.getLogger("llmengine.tensorrt")

_EXTRAS: dict[Flavour, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}

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
"""A library that lacks one of these is too old."""

_MAX_KEPT = 64
_MAX_QUOTED = 8

_OLD_DRIVER = "CUDA driver version is insufficient"


@dataclass(frozen=True, slots=True)
class Features:
    """The optional parts of the interface.

    Attributes:
        target_capabilities: compute capabilities (80, 89, ...) that plans can be built for without such a device;
            empty if plans can be built for the device of the building process only.
        strongly_typed_flag: `NetworkDefinitionCreationFlag.STRONGLY_TYPED` exists. It is then set, even where networks
            are always strongly typed.
        user_allocation_flag: `BuilderFlag.REQUIRE_USER_ALLOCATION` exists.
        timing_cache: measurements are kept between builds. False for a library that measures when a plan runs.
        runtime_cache: `IRuntimeCache` exists: kernels that are compiled when a plan is loaded can be kept.
        cuda_graph_strategy: `CudaGraphStrategy` exists: the runtime can capture graphs of its own, which must be off.
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
        log: the process's one logger for it; every call that takes a logger gets `log.handle`.
    """

    name: Flavour
    version: str
    trt: Any
    features: Features
    log: LibraryLog

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @contextmanager
    def checked_calls(self, what: str, tolerates: Callable[[str], bool] | None = None) -> Iterator[None]:
        """Turn a failure of the library's calls into an `EngineError` that begins with `what` and quotes the library.

        A call may fail by its result, by an exception, or by an error that it only logs: many calls return nothing, and
        some continue after an error. Every call of the library is made in this context.

        Args:
            tolerates: whether the result is sound in spite of this logged error.
        """
        with self.log.capture() as messages:
            try:
                yield
            except ConfigError:
                raise
            except (EngineError, TypeError, RuntimeError) as failure:
                quoted = f": {quote_messages(messages)}" if messages else ""
                raise EngineError(f"{what}: {failure}{quoted}{_driver_hint([str(failure), *messages])}") from failure
        errors = [text for text in messages if tolerates is None or not tolerates(text)]
        if errors:
            raise EngineError(f"{what}: TensorRT logged {quote_messages(errors)}{_driver_hint(errors[:1])}")

    def create_builder(self) -> Any:
        """A new `Builder`; raises `ConfigError` if the library cannot start here."""
        try:
            with self.checked_calls(f"{self} cannot build on this machine"):
                return self.trt.Builder(self.log.handle)
        except EngineError as failure:
            raise ConfigError(str(failure)) from failure

    def create_network(self, builder: Any) -> Any:
        """An empty, strongly typed `INetworkDefinition`."""
        flags = 0
        if self.features.strongly_typed_flag:
            flags |= 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return require_result(builder.create_network(flags), "create_network")

    def set_target(self, config: Any, target: BuildTarget) -> None:
        """Set the GPUs that `config` (an `IBuilderConfig`) builds for.

        A library without that choice builds for the device of this process, which must be `target`. Raises
        `ConfigError` for a target that the library does not support.
        """
        self.check_target(target)
        if not self.features.target_capabilities or not target.compute_capabilities:
            return
        config.num_compute_capabilities = len(target.compute_capabilities)
        for index, capability in enumerate(target.compute_capabilities):
            value = getattr(self.trt.ComputeCapability, f"SM{capability}")
            require_accepted(config.set_compute_capability(value, index), f"set_compute_capability({value}, {index})")

    def check_target(self, target: BuildTarget) -> None:
        """Raise `ConfigError` if the library does not support a part of `target`; the message names what it does."""
        for value in target.compute_capabilities:
            self.check_device(value // 10, value % 10)

    def check_device(self, major: int, minor: int) -> None:
        """Raise `ConfigError` if the library does not support devices of this compute capability."""
        known = self.features.target_capabilities
        if known and 10 * major + minor not in known:
            listed = ", ".join(f"{value // 10}.{value % 10}" for value in known)
            raise ConfigError(
                f"{self} does not support compute capability {major}.{minor}, only {listed}; run "
                f"'{install_command('tensorrt')}' instead, or set backend='torch'"
            )


class LibraryLog:
    """Passes the library's messages to `logging` ("llmengine.tensorrt") and collects errors for our messages.

    The first logger that a process registers gets the messages of all its builders and runtimes, so there is one.

    A message belongs to the calls of the thread in which it is logged. The library's own threads do not say whose call
    they serve, so their messages belong to the calls of every thread. Messages in other Python threads belong to none
    of our calls: other code in this process uses the library there.
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
        """Collect the errors that are logged for this thread's calls inside the context.

        Args:
            pass_on: the capture around this one, if there is one, gets them too.
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
        """The captures that a message in this thread belongs to."""
        own = self._captures.get(threading.get_ident())
        if own is not None:
            return [own]
        return [] if _is_python_thread() else list(self._captures.values())


def _is_python_thread() -> bool:
    """Whether Python started this thread. Any other thread that has logged something is a dummy thread to Python."""
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


def _driver_hint(reasons: Sequence[str]) -> str:
    """Advice about an old driver, empty if that is not among the reasons."""
    return "; install a newer NVIDIA driver" if any(_OLD_DRIVER in reason for reason in reasons) else ""


def quote_messages(messages: Sequence[str]) -> str:
    """The library's messages, to be the end of one of ours."""
    return "; ".join(repr(text.strip()) for text in list(dict.fromkeys(messages))[-_MAX_QUOTED:])


def require_result(value: Any, call: str) -> Any:
    """The result of a call of the library; raises `EngineError` if it is None."""
    if value is None:
        raise EngineError(f"TensorRT refused {call}")
    return value


def require_accepted(result: Any, call: str) -> None:
    """Raise `EngineError` if the result of a call is neither True nor an index of at least 0."""
    if result is False or result < 0:
        raise EngineError(f"TensorRT refused {call}")


def install_command(name: Flavour) -> str:
    """The command that installs a library."""
    return f"pip install llmengine[{_EXTRAS[name]}]"


@functools.cache
def load_library() -> Library:
    """The `tensorrt` library, else `tensorrt_rtx`; the first call imports it, which takes about a second.

    Raises `ConfigError` with what is missing in each.
    """
    reasons = []
    names: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx")
    for name in names:
        try:
            trt = _import(name)
        except (ImportError, OSError) as failure:
            reasons.append(f"{name} does not load: {failure}")
            continue
        if trt is None:
            reasons.append(f"{name} is not installed ({install_command(name)})")
            continue
        missing = [part for part in _REQUIRED if not _has(trt, part)]
        if not missing:
            return _library_of(name, trt)
        version = getattr(trt, "__version__", "of unknown version")
        reasons.append(f"{name} {version} is too old: it lacks {', '.join(missing)} ({install_command(name)} -U)")
    raise ConfigError(f"TensorRT is not available: {'; '.join(reasons)}")


def _import(name: Flavour) -> Any:
    """The module, None if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:  # without an origin it is a mere folder of that name on the path
        return None
    return importlib.import_module(name)


def _has(trt: Any, path: str) -> bool:
    for part in path.split("."):
        trt = getattr(trt, part, None)
        if trt is None:
            return False
    return True


def _library_of(name: Flavour, trt: Any) -> Library:
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
