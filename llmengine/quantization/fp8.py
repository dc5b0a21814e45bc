"""Weights of 8 bits as floating-point numbers (e4m3), with or without activations of the same type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError
from llmengine.quantization.formats import Along, Shape, TensorSpec, require_setting
from llmengine.quantization.grid import Grid, GridFormat
from llmengine.quantization.quotients import quotient

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 128
"""Rows and columns of a block, and columns of a token's activations, that share a scale."""

_LARGEST = 448.0
_STEPS = 16
"""Scales that are tried for a set of weights, within a factor of 2."""
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Fp8(GridFormat):
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

    def grids(self, weight: Tensor) -> Iterator[Grid]:
        """Yield grids in which the largest weight that shares a scale is 448, then less, down to 224.

        Errors of e4m3 numbers are relative to the power of two below, so that they depend on where weights lie between
        two powers. The least squared error is about 0.86 of that with 448, but takes as many roundings to find as there
        are grids: rounding to nearest without data takes the first.
        """
        import torch

        largest = quotient(self._largest(weight), _LARGEST).clamp_(min=_TINY)
        group_rows = {"tensor": weight.shape[0], "channel": 1, "block": BLOCK}[self.scales]
        size = BLOCK if self.scales == "block" else weight.shape[1]
        for step in range(_STEPS):
            scale = self._per_row(largest * 2.0 ** (step / _STEPS), weight.shape[0])
            highest = torch.full_like(scale, _LARGEST)
            yield Grid(scale, -highest, highest, size, _nearest_numbers, group_rows)

    def stored(self, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
        import torch

        if self.activations == "tensor":
            raise ConfigError(
                "format 'fp8' with one scale for all activations has to be calibrated; use per_token=True for scales "
                "that are found at run time"
            )
        kept = {"tensor": grid.scale[:1, 0], "channel": grid.scale[:, 0], "block": grid.scale[::BLOCK]}
        scale = kept[self.scales].clone(memory_format=torch.contiguous_format)
        return {"weight": _to_e4m3(grid.scaled(weight)), "weight_scale": scale}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        weight = tensors["weight"].float()
        scale = self._per_row(tensors["weight_scale"], weight.shape[0])
        if self.scales == "block":
            scale = scale.repeat_interleave(BLOCK, dim=1)[:, : weight.shape[1]]
        return weight * scale

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
        scale = quotient(groups.abs().amax(dim=2, keepdim=True), _LARGEST).clamp_(min=_TINY)
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

    def _per_row(self, scale: Tensor, num_rows: int) -> Tensor:
        """Scales as they are stored, as those of each row, [num_rows, 1] or [num_rows, blocks of 128 columns]."""
        if self.scales == "block":
            return scale.repeat_interleave(BLOCK, dim=0)[:num_rows]
        return scale.view(-1, 1).expand(num_rows, 1)


def _nearest_numbers(x: Tensor) -> Tensor:
    return _to_e4m3(x).float()


def _to_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 number, ties to even; larger magnitudes become 448."""
    import torch

    return x.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
