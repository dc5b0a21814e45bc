"""What TensorRT plans compute, as data: segments, their tensors and weights, profiles and targets.

A model is cut at its attentions. The compute between two of them is one segment::

    begin_step: x = embedding rows            (ours)
    first                       x                       -> qkv
      attention 0: q/k norm, RoPE, KV write, attend     (ours)
    mid     of layer 0          attended, x             -> x_out, qkv     layer 0's o and MLP, layer 1's norm and qkv
      attention 1
    mid     of layer 1          ...
      attention L-1
    last    of layer L-1        attended, x, sample_tokens -> logits      rows are gathered first

Where ranks share each matrix, the results of o and down are terms of sums over them, and what follows has to wait. So a
segment ends at each sum, which is ours like attention. The residual and the norms after a sum belong to the segment
behind it, which is the same network on every rank whose shapes are the same::

    first                       x                       -> qkv
      attention 0
    o       of layer 0          attended                -> part
      sum over the ranks: part becomes the sum
    mlp     of layer 0          sum, x                  -> x_out, part
      sum over the ranks
    next    of layer 0          sum, x                  -> x_out, qkv     layer 1's norm and qkv
      attention 1
    o, mlp  of layer L-1        ...                                       of sampled rows only
    head    of layer L-1        sum, x                  -> logits

Nothing here imports a TensorRT library. Specs with equal `fingerprint()` define the same network. With weights as
inputs the `mid` segments of all layers have the same spec, so one plan runs them all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llmengine.backends.tensorrt.plan_matrix import PlanDType, PlanMatrix, matrix_shape, plan_parts, stored_spec
from llmengine.checkpoints.metadata_fields import MAX_SIZE, Fields
from llmengine.dtypes import MODEL_DTYPES, DType, ModelDType
from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.arch import Activation
from llmengine.quantization.formats import DENSE, Shape, TensorSpec, WeightFormat
from llmengine.quantization.known_formats import format_from_json

SegmentKind = Literal["first", "mid", "last", "o", "mlp", "next", "head"]
WeightMode = Literal["inputs", "constants"]
WeightSource = Literal["input", "constant"]
Dim = int | Literal["T", "S"]
"""A size, or the name of a size that changes from step to step: T tokens, S sampled rows."""

PART, SUM = "part", "sum"
"""An output that is a term of a sum over ranks, and the input of the segment behind that takes the sum."""

NETWORK_VERSION = 1
"""Part of every fingerprint; to be raised when the same spec gives another network than before."""

_DTYPES: tuple[DType, ...] = ("float32", "float16", "bfloat16", "int32")
"""The dtypes of a plan's activations."""

_WEIGHT_DTYPES: tuple[PlanDType, ...] = (*_DTYPES, "int8", "float8_e4m3fn", "int4")

_ROWS = (".weight", ".bias", ".input_scale", ".activation_scale")
"""Ends of the names of vectors that are rows in a plan, and broadcast."""


@dataclass(frozen=True, slots=True)
class PlanTensor:
    """One input or output of a plan.

    Attributes:
        name: as in the plan; unique within a segment.
        dtype: "float32", "float16", "bfloat16" or "int32".
        shape: sizes and names of dynamic dimensions. Equal names have equal sizes in one execution.
    """

    name: str
    dtype: DType
    shape: tuple[Dim, ...]

    def resolve(self, **sizes: int) -> tuple[int, ...]:
        """The shape with `sizes` (T=, S=) in place of the names."""
        return tuple(dim if isinstance(dim, int) else sizes[dim] for dim in self.shape)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One tensor of the model that a segment reads; a matrix is [out, in], row-major.

    It is a stored tensor, or made from those of a quantized matrix (`plan_matrix`).

    Attributes:
        name: in the plan; the canonical name without its layer ("o.weight", "next.qkv.weight", "lm_head.weight").
        role: canonical name without "layers.{i}." ("qkv.weight"); the whole name of a weight outside the layers.
        layer_offset: the weight's layer minus the segment's; None for a weight outside the layers.
        dtype: in the plan; see `stored`.
        shape: in the dtype of the plan; see `plan_shape`.
        source: input of the network, or constant in the plan.
    """

    name: str
    role: str
    layer_offset: int | None
    dtype: PlanDType
    shape: tuple[int, ...]
    source: WeightSource

    def canonical(self, layer: int) -> str:
        """The weight's canonical name for a segment placed at `layer`."""
        return self.role if self.layer_offset is None else f"layers.{layer + self.layer_offset}.{self.role}"

    @property
    def plan_shape(self) -> tuple[int, ...]:
        """The shape in the plan. Vectors that broadcast are [1, size], which saves a kernel."""
        return (1, *self.shape) if len(self.shape) == 1 and self.role.endswith(_ROWS) else self.shape

    @property
    def stored(self) -> TensorSpec:
        """The tensor on the device: two columns of 4 bits are a byte there."""
        return stored_spec(self.dtype, self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the contiguous tensor."""
        return self.stored.size_bytes


@dataclass(frozen=True, slots=True)
class Range:
    """Sizes of a dynamic dimension in a profile: TensorRT tunes for `opt` and accepts `min` to `max`, inclusive."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True, slots=True)
class ProfileSpec:
    """One optimisation profile; its index in `SegmentSpec.profiles` is its index in the plan.

    Attributes:
        tokens: range of T.
        samples: range of S.
    """

    name: Literal["decode", "prefill"]
    tokens: Range
    samples: Range

    def shapes_of(self, tensor: PlanTensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The least, the best and the largest shape of a tensor."""
        tokens, samples = self.tokens, self.samples
        return (
            tensor.resolve(T=tokens.min, S=samples.min),
            tensor.resolve(T=tokens.opt, S=samples.opt),
            tensor.resolve(T=tokens.max, S=samples.max),
        )

    def accepts(self, tokens: int, samples: int) -> bool:
        """Whether an execution with these sizes can use the profile."""
        return self.tokens.min <= tokens <= self.tokens.max and self.samples.min <= samples <= self.samples.max


@dataclass(frozen=True, slots=True)
class Numerics:
    """What the formulas of a segment depend on besides shapes; see `ModelArch`.

    A segment has a norm or a bias if it has its weight.

    Attributes:
        activation: of the gate; "none" in a segment without an MLP.
        logit_scale: 1 in a segment without logits.
        logit_soft_cap: None in a segment without logits.
    """

    rms_norm_eps: float
    activation: Activation | Literal["none"]
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """One network: everything that its plan depends on, except the values of constant weights and the target.

    Attributes:
        dtype: of activations, weights and residual. Norms compute in fp32, and their weights may be fp32. Logits are
            fp32.
        weight_mode: "inputs": every weight is an input. "constants": every weight is in the plan.
        inputs: activations only, in binding order; weights that are inputs follow them in the network.
        weights: in canonical order.
        quantization: matrix and format, of the matrices that are quantized, by their names in the plan less ".weight".
    """

    kind: SegmentKind
    dtype: ModelDType
    weight_mode: WeightMode
    profiles: tuple[ProfileSpec, ...]
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    weights: tuple[WeightSpec, ...]
    numerics: Numerics
    quantization: tuple[tuple[str, WeightFormat], ...] = ()

    def matrix_parts(self, name: str) -> dict[str, PlanMatrix]:
        """The parts of a matrix by its name in the plan less ".weight"; see `plan_parts`."""
        weight_format = dict(self.quantization).get(name, DENSE)
        return plan_parts(weight_format, self.matrix_shape(name), self.dtype)

    def matrix_shape(self, name: str) -> Shape:
        """(out_features, in_features) of a matrix by its name in the plan less ".weight"."""
        parts = [item.shape for item in self.weights if re.fullmatch(rf"{re.escape(name)}\.weight(_\d+)?", item.name)]
        return matrix_shape(dict(self.quantization).get(name, DENSE), parts)

    @property
    def is_of_each_layer(self) -> bool:
        """Whether a model has more than one of its kind."""
        return self.kind not in ("first", "last", "head")

    @property
    def has_samples(self) -> bool:
        """Whether the number of sampled rows is a size of it."""
        return any("S" in tensor.shape for tensor in self.inputs)

    @property
    def ends_at_sum(self) -> bool:
        """Whether an output is a term of a sum over ranks."""
        return any(output.name == PART for output in self.outputs)

    @property
    def weight_inputs(self) -> tuple[WeightSpec, ...]:
        """The weights that are bound as inputs of the network."""
        return tuple(weight for weight in self.weights if weight.source == "input")

    @property
    def constant_weights(self) -> tuple[WeightSpec, ...]:
        """The weights that the plan contains."""
        return tuple(weight for weight in self.weights if weight.source == "constant")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, from which `spec_from_dict` makes an equal spec."""
        formats = {name: item.to_json() for name, item in self.quantization}
        return {**dataclasses.asdict(self), "quantization": formats or "none"}

    def fingerprint(self) -> str:
        """The sha256 (hex) of the spec's canonical JSON; the same on every machine and Python."""
        content = {"network_version": NETWORK_VERSION, **self.to_dict()}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


def spec_from_dict(values: Mapping[str, Any]) -> SegmentSpec:
    """The spec whose `to_dict` gave `values`, which may have been written as JSON and read back.

    Raises `CorruptFileError` for anything else.
    """
    plain = json.loads(json.dumps(values))
    spec = _read_spec(Fields(plain, "invalid segment description"))
    if json.loads(json.dumps(spec.to_dict())) != plain:
        raise CorruptFileError("invalid segment description: unknown keys or values")
    return spec


def _read_spec(fields: Fields) -> SegmentSpec:
    numerics = fields.fields("numerics")
    return SegmentSpec(
        kind=fields.choice("kind", get_args(SegmentKind)),
        dtype=fields.choice("dtype", MODEL_DTYPES),
        weight_mode=fields.choice("weight_mode", get_args(WeightMode)),
        profiles=tuple(
            ProfileSpec(
                item.choice("name", ("decode", "prefill")), _read_range(item, "tokens"), _read_range(item, "samples")
            )
            for item in fields.objects("profiles")
        ),
        inputs=tuple(_read_tensor(item) for item in fields.objects("inputs")),
        outputs=tuple(_read_tensor(item) for item in fields.objects("outputs")),
        weights=tuple(_read_weight(item) for item in fields.objects("weights")),
        numerics=Numerics(
            rms_norm_eps=numerics.number("rms_norm_eps"),
            activation=numerics.choice("activation", (*get_args(Activation), "none")),
            logit_scale=numerics.number("logit_scale"),
            logit_soft_cap=numerics.optional_number("logit_soft_cap"),
        ),
        quantization=_read_quantization(fields),
    )


def _read_quantization(fields: Fields) -> tuple[tuple[str, WeightFormat], ...]:
    if fields.values.get("quantization") == "none":
        return ()
    formats = fields.fields("quantization")
    try:
        return tuple((name, format_from_json(formats.fields(name).values, formats.where)) for name in formats.values)
    except UnsupportedModelError as error:
        raise CorruptFileError(str(error)) from error


def _read_range(profile: Fields, key: str) -> Range:
    fields = profile.fields(key)
    found = Range(*(fields.integer(name, low=1, high=MAX_SIZE) for name in ("min", "opt", "max")))
    if not found.min <= found.opt <= found.max:
        raise profile.error(key, "min <= opt <= max")
    return found


def _read_tensor(fields: Fields) -> PlanTensor:
    dtype = fields.choice("dtype", _DTYPES)
    return PlanTensor(fields.string("name"), dtype, _read_shape(fields, get_args(get_args(Dim)[1])))


def _read_weight(fields: Fields) -> WeightSpec:
    return WeightSpec(
        name=fields.string("name"),
        role=fields.string("role"),
        layer_offset=fields.optional_integer("layer_offset"),
        dtype=fields.choice("dtype", _WEIGHT_DTYPES),
        shape=_read_shape(fields),
        source=fields.choice("source", get_args(WeightSource)),
    )


def _read_shape(fields: Fields, names: tuple[str, ...] = ()) -> tuple[Any, ...]:
    shape = fields.values.get("shape")
    if not isinstance(shape, list) or not all(
        dim in names if isinstance(dim, str) else type(dim) is int and 0 < dim <= MAX_SIZE for dim in shape
    ):
        raise fields.error("shape", f"a list of sizes in [1, {MAX_SIZE}]{''.join(f' or {name!r}' for name in names)}")
    return tuple(shape)


@dataclass(frozen=True, slots=True)
class PlacedSegment:
    """A segment at its place in the model.

    Attributes:
        layer: the layer whose attention was the last before the segment; 0 for `first`.
        first_layer: the first layer with such a segment.
        rank: the rank that runs it, 0 in a model that is not shared.
        first_rank: the first rank with such a segment.
    """

    spec: SegmentSpec
    layer: int
    first_layer: int = 0
    rank: int = 0
    first_rank: int = 0

    @property
    def plan_name(self) -> str:
        """Name of its plan, unique in a model: "first", "mid", "last".

        "mid.7" if the plan contains weights, or if layer 7 is the first with matrices in these formats; "mlp.rank1" if
        rank 1 is the first with these shapes and formats, or if the plan contains its weights.
        """
        name: str = self.spec.kind
        if self.spec.is_of_each_layer and self.spec.weight_mode == "constants":
            name += f".{self.layer}"
        elif self.first_layer:
            name += f".{self.first_layer}"
        return f"{name}.rank{self.first_rank}" if self.first_rank else name

    def canonical_matrix(self, name: str) -> str:
        """Canonical name less ".weight" of a matrix by its name in the plan less ".weight"."""
        return self.weight_names()[f"{name}.weight"].removesuffix(".weight")

    def weight_names(self) -> dict[str, str]:
        """Name in the plan -> canonical name, of every weight."""
        return {weight.name: weight.canonical(self.layer) for weight in self.spec.weights}


@dataclass(frozen=True, slots=True)
class BuildTarget:
    """The GPUs that a plan is built for.

    Attributes:
        compute_capabilities: (80, 89) for SM 8.0 and 8.9; empty for the device of the building process.
    """

    compute_capabilities: tuple[int, ...] = ()

    def __str__(self) -> str:
        return ", ".join(f"SM{value}" for value in self.compute_capabilities) or "the current device"


def make_profiles(max_batch_size: int, max_tokens_per_step: int) -> tuple[ProfileSpec, ...]:
    """The decode profile (T up to `max_batch_size`) and the prefill profile (T up to `max_tokens_per_step`).

    Both begin at T = S = 1, so the prefill profile accepts any step. S never exceeds the requests in a batch.
    """
    samples = Range(1, max_batch_size, max_batch_size)
    most = max(max_batch_size, max_tokens_per_step)
    return (
        ProfileSpec("decode", Range(1, max_batch_size, max_batch_size), samples),
        ProfileSpec("prefill", Range(1, most, most), samples),
    )


def segments_by_plan(segments: Sequence[PlacedSegment]) -> dict[str, PlacedSegment]:
    """Plan name -> the first segment that the plan runs: everything that has to be built for a model."""
    plans: dict[str, PlacedSegment] = {}
    for segment in segments:
        plans.setdefault(segment.plan_name, segment)
    return plans
