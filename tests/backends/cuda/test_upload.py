"""Weights copied to the device in chunks, on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from llmengine.backends.cuda.upload import Uploads


@pytest.mark.parametrize("chunk_bytes", [8, 40, 1 << 12])
def test_tensors_arrive_whole_and_sources_may_change(device: str, chunk_bytes: int) -> None:
    uploads = Uploads(torch.device(device), chunk_bytes)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (7, 3), (33,), (16, 16)]
    sources = [torch.randn(shape, generator=generator) for shape in shapes]
    sources.append(torch.randn((6, 10), generator=generator).T)
    for dtype in (torch.float32, torch.bfloat16):
        targets = [torch.full(source.shape, torch.nan, dtype=dtype, device=device) for source in sources]
        expected = [source.to(dtype) for source in sources]
        for target, source in zip(targets, sources, strict=True):
            changed = source.clone(memory_format=torch.preserve_format)
            uploads.copy(target, changed)
            changed.fill_(7.0)
        for target, value in zip(targets, expected, strict=True):
            assert torch.equal(target.cpu(), value)
