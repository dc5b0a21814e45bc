"""Log-probabilities of prompt tokens against transformers, however the prompt is cut into pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from llmengine import InvalidRequestError, TokenLogprobs
from llmengine.backends.cpu import prompt_logprobs
from llmengine.backends.cpu.native_library import NATIVE_DIRECTORY
from llmengine.batch import BackendInfo
from llmengine.testing import FakeBackend, mixing_model
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny, reference_logprobs, save_tiny
from tests.engine.helpers import Steps, bounded, make_llm, tokens

MODEL = mixing_model(258)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    directory = tmp_path_factory.mktemp("tiny")
    return directory, save_tiny(directory)


def check(entries: list[TokenLogprobs], expected: torch.Tensor, following: list[int], count: int) -> None:
    """Compare with transformers' log-probabilities [n, vocab], each given the tokens before it."""
    assert len(entries) == len(following)
    for entry, row, token_id in zip(entries, expected, following, strict=True):
        values, ids = row.topk(count)
        assert entry.logprob == pytest.approx(row[token_id].item(), abs=2e-4)
        assert list(entry.top_logprobs) == pytest.approx(values.tolist(), abs=2e-4)
        assert list(entry.top_ids) == ids.tolist()


@pytest.mark.parametrize("directory_of_native", [NATIVE_DIRECTORY, NO_NATIVE])
@pytest.mark.parametrize(("chunk", "max_logits"), [(64, 1 << 24), (7, 1 << 24), (64, 311 * 5), (1, 1)])
def test_equal_transformers(
    tiny: tuple[Path, LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    max_logits: int,
    directory_of_native: Path,
) -> None:
    directory, model = tiny
    monkeypatch.setattr(prompt_logprobs, "MAX_LOGITS", max_logits)
    backend = load_tiny(directory, native_directory=directory_of_native)
    driver = BackendDriver(backend)
    prompt, other = list(range(30, 71)), list(range(200, 230))
    request = driver.add(0, prompt, tokens(3, prompt_logprobs=4))
    beside = driver.add(1, other)
    entries: list[TokenLogprobs] = []
    sampled = 0
    while request.num_computed_tokens < len(prompt):
        parts = [(request, min(chunk, len(prompt) - request.num_computed_tokens))]
        if beside.num_computed_tokens < len(other):
            parts.append((beside, min(11, len(other) - beside.num_computed_tokens)))
        result = driver.step(*parts)
        entries += result.prompt_logprobs.get(0, ())
        assert set(result.prompt_logprobs) <= {0}
        sampled += len(result.token_ids)
    check(entries, reference_logprobs(model, prompt)[:-1], prompt[1:], 4)
    assert request.output_ids == [int(reference_logprobs(model, prompt)[-1].argmax())]
    assert not driver.step((request, 1)).prompt_logprobs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 30),
    num_outputs=st.integers(1, 3),
    max_tokens=st.integers(5, 24),
    in_flight=st.integers(1, 3),
    num_blocks=st.integers(12, 24),
    others=st.lists(st.integers(1, 20), max_size=3),
)
def test_complete_and_in_order_whatever_the_schedule(
    length: int, num_outputs: int, max_tokens: int, in_flight: int, num_blocks: int, others: list[int]
) -> None:
    steps = Steps(
        num_blocks=num_blocks,
        max_model_len=44,
        max_steps_in_flight=in_flight,
        max_tokens_per_step=max_tokens,
        max_tokens_per_mixed_step=max_tokens,
        max_batch_size=5,
    )
    prompt = [7] * length
    steps.submit(prompt, 2)  # leaves its prefix in the cache
    steps.drain()
    for size in others:
        steps.submit([3] * size, 12)
    request = steps.submit(prompt, 12, num_outputs=num_outputs, params=tokens(12, prompt_logprobs=1))
    for relative in request.relatives:
        relative.stream.log.prompt_logprobs = request.stream.log.prompt_logprobs = [None]
    steps.drain()
    steps.check_tokens()
    entries = request.stream.log.prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    expected = [MODEL(prompt[:position]) for position in range(1, length)]
    assert [entry.top_ids[0] for entry in entries if entry is not None] == expected


def test_a_cached_prompt_is_scored_and_decoded() -> None:
    with make_llm() as llm:
        text = "a prompt of several blocks"
        plain = bounded(lambda: llm.generate(text, tokens(2)))[0]
        output = bounded(lambda: llm.generate(text, tokens(2, prompt_logprobs=1)))[0]
        assert output.num_cached_tokens == 0
        assert output.token_ids == plain.token_ids
        decoded = output.decoded_prompt_logprobs
        assert decoded is not None
        assert len(decoded) == len(text)
        assert decoded[0] is None
        assert [next(iter(entry.values())).decoded_token for entry in decoded[1:] if entry] == list(text[1:])
        assert plain.prompt_logprobs is None
        both = bounded(lambda: llm.generate(text, tokens(2, prompt_logprobs=1, n=2, temperature=1.0)))[0].outputs
        assert both[0].prompt_logprobs == both[1].prompt_logprobs == output.prompt_logprobs


class WithoutScores(FakeBackend):
    @property
    def info(self) -> BackendInfo:
        return BackendInfo("a GPU", 258, 64, 65, 4, 1, 0)


def test_a_backend_without_them_refuses() -> None:
    with (
        make_llm(backend=WithoutScores) as llm,
        pytest.raises(
            InvalidRequestError,
            match=r"needs the logits of all prompt tokens, .* only those of the final one \(a GPU\)",
        ),
    ):
        llm.generate([1, 2], tokens(1, prompt_logprobs=0))
