"""How the CPU backend lays out a matrix, as data, and the choice among layouts by measuring.

A `WeightFormat` says what a matrix is stored as in files; a layout is what a linear makes of it in memory. Every layout
is a class of `CpuLinear`, which can also give the stored matrix back.

=============  ======  ===========================================  ================================================
layout         format  what is in memory                            when
=============  ======  ===========================================  ================================================
torch          none    [out, in] as it came                         always there
onednn         none    oneDNN's own blocked layout                  where torch has oneDNN; float32, and bfloat16 on
                                                                    processors with bfloat16 units
dequantized    any     as stored                                    always there; slow
torch-w8a8     w8a8    as stored                                    without the native library
native         most    panels of 16 rows (`native_packing`)         with the native library (`native.NativeLinear`)
=============  ======  ===========================================  ================================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.quantization.formats import DENSE, Shape, WeightFormat
from llmengine.quantization.int8 import Int8W8A8
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.stacked import Stacked, stacked_tensors

MEASURED_TOKENS = (1, 2, 16, 64)
"""Tokens in a step for which layouts are compared."""

_PACK_ROWS = 16
"""Tokens for which oneDNN lays a weight out: one layout for 1, slow for more, and one for all other numbers."""

_WIDENED_TOKENS = 4
"""From this many tokens on, converting weights to fp32 first costs less than a product without units for their type."""

_WIDENED_WEIGHTS = 1 << 20
"""Weights that are converted at a time: few enough to stay in the cache."""

_MEASURED_WEIGHTS = 4_000_000
_MEASURED_TURNS = 3
_TOLERANCE = 0.2
"""Layouts count as equal up to this logarithm of the product of their ratios at `MEASURED_TOKENS`, 5 % each."""


class CpuLinear(Protocol):
    """`models.decoder.Linear` that knows its size and gives back what it was made of."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """float32 x @ weight.T + bias + residual; `residual` may be overwritten."""

    @property
    def size_bytes(self) -> int:
        """Resident bytes, without the bias."""

    @property
    def matrix(self) -> Matrix:
        """The matrix as it is stored; a new copy where the layout is another."""

    @property
    def bias(self) -> Tensor | None:
        """[out_features], None if there is none."""


class TorchLinear:
    """The plain layout; in- and output are fp32.

    Weights of another type than float32 compute in that type where the processor has units for it or tokens are few,
    else as float32 copies made part by part.
    """

    def __init__(self, matrix: Matrix, bias: Tensor | None) -> None:
        assert matrix.format == DENSE, matrix.format
        self.matrix = matrix
        self.bias = bias
        self._weight = weight = matrix.weight
        self._is_half = weight.dtype != torch.float32
        self._has_units = weight.dtype == torch.bfloat16 and _has_bf16_units()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._is_half:
            if residual is not None and self.bias is None:
                return residual.addmm_(x, self._weight.t())
            y = F.linear(x, self._weight, self.bias)
        elif self._has_units or x.shape[0] < _WIDENED_TOKENS:
            y = F.linear(x.to(self._weight.dtype), self._weight, self.bias).float()
        else:
            y = _widened_product(x, self._weight)
            if self.bias is not None:
                y.add_(self.bias)
        return y if residual is None else y.add_(residual)

    @property
    def size_bytes(self) -> int:
        return self._weight.nbytes


def padded_tokens(num_tokens: int) -> int:
    """The rows that oneDNN is given for so many tokens: at most 18 % more, and none more up to 16 tokens.

    oneDNN keeps up to 1,024 compiled products, one for each shape, with buffers in proportion to the rows. Batches of
    every size from 1 to 512 would make it hold gigabytes.
    """
    if num_tokens <= 16:
        return num_tokens
    multiple = max(4, 1 << (num_tokens - 1).bit_length() >> 4)
    return -(-num_tokens // multiple) * multiple


class OneDnnLinear:
    """oneDNN's blocked layout: no copy of the weight on each call."""

    def __init__(self, matrix: Matrix, bias: Tensor | None) -> None:
        assert matrix.format == DENSE, matrix.format
        self.bias = bias
        self._weight = torch.ops.mkldnn._reorder_linear_weight(matrix.weight, _PACK_ROWS)
        self._apply = torch.ops.mkldnn._linear_pointwise.default
        self._dtype = matrix.weight.dtype
        self._size_bytes = matrix.size_bytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor
        if self._dtype != torch.float32:
            x = x.to(self._dtype)
        elif residual is not None and x.shape[0] == 1 and self.bias is None:
            # One token's residual is as good a bias as any, and saves an operator.
            y = self._apply(x, self._weight, residual[0], "none", [], "")
            return y
        num_tokens = x.shape[0]
        padded = padded_tokens(num_tokens)
        if padded != num_tokens:
            x = F.pad(x, (0, 0, 0, padded - num_tokens))
        y = self._apply(x, self._weight, self.bias, "none", [], "")[:num_tokens]
        if self._dtype != torch.float32:
            y = y.float()
        return y if residual is None else y.add_(residual)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def matrix(self) -> Matrix:
        return Matrix.dense(self._weight.to_dense())


class DequantizedLinear:
    """A matrix in any format, made float32 part by part on each call.

    Args:
        bias: [out_features] or None.
    """

    def __init__(self, matrix: Matrix, bias: Tensor | None) -> None:
        self.matrix = matrix
        self.bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        stored, tensors = self.matrix.format, self.matrix.tensors
        x = stored.rounded_activations(x, tensors)
        y = x.new_empty(x.shape[0], self.matrix.shape[0])
        for first, weight in stored.dequantized_rows(tensors, self.matrix.shape, _WIDENED_WEIGHTS):
            torch.mm(x, weight.t(), out=y[:, first : first + len(weight)])
        return _with_bias_and_residual(y, self.bias, residual)

    @property
    def size_bytes(self) -> int:
        return self.matrix.size_bytes


class W8A8Linear:
    """An `Int8W8A8` matrix on torch's integer product; a token's result does not depend on the tokens beside it.

    Args:
        bias: float32 [out_features] or None.
    """

    def __init__(self, matrix: Matrix, bias: Tensor | None) -> None:
        assert isinstance(matrix.format, Int8W8A8), matrix.format
        self.matrix = matrix
        self.bias = bias
        self._format = matrix.format

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        values, scale = self._format.quantized_activations(x, self.matrix.tensors)
        y = torch._int_mm(values, self.matrix.weight.t()).float().mul_(scale)
        y.mul_(self.matrix.tensors["weight_scale"])
        return _with_bias_and_residual(y, self.bias, residual)

    @property
    def size_bytes(self) -> int:
        return self.matrix.size_bytes


class StackedLinear:
    """A `Stacked` matrix: every part is multiplied by a linear of its own.

    Args:
        parts: linears without bias.
        bias: [out_features] or None.
    """

    def __init__(self, format: Stacked, parts: Sequence[CpuLinear], bias: Tensor | None) -> None:
        self.format = format
        self.parts = parts
        self.bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], dim=1)
        return _with_bias_and_residual(y, self.bias, residual)

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def matrix(self) -> Matrix:
        matrices = [part.matrix for part in self.parts]
        shape = (sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1])
        return Matrix(self.format, shape, stacked_tensors(matrix.tensors for matrix in matrices))


def _with_bias_and_residual(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    if bias is not None:
        y.add_(bias)
    return y if residual is None else y.add_(residual)


def _widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in float32."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    rows = max(1, _WIDENED_WEIGHTS // weight.shape[1])
    for part, out in zip(weight.split(rows), y.split(rows, dim=1), strict=True):
        torch.mm(x, part.float().t(), out=out)
    return y


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to lay out matrices of one weight format; `pack` takes the matrix and its bias."""

    name: str
    pack: Callable[[Matrix, Tensor | None], CpuLinear]


ROW_MAJOR = Layout("torch", TorchLinear)
"""Dense matrices as they come, which the native decoder takes too."""

TORCH_W8A8 = Layout("torch-w8a8", W8A8Linear)

DEQUANTIZED = Layout("dequantized", DequantizedLinear)
"""Matrices in any format, as they are stored."""


def dense_layouts(dtype: torch.dtype) -> list[Layout]:
    """The layouts of dense matrices that work here for weights of `dtype`, the plain one first."""
    layouts = [ROW_MAJOR]
    fast = dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bf16_units())
    if fast and _works(_try_onednn, dtype):
        layouts.append(Layout("onednn", OneDnnLinear))
    return layouts


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout, and the seconds that each candidate took at each of `MEASURED_TOKENS`; empty if there was only one."""

    layout: Layout
    seconds: Mapping[str, Sequence[float]]

    def __str__(self) -> str:
        """The layout's name, and how many times faster than the plain one it measured."""
        if not self.seconds:
            return self.layout.name
        plain, own = next(iter(self.seconds.values())), self.seconds[self.layout.name]
        ratios = "/".join(f"{a / b:.1f}" for a, b in zip(plain, own, strict=True))
        return f"{self.layout.name} (x{ratios} at {'/'.join(map(str, MEASURED_TOKENS))} tokens)"


def fastest_layout(
    layouts: Sequence[Layout], weight_format: WeightFormat, shapes: Sequence[Shape], dtype: torch.dtype
) -> Choice:
    """The layout of `weight_format` that multiplies matrices of `shapes` (out, in) in the least processor time.

    `layouts` come in rising order of expectation: the later one wins a tie. Large matrices are cut down, so that
    measuring takes about 0.2 s for any model.

    Args:
        dtype: of weights that are not quantized.
    """
    if len(layouts) == 1:
        return Choice(layouts[0], {})
    share = min(1.0, _MEASURED_WEIGHTS / sum(rows * columns for rows, columns in shapes)) ** 0.5
    if share < 1.0:
        shapes = [(_cut(rows, share), _cut(columns, share)) for rows, columns in shapes]
    # On one thread and by its own clock: programs that share the processor then do not decide the choice.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _measure(layouts, weight_format, shapes, dtype)
    finally:
        torch.set_num_threads(num_threads)
    best = layouts[0]
    for item in layouts[1:]:
        pairs = zip(seconds[item.name], seconds[best.name], strict=True)
        if sum(math.log(own / other) for own, other in pairs) < _TOLERANCE:
            best = item
    return Choice(best, seconds)


def _measure(
    layouts: Sequence[Layout], weight_format: WeightFormat, shapes: Sequence[Shape], dtype: torch.dtype
) -> dict[str, list[float]]:
    """For each layout the least seconds for all matrices at each of `MEASURED_TOKENS`; layouts take turns."""

    def filled(shape: Shape) -> Matrix:
        return Matrix.dense(torch.full(shape, 0.01, dtype=dtype)).quantized(weight_format)

    # Two copies in turn, so that a small model's weights are not simply in the cache from the call before.
    copies = {item.name: [[item.pack(filled(shape), None) for shape in shapes] for _ in range(2)] for item in layouts}
    seconds: dict[str, list[float]] = {item.name: [] for item in layouts}
    for num_tokens in MEASURED_TOKENS:
        inputs = [torch.full((num_tokens, columns), 0.01) for _, columns in shapes]
        times: dict[str, list[float]] = {item.name: [] for item in layouts}
        for turn in range(_MEASURED_TURNS + 1):
            for name, layers in copies.items():
                begin = time.thread_time()
                for linear, x in zip(layers[turn % 2], inputs, strict=True):
                    linear(x)
                times[name].append(time.thread_time() - begin)
        for name, values in times.items():
            seconds[name].append(max(min(values[1:]), 1e-9))
    return seconds


def _cut(size: int, share: float) -> int:
    return max(32, int(size * share) // 32 * 32)


def _has_bf16_units() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _works(attempt: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> bool:
    """Whether a private or deprecated operator exists and is right: its absence must cost speed only."""
    try:
        return bool(torch.allclose(attempt(dtype), torch.full((3, 32), 16.0), rtol=0.02))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _try_onednn(dtype: torch.dtype) -> Tensor:
    weight = torch.full((32, 64), 0.5, dtype=dtype)
    linear = OneDnnLinear(Matrix.dense(weight), None)
    if not torch.equal(linear.matrix.weight, weight):
        raise RuntimeError("the packed weight cannot be read back")
    return linear(torch.full((3, 64), 0.5))
