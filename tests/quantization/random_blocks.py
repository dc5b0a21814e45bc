"""Random blocks of ggml's types, also of those that the gguf package cannot quantize to."""

from __future__ import annotations

import numpy as np

from llmengine.quantization.gguf_blocks import BLOCK_SIZES

HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ2_0": (64,),
}
"""Offsets of the float16 scales (and minima) in a block."""


def random_blocks(type_name: str, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, blocks, block_bytes] with scales that differ and give weights below 1."""
    block_size, block_bytes = BLOCK_SIZES[type_name]
    random = np.random.default_rng([*type_name.encode(), rows, columns])
    blocks = random.integers(0, 256, (rows, columns // block_size, block_bytes), dtype=np.uint8)
    if type_name == "NVFP4":
        blocks[:, :, :4] = random.integers(0, 24, (*blocks.shape[:2], 4))
    if type_name == "MXFP4":
        blocks[:, :, 0] = random.integers(110, 125, blocks.shape[:2])
    for offset in HALVES.get(type_name, ()):
        scales = random.uniform(1e-4, 3e-4, (*blocks.shape[:2], 1)).astype("<f2")
        blocks[:, :, offset : offset + 2] = scales.view(np.uint8)
    return blocks
