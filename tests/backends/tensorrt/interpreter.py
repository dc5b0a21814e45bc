"""Runs an `INetworkDefinition` with torch, which gives what its plan computes where no plan can be executed.

It reads the network back layer by layer, so the test covers exactly what TensorRT was given. Types are as strict as
TensorRT's: no operand is converted. Shape tensors (int64) stay on the host, so that a run on CUDA tensors has no
synchronisation and, after one run that brings the constants there, can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.network import DefinedSegment
from llmengine.quantization.int4 import unpack_nibbles

Operation = Callable[..., Tensor]

INT4 = torch.uint8
"""Two columns in a byte stand for 4 bits, which torch has no type of."""


@dataclass(frozen=True, slots=True)
class _Step:
    """One layer: where it reads and writes, and what the network declares of its result."""

    name: str
    inputs: tuple[str, ...]
    output: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    operation: Operation


def in_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in torch of a tensor of a network."""
    return (*shape[:-1], shape[-1] // 2) if dtype == INT4 else shape


def to_int8(x: Tensor) -> Tensor:
    """Round as TensorRT does, to [-128, 127]."""
    return x.round().clamp(-128, 127).to(torch.int8)


def to_e4m3(x: Tensor) -> Tensor:
    """Round as TensorRT does, to [-448, 448]."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


class Interpreter:
    """A network as a function of named tensors.

    Raises `NotImplementedError` for a layer that none of our networks has.
    """

    def __init__(self, library: Library, segment: DefinedSegment) -> None:
        trt = self._trt = library.trt
        self._network = segment.network
        self._dtypes = {
            trt.float32: torch.float32,
            trt.float16: torch.float16,
            trt.bfloat16: torch.bfloat16,
            trt.int32: torch.int32,
            trt.int64: torch.int64,
            trt.int8: torch.int8,
            trt.fp8: torch.float8_e4m3fn,
            trt.int4: INT4,
        }
        self._bytes = segment.constants
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        network = segment.network
        self._inputs = {t.name: t for t in (network.get_input(i) for i in range(network.num_inputs))}
        self._outputs = [network.get_output(i).name for i in range(network.num_outputs)]
        self._device = torch.device("cpu")
        self._steps = self._sort([self._step(network.get_layer(i)) for i in range(network.num_layers)])

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs by name. All inputs must be given, with the declared types and shapes, on one device."""
        assert feeds.keys() == self._inputs.keys(), f"inputs {sorted(feeds)} instead of {sorted(self._inputs)}"
        for name, tensor in self._inputs.items():
            self._check(name, feeds[name], self._dtypes[tensor.dtype], tuple(tensor.shape))
        self._check_dimension_names(feeds)
        self._device = next(iter(feeds.values())).device
        values = dict(feeds)
        for step in self._steps:
            result = step.operation(*(values[name] for name in step.inputs))
            self._check(step.name, result, step.dtype, step.shape)
            values[step.output] = result
        return {name: values[name] for name in self._outputs}

    def _check(self, name: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        shape = in_torch(dtype, shape)
        fits = len(shape) == value.dim() and all(a in (-1, b) for a, b in zip(shape, value.shape, strict=True))
        assert fits, f"{name}: shape {tuple(value.shape)} instead of {shape}"
        assert value.dtype == dtype, f"{name}: {value.dtype} instead of {dtype}"

    def _check_dimension_names(self, feeds: Mapping[str, Tensor]) -> None:
        sizes: dict[str, int] = {}
        for name, tensor in self._inputs.items():
            for axis, size in enumerate(feeds[name].shape):
                if tensor.shape[axis] == -1:
                    label = tensor.get_dimension_name(axis)
                    assert sizes.setdefault(label, size) == size, f"{name}: {label} is {size} and {sizes[label]}"

    def _sort(self, steps: list[_Step]) -> list[_Step]:
        """Return the layers that the outputs need, each after those it reads; a network has them in any order."""
        by_output = {step.output: step for step in steps}
        done: dict[str, _Step] = {}

        def visit(name: str) -> None:
            if name in self._inputs or name in done:
                return
            for source in by_output[name].inputs:
                visit(source)
            done[name] = by_output[name]

        for name in self._outputs:
            visit(name)
        return list(done.values())

    def _step(self, layer: Any) -> _Step:
        kind = layer.type.name  # before the cast: IActivationLayer has another `type`
        layer.__class__ = getattr(self._trt, _CLASSES[kind]) if kind in _CLASSES else type(layer)
        if kind not in _CLASSES:
            raise NotImplementedError(f"layer {layer.name}: {kind}")
        output = layer.get_output(0)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        return _Step(
            name=f"{kind} {layer.name}",
            inputs=tuple(tensor.name for tensor in inputs if tensor is not None),
            output=output.name,
            dtype=self._dtypes[output.dtype],
            shape=tuple(output.shape),
            operation=getattr(self, f"_{kind.lower()}")(layer),
        )

    def _constant(self, layer: Any) -> Operation:
        output = layer.get_output(0)
        name, shape, dtype = output.name, tuple(layer.shape), self._dtypes[output.dtype]

        def value() -> Tensor:
            key = (name, torch.device("cpu") if dtype == torch.int64 else self._device)
            if key not in self._on_device:
                host = torch.from_numpy(self._bytes[name].copy()).view(dtype)
                self._on_device[key] = host.reshape(in_torch(dtype, shape)).to(key[1])
            return self._on_device[key]

        return value

    def _cast(self, layer: Any) -> Operation:
        dtype = self._dtypes[layer.to_type]
        return lambda x: x.to(dtype)

    def _elementwise(self, layer: Any) -> Operation:
        operation = _ELEMENTWISE[layer.op.name]

        def apply(a: Tensor, b: Tensor) -> Tensor:
            assert a.dtype == b.dtype, f"{layer.name}: {a.dtype} and {b.dtype}"
            return operation(a, b)

        return apply

    def _unary(self, layer: Any) -> Operation:
        return _UNARY[layer.op.name]

    def _activation(self, layer: Any) -> Operation:
        return _ACTIVATIONS[layer.type.name]

    def _reduce(self, layer: Any) -> Operation:
        operation = _REDUCE[layer.op.name]
        axes = [axis for axis in range(8) if layer.axes >> axis & 1]
        return lambda x: operation(x, axes, layer.keep_dims)

    def _quantize(self, layer: Any) -> Operation:
        dtype = self._dtypes[layer.get_output(0).dtype]

        def apply(x: Tensor, scale: Tensor) -> Tensor:
            assert x.dtype == scale.dtype, f"{layer.name}: {x.dtype} and {scale.dtype}"
            assert scale.dim() == 0, f"{layer.name}: a scale of {list(scale.shape)}"
            return to_int8(x / scale) if dtype == torch.int8 else to_e4m3(x / scale)

        return apply

    def _dequantize(self, layer: Any) -> Operation:
        dtype = self._dtypes[layer.get_output(0).dtype]
        source, rank = layer.get_input(0), len(layer.get_input(1).shape)
        axis, is_int4 = layer.axis, self._dtypes[source.dtype] == INT4

        def apply(numbers: Tensor, scale: Tensor) -> Tensor:
            # TensorRT infers blocks from the shapes.
            if is_int4:
                assert scale.dtype == dtype, f"{layer.name}: 4 bits with {scale.dtype} become {dtype}"
                numbers = unpack_nibbles(numbers ^ 0x88).to(torch.int8) - 8
            factors = scale.float()
            if rank == 1:
                factors = factors.unsqueeze(1 - axis)
            elif rank == 2:
                rows, columns = (n // m for n, m in zip(numbers.shape, scale.shape, strict=True))
                assert (rows * scale.shape[0], columns * scale.shape[1]) == tuple(numbers.shape), layer.name
                factors = factors.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            return (numbers.float() * factors).to(dtype)

        return apply

    def _shuffle(self, layer: Any) -> Operation:
        shape = list(layer.reshape_dims)
        assert layer.zero_is_placeholder
        assert list(layer.first_transpose) == list(range(len(list(layer.first_transpose)))), layer.name

        def apply(x: Tensor) -> Tensor:
            return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])

        return apply

    def _matrix_multiply(self, layer: Any) -> Operation:
        transposed = [op == self._trt.MatrixOperation.TRANSPOSE for op in (layer.op0, layer.op1)]

        def apply(a: Tensor, b: Tensor) -> Tensor:
            assert a.dtype == b.dtype, f"{layer.name}: {a.dtype} and {b.dtype}"
            return (a.mT if transposed[0] else a) @ (b.mT if transposed[1] else b)

        return apply

    def _gather(self, layer: Any) -> Operation:
        assert layer.mode == self._trt.GatherMode.DEFAULT
        return lambda x, indices: x.index_select(layer.axis, indices)

    def _shape(self, layer: Any) -> Operation:
        return lambda x: torch.tensor(x.shape, dtype=torch.int64)

    def _concatenation(self, layer: Any) -> Operation:
        return lambda *parts: torch.cat(parts, layer.axis)

    def _slice(self, layer: Any) -> Operation:
        start = list(layer.start)
        sizes = list(layer.shape) if layer.num_inputs == 1 else None  # reading a dynamic size warns
        assert list(layer.stride) == [1] * len(start), layer.name

        def apply(x: Tensor, size: Tensor | None = None) -> Tensor:
            ends = [begin + n for begin, n in zip(start, sizes or size.tolist(), strict=True)]
            assert all(end <= limit for end, limit in zip(ends, x.shape, strict=True)), f"{layer.name}: out of bounds"
            return x[tuple(map(slice, start, ends))].contiguous()

        return apply


_CLASSES = {
    "ACTIVATION": "IActivationLayer",
    "CAST": "ICastLayer",
    "CONCATENATION": "IConcatenationLayer",
    "CONSTANT": "IConstantLayer",
    "DEQUANTIZE": "IDequantizeLayer",
    "ELEMENTWISE": "IElementWiseLayer",
    "GATHER": "IGatherLayer",
    "MATRIX_MULTIPLY": "IMatrixMultiplyLayer",
    "QUANTIZE": "IQuantizeLayer",
    "REDUCE": "IReduceLayer",
    "SHAPE": "IShapeLayer",
    "SHUFFLE": "IShuffleLayer",
    "SLICE": "ISliceLayer",
    "UNARY": "IUnaryLayer",
}
_ELEMENTWISE: dict[str, Operation] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "DIV": torch.div,
    "MAX": torch.maximum,
}
_UNARY: dict[str, Operation] = {"SQRT": torch.sqrt, "RECIP": torch.reciprocal, "ABS": torch.abs}
_REDUCE: dict[str, Operation] = {"AVG": torch.mean, "SUM": torch.sum, "MAX": torch.amax}
_ACTIVATIONS: dict[str, Operation] = {
    "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
}
