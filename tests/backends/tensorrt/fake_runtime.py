"""A stand-in for TensorRT's runtime that executes plans with torch and checks what the real one takes on trust.

It has the part of the interface that `runtime.py` describes, for both libraries. Addresses are looked up among the
tensors that are alive: one that is unset, freed, too short, of another type or shared between input and output is a
`Misuse`. Under graph capture on a GPU its kernels are captured as the library's would be.
"""

from __future__ import annotations

import enum
import gc
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from llmengine.backends.tensorrt.library import Features, Library, LibraryLog, load_library
from llmengine.backends.tensorrt.network import define_segment
from llmengine.backends.tensorrt.plan_set import Plan, PlanSet, Producer
from llmengine.backends.tensorrt.spec import (
    BuildTarget,
    PlacedSegment,
    SegmentSpec,
    segments_by_plan,
    spec_from_dict,
)
from llmengine.checkpoints.saved_files import SavedFile
from llmengine.errors import ConfigError
from tests.backends.tensorrt.interpreter import INT4, Interpreter, in_torch
from tests.backends.tensorrt.torch_reference import reference

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int8": torch.int8,
    "int4": INT4,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
ALIGNMENT = 256

Execute = Callable[[SegmentSpec, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Computes a segment: inputs and weights by name -> outputs by name."""


class Misuse(AssertionError):
    """A call that the real library would answer with undefined behaviour."""


class Severity(enum.Enum):
    """`ILogger.Severity`."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class Logger:
    """`ILogger`."""

    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        """Take a message."""
        raise NotImplementedError


def _enum(name: str, *members: str) -> Any:
    return enum.Enum(name, members)


class FakeTensorRt:
    """Stands for the module.

    Attributes:
        failing: names of calls that fail from now on, as the library's do: False or None, and a message in the log.
        complaining: names of calls that only log an error from now on, and go on.
        executed: name of each plan's segment, in the order of the executions.
        num_contexts: contexts created.
    """

    ILogger = Logger
    DataType = _enum("DataType", "FLOAT", "HALF", "BF16", "INT32", "INT8", "INT4", "FP8")
    TensorIOMode = _enum("TensorIOMode", "INPUT", "OUTPUT")
    TensorLocation = _enum("TensorLocation", "DEVICE", "HOST")
    ExecutionContextAllocationStrategy = _enum("ExecutionContextAllocationStrategy", "STATIC", "USER_MANAGED")
    CudaGraphStrategy = _enum("CudaGraphStrategy", "DISABLED", "WHOLE_GRAPH_CAPTURE")
    DynamicShapesKernelSpecializationStrategy = _enum("Specialization", "LAZY", "EAGER", "NONE")

    def __init__(self, device: torch.device, execute: Execute | None = None) -> None:
        self.device = device
        self.memory = LiveMemory(device)
        self.execute = execute or Executor()
        self.failing: set[str] = set()
        self.complaining: set[str] = set()
        self.executed: list[str] = []
        self.num_contexts = 0

    def Runtime(self, logger: Logger) -> FakeRuntime:
        """Return a runtime."""
        return FakeRuntime(self, logger)


def fake_library(fake: FakeTensorRt, rtx: bool = False) -> Library:
    """Return the library that `fake` is: `tensorrt_rtx` with its runtime configurations, or `tensorrt`."""
    capabilities = (80, 89, 120) if rtx else ()
    features = Features(
        target_capabilities=capabilities,
        strongly_typed_flag=True,
        user_allocation_flag=rtx,
        timing_cache=not rtx,
        runtime_cache=rtx,
        cuda_graph_strategy=rtx,
    )
    return Library("tensorrt_rtx" if rtx else "tensorrt", "0.fake", fake, features, LibraryLog(fake))


def fake_plan(spec: SegmentSpec, constants: Mapping[str, Tensor] | None = None) -> bytes:
    """Return bytes that the fake deserializes: a spec, and the weights that the plan holds, by name."""
    file = io.BytesIO()
    torch.save({"spec": spec.to_dict(), "constants": dict(constants or {})}, file)
    return file.getvalue()


class Executor:
    """Computes segments by their networks where there is a library to define them, and by the reference elsewhere."""

    def __init__(self) -> None:
        self._interpreters: dict[str, Interpreter] = {}
        try:
            self._library: Library | None = load_library()
        except ConfigError:
            self._library = None

    def __call__(self, spec: SegmentSpec, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self._library is None or len(spec.weight_inputs) != len(spec.weights):
            return reference(spec, feeds, DTYPES[spec.dtype])
        fingerprint = spec.fingerprint()
        if fingerprint not in self._interpreters:
            segment = define_segment(self._library, self._library.create_builder(), spec)
            self._interpreters[fingerprint] = Interpreter(self._library, segment)
        return self._interpreters[fingerprint].run(feeds)


class LiveMemory:
    """Finds tensors by address."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[int, torch.dtype], list[tuple[int, StorageWeakRef]]] = {}

    def view(self, what: str, address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return the memory as a tensor; raises `Misuse` unless a live, contiguous tensor begins there and holds it."""
        storage = self._find(address, dtype, torch.Size(shape).numel())
        if storage is None:
            raise Misuse(f"{what}: no live tensor of {list(shape)} {dtype} at {address:#x}")
        offset = address - storage.data_ptr()
        aligned = address if self._device.type == "cuda" else offset  # of a CPU's allocations the start is arbitrary
        if aligned % ALIGNMENT:
            raise Misuse(f"{what}: {address:#x} is not aligned")
        tensor = torch.empty(0, dtype=dtype, device=self._device)
        return tensor.set_(storage, offset // dtype.itemsize, shape)

    def _find(self, address: int, dtype: torch.dtype, size: int) -> torch.UntypedStorage | None:
        storage = self._known_storage(address, dtype, size)
        for generation in range(3):  # new tensors are in the small ones
            if storage is not None:
                break
            self._learn(generation)
            storage = self._known_storage(address, dtype, size)
        return storage

    def _known_storage(self, address: int, dtype: torch.dtype, size: int) -> torch.UntypedStorage | None:
        for held, storage in self._known.get((address, dtype), []):
            if held >= size and not storage.expired():
                return torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        return None

    def _learn(self, generation: int) -> None:
        for item in gc.get_objects(generation):
            if (
                type(item) is Tensor
                and item.device.type == self._device.type
                and torch._C._has_storage(item)  # which tensors of torch's own may lack
                and item.is_contiguous()
            ):
                known = self._known.setdefault((item.data_ptr(), item.dtype), [])
                known[:] = [entry for entry in known if not entry[1].expired()]
                known.append((item.numel(), StorageWeakRef(item.untyped_storage())))


class _Part:
    """Base of all objects of the library: calls that can be told to fail."""

    def __init__(self, fake: FakeTensorRt, logger: Logger) -> None:
        self._fake, self._logger = fake, logger

    def _fails(self, call: str) -> bool:
        if call in self._fake.failing:
            self._logger.log(Severity.ERROR, f"{call} was told to fail")
        if call in self._fake.complaining:
            self._logger.log(Severity.INTERNAL_ERROR, f"{call} was told to complain")
        return call in self._fake.failing


class FakeRuntime(_Part):
    """`Runtime`."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
        """Return the engine of a `fake_plan`, None for other bytes."""
        if self._fails("deserialize_cuda_engine"):
            return None
        try:
            content = torch.load(io.BytesIO(serialized_engine))
        except Exception:
            self._logger.log(Severity.ERROR, "not a plan")
            return None
        return FakeEngine(self._fake, self._logger, spec_from_dict(content["spec"]), content["constants"])


class FakeRuntimeConfig(_Part):
    """`IRuntimeConfig`."""

    cuda_graph_strategy: Any = FakeTensorRt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    dynamic_shapes_kernel_specialization_strategy: Any = FakeTensorRt.DynamicShapesKernelSpecializationStrategy.LAZY
    strategy: Any = None
    cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        """Remember it."""
        self._fails("set_execution_context_allocation_strategy")
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeCache | None:
        """Return an empty cache."""
        return None if self._fails("create_runtime_cache") else FakeCache(self._fake, self._logger)

    def set_runtime_cache(self, cache: Any) -> bool:
        """Remember it."""
        self.cache = cache
        return not self._fails("set_runtime_cache")


class FakeCache(_Part):
    """`IRuntimeCache`; its content counts the contexts that were compiled with it."""

    num_compiled = 0

    def deserialize(self, blob: bytes) -> bool:
        """Take the content of an earlier one."""
        if self._fails("deserialize") or not blob.startswith(b"cache"):
            return False
        self.num_compiled = int(blob[5:])
        return True

    def serialize(self) -> bytes | None:
        """Return the content."""
        return None if self._fails("serialize") else b"cache%d" % self.num_compiled


class FakeEngine(_Part):
    """`ICudaEngine` of a `SegmentSpec`; its scratch memory is overwritten in each execution."""

    def __init__(self, fake: FakeTensorRt, logger: Logger, spec: SegmentSpec, constants: dict[str, Tensor]) -> None:
        super().__init__(fake, logger)
        self.spec, self.constants = spec, constants
        inputs = {t.name: (t.dtype, t.shape) for t in spec.inputs}
        inputs |= {w.name: (w.dtype, w.plan_shape) for w in spec.weight_inputs}
        outputs = {t.name: (t.dtype, t.shape) for t in spec.outputs}
        self.inputs: dict[str, tuple[str, tuple[Any, ...]]] = inputs
        self.outputs: dict[str, tuple[str, tuple[Any, ...]]] = outputs
        self._io = {**inputs, **outputs}
        self.num_io_tensors = len(self._io)
        self.num_optimization_profiles = len(spec.profiles)

    @property
    def device_memory_size_v2(self) -> int:
        """Bytes of scratch memory."""
        self._fails("device_memory_size_v2")
        return 64 * max(profile.tokens.max for profile in self.spec.profiles)

    def get_tensor_name(self, index: int) -> str:
        """Return the name of an input or output."""
        self._fails("get_tensor_name")
        return list(self._io)[index]

    def get_tensor_mode(self, name: str) -> Any:
        """Return whether it is an input or an output."""
        self._fails("get_tensor_mode")
        modes = self._fake.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        """Return where it is."""
        assert name in self._io
        locations = self._fake.TensorLocation
        return locations.HOST if "get_tensor_location" in self._fake.failing else locations.DEVICE

    def get_tensor_dtype(self, name: str) -> Any:
        """Return its type."""
        types = self._fake.DataType
        return dict(zip(DTYPES, types, strict=True))[self._io[name][0]]

    def get_tensor_shape(self, name: str) -> list[int]:
        """Return its shape, -1 for dynamic sizes."""
        return [dim if isinstance(dim, int) else -1 for dim in self._io[name][1]]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        """Return the least, best and largest shape."""
        self._fails("get_tensor_profile_shape")
        profile = self.spec.profiles[profile_index]
        ranges = {"T": profile.tokens, "S": profile.samples}
        shape = self.inputs[name][1]
        return [
            [dim if isinstance(dim, int) else getattr(ranges[dim], bound) for dim in shape]
            for bound in ("min", "opt", "max")
        ]

    def create_execution_context(self, setting: Any) -> FakeContext | None:
        """Return a context whose memory is the caller's."""
        strategy = setting
        if isinstance(setting, FakeRuntimeConfig):
            assert setting.cuda_graph_strategy == self._fake.CudaGraphStrategy.DISABLED
            strategy = setting.strategy
            setting.cache.num_compiled += 1
        assert strategy == self._fake.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._fails("create_execution_context"):
            return None
        self._fake.num_contexts += 1
        return FakeContext(self)

    def create_runtime_config(self) -> FakeRuntimeConfig | None:
        """Return settings for contexts."""
        return None if self._fails("create_runtime_config") else FakeRuntimeConfig(self._fake, self._logger)


class FakeContext(_Part):
    """`IExecutionContext`."""

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(engine._fake, engine._logger)
        self._engine, self._spec = engine, engine.spec
        self._profile: int | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] = (0, 0)
        self._user: int | None = None
        self._has_run = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Choose the profile, which forgets all shapes."""
        self._check_stream(stream_handle)
        self._profile, self._shapes = profile_index, {}
        return not self._fails("set_optimization_profile_async")

    def set_device_memory(self, memory: int, size: int) -> None:
        """Take the caller's memory."""
        self._fails("set_device_memory")
        self._scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Set the shape; refuses one outside the profile."""
        assert not self._has_run, "a graph may have been captured from this context"
        if self._profile is None:
            raise Misuse("a shape before the profile")
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        inside = all(low <= dim <= high for low, dim, high in zip(least, shape, most, strict=True))
        if not inside:
            self._logger.log(Severity.ERROR, f"{name}: {shape} is outside {least} to {most}")
        self._shapes[name] = shape
        return inside and not self._fails("set_input_shape")

    def infer_shapes(self) -> list[str]:
        """Return the activations without a shape."""
        if self._fails("infer_shapes"):
            return ["x"]
        return [tensor.name for tensor in self._spec.inputs if tensor.name not in self._shapes]

    def get_tensor_shape(self, name: str) -> list[int]:
        """Return an output's shape, -1 for unknown sizes."""
        if "get_tensor_shape" in self._fake.failing:
            return [-1, -1]
        return list(self._shape(name))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Remember the address; the memory there is looked up in the execution."""
        self._check_thread()
        self._addresses[name] = memory
        known = name in self._engine.inputs or name in self._engine.outputs
        return known and not self._fails("set_tensor_address")

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Compute the outputs, in the current stream."""
        self._check_thread()
        self._check_stream(stream_handle)
        self._user = None
        if self._fails("execute_async_v3"):
            return False
        with torch.inference_mode():
            feeds = {name: self._view(name) for name in self._engine.inputs}
            outputs = {name: self._view(name) for name in self._engine.outputs}
            self._check_overlaps(feeds, outputs)
            self._spoil_scratch()
            results = self._fake.execute(self._spec, {**self._engine.constants, **feeds})
            for name, output in outputs.items():
                output.copy_(results[name])
        self._has_run = True
        self._fake.executed.append(self._spec.kind)
        return True

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return a shape of this execution."""
        dims = {
            dim: size
            for tensor in self._spec.inputs
            for dim, size in zip(tensor.shape, self._shapes[tensor.name], strict=True)
        }
        _, shape = {**self._engine.inputs, **self._engine.outputs}[name]
        return tuple(dim if isinstance(dim, int) else dims[dim] for dim in shape)

    def _view(self, name: str) -> Tensor:
        if name not in self._addresses:
            raise Misuse(f"{name} has no address")
        dtype, _ = {**self._engine.inputs, **self._engine.outputs}[name]
        shape = in_torch(DTYPES[dtype], self._shape(name))
        return self._fake.memory.view(name, self._addresses[name], DTYPES[dtype], shape)

    def _check_overlaps(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        for name, output in outputs.items():
            begin, end = output.data_ptr(), output.data_ptr() + output.nbytes
            for other, tensor in {**inputs, **outputs}.items():
                if other != name and begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end:
                    raise Misuse(f"{name} overlaps {other}")

    def _spoil_scratch(self) -> None:
        memory, size = self._scratch
        needed = self._engine.device_memory_size_v2
        if size < needed:
            raise Misuse(f"{size} bytes of scratch memory instead of {needed}")
        self._fake.memory.view("scratch", memory, torch.uint8, (size,)).fill_(0xFF)

    def _check_stream(self, handle: int) -> None:
        device = self._fake.device
        current = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if handle != current:
            raise Misuse(f"stream {handle} instead of {current}")

    def _check_thread(self) -> None:
        thread = threading.get_ident()
        if self._user not in (None, thread):
            raise Misuse("two threads use a context")
        self._user = thread


def fake_plan_set(
    segments: Sequence[PlacedSegment], weights: Mapping[str, Tensor] | None = None, rtx: bool = False
) -> PlanSet:
    """Return plans that the fake loads; those that hold constants need the canonical `weights`."""
    plans = {}
    for name, segment in segments_by_plan(segments).items():
        names = segment.weight_names()
        held = [weight.name for weight in segment.spec.weights if weight.source == "constant"]
        constants = {key: (weights or {})[names[key]] for key in held}
        plans[name] = Plan(SavedFile.of(fake_plan(segment.spec, constants)), 0.0, None)
    producer = Producer("tensorrt_rtx" if rtx else "tensorrt", "0.fake", BuildTarget((80,)))
    return PlanSet(producer, tuple(segments), plans)
