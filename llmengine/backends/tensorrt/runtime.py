"""Plans on a device: the narrow part of TensorRT's runtime interface that runs them, with every result checked.

The protocols say which calls are made and how; a test compares them with the real libraries, and the fake that the
other tests run on implements them. Failures become `EngineError` with the library's own messages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmengine.backends.tensorrt.library import Library, accepted, not_none
from llmengine.backends.tensorrt.spec import ProfileSpec, SegmentSpec
from llmengine.errors import EngineError, OutOfMemoryError

_logger = logging.getLogger("llmengine.tensorrt")

ALIGNMENT = 256
"""Bytes; every address that TensorRT is given is a multiple of it."""


class TrtContext(Protocol):
    """What is used of `IExecutionContext`."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Return whether the profile was accepted."""

    def set_device_memory(self, memory: int, size: int) -> None:
        """Set the address and the bytes of scratch memory."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Return whether the shape was accepted."""

    def infer_shapes(self) -> list[str]:
        """Return the inputs that still lack something."""

    def get_tensor_shape(self, name: str) -> Any:
        """Return the shape of an output, -1 for what is not known."""

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Return whether the address was accepted."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue the plan; return whether it was queued."""


class TrtRuntimeCache(Protocol):
    """What is used of `IRuntimeCache`."""

    def deserialize(self, blob: bytes) -> bool:
        """Take what an earlier cache held; return whether it could be used."""

    def serialize(self) -> Any:
        """Return the content as an `IHostMemory`."""


class TrtRuntimeConfig(Protocol):
    """What is used of `IRuntimeConfig`."""

    cuda_graph_strategy: Any
    dynamic_shapes_kernel_specialization_strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        """Choose who allocates scratch memory."""

    def create_runtime_cache(self) -> TrtRuntimeCache | None:
        """Return an empty cache of compiled kernels."""

    def set_runtime_cache(self, cache: TrtRuntimeCache) -> bool:
        """Return whether the cache was accepted."""


class TrtEngine(Protocol):
    """What is used of `ICudaEngine`."""

    num_io_tensors: int
    num_optimization_profiles: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str:
        """Return the name of an input or output."""

    def get_tensor_mode(self, name: str) -> Any:
        """Return a `TensorIOMode`."""

    def get_tensor_location(self, name: str) -> Any:
        """Return a `TensorLocation`."""

    def get_tensor_dtype(self, name: str) -> Any:
        """Return a `DataType`."""

    def get_tensor_shape(self, name: str) -> Any:
        """Return the shape, -1 for dynamic sizes."""

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Any]:
        """Return the least, the best and the largest shape of an input."""

    def create_execution_context(self, strategy: Any, /) -> TrtContext | None:
        """Return a context, None if there is none to be had; `strategy` may be an `IRuntimeConfig`."""

    def create_runtime_config(self) -> TrtRuntimeConfig | None:
        """Return settings for contexts."""


class TrtRuntime(Protocol):
    """What is used of `Runtime`."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> TrtEngine | None:
        """Return the engine, None if the plan cannot be used here."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dynamic sizes of one execution: T tokens and S sampled rows."""

    tokens: int
    samples: int = 1

    def __str__(self) -> str:
        return f"T={self.tokens}, S={self.samples}"


class PlanRuntime:
    """The library's runtime and, where it has one, its cache of compiled kernels, which all contexts share.

    Args:
        cache: what `cache_content` returned earlier; a damaged or foreign one only costs time.
    """

    def __init__(self, library: Library, cache: bytes | None = None) -> None:
        self.library = library
        self._cache_content = cache
        self._cache: TrtRuntimeCache | None = None
        with library.calls(f"{library} does not start"):
            self._runtime: TrtRuntime = not_none(library.trt.Runtime(library.log.handle), "Runtime")

    def load(self, name: str, content: bytes, spec: SegmentSpec) -> LoadedPlan:
        """Return the plan, ready for contexts; takes device memory for its constants.

        Raises `EngineError` if it cannot be used on this device, or is not a plan of `spec`.
        """
        with self.library.calls(f"plan {name!r} does not load"):
            engine: TrtEngine = not_none(self._runtime.deserialize_cuda_engine(content), "deserialize_cuda_engine")
        return LoadedPlan(self, name, engine, spec)

    def cache_content(self) -> bytes | None:
        """Return the compiled kernels of all contexts so far, for the next start; None where nothing is compiled."""
        if self._cache is None:
            return None
        with self.library.calls("the runtime cache cannot be saved"):
            return bytes(not_none(self._cache.serialize(), "serialize"))

    def context_setting(self, engine: TrtEngine) -> Any:
        """Return what contexts of `engine` are created with: their scratch memory is ours."""
        trt = self.library.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.library.features.runtime_cache:
            return strategy
        config: TrtRuntimeConfig = not_none(engine.create_runtime_config(), "create_runtime_config")
        config.set_execution_context_allocation_strategy(strategy)
        if self.library.features.cuda_graph_strategy:
            # Ours hold whole steps.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        # A kernel that is replaced later, by one compiled in the background, would stay in a captured graph.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is None:
            self._cache = self._new_cache(config)
        accepted(config.set_runtime_cache(self._cache), "set_runtime_cache")
        return config

    def _new_cache(self, config: TrtRuntimeConfig) -> TrtRuntimeCache:
        cache: TrtRuntimeCache = not_none(config.create_runtime_cache(), "create_runtime_cache")
        if self._cache_content is not None:
            with self.library.log.capture(pass_on=False) as messages:
                is_ours = cache.deserialize(self._cache_content)
            if messages or not is_ours:
                _logger.info("the kept kernels are of another library or device; they are compiled again")
        return cache


class LoadedPlan:
    """A deserialized plan whose inputs, outputs and profiles are those of `spec`.

    Attributes:
        memory_bytes: scratch memory that an execution needs, whatever the sizes.
    """

    def __init__(self, runtime: PlanRuntime, name: str, engine: TrtEngine, spec: SegmentSpec) -> None:
        self.runtime, self.name, self.spec = runtime, name, spec
        self._engine = engine
        with runtime.library.calls(f"plan {name!r} is not what it should be"):
            _check_interface(runtime.library.trt, engine, spec)
            self.memory_bytes = int(engine.device_memory_size_v2)
            self._setting = runtime.context_setting(engine)

    def context(self, sizes: Sizes, memory: Tensor, stream: int) -> PlanContext:
        """Return a context for these sizes only; costs host memory and, the first time, perhaps compilation.

        Args:
            memory: uint8 [at least memory_bytes] on the device; may be shared with all that run in the same stream.
            stream: handle of the stream that the context will run in.
        """
        return PlanContext(self, self._engine, self._setting, sizes, memory, stream)

    def profile_for(self, sizes: Sizes) -> int:
        """Return the index of the first profile that takes `sizes`; raises `EngineError` if none does."""
        for index, profile in enumerate(self.spec.profiles):
            if _holds(profile, sizes):
                return index
        listed = "; ".join(
            f"{profile.name}: T to {profile.tokens.max}, S to {profile.samples.max}" for profile in self.spec.profiles
        )
        raise EngineError(f"plan {self.name!r} was not built for {sizes}, only for {listed}")


class PlanContext:
    """A plan at one size of its dynamic dimensions; runs in one stream and is used by one thread at a time.

    Its shapes never change, since NVIDIA leaves open what becomes of a CUDA graph when the context that it was
    captured from does. Addresses may: an execution takes them by value, and so does a graph.
    """

    def __init__(
        self, plan: LoadedPlan, engine: TrtEngine, setting: Any, sizes: Sizes, memory: Tensor, stream: int
    ) -> None:
        assert memory.data_ptr() % ALIGNMENT == 0 or memory.device.type == "cpu", "torch aligns to 512"
        self._library = plan.runtime.library
        self._what = f"plan {plan.name!r} at {sizes}"
        self._memory = memory  # keeps it alive
        with self._library.calls(f"{self._what} cannot be prepared"):
            context: TrtContext = not_none(engine.create_execution_context(setting), "create_execution_context")
            profile = plan.profile_for(sizes)
            accepted(context.set_optimization_profile_async(profile, stream), f"optimization profile {profile}")
            _check_memory(plan, memory)
            context.set_device_memory(memory.data_ptr(), memory.nbytes)
            _set_shapes(context, plan.spec, sizes)
        self._context = context

    def run(self, addresses: Mapping[str, int], stream: int) -> None:
        """Queue the plan in `stream`; the tensors must stay until it has run.

        Args:
            addresses: of every input and output, weights among them.
        """
        context = self._context
        with self._library.calls(f"{self._what} cannot run"):
            for name, address in addresses.items():
                accepted(context.set_tensor_address(name, address), f"the address {address:#x} of {name!r}")
            accepted(context.execute_async_v3(stream), "execute_async_v3")


def scratch_memory(plans: Sequence[LoadedPlan], device: torch.device) -> Tensor:
    """Return uint8 device memory that is enough for each plan; raises `OutOfMemoryError`."""
    size_bytes = max(ALIGNMENT, *(plan.memory_bytes for plan in plans))
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as failure:
        raise OutOfMemoryError(
            f"TensorRT's scratch memory: {size_bytes / 2**20:.0f} MiB do not fit on {device}; lower "
            "scheduler_config.max_tokens_per_step"
        ) from failure


def current_stream(device: torch.device) -> int:
    """Return the handle of torch's current stream; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _check_memory(plan: LoadedPlan, memory: Tensor) -> None:
    if memory.nbytes < plan.memory_bytes:
        raise EngineError(f"{memory.nbytes} bytes of scratch memory are fewer than the {plan.memory_bytes} it needs")


def _set_shapes(context: TrtContext, spec: SegmentSpec, sizes: Sizes) -> None:
    for tensor in spec.inputs:
        shape = tensor.resolve(T=sizes.tokens, S=sizes.samples)
        accepted(context.set_input_shape(tensor.name, shape), f"the shape {shape} of {tensor.name!r}")
    missing = context.infer_shapes()
    if missing:
        raise EngineError(f"shapes are missing of {', '.join(missing)}")
    for tensor in spec.outputs:
        expected, found = tensor.resolve(T=sizes.tokens, S=sizes.samples), tuple(context.get_tensor_shape(tensor.name))
        if found != expected:
            raise EngineError(f"output {tensor.name!r} has shape {found}, expected {expected}")


def _check_interface(trt: Any, engine: TrtEngine, spec: SegmentSpec) -> None:
    """Raise `EngineError` unless inputs, outputs and profiles are those of `spec`, all in device memory."""
    expected = {}
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
            raise EngineError(f"{name!r} is {_described(found.get(name))}, expected {_described(expected.get(name))}")
    if engine.num_optimization_profiles != len(spec.profiles):
        raise EngineError(f"{engine.num_optimization_profiles} profiles, expected {len(spec.profiles)}")
    for index, profile in enumerate(spec.profiles):
        _check_profile(engine, spec, index, profile)


def _check_profile(engine: TrtEngine, spec: SegmentSpec, index: int, profile: ProfileSpec) -> None:
    tokens, samples = profile.tokens, profile.samples
    for tensor in spec.inputs:
        wanted = [
            tensor.resolve(T=tokens.min, S=samples.min),
            tensor.resolve(T=tokens.opt, S=samples.opt),
            tensor.resolve(T=tokens.max, S=samples.max),
        ]
        shapes = [tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, index)]
        if shapes != wanted:
            raise EngineError(f"profile {profile.name!r} of {tensor.name!r} is {shapes}, expected {wanted}")


def _dtype_names(trt: Any) -> dict[Any, str]:
    return {
        trt.DataType.FLOAT: "float32",
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.INT32: "int32",
    }


def _described(interface: tuple[Any, str, tuple[int, ...]] | None) -> str:
    if interface is None:
        return "absent"
    mode, dtype, shape = interface
    return f"{getattr(mode, 'name', mode)} {dtype} {list(shape)}"


def _holds(profile: ProfileSpec, sizes: Sizes) -> bool:
    tokens, samples = profile.tokens, profile.samples
    return tokens.min <= sizes.tokens <= tokens.max and samples.min <= sizes.samples <= samples.max
