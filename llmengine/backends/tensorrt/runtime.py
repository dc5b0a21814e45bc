"""Plans on a device: TensorRT's runtime, as far as it is needed to run them, with every result checked.

The protocols list the calls and their arguments. A test compares them with the real libraries, and the fake runtime of
the other tests implements them. Failures become `EngineError` with the library's own messages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmengine.backends.tensorrt.library import Library, require_accepted, require_result
from llmengine.backends.tensorrt.spec import ProfileSpec, SegmentSpec
from llmengine.errors import EngineError, OutOfMemoryError

_logger = logging.getLogger("llmengine.tensorrt")

ALIGNMENT = 256
"""Bytes; every address that TensorRT gets is a multiple of it."""


class TrtContext(Protocol):
    """The part of `IExecutionContext` that is used."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Whether the profile was accepted."""

    def set_device_memory(self, memory: int, size: int) -> None:
        """Set the address and the bytes of scratch memory."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the shape was accepted."""

    def infer_shapes(self) -> list[str]:
        """Names of the inputs that still lack a shape or value."""

    def get_tensor_shape(self, name: str) -> Any:
        """Shape of an output, -1 for unknown sizes."""

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Whether the address was accepted."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue the plan; whether it was queued."""


class TrtRuntimeCache(Protocol):
    """The part of `IRuntimeCache` that is used."""

    def deserialize(self, blob: bytes) -> bool:
        """Take the content of an earlier cache; whether it could be used."""

    def serialize(self) -> Any:
        """The content as an `IHostMemory`."""


class TrtRuntimeConfig(Protocol):
    """The part of `IRuntimeConfig` that is used."""

    cuda_graph_strategy: Any
    dynamic_shapes_kernel_specialization_strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        """Choose who allocates scratch memory."""

    def create_runtime_cache(self) -> TrtRuntimeCache | None:
        """An empty cache of compiled kernels; None for a failure."""

    def set_runtime_cache(self, cache: TrtRuntimeCache) -> bool:
        """Whether the cache was accepted."""


class TrtEngine(Protocol):
    """The part of `ICudaEngine` that is used."""

    num_io_tensors: int
    num_optimization_profiles: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str:
        """Name of an input or output."""

    def get_tensor_mode(self, name: str) -> Any:
        """A `TensorIOMode`."""

    def get_tensor_location(self, name: str) -> Any:
        """A `TensorLocation`."""

    def get_tensor_dtype(self, name: str) -> Any:
        """A `DataType`."""

    def get_tensor_shape(self, name: str) -> Any:
        """The shape, -1 for dynamic sizes."""

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Any]:
        """The least, the best and the largest shape of an input."""

    def create_execution_context(self, strategy: Any, /) -> TrtContext | None:
        """A context, None for a failure; `strategy` may be an `IRuntimeConfig`."""

    def create_runtime_config(self) -> TrtRuntimeConfig | None:
        """Settings for contexts; None for a failure."""


class TrtRuntime(Protocol):
    """The part of `Runtime` that is used."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> TrtEngine | None:
        """The engine, None if the plan cannot be used here."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dynamic sizes of one execution: T tokens and S sampled rows."""

    tokens: int
    samples: int = 1

    def __str__(self) -> str:
        return f"T={self.tokens}, S={self.samples}"


class PlanRuntime:
    """The library's runtime and, where it has one, its cache of compiled kernels, which all contexts share."""

    def __init__(self, library: Library, runtime: TrtRuntime, cache_content: bytes | None) -> None:
        self.library = library
        self._runtime = runtime
        self._cache_content = cache_content
        self._cache: TrtRuntimeCache | None = None

    @classmethod
    def start(cls, library: Library, cache: bytes | None = None) -> PlanRuntime:
        """Start the library's runtime; raises `EngineError`.

        Args:
            cache: content of an earlier `cache_content`; a damaged or foreign one only costs time.
        """
        with library.checked_calls(f"{library} cannot start"):
            runtime: TrtRuntime = require_result(library.trt.Runtime(library.log.handle), "Runtime")
        return cls(library, runtime, cache)

    def load(self, name: str, content: bytes, spec: SegmentSpec) -> LoadedPlan:
        """The plan, ready for contexts; takes device memory for its constants.

        Raises `EngineError` if it cannot be used on this device, or is not a plan of `spec`.
        """
        with self.library.checked_calls(f"plan {name!r} cannot be loaded"):
            engine: TrtEngine = require_result(
                self._runtime.deserialize_cuda_engine(content), "deserialize_cuda_engine"
            )
        with self.library.checked_calls(f"plan {name!r} does not match its description"):
            _check_interface(self.library.trt, engine, spec)
            memory_bytes = int(engine.device_memory_size_v2)
            settings = self._context_settings(engine)
        return LoadedPlan(self.library, name, spec, memory_bytes, engine, settings)

    def cache_content(self) -> bytes | None:
        """The compiled kernels of all contexts so far, for the next start; None for a library that compiles none."""
        if self._cache is None:
            return None
        with self.library.checked_calls("the runtime cache cannot be saved"):
            return bytes(require_result(self._cache.serialize(), "serialize"))

    def _context_settings(self, engine: TrtEngine) -> Any:
        """The argument with which contexts of `engine` are created: their scratch memory is ours."""
        trt = self.library.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.library.features.runtime_cache:
            return strategy
        config: TrtRuntimeConfig = require_result(engine.create_runtime_config(), "create_runtime_config")
        config.set_execution_context_allocation_strategy(strategy)
        if self.library.features.cuda_graph_strategy:
            # The backend captures whole steps in graphs of its own.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        # A generic kernel that is replaced later, by one compiled in the background, would stay in a captured graph.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is None:
            self._cache = self._new_cache(config)
        require_accepted(config.set_runtime_cache(self._cache), "set_runtime_cache")
        return config

    def _new_cache(self, config: TrtRuntimeConfig) -> TrtRuntimeCache:
        cache: TrtRuntimeCache = require_result(config.create_runtime_cache(), "create_runtime_cache")
        if self._cache_content is not None:
            with self.library.log.capture(pass_on=False) as messages:
                is_usable = cache.deserialize(self._cache_content)
            if messages or not is_usable:
                _logger.info("the cached kernels belong to another library or device and are compiled again")
        return cache


@dataclass(frozen=True, slots=True, eq=False)
class LoadedPlan:
    """A deserialized plan whose inputs, outputs and profiles are those of `spec`.

    Attributes:
        memory_bytes: scratch memory of an execution, for any sizes.
        settings: the argument with which its contexts are created.
    """

    library: Library
    name: str
    spec: SegmentSpec
    memory_bytes: int
    cuda_engine: TrtEngine
    settings: Any

    def context(self, sizes: Sizes, memory: Tensor, stream: int) -> PlanContext:
        """A context for these sizes only; takes host memory and, the first time, perhaps compilation.

        Args:
            memory: uint8 [at least memory_bytes] on the device; plans that run in the same stream may share it.
            stream: handle of the stream that the context will run in.
        """
        assert memory.data_ptr() % ALIGNMENT == 0 or memory.device.type == "cpu", "torch aligns to 512"
        what = f"plan {self.name!r} at {sizes}"
        with self.library.checked_calls(f"{what} cannot be prepared"):
            created = self.cuda_engine.create_execution_context(self.settings)
            context: TrtContext = require_result(created, "create_execution_context")
            profile = self.profile_for(sizes)
            require_accepted(context.set_optimization_profile_async(profile, stream), f"optimization profile {profile}")
            _check_memory(self, memory)
            context.set_device_memory(memory.data_ptr(), memory.nbytes)
            _set_shapes(context, self.spec, sizes)
        return PlanContext(self.library, what, context, memory)

    def profile_for(self, sizes: Sizes) -> int:
        """Index of the first profile that accepts `sizes`; raises `EngineError` if none does."""
        for index, profile in enumerate(self.spec.profiles):
            if profile.accepts(sizes.tokens, sizes.samples):
                return index
        listed = "; ".join(
            f"{profile.name}: T to {profile.tokens.max}, S to {profile.samples.max}" for profile in self.spec.profiles
        )
        raise EngineError(f"plan {self.name!r} was not built for {sizes}, only for {listed}")


@dataclass(frozen=True, slots=True, eq=False)
class PlanContext:
    """A plan at fixed sizes of its dynamic dimensions; runs in one stream, used by one thread at a time.

    Its shapes never change, because NVIDIA does not specify what a change does to CUDA graphs that were captured from
    the context. Addresses may change: an execution takes them by value, and so does a graph.

    Attributes:
        what: plan and sizes, for messages.
        memory: the scratch memory, which lives as long as the context.
    """

    library: Library
    what: str
    context: TrtContext
    memory: Tensor

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        """Queue the plan in `stream`; the tensors must stay alive until it has run.

        Args:
            addresses: of every input and output, including weights that are inputs.
        """
        context = self.context
        with self.library.checked_calls(f"{self.what} cannot run"):
            for name, address in addresses.items():
                require_accepted(context.set_tensor_address(name, address), f"the address {address:#x} of {name!r}")
            require_accepted(context.execute_async_v3(stream), "execute_async_v3")


def scratch_memory(plans: Sequence[LoadedPlan], device: torch.device) -> Tensor:
    """Uint8 device memory that is enough for each of the plans; raises `OutOfMemoryError`."""
    size_bytes = max(ALIGNMENT, *(plan.memory_bytes for plan in plans))
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as failure:
        raise OutOfMemoryError(
            f"TensorRT's scratch memory of {size_bytes / 2**20:.0f} MiB does not fit on {device}; lower "
            "scheduler_config.max_tokens_per_step"
        ) from failure


def current_stream(device: torch.device) -> int:
    """Handle of torch's current stream; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _check_memory(plan: LoadedPlan, memory: Tensor) -> None:
    if memory.nbytes < plan.memory_bytes:
        raise EngineError(f"it needs {plan.memory_bytes} bytes of scratch memory, not {memory.nbytes}")


def _set_shapes(context: TrtContext, spec: SegmentSpec, sizes: Sizes) -> None:
    for tensor in spec.inputs:
        shape = tensor.resolve(T=sizes.tokens, S=sizes.samples)
        require_accepted(context.set_input_shape(tensor.name, shape), f"the shape {shape} of {tensor.name!r}")
    missing = context.infer_shapes()
    if missing:
        raise EngineError(f"the shapes of {', '.join(missing)} are missing")
    for tensor in spec.outputs:
        expected, found = tensor.resolve(T=sizes.tokens, S=sizes.samples), tuple(context.get_tensor_shape(tensor.name))
        if found != expected:
            raise EngineError(f"output {tensor.name!r} has shape {found}, expected {expected}")


def _check_interface(trt: Any, engine: TrtEngine, spec: SegmentSpec) -> None:
    """Raise `EngineError` unless inputs, outputs and profiles are those of `spec`, all in device memory."""
    expected: dict[str, tuple[Any, str, tuple[int, ...]]] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        mode = trt.TensorIOMode.INPUT if tensor in spec.inputs else trt.TensorIOMode.OUTPUT
        shape = tuple(dim if isinstance(dim, int) else -1 for dim in tensor.shape)
        expected[tensor.name] = (mode, tensor.dtype, shape)
    for weight in spec.weight_inputs:
        expected[weight.name] = (trt.TensorIOMode.INPUT, weight.dtype, weight.plan_shape)
    dtypes = _dtype_names(trt)
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = engine.get_tensor_dtype(name)
        shape = tuple(engine.get_tensor_shape(name))
        found[name] = (engine.get_tensor_mode(name), dtypes.get(dtype, str(dtype)), shape)
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise EngineError(f"{name!r} is not in device memory")
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise EngineError(
                f"{name!r} is {_tensor_text(found.get(name))}, expected {_tensor_text(expected.get(name))}"
            )
    if engine.num_optimization_profiles != len(spec.profiles):
        raise EngineError(f"it has {engine.num_optimization_profiles} profiles, expected {len(spec.profiles)}")
    for index, profile in enumerate(spec.profiles):
        _check_profile(engine, spec, index, profile)


def _check_profile(engine: TrtEngine, spec: SegmentSpec, index: int, profile: ProfileSpec) -> None:
    for tensor in spec.inputs:
        expected = [*profile.shapes_of(tensor)]
        shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, index)]
        if shapes != expected:
            raise EngineError(f"profile {profile.name!r} of {tensor.name!r} is {shapes}, expected {expected}")


def _dtype_names(trt: Any) -> dict[Any, str]:
    return {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT32: "int32",
        trt.DataType.INT8: "int8",
        trt.DataType.INT4: "int4",
        trt.DataType.FP8: "float8_e4m3fn",
    }


def _tensor_text(interface: tuple[Any, str, tuple[int, ...]] | None) -> str:
    if interface is None:
        return "absent"
    mode, dtype, shape = interface
    return f"{getattr(mode, 'name', mode)} {dtype} {list(shape)}"
