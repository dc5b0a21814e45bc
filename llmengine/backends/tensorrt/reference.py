"""What a segment computes, in torch: the formulas of `network.py` once more, written independently of TensorRT.

`outputs_of` has the formulas, over an `Arithmetic`: torch's own here, and one that follows the rounding errors in
`rounding.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.tensorrt.spec import SegmentKind, SegmentSpec

ROWS = 8192
"""Rows of a matrix that are converted to another type at a time."""

V = TypeVar("V")


class Arithmetic(Protocol[V]):
    """The operations that segments are made of; each result that is stored in the spec's dtype is rounded to it."""

    def input(self, name: str) -> V:
        """Return an activation, [T, columns]."""

    def sampled_input(self, name: str) -> V:
        """Return the sampled rows of an activation, [S, columns]."""

    def add(self, a: V, b: V) -> V:
        """Return a + b."""

    def norm(self, x: V, name: str) -> V:
        """Return RMSNorm of the rows by a weight; x itself where the model has no such norm."""

    def linear(self, x: V, name: str) -> V:
        """Return x @ weight.T, plus the bias where there is one."""

    def gated(self, gate_up: V) -> V:
        """Return activation(gate) * up of the left and the right half of the columns."""

    def capped(self, logits: V) -> V:
        """Return the logits scaled and soft-capped, in fp32 at least."""


def reference(spec: SegmentSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a segment's outputs by torch, computed and rounded in `dtype`; norms and activations in fp32 at least.

    Args:
        tensors: inputs, and weights by their names in the plan, of any floating dtype.
    """
    return outputs_of(spec.kind, _Torch(spec, tensors, dtype))


def outputs_of(kind: SegmentKind, ops: Arithmetic[V]) -> dict[str, V]:
    """Return a segment's outputs by name."""
    if kind == "first":
        return {"qkv": _qkv(ops, ops.input("x"), "")}
    if kind == "mid":
        x = _after_attention(ops, ops.input("attended"), ops.input("x"))
        return {"x_out": x, "qkv": _qkv(ops, x, "next.")}
    x = _after_attention(ops, ops.sampled_input("attended"), ops.sampled_input("x"))
    return {"logits": ops.capped(ops.linear(ops.norm(x, "final_norm"), "lm_head"))}


def activate(gate: Tensor, spec: SegmentSpec) -> Tensor:
    """Return the MLP's activation of each element."""
    return F.silu(gate) if spec.numerics.activation == "silu" else F.gelu(gate, approximate="tanh")


def _qkv(ops: Arithmetic[V], x: V, prefix: str) -> V:
    return ops.linear(ops.norm(x, f"{prefix}input_norm"), f"{prefix}qkv")


def _after_attention(ops: Arithmetic[V], attended: V, x: V) -> V:
    x = ops.add(x, ops.norm(ops.linear(attended, "o"), "attention_out_norm"))
    gate_up = ops.linear(ops.norm(x, "post_attention_norm"), "gate_up")
    return ops.add(x, ops.norm(ops.linear(ops.gated(gate_up), "down"), "mlp_out_norm"))


@dataclass(frozen=True, slots=True)
class _Torch:
    spec: SegmentSpec
    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    @property
    def wide(self) -> torch.dtype:
        """What norms and activations compute in."""
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
        parts = self.tensors[f"{name}.weight"].split(ROWS)
        product = torch.cat([x @ rows.to(self.dtype).T for rows in parts], dim=1)
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
