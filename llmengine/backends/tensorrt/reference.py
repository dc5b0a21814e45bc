"""What a segment computes, in torch: the formulas of `network.py` once more, written independently of TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.tensorrt.spec import SegmentSpec

_ROWS = 8192
"""Rows of a matrix that are converted to another type at a time."""


def reference(spec: SegmentSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a segment's outputs by torch, computed and rounded in `dtype`; norms and activations in fp32 at least.

    Args:
        tensors: inputs, and weights by their names in the plan, of any floating dtype.
    """
    return {"first": _first, "mid": _mid, "last": _last}[spec.kind](_Torch(spec, tensors, dtype))


def _first(torch_: _Torch) -> dict[str, Tensor]:
    return {"qkv": torch_.qkv(torch_.input("x"), "")}


def _mid(torch_: _Torch) -> dict[str, Tensor]:
    x = torch_.after_attention(torch_.input("attended"), torch_.input("x"))
    return {"x_out": x, "qkv": torch_.qkv(x, "next.")}


def _last(torch_: _Torch) -> dict[str, Tensor]:
    rows = torch_.tensors["sample_tokens"]
    x = torch_.after_attention(torch_.input("attended")[rows], torch_.input("x")[rows])
    logits = torch_.linear(torch_.norm(x, "final_norm"), "lm_head").to(torch_.wide)
    numerics = torch_.spec.numerics
    logits = logits * numerics.logit_scale
    if numerics.logit_soft_cap is not None:
        logits = torch.tanh(logits / numerics.logit_soft_cap) * numerics.logit_soft_cap
    return {"logits": logits}


@dataclass(frozen=True, slots=True)
class _Torch:
    """The operations of segments in torch."""

    spec: SegmentSpec
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """What norms and activations compute in."""
        return torch.promote_types(self.dtype, torch.float32)

    def input(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def qkv(self, x: Tensor, prefix: str) -> Tensor:
        return self.linear(self.norm(x, f"{prefix}input_norm"), f"{prefix}qkv")

    def after_attention(self, attended: Tensor, x: Tensor) -> Tensor:
        x = x + self.norm(self.linear(attended, "o"), "attention_out_norm")
        gate, up = self.linear(self.norm(x, "post_attention_norm"), "gate_up").to(self.wide).chunk(2, dim=-1)
        if self.spec.numerics.activation == "silu":
            activated = F.silu(gate)
        else:
            activated = F.gelu(gate, approximate="tanh")
        return x + self.norm(self.linear((activated * up).to(self.dtype), "down"), "mlp_out_norm")

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return x
        exact = x.to(self.wide)
        inverse = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.spec.numerics.rms_norm_eps)
        return (exact * inverse * weight.to(self.wide)).to(self.dtype)

    def linear(self, x: Tensor, name: str) -> Tensor:
        parts = self.tensors[f"{name}.weight"].split(_ROWS)
        product = torch.cat([x @ rows.to(self.dtype).T for rows in parts], dim=1)
        bias = self.tensors.get(f"{name}.bias")
        return product if bias is None else product + bias.to(self.dtype)
