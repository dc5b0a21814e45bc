"""GGUF files whose matrices stay as they are: the same weights as in float32, in the memory of the file.

Tokens are the same too where torch multiplies; the native library rounds activations to 8 bits.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from llmengine import LLM, ModelConfig, QuantConfig, SamplingParams
from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cpu.loading import load_cpu_backend
from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.source import ModelSource
from llmengine.errors import ConfigError, UnsupportedModelError
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.gguf_blocks import GGUF_BLOCKS
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats, formats_in_use, matrix_shapes
from llmengine.quantization.stacked import Stacked
from tests.backends.helpers import leave_products_to_torch
from tests.models.family_helpers import make_family, write_family_gguf
from tests.models.test_families import GGUF_FAMILIES

STORED = QuantConfig(weights="stored")
PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
PROMPTS = [[5, 9, 3], [7], list(range(3, 23))]

Q4, Q6, Q8 = (GGUF_BLOCKS[name] for name in ("Q4_K", "Q6_K", "Q8_0"))


def make_wide(family: str, **changes: Any) -> Any:
    """A model of a family whose rows are long enough for blocks of 256 columns, but for those of the down matrices."""
    sizes = {"hidden_size": 256, "intermediate_size": 288}
    if family.startswith("phi3_"):  # whose factors are those of heads of 16
        sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    return make_family(family, **{**GGUF_FAMILIES.get(family, {}), **sizes, **changes})


class MixedTypes:
    """A type for each tensor: K-quants in turn where rows are long enough, others in turn elsewhere."""

    def __init__(self) -> None:
        self._long = cycle(["Q4_K", "Q6_K", "Q5_K", "Q2_K", "Q3_K", "Q4_1", "F16"])
        self._short = cycle(["Q5_0", "Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "F32"])

    def __call__(self, name: str, columns: int) -> str:
        return next(self._short if columns % 256 else self._long)


def like_q4_k_m(name: str, columns: int) -> str:
    """The types of a file of llama.cpp's type Q4_K_M."""
    if columns % 256:
        return "Q8_0"
    return "Q6_K" if name.startswith(("token_embd", "output")) or "attn_v" in name else "Q4_K"


def tokens(place: Path, config: QuantConfig | None = None, save: Path | None = None, **changes: Any) -> list[list[int]]:
    values = ModelConfig(place, device="cpu", num_threads=1, quant_config=config or QuantConfig(), **changes)
    with LLM(values, enable_tokenizer=False) as llm:
        if save is not None:
            llm.save(save)
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_every_family_computes_with_mixed_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    leave_products_to_torch(monkeypatch)
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide(family), MixedTypes())
    assert tokens(path, STORED) == tokens(path, dtype="float32")
    source = open_model(path)
    stored = dict(source.weights(torch.float32))
    shapes = matrix_shapes(source.arch)
    dense = without_blocks(source)
    assert dense.formats.is_dense
    for name, expected in dense.weights(torch.float32):
        matrix = name.removesuffix(".weight")
        if matrix in shapes:
            wanted = source.formats.of(matrix)
            tensors = {suffix: stored[f"{matrix}.{suffix}"] for suffix in wanted.tensors(shapes[matrix], "float32")}
            assert torch.equal(Matrix(wanted, shapes[matrix], tensors).dequantized(), expected), name
        else:
            assert torch.equal(stored[name], expected), name


def test_parts_of_different_types_are_stacked(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide("smollm3"), like_q4_k_m)
    source = open_model(path)
    formats = source.formats
    assert formats.default == Q4
    assert formats.of("embed_tokens") == formats.of("lm_head") == Q6
    assert formats.of("layers.1.qkv") == Stacked.of_rows([(256, Q4), (128, Q4), (128, Q6)])
    assert formats.of("layers.1.gate_up") == formats.of("layers.1.o") == Q4
    assert formats.of("layers.1.down") == Q8
    names = [name for name in formats.layout(source.arch, "float32") if name.startswith("layers.0.qkv")]
    assert names == ["layers.0.qkv.weight", "layers.0.qkv.weight_1", "layers.0.qkv.weight_2"]


def in_use(path: Path, **settings: Any) -> ModelSource:
    return source_in_use(ModelConfig(path, **{"device": "cpu", **settings}).resolve(), open_model(path))


def test_blocks_that_the_library_multiplies_stay_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide("qwen2"), like_q4_k_m)
    for settings in ({}, {"quant_config": QuantConfig(kv_cache="int8")}, {"quant_config": STORED, "dtype": "float32"}):
        source = in_use(path, **settings)
        assert source.formats == open_model(path).formats
        assert source.dequantized == ""
    for settings, reason in (
        ({"dtype": "float32"}, "dtype='float32'"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"quant_config": QuantConfig(weights="int8")}, "quant_config asks for int8"),
        ({"device": "cuda:0", "backend": "tensorrt"}, "TensorRT has no products with them"),
        ({"device": "cuda:0", "dtype": "bfloat16"}, "dtype='bfloat16'"),
    ):
        source = in_use(path, **settings)
        assert source.formats == DENSE_MODEL
        assert source.dequantized == f"gguf-q4_k, gguf-q6_k, gguf-q8_0 dequantized: {reason}"


def test_blocks_that_kernels_multiply_stay_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_products_to_torch(monkeypatch)
    path = tmp_path / "model.gguf"
    write_family_gguf(
        path, make_wide("qwen2"), lambda name, columns: "TQ1_0" if "attn_k" in name else like_q4_k_m(name, columns)
    )
    stored = open_model(path).formats
    for settings in ({"quant_config": STORED}, {"quant_config": STORED, "dtype": "bfloat16"}):
        assert in_use(path, device="cuda:0", **settings).formats == stored
    for settings in ({}, {"quant_config": QuantConfig(kv_cache="fp8")}):
        source = in_use(path, device="cuda:0", **settings)
        assert source.formats.of("layers.1.qkv") == Stacked.of_rows([(256, Q4), (128, DENSE), (128, Q6)])
        assert source.formats.of("embed_tokens") == source.formats.of("lm_head") == Q6
        assert source.dequantized == "gguf-tq1_0 dequantized: no kernel multiplies by them"
    source = in_use(path, device="cuda:0", quant_config=QuantConfig(weights="int8"))
    assert source.formats == DENSE_MODEL


def test_without_the_library_blocks_are_dequantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_products_to_torch(monkeypatch)
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide("qwen2"), "Q8_0")
    assert in_use(path).dequantized == "gguf-q8_0 dequantized: no native library: the test has none"
    assert in_use(path, quant_config=STORED).formats == open_model(path).formats


def test_types_without_a_native_product_are_dequantized_beside_the_others(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide("mistral"), lambda name, _: "TQ1_0" if "attn_v" in name else "Q4_0")
    source = in_use(path)
    q4 = GGUF_BLOCKS["Q4_0"]
    assert source.formats.of("layers.1.qkv") == Stacked.of_rows([(256, q4), (128, q4), (128, DENSE)])
    assert source.formats.of("layers.1.o") == source.formats.of("embed_tokens") == q4
    dense = dict(without_blocks(open_model(path)).weights(torch.float32))
    found = {name: tensor for name, tensor in source.weights(torch.float32) if name.endswith("qkv.weight_2")}
    assert len(found) == source.arch.num_layers
    for name, tensor in found.items():
        assert torch.equal(tensor, dense[name.removesuffix("_2")][-128:])
    with LLM(ModelConfig(path, device="cpu", num_threads=1), enable_tokenizer=False) as llm:
        text = llm.info.description
    assert "gguf-q4_0 weights, float32 weights in layout torch (gguf-tq1_0 dequantized: no native product), " in text


def test_a_saved_engine_keeps_its_blocks_unless_a_dtype_is_named(tmp_path: Path) -> None:
    path, engine = tmp_path / "model.gguf", tmp_path / "engine"
    model = make_wide("qwen2", num_hidden_layers=1)
    write_family_gguf(path, model, lambda _, columns: "F16" if columns % 256 else "TQ1_0")
    tokens(path, STORED, save=engine)
    stored = open_model(path)
    assert in_use(engine).formats == stored.formats
    for settings in ({"dtype": "float32"}, {"device": "cuda:0"}):
        dense = in_use(engine, **settings)
        assert dense.formats == DENSE_MODEL
        assert "gguf-tq1_0 dequantized" in dense.dequantized
        pairs = zip(dense.weights(torch.float32), without_blocks(stored).weights(torch.float32), strict=True)
        assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)


@pytest.mark.parametrize(
    ("asked", "compared", "weights"),
    [
        (QuantConfig(), None, None),
        (QuantConfig(weights="int8"), "int8", "none"),
        (STORED, "gguf-q8_0", "none"),
        (QuantConfig(kv_cache="int8"), "gguf-q8_0", "gguf-q8_0"),
    ],
)
def test_what_an_evaluation_compares_with(
    tmp_path: Path, asked: QuantConfig, compared: str | None, weights: str | None
) -> None:
    """The model without what was asked for; where weights were, the ones that the file's blocks stand for."""
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide("qwen2", num_hidden_layers=1), "Q8_0")
    with LLM(ModelConfig(path, device="cpu", quant_config=asked), enable_tokenizer=False) as llm:
        report = llm.evaluate(text=list(range(3, 40)), windows=1, window_tokens=16, measure_speed=False)
    assert (report.reference and report.reference.weight_format) == weights
    if compared is not None:
        assert report.model.weight_format == compared


def test_blocks_are_not_quantized_to_another_format(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide("qwen2"), "Q8_0")
    arch = open_model(path).arch
    assert formats_in_use(ModelFormats(Q8), STORED.resolve(), arch) == ModelFormats(Q8)
    with pytest.raises(ConfigError, match=r"format 'int8', but .*stored as 'gguf-q8_0'; set .*'none'"):
        formats_in_use(ModelFormats(Q8), QuantConfig(weights="int8").resolve(), arch)


@pytest.mark.parametrize("matrix_type", ["F32", "F16", "BF16"])
def test_a_file_that_is_not_quantized_has_nothing_to_keep(tmp_path: Path, matrix_type: str) -> None:
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide("qwen2"), matrix_type)
    assert open_model(path).formats == in_use(path).formats == in_use(path, quant_config=STORED).formats == DENSE_MODEL


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3_short"])
@pytest.mark.parametrize("types", ["Q4_1", like_q4_k_m], ids=["Q4_1", "Q4_K_M"])
def test_saved_engines_keep_the_blocks(tmp_path: Path, family: str, types: Any) -> None:
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide(family), types)
    expected = tokens(path, save=tmp_path / "engine")
    assert tokens(path, STORED) == tokens(tmp_path / "engine") == tokens(tmp_path / "engine", STORED) == expected
    stored = open_model(path)
    saved = open_model(tmp_path / "engine")
    assert saved.formats == stored.formats
    for (name, one), (_, other) in zip(saved.weights(torch.float32), stored.weights(torch.float32), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "mistral"])
def test_log_probabilities_of_prompts_and_prefix_hits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, is_native: bool
) -> None:
    if not is_native:
        leave_products_to_torch(monkeypatch)
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide(family), MixedTypes())
    params = PARAMS.replace(prompt_logprobs=2, logprobs=2)
    found = []
    for settings in ({"dtype": "float32"}, {"quant_config": STORED}):
        values = ModelConfig(path, device="cpu", num_threads=1, **settings)  # type: ignore[arg-type]
        values.kv_cache_config.block_size = 4
        with LLM(values, enable_tokenizer=False) as llm:
            first = llm.generate([PROMPTS[2]], params)[0]
            again = llm.generate([PROMPTS[2]], PARAMS)[0]
        assert again.num_cached_tokens > 0
        assert again.token_ids == first.token_ids
        assert first.prompt_logprobs is not None
        found.append([entry.logprob for entry in (*first.prompt_logprobs, *first.logprobs) if entry is not None])
    assert len(found[0]) == len(PROMPTS[2]) - 1 + len(first.token_ids)
    assert found[1] == pytest.approx(found[0], abs=0.2 if is_native else 1e-4)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_memory_is_that_of_the_blocks(tmp_path: Path, family: str) -> None:
    """With tied embeddings, the embedding's blocks compute the logits too."""
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide(family, vocab_size=2048), like_q4_k_m)
    config = ModelConfig(path, device="cpu", num_threads=1).resolve()
    source = source_in_use(config, open_model(path))
    specs = source.formats.layout(source.arch, "float32").values()
    promised = sum(spec.size_bytes for spec in specs)
    backend = load_cpu_backend(config, source)
    try:
        assert promised <= backend.info.weight_bytes < 1.03 * promised
        for text in ("gguf-q4_k", "gguf-q6_k", "gguf-q8_0"):
            assert f"{text} weights" in backend.info.description
        assert "steps in the native decoder" in backend.info.description
    finally:
        backend.close()


def test_dense_matrices_follow_the_dtype(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = make_wide("mistral")
    write_family_gguf(path, model, lambda name, _: "F16" if "attn_v" in name or "output" in name else "Q4_0")
    source = open_model(path)
    assert source.formats.of("lm_head") == DENSE
    for dtype in (torch.float32, torch.bfloat16):
        weights = dict(source.weights(dtype))
        assert weights["lm_head.weight"].dtype == weights["layers.0.qkv.weight_2"].dtype == dtype
        assert weights["layers.0.qkv.weight"].dtype == torch.uint8
        assert list(source.formats.layout(source.arch, "float32")) == list(weights)
    assert tokens(path, STORED, dtype="bfloat16") is not None


def test_types_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_family_gguf(path, make_wide("qwen2"), lambda name, _: "Q8_0" if "attn_k" in name else "F32")
    raw = path.read_bytes()
    name = b"blk.1.attn_k.weight"
    # name, dimensions (u32), two sizes (u64), type (u32)
    place = raw.index(name) + len(name) + 4 + 16
    assert raw[place : place + 4] == (8).to_bytes(4, "little")
    path.write_bytes(raw[:place] + (24).to_bytes(4, "little") + raw[place + 4 :])
    with pytest.raises(UnsupportedModelError, match=r"tensor 'blk\.1\.attn_k\.weight' is stored as I8.*Q4_K"):
        open_model(path)


def test_the_default_is_what_most_matrices_have() -> None:
    formats: dict[str, WeightFormat] = {"embed_tokens": Q6, "layers.0.qkv": Q4, "layers.0.o": Q8, "layers.0.down": Q4}
    found = ModelFormats.of_matrices(formats)
    assert found == ModelFormats(Q4, {"embed_tokens": Q6, "layers.0.o": Q8})
    assert {name: found.of(name) for name in formats} == formats
    assert found.in_use == {Q4, Q6, Q8}
    assert ModelFormats.of_matrices({"embed_tokens": DENSE, "layers.0.o": Q4}) == ModelFormats(Q4)
