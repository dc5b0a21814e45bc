"""Logits of every token of a text on the CUDA backend, between steps that are in flight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmengine.backends.cuda import sampling
from tests.backends.cuda.helpers import load_cuda
from tests.backends.helpers import BackendDriver, reference_greedy, reference_logprobs, save_tiny

SMALL = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}


def test_every_token_has_its_logits(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of logits at a time, while a step of another request is in flight and its token on the device."""
    monkeypatch.setattr(sampling, "MAX_LOGITS", 4 * 101)
    model = save_tiny(tmp_path, **SMALL)
    backend = load_cuda(tmp_path, device)
    driver = BackendDriver(backend)
    text, other = list(range(10, 37)), list(range(50, 56))
    scored, beside = driver.add(3, text), driver.add(0, other)
    backend.launch(driver.batch((beside, 6)))
    logits: list[torch.Tensor] = []
    for count in (17, 1, 9):
        parts = [rows.float().cpu().clone() for rows in backend.score(driver.batch((scored, count)))]
        assert all(len(part) <= 4 for part in parts)
        logits += parts
    assert sum(map(len, logits)) == len(text)
    expected = reference_logprobs(model, text)
    torch.testing.assert_close(torch.log_softmax(torch.cat(logits), dim=-1), expected, atol=2e-4, rtol=0)
    beside.token_ids.extend(backend.collect().token_ids[0])
    driver.step((beside, 1))
    assert beside.output_ids == reference_greedy(model, other, 2)
    backend.close()
