"""What a segment computes, in torch: what the tests hold plans and their fakes against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.tensorrt.expected_outputs import activate, segment_outputs
from llmengine.backends.tensorrt.plan_matrix import LARGEST, PlanMatrix
from llmengine.backends.tensorrt.spec import SegmentSpec
from llmengine.quantization.fp8 import BLOCK
from tests.backends.tensorrt.interpreter import to_e4m3, to_int8


def reference(spec: SegmentSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs of a segment by name, computed and rounded in `dtype`; norms and activations in fp32 at least.

    Args:
        tensors: inputs, and weights by their names in the plan, of any floating dtype.
    """
    return segment_outputs(spec.kind, _Torch(spec, tensors, dtype))


@dataclass(frozen=True, slots=True)
class _Torch:
    """`Arithmetic` by torch."""

    spec: SegmentSpec
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """The dtype in which norms and activations are computed."""
        return torch.promote_types(self.dtype, torch.float32)

    def input(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def sampled_input(self, name: str) -> Tensor:
        return self.input(name)[self.tensors["sample_tokens"]]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return x
        exact = x.to(self.wide)
        inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.spec.numerics.rms_norm_eps)
        return (exact * inverse * weight.to(self.wide)).to(self.dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        parts = self.spec.matrix_parts(name).items()
        product = torch.cat([self._product(x, f"{name}.", end, part) for end, part in parts], dim=1)
        bias = self.tensors.get(f"{name}.bias")
        return product if bias is None else product + bias.to(self.dtype)

    def _product(self, x: Tensor, prefix: str, end: str, matrix: PlanMatrix) -> Tensor:
        """The product with a part of a matrix; activations are rounded where the format rounds them."""
        tensors = {suffix: self.tensors[f"{prefix}{suffix}{end}"] for suffix in matrix.tensors()}
        if matrix.scale_dtype is None:
            return x @ tensors["weight"].to(self.dtype).T
        exact = x.double()
        if matrix.has_input_scale:
            exact = exact * tensors["input_scale"].double()
        if matrix.has_input_order:
            exact = exact[:, tensors["input_order"].long()]
        if matrix.activations != "none":
            largest, size = LARGEST[matrix.values], BLOCK if matrix.activations == "block" else exact.shape[1]
            blocks = exact.split(size, dim=1)
            scales = [part.abs().amax(1, keepdim=True).clamp_min(1e-30) / largest for part in blocks]
            if matrix.activations == "tensor":
                scales = [tensors["activation_scale"].double()]
            rounded = to_int8 if matrix.values == "int8" else to_e4m3
            exact = torch.cat([rounded(p / scale).double() * scale for p, scale in zip(blocks, scales, strict=True)], 1)
        weight = matrix.dequantized_rows(tensors, 0, matrix.shape[0])
        if matrix.has_zeros:
            weight = weight + matrix.per_weight(tensors["zero_term"]).double()
        return (exact.to(self.wide) @ weight.to(self.wide).T).to(self.dtype)

    def gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.to(self.wide).chunk(2, dim=-1)
        return (activate(gate, self.spec) * up).to(self.dtype)

    def capped(self, logits: Tensor) -> Tensor:
        numerics = self.spec.numerics
        logits = logits.to(self.wide) * numerics.logit_scale
        if numerics.logit_soft_cap is not None:
            logits = torch.tanh(logits / numerics.logit_soft_cap) * numerics.logit_soft_cap
        return logits
