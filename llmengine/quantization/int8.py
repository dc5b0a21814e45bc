"""Weights of 8 bits as integers: weight-only, and with activations of 8 bits (W8A8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError
from llmengine.quantization.formats import Along, Shape, TensorSpec, WeightFormat, require_setting
from llmengine.quantization.quotients import quotient

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 127
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Int8PerChannel(WeightFormat):
    """`weight`, int8 [out, in], times `weight_scale`, float32 [out]; the largest weight of each row is 127."""

    name: ClassVar[str] = "int8"

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec.of_matrix("int8", shape, Along("out"), Along("in")),
            "weight_scale": TensorSpec.of_matrix("float32", shape, Along("out")),
        }

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        values, scale = _rounded_rows(weight.float())
        return {"weight": values, "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["weight"].float() * tensors["weight_scale"][:, None]


INT8 = Int8PerChannel()


@dataclass(frozen=True, slots=True)
class Int8W8A8(WeightFormat):
    """Weights and activations of 8 bits, whose products add up as integers.

    ::

        weight            int8 [out, in]
        weight_scale      float32 [out] for weights="channel", [1] for "tensor"
        activation_scale  float32 [1], only with activations="tensor"
        input_scale       float32 [in], only with input_scale: activations are multiplied by it first

    y[t, o] = sum_i(q[t, i] * weight[o, i]) * scale[t] * weight_scale[o], where q = round(x * input_scale / scale) in
    [-127, 127], ties to even.

    Attributes:
        scales: weights that share a scale: those of a row ("channel") or all ("tensor").
        activations: "token": scale[t] = max(abs(x[t] * input_scale)) / 127, found at run time. "tensor":
            `activation_scale` for all tokens, which has to be calibrated; values beyond it saturate.
        input_scale: whether the matrix has factors for its columns. SmoothQuant (arXiv 2211.10438) needs them where
            they cannot be folded into the weights that the activations come from.
    """

    name: ClassVar[str] = "w8a8"
    scales: Literal["channel", "tensor"] = "channel"
    activations: Literal["token", "tensor"] = "token"
    input_scale: bool = False

    def __post_init__(self) -> None:
        require_setting(self, "scales", ("channel", "tensor"))
        require_setting(self, "activations", ("token", "tensor"))
        require_setting(self, "input_scale", (False, True))

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        specs = {
            "weight": TensorSpec.of_matrix("int8", shape, Along("out"), Along("in")),
            "weight_scale": TensorSpec.of_matrix("float32", shape, Along("out") if self.scales == "channel" else 1),
        }
        if self.activations == "tensor":
            specs["activation_scale"] = TensorSpec.of_matrix("float32", shape, 1)
        if self.input_scale:
            specs["input_scale"] = TensorSpec.of_matrix("float32", shape, Along("in"))
        return specs

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        import torch

        if self.activations == "tensor":
            raise ConfigError(
                "format 'w8a8' with one scale for all activations has to be calibrated: use method 'smoothquant', or "
                "per_token=True for scales that are found at run time"
            )
        weight = weight.float()
        if self.scales == "channel":
            values, scale = _rounded_rows(weight)
        else:
            scale = quotient(weight.abs().max(), _LARGEST).clamp_(min=_TINY).view(1)
            values = (weight / scale).round_().to(torch.int8)
        tensors = {"weight": values, "weight_scale": scale}
        if self.input_scale:
            tensors["input_scale"] = torch.ones(weight.shape[1])
        return tensors

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors["weight"].float() * tensors["weight_scale"].view(-1, 1)
        return weight * tensors["input_scale"] if self.input_scale else weight

    def quantized_activations(self, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Activations as int8 [num_tokens, in] and their scales, float32 [num_tokens, 1]."""
        import torch

        x = x.float()
        if self.input_scale:
            x = x * tensors["input_scale"]
        if self.activations == "tensor":
            scale = tensors["activation_scale"].expand(x.shape[0]).view(-1, 1)
        else:
            scale = quotient(x.abs().amax(dim=1, keepdim=True), _LARGEST).clamp_(min=_TINY)
        return (x / scale).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale

    def rounded_activations(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        values, scale = self.quantized_activations(x, tensors)
        rounded = values.float() * scale
        return rounded / tensors["input_scale"] if self.input_scale else rounded


def _rounded_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 [out, in] as int8 with a scale for each row, float32 [out]."""
    import torch

    scale = quotient(weight.abs().amax(dim=1), _LARGEST).clamp_(min=_TINY)
    return (weight / scale[:, None]).round_().to(torch.int8), scale
