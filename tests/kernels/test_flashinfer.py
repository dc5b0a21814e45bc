"""FlashInfer's decode attention behind our interface: the real kernel where it is installed on a GPU, else a stand-in.

The stand-in computes plainly, asks for what the real kernel asks for, and has its signature.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llmengine.backends import load_backend
from llmengine.backends.cuda import attention_choice, model
from llmengine.backends.cuda.attention_choice import DecodeChoice, choose_decode
from llmengine.backends.cuda.backend import CudaBackend
from llmengine.backends.cuda.loading import load_cuda_backend
from llmengine.checkpoints.opening import open_model
from llmengine.config import KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.errors import ConfigError
from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.attention_reference import decode_attention_reference, rope_and_write_reference
from llmengine.kernels.flashinfer_attention import FlashInferDecode, unsupported
from llmengine.kernels.step import NUM_DECODES
from tests.backends.cuda.test_backend import SMALL, make_prompt
from tests.backends.helpers import BackendDriver, save_tiny
from tests.kernels.test_paged_attention import Case, copy_into, make_case, norms, rotations

HAS_REAL = importlib.util.find_spec("flashinfer") is not None
HOPPER = (9, 0)


def plain_xqa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    output: Tensor,
    workspace_buffer: Tensor,
    semaphores: Tensor,
    num_kv_heads: int,
    page_size: int,
    sinks: Tensor | None = None,
    q_scale: float | Tensor = 1.0,
    kv_scale: float | Tensor = 1.0,
    sliding_win_size: int = 0,
    kv_layout: str = "NHD",
    sm_count: int | None = None,
    enable_pdl: bool | None = None,
    rcp_out_scale: float = 1.0,
    q_seq_len: int = 1,
    mask: Tensor | None = None,
    *,
    q_cu_seq_lens: Tensor | None = None,
    k_sf_cache: Tensor | None = None,
    v_sf_cache: Tensor | None = None,
) -> None:
    """Check everything that the kernel takes for granted, since it reads raw addresses; then compute row by row."""
    num_rows, beams, num_heads, head_dim = q.shape
    assert (kv_layout, beams, num_heads % num_kv_heads) == ("HND", 1, 0)
    assert q.dtype == k_cache.dtype == v_cache.dtype == output.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert k_cache.shape == v_cache.shape == (len(k_cache), num_kv_heads, page_size, head_dim)
    assert k_cache.stride() == v_cache.stride(), "only the keys' strides are looked at"
    assert k_cache.stride(-1) == 1
    assert all(stride % head_dim == 0 for stride in k_cache.stride()[:-1]), "strides are counted in heads"
    assert page_table.dtype == torch.int32
    assert page_table.shape[0] == num_rows
    assert seq_lens.dtype == semaphores.dtype == torch.uint32
    assert seq_lens.shape == (num_rows, 1)
    assert output.shape == q.shape
    for tensor in (q, page_table, seq_lens, output, workspace_buffer, semaphores):
        assert tensor.is_contiguous()
    assert semaphores.numel() >= num_rows * num_kv_heads
    assert not semaphores.view(torch.int32).any(), "splits are counted from zero"
    for row, length in enumerate(seq_lens[:, 0].tolist()):
        assert length > 0
        pages = page_table[row, : -(-length // page_size)].long()
        begin = max(0, length - sliding_win_size) if sliding_win_size else 0
        # [num_kv_heads, tokens, head_dim] each
        k, v = (
            cache[pages]
            .transpose(0, 1)
            .flatten(1, 2)[:, begin:length]
            .float()
            .repeat_interleave(len(q[row, 0]) // num_kv_heads, 0)
            for cache in (k_cache, v_cache)
        )
        scores = torch.einsum("hd,htd->ht", q[row, 0].float(), k) * (float(q_scale) * head_dim**-0.5)
        output[row, 0] = torch.einsum("ht,htd->hd", scores.softmax(-1), v).to(output.dtype)


def install(monkeypatch: pytest.MonkeyPatch, xqa: Any = plain_xqa) -> None:
    """Let `import flashinfer.xqa` find the given function."""
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.xqa")
    package.__spec__ = ModuleSpec("flashinfer", None, origin="here")
    package.__path__ = []
    module.xqa = xqa  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.xqa", module)


@pytest.fixture
def flashinfer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real kernel on a GPU where it is installed, `plain_xqa` elsewhere."""
    if device == "cpu" or not HAS_REAL:
        install(monkeypatch)


@pytest.fixture(autouse=True)
def on_hopper(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, make torch report an H100. Nothing is kept outside of the test."""
    monkeypatch.setenv("LLMENGINE_CACHE_DIR", str(tmp_path / "cache"))
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: HOPPER)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")


@pytest.mark.skipif(not HAS_REAL, reason="FlashInfer is not installed")
def test_the_real_entry_point_takes_what_ours_is_tested_with() -> None:
    real = inspect.signature(importlib.import_module("flashinfer.xqa").xqa).parameters
    ours = inspect.signature(plain_xqa).parameters
    assert [(name, p.kind, p.default) for name, p in real.items()] == [
        (name, p.kind, p.default) for name, p in ours.items()
    ]


def finite(case: Case) -> Case:
    """Return the case with zeros for NaN in the pool: of a block, tokens beyond the context are multiplied by 0."""
    case.kv.numbers.nan_to_num_(0.0)
    return case


def num_sms(device: str) -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 4


def assert_attends_like_the_reference(
    decode: FlashInferDecode, config: AttentionConfig, case: Case, expected: Case, norm: Sequence[Tensor]
) -> None:
    """Compare what has run on `case` with the references on `expected`; decodes, chunks' q and the pool."""
    rope, num_decodes = rotations(config, str(case.qkv.device)), int(case.step.counts[NUM_DECODES])
    decode_attention_reference(case.step, expected.qkv, expected.kv, rope, config, expected.out, *norm)
    rope_and_write_reference(case.step, expected.qkv, expected.kv, rope, config, *norm)
    tolerance = 3e-3 if case.out.dtype == torch.float16 else 3e-2
    pairs = [(case.qkv, expected.qkv), (case.kv.numbers, expected.kv.numbers)]
    for found, wanted in [*pairs, (case.out[:num_decodes], expected.out[:num_decodes])]:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    num_rows = len(case.step.row_slots)
    assert case.out[:num_rows].isfinite().all(), "chunks of prompts come after it"
    assert case.out[num_rows:].isnan().all()


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "window", "scale"),
    [(2, 2, 128, 0, 0.0), (9, 3, 64, 0, 0.3), (4, 1, 80, 19, 0.0), (2, 1, 256, 0, 0.0)],
)
def test_a_mixed_step_equals_the_reference(
    heads: int, kv_heads: int, dim: int, window: int, scale: float, device: str
) -> None:
    dtype = torch.bfloat16 if device == "cuda" and window == 0 else torch.float16
    config = AttentionConfig(heads, kv_heads, dim, block_size=32, scale=scale, sliding_window=window)
    decodes = [1, 2, 32, 33, 40] if device == "cpu" else [1, 2, 32, 33, 256, 257, 700, 1000]
    case = finite(make_case(config, decodes, [(5, 5), (70, 9)], device, dtype))
    expected, norm = case.clone(), norms(config, device, dtype) if window else ()
    num_rows, max_blocks = len(case.step.row_slots), case.step.block_tables.shape[1]
    decode = FlashInferDecode(config, dtype, num_rows + 3, max_blocks + 5, num_sms(device), device)
    decode.compile(config)
    decode.begin(case.step, num_rows)
    decode.attend(case.step, case.qkv, case.kv, rotations(config, device), config, case.out, *norm)
    assert_attends_like_the_reference(decode, config, case, expected, norm)


@pytest.mark.usefixtures("flashinfer")
def test_one_graph_replays_any_step_that_fits(device: str) -> None:
    if device == "cpu" or not HAS_REAL:
        pytest.skip("needs CUDA graphs and the real kernel")
    config, dtype = AttentionConfig(32, 8, 128, block_size=32), torch.bfloat16
    rope = rotations(config, device)
    captured = finite(make_case(config, [1000] * 8, [(1000, 200)] * 2, device, dtype))
    num_rows, max_blocks = len(captured.step.row_slots), captured.step.block_tables.shape[1]
    decode = FlashInferDecode(config, dtype, num_rows, max_blocks, num_sms(device), device)

    def run() -> None:
        decode.begin(captured.step, num_rows)
        decode.attend(captured.step, captured.qkv, captured.kv, rope, config, captured.out, pdl=True)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    mixes = [([600, 3], [(700, 250)]), ([1, 880, 512, 257, 64, 999], []), ([], [(400, 300)])]
    for seed, (decodes, chunks) in enumerate(mixes):
        case = finite(make_case(config, decodes, chunks, device, dtype, seed))
        expected = case.clone()
        decode_attention_reference(case.step, expected.qkv, expected.kv, rope, config, expected.out)
        copy_into(captured, case)
        for _ in range(3):  # the splits' counters are back at zero each time
            graph.replay()
        found = captured.out[: len(decodes)]
        torch.testing.assert_close(found, expected.out[: len(decodes)], rtol=3e-2, atol=3e-2)


def config_of(
    directory: Path | str, attention_backend: Any = "flashinfer", max_batch_size: int = 8, **settings: Any
) -> ModelConfig:
    settings = {"dtype": "float16"} | settings
    return ModelConfig(
        directory,
        attention_backend=attention_backend,
        kv_cache_config=KvCacheConfig(block_size=16, max_bytes=1 << 20),
        scheduler_config=SchedulerConfig(
            max_batch_size=max_batch_size, max_tokens_per_step=16, max_tokens_per_mixed_step=16
        ),
        **settings,
    ).resolve()


def outputs_of(backend: CudaBackend) -> list[list[int]]:
    """Return the tokens of two requests from a step of chunks, a mixed step and a step of decodes."""
    driver = BackendDriver(backend, seed=3)
    first, second = (driver.add(slot, make_prompt(length, length)) for slot, length in ((1, 16), (0, 5)))
    driver.step((first, 16))
    driver.step((first, 1), (second, 5))
    driver.step((first, 1), (second, 1))
    return [first.output_ids, second.output_ids]


def test_a_model_generates_the_same_with_it(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda" and not HAS_REAL:
        pytest.skip("what stands in for it cannot be captured")
    num_calls = 0

    def counting(*args: Any, **settings: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        plain_xqa(*args, **settings)

    if device == "cpu":
        install(monkeypatch, counting)
    save_tiny(tmp_path, **SMALL, num_hidden_layers=1)
    outputs = {}
    for name in ("auto", "flashinfer"):
        backend = load_cuda_backend(config_of(tmp_path, name, 2), open_model(tmp_path), torch.device(device, 0))
        assert ("FlashInfer" in backend.info.description) == (name == "flashinfer")
        outputs[name] = outputs_of(backend)
        backend.close()
    assert outputs["flashinfer"] == outputs["auto"]
    if device == "cpu":
        assert num_calls == 1 + 3, "when it is loaded, and in the layer of each step"


LAYER = AttentionConfig(8, 2, 64)


@pytest.mark.parametrize(
    ("layer", "dtype", "capability", "message"),
    [
        (LAYER, torch.float16, (8, 9), "compute capability 8.9; there are kernels for 9, 10, 12 only"),
        (LAYER, torch.float32, HOPPER, "dtype float32; there are kernels for float16, bfloat16 only"),
        (AttentionConfig(8, 2, 64, block_size=256), torch.float16, HOPPER, "block_size=256"),
        (AttentionConfig(8, 2, 288), torch.float16, HOPPER, "head_dim=288"),
        (AttentionConfig(8, 2, 100), torch.float16, HOPPER, "head_dim=100"),
        (AttentionConfig(66, 2, 64), torch.float16, HOPPER, "33 query heads"),
        (AttentionConfig(8, 2, 64, soft_cap=50.0), torch.float16, HOPPER, "capped at 50"),
    ],
)
def test_what_it_cannot_do_is_said(
    layer: AttentionConfig, dtype: torch.dtype, capability: tuple[int, int], message: str
) -> None:
    assert message in str(unsupported(layer, dtype, capability))
    fits = AttentionConfig(32, 1, 256, block_size=128, sliding_window=5)
    assert unsupported(fits, torch.bfloat16, (12, 0)) is None


def choose(attention_backend: str, device: str, layer: AttentionConfig = LAYER, **settings: Any) -> DecodeChoice:
    config = config_of("d", attention_backend, **settings)
    return choose_decode(config, [layer, layer], torch.float16, 100, torch.device(device, 0), num_sms(device))


def fail_to_compile(*_: Any, **__: Any) -> None:
    raise RuntimeError("Ninja build failed.")


@pytest.mark.parametrize(
    ("installed", "layer", "settings", "message"),
    [
        (None, LAYER, {}, r"not installed \(pip install llmengine\[flashinfer\]\)"),
        (plain_xqa, AttentionConfig(8, 2, 64, soft_cap=5.0), {}, "capped at 5"),
        (plain_xqa, LAYER, {"deterministic": True}, "deterministic=True excludes it"),
        (plain_xqa, LAYER, {"quant_config": QuantConfig(kv_cache="fp8")}, r"kv_cache='fp8' excludes it: .* scales"),
        (fail_to_compile, LAYER, {}, "Ninja build failed"),
    ],
)
def test_where_it_cannot_be_used_a_name_is_an_error_and_a_measurement_ours(
    installed: Any,
    layer: AttentionConfig,
    settings: dict[str, Any],
    message: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if installed is None:
        monkeypatch.setitem(sys.modules, "flashinfer", None)
    else:
        install(monkeypatch, installed)
    with pytest.raises(ConfigError, match=message):
        choose("flashinfer", device, layer, **settings)
    choice = choose("measure", device, layer, **settings)
    assert (choice.of(1), choice.missing) == (None, [])


@pytest.mark.parametrize(
    "settings", [{"attention_backend": "auto"}, {"attention_backend": "measure", "tuning_budget_s": 0}]
)
def test_it_is_not_imported_unasked(settings: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fail_to_compile)
    assert choose(**settings, device=device).of(1) is None


def test_the_faster_is_taken_and_remembered(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    choice = choose("measure", device)
    assert choice.missing == [1, 8]
    assert choice.of(1) is None, "ours, until it is measured"
    assert choice.description == ""
    choice.measure(lambda rows, flashinfer: float(rows) if flashinfer is None else 4.0)
    assert [choice.of(rows) is choice.flashinfer for rows in (1, 2, 8, 9)] == [False, True, True, True]
    assert choice.description == "FlashInfer attention for 8 rows"
    again = choose("measure", device)
    assert again.missing == []
    assert again.faster == choice.faster
    assert choose("measure", device, AttentionConfig(8, 4, 64)).missing == [1, 8], "of other layers nothing is known"


def test_where_ours_is_faster_it_is_not_even_imported_the_next_time(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    choose("measure", device).measure(lambda rows, flashinfer: 1.0 if flashinfer is None else 2.0)
    install(monkeypatch, fail_to_compile)
    again = choose("measure", device)
    assert (again.missing, again.flashinfer, again.of(8)) == ([], None, None)


@pytest.mark.usefixtures("flashinfer")
def test_a_model_measures_all_of_its_layers_when_it_is_loaded(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda" and not HAS_REAL:
        pytest.skip("what stands in for it cannot be captured")
    num_timed = 0

    def time_graph(functions: Sequence[Any]) -> float:
        nonlocal num_timed
        for function in functions:
            function()
        num_timed += 1
        return float(-num_timed)  # the later, the faster: FlashInfer

    monkeypatch.setattr(model, "time_graph", time_graph)
    monkeypatch.setattr(attention_choice, "CONTEXT_TOKENS", 20)
    save_tiny(tmp_path, **SMALL, num_hidden_layers=1)
    backend = load_cuda_backend(config_of(tmp_path, "measure", 4), open_model(tmp_path), torch.device(device, 0))
    assert num_timed == 2, "one row, by both"
    assert backend.info.description.endswith("FlashInfer attention, KV cache in float16")
    backend.close()


def test_a_cpu_has_no_use_for_it(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ConfigError, match="attention_backend='flashinfer' needs a CUDA device"):
        load_backend(config_of(tmp_path, dtype="float32", device="cpu"), open_model(tmp_path))
