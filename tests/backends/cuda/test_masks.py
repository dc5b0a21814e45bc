"""Grammar masks in the CUDA backend: from the batch to the sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmengine import SamplingParams
from tests.backends.cuda.test_backend import SMALL, load
from tests.backends.helpers import BackendDriver, save_tiny


def test_masked_and_plain_rows_share_steps_in_flight(tmp_path: Path, device: str) -> None:
    """A mask counts only for its step, and a slot without a mask may choose any token."""
    save_tiny(tmp_path, **SMALL)
    backend = load(tmp_path, device)
    driver = BackendDriver(backend)
    free = [driver.add(slot, [1, 2, 3]) for slot in range(2)]
    wanted = driver.step(*((request, 3) for request in free)).token_ids[0][0]
    allowed = (wanted + 1) % backend.info.vocab_size
    mask = bytearray(4 * -(-backend.info.vocab_size // 32))
    mask[allowed // 8] |= 1 << allowed % 8
    for slot, params in enumerate([SamplingParams(), SamplingParams(temperature=1.0), SamplingParams()]):
        driver.release(free[slot % 2])
        free[slot % 2] = driver.add(slot % 2, [1, 2, 3], params)
        other = free[1 - slot % 2] = driver.add(1 - slot % 2, [1, 2, 3])
        batch = driver.batch((free[slot % 2], 3), (other, 3))
        backend.launch(replace(batch, masks={slot % 2: bytes(mask)}))
        assert backend.collect().token_ids == {slot % 2: (allowed,), 1 - slot % 2: (wanted,)}
    backend.close()
