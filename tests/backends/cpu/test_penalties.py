"""Bias, penalties, bad words and masks on the CPU: against transformers, and restored after preemption."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmengine.backends.cpu.sampler import Sampler
from llmengine.engine.bad_words import bad_word_ids
from llmengine.errors import InvalidRequestError
from llmengine.llm import LLM
from llmengine.sampling_params import SamplingParams
from llmengine.tokenizer.protocol import ByteTokenizer
from tests.backends.sampling_helpers import EDITS, SamplingBackend, SlotHistory, logits_after
from tests.engine.helpers import bounded

VOCAB = 24


def make_histories(params: list[SamplingParams]) -> list[SlotHistory]:
    random = np.random.default_rng(4)
    prompts = [random.integers(0, VOCAB, 1 + 3 * slot).tolist() for slot in range(len(params))]
    return [
        SlotHistory(slot, prompt, item, [2, 3]) for slot, (prompt, item) in enumerate(zip(prompts, params, strict=True))
    ]


def step(sampler: Sampler, histories: list[SlotHistory], logits: torch.Tensor) -> list[int]:
    slots = np.array([history.slot for history in histories])
    positions = np.array([len(history.token_ids) for history in histories])
    samples = sampler.sample(logits, slots, positions)
    assert not any(samples.failed)
    for history, token_id in zip(histories, samples.token_ids, strict=True):
        history.token_ids.append(token_id)
    return samples.token_ids


def test_greedy_choices_are_those_of_transformers_logits() -> None:
    histories = make_histories(EDITS)
    sampler = Sampler(len(EDITS), VOCAB)
    for history in histories:
        sampler.init_slot(history.init())
    generator = torch.Generator().manual_seed(0)
    for index in range(40):
        logits = torch.randn(len(EDITS), VOCAB, generator=generator) * 2.0
        before = logits.clone()
        expected = [int(h.expected_logits(line).argmax()) for h, line in zip(histories, logits, strict=True)]
        if index % 13 == 12:  # preempted and resumed
            sampler.init_slot(histories[index % len(EDITS)].init())
        order = torch.randperm(len(EDITS), generator=generator).tolist()
        found = step(sampler, [histories[slot] for slot in order], logits[order])
        assert found == [expected[slot] for slot in order]
        assert torch.equal(logits, before)


@pytest.mark.parametrize("max_steps_in_flight", [1, 4])
def test_preempted_requests_go_on_with_their_counts(max_steps_in_flight: int) -> None:
    backend = SamplingBackend(VOCAB, num_blocks=45, max_steps_in_flight=max_steps_in_flight)
    llm = LLM.from_backend(lambda: backend)
    histories = make_histories(EDITS)
    # Only what min_new_tokens forbids ends a request, so that the others need more blocks than there are.
    params = [
        history.params.replace(max_new_tokens=40, stop_token_ids=history.stops if history.params.min_new_tokens else ())
        for history in histories
    ]
    with llm:
        handles = [llm.generate_async(h.token_ids, item) for h, item in zip(histories, params, strict=True)]
        outputs = [bounded(handle.result) for handle in handles]
    assert sum(output.timeline.num_preemptions for output in outputs) > 3
    for history, output in zip(histories, outputs, strict=True):
        expected = history.expect_greedy(lambda token_ids: logits_after(token_ids, VOCAB), output.num_tokens)
        assert output.token_ids == expected
        assert len(output.token_ids) == 40 or output.matched_stop in (2, 3)


def test_draws_follow_the_edited_distribution() -> None:
    """Many slots with the same history draw once each; chi-square with 23 degrees of freedom at most."""
    num_slots = 1500
    for params in EDITS[1:]:
        drawn = params.replace(temperature=1.3)
        histories = [SlotHistory(slot, [1, 5, 5, 2, 9], drawn, [2, 3]) for slot in range(num_slots)]
        sampler = Sampler(num_slots, VOCAB)
        for history in histories:
            history.token_ids += [5, 7, 5, 4, 2]
            sampler.init_slot(history.init())
        logits = logits_after([3], VOCAB)
        found = step(sampler, histories, logits.expand(num_slots, -1).contiguous())
        del histories[0].token_ids[-1]
        expected = (histories[0].expected_logits(logits) / 1.3).softmax(0) * num_slots
        observed = torch.bincount(torch.tensor(found), minlength=VOCAB)
        assert not observed[expected == 0].any()
        used = expected > 5
        assert float(((observed - expected)[used] ** 2 / expected[used]).sum()) < 55


def test_masks_leave_only_what_they_allow() -> None:
    vocab, rows = 70, 5
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    allowed = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed[3] = False
    logits[4, 7] = torch.nan
    allowed[4, 7] = False
    words = np.packbits(np.pad(allowed.numpy(), ((0, 0), (0, 26))), axis=1, bitorder="little").view(np.int32)
    kinds = [SamplingParams(), SamplingParams(temperature=2.0), SamplingParams(logit_bias={0: 9.0}), *[EDITS[0]] * 2]
    sampler, before = Sampler(rows, vocab), logits.clone()
    for history in make_histories(kinds):
        sampler.init_slot(history.init())
    for position in range(50):
        samples = sampler.sample(logits, np.arange(rows), np.full(rows, position), dict(enumerate(words)))
        assert samples.failed == [False, False, False, True, True]
        assert all(allowed[row, token_id] for row, token_id in enumerate(samples.token_ids[:3]))
        assert samples.token_ids[0] == int(logits[0].masked_fill(~allowed[0], -torch.inf).argmax())
    assert torch.equal(logits.nan_to_num(5.0), before.nan_to_num(5.0))


class SpacedTokenizer(ByteTokenizer):
    """Byte tokens with BOS in front, except that a space and "b" are one token, 200."""

    special_ids = frozenset({256})

    def encode(self, text: str) -> list[int]:
        return [256, *self._merged(text)]

    def _merged(self, text: str) -> list[int]:
        return [200 if char == "\x00" else ord(char) for char in text.replace(" b", "\x00")]


def test_bad_words_that_are_text() -> None:
    assert bad_word_ids(ByteTokenizer(), ["ab", " ab", (1, 2), " "]) == ((97, 98), (1, 2), (32,))
    assert bad_word_ids(SpacedTokenizer(), ["b", "bc"]) == ((98,), (200,), (98, 99), (200, 99))
    with pytest.raises(InvalidRequestError, match="bad_words holds 'x', which needs a tokenizer"):
        bad_word_ids(None, [(1,), "x"])
    with pytest.raises(InvalidRequestError, match="cannot be tokenized"):
        bad_word_ids(ByteTokenizer(), ["\ud800"])


def test_bad_words_are_not_in_the_text() -> None:
    vocab = 258
    backend = SamplingBackend(vocab, num_blocks=40)
    text = dict.fromkeys(b"abc", 8.0)
    params = SamplingParams(temperature=1.0, logit_bias=text, max_new_tokens=60, seed=3)
    with LLM.from_backend(lambda: backend, tokenizer=ByteTokenizer()) as llm:
        free, held = llm.generate(["x"], params), llm.generate(["x"], params.replace(bad_words=["ab", "ca", (99, 98)]))
        assert {"ab", "ca", "cb"} <= {free[0].text[index : index + 2] for index in range(60)}
        assert not {"ab", "ca", "cb"} & {held[0].text[index : index + 2] for index in range(60)}
        for changes, message in (
            ({"bad_words": [(1, vocab)]}, f"bad_words holds token id {vocab}, outside"),
            ({"logit_bias": {vocab: 1.0}}, f"logit_bias holds token id {vocab}, outside"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                llm.generate_async("x", SamplingParams(**changes))
    llm = LLM.from_backend(lambda: SamplingBackend(vocab, num_blocks=40))
    with llm, pytest.raises(InvalidRequestError, match="needs a tokenizer"):
        llm.generate_async([1], SamplingParams(bad_words=["ab"]))
