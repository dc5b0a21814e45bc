"""One layer of a model on calibration texts: its forward pass, and its matrices quantized on what they see there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from llmengine.models.arch import ModelArch
from llmengine.models.causal_attention import CausalAttention
from llmengine.models.decoder import ACT_AND_MUL, DecoderLayer, Linear, Norm, TorchSegments, forward
from llmengine.models.rope import layer_tables
from llmengine.quant_config import QuantMethod
from llmengine.quantization import awq, gptq, smoothquant
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.grid import GridFormat, best_grid
from llmengine.quantization.input_statistics import InputStatistics
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import Int8W8A8
from llmengine.quantization.quotients import quotient

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = ("qkv", "o", "gate_up", "down")
"""The matrices of a layer, in stream order."""

PRECEDING_NORM = {"qkv": "input_norm", "gate_up": "post_attention_norm"}
"""Matrix -> the norm that its activations come from, unless norms follow what they normalise."""


@dataclass(frozen=True, slots=True)
class CountedLinear:
    """A dense matrix whose activations are counted."""

    weight: Tensor
    bias: Tensor | None
    statistics: InputStatistics | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.statistics is not None:
            self.statistics.add(x)
        return _product(x, self.weight, self.bias, residual)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A matrix as a quantized model computes with it.

    Attributes:
        weight: dequantized, float32.
    """

    format: WeightFormat
    tensors: Mapping[str, Tensor]
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _product(self.format.rounded_activations(x, self.tensors), self.weight, self.bias, residual)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = F.linear(x, weight, bias)
    return y if residual is None else y.add_(residual)


class LayerForward:
    """The forward pass of single layers over whole texts, in float32, by the one decoder."""

    def __init__(self, arch: ModelArch, longest: int) -> None:
        """Args: longest: tokens of the longest text."""
        self._arch = arch
        # Some encodings depend on the longest context that a table covers: it is the one of serving.
        tables = layer_tables(arch, max(longest, arch.max_position_embeddings))
        kept = {id(table): table[:longest].clone() for table in tables}
        self._tables = [kept[id(table)] for table in tables]

    def bind(self, index: int, vectors: Mapping[str, Tensor], linears: Mapping[str, Linear]) -> LayerFunction:
        """Layer `index` as a function of a text's hidden states.

        Args:
            vectors: norms by name ("input_norm.weight").
            linears: by the names in `MATRICES`.
        """
        arch = self._arch
        norms = {name: partial(_rms_norm, vector.float(), arch.rms_norm_eps) for name, vector in vectors.items()}
        q_norm, k_norm = (self._head_norm(norms.get(f"{name}_norm.weight")) for name in "qk")
        attention = CausalAttention(arch, self._tables[index], q_norm, k_norm, arch.layer(index).sliding_window)
        layer = DecoderLayer(
            qkv=linears["qkv"],
            o=linears["o"],
            gate_up=linears["gate_up"],
            down=linears["down"],
            input_norm=norms.get("input_norm.weight"),
            attention_out_norm=norms.get("attention_out_norm.weight"),
            post_attention_norm=norms.get("post_attention_norm.weight"),
            mlp_out_norm=norms.get("mlp_out_norm.weight"),
        )
        segments = TorchSegments([layer], _same, _same, ACT_AND_MUL[arch.hidden_act], 1.0, None)
        return LayerFunction(segments, attention)

    def _head_norm(self, norm: Norm | None) -> Norm | None:
        """The norm of [num_tokens, heads, head_dim], None if there is none."""
        if norm is None or self._arch.qk_norm == "head":
            return norm
        return lambda heads: norm(heads.flatten(1)).view(heads.shape)


@dataclass(frozen=True, slots=True)
class LayerFunction:
    """A decoder of one layer, whose "logits" are its hidden states."""

    segments: TorchSegments
    attention: CausalAttention

    def __call__(self, x: Tensor) -> Tensor:
        """Hidden states [num_tokens, hidden] before the layer, in any dtype -> after it, float32."""
        hidden = forward(self.segments, x.float(), lambda _, qkv: self.attention(qkv), None)
        assert hidden is not None
        return hidden


def _same(x: Tensor, residual: Tensor | None = None) -> Tensor:
    return x


def _rms_norm(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


@dataclass(slots=True)
class QuantizedLayer:
    """A layer's matrices in their formats, and what goes with them.

    Attributes:
        vectors: norms and biases by name, in their dtype.
        matrices: tensors of each matrix's format.
        errors: relative error of the product of each calibrated matrix.
    """

    vectors: dict[str, Tensor]
    matrices: dict[str, dict[str, Tensor]]
    errors: dict[str, float]

    def pop(self, name: str) -> Tensor:
        """Give away the tensor of this name, "qkv.weight_scale" or "input_norm.weight"."""
        if name in self.vectors:
            return self.vectors.pop(name)
        matrix, _, suffix = name.rpartition(".")
        return self.matrices[matrix].pop(suffix)


def is_calibrated(method: QuantMethod, format: WeightFormat) -> bool:
    """Whether a method chooses the values of this format; others are rounded to nearest, or dense."""
    if method == "gptq":
        return isinstance(format, GridFormat)
    return isinstance(format, Int4Groups if method == "awq" else Int8W8A8)


def quantized_layer(
    arch: ModelArch,
    method: QuantMethod,
    formats: Mapping[str, WeightFormat],
    tensors: Mapping[str, Tensor],
    statistics: MutableMapping[str, InputStatistics],
    check: Callable[[], None] = lambda: None,
) -> QuantizedLayer:
    """The layer whose tensors are given, with each matrix in its format of `formats`.

    A factor of an activation is folded into the weights that it comes from: into the norm before qkv and gate_up, into
    the rows of v before o (one for all query heads that share a value head), into the rows of up before down. Where
    nothing can be folded, formats have an `input_scale`.

    One matrix is in float32 at a time.

    Args:
        tensors: dense tensors of the layer by their names without the layer's.
        statistics: of the activations of every matrix that is calibrated; others are rounded to nearest, or dense. Used
            up: those of each matrix are taken out before it is quantized.
        check: called before each matrix; see `calibrated_weights`.
    """
    found: dict[str, Tensor] = {}
    for name, counted in statistics.items():
        check()
        factors = _factors(arch, method, name, tensors[f"{name}.weight"], counted, formats[name])
        if factors is not None:
            found[name] = factors
    folded = FoldedLayer(arch, tensors, found)
    layer = QuantizedLayer(dict(folded.vectors), {}, {})
    for name in MATRICES:
        check()
        if name in statistics:
            layer.matrices[name], layer.errors[name] = _quantized(
                method, formats[name], folded.matrix(name), statistics.pop(name), folded.factors.get(name)
            )
        else:
            weight = folded.matrix(name).to(tensors[f"{name}.weight"].dtype)
            layer.matrices[name] = formats[name].quantize(weight)
    return layer


class FoldedLayer:
    """A dense layer with the columns of some matrices multiplied by factors, which computes the same.

    The weights that activations come from are divided by them; qkv and gate_up without a norm before them are left to
    `input_scale`.

    Attributes:
        vectors: norms and biases by name, in their dtype.
        factors: matrix -> [in_features], float32. Those of a norm are what it is divided by once it is rounded.
    """

    def __init__(self, arch: ModelArch, tensors: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
        """Args: factors: matrix -> [in_features]; those of o must be the same for heads that share a value head."""
        self._tensors = tensors
        self.factors = dict(factors)
        self.vectors = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
        for name, norm in PRECEDING_NORM.items():
            if name in factors and (weight := self.vectors.get(f"{norm}.weight")) is not None:
                self.vectors[f"{norm}.weight"], self.factors[name] = _folded(weight, factors[name])
        self._divisors: dict[str, Tensor] = {}
        if "o" in factors:
            self._divisors["qkv"] = factors["o"].view(arch.num_kv_heads, -1, arch.head_dim)[:, 0].reshape(-1)
        if "down" in factors:
            self._divisors["gate_up"] = factors["down"]
        for name, divisors in self._divisors.items():
            if (bias := self.vectors.get(f"{name}.bias")) is not None:
                self.vectors[f"{name}.bias"] = _divided_rows(bias, divisors)

    def matrix(self, name: str) -> Tensor:
        """The matrix `name`, float32 [out_features, in_features]."""
        weight = self._tensors[f"{name}.weight"].float()
        if name in self._divisors:
            weight = _divided_rows(weight, self._divisors[name])
        return weight * self.factors[name] if name in self.factors else weight


def _factors(
    arch: ModelArch, method: QuantMethod, name: str, weight: Tensor, counted: InputStatistics, format: WeightFormat
) -> Tensor | None:
    """The factors of the columns of a matrix, None for none.

    Those of o are the same for heads that share a value head.
    """
    if method == "gptq":
        return None
    weight = weight.float()
    if method == "awq":
        assert isinstance(format, Int4Groups)
        assert counted.gram is not None
        magnitude = counted.mean_magnitude
        if name == "o":
            magnitude = _shared(arch, magnitude, largest=False)
        return awq.column_factors(weight, magnitude, counted.gram, format)
    assert isinstance(format, Int8W8A8)
    alpha = smoothquant.ALPHA if format.activations == "token" else smoothquant.STATIC_ALPHA
    factors = smoothquant.column_factors(weight, counted.largest, alpha)
    return _shared(arch, factors, largest=True) if name == "o" else factors


def _quantized(
    method: QuantMethod, format: WeightFormat, weight: Tensor, counted: InputStatistics, factors: Tensor | None
) -> tuple[dict[str, Tensor], float]:
    """The tensors of a matrix whose columns are multiplied by `factors` already, and the error of its product."""
    if factors is not None:
        counted.divide_by(factors)
    plain = format
    if isinstance(format, Int4Groups | Int8W8A8):
        plain = dataclasses.replace(format, input_scale=False)
    if isinstance(plain, GridFormat):
        grid = best_grid(plain, weight, counted.gram)
        # Only the callee holds the Gram matrix, so that it can be freed in between.
        points = gptq.rounded_columns(weight, counted.take_gram(), grid) if method == "gptq" else weight
        tensors = plain.stored(points, grid)
    else:
        assert isinstance(plain, Int8W8A8), plain
        tensors = dataclasses.replace(plain, activations="token").quantize(weight)
        if plain.activations == "tensor":
            tensors["activation_scale"] = quotient(counted.largest.max(), 127.0).clamp_(min=1e-30).view(1)
    error = counted.relative_error(weight, plain, tensors)
    if format != plain:
        tensors["input_scale"] = torch.ones(weight.shape[1]) if factors is None else 1.0 / factors
    return tensors, error


def _folded(norm: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """A norm divided by factors, and the factors that it is divided by once it is rounded to its dtype."""
    divided = (norm.float() / factors).to(norm.dtype)
    exact = norm.float() / divided.float()
    return divided, torch.where(exact.isfinite() & (exact != 0), exact, 1.0)


def _divided_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """`tensor` with its last rows divided by `factors`, one each: those of v in qkv, those of up in gate_up."""
    divided = tensor.float().clone()
    divided[-len(factors) :] /= factors if tensor.ndim == 1 else factors[:, None]
    return divided.to(tensor.dtype)


def _shared(arch: ModelArch, values: Tensor, *, largest: bool) -> Tensor:
    """Values of the activations of o, [num_heads * head_dim], the same for heads that share a value head."""
    heads = values.view(arch.num_kv_heads, -1, arch.head_dim)
    joint = heads.amax(dim=1, keepdim=True) if largest else heads.mean(dim=1, keepdim=True)
    return joint.expand_as(heads).reshape(-1)
