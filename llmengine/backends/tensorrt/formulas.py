"""The formulas of the segments, once more and independent of `network.py`, over any arithmetic.

Verification evaluates them in float64 with the rounding errors that are to be expected (`rounding.py`).
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.tensorrt.spec import SegmentKind, SegmentSpec

V = TypeVar("V")


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
    x = _after_attention(ops, ops.sampled_input("attended"), ops.sampled_input("x"))
    return {"logits": ops.capped(ops.linear(ops.norm(x, "final_norm"), "lm_head"))}


def activate(gate: Tensor, spec: SegmentSpec) -> Tensor:
    """The MLP's activation of each element."""
    return F.silu(gate) if spec.numerics.activation == "silu" else F.gelu(gate, approximate="tanh")


def _qkv(ops: Arithmetic[V], x: V, prefix: str) -> V:
    return ops.linear(ops.norm(x, f"{prefix}input_norm"), f"{prefix}qkv")


def _after_attention(ops: Arithmetic[V], attended: V, x: V) -> V:
    x = ops.add(x, ops.norm(ops.linear(attended, "o"), "attention_out_norm"))
    gate_up = ops.linear(ops.norm(x, "post_attention_norm"), "gate_up")
    return ops.add(x, ops.norm(ops.linear(ops.gated(gate_up), "down"), "mlp_out_norm"))
