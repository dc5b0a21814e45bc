"""The CUDA backend compiles at its start exactly the forms of kernels that its steps launch later.

Nothing runs here: launches are recorded by what Triton compiles a kernel for.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from llmengine.backends.cuda.backend import CudaBackend
from llmengine.backends.cuda.compile_threads import compile_threads
from llmengine.backends.cuda.fused_segments import FusedSegments
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.config import KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.kernels.gemm_config import GemmShape, LinearConfig
from llmengine.kernels.linear_ops import compile_product
from llmengine.sampling_params import SamplingParams
from tests.backends.helpers import BackendDriver, save_tiny
from tests.models.family_helpers import make_family

OPTIONS = ("num_warps", "num_stages", "launch_pdl", "enable_fp_fusion")

Form = tuple[str, ...]
"""A kernel's name, and what is compiled for each of its arguments."""


@pytest.fixture
def launched(device: str, monkeypatch: pytest.MonkeyPatch) -> set[Form]:
    """Forms of the kernels that were launched, or compiled without being launched."""
    if device != "cpu":
        pytest.skip("launches are recorded in the interpreter")
    forms: set[Form] = set()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = [f"{name}={kwargs.pop(name)}" for name in OPTIONS if name in kwargs]
        forms.add((kernel.__name__, *specialized(kernel, args, kwargs), *options))

    def compile_on_cpu(segments: FusedSegments, shape: GemmShape, config: LinearConfig) -> None:
        compile_product(segments._kernels, shape, config)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    monkeypatch.setattr(FusedSegments, "_compile", compile_on_cpu)  # selects no CUDA device
    return forms


def specialized(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[str]:
    """Yield what Triton specializes on: constants and None, types, 1, and numbers and addresses divisible by 16."""
    unspecialized = kernel.kwargs.get("do_not_specialize") or ()
    annotations = inspect.get_annotations(kernel.fn)
    for name, value in inspect.signature(kernel.fn).bind(*args, **kwargs).arguments.items():
        if value is None or "constexpr" in str(annotations.get(name)):
            form = repr(value)
        elif isinstance(value, torch.Tensor):
            form = f"{value.dtype} {'aligned' * (value.data_ptr() % 16 == 0)}"
        elif isinstance(value, float) or name in unspecialized:
            form = type(value).__name__
        else:
            form = "1" if value == 1 else f"int {'aligned' * (value % 16 == 0)}"
        yield f"{name}={form}"


def load(directory: Path, **settings: Any) -> CudaBackend:
    config = ModelConfig(
        directory,
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 22),
        scheduler_config=SchedulerConfig(max_batch_size=20, max_tokens_per_step=48, max_tokens_per_mixed_step=48),
        **{"dtype": "float16", **settings},
    ).resolve()
    source = quantized_source(open_model(directory), config.quant_config)
    return load_cuda_backend(config, source, torch.device("cpu", 0))


def serve(backend: CudaBackend) -> None:
    """Run steps of all kinds and many sizes: chunks, decodes, greedy, drawn, edited and masked ones."""
    driver = BackendDriver(backend)
    drawn = SamplingParams(temperature=1.0, top_k=5, repetition_penalty=1.2, bad_words=[(5, 6)], logprobs=2)
    requests = [driver.add(slot, [3] * 4, None if slot < 17 else drawn) for slot in range(20)]
    driver.step(*[(request, 4) for request in requests[:12]])
    driver.step(*[(request, 1) for request in requests[:12]], *[(request, 4) for request in requests[12:]])
    for count in (1, 2, 3, 8, 17, 20):
        driver.step(*[(request, 1) for request in requests[:count]])
    batch = driver.batch((requests[0], 1), (requests[1], 1))
    backend.launch(replace(batch, masks={0: bytes(-(-backend.info.vocab_size // 32) * 4)}))
    backend.collect()


PRODUCTS = {
    "_rms_norm_kernel",
    "_skinny_kernel",
    "packed_kernel",
    "dequantize_kernel",
    "scaled_kernel",
    "quantize_rows_kernel",
}
"""What models without fused kernels compile with their first step."""

SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "deterministic": {"deterministic": True},
    "fp8 cache": {"quant_config": QuantConfig(kv_cache="fp8")},
    "int4": {"quant_config": QuantConfig.preset("int4-rtn", group_size=32)},
    "fp8": {"quant_config": QuantConfig.preset("fp8")},
    "int4, deterministic": {
        "quant_config": QuantConfig.preset("int4-rtn", group_size=32, kv_cache="fp8"),
        "deterministic": True,
    },
}

MODELS: dict[str, Callable[[Path], Any]] = {
    "llama": lambda directory: save_tiny(directory, vocab_size=101),
    "gemma3": lambda directory: make_family("gemma3", num_hidden_layers=2).save_pretrained(directory),
    "qwen3": lambda directory: make_family("qwen3", num_hidden_layers=2).save_pretrained(directory),
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_steps_launch_only_what_was_compiled(tmp_path: Path, launched: set[Form], model: str, settings: str) -> None:
    MODELS[model](tmp_path)
    backend = load(tmp_path, **SETTINGS[settings])
    program, sizes = backend._program, backend._sizes
    assert program is not None
    launched.clear()
    with torch.inference_mode():
        compiled: set[Form] = set()
        for call in program.compilations(sizes):
            call()
            assert len(launched - compiled) <= 3, "kernels that could be compiled beside each other"
            compiled |= launched
        launched.clear()
        for bucket in sizes.kernel_buckets():
            program.run(bucket)
    left_over = {name for name, *_ in launched - compiled}
    assert left_over <= (PRODUCTS if model == "gemma3" else set()), "steps compile one kernel after the other"
    compiled |= launched
    launched.clear()
    serve(backend)
    assert len({name for name, *_ in launched}) >= 8, "steps do launch kernels"
    compiled_late = sorted(launched - compiled)
    assert not compiled_late, "requests wait while kernels are compiled"
    backend.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_threads_that_compile_leave_the_processors_to_the_one_that_loads() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own = niceness()
    with compile_threads() as threads:
        assert threads.submit(niceness).result() == min(19, own + 10)
        assert niceness() == own


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_threads_compile_in_a_process_that_is_as_nice_as_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpriority", lambda which, who: 15)
    with compile_threads() as threads:
        assert threads.submit(int).result() == 0
