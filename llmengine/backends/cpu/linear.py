"""Formats of a weight matrix on the CPU, as data, and the choice among them by measuring.

Every format is a callable (`models.decoder.Linear`) that can also give its canonical tensors back.

==========  ==================================================  ==========================================
format      what is stored                                      when
==========  ==================================================  ==========================================
torch       [out, in] as it came                                always there
onednn      oneDNN's own blocked layout                         where torch has oneDNN; float32, and bf16
                                                                on processors with bf16 units
int8        int8 [out, in], one scale for each output row       quant_config.weights == "int8" (slow; the native
                                                                library has a fast one, `native.NativeInt8Linear`)
==========  ==================================================  ==========================================
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MEASURED_TOKENS = (1, 2, 16, 64)
"""Tokens in a step for which formats are compared."""

_PACK_ROWS = 16
"""Tokens for which oneDNN lays a weight out: one layout for 1, slow for more, and one for all other numbers."""

_WIDENED_TOKENS = 4
"""From this many tokens on, converting weights to fp32 first costs less than a product without units for their type."""

_WIDENED_WEIGHTS = 1 << 20
"""Weights that are converted at a time: few enough to stay in the cache."""

_MEASURED_WEIGHTS = 4_000_000
_MEASURED_TURNS = 3
_TOLERANCE = 0.2
"""Logarithm of the product of the ratios at `MEASURED_TOKENS`, 5 % each, that is still called equal."""

_TINY = 1e-30

_LARGEST_INT8 = 127


class CpuLinear(Protocol):
    """`models.decoder.Linear` that knows its size and its canonical tensors."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return fp32 x @ weight.T + bias + residual; `residual` may be overwritten."""

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("weight", ...), and ("weight_scale", ...), ("bias", ...) where there are any."""


class TorchLinear:
    """The plain layout; in- and output are fp32.

    Weights of another type than float32 compute in that type where the processor has units for it or tokens are few,
    else as float32 copies made part by part.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self._is_half = weight.dtype != torch.float32
        self._has_units = weight.dtype == torch.bfloat16 and _has_bf16_units()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._is_half:
            if residual is not None and self._bias is None:
                return residual.addmm_(x, self._weight.t())
            y = F.linear(x, self._weight, self._bias)
        elif self._has_units or x.shape[0] < _WIDENED_TOKENS:
            y = F.linear(x.to(self._weight.dtype), self._weight, self._bias).float()
        else:
            y = _widened_product(x, self._weight)
            if self._bias is not None:
                y.add_(self._bias)
        return y if residual is None else y.add_(residual)

    @property
    def size_bytes(self) -> int:
        return self._weight.nbytes

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self._weight
        if self._bias is not None:
            yield "bias", self._bias


def padded_tokens(num_tokens: int) -> int:
    """Return the number of rows that oneDNN is given for so many tokens: at most 18 % more, and none up to 16.

    oneDNN keeps up to 1,024 compiled products, one for each shape, with buffers in proportion to the rows. Batches of
    every size from 1 to 512 would make it hold gigabytes.
    """
    if num_tokens <= 16:
        return num_tokens
    multiple = max(4, 1 << (num_tokens - 1).bit_length() >> 4)
    return -(-num_tokens // multiple) * multiple


class OneDnnLinear:
    """oneDNN's blocked layout: no copy of the weight on each call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self._apply = torch.ops.mkldnn._linear_pointwise.default
        self._bias = bias
        self._dtype = weight.dtype
        self._size_bytes = weight.nbytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor
        if self._dtype != torch.float32:
            x = x.to(self._dtype)
        elif residual is not None and x.shape[0] == 1 and self._bias is None:
            # One token's residual is as good a bias as any, and saves an operator.
            y = self._apply(x, self._weight, residual[0], "none", [], "")
            return y
        num_tokens = x.shape[0]
        padded = padded_tokens(num_tokens)
        if padded != num_tokens:
            x = F.pad(x, (0, 0, 0, padded - num_tokens))
        y = self._apply(x, self._weight, self._bias, "none", [], "")[:num_tokens]
        if self._dtype != torch.float32:
            y = y.float()
        return y if residual is None else y.add_(residual)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self._weight.to_dense()
        if self._bias is not None:
            yield "bias", self._bias


class Int8Linear:
    """int8 weights with one scale for each output row, on torch's operators: made fp32 part by part on each call.

    Args:
        weight: int8 [out_features, in_features].
        scale: fp32 [out_features].
        bias: fp32 [out_features] or None.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._scale = scale
        self._bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = _widened_product(x, self._weight).mul_(self._scale)
        if self._bias is not None:
            y.add_(self._bias)
        return y if residual is None else y.add_(residual)

    @property
    def size_bytes(self) -> int:
        return self._weight.nbytes + self._scale.nbytes

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self._weight
        yield "weight_scale", self._scale
        if self._bias is not None:
            yield "bias", self._bias


def _widened_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T in fp32."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    rows = max(1, _WIDENED_WEIGHTS // weight.shape[1])
    for part, out in zip(weight.split(rows), y.split(rows, dim=1), strict=True):
        torch.mm(x, part.float().t(), out=out)
    return y


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [out_features, in_features] and fp32 scales [out_features]; the largest of each row becomes 127."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / _LARGEST_INT8).clamp_(min=_TINY)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """A way to store an unquantized weight; `pack` takes weight and bias."""

    name: str
    pack: Callable[[Tensor, Tensor | None], CpuLinear]


def dense_formats(dtype: torch.dtype) -> list[LinearFormat]:
    """Return the formats that work here for weights of `dtype`, the plain one first."""
    formats = [LinearFormat("torch", TorchLinear)]
    fast = dtype == torch.float32 or (dtype == torch.bfloat16 and _has_bf16_units())
    if fast and _works(_try_onednn, dtype):
        formats.append(LinearFormat("onednn", OneDnnLinear))
    return formats


@dataclass(frozen=True, slots=True)
class Choice:
    """A format, and the seconds that each candidate took at each of `MEASURED_TOKENS`; empty if there was only one."""

    format: LinearFormat
    seconds: Mapping[str, Sequence[float]]

    def __str__(self) -> str:
        """The format's name, and how many times faster than the plain one it measured."""
        if not self.seconds:
            return self.format.name
        plain, own = next(iter(self.seconds.values())), self.seconds[self.format.name]
        ratios = "/".join(f"{a / b:.1f}" for a, b in zip(plain, own, strict=True))
        return f"{self.format.name} (x{ratios} at {'/'.join(map(str, MEASURED_TOKENS))} tokens)"


ROW_MAJOR = Choice(LinearFormat("torch", TorchLinear), {})
"""The plain format, without a measurement."""


def fastest_format(formats: Sequence[LinearFormat], shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Choice:
    """Measure `formats` on matrices of `shapes` (out, in) and return the one with the least processor time.

    `formats` come in rising order of expectation: the later one wins a tie. Large matrices are cut down, so that it
    takes about 0.2 s for any model.
    """
    if len(formats) == 1:
        return Choice(formats[0], {})
    share = min(1.0, _MEASURED_WEIGHTS / sum(rows * columns for rows, columns in shapes)) ** 0.5
    if share < 1.0:
        shapes = [(_cut(rows, share), _cut(columns, share)) for rows, columns in shapes]
    # On one thread and by its own clock: programs that share the processor then do not decide the choice.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = _measure(formats, shapes, dtype)
    finally:
        torch.set_num_threads(num_threads)
    best = formats[0]
    for item in formats[1:]:
        pairs = zip(seconds[item.name], seconds[best.name], strict=True)
        if sum(math.log(own / other) for own, other in pairs) < _TOLERANCE:
            best = item
    return Choice(best, seconds)


def _measure(
    formats: Sequence[LinearFormat], shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> dict[str, list[float]]:
    """Return for each format the least seconds for all matrices at each of `MEASURED_TOKENS`; formats take turns."""
    # Two copies in turn, so that a small model's weights are not simply in the cache from the call before.
    copies = {
        item.name: [[item.pack(torch.full(shape, 0.01, dtype=dtype), None) for shape in shapes] for _ in range(2)]
        for item in formats
    }
    seconds: dict[str, list[float]] = {item.name: [] for item in formats}
    for num_tokens in MEASURED_TOKENS:
        inputs = [torch.full((num_tokens, columns), 0.01) for _, columns in shapes]
        times: dict[str, list[float]] = {item.name: [] for item in formats}
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
    """True if a private or deprecated operator is there and right: its absence must cost speed only."""
    try:
        return bool(torch.allclose(attempt(dtype), torch.full((3, 32), 16.0), rtol=0.02))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _try_onednn(dtype: torch.dtype) -> Tensor:
    linear = OneDnnLinear(torch.full((32, 64), 0.5, dtype=dtype), None)
    if not torch.equal(next(linear.canonical())[1], torch.full((32, 64), 0.5, dtype=dtype)):
        raise RuntimeError("the packed weight cannot be read back")
    return linear(torch.full((3, 64), 0.5))
