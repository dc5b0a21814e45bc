"""Products with a segment's matrices as layers of its network, in every form that plans read matrices in."""

from __future__ import annotations

from typing import Any

from llmengine.backends.tensorrt.graph import Graph
from llmengine.backends.tensorrt.plan_matrix import LARGEST, LEAST_SCALE, PlanMatrix
from llmengine.quantization.fp8 import BLOCK


def linear(graph: Graph, x: Any, name: str) -> Any:
    """x @ weight.T, accumulated in fp32 or in integers and rounded to the segment's dtype, plus the bias if any.

    Activations are rounded first where the matrix's format says so.
    """
    products = [_product(graph, x, f"{name}.", end, matrix) for end, matrix in graph.spec.matrix_parts(name).items()]
    product = products[0] if len(products) == 1 else graph.columns_side_by_side(products)
    bias = f"{name}.bias"
    return graph.add(product, graph.weight(bias)) if graph.has_weight(bias) else product


def _product(graph: Graph, x: Any, prefix: str, end: str, matrix: PlanMatrix) -> Any:
    """The product with one part of a matrix, whose tensors have names that begin and end so."""

    def tensor(suffix: str) -> Any:
        return graph.weight(f"{prefix}{suffix}{end}")

    if matrix.has_input_scale:
        x = graph.multiply(graph.cast(x, "float32"), tensor("input_scale"))
    if matrix.has_input_order:
        x = graph.gather_columns(x, tensor("input_order"))
    if matrix.activations in ("token", "tensor"):
        scale = tensor("activation_scale") if matrix.activations == "tensor" else None
        return _scaled_product(graph, x, tensor("weight"), tensor("weight_scale"), scale, matrix)
    if matrix.activations == "block":
        x = _rounded_blocks(graph, x, matrix)
    x = graph.cast(x, graph.spec.dtype)
    weight = tensor("weight")
    if matrix.scale_dtype is not None:
        weight = graph.dequantize(weight, tensor("weight_scale"), matrix, graph.spec.dtype)
    product = _half_product(graph, x, weight, matrix)
    if not matrix.has_zeros:
        return product
    sums = graph.group_sums(graph.cast(x, "float32"), matrix.block[1])
    correction = graph.matmul_transposed(sums, tensor("zero_term"))
    return graph.cast(graph.add(graph.cast(product, "float32"), correction), graph.spec.dtype)


def _half_product(graph: Graph, x: Any, weight: Any, matrix: PlanMatrix) -> Any:
    """The product of operands in the segment's dtype.

    Casts directly around the product tell TensorRT to accumulate in fp32: it turns casts and product into one
    half-precision product. Without them it may accumulate in fp16. Anything else between product and cast (a bias or
    residual in fp32, an fp32 result) would break the pattern, and the weight would be converted in every step.
    """
    exact = _matmul(graph, graph.cast(x, "float32"), graph.cast(weight, "float32"), matrix)
    return graph.cast(exact, graph.spec.dtype)


def _matmul(graph: Graph, x: Any, weight: Any, matrix: PlanMatrix) -> Any:
    return graph.matmul(x, weight) if matrix.is_transposed else graph.matmul_transposed(x, weight)


def _scaled_product(graph: Graph, x: Any, weight: Any, weight_scale: Any, scale: Any, matrix: PlanMatrix) -> Any:
    """A product of 8-bit numbers; `scale` is that of all activations, None for one of each token.

    Activations are divided by their scales before they are rounded, with a scale of 1, and the sums are multiplied by
    them. So scales that are found at run time need nothing that TensorRT does not have for constant ones.
    """
    exact = graph.cast(x, "float32")
    if scale is None:
        scale = _scale_of(graph, exact, matrix)
    numbers = graph.divide(exact, scale)
    if matrix.values == "int8":
        numbers = graph.at_least(numbers, graph.scalar(-LARGEST["int8"]))  # TensorRT itself rounds to -128 as well
    rounded = graph.unquantize(graph.quantize(numbers, matrix.values))
    sums = _matmul(graph, rounded, graph.dequantize(weight, weight_scale, matrix, "float32"), matrix)
    return graph.cast(graph.multiply(sums, scale), graph.spec.dtype)


def _rounded_blocks(graph: Graph, x: Any, matrix: PlanMatrix) -> Any:
    """Activations rounded with a scale for every 128 columns, float32; the last block of a row may be smaller."""
    columns = matrix.shape[1]
    whole = columns - columns % BLOCK
    parts = [x] if columns in (whole, columns - whole) else graph.split(x, whole, columns - whole)
    rounded = []
    for part in parts:
        blocks = graph.groups(graph.cast(part, "float32"), min(BLOCK, part.shape[1]))
        scale = _scale_of(graph, blocks, matrix)
        numbers = graph.unquantize(graph.quantize(graph.divide(blocks, scale), matrix.values))
        rounded.append(graph.joined_groups(graph.multiply(numbers, scale)))
    return rounded[0] if len(rounded) == 1 else graph.columns_side_by_side(rounded)


def _scale_of(graph: Graph, x: Any, matrix: PlanMatrix) -> Any:
    """The scale that makes the largest magnitude of the last dimension the largest number, [..., 1]."""
    rank = len(x.shape)
    fraction = graph.multiply(graph.largest(x), graph.scalar(1.0 / LARGEST[matrix.values], rank))
    return graph.at_least(fraction, graph.scalar(LEAST_SCALE, rank))
