"""The outputs that a plan should have: exact values, and the variance of the rounding error of each element.

The formulas of the segments stand here once more, independent of `network.py`. They run over any arithmetic; the one
here computes in float64 and carries variances beside the values.

Each value that a segment stores in its dtype has an error of up to half a unit in the last place (ulp), which is
modelled as uniform and independent: variance ulp^2 / 12. The inputs count as rounded too, as they are in a model: an
error as small as theirs does no harm, wherever it comes from. To first order an output's error is a sum of such errors
with the derivatives as weights, so variances are carried through the formulas. Products are summed in fp32, in any
order: the partial sums of K products that are added one by one give K / 6 roundings of their root mean square. The
model is that of N. J. Higham and T. Mary, "A New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci.
Comput. 41 (2019), with the errors' actual sizes in place of bounds.

Formats that round activations are no exception: a rounded activation has an error of up to half the distance between
two numbers of its format, and each dequantized weight one of half a unit of the plan's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.tensorrt.plan_matrix import LARGEST, LEAST_SCALE, PlanMatrix
from llmengine.backends.tensorrt.spec import PART, SUM, SegmentKind, SegmentSpec
from llmengine.quantization.fp8 import BLOCK

V = TypeVar("V")

MAX_ROWS = 512
"""Rows of activations that are computed at a time: float64 takes four times the memory of a plan's dtype."""

_MATRIX_ROWS = 8192
"""Rows of a matrix that are converted to float64 at a time."""

_STEP = 1e-5
"""Half the distance between the two points of a numerical derivative."""


class Arithmetic(Protocol[V]):
    """The operations that segments consist of. A result that a plan stores in the spec's dtype is rounded to it."""

    def input(self, name: str) -> V:
        """An activation, [T, columns]."""

    def sampled_input(self, name: str) -> V:
        """The sampled rows of an activation, [S, columns]."""

    def add(self, a: V, b: V) -> V:
        """a + b."""

    def norm(self, x: V, name: str) -> V:
        """RMSNorm of the rows, scaled by a weight; x itself where the model has no such norm."""

    def linear(self, x: V, name: str) -> V:
        """x @ weight.T, plus the bias where there is one."""

    def gated(self, gate_up: V) -> V:
        """activation(gate) * up, where gate is the left and up the right half of the columns."""

    def capped(self, logits: V) -> V:
        """The logits, scaled and soft-capped, in fp32 at least."""


def segment_outputs(kind: SegmentKind, ops: Arithmetic[V]) -> dict[str, V]:
    """Outputs of a segment by name."""
    if kind == "first":
        return {"qkv": _qkv(ops, ops.input("x"), "")}
    if kind == "mid":
        x = _after_attention(ops, ops.input("attended"), ops.input("x"))
        return {"x_out": x, "qkv": _qkv(ops, x, "next.")}
    if kind == "last":
        x = _after_attention(ops, ops.sampled_input("attended"), ops.sampled_input("x"))
        return {"logits": _logits(ops, x)}
    if kind == "o":
        return {PART: ops.linear(ops.input("attended"), "o")}
    if kind == "mlp":
        x = _after_sum(ops, "attention_out_norm")
        return {"x_out": x, PART: _mlp(ops, x)}
    x = _after_sum(ops, "mlp_out_norm")
    return {"x_out": x, "qkv": _qkv(ops, x, "next.")} if kind == "next" else {"logits": _logits(ops, x)}


def activate(gate: Tensor, spec: SegmentSpec) -> Tensor:
    """The MLP's activation of each element."""
    return F.silu(gate) if spec.numerics.activation == "silu" else F.gelu(gate, approximate="tanh")


def _qkv(ops: Arithmetic[V], x: V, prefix: str) -> V:
    return ops.linear(ops.norm(x, f"{prefix}input_norm"), f"{prefix}qkv")


def _after_attention(ops: Arithmetic[V], attended: V, x: V) -> V:
    x = ops.add(x, ops.norm(ops.linear(attended, "o"), "attention_out_norm"))
    return ops.add(x, ops.norm(_mlp(ops, x), "mlp_out_norm"))


def _after_sum(ops: Arithmetic[V], norm: str) -> V:
    return ops.add(ops.input("x"), ops.norm(ops.input(SUM), norm))


def _mlp(ops: Arithmetic[V], x: V) -> V:
    return ops.linear(ops.gated(ops.linear(ops.norm(x, "post_attention_norm"), "gate_up")), "down")


def _logits(ops: Arithmetic[V], x: V) -> V:
    return ops.capped(ops.linear(ops.norm(x, "final_norm"), "lm_head"))


@dataclass(frozen=True, slots=True)
class Rounded:
    """Values and the variance of their rounding errors.

    Attributes:
        value: float64 [rows, columns], as if nothing had been rounded.
        variance: float32 [rows, columns], of the errors that are independent of each other.
        row_variance: float32 [rows, 1] or 0, of a relative error that all values of a row share.
    """

    value: Tensor
    variance: Tensor
    row_variance: Tensor | float = 0.0

    @property
    def total_variance(self) -> Tensor:
        """Variance of each element's error, float32 [rows, columns]."""
        return self.variance + self.row_variance * self.value.square().float()


def expected_outputs(
    spec: SegmentSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[slice, dict[str, Rounded]]]:
    """Yield, for some rows at a time, the rows and their outputs by name, for a plan that rounds to `dtype`.

    Args:
        tensors: inputs, and weights by their names in the plan.
    """
    names = ["sample_tokens"] if spec.kind == "last" else [tensor.name for tensor in spec.inputs]
    num_rows = len(tensors[names[0]])
    for begin in range(0, num_rows, MAX_ROWS):
        rows = slice(begin, min(begin + MAX_ROWS, num_rows))
        part = {**tensors, **{name: tensors[name][rows] for name in names}}
        yield rows, segment_outputs(spec.kind, _Rounding(spec, part, dtype))


@dataclass(frozen=True, slots=True)
class _Rounding:
    """`Arithmetic` on exact values with variances."""

    spec: SegmentSpec
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    def input(self, name: str) -> Rounded:
        return self._stored(self.tensors[name].double(), 0.0)

    def sampled_input(self, name: str) -> Rounded:
        return self._stored(self.tensors[name][self.tensors["sample_tokens"]].double(), 0.0)

    def add(self, a: Rounded, b: Rounded) -> Rounded:
        return self._stored(a.value + b.value, a.total_variance + b.total_variance)

    def norm(self, x: Rounded, name: str) -> Rounded:
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return x
        squares = x.value.square()
        mean = squares.mean(-1, keepdim=True) + self.spec.numerics.rms_norm_eps
        factor = mean.rsqrt() * weight.double()
        variance = x.total_variance
        # The error of the root comes from the mean of the squares, so all values of the row share it.
        of_mean = 4 * (squares * variance).sum(-1, keepdim=True) / squares.shape[-1] ** 2
        row_variance = (of_mean / (4 * mean.square())).float()
        stored = self._stored(x.value * factor, factor.square().float() * variance)
        return Rounded(stored.value, stored.variance, row_variance)

    def linear(self, x: Rounded, name: str) -> Rounded:
        parts = [self._product(x, name, end, part) for end, part in self.spec.matrix_parts(name).items()]
        value, variance = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        bias = self.tensors.get(f"{name}.bias")
        return self._stored(value + bias.double(), variance) if bias is not None else Rounded(value, variance)

    def _product(self, x: Rounded, name: str, end: str, matrix: PlanMatrix) -> tuple[Tensor, Tensor]:
        """The product with one part of a matrix, stored, and its variance."""
        tensors = {suffix: self.tensors[f"{name}.{suffix}{end}"] for suffix in matrix.tensors()}
        x = self._as_multiplied(x, matrix, tensors)
        sums = x.value.shape[-1] / 6 * torch.finfo(torch.float32).eps ** 2 / 12
        squares = x.value.square().float()
        spread = x.variance + sums * squares
        is_dequantized = matrix.scale_dtype is not None and matrix.activations in ("none", "block")
        values, variances = [], []
        for first in range(0, matrix.shape[0], _MATRIX_ROWS):
            weight = matrix.dequantized_rows(tensors, first, min(first + _MATRIX_ROWS, matrix.shape[0]))
            values.append(x.value @ weight.T)
            variances.append(spread @ weight.float().square().T)
            if is_dequantized:  # the weights are rounded to the plan's dtype
                variances[-1] += squares @ (_ulp(weight, self.dtype).square() / 12).T
        value, variance = torch.cat(values, dim=1), torch.cat(variances, dim=1)
        variance += (x.row_variance + 2 * sums) * value.square().float()
        product = self._stored(value, variance)
        if matrix.has_zeros:
            terms = tensors["zero_term"]
            of_groups = x.variance.unflatten(1, (matrix.num_groups, -1)).sum(2)
            value = product.value + x.value.unflatten(1, (matrix.num_groups, -1)).sum(2) @ terms.double().T
            product = self._stored(value, product.variance + of_groups @ terms.square().T)
        return product.value, product.variance

    def _as_multiplied(self, x: Rounded, matrix: PlanMatrix, tensors: Mapping[str, Tensor]) -> Rounded:
        """Activations as the product takes them: with the factors and in the order of columns, and rounded."""
        if matrix.has_input_scale:
            factors = tensors["input_scale"]
            x = Rounded(x.value * factors.double(), x.variance * factors.square(), x.row_variance)
            if matrix.activations == "none":
                x = Rounded(x.value, self._stored(x.value, x.variance).variance, x.row_variance)
        if matrix.has_input_order:
            order = tensors["input_order"].long()
            x = Rounded(x.value[:, order], x.variance[:, order], x.row_variance)
        if matrix.activations == "none":
            return x
        scale = _activation_scale(x.value, matrix, tensors)
        largest = scale * LARGEST[matrix.values]
        value = torch.minimum(torch.maximum(x.value, -largest), largest)
        step = scale.float() if matrix.values == "int8" else _ulp(value / scale, torch.float8_e4m3fn) * scale.float()
        variance = x.variance + step.square() / 12
        if matrix.activations == "block":
            variance = self._stored(value, variance).variance
        return Rounded(value, variance, x.row_variance)

    def gated(self, gate_up: Rounded) -> Rounded:
        (gate, up), (of_gate, of_up) = gate_up.value.chunk(2, -1), gate_up.total_variance.chunk(2, -1)
        activated = activate(gate, self.spec)
        slope = (activate(gate + _STEP, self.spec) - activate(gate - _STEP, self.spec)) / (2 * _STEP)
        variance = (slope * up).square().float() * of_gate + activated.square().float() * of_up
        return self._stored(activated * up, variance)

    def capped(self, logits: Rounded) -> Rounded:
        numerics = self.spec.numerics
        value, variance = logits.value * numerics.logit_scale, logits.total_variance * numerics.logit_scale**2
        if numerics.logit_soft_cap is not None:
            bounded = torch.tanh(value / numerics.logit_soft_cap)
            value, variance = bounded * numerics.logit_soft_cap, (1 - bounded.square()).square().float() * variance
        return Rounded(value, variance + _ulp(value, torch.float32).square() / 12)

    def _stored(self, value: Tensor, variance: Tensor | float) -> Rounded:
        """A value that is rounded to the plan's dtype."""
        return Rounded(value, variance + _ulp(value, self.dtype).square() / 12)


def _activation_scale(x: Tensor, matrix: PlanMatrix, tensors: Mapping[str, Tensor]) -> Tensor:
    """The scale with which each activation is rounded, float64, of a shape that broadcasts to x."""
    if matrix.activations == "tensor":
        return tensors["activation_scale"].double()
    groups = x.abs().split(BLOCK if matrix.activations == "block" else x.shape[1], dim=1)
    scales = [(part.amax(1, keepdim=True) / LARGEST[matrix.values]).clamp_min(LEAST_SCALE) for part in groups]
    return torch.cat([scale.expand_as(part) for scale, part in zip(scales, groups, strict=True)], dim=1)


def _ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours in `dtype` near each value, float32."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp_min(info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(value, info.eps, dtype=torch.float32), exponent)
