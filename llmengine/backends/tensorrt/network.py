"""Definitions of segments as TensorRT networks: layers of an `INetworkDefinition`, strongly typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmengine.backends.tensorrt.library import Library, require_result
from llmengine.backends.tensorrt.spec import PlanTensor, SegmentSpec, WeightSpec

RawArray = npt.NDArray[np.uint8]
"""A weight's bytes, contiguous, in the dtype of its `WeightSpec`: numpy has no bfloat16."""


@dataclass(frozen=True, slots=True)
class DefinedSegment:
    """A network and the memory it points to; must live until the plan is built.

    Attributes:
        builder: the `Builder` that owns the network.
        network: the `INetworkDefinition`.
        constants: output tensor name of a constant layer -> its bytes. TensorRT does not copy them, and cannot return
            them in every dtype.
    """

    builder: Any
    network: Any
    constants: dict[str, RawArray]


def define_segment(
    library: Library, builder: Any, spec: SegmentSpec, weights: Mapping[str, RawArray] | None = None
) -> DefinedSegment:
    """The network of `spec`.

    Args:
        weights: name in the plan -> bytes, for the weights that the plan contains. They are not copied.

    Raises `EngineError` naming the call that TensorRT refused.
    """
    network = library.create_network(builder)
    network.name = spec.kind
    graph = _Graph(library, network, spec, dict(weights or {}))
    outputs = {"first": _first, "mid": _mid, "last": _last}[spec.kind](graph)
    for tensor, output in zip(outputs, spec.outputs, strict=True):
        tensor.name = output.name
        network.mark_output(tensor)
    return DefinedSegment(builder, network, graph.constants)


def _first(graph: _Graph) -> list[Any]:
    return [_qkv(graph, graph.inputs["x"], "")]


def _mid(graph: _Graph) -> list[Any]:
    x = _after_attention(graph, graph.inputs["attended"], graph.inputs["x"])
    return [x, _qkv(graph, x, "next.")]


def _last(graph: _Graph) -> list[Any]:
    rows = graph.inputs["sample_tokens"]
    attended, x = graph.gather(graph.inputs["attended"], rows), graph.gather(graph.inputs["x"], rows)
    x = _norm(graph, _after_attention(graph, attended, x), "final_norm")
    logits = graph.cast(_linear(graph, x, "lm_head"), "float32")
    numerics = graph.spec.numerics
    if numerics.logit_scale != 1.0:
        logits = graph.multiply(logits, graph.scalar(numerics.logit_scale))
    if numerics.logit_soft_cap is not None:
        cap = numerics.logit_soft_cap
        bounded = graph.activate(graph.multiply(logits, graph.scalar(1.0 / cap)), "TANH")
        logits = graph.multiply(bounded, graph.scalar(cap))
    return [logits]


def _qkv(graph: _Graph, x: Any, prefix: str) -> Any:
    return _linear(graph, _norm(graph, x, f"{prefix}input_norm"), f"{prefix}qkv")


def _after_attention(graph: _Graph, attended: Any, x: Any) -> Any:
    """Hidden states after a layer, from the output of its attention and the hidden states before it."""
    x = graph.add(x, _norm(graph, _linear(graph, attended, "o"), "attention_out_norm"))
    gate, up = graph.halves(_linear(graph, _norm(graph, x, "post_attention_norm"), "gate_up"))
    return graph.add(x, _norm(graph, _linear(graph, _gated(graph, gate, up), "down"), "mlp_out_norm"))


def _gated(graph: _Graph, gate: Any, up: Any) -> Any:
    """activation(gate) * up, computed in fp32 and rounded once."""
    gate = graph.cast(gate, "float32")
    if graph.spec.numerics.activation == "silu":
        activated = graph.multiply(gate, graph.activate(gate, "SIGMOID"))
    else:
        activated = graph.activate(gate, "GELU_TANH")
    return graph.cast(graph.multiply(activated, graph.cast(up, "float32")), graph.spec.dtype)


def _norm(graph: _Graph, x: Any, name: str) -> Any:
    """RMSNorm of the rows, computed in fp32 and rounded once; x itself where the model has no such norm."""
    if not graph.has_weight(f"{name}.weight"):
        return x
    exact = graph.cast(x, "float32")
    mean = graph.row_mean(graph.multiply(exact, exact))
    inverse = graph.reciprocal_root(graph.add(mean, graph.scalar(graph.spec.numerics.rms_norm_eps)))
    weight = graph.cast(graph.weight(f"{name}.weight"), "float32")
    return graph.cast(graph.multiply(graph.multiply(exact, inverse), weight), graph.spec.dtype)


def _linear(graph: _Graph, x: Any, name: str) -> Any:
    """x @ weight.T, accumulated in fp32, plus the bias where there is one.

    Casts directly around the product tell TensorRT to accumulate in fp32: it turns casts and product into one
    half-precision product. Without them it may accumulate in fp16. Anything else between product and cast (a bias or
    residual in fp32, an fp32 result) would break the pattern, and the weight would be converted in every step.
    """
    exact = graph.matmul_transposed(graph.cast(x, "float32"), graph.cast(graph.weight(f"{name}.weight"), "float32"))
    product = graph.cast(exact, graph.spec.dtype)
    bias = f"{name}.bias"
    return graph.add(product, graph.weight(bias)) if graph.has_weight(bias) else product


class _Graph:
    """The layers that segments consist of. Tensors are [rows, columns] unless another shape is given.

    Attributes:
        inputs: the segment's activations by name.
        constants: see `DefinedSegment`.
    """

    def __init__(self, library: Library, network: Any, spec: SegmentSpec, values: dict[str, RawArray]) -> None:
        self.spec = spec
        self.constants: dict[str, RawArray] = {}
        self._library = library
        self._trt = library.trt
        self._network = network
        self._dtypes = {
            "float32": self._trt.float32,
            "float16": self._trt.float16,
            "bfloat16": self._trt.bfloat16,
            "int32": self._trt.int32,
            "int64": self._trt.int64,
        }
        self.inputs = {tensor.name: self._add_input(tensor) for tensor in spec.inputs}
        self._weights = {weight.name: self._add_weight(weight, values) for weight in spec.weights}

    def has_weight(self, name: str) -> bool:
        """Whether the segment reads this weight."""
        return name in self._weights

    def weight(self, name: str) -> Any:
        """A weight in its `plan_shape`."""
        return self._weights[name]

    def scalar(self, value: float) -> Any:
        """An fp32 constant, [1, 1]."""
        return self._constant((1, 1), "float32", np.array([value], dtype=np.float32).view(np.uint8))

    def cast(self, x: Any, dtype: str) -> Any:
        """x in another dtype."""
        wanted = self._dtypes[dtype]
        return x if x.dtype == wanted else self._layer("add_cast", x, wanted).get_output(0)

    def add(self, a: Any, b: Any) -> Any:
        """a + b; a row or column of size 1 is repeated."""
        return self._layer("add_elementwise", a, b, self._trt.ElementWiseOperation.SUM).get_output(0)

    def multiply(self, a: Any, b: Any) -> Any:
        """a * b; a row or column of size 1 is repeated."""
        return self._layer("add_elementwise", a, b, self._trt.ElementWiseOperation.PROD).get_output(0)

    def row_mean(self, x: Any) -> Any:
        """Mean over the columns, [rows, 1]."""
        return self._layer("add_reduce", x, self._trt.ReduceOperation.AVG, 1 << 1, True).get_output(0)

    def reciprocal_root(self, x: Any) -> Any:
        """1 / sqrt(x)."""
        root = self._layer("add_unary", x, self._trt.UnaryOperation.SQRT).get_output(0)
        return self._layer("add_unary", root, self._trt.UnaryOperation.RECIP).get_output(0)

    def activate(self, x: Any, name: str) -> Any:
        """An `ActivationType`, by name, of each element."""
        return self._layer("add_activation", x, getattr(self._trt.ActivationType, name)).get_output(0)

    def matmul_transposed(self, x: Any, weight: Any) -> Any:
        """x @ weight.T for a weight [out, in], which is read in its own layout."""
        operation = self._trt.MatrixOperation
        return self._layer("add_matrix_multiply", x, operation.NONE, weight, operation.TRANSPOSE).get_output(0)

    def gather(self, x: Any, rows: Any) -> Any:
        """x[rows] for indices [num_rows]."""
        return self._layer("add_gather", x, rows, 0).get_output(0)

    def halves(self, x: Any) -> tuple[Any, Any]:
        """The left and the right half of the columns."""
        columns = x.shape[1] // 2
        shape = self._layer("add_shape", x).get_output(0)
        num_rows = self._layer("add_slice", shape, (0,), (1,), (1,)).get_output(0)
        width = self._constant((1,), "int64", np.array([columns], dtype=np.int64).view(np.uint8))
        size = self._layer("add_concatenation", [num_rows, width]).get_output(0)

        def part(begin: int) -> Any:
            layer = self._layer("add_slice", x, (0, begin), (0, columns), (1, 1))
            layer.set_input(2, size)  # the number of rows is not known before a step
            return layer.get_output(0)

        return part(0), part(columns)

    def _layer(self, call: str, *arguments: Any) -> Any:
        return require_result(getattr(self._network, call)(*arguments), f"{call} in segment {self.spec.kind!r}")

    def _add_input(self, spec: PlanTensor) -> Any:
        shape = tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape)
        tensor = require_result(
            self._network.add_input(spec.name, self._dtypes[spec.dtype], shape), f"input {spec.name}"
        )
        for index, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                tensor.set_dimension_name(index, dim)
        return tensor

    def _add_weight(self, weight: WeightSpec, values: dict[str, RawArray]) -> Any:
        if weight.source == "input":
            dtype = self._dtypes[weight.dtype]
            return require_result(
                self._network.add_input(weight.name, dtype, weight.plan_shape), f"input {weight.name}"
            )
        return self._constant(weight.plan_shape, weight.dtype, values[weight.name], weight.name)

    def _network_input(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        return require_result(self._network.add_input(name, self._dtypes[dtype], shape), f"input {name}")

    def _constant(self, shape: tuple[int, ...], dtype: str, value: RawArray, name: str = "") -> Any:
        held = self._trt.Weights(self._dtypes[dtype], value.ctypes.data, int(np.prod(shape)))
        layer = self._layer("add_constant", shape, held)
        if name:
            layer.name = name
        output = layer.get_output(0)
        self.constants[output.name] = value
        return output
