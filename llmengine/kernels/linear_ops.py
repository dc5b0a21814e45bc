"""Products with matrices bound: each kind of matrix has kernels of its own, each number of rows its own choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from llmengine.kernels.activation import silu_and_mul
from llmengine.kernels.gemm_config import Choose, GemmShape, LinearConfig, Operation, PackedConfig, SkinnyConfig
from llmengine.kernels.linear import LinearKernels
from llmengine.kernels.packed_linear import PackedProducts
from llmengine.kernels.packed_weights import PackedLayout, PackedMatrix
from llmengine.kernels.quantized_matrix import QuantizedMatrix
from llmengine.kernels.scaled_linear import ScaledProducts
from llmengine.kernels.scaled_weights import ScaledMatrix, has_scaled_products
from llmengine.kernels.stacked_weights import StackedMatrix
from llmengine.quantization.formats import DENSE, Shape, WeightFormat
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.stacked import Stacked

BoundLinear = Callable[[Tensor, Tensor], None]
"""(x [num_rows, in_features], where the result goes); weights are bound."""

BoundMlp = Callable[[Tensor, Tensor, Tensor], None]
"""(x [num_rows, hidden], scratch [num_rows, intermediate], where the result goes); weights are bound."""

DeviceMatrix = Matrix | QuantizedMatrix
"""A dense matrix, or a quantized one as the products of its format read it."""


def quantized_matrix(
    weight_format: WeightFormat, shape: Shape, dtype: torch.dtype, device: torch.device | str
) -> QuantizedMatrix | None:
    """A matrix of a format, to be filled, for activations of `dtype`; None if no product reads the format."""
    if isinstance(weight_format, Stacked):
        formats = [part.format for part in weight_format.parts]
        pieces = zip(formats, weight_format.part_shapes(shape), strict=True)
        parts: list[DeviceMatrix] = []
        for item, part_shape in pieces:
            quantized = quantized_matrix(item, part_shape, dtype, device)
            if quantized is None and item != DENSE:
                return None
            parts.append(quantized or Matrix.dense(torch.empty(part_shape, dtype=dtype, device=device)))
        return StackedMatrix(weight_format, parts)
    if has_scaled_products(weight_format):
        return ScaledMatrix(weight_format, shape, device)
    layout = PackedLayout.of(weight_format, shape, dtype)
    return None if layout is None else PackedMatrix(weight_format, layout, device)


class Products(Protocol):
    """The operations of `LinearKernels` with a matrix bound."""

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, bias: Tensor | None, out: Tensor, config: LinearConfig
    ) -> None:
        """See `LinearKernels.norm_linear`."""

    def linear_add(
        self, x: Tensor, bias: Tensor | None, residual: Tensor, config: LinearConfig, accumulate: bool = True
    ) -> None:
        """See `LinearKernels.linear_add`."""

    def norm_linear_silu(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, bias: Tensor | None, out: Tensor, config: LinearConfig
    ) -> None:
        """See `LinearKernels.norm_linear_silu`."""


class DenseProducts:
    """`Products` with a dense matrix."""

    def __init__(self, kernels: LinearKernels, matrix: Matrix) -> None:
        assert matrix.format == DENSE, f"no kernel multiplies by {matrix.format}"
        self._kernels = kernels
        self._weight = matrix.weight

    def norm_linear(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, bias: Tensor | None, out: Tensor, config: LinearConfig
    ) -> None:
        self._kernels.norm_linear(x, norm_weight, eps, self._weight, bias, out, config)

    def linear_add(
        self, x: Tensor, bias: Tensor | None, residual: Tensor, config: LinearConfig, accumulate: bool = True
    ) -> None:
        self._kernels.linear_add(x, self._weight, bias, residual, config, accumulate)

    def norm_linear_silu(
        self, x: Tensor, norm_weight: Tensor | None, eps: float, bias: Tensor | None, out: Tensor, config: LinearConfig
    ) -> None:
        self._kernels.norm_linear_silu(x, norm_weight, eps, self._weight, bias, out, config)


class LinearOps:
    """Products with matrices bound, which ask `choose` for each number of rows."""

    def __init__(self, kernels: LinearKernels, choose: Choose) -> None:
        self._kernels = kernels
        self._choose = choose

    def norm_linear(
        self, norm_weight: Tensor | None, eps: float, matrix: DeviceMatrix, bias: Tensor | None = None
    ) -> BoundLinear:
        """(x, out) -> None; see `LinearKernels.norm_linear`. Columns of `out` may be a part of those of a tensor."""
        if isinstance(matrix, StackedMatrix):
            return self._stacked_norm_linear(norm_weight, eps, matrix, bias)
        products = self._products(matrix)

        def apply(x: Tensor, out: Tensor) -> None:
            config = self._choose(GemmShape.of("norm_linear", x.shape[0], matrix, x.dtype, out.dtype))
            products.norm_linear(x, norm_weight, eps, bias, out, config)

        return apply

    def linear_add(self, matrix: DeviceMatrix, bias: Tensor | None = None) -> BoundLinear:
        """(x, residual) -> None; see `LinearKernels.linear_add`."""
        if isinstance(matrix, StackedMatrix):
            return _in_columns(matrix, bias, self.linear_add)
        products = self._products(matrix)

        def apply(x: Tensor, residual: Tensor) -> None:
            config = self._choose(GemmShape.of("linear_add", x.shape[0], matrix, x.dtype, residual.dtype))
            products.linear_add(x, bias, residual, config)

        return apply

    def linear(self, matrix: DeviceMatrix, bias: Tensor | None = None) -> BoundLinear:
        """(x, out) -> None: the product of rows as they are."""
        if isinstance(matrix, StackedMatrix):
            return _in_columns(matrix, bias, self.linear)
        products = self._products(matrix)

        def apply(x: Tensor, out: Tensor) -> None:
            config = self._choose(GemmShape.of("linear", x.shape[0], matrix, x.dtype, out.dtype))
            products.linear_add(x, bias, out, config, accumulate=False)

        return apply

    def norm_linear_silu(
        self, norm_weight: Tensor | None, eps: float, matrix: DeviceMatrix, bias: Tensor | None = None
    ) -> BoundLinear:
        """(x, out) -> None; see `LinearKernels.norm_linear_silu`. Without a norm, of rows as they are."""
        if isinstance(matrix, StackedMatrix):
            multiply = self._stacked_norm_linear(norm_weight, eps, matrix, bias)

            def apply_stacked(x: Tensor, out: Tensor) -> None:
                gate_up = x.new_empty(len(x), matrix.shape[0])
                multiply(x, gate_up)
                silu_and_mul(gate_up, out, self._kernels.pdl)

            return apply_stacked
        products = self._products(matrix)
        operation: Operation = "linear_silu" if norm_weight is None else "norm_linear_silu"

        def apply(x: Tensor, out: Tensor) -> None:
            config = self._choose(GemmShape.of(operation, x.shape[0], matrix, x.dtype, out.dtype))
            products.norm_linear_silu(x, norm_weight, eps, bias, out, config)

        return apply

    def mlp(
        self,
        norm_weight: Tensor | None,
        eps: float,
        gate_up: DeviceMatrix,
        down: DeviceMatrix,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        accumulate: bool = True,
    ) -> BoundMlp:
        """(x, inner, out) -> None: add to `out` what the gated MLP makes of x; without a norm, of x as it is.

        Args:
            accumulate: False: overwrite `out` instead.
        """
        if isinstance(gate_up, ScaledMatrix) and isinstance(down, ScaledMatrix):
            return self._scaled_mlp(norm_weight, eps, gate_up, down, gate_up_bias, down_bias, accumulate)
        first = self.norm_linear_silu(norm_weight, eps, gate_up, gate_up_bias)
        second = self.linear_add(down, down_bias) if accumulate else self.linear(down, down_bias)

        def apply(x: Tensor, inner: Tensor, out: Tensor) -> None:
            first(x, inner)
            second(inner, out)

        return apply

    def _scaled_mlp(
        self,
        norm_weight: Tensor | None,
        eps: float,
        gate_up: ScaledMatrix,
        down: ScaledMatrix,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        accumulate: bool,
    ) -> BoundMlp:
        """See `mlp`; the activation is computed by the product before, or by the kernel that rounds it."""
        first, second = ScaledProducts(self._kernels, gate_up), ScaledProducts(self._kernels, down)
        gated: Operation = "linear_silu" if norm_weight is None else "norm_linear_silu"
        plain: Operation = "linear_add" if accumulate else "linear"

        def apply(x: Tensor, inner: Tensor, out: Tensor) -> None:
            first_config = self._choose(GemmShape.of(gated, len(x), gate_up, x.dtype, inner.dtype))
            second_config = self._choose(GemmShape.of(plain, len(x), down, x.dtype, out.dtype))
            if first.fuses_gate(first_config):
                first.norm_linear_silu(x, norm_weight, eps, gate_up_bias, inner, first_config)
                second.linear_add(inner, down_bias, out, second_config, accumulate)
                return
            both = x.new_empty(len(x), gate_up.shape[0])
            first.norm_linear(x, norm_weight, eps, gate_up_bias, both, first_config)
            second.silu_linear_add(both, down_bias, out, second_config, accumulate)

        return apply

    def _stacked_norm_linear(
        self, norm_weight: Tensor | None, eps: float, matrix: StackedMatrix, bias: Tensor | None
    ) -> BoundLinear:
        multiply = _in_columns(matrix, bias, partial(self.norm_linear, None, 0.0))

        def apply(x: Tensor, out: Tensor) -> None:
            multiply(x if norm_weight is None else self._kernels.normed(x, norm_weight, eps), out)

        return apply

    def _products(self, matrix: DeviceMatrix) -> Products:
        return _products(self._kernels, matrix)


def _in_columns(
    matrix: StackedMatrix, bias: Tensor | None, bind: Callable[[DeviceMatrix, Tensor | None], BoundLinear]
) -> BoundLinear:
    """(x, out) -> None: each part's product in its columns of `out`."""
    linears: list[tuple[slice, BoundLinear]] = []
    begin = 0
    for part in matrix.parts:
        columns = slice(begin, begin + part.shape[0])
        linear = bind(part, None if bias is None else bias[columns])
        linears.append((columns, _through_copy(linear) if isinstance(part, Matrix) else linear))
        begin = columns.stop

    def apply(x: Tensor, out: Tensor) -> None:
        for columns, linear in linears:
            linear(x, out[:, columns])

    return apply


def _through_copy(linear: BoundLinear) -> BoundLinear:
    """`linear`, which wants a contiguous result, for one whose rows lie apart."""

    def apply(x: Tensor, out: Tensor) -> None:
        copy = out.contiguous()
        linear(x, copy)
        out.copy_(copy)

    return apply


_PLAIN: Mapping[Operation, Operation] = {"norm_linear_silu": "norm_linear", "linear_silu": "norm_linear"}
"""What the parts of a stacked matrix of a gated pair are asked for."""


def product_shapes(
    operation: Operation, num_rows: int, matrix: DeviceMatrix, dtype: torch.dtype, out_dtype: torch.dtype
) -> list[GemmShape]:
    """The products of an operation: one, or one for each part of the matrix."""
    if not isinstance(matrix, StackedMatrix):
        return [GemmShape.of(operation, num_rows, matrix, dtype, out_dtype)]
    plain = _PLAIN.get(operation, operation)
    return [GemmShape.of(plain, num_rows, part, dtype, out_dtype) for part in matrix.parts]


def compilations(kernels: LinearKernels, shapes: Iterable[GemmShape], choose: Choose) -> list[Callable[[], None]]:
    """Calls that compile the kernels of products, one kernel each, on any thread of the device."""
    jobs: dict[tuple[GemmShape, LinearConfig], Callable[[], None]] = {}
    for shape in shapes:
        config = choose(shape)
        if has_kernel(shape, config):  # one for any number of rows
            jobs[replace(shape, num_rows=0), config] = partial(compile_product, kernels, shape, config)
    return list(jobs.values())


def _products(kernels: LinearKernels, matrix: DeviceMatrix) -> Products:
    if isinstance(matrix, PackedMatrix):
        return PackedProducts(kernels, matrix)
    if isinstance(matrix, ScaledMatrix):
        return ScaledProducts(kernels, matrix)
    assert isinstance(matrix, Matrix), matrix
    return DenseProducts(kernels, matrix)


def has_kernel(shape: GemmShape, config: LinearConfig) -> bool:
    """Whether a product runs kernels of ours, which have to be compiled; those of libraries are there."""
    return isinstance(config, SkinnyConfig | PackedConfig) or shape.is_quantized


def compile_product(kernels: LinearKernels, shape: GemmShape, config: LinearConfig) -> None:
    """Compile the kernel that `shape` and `config` run, without running it; safe on several threads at once."""
    if isinstance(config, SkinnyConfig):
        kernels.compile(shape, config)
        return
    matrix = quantized_matrix(shape.weight_format, shape.matrix_shape, shape.dtype, "meta")
    assert matrix is not None, shape
    products = _products(kernels, matrix)
    assert isinstance(products, PackedProducts | ScaledProducts)
    x = torch.empty(shape.num_rows, shape.k, dtype=shape.dtype, device="meta")
    out = x.new_empty(shape.num_rows, shape.n, dtype=shape.out_dtype)
    products.compile(x, out, config, shape.is_gated, shape.adds)
