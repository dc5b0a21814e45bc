"""Whether a model's plans are faster with its weights built in: one layer, built both ways and timed on the GPU.

Nobody knows in advance. A product with a constant operand may be laid out and fused otherwise; but each layer then has
a plan of its own, which takes seconds to build, and the weights are in device memory a second time. So this is measured
where somebody asks for it (`llmengine build --weights fastest`), before the other layers are built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from llmengine.backends.tensorrt.builder import build_plans
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.obtain import BuildPlans, PlanRequest, get_layer_plan
from llmengine.backends.tensorrt.plan_set import PlanSet
from llmengine.backends.tensorrt.runtime import (
    LoadedPlan,
    PlanContext,
    PlanRuntime,
    Sizes,
    current_stream,
    scratch_memory,
)
from llmengine.backends.tensorrt.spec import WeightMode
from llmengine.backends.tensorrt.step_times import speedup, time_us, timed_sizes
from llmengine.backends.tensorrt.verify import bound_tensors
from llmengine.checkpoints.source import ModelSource

LEAST_GAIN = 1.05
"""How much faster constants must be to be worth minutes of building and a second copy of the weights."""

_COLD_BYTES = 160 << 20
"""Weights that are gone through before any is met again: more than a GPU's cache holds, as in a whole model."""


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """How long a layer takes on a device, attention left out.

    Attributes:
        us: tokens of a decode step -> microseconds with weights as constants, and as inputs.
    """

    us: Mapping[int, tuple[float, float]]

    @property
    def fastest(self) -> WeightMode:
        """What a model's plans are to be built with."""
        return "constants" if speedup(self.us) >= LEAST_GAIN else "inputs"

    def __str__(self) -> str:
        listed = ", ".join(
            f"{tokens}: {inputs:.1f} and {constants:.1f}" for tokens, (constants, inputs) in self.us.items()
        )
        return f"a layer takes with weights as inputs and as constants, us by requests: {listed}"


def time_layer(
    request: PlanRequest,
    source: ModelSource,
    library: Library,
    device: torch.device,
    cache: PlanCache | None = None,
    build: BuildPlans = build_plans,
) -> LayerTimes | None:
    """Build a layer of a model in both ways and time it; None for a model of one layer, which has none in the middle.

    Takes device memory for a few layers. Raises what `get_plans` raises, and `EngineError` if a plan cannot run.
    """
    if request.arch.num_layers < 2:
        return None
    modes: tuple[WeightMode, ...] = ("constants", "inputs")
    wanted = (dataclasses.replace(request, weight_mode=mode) for mode in modes)
    plan_sets = [get_layer_plan(one, source, cache, build) for one in wanted]
    layers = [_Layers(plan_set, request.arch.num_layers - 1, library, device) for plan_set in plan_sets]
    sizes = timed_sizes(request.max_batch_size)
    constants, inputs = ([layer.time_us(num_tokens) for num_tokens in sizes] for layer in layers)
    return LayerTimes(dict(zip(sizes, zip(constants, inputs, strict=True), strict=True)))


class _Layers:
    """One layer's plan as often as the model has layers, or a GPU's cache cannot hold, each with weights of its own."""

    def __init__(self, plan_set: PlanSet, num_layers: int, library: Library, device: torch.device) -> None:
        [(name, plan)] = plan_set.plans.items()
        spec = plan_set.segments[0].spec
        layer_bytes = sum(weight.size_bytes for weight in spec.weights)
        count = min(num_layers, max(2, -(-_COLD_BYTES // layer_bytes)))
        runtime, content = PlanRuntime(library), plan.read()
        first = runtime.load(name, content, spec)
        again = (first if spec.weight_inputs else runtime.load(name, content, spec) for _ in range(count - 1))
        self._plans: list[LoadedPlan] = [first, *again]
        self._memory = scratch_memory([first], device)

    def time_us(self, num_tokens: int) -> float:
        """Return what one execution takes for so many tokens."""
        sizes, device = Sizes(num_tokens), self._memory.device
        stream = current_stream(device)
        contexts: dict[LoadedPlan, PlanContext] = {
            plan: plan.context(sizes, self._memory, stream) for plan in dict.fromkeys(self._plans)
        }
        tensors = [bound_tensors(plan.spec, sizes, device) for plan in self._plans]

        def run(index: int) -> None:
            addresses = {name: tensor.data_ptr() for name, tensor in tensors[index].items()}
            contexts[self._plans[index]].run(addresses, current_stream(device))

        functions = [partial(run, index) for index in range(len(self._plans))]
        for function in functions:
            function()  # a context runs once before it is captured
        return time_us(functions, device)
