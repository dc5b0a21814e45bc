"""Logits of every token of a text on the CPU against transformers, however the text is cut into steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmengine.backends.cpu.native_library import NATIVE_DIRECTORY
from tests.backends.helpers import NO_NATIVE, BackendDriver, load_tiny, reference_greedy, reference_logprobs, save_tiny


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("native_directory", [NATIVE_DIRECTORY, NO_NATIVE])
def test_every_token_has_its_logits(tmp_path: Path, native_directory: Path, deterministic: bool) -> None:
    model = save_tiny(tmp_path)
    backend = load_tiny(tmp_path, native_directory=native_directory, deterministic=deterministic)
    driver = BackendDriver(backend)
    text = list(range(20, 61))
    scored, beside = driver.add(2, text), driver.add(1, list(range(200, 210)))
    driver.step((beside, 10))
    logits: list[torch.Tensor] = []
    for count in (23, 1, 17):
        logits += [rows.clone() for rows in backend.score(driver.batch((scored, count)))]
    assert sum(map(len, logits)) == len(text)
    expected = reference_logprobs(model, text)
    torch.testing.assert_close(torch.log_softmax(torch.cat(logits), dim=-1), expected, atol=2e-4, rtol=0)
    for _ in range(3):
        driver.step((beside, 1))
    assert beside.output_ids == reference_greedy(model, list(range(200, 210)), 4)
    backend.close()
