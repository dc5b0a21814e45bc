"""`TensorRtSegments`: a decoder's dense compute by TensorRT plans, beside our attention on one stream.

::

    x ─▶ first ─▶ qkv ─▶ attention 0 ─▶ attended ─▶ mid 0 ─▶ x', qkv ─▶ attention 1 ─▶ ... ─▶ last ─▶ logits

Everything has a fixed address: two hidden states in turn, because a plan's inputs and outputs must not overlap; one
qkv; the weights where the torch backend keeps them, so they are in memory once. A context exists for each plan and
bucket and serves all layers: before each layer it gets that layer's addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.backends.cuda.fused_segments import SegmentsContext
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.backends.tensorrt.runtime import (
    ALIGNMENT,
    LoadedPlan,
    PlanContext,
    PlanRuntime,
    Sizes,
    current_stream,
    scratch_memory,
)
from llmengine.backends.tensorrt.spec import PlacedSegment, segments_by_plan
from llmengine.errors import EngineError
from llmengine.quantization.formats import TensorSpec


def load_plans(runtime: PlanRuntime, plan_set: PlanSet) -> dict[str, LoadedPlan]:
    """Every plan by its name; raises `EngineError` for a plan that cannot be used on this device."""
    return {
        name: runtime.load(name, plan_set.plans[name].read(), segment.spec)
        for name, segment in segments_by_plan(plan_set.segments).items()
    }


@dataclass(frozen=True, slots=True)
class SegmentBuffers:
    """Buffers of the largest step, at fixed addresses.

    Attributes:
        hidden: two, [max_tokens_per_step, hidden], used in turn.
        qkv: [max_tokens_per_step, (heads + 2 * KV heads) * head_dim].
        logits: fp32 [max_batch_size, vocab].
        all_tokens: int32 0, 1, ..., max_batch_size - 1.
        memory: scratch memory of the plans.
    """

    hidden: tuple[Tensor, Tensor]
    qkv: Tensor
    logits: Tensor
    all_tokens: Tensor
    memory: Tensor

    @classmethod
    def allocate(cls, plans: Sequence[LoadedPlan], context: SegmentsContext) -> SegmentBuffers:
        """Allocate them on the device; raises `OutOfMemoryError` for scratch memory that does not fit."""
        arch, scheduler = context.arch, context.config.scheduler_config
        device, dtype = context.logits.device, context.weights.dtype

        def buffer(columns: int) -> Tensor:
            return torch.zeros((scheduler.max_tokens_per_step, columns), dtype=dtype, device=device)

        return cls(
            hidden=(buffer(arch.hidden_size), buffer(arch.hidden_size)),
            qkv=buffer((arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim),
            logits=context.logits,
            all_tokens=torch.arange(scheduler.max_batch_size, dtype=torch.int32, device=device),
            memory=scratch_memory(plans, device),
        )


class TensorRtSegments:
    """`models.decoder.Segments`.

    Several threads may use it, in one stream. The first call with a size creates contexts; later calls allocate nothing
    and read no values on the host, so a CUDA graph can hold them.
    """

    def __init__(
        self,
        segments: Sequence[PlacedSegment],
        plans: Mapping[str, LoadedPlan],
        weights: Mapping[str, Tensor],
        weight_addresses: Sequence[Mapping[str, int]],
        buffers: SegmentBuffers,
    ) -> None:
        self._segments = segments
        self._plans = plans
        self._weights = weights  # keeps them alive
        self._weight_addresses = weight_addresses
        self._buffers = buffers
        self._contexts: dict[tuple[str, Sizes], PlanContext] = {}
        self._lock = threading.Lock()

    @classmethod
    def allocate(
        cls,
        segments: Sequence[PlacedSegment],
        plans: Mapping[str, LoadedPlan],
        context: SegmentsContext,
        weights: Mapping[str, Tensor] | None = None,
    ) -> TensorRtSegments:
        """Allocate the buffers of the largest step and bind the model's weights.

        Args:
            segments: in the order in which they run.
            plans: by plan name. They share one block of scratch memory, because they run one after the other.
            weights: what the plans read, by canonical name, where that is more than the model's dense weights.

        Raises `EngineError` for plans that cannot run the largest step, or whose weight inputs differ from the model's.
        """
        scheduler = context.config.scheduler_config
        for plan in plans.values():
            plan.profile_for(Sizes(scheduler.max_tokens_per_step, scheduler.max_batch_size))
        buffers = SegmentBuffers.allocate(list(plans.values()), context)
        weights = context.weights.by_name if weights is None else weights
        addresses = [_weight_addresses(segment, weights) for segment in segments]
        return cls(segments, plans, weights, addresses, buffers)

    @property
    def num_layers(self) -> int:
        return len(self._segments) - 1

    def first(self, x: Tensor) -> Tensor:
        qkv = self._buffers.qkv[: len(x)]
        self._run(0, Sizes(len(x)), {"x": x, "qkv": qkv})
        return qkv

    def mid(self, layer: int, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x_out, qkv = self._buffers.hidden[layer % 2][: len(x)], self._buffers.qkv[: len(x)]
        self._run(layer + 1, Sizes(len(x)), {"attended": attended, "x": x, "x_out": x_out, "qkv": qkv})
        return x_out, qkv

    def last(self, attended: Tensor, x: Tensor, sample_tokens: Tensor | None) -> Tensor:
        if sample_tokens is None:
            sample_tokens = self._buffers.all_tokens[: len(x)]
        logits = self._buffers.logits[: len(sample_tokens)]
        tensors = {"attended": attended, "x": x, "sample_tokens": sample_tokens, "logits": logits}
        self._run(-1, Sizes(len(x), len(sample_tokens)), tensors)
        return logits

    def _run(self, index: int, sizes: Sizes, tensors: Mapping[str, Tensor]) -> None:
        segment = self._segments[index]
        addresses = {**self._weight_addresses[index], **{name: _address(t) for name, t in tensors.items()}}
        stream = current_stream(self._buffers.logits.device)
        # Setting addresses and queueing belong together, and plans that share scratch memory must not interleave.
        with self._lock:
            key = (segment.plan_name, sizes)
            if key not in self._contexts:
                self._contexts[key] = self._plans[segment.plan_name].context(sizes, self._buffers.memory, stream)
            self._contexts[key].run(addresses, stream)


def _weight_addresses(segment: PlacedSegment, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name in the plan -> address, of the weights that are inputs of the plan."""
    addresses = {}
    for weight in segment.spec.weight_inputs:
        name = weight.canonical(segment.layer)
        tensor = tensors[name]
        found = TensorSpec.of(tensor)
        if found != weight.stored:
            raise EngineError(
                f"weight {name!r} is {found.dtype} {list(found.shape)}, but plan {segment.plan_name!r} takes "
                f"{weight.dtype} {list(weight.shape)}"
            )
        addresses[weight.name] = _address(tensor)
    return addresses


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    address = tensor.data_ptr()
    assert address % ALIGNMENT == 0 or tensor.device.type == "cpu", f"{address:#x} is not aligned"
    return address
