"""The measured choice between weights as inputs and weights as constants: one layer, built both ways and timed.

The faster way is not known in advance. TensorRT may lay out and fuse a product with a constant operand differently.
But each layer then has a plan of its own, which takes seconds to build, and the weights take device memory twice. So
the choice is measured on request (`llmengine build --weights fastest`), before the other layers are built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llmengine.backends.tensorrt.builder import build_plans
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.obtain import BuildPlans, PlanRequest, obtain_layer_plan
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.backends.tensorrt.random_tensors import random_tensors
from llmengine.backends.tensorrt.runtime import (
    LoadedPlan,
    PlanContext,
    PlanRuntime,
    Sizes,
    current_stream,
    scratch_memory,
)
from llmengine.backends.tensorrt.spec import WeightMode
from llmengine.backends.tensorrt.step_times import mean_speedup, time_us, timed_batch_sizes
from llmengine.checkpoints.source import ModelSource

LEAST_GAIN = 1.05
"""Speedup from which constants are worth minutes of building and a second copy of the weights."""

_COLD_BYTES = 160 << 20
"""Bytes of weights between two uses of the same weight: more than a GPU's cache holds, as in a whole model."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Times of one layer on a device, without attention.

    Attributes:
        us: tokens of a decode step -> microseconds (with weights as constants, with weights as inputs).
    """

    us: Mapping[int, tuple[float, float]]

    @property
    def fastest(self) -> WeightMode:
        """The mode that the model's plans should have."""
        return "constants" if mean_speedup(self.us) >= LEAST_GAIN else "inputs"

    def __str__(self) -> str:
        listed = ", ".join(
            f"{tokens}: {inputs:.1f} and {constants:.1f}" for tokens, (constants, inputs) in self.us.items()
        )
        return f"microseconds of a layer by requests, with weights as inputs and as constants: {listed}"


def time_layer(
    request: PlanRequest,
    source: ModelSource,
    library: Library,
    device: torch.device,
    cache: PlanCache | None = None,
    build: BuildPlans = build_plans,
) -> LayerTimes | None:
    """Build a layer of a model both ways and time it; None for a model of one layer, which has no `mid` segment.

    Takes device memory for a few layers. Raises as `obtain_plans` does, and `EngineError` if a plan cannot run.
    """
    if request.arch.num_layers < 2:
        return None
    modes: tuple[WeightMode, ...] = ("constants", "inputs")
    requests = (dataclasses.replace(request, weight_mode=mode) for mode in modes)
    plan_sets = [obtain_layer_plan(layer_request, source, cache, build) for layer_request in requests]
    layers = [_load_layers(plan_set, request.arch.num_layers - 1, library, device) for plan_set in plan_sets]
    sizes = timed_batch_sizes(request.max_batch_size)
    constants, inputs = ([layer.time_us(num_tokens) for num_tokens in sizes] for layer in layers)
    return LayerTimes(dict(zip(sizes, zip(constants, inputs, strict=True), strict=True)))


def _load_layers(plan_set: PlanSet, num_layers: int, library: Library, device: torch.device) -> _Layers:
    """Load one layer's plan as often as the model has layers, or as a GPU's cache cannot hold their weights."""
    [(name, plan)] = plan_set.plans.items()
    spec = plan_set.segments[0].spec
    layer_bytes = sum(weight.size_bytes for weight in spec.weights)
    count = min(num_layers, max(2, -(-_COLD_BYTES // layer_bytes)))
    runtime, content = PlanRuntime.start(library), plan.read()
    first = runtime.load(name, content, spec)
    others = (runtime.load(name, content, spec) if spec.constant_weights else first for _ in range(count - 1))
    return _Layers([first, *others], scratch_memory([first], device))


@dataclass(frozen=True, slots=True)
class _Layers:
    """Layers that run one after the other, each with weights of its own.

    Attributes:
        plans: of each layer; the same one several times where weights are inputs.
        memory: scratch memory that they share.
    """

    plans: list[LoadedPlan]
    memory: Tensor

    def time_us(self, num_tokens: int) -> float:
        """Microseconds of one layer for so many tokens."""
        sizes, device = Sizes(num_tokens), self.memory.device
        stream = current_stream(device)
        contexts: dict[LoadedPlan, PlanContext] = {
            plan: plan.context(sizes, self.memory, stream) for plan in dict.fromkeys(self.plans)
        }
        tensors = [random_tensors(plan.spec, sizes, device) for plan in self.plans]

        def run(index: int) -> None:
            addresses = {name: tensor.data_ptr() for name, tensor in tensors[index].items()}
            contexts[self.plans[index]].run(addresses, current_stream(device))

        functions = [partial(run, index) for index in range(len(self.plans))]
        for function in functions:
            function()  # a context runs once before it is captured
        return time_us(functions, device)
