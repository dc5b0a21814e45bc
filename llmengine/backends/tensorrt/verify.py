"""Verification: each plan is compared with torch, on the device that will run it, before it is trusted.

A plan's outputs for random input are compared with the same formulas in float64. Each element's error is divided by
the size that rounding is expected to give it there (`expected_outputs.py`), and the quotients have limits that hold for
every shape (`criterion.py`). So a plan may round in other places, or not at all, and sum in another order. It must not
be wrong anywhere, and must not sum many products in fewer bits.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmengine.backends.tensorrt import criterion
from llmengine.backends.tensorrt.expected_outputs import Rounded, expected_outputs
from llmengine.backends.tensorrt.random_tensors import SENTINEL, empty_output, random_inputs, random_weights
from llmengine.backends.tensorrt.runtime import LoadedPlan, Sizes, current_stream, scratch_memory
from llmengine.backends.tensorrt.spec import PlacedSegment, SegmentSpec, segments_by_plan
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.dtypes import torch_dtype
from llmengine.errors import CorruptFileError

WeightsOf = Callable[[PlacedSegment], Mapping[str, Tensor]]
"""A segment's weights on the device, by their names in the plan. They are not kept longer than the segment needs."""

_LEAST_SIZE = 1e-150
"""Expected size of the error of a value that must be 0: a row of zeros in a matrix gives nothing else."""

_ERRORS = ("rms_error", "column_error", "max_error")
_LIMITS = ("rms_limit", "column_limit", "max_limit")


@dataclass(frozen=True, slots=True)
class SegmentCheck:
    """The errors of one output of a plan, at the sizes where they come closest to a limit.

    Errors are in units of the rounding error that is expected of each element, 1 on average; see `criterion`.

    Attributes:
        rms_error: root mean square over all elements.
        column_error: the largest root mean square over the rows of one column.
        max_error: the largest error of one element.
        finite: the plan wrote every element, each with a finite value, and nothing beyond them; otherwise the errors
            are infinite.
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
        """The largest of the errors divided by its limit; above 1 the check has failed."""
        if not self.finite:
            return math.inf
        return max(
            self.rms_error / self.rms_limit, self.column_error / self.column_limit, self.max_error / self.max_limit
        )

    def __str__(self) -> str:
        where = f"{self.plan}: {self.output} at T={self.tokens}, S={self.samples}"
        if not self.finite:
            return f"{where} is not finite, or not within its output"
        return (
            f"{where}: in units of the expected rounding, rms error {self.rms_error:.3g} (limit {self.rms_limit:.3g}), "
            f"worst column {self.column_error:.3g} (limit {self.column_limit:.3g}), "
            f"largest {self.max_error:.3g} (limit {self.max_limit:.3g})"
        )


@dataclass(frozen=True, slots=True)
class Verification:
    """The findings about a model's plans on a device.

    Attributes:
        library: name and version of the library that ran the plans.
        device: name of the GPU.
        date: UTC, ISO 8601.
        checks: the worst check of each output of each plan.
        step_us: tokens -> microseconds of the dense part of a decode step (with TensorRT, with torch); empty if it was
            not measured.
        criterion: the `criterion.VERSION` that decided.
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
        """A JSON-ready form, from which `from_dict` makes an equal verification."""
        values = dataclasses.asdict(self)
        for check in values["checks"]:
            if not check["finite"]:
                check.update(dict.fromkeys(_ERRORS))
        values["checks"] = list(values["checks"])
        values["step_us"] = {str(tokens): list(times) for tokens, times in self.step_us.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Verification | None:
        """The verification whose `to_dict` gave `values`; None for anything else, and for another criterion.

        After None the plans have to be verified again.
        """
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
        """Whether it was made with this library, on a GPU of this name."""
        return (self.library, self.device) == (library, device_name(device))


def joined(found: Sequence[Verification]) -> Verification:
    """The findings of several ranks as those of the first: of each output of a plan the worst check."""
    worst: dict[tuple[str, str], SegmentCheck] = {}
    for check in (check for one in found for check in one.checks):
        key = check.plan, check.output
        worst[key] = max(worst.get(key, check), check, key=lambda one: one.ratio)
    return dataclasses.replace(found[0], checks=tuple(worst.values()))


def verify_plans(
    segments: Sequence[PlacedSegment],
    plans: Mapping[str, LoadedPlan],
    device: torch.device,
    weights_of: WeightsOf | None = None,
) -> Verification:
    """Run every plan at the edges of its profiles and compare it with torch.

    Takes device memory for the weights of one layer and the LM head, and for activations of the largest step, some
    hundred rows of them in float64, and releases it.

    Args:
        weights_of: required for plans that contain weights. None: random weights.

    Raises `EngineError` if a plan cannot run. For a plan with wrong results see `Verification.failures`.
    """
    memory = scratch_memory(list(plans.values()), device)
    checks: list[SegmentCheck] = []
    for name, segment in segments_by_plan(segments).items():
        values = _segment_weights(segment, weights_of, device)
        worst: dict[str, SegmentCheck] = {}
        for sizes in checked_sizes(segment.spec):
            for check in _check(plans[name], values, sizes, memory):
                worst[check.output] = max(worst.get(check.output, check), check, key=lambda one: one.ratio)
        checks += worst.values()
    library = str(next(iter(plans.values())).library)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Verification(library, device_name(device), date, tuple(checks))


def checked_sizes(spec: SegmentSpec) -> Iterator[Sizes]:
    """Yield the least, a middle and the largest sizes for which each profile is used."""
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
    """Name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _check(plan: LoadedPlan, weights: Mapping[str, Tensor], sizes: Sizes, memory: Tensor) -> Iterator[SegmentCheck]:
    """Yield the check of each output of one execution."""
    spec = plan.spec
    tensors = {**weights, **random_inputs(spec, sizes, memory.device)}
    outputs = {tensor.name: empty_output(tensor, sizes, memory.device) for tensor in spec.outputs}
    bound = {weight.name for weight in spec.weight_inputs} | {tensor.name for tensor in spec.inputs}
    addresses = {
        name: tensor.data_ptr() for name, tensor in {**tensors, **outputs}.items() if name in {*bound, *outputs}
    }
    stream = current_stream(memory.device)
    memory.fill_(0xFF)  # NaN in every dtype: a read before a write shows
    plan.context(sizes, memory, stream).run(addresses, stream)
    expected = expected_outputs(spec, tensors, torch_dtype(spec.dtype))
    for name, errors in scaled_errors(expected, outputs).items():
        intact = bool((outputs[name][-1] == SENTINEL).all())
        yield check_errors(plan.name, name, sizes, errors, intact)


def scaled_errors(
    expected: Iterable[tuple[slice, Mapping[str, Rounded]]], outputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Errors of each output in units of the expected rounding error, float32 [rows, columns].

    Args:
        expected: see `expected_outputs`.
        outputs: by name; rows beyond the expected ones are ignored.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in outputs}
    for rows, exact_values in expected:
        for name, exact in exact_values.items():
            error = outputs[name][rows].double() - exact.value
            expected_size = exact.total_variance.double().sqrt().clamp_min(_LEAST_SIZE)
            parts[name].append((error / expected_size).float())
    return {name: torch.cat(errors) for name, errors in parts.items()}


def check_errors(plan: str, output: str, sizes: Sizes, errors: Tensor, intact: bool = True) -> SegmentCheck:
    """The check of one execution.

    Args:
        errors: see `scaled_errors`.
        intact: False if the plan wrote beyond its output.
    """
    num_rows, num_columns = errors.shape
    squares = errors.square()
    rms = float(squares.double().mean().sqrt())
    finite = intact and math.isfinite(rms)
    worst = (rms, float(squares.mean(0).max().sqrt()), float(errors.abs().max())) if finite else (math.inf,) * 3
    num_independent = min(num_rows, sizes.tokens)
    scale = rms if finite else 1.0
    return SegmentCheck(
        plan=plan,
        output=output,
        tokens=sizes.tokens,
        samples=sizes.samples,
        rms_error=worst[0],
        rms_limit=criterion.PRECISION_LIMIT,
        column_error=worst[1],
        column_limit=criterion.local_limit(num_columns, num_independent, scale),
        max_error=worst[2],
        max_limit=criterion.local_limit(errors.numel(), 1, scale),
        finite=finite,
    )


def _segment_weights(
    segment: PlacedSegment, weights_of: WeightsOf | None, device: torch.device
) -> Mapping[str, Tensor]:
    """A segment's weights by their names in the plan."""
    if weights_of is not None:
        return weights_of(segment)
    assert not segment.spec.constant_weights, "weights that a plan contains are not random"
    return random_weights(segment.spec, device)
