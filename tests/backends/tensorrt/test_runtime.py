"""Loading plans and running contexts on a fake that checks every address. A refusal of the library is an error."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine.backends.tensorrt.runtime import LoadedPlan, PlanRuntime, Sizes, current_stream, scratch_memory
from llmengine.backends.tensorrt.spec import PlacedSegment
from llmengine.backends.tensorrt.verify import checked_sizes
from llmengine.errors import EngineError
from tests.backends.tensorrt.fake_runtime import DTYPES, FakeTensorRt, Misuse, fake_library, fake_plan
from tests.backends.tensorrt.segment_helpers import FAMILIES, library_or_skip, placed, tiny_arch


def mid_segment() -> PlacedSegment:
    return placed(tiny_arch(), "float32", "inputs", "mid")


def loaded(fake: FakeTensorRt, rtx: bool = False) -> LoadedPlan:
    spec = mid_segment().spec
    return PlanRuntime.start(fake_library(fake, rtx)).load("mid", fake_plan(spec), spec)


def all_tensors(plan: LoadedPlan, sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Return inputs, weights and outputs of an execution."""
    spec = plan.spec
    shapes = {t.name: t.resolve(T=sizes.tokens, S=sizes.samples) for t in (*spec.inputs, *spec.outputs)}
    shapes |= {weight.name: weight.shape for weight in spec.weight_inputs}
    return {name: torch.randn(shape, device=device).to(DTYPES[spec.dtype]) for name, shape in shapes.items()}


def run(plan: LoadedPlan, tensors: dict[str, Tensor], sizes: Sizes, memory: Tensor | None = None) -> None:
    device = next(iter(tensors.values())).device
    stream = current_stream(device)
    memory = scratch_memory([plan], device) if memory is None else memory
    context = plan.context(sizes, memory, stream)
    context.run({name: tensor.data_ptr() for name, tensor in tensors.items()}, stream)


@pytest.fixture
def fake(device: str) -> FakeTensorRt:
    return FakeTensorRt(torch.device(device))


@pytest.mark.parametrize("rtx", [False, True])
def test_a_context_runs_at_each_size_of_its_profiles(fake: FakeTensorRt, rtx: bool) -> None:
    plan = loaded(fake, rtx)
    for sizes in checked_sizes(plan.spec):
        tensors = all_tensors(plan, sizes, fake.device)
        tensors["x_out"].fill_(torch.nan)
        run(plan, tensors, sizes)
        assert tensors["x_out"].isfinite().all()


def test_compiled_kernels_are_kept_for_the_next_start(fake: FakeTensorRt) -> None:
    library, spec = fake_library(fake, rtx=True), mid_segment().spec
    runtime = PlanRuntime.start(library)
    assert runtime.cache_content() is None
    plan, sizes = runtime.load("mid", fake_plan(spec), spec), Sizes(2)
    run(plan, all_tensors(plan, sizes, fake.device), sizes)
    assert runtime.cache_content() == b"cache1"
    for content, expected in ((b"cache1", b"cache1"), (b"damaged", b"cache0")):
        again = PlanRuntime.start(library, content)
        again.load("mid", fake_plan(spec), spec)
        assert again.cache_content() == expected


LOADING = ["deserialize_cuda_engine", "get_tensor_location", "create_runtime_config", "create_runtime_cache"]
PREPARING = ["create_execution_context", "set_optimization_profile_async", "set_input_shape"]
RUNNING = ["set_tensor_address", "execute_async_v3"]


@pytest.mark.parametrize("call", [*LOADING, "set_runtime_cache"])
def test_a_failure_while_loading_is_reported(fake: FakeTensorRt, call: str) -> None:
    fake.failing.add(call)
    with pytest.raises(EngineError, match=r"plan 'mid' .*") as caught:
        loaded(fake, rtx=True)
    if call.startswith("get_"):
        assert "is not in device memory" in str(caught.value)
    else:
        assert f"refused {call}" in str(caught.value)
        assert f"'{call} was told to fail'" in str(caught.value)


@pytest.mark.parametrize("call", [*PREPARING, *RUNNING, "infer_shapes", "get_tensor_shape"])
def test_a_failure_of_a_context_is_reported(fake: FakeTensorRt, call: str) -> None:
    plan, sizes = loaded(fake), Sizes(3)
    tensors = all_tensors(plan, sizes, fake.device)
    fake.failing.add(call)
    verb = "cannot run" if call in RUNNING else "cannot be prepared"
    with pytest.raises(EngineError, match=f"plan 'mid' at T=3, S=1 {verb}: ") as caught:
        run(plan, tensors, sizes)
    reasons = {
        "infer_shapes": "the shapes of x are missing",
        "get_tensor_shape": r"has shape (-1, -1), expected (3, 48)",
    }
    assert reasons.get(call, f"'{call} was told to fail'") in str(caught.value)


VOID = ["set_execution_context_allocation_strategy", "device_memory_size_v2", "set_device_memory"]

QUERIES = ["get_tensor_name", "get_tensor_mode", "get_tensor_profile_shape", "infer_shapes"]


@pytest.mark.parametrize(
    "call",
    [*VOID, *QUERIES, *PREPARING, *RUNNING, "deserialize_cuda_engine", "create_runtime_cache", "set_runtime_cache"],
)
def test_a_call_that_only_logs_an_error_has_failed(fake: FakeTensorRt, call: str) -> None:
    """TensorRT 8.6's `set_device_memory` did nothing, and said so only in the log."""

    def load_and_run() -> None:
        plan, sizes = loaded(fake, rtx=True), Sizes(3)
        run(plan, all_tensors(plan, sizes, fake.device), sizes)

    fake.complaining.add(call)
    with pytest.raises(EngineError, match=rf"^plan 'mid' .*: TensorRT logged '{call} was told to complain'$"):
        load_and_run()
    fake.complaining.clear()
    load_and_run()


def test_runtimes_on_several_threads_fail_for_their_own_errors_only(device: str) -> None:
    """All of them log through the handle that the process registered first."""
    sound, unsound = FakeTensorRt(torch.device(device)), FakeTensorRt(torch.device(device))
    library = fake_library(sound)
    unsound.complaining.add("device_memory_size_v2")
    spec, turns = mid_segment().spec, Barrier(8)

    def load(number: int) -> str | None:
        runtime = PlanRuntime.start(dataclasses.replace(library, trt=unsound if number % 2 else sound))
        found = set()
        for _ in range(10):
            turns.wait(30)
            try:
                runtime.load("mid", fake_plan(spec), spec)
                found.add("sound")
            except EngineError as error:
                found.add("told to complain" in str(error) and "unsound")
        return found.pop() if len(found) == 1 else None

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(load, range(8))) == ["sound", "unsound"] * 4


def test_kernels_of_another_device_cost_time_only(fake: FakeTensorRt) -> None:
    """Also where the library logs an error about them."""
    fake.complaining.add("deserialize")
    spec = mid_segment().spec
    PlanRuntime.start(fake_library(fake, rtx=True), b"damaged").load("mid", fake_plan(spec), spec)


def test_bytes_that_are_no_plan_are_refused(fake: FakeTensorRt) -> None:
    with pytest.raises(EngineError, match=r"plan 'mid' cannot be loaded.*deserialize_cuda_engine: 'not a plan'"):
        PlanRuntime.start(fake_library(fake)).load("mid", b"something else", mid_segment().spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"intermediate_size": 96},
            r"'gate_up.weight' is INPUT float32 \[160, 48\], expected INPUT float32 \[192, 48\]",
        ),
        ({"mlp_bias": True}, r"'gate_up.bias' is absent, expected INPUT float32 \[1, 160\]"),
    ],
)
def test_a_plan_of_another_segment_is_refused(fake: FakeTensorRt, changes: dict[str, Any], message: str) -> None:
    wanted = placed(tiny_arch(**changes), "float32", "inputs", "mid").spec
    with pytest.raises(EngineError, match=f"plan 'mid' does not match its description: {message}"):
        PlanRuntime.start(fake_library(fake)).load("mid", fake_plan(mid_segment().spec), wanted)


def test_sizes_outside_every_profile_are_refused(fake: FakeTensorRt) -> None:
    plan = loaded(fake)
    memory = scratch_memory([plan], fake.device)
    with pytest.raises(EngineError, match=r"was not built for T=17, S=1, only for decode: T to 4, .* T to 16, S to 4"):
        plan.context(Sizes(17), memory, 0)


def test_too_little_scratch_memory_is_refused(fake: FakeTensorRt) -> None:
    plan, sizes = loaded(fake), Sizes(3)
    memory = torch.empty(plan.memory_bytes - 1, dtype=torch.uint8, device=fake.device)
    with pytest.raises(EngineError, match="it needs 1024 bytes of scratch memory, not 1023"):
        run(plan, all_tensors(plan, sizes, fake.device), sizes, memory)


def test_the_fake_sees_what_the_library_would_not(fake: FakeTensorRt) -> None:
    plan, sizes = loaded(fake), Sizes(3)
    tensors = all_tensors(plan, sizes, fake.device)
    with pytest.raises(Misuse, match="x_out overlaps x"):
        run(plan, {**tensors, "x_out": tensors["x"]}, sizes)
    with pytest.raises(Misuse, match="qkv: no live tensor"):
        run(plan, {**tensors, "qkv": tensors["qkv"][:2].clone()}, sizes)
    with pytest.raises(Misuse, match="attended: no live tensor"):
        run(plan, {**tensors, "attended": tensors["attended"].half()}, sizes)
    with pytest.raises(Misuse, match="x has no address"):
        run(plan, {name: tensor for name, tensor in tensors.items() if name != "x"}, sizes)
    context = plan.context(sizes, scratch_memory([plan], fake.device), current_stream(fake.device))
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    del tensors["o.weight"]
    with pytest.raises(Misuse, match=r"o\.weight: no live tensor"):
        context.run(addresses, current_stream(fake.device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_the_real_library_says_why_it_does_not_load_a_plan() -> None:
    library, spec = library_or_skip(), mid_segment().spec
    with pytest.raises(
        EngineError, match=r"plan 'mid' cannot be loaded: .*CUDA driver.*; install a newer NVIDIA driver$"
    ):
        PlanRuntime.start(library).load("mid", b"no plan", spec)


def test_every_family_has_a_plan_that_loads(fake: FakeTensorRt) -> None:
    runtime = PlanRuntime.start(fake_library(fake))
    for changes in FAMILIES.values():
        for kind in ("first", "mid", "last"):
            spec = placed(tiny_arch(**changes), "bfloat16", "inputs", kind).spec
            runtime.load(kind, fake_plan(spec), spec)
