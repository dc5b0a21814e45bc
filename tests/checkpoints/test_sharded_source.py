"""Shards of checkpoints: in every family and format, ranks together compute and hold what one rank alone does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmengine.checkpoints import dummy_weights
from llmengine.checkpoints.model_saving import save_model
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source, rounded_weights
from llmengine.checkpoints.sharded_source import ShardPlan, join_shards, shard_source
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.errors import ConfigError, UnsupportedModelError
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.models.sharding import Shard
from llmengine.quant_config import QuantConfig
from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.model_formats import ModelFormats
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4
from tests.checkpoints.helpers import make_model
from tests.checkpoints.quantized_files import write_quantized
from tests.checkpoints.quantized_layouts import LAYOUTS, make
from tests.models.arch_helpers import SMALL_ARCH
from tests.models.family_helpers import FAMILIES, make_family, write_family_gguf
from tests.models.rank_threads import logits_of

TOKENS = [3, 100, 17, 55, 8, 8, 91, 20, 42, 61, 99, 5]
FORMATS: list[WeightFormat] = [
    INT8,
    Int4Groups(16),
    Int4Groups(32, zero_points=False, scale_dtype="bfloat16"),
    Int4Groups(128, input_scale=True),
    Int4Groups(-1),
    Int8Groups(32),
    Int8Groups(-1, zero_points=False),
    Int8W8A8(),
    Int8W8A8("tensor", input_scale=True),
    Fp8("tensor", "none"),
    Fp8(),
    Mxfp4(),
    Nvfp4(),
    Nvfp4("channel"),
    Bnb4Bit("nf4", 16),
    GGUF_BLOCKS["Q8_0"],
    GGUF_BLOCKS["Q5_1"],
]
by_format = pytest.mark.parametrize("stored", FORMATS, ids=str)
by_size = pytest.mark.parametrize("size", [2, 3, 4])


def in_format(source: ModelSource, stored: WeightFormat, **exceptions: WeightFormat) -> ModelSource:
    """A source whose matrices are rounded to nearest; the output matrix is int8, as a rule."""
    formats = ModelFormats(stored, {"lm_head": INT8, **exceptions})
    return dataclasses.replace(
        source,
        formats=formats,
        stream_slices=None,
        stream=lambda dtype: rounded_weights(source.arch, formats, source.weights(dtype)),
    )


def saved(path: Path, model: Any) -> ModelSource:
    model.save_pretrained(path)
    return open_model(path)


def transformers_logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0].float()


def assert_ranks_compute_the_same(source: ModelSource, size: int, expected: Tensor | None = None) -> None:
    whole = logits_of(source, TOKENS, 1) if expected is None else expected
    found = logits_of(source, TOKENS, size)
    assert found.shape == whole.shape
    torch.testing.assert_close(found, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


def assert_shards_join(source: ModelSource, size: int, dtype: torch.dtype = torch.float32) -> None:
    """Shards are what their formats say (`weights` checks that), and put together the whole, bit for bit."""
    plan = ShardPlan(source.arch, source.formats, size)
    shards = [dict(shard_source(source, Shard(rank, size)).weights(dtype)) for rank in range(size)]
    for name, whole in source.weights(dtype):
        pieces = [shard[name] for shard in shards]
        joined = plan.join(name, pieces)
        assert (joined.dtype, joined.shape) == (whole.dtype, whole.shape), name
        assert torch.equal(joined.flatten().view(torch.uint8), whole.flatten().view(torch.uint8)), name
        for piece in pieces:
            assert piece.untyped_storage().nbytes() == piece.nbytes, f"{name} keeps more than its shard"


@by_size
@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str, size: int) -> None:
    model = make_family(family)
    source = saved(tmp_path, model)
    # transformers chooses the frequencies of a short text for this one, serving those of the longest context.
    expected = None if family == "phi3_long" else transformers_logits(model)
    assert_ranks_compute_the_same(source, size, expected)
    assert_shards_join(source, size)


@by_size
def test_uneven_heads_biases_and_rows(tmp_path: Path, size: int) -> None:
    model = make_model(
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=101,
        vocab_size=103,
        attention_bias=True,
        mlp_bias=True,
    )
    source = saved(tmp_path, model)
    assert_ranks_compute_the_same(source, size, transformers_logits(model))
    assert_shards_join(source, size, torch.bfloat16)
    first, last = (shard_source(source, Shard(rank, size)) for rank in (0, size - 1))
    assert first.arch.num_heads != last.arch.num_heads or size == 3
    for name, tensor in last.weights(torch.float32):
        assert name.endswith(("o.bias", "down.bias")) == (not tensor.any()), name


@by_size
@by_format
def test_formats(tmp_path: Path, stored: WeightFormat, size: int) -> None:
    """Groups of 32 and 128 columns are divided where a rank has 16 of `o`, except in formats that have no others."""
    source = in_format(saved(tmp_path, make_family("qwen2", intermediate_size=256)), stored)
    cannot = stored.finest().step("in") > 16 and size > 2
    if cannot:
        with pytest.raises(ConfigError, match=rf"tp_size={size}: 4 attention heads .* units of 32.*: 1, 2$"):
            shard_source(source, Shard(0, size))
        return
    assert_ranks_compute_the_same(source, size)
    assert_shards_join(source, size)


def test_groups_are_divided_only_where_they_must(tmp_path: Path) -> None:
    source = in_format(saved(tmp_path, make_family("qwen2", intermediate_size=256)), Int4Groups(32))
    shard = shard_source(source, Shard(1, 4))
    assert shard.formats.of("layers.0.o") == Int4Groups(16)
    assert {shard.formats.of(f"layers.2.{name}") for name in ("qkv", "gate_up", "down")} == {Int4Groups(32)}
    assert shard_source(source, Shard(1, 2)).formats == source.formats


@by_size
def test_blocks_of_rows_and_columns(tmp_path: Path, size: int) -> None:
    model = make_model(
        hidden_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=128, intermediate_size=640
    )
    source = in_format(saved(tmp_path, model), Fp8("block", "block"), lm_head=DENSE)
    assert_ranks_compute_the_same(source, size)
    assert_shards_join(source, size)
    shares = [shard_source(source, Shard(rank, size)).arch.intermediate_size for rank in range(size)]
    assert shares == {2: [384, 256], 3: [256, 256, 128], 4: [256, 128, 128, 128]}[size]


def test_column_orders_are_refused(tmp_path: Path) -> None:
    source = in_format(
        saved(tmp_path, make_family("qwen2")), DENSE, **{"layers.1.down": Int4Groups(16, input_order=True)}
    )
    with pytest.raises(ConfigError, match=r"tp_size=2: .*64 x 48 weights .*'int4'.* act-order.*sizes that work: 1$"):
        shard_source(source, Shard(0, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantized_checkpoints(tmp_path: Path, layout: str) -> None:
    """Tools' own layouts, some of whose matrices are stacked or have scales for their inputs."""
    model = make("qwen2", num_hidden_layers=1, num_key_value_heads=2)
    write_quantized(tmp_path, model, LAYOUTS[layout][0])
    source = open_model(tmp_path)
    if any(getattr(item, "input_order", False) for item in source.formats.kinds):
        with pytest.raises(ConfigError, match=r"tp_size=2: .* act-order; it cannot be cut along them; .* work: 1$"):
            shard_source(source, Shard(0, 2))
        return
    assert_ranks_compute_the_same(source, 2)
    assert_shards_join(source, 2, torch.bfloat16)


ROUNDED: dict[str, tuple[QuantConfig, set[str]]] = {
    "int8": (QuantConfig(weights="int8"), {"qkv", "gate_up", "lm_head"}),
    "int4": (QuantConfig.preset("int4-rtn", group_size=16), {"qkv", "gate_up", "o", "down", "lm_head"}),
    "int4-64": (QuantConfig.preset("int4-rtn", group_size=64), {"qkv", "gate_up", "o", "down", "lm_head"}),
    "fp8": (QuantConfig(weights="fp8"), {"qkv", "gate_up", "lm_head"}),
    "w8a8-tensor": (
        QuantConfig(weights="int8", activations="token", scales="tensor", method="rtn"),
        {"lm_head"},
    ),
    "mxfp4": (QuantConfig(weights="mxfp4", method="rtn"), {"qkv", "gate_up", "o", "down", "lm_head"}),
    "skipped": (QuantConfig(weights="int8", skip_layers=["*.down"]), {"qkv", "gate_up", "lm_head", "down"}),
}


@pytest.mark.parametrize("kind", ROUNDED)
def test_what_is_rounded_as_it_loads_is_cut_first_where_that_changes_nothing(tmp_path: Path, kind: str) -> None:
    config, cut_first = ROUNDED[kind]
    model = make_family("qwen3", hidden_size=128, intermediate_size=256, num_attention_heads=4)
    source = quantized_source(saved(tmp_path, model), config.resolve())
    assert source.unrounded is not None
    slices = ShardPlan(source.arch, source.formats, 2).slices(1, is_rounding=True)
    assert {name.split(".")[-2] for name in slices} == {*cut_first, "embed_tokens"}
    for size in (2, 4):
        assert_shards_join(source, size)
    by_slices = dataclasses.replace(source, unrounded=dataclasses.replace(source.unrounded, stream=_fails))
    shard = shard_source(by_slices, Shard(1, 2))
    found = dict(shard.weights(torch.float32))
    assert (shard.unrounded is None) == (not {"o", "down"} <= cut_first)
    if shard.unrounded is not None:
        for name, tensor in rounded_weights(shard.arch, shard.formats, shard.unrounded.weights(torch.float32)):
            assert torch.equal(found.pop(name), tensor), name
        assert not found


def test_loading_a_shard_ends_where_it_is_asked_to(tmp_path: Path) -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(0)
        if len(calls) == 5:
            raise KeyboardInterrupt

    source = quantized_source(saved(tmp_path, make_family("qwen3")), QuantConfig(weights="int8").resolve(), check=check)
    weights = shard_source(source, Shard(0, 2)).weights(torch.float32)
    with pytest.raises(KeyboardInterrupt):
        list(weights)
    assert len(calls) == 5


def test_saved_engines(tmp_path: Path) -> None:
    source = in_format(saved(tmp_path / "model", make_family("gemma3")), Int4Groups(16))
    weights = source.weights(torch.bfloat16)
    save_model(tmp_path / "engine", source, weights, dtype="bfloat16", formats=source.formats, tokenizer=None)
    assert_shards_join(open_model(tmp_path / "engine"), 3, torch.bfloat16)


GGUF_TYPES: dict[str, Callable[[str, int], str]] = {
    "stacked": lambda name, _: {"attn_v": "Q8_0", "ffn_up": "Q5_0", "token_embd": "Q8_0"}.get(_kind(name), "Q4_0"),
    "k_quants": lambda name, _: {"attn_v": "Q6_K", "ffn_down": "Q6_K", "attn_output": "Q5_K"}.get(_kind(name), "Q4_K"),
    "dense_part": lambda name, _: {"attn_k": "F32", "ffn_gate": "F16"}.get(_kind(name), "IQ4_NL"),
}


QKV = ("attn_q", "attn_k", "attn_v", "attn_qkv")


def _kind(name: str) -> str:
    return name.split(".")[-2]


@by_size
@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_gguf_files(tmp_path: Path, kind: str, size: int) -> None:
    model = make_family("mistral", hidden_size=256, intermediate_size=1024, head_dim=128, num_attention_heads=8)
    write_family_gguf(tmp_path / "model.gguf", model, GGUF_TYPES[kind])
    source = open_model(tmp_path / "model.gguf")
    assert source.formats.of("layers.0.qkv").name == "stacked"
    assert_ranks_compute_the_same(source, size)
    assert_shards_join(source, size)


def test_gguf_tied_and_fused(tmp_path: Path) -> None:
    model = make_family("phi3", hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    write_family_gguf(tmp_path / "model.gguf", model, "Q8_0")
    source = open_model(tmp_path / "model.gguf")
    assert source.arch.tie_word_embeddings
    assert_ranks_compute_the_same(source, 2)
    assert_shards_join(source, 2)
    shard = shard_source(source, Shard(1, 2))
    assert shard.formats.of("lm_head") == source.formats.of("lm_head") == GGUF_BLOCKS["Q8_0"]


@by_size
@pytest.mark.parametrize("kind", ["safetensors", "bin", "F16", "BF16", "F32", "Q4_0"])
@pytest.mark.parametrize("family", ["mistral", "phi3_short", "gemma3"])
def test_readers_read_what_a_rank_has_of_dense_tensors(tmp_path: Path, family: str, kind: str, size: int) -> None:
    model = make_family(family).to(torch.bfloat16)
    if kind in ("safetensors", "bin"):
        source = saved(tmp_path, model)
        if kind == "bin":
            (tmp_path / "model.safetensors").unlink()
            torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
            source = open_model(tmp_path)
    else:
        write_family_gguf(tmp_path / "model.gguf", model, lambda name, _: kind if _kind(name) in QKV else "F16")
        source = open_model(tmp_path / "model.gguf")
    plan = ShardPlan(source.arch, source.formats, size)
    by_slices = dataclasses.replace(source, stream=_fails)
    for dtype in (torch.bfloat16, torch.float32):
        whole = dict(source.weights(dtype))
        for rank in range(size):
            slices = plan.slices(rank)
            assert ("layers.1.qkv.weight" in slices) == (kind != "Q4_0")
            assert {"layers.1.gate_up.weight", "layers.0.down.weight", "embed_tokens.weight"} <= slices.keys()
            for name, tensor in shard_source(by_slices, Shard(rank, size)).weights(dtype):
                assert torch.equal(tensor, plan.shard(name, whole[name], rank)), name


@by_size
@pytest.mark.parametrize("length", [101, 1 << 20])
def test_random_weights_are_made_in_part(
    tmp_path: Path, size: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dummy_weights, "_NOISE_LENGTH", length)
    saved(tmp_path, make_family("qwen2"))
    source = dummy_weights.open_dummy(tmp_path)
    plan = ShardPlan(source.arch, source.formats, size)
    by_slices = dataclasses.replace(source, stream=_fails)
    whole = dict(source.weights(torch.float16))
    assert len({tuple(tensor.flatten()[:50].tolist()) for tensor in whole.values() if tensor.ndim == 2}) > 4
    for rank in range(size):
        shard = dict(shard_source(by_slices, Shard(rank, size)).weights(torch.float16))
        assert shard.keys() == whole.keys()
        for name, tensor in shard.items():
            assert torch.equal(tensor, plan.shard(name, whole[name], rank)), name


def _fails(dtype: torch.dtype) -> Any:
    raise AssertionError("the whole was read")


@settings(max_examples=150)
@given(
    stored=st.sampled_from(
        [DENSE, *FORMATS, Int4Groups(64), Int8Groups(128), Bnb4Bit("fp4", 128), Fp8("block", "block")]
    ),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 48, 128]),
    intermediate=st.integers(2, 40),
    vocab=st.integers(5, 300),
    size=st.integers(2, 5),
    tied=st.booleans(),
)
def test_any_shape_has_shards_that_join_or_is_refused_with_sizes(
    stored: WeightFormat,
    kv_heads: int,
    group: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    size: int,
    tied: bool,
) -> None:
    arch = dataclasses.replace(
        SMALL_ARCH,
        num_layers=1,
        hidden_size=64,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=16 * intermediate,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        mlp_bias=True,
    )
    source = random_source(arch, stored)
    try:
        assert_shards_join(source, size)
    except ConfigError as error:
        works = [int(item) for item in str(error).partition("sizes that work: ")[2].split(", ")]
        assert 1 in works
        assert size not in works
        for other in works[1:]:
            assert_shards_join(source, other)
    except UnsupportedModelError:  # the whole matrix cannot have this format either
        with pytest.raises(UnsupportedModelError):
            source.formats.layout(arch, "float32")


def random_source(arch: ModelArch, stored: WeightFormat) -> ModelSource:
    def stream(dtype: torch.dtype) -> WeightStream:
        generator = torch.Generator().manual_seed(0)
        for name, shape in canonical_shapes(arch).items():
            yield name, torch.randn(shape, generator=generator).to(dtype)

    nowhere = Path("nowhere")
    dense = ModelSource("dummy", nowhere, arch, "float32", {}, (), None, nowhere, stream)
    return in_format(dense, stored)


def test_one_tensor_is_joined(tmp_path: Path) -> None:
    source = saved(tmp_path, make_family("qwen2"))
    shards = [dict(shard_source(source, Shard(rank, 4)).weights(torch.float32)) for rank in range(4)]
    name = "layers.1.qkv.bias"
    joined = join_shards(name, source.arch, [shard[name] for shard in shards], 4)
    assert torch.equal(joined, dict(source.weights(torch.float32))[name])


def test_one_rank_has_the_source(tmp_path: Path) -> None:
    source = saved(tmp_path, make_family("olmo2"))
    assert shard_source(source, Shard(0, 1)) is source
