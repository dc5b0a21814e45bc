"""`Graph`: the layers that the networks of segments consist of."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmengine.backends.tensorrt.library import Library, require_result
from llmengine.backends.tensorrt.plan_matrix import PlanDType, PlanMatrix
from llmengine.backends.tensorrt.spec import PlanTensor, SegmentSpec, WeightSpec

RawArray = npt.NDArray[np.uint8]
"""A weight's bytes, contiguous, in the dtype of its `WeightSpec`: numpy has no bfloat16."""


class Graph:
    """A network under construction. Tensors are [rows, columns] unless another shape is given.

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
            "int8": self._trt.int8,
            "int4": self._trt.int4,
            "float8_e4m3fn": self._trt.fp8,
        }
        self.inputs = {tensor.name: self._add_input(tensor) for tensor in spec.inputs}
        self._weights = {weight.name: self._add_weight(weight, values) for weight in spec.weights}

    def has_weight(self, name: str) -> bool:
        """Whether the segment reads this weight."""
        return name in self._weights

    def weight(self, name: str) -> Any:
        """A weight in its `plan_shape`."""
        return self._weights[name]

    def scalar(self, value: float, rank: int = 2) -> Any:
        """An fp32 constant that broadcasts, with `rank` dimensions of size 1."""
        return self._constant((1,) * rank, "float32", np.array([value], dtype=np.float32).view(np.uint8))

    def cast(self, x: Any, dtype: PlanDType) -> Any:
        """x in another dtype."""
        wanted = self._dtypes[dtype]
        return x if x.dtype == wanted else self._layer("add_cast", x, wanted).get_output(0)

    def add(self, a: Any, b: Any) -> Any:
        """a + b; a row or column of size 1 is repeated."""
        return self._layer("add_elementwise", a, b, self._trt.ElementWiseOperation.SUM).get_output(0)

    def multiply(self, a: Any, b: Any) -> Any:
        """a * b; a row or column of size 1 is repeated."""
        return self._layer("add_elementwise", a, b, self._trt.ElementWiseOperation.PROD).get_output(0)

    def divide(self, a: Any, b: Any) -> Any:
        """a / b; a row or column of size 1 is repeated."""
        return self._layer("add_elementwise", a, b, self._trt.ElementWiseOperation.DIV).get_output(0)

    def at_least(self, a: Any, b: Any) -> Any:
        """The larger of a and b; a row or column of size 1 is repeated."""
        return self._layer("add_elementwise", a, b, self._trt.ElementWiseOperation.MAX).get_output(0)

    def largest(self, x: Any) -> Any:
        """The largest magnitude of the last dimension, [..., 1]."""
        magnitude = self._layer("add_unary", x, self._trt.UnaryOperation.ABS).get_output(0)
        axis = 1 << (len(x.shape) - 1)
        return self._layer("add_reduce", magnitude, self._trt.ReduceOperation.MAX, axis, True).get_output(0)

    def group_sums(self, x: Any, size: int) -> Any:
        """Sums of `size` consecutive columns, [rows, groups]."""
        return self._layer("add_reduce", self.groups(x, size), self._trt.ReduceOperation.SUM, 1 << 2, False).get_output(
            0
        )

    def groups(self, x: Any, size: int) -> Any:
        """Columns in groups of `size`, [rows, groups, size]."""
        return self._reshaped(x, (0, x.shape[1] // size, size))

    def joined_groups(self, x: Any) -> Any:
        """Undoes `groups`."""
        return self._reshaped(x, (0, x.shape[1] * x.shape[2]))

    def columns_side_by_side(self, parts: list[Any]) -> Any:
        """The columns of all parts, [rows, columns]."""
        layer = self._layer("add_concatenation", parts)
        layer.axis = 1
        return layer.get_output(0)

    def quantize(self, x: Any, dtype: PlanDType) -> Any:
        """x, float32 of any shape, rounded to the nearest numbers of a dtype; beyond its range to the last ones."""
        return self._layer("add_quantize", x, self._one(), self._dtypes[dtype]).get_output(0)

    def unquantize(self, x: Any) -> Any:
        """The numbers of `quantize`, float32."""
        return self._layer("add_dequantize", x, self._one(), self._trt.float32).get_output(0)

    def dequantize(self, weight: Any, scale: Any, matrix: PlanMatrix, dtype: PlanDType) -> Any:
        """The weight of a matrix times its scales, in the layout that it has in the plan."""
        layer = self._layer("add_dequantize", weight, scale, self._dtypes[dtype])
        if len(scale.shape) == 1:
            layer.axis = 1 if matrix.is_transposed else 0
        elif len(scale.shape) == 2 and matrix.block[0] > 1:
            layer.block_shape = self._trt.Dims(matrix.block)
        return layer.get_output(0)

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

    def matmul(self, x: Any, weight: Any) -> Any:
        """x @ weight for a weight [in, out]."""
        operation = self._trt.MatrixOperation
        return self._layer("add_matrix_multiply", x, operation.NONE, weight, operation.NONE).get_output(0)

    def gather(self, x: Any, rows: Any) -> Any:
        """x[rows] for indices [num_rows]."""
        return self._layer("add_gather", x, rows, 0).get_output(0)

    def gather_columns(self, x: Any, columns: Any) -> Any:
        """x[:, columns] for indices [num_columns]."""
        return self._layer("add_gather", x, columns, 1).get_output(0)

    def split(self, x: Any, *widths: int) -> list[Any]:
        """The columns in parts of these widths, from the first one on."""
        shape = self._layer("add_shape", x).get_output(0)
        num_rows = self._layer("add_slice", shape, (0,), (1,), (1,)).get_output(0)
        sizes = {width: self._size(num_rows, width) for width in dict.fromkeys(widths)}
        parts, begin = [], 0
        for width in widths:
            layer = self._layer("add_slice", x, (0, begin), (0, width), (1, 1))
            layer.set_input(2, sizes[width])  # the number of rows is not known before a step
            parts.append(layer.get_output(0))
            begin += width
        return parts

    def _size(self, num_rows: Any, columns: int) -> Any:
        width = self._constant((1,), "int64", np.array([columns], dtype=np.int64).view(np.uint8))
        return self._layer("add_concatenation", [num_rows, width]).get_output(0)

    def _reshaped(self, x: Any, shape: tuple[int, ...]) -> Any:
        """x in another shape; a 0 stands for the size that x has there."""
        layer = self._layer("add_shuffle", x)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def _one(self) -> Any:
        return self._constant((), "float32", np.ones((1,), dtype=np.float32).view(np.uint8))

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

    def _constant(self, shape: tuple[int, ...], dtype: PlanDType, value: RawArray, name: str = "") -> Any:
        held = self._trt.Weights(self._dtypes[dtype], value.ctypes.data, int(np.prod(shape)))
        layer = self._layer("add_constant", shape, held)
        if name:
            layer.name = name
        output = layer.get_output(0)
        self.constants[output.name] = value
        return output
