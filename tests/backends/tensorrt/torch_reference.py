"""What a segment computes, in torch: what the tests hold plans and their fakes against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.tensorrt.expected_outputs import activate, segment_outputs
from llmengine.backends.tensorrt.spec import SegmentSpec


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
        product = x @ self.tensors[f"{name}.weight"].to(self.dtype).T
        bias = self.tensors.get(f"{name}.bias")
        return product if bias is None else product + bias.to(self.dtype)

    def gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.to(self.wide).chunk(2, dim=-1)
        return (activate(gate, self.spec) * up).to(self.dtype)

    def capped(self, logits: Tensor) -> Tensor:
        numerics = self.spec.numerics
        logits = logits.to(self.wide) * numerics.logit_scale
        if numerics.logit_soft_cap is not None:
            logits = torch.tanh(logits / numerics.logit_soft_cap) * numerics.logit_soft_cap
        return logits
