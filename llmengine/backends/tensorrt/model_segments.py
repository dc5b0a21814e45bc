"""The segments of a model, or of the shards of one: what each of them reads, in the formats of its matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmengine.backends.tensorrt.plan_matrix import plan_parts
from llmengine.backends.tensorrt.spec import (
    PART,
    SUM,
    Dim,
    Numerics,
    PlacedSegment,
    PlanTensor,
    ProfileSpec,
    SegmentKind,
    SegmentSpec,
    WeightMode,
    WeightSource,
    WeightSpec,
)
from llmengine.checkpoints.sharded_source import ShardPlan
from llmengine.dtypes import ModelDType
from llmengine.models.arch import ModelArch
from llmengine.quantization.formats import DENSE, TensorSpec, WeightFormat
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats


def segments_of(
    arch: ModelArch,
    dtype: ModelDType,
    profiles: Sequence[ProfileSpec],
    weight_mode: WeightMode = "inputs",
    formats: ModelFormats = DENSE_MODEL,
) -> list[PlacedSegment]:
    """The segments of a model in the order in which they run: first, mid 0 .. mid L-2, last.

    Raises `ConfigError` for formats that plans have no products with.
    """
    specs = _ModelSpecs(arch, dtype, tuple(profiles), weight_mode, formats, DENSE_MODEL.layout(arch, dtype))
    last = arch.num_layers - 1
    return _placed([(specs.first(), 0), *((specs.mid(layer), layer) for layer in range(last)), (specs.last(), last)])


def shard_segments_of(
    plan: ShardPlan,
    dtype: ModelDType,
    profiles: Sequence[ProfileSpec],
    weight_mode: WeightMode = "inputs",
) -> list[PlacedSegment]:
    """The segments of every rank of a model that is divided by `plan`: those of rank 0, those of rank 1, and so on.

    Those of a rank are in the order in which they run: first; o, mlp and next of each layer but the last, whose are o,
    mlp and head. Segments of several ranks that define the same network without weights share a plan.

    Raises `ConfigError` for formats that plans have no products with.
    """
    found: list[PlacedSegment] = []
    for rank in range(plan.size):
        arch, formats = plan.arch_of(rank), plan.formats_of(rank)
        specs = _ModelSpecs(arch, dtype, tuple(profiles), weight_mode, formats, DENSE_MODEL.layout(arch, dtype))
        found += (replace(segment, rank=rank, first_rank=rank) for segment in _placed(specs.of_shard()))
    if weight_mode == "constants":
        return found
    firsts = {segment.spec: segment for segment in reversed(found)}
    return [
        replace(segment, first_layer=first.first_layer, first_rank=first.rank)
        for segment in found
        for first in (firsts[segment.spec],)
    ]


def _placed(specs: Sequence[tuple[SegmentSpec, int]]) -> list[PlacedSegment]:
    """Segments at their layers, in the order in which they run."""
    first_layers = dict(reversed(specs))
    return [PlacedSegment(spec, layer, first_layers[spec] if spec.is_of_each_layer else 0) for spec, layer in specs]


def head_format(arch: ModelArch, formats: ModelFormats) -> WeightFormat:
    """The format of the matrix that computes logits: the embedding's, where that is tied and none is named."""
    found = formats.of("lm_head")
    return formats.of("embed_tokens") if arch.tie_word_embeddings and found == DENSE else found


@dataclass(frozen=True, slots=True)
class _ModelSpecs:
    """The specs of one model's segments.

    Attributes:
        layout: every weight of the model by canonical name, as if no matrix were quantized.
    """

    arch: ModelArch
    dtype: ModelDType
    profiles: tuple[ProfileSpec, ...]
    weight_mode: WeightMode
    formats: ModelFormats
    layout: Mapping[str, TensorSpec]

    def first(self) -> SegmentSpec:
        return self._segment("first", (self._x(),), (self._qkv(),), self._qkv_weights(0, 0, ""))

    def mid(self, layer: int) -> SegmentSpec:
        inputs = (self._attended(), self._x())
        weights = self._mlp_weights(layer) + self._qkv_weights(layer + 1, 1, "next.")
        return self._segment("mid", inputs, (self._x("x_out"), self._qkv()), weights)

    def last(self) -> SegmentSpec:
        inputs = (self._attended(), self._x(), PlanTensor("sample_tokens", "int32", ("S",)))
        weights = self._mlp_weights(self.arch.num_layers - 1) + self._head_weights()
        return self._segment("last", inputs, (self._logits(),), weights)

    def of_shard(self) -> list[tuple[SegmentSpec, int]]:
        """The segments between which the model's ranks add up, and their layers, in order."""
        last, found = self.arch.num_layers - 1, [(self.first(), 0)]
        for layer in range(self.arch.num_layers):
            end = self._next(layer) if layer < last else self._head(layer)
            found += [(spec, layer) for spec in (self._o(layer), self._mlp(layer), end)]
        return found

    def _o(self, layer: int) -> SegmentSpec:
        weights = self._layer_weights(layer, 0, "", ("o.",))
        return self._segment("o", (self._attended(),), (self._x(PART),), weights)

    def _mlp(self, layer: int) -> SegmentSpec:
        norms = ("attention_out_norm.", "post_attention_norm.")
        weights = self._layer_weights(layer, 0, "", ("gate_up.", "down.", *norms))
        return self._segment("mlp", (self._x(SUM), self._x()), (self._x("x_out"), self._x(PART)), weights)

    def _next(self, layer: int) -> SegmentSpec:
        weights = self._layer_weights(layer, 0, "", ("mlp_out_norm.",)) + self._qkv_weights(layer + 1, 1, "next.")
        return self._segment("next", (self._x(SUM), self._x()), (self._x("x_out"), self._qkv()), weights)

    def _head(self, layer: int) -> SegmentSpec:
        inputs = (self._x(SUM, "S"), self._x(rows="S"))
        weights = self._layer_weights(layer, 0, "", ("mlp_out_norm.",)) + self._head_weights()
        return self._segment("head", inputs, (self._logits(),), weights)

    def _head_weights(self) -> _Weights:
        weights = self._weights("final_norm.weight", "final_norm.weight", None, "final_norm.weight")
        is_embedding = self.arch.tie_word_embeddings and head_format(self.arch, self.formats) == DENSE
        head = "embed_tokens.weight" if is_embedding else "lm_head.weight"
        return weights + self._weights("lm_head.weight", head, None, "lm_head.weight")

    def _segment(
        self, kind: SegmentKind, inputs: tuple[PlanTensor, ...], outputs: tuple[PlanTensor, ...], weights: _Weights
    ) -> SegmentSpec:
        return SegmentSpec(
            kind=kind,
            dtype=self.dtype,
            weight_mode=self.weight_mode,
            profiles=self.profiles,
            inputs=inputs,
            outputs=outputs,
            weights=weights.specs,
            numerics=self._numerics(kind),
            quantization=weights.formats,
        )

    def _numerics(self, kind: SegmentKind) -> Numerics:
        arch, has_logits = self.arch, kind in ("last", "head")
        return Numerics(
            rms_norm_eps=arch.rms_norm_eps,
            activation=arch.hidden_act if kind in ("mid", "last", "mlp") else "none",
            logit_scale=arch.logit_scale if has_logits else 1.0,
            logit_soft_cap=arch.logit_soft_cap if has_logits else None,
        )

    def _x(self, name: str = "x", rows: Dim = "T") -> PlanTensor:
        return PlanTensor(name, self.dtype, (rows, self.arch.hidden_size))

    def _logits(self) -> PlanTensor:
        return PlanTensor("logits", "float32", ("S", self.arch.vocab_size))

    def _attended(self) -> PlanTensor:
        return PlanTensor("attended", self.dtype, ("T", self.arch.num_heads * self.arch.head_dim))

    def _qkv(self) -> PlanTensor:
        heads = self.arch.num_heads + 2 * self.arch.num_kv_heads
        return PlanTensor("qkv", self.dtype, ("T", heads * self.arch.head_dim))

    def _qkv_weights(self, layer: int, offset: int, prefix: str) -> _Weights:
        return self._layer_weights(layer, offset, prefix, ("input_norm.", "qkv."))

    def _mlp_weights(self, layer: int) -> _Weights:
        norms = ("attention_out_norm.", "post_attention_norm.", "mlp_out_norm.")
        return self._layer_weights(layer, 0, "", ("o.", "gate_up.", "down.", *norms))

    def _layer_weights(self, layer: int, offset: int, prefix: str, parts: tuple[str, ...]) -> _Weights:
        """A layer's weights whose names begin with one of `parts`."""
        found, place = _Weights(), f"layers.{layer}."
        for name in self.layout:
            role = name.removeprefix(place)
            if name.startswith(place) and role.startswith(parts):
                found += self._weights(prefix + role, role, offset, name)
        return found

    def _weights(self, name: str, role: str, offset: int | None, canonical: str) -> _Weights:
        """What a plan reads of one weight: all tensors of a matrix."""
        source: WeightSource = "constant" if self.weight_mode == "constants" else "input"
        dense = self.layout.get(canonical, self.layout["embed_tokens.weight"])
        if len(dense.shape) == 1:
            return _Weights((WeightSpec(name, role, offset, dense.dtype, dense.shape, source),))
        shape = (dense.shape[0], dense.shape[1])
        model_matrix = canonical.removesuffix(".weight")
        is_head = model_matrix == "lm_head"
        weight_format = head_format(self.arch, self.formats) if is_head else self.formats.of(model_matrix)
        tensors = {
            suffix + end: tensor
            for end, part in plan_parts(weight_format, shape, self.dtype).items()
            for suffix, tensor in part.tensors().items()
        }
        matrix, in_model = name.removesuffix(".weight"), role.removesuffix(".weight")
        specs = (
            WeightSpec(f"{matrix}.{suffix}", f"{in_model}.{suffix}", offset, *tensor, source)
            for suffix, tensor in tensors.items()
        )
        return _Weights(tuple(specs), () if weight_format == DENSE else ((matrix, weight_format),))


@dataclass(frozen=True, slots=True)
class _Weights:
    """Weights of a segment, and the formats of those matrices that are quantized."""

    specs: tuple[WeightSpec, ...] = ()
    formats: tuple[tuple[str, WeightFormat], ...] = ()

    def __add__(self, other: _Weights) -> _Weights:
        return _Weights(self.specs + other.specs, self.formats + other.formats)
