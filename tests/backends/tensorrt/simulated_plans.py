"""Simulated results of plans: sound plans, which round and sum in their own ways, and slightly wrong ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.tensorrt.expected_outputs import activate, segment_outputs
from llmengine.backends.tensorrt.spec import SegmentSpec
from tests.backends.tensorrt.segment_helpers import DTYPES


@dataclass(frozen=True, slots=True)
class Ways:
    """The ways in which a plan computes.

    Attributes:
        fused: only what leaves the plan, and what a product reads, is rounded.
        split_k: parts in which a product's sum is computed.
        round_parts: the parts' sums are rounded to the plan's type before they are added.
        sum_step: products that are added at once; 0: all.
        sum_dtype: of the running sum.
        backwards: the summation goes from the end.
    """

    fused: bool = False
    split_k: int = 1
    round_parts: bool = False
    sum_step: int = 0
    sum_dtype: torch.dtype = torch.float32
    backwards: bool = False


SOUND = {
    "plain": Ways(),
    "fused": Ways(fused=True),
    "split-k": Ways(split_k=4),
    "split-k, parts rounded": Ways(split_k=2, round_parts=True),
    "one by one": Ways(sum_step=8),
    "one by one, backwards, fused": Ways(sum_step=8, backwards=True, fused=True),
}
FP16_SUMS = Ways(sum_step=16, sum_dtype=torch.float16)


def simulate(spec: SegmentSpec, tensors: Mapping[str, Tensor], ways: Ways) -> dict[str, Tensor]:
    """Return a segment's outputs, in their own types."""
    outputs = segment_outputs(spec.kind, _Simulated(spec, tensors, ways))
    return {tensor.name: outputs[tensor.name].to(DTYPES[tensor.dtype]) for tensor in spec.outputs}


@dataclass(frozen=True, slots=True)
class _Simulated:
    """`Arithmetic` whose values are float32 tensors, rounded as the plan rounds them."""

    spec: SegmentSpec
    tensors: Mapping[str, Tensor]
    ways: Ways

    def input(self, name: str) -> Tensor:
        return self.tensors[name].float()

    def sampled_input(self, name: str) -> Tensor:
        return self.input(name)[self.tensors["sample_tokens"]]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._between(a + b)

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.tensors.get(f"{name}.weight")
        if weight is None:
            return x
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.spec.numerics.rms_norm_eps)
        return self._between(x * inverse * weight.float())

    def linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"].float(), self.tensors.get(f"{name}.bias")
        x = self._rounded(x)
        if self.ways.backwards:
            x, weight = x.flip(-1), weight.flip(-1)
        size = -(-x.shape[-1] // self.ways.split_k)
        parts = [self._sum(a, b) for a, b in zip(x.split(size, -1), weight.split(size, -1), strict=True)]
        if self.ways.round_parts:
            parts = [self._rounded(part) for part in parts]
        product = self._between(torch.stack(parts).sum(0))
        return product if bias is None else self._between(product + bias.float())

    def gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return self._between(activate(gate, self.spec) * up)

    def capped(self, logits: Tensor) -> Tensor:
        numerics = self.spec.numerics
        logits = logits * numerics.logit_scale
        cap = numerics.logit_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _sum(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.ways.sum_step:
            return x @ weight.T
        total = torch.zeros((len(x), len(weight)), dtype=self.ways.sum_dtype)
        for a, b in zip(x.split(self.ways.sum_step, -1), weight.split(self.ways.sum_step, -1), strict=True):
            total = (total.float() + a @ b.T).to(self.ways.sum_dtype)
        return total.float()

    def _between(self, value: Tensor) -> Tensor:
        return value if self.ways.fused else self._rounded(value)

    def _rounded(self, value: Tensor) -> Tensor:
        return value.to(DTYPES[self.spec.dtype]).float()
