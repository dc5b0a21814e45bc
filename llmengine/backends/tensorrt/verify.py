"""Verification: each plan against torch on the device that it will run on, before it is trusted.

A plan's outputs for random input are compared with the same formulas in float64. Each element's error is divided by
the size that rounding is expected to give it there (`rounding.py`), and what is left has limits that hold for every
shape (`criterion.py`). So a plan may round elsewhere, or not at all, and sum in another order, but not be wrong
anywhere, nor accumulate many products in fewer bits.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmengine.backends.tensorrt import criterion
from llmengine.backends.tensorrt.rounding import expected_rows
from llmengine.backends.tensorrt.runtime import LoadedPlan, Sizes, current_stream, scratch_memory
from llmengine.backends.tensorrt.spec import PlacedSegment, SegmentSpec, TensorSpec, WeightSpec, plans_of
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.errors import CorruptFileError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SENTINEL = 7.0
_ERRORS = ("rms_error", "column_error", "max_error")
_LIMITS = ("rms_limit", "column_limit", "max_limit")
_OUTLIER_ROWS = 4
"""Every so many rows of the hidden state have an outlier, as those of real models do."""
_NORMS_OF_X = ("input_norm.weight", "post_attention_norm.weight")
_OUTLIER = 1000.0
"""Its square is beyond float16's range."""


@dataclass(frozen=True, slots=True)
class SegmentCheck:
    """How one output of a plan compared, at the sizes where it came closest to a limit.

    Errors are in units of what rounding is expected to give each element, 1 on average; see `criterion`.

    Attributes:
        rms_error: root mean square over all elements.
        column_error: the largest root mean square over the rows of one column.
        max_error: the largest of one element.
        finite: every element was written, with a finite value, and nothing beyond; if not, the errors are infinite.
    """

    plan: str
    output: str
    tokens: int
    samples: int
    rms_error: float
    rms_limit: float
    column_error: float
    column_limit: float
    max_error: float
    max_limit: float
    finite: bool

    @property
    def ratio(self) -> float:
        """The largest share of a limit that is used; above 1 the check has failed."""
        if not self.finite:
            return math.inf
        return max(
            self.rms_error / self.rms_limit, self.column_error / self.column_limit, self.max_error / self.max_limit
        )

    def __str__(self) -> str:
        where = f"{self.plan}: {self.output} at T={self.tokens}, S={self.samples}"
        if not self.finite:
            return f"{where} is not finite"
        return (
            f"{where}: in units of the expected rounding, rms error {self.rms_error:.3g} (limit {self.rms_limit:.3g}), "
            f"worst column {self.column_error:.3g} (limit {self.column_limit:.3g}), "
            f"largest {self.max_error:.3g} (limit {self.max_limit:.3g})"
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """What verifying a model's plans on a device found.

    Attributes:
        library: name and version of what ran the plans.
        device: name of the GPU.
        date: UTC, ISO 8601.
        checks: the worst of each output of each plan.
        step_us: tokens -> microseconds that the dense part of a step of decodes took (TensorRT's, torch's); empty
            where it was not measured.
        criterion: version of what decided; see `criterion.VERSION`.
    """

    library: str
    device: str
    date: str
    checks: tuple[SegmentCheck, ...]
    step_us: Mapping[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    criterion: int = criterion.VERSION

    @property
    def failures(self) -> list[SegmentCheck]:
        """The checks that failed, worst first."""
        return sorted((check for check in self.checks if not check.ratio <= 1.0), key=lambda check: -check.ratio)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form that `from_dict` reads back equal."""
        values = dataclasses.asdict(self)
        for check in values["checks"]:
            if not check["finite"]:
                check.update(dict.fromkeys(_ERRORS))
        values["checks"] = list(values["checks"])
        values["step_us"] = {str(tokens): list(times) for tokens, times in self.step_us.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verification | None:
        """Return what `to_dict` gave, None for anything else or of another criterion: then it has to be done again."""
        fields = Fields(values, "verification")
        try:
            fields.require_only({item.name for item in dataclasses.fields(cls)})
            if fields.integer("criterion") != criterion.VERSION:
                return None
            steps = fields.fields("step_us")
            times = {int(tokens): steps.numbers(tokens, above=0.0) for tokens in steps.values}
            return cls(
                library=fields.string("library"),
                device=fields.string("device"),
                date=fields.string("date"),
                checks=tuple(_read_check(check) for check in fields.objects("checks")),
                step_us={tokens: (ours, theirs) for tokens, (ours, theirs) in times.items()},
            )
        except (CorruptFileError, ValueError):
            return None

    def holds_for(self, library: str, device: torch.device) -> bool:
        """Say whether it was made with this library, on such a GPU."""
        return (self.library, self.device) == (library, device_name(device))


def verify_plans(
    segments: Sequence[PlacedSegment],
    plans: Mapping[str, LoadedPlan],
    device: torch.device,
    weights: Mapping[str, Tensor] | None = None,
) -> Verification:
    """Run every plan at the edges of its profiles and compare it with torch.

    Takes device memory for one layer's weights, the LM head's, and activations of the largest step, those of some
    hundred rows in float64 among them; gives it back.

    Args:
        weights: canonical weights on the device, needed for plans that hold some. None: random ones.

    Raises `EngineError` if a plan cannot run. One that computes something else raises nothing: see `failures`.
    """
    memory = scratch_memory(list(plans.values()), device)
    checks: list[SegmentCheck] = []
    for name, segment in plans_of(segments).items():
        values = _weights(segment, weights, device)
        worst: dict[str, SegmentCheck] = {}
        for sizes in cases_of(segment.spec):
            for check in _check(plans[name], values, sizes, memory):
                worst[check.output] = max(worst.get(check.output, check), check, key=lambda one: one.ratio)
        checks += worst.values()
    library = str(next(iter(plans.values())).runtime.library)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Verification(library, device_name(device), date, tuple(checks))


def cases_of(spec: SegmentSpec) -> Iterator[Sizes]:
    """Yield the least, a middle and the largest size for which each profile is used."""
    least = 1
    for profile in spec.profiles:
        tokens, samples = profile.tokens, profile.samples
        least = max(least, tokens.min)
        if least <= tokens.max:
            yield from dict.fromkeys(
                (
                    Sizes(least, samples.min),
                    Sizes((least + tokens.max) // 2, (samples.min + samples.max) // 2),
                    Sizes(tokens.max, samples.max),
                )
            )
        least = tokens.max + 1


def _read_check(fields: Fields) -> SegmentCheck:
    fields.require_only({item.name for item in dataclasses.fields(SegmentCheck)})
    finite = fields.boolean("finite")
    return SegmentCheck(
        plan=fields.string("plan"),
        output=fields.string("output"),
        tokens=fields.integer("tokens"),
        samples=fields.integer("samples"),
        finite=finite,
        **{name: fields.number(name) if finite else math.inf for name in _ERRORS},
        **{name: fields.number(name, above=0.0) for name in _LIMITS},
    )


def device_name(device: torch.device) -> str:
    """Return the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _check(plan: LoadedPlan, weights: Mapping[str, Tensor], sizes: Sizes, memory: Tensor) -> Iterator[SegmentCheck]:
    """Yield the check of each output of one execution."""
    spec = plan.spec
    tensors = {**weights, **random_inputs(spec, sizes, memory.device)}
    outputs = {tensor.name: _empty_output(tensor, sizes, memory.device) for tensor in spec.outputs}
    bound = {weight.name for weight in spec.weight_inputs} | {tensor.name for tensor in spec.inputs}
    addresses = {
        name: tensor.data_ptr() for name, tensor in {**tensors, **outputs}.items() if name in {*bound, *outputs}
    }
    stream = current_stream(memory.device)
    memory.fill_(0xFF)  # NaN in every type: what is read there before it is written shows
    plan.context(sizes, memory, stream).run(addresses, stream)
    for name, errors in scaled_errors(spec, tensors, outputs).items():
        intact = bool((outputs[name][-1] == _SENTINEL).all())
        yield compare(plan.name, name, sizes, errors, intact)


def scaled_errors(spec: SegmentSpec, tensors: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each output's errors in units of what rounding is expected to give, float32 [rows, columns].

    Args:
        tensors: inputs, and weights by their names in the plan.
        outputs: by name; rows beyond those that the inputs ask for are left out.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in outputs}
    for rows, expected in expected_rows(spec, tensors, _DTYPES[spec.dtype]):
        for name, exact in expected.items():
            error = outputs[name][rows].double() - exact.value
            parts[name].append((error / exact.total_variance.double().sqrt()).float())
    return {name: torch.cat(errors) for name, errors in parts.items()}


def compare(plan: str, output: str, sizes: Sizes, errors: Tensor, intact: bool = True) -> SegmentCheck:
    """Return the check of one execution from its `scaled_errors`; not `intact`: it wrote beyond its output."""
    num_rows, num_columns = errors.shape
    squares = errors.square()
    rms = float(squares.double().mean().sqrt())
    finite = intact and math.isfinite(rms)
    found = (rms, float(squares.mean(0).max().sqrt()), float(errors.abs().max())) if finite else (math.inf,) * 3
    num_independent = min(num_rows, sizes.tokens)
    scale = rms if finite else 1.0
    return SegmentCheck(
        plan=plan,
        output=output,
        tokens=sizes.tokens,
        samples=sizes.samples,
        rms_error=found[0],
        rms_limit=criterion.PRECISION_LIMIT,
        column_error=found[1],
        column_limit=criterion.local_limit(num_columns, num_independent, scale),
        max_error=found[2],
        max_limit=criterion.local_limit(errors.numel(), 1, scale),
        finite=finite,
    )


def _weights(segment: PlacedSegment, given: Mapping[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
    """Return a segment's weights by their names in the plan."""
    if given is not None:
        return {name: given[canonical] for name, canonical in segment.weight_names().items()}
    assert len(segment.spec.weight_inputs) == len(segment.spec.weights), "what a plan holds cannot be random"
    return {weight.name: _random_weight(weight, device) for weight in segment.spec.weights}


def bound_tensors(spec: SegmentSpec, sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Return new tensors for all that an execution is given addresses of, with random values."""
    tensors = {weight.name: _random_weight(weight, device) for weight in spec.weight_inputs}
    tensors |= random_inputs(spec, sizes, device)
    return tensors | {tensor.name: _empty_output(tensor, sizes, device) for tensor in spec.outputs}


def _random_weight(weight: WeightSpec, device: torch.device) -> Tensor:
    """Return values that keep activations near 1."""
    tensor = torch.empty(weight.shape, dtype=_DTYPES[weight.dtype], device=device)
    if len(weight.shape) == 2:
        return tensor.normal_(std=weight.shape[1] ** -0.5)
    return tensor.uniform_(0.5, 1.5) if "norm" in weight.role else tensor.normal_(std=0.2)


def random_inputs(spec: SegmentSpec, sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Return activations near 1, with outliers where a norm takes them in, and each token sampled once if that fits."""
    values = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(T=sizes.tokens, S=sizes.samples)
        if tensor.dtype == "int32":
            rows = torch.randperm(sizes.tokens, dtype=torch.int32, device=device)
            values[tensor.name] = rows[torch.arange(*shape, device=device) % sizes.tokens]
        else:
            values[tensor.name] = torch.randn(shape, device=device).to(_DTYPES[tensor.dtype])
    if any(weight.name in _NORMS_OF_X for weight in spec.weights):
        x = values["x"]
        x[_OUTLIER_ROWS - 1 :: _OUTLIER_ROWS, int(torch.randint(x.shape[1], ()))] = _OUTLIER
    return values


def _empty_output(tensor: TensorSpec, sizes: Sizes, device: torch.device) -> Tensor:
    """Return NaN, which a plan must overwrite, and a row beyond, which it must not touch."""
    rows, columns = tensor.resolve(T=sizes.tokens, S=sizes.samples)
    output = torch.full((rows + 1, columns), math.nan, dtype=_DTYPES[tensor.dtype], device=device)
    output[-1] = _SENTINEL
    return output
