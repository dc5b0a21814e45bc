"""Weights of 8 bits as floating-point numbers (e4m3), with or without activations of the same type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError
from llmengine.quantization.formats import Along, Shape, TensorSpec, WeightFormat, require_setting

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""Rows and columns of a block, and columns of a token's activations, that share a scale."""

_LARGEST = 448.0
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Fp8(WeightFormat):
    """Weights in float8 e4m3 (of the kind without infinities) times their scale.

    ::

        weight            float8_e4m3fn [out, in]
        weight_scale      float32 [1], [out] or [blocks of 128 rows, blocks of 128 columns]
        activation_scale  float32 [1], only with activations="tensor"

    A fused matrix whose parts have one scale each is stored with scales="channel", which is exact.

    Attributes:
        scales: weights that share a scale: all ("tensor"), those of a row ("channel"), or 128 x 128 ("block").
        activations: "none": they stay as they are. "token": each token is rounded to e4m3 with a scale that makes its
            largest value 448, found at run time; "block": likewise for every 128 columns of a token. "tensor":
            `activation_scale` for all tokens, which has to be calibrated; values beyond it saturate.
    """

    name: ClassVar[str] = "fp8"
    scales: Literal["tensor", "channel", "block"] = "channel"
    activations: Literal["none", "token", "block", "tensor"] = "token"

    def __post_init__(self) -> None:
        require_setting(self, "scales", ("tensor", "channel", "block"))
        require_setting(self, "activations", ("none", "token", "block", "tensor"))

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        dims: dict[str, tuple[Along | int, ...]] = {
            "tensor": (1,),
            "channel": (Along("out"),),
            "block": (Along("out", BLOCK), Along("in", BLOCK)),
        }
        specs = {
            "weight": TensorSpec.of_matrix("float8_e4m3fn", shape, Along("out"), Along("in")),
            "weight_scale": TensorSpec.of_matrix("float32", shape, *dims[self.scales]),
        }
        if self.activations == "tensor":
            specs["activation_scale"] = TensorSpec.of_matrix("float32", shape, 1)
        return specs

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Round to nearest; the largest weight that shares a scale becomes 448."""
        if self.activations == "tensor":
            raise ConfigError(
                "format 'fp8' with one scale for all activations has to be calibrated; use per_token=True for scales "
                "that are found at run time"
            )
        weight = weight.float()
        scale = (self._largest(weight) / _LARGEST).clamp_(min=_TINY)
        return {"weight": _to_e4m3(weight / self._per_weight(scale, weight)), "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors["weight"].float()
        return weight * self._per_weight(tensors["weight_scale"], weight)

    def rounded_activations(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        import torch.nn.functional as F

        x = x.float()
        if self.activations == "none":
            return x
        if self.activations == "tensor":
            scale = tensors["activation_scale"]
            return _to_e4m3(x / scale).float() * scale
        columns = x.shape[1]
        size = BLOCK if self.activations == "block" else columns
        groups = F.pad(x, (0, -columns % size)).view(x.shape[0], -1, size)
        scale = (groups.abs().amax(dim=2, keepdim=True) / _LARGEST).clamp_(min=_TINY)
        return (_to_e4m3(groups / scale).float() * scale).flatten(1)[:, :columns]

    def _largest(self, weight: Tensor) -> Tensor:
        """The largest magnitude of the weights that share each scale, in the shape of the scales."""
        import torch.nn.functional as F

        magnitude = weight.abs()
        if self.scales == "tensor":
            return magnitude.max().view(1)
        if self.scales == "channel":
            return magnitude.amax(dim=1)
        rows, columns = weight.shape
        padded = F.pad(magnitude, (0, -columns % BLOCK, 0, -rows % BLOCK))
        return padded.view(-(-rows // BLOCK), BLOCK, -1, BLOCK).amax(dim=(1, 3))

    def _per_weight(self, scale: Tensor, weight: Tensor) -> Tensor:
        """Scales in a shape that broadcasts over the weights."""
        if self.scales != "block":
            return scale.view(-1, 1)
        by_rows = scale.repeat_interleave(BLOCK, dim=0)[: weight.shape[0]]
        return by_rows.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]


def _to_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 number, ties to even; larger magnitudes become 448."""
    import torch

    return x.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
