"""Memory for weights: tensors keep their content, whoever else is there."""

from __future__ import annotations

import psutil
import torch

from llmengine.backends.cpu.huge_pages import HugePages


def test_copies_are_equal_aligned_and_apart() -> None:
    memory = HugePages()
    tensors = [
        torch.randn(3, 5),
        torch.arange(7, dtype=torch.uint8),
        torch.empty(0, 4),
        torch.randn(4, 6).half().t(),
        torch.randn(33),
    ]
    copies = [memory.copy(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
        assert copy.numel() == 0 or copy.data_ptr() % 64 == 0
    copies[0].fill_(0)
    assert all(torch.equal(copy, tensor) for copy, tensor in list(zip(copies, tensors, strict=True))[1:])


def test_tensors_outlive_the_memory_they_came_from_and_give_theirs_back() -> None:
    size_bytes = 100 << 20
    memory = HugePages()
    first = memory.copy(torch.ones(8))
    large = memory.copy(torch.ones(size_bytes, dtype=torch.uint8))
    del memory
    assert first.sum() == 8
    assert large.sum() == size_bytes
    before = psutil.Process().memory_info().rss
    del large
    assert psutil.Process().memory_info().rss < before - size_bytes // 2
    assert first.sum() == 8
