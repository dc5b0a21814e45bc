"""`TensorRtSegments`: a decoder's dense compute by TensorRT plans, beside our attention on one stream.

::

    x ─▶ first ─▶ qkv ─▶ attention 0 ─▶ attended ─▶ mid 0 ─▶ x', qkv ─▶ attention 1 ─▶ ... ─▶ last ─▶ logits

Of a shard, the plans of a layer end at sums over the ranks, which are queued between them::

    attended ─▶ o ─▶ part ═ sum ═▶ mlp ─▶ x', part ═ sum ═▶ next ─▶ x'', qkv        (of the last layer: head ─▶ logits)

Everything has a fixed address: two hidden states and two parts in turn, because a plan's inputs and outputs must not
overlap; one qkv; the weights where the torch backend keeps them, so they are in memory once. A context exists for each
plan and bucket and serves all layers: before each layer it gets that layer's addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from llmengine.backends.cuda.fused_segments import SegmentsContext
from llmengine.backends.cuda.peers import Peers
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
from llmengine.backends.tensorrt.spec import PART, SUM, PlacedSegment, segments_by_plan
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
        parts: of a shard, two likewise: terms of sums over the ranks, and the sums.
        sampled: of a shard, the rows of `attended` and of x that the last layer computes, [max_batch_size, ...].
        qkv: [max_tokens_per_step, (heads + 2 * KV heads) * head_dim].
        logits: fp32 [max_batch_size, vocab].
        all_tokens: int32 0, 1, ..., max_batch_size - 1.
        memory: scratch memory of the plans.
    """

    hidden: Sequence[Tensor]
    parts: Sequence[Tensor]
    sampled: Sequence[Tensor]
    qkv: Tensor
    logits: Tensor
    all_tokens: Tensor
    memory: Tensor

    @classmethod
    def allocate(cls, plans: Sequence[LoadedPlan], context: SegmentsContext, *, is_shard: bool) -> SegmentBuffers:
        """Allocate them on the device; raises `OutOfMemoryError` for scratch memory that does not fit."""
        arch, scheduler = context.arch, context.config.scheduler_config
        device, dtype = context.logits.device, context.weights.dtype
        q_size = arch.num_heads * arch.head_dim

        def buffer(columns: int, rows: int = scheduler.max_tokens_per_step) -> Tensor:
            return torch.zeros((rows, columns), dtype=dtype, device=device)

        return cls(
            hidden=[buffer(arch.hidden_size) for _ in range(2)],
            parts=[buffer(arch.hidden_size) for _ in range(2 * is_shard)],
            sampled=[buffer(size, scheduler.max_batch_size) for size in (q_size, arch.hidden_size) if is_shard],
            qkv=buffer(q_size + 2 * arch.num_kv_heads * arch.head_dim),
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
        peers: Peers | None,
    ) -> None:
        self._segments = segments
        self._peers = peers
        self._of_layer = _by_layer(segments)
        self._plans = plans
        self._weights = weights  # keeps them alive
        self._weight_addresses = weight_addresses
        self._buffers = buffers
        self._outputs = _turns(segments, buffers)
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
            segments: in the order in which they run; of a shard those of its rank.
            plans: by plan name. They share one block of scratch memory, because they run one after the other.
            weights: what the plans read, by canonical name, where that is more than the model's dense weights.

        Raises `EngineError` for plans that cannot run the largest step, or whose weight inputs differ from the model's.
        """
        scheduler = context.config.scheduler_config
        for plan in plans.values():
            plan.profile_for(Sizes(scheduler.max_tokens_per_step, scheduler.max_batch_size))
        is_shard = any(segment.spec.ends_at_sum for segment in segments)
        buffers = SegmentBuffers.allocate(list(plans.values()), context, is_shard=is_shard)
        weights = context.weights.by_name if weights is None else weights
        addresses = [_weight_addresses(segment, weights) for segment in segments]
        return cls(segments, plans, weights, addresses, buffers, context.peers)

    def without_sums(self) -> TensorRtSegments:
        """The same plans and buffers for one rank alone, whose results mean nothing."""
        parts = self._segments, self._plans, self._weights, self._weight_addresses, self._buffers
        return TensorRtSegments(*parts, peers=None)

    @property
    def num_layers(self) -> int:
        return len(self._of_layer)

    def first(self, x: Tensor) -> Tensor:
        qkv = self._buffers.qkv[: len(x)]
        self._run(0, Sizes(len(x)), {"x": x, "qkv": qkv})
        return qkv

    def mid(self, layer: int, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        tensors = {"attended": attended, "x": x, "qkv": self._buffers.qkv[: len(x)]}
        self._run_layer(layer, Sizes(len(x)), tensors)
        return tensors["x"], tensors["qkv"]

    def last(self, attended: Tensor, x: Tensor, sample_tokens: Tensor | None) -> Tensor:
        if self._buffers.sampled and sample_tokens is not None:
            attended, x = (
                torch.index_select(tensor, 0, sample_tokens, out=rows[: len(sample_tokens)])
                for tensor, rows in zip((attended, x), self._buffers.sampled, strict=True)
            )
            sample_tokens = None
        if sample_tokens is None:
            sample_tokens = self._buffers.all_tokens[: len(x)]
        logits = self._buffers.logits[: len(sample_tokens)]
        tensors = {"attended": attended, "x": x, "sample_tokens": sample_tokens, "logits": logits}
        self._run_layer(self.num_layers - 1, Sizes(len(x), len(sample_tokens)), tensors)
        return logits

    def _run_layer(self, layer: int, sizes: Sizes, tensors: dict[str, Tensor]) -> None:
        """Run what follows a layer's attention; `tensors["x"]` becomes the hidden states after it, if they come out."""
        for index in self._of_layer[layer]:
            spec = self._segments[index].spec
            tensors |= {name: buffer[: sizes.tokens] for name, buffer in self._outputs[index].items()}
            own_sizes = sizes if spec.has_samples else Sizes(sizes.tokens)
            self._run(index, own_sizes, {tensor.name: tensors[tensor.name] for tensor in (*spec.inputs, *spec.outputs)})
            tensors["x"] = tensors.get("x_out", tensors["x"])
            if spec.ends_at_sum:
                tensors[SUM] = tensors[PART]
                if self._peers is not None:
                    self._peers.collectives.all_reduce(tensors[SUM])

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


def _by_layer(segments: Sequence[PlacedSegment]) -> list[list[int]]:
    """For each layer the indices of the segments between its attention and the next one, or the end."""
    found: list[list[int]] = [[] for _ in range(segments[-1].layer + 1)]
    for index, segment in enumerate(segments[1:], 1):
        found[segment.layer].append(index)
    return found


def _turns(segments: Sequence[PlacedSegment], buffers: SegmentBuffers) -> list[dict[str, Tensor]]:
    """For each segment the buffers of its hidden states and of its term of a sum: the two there are, in turn."""
    turns = {"x_out": cycle(buffers.hidden), PART: cycle(buffers.parts)}
    return [
        {output.name: next(turns[output.name]) for output in segment.spec.outputs if output.name in turns}
        for segment in segments
    ]


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
