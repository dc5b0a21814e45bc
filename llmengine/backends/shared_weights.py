"""Tensors between ranks: of shards that are put together, and of weights that are calibrated.

Rank 0 calibrates, and the other ranks get each tensor as it comes.

A calibration runs all texts through all layers, so ranks that each did so would take as many times the processors, and
would have to agree to the last bit. What it gives is a stream of tensors. Every rank cuts its part from each of them.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator

import torch
from torch import Tensor

from llmengine.backends.ranks.channel import RankChannel
from llmengine.backends.ranks.group import RankGroup
from llmengine.checkpoints.quantized_source import loaded_formats
from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.quant_config import QuantConfig

_PIECE = 1 << 20


def is_calibrated(source: ModelSource, config: QuantConfig) -> bool:
    """Whether loading `source` with a resolved `config` quantizes it on data."""
    return config.method not in (None, "rtn") and loaded_formats(source, config) != source.formats


def told_source(source: ModelSource, group: RankGroup) -> ModelSource:
    """`source` on rank 0: every tensor that it streams is sent to the other ranks first. Memory as for `source`."""

    def stream(dtype: torch.dtype) -> WeightStream:
        for name, tensor in source.stream(dtype):
            for message in _messages(name, tensor):
                group.broadcast(message)
            yield name, tensor
        group.broadcast(_END)

    return dataclasses.replace(source, stream=stream, stream_slices=None, unrounded=None)


def heard_source(source: ModelSource, config: QuantConfig, channel: RankChannel) -> ModelSource:
    """`source` on another rank, which gets the tensors that rank 0 streams, each of them once.

    Args:
        source: the model's files, of which no weight is read.
        config: resolved; what rank 0 does to the weights of `source`.
        channel: receives nothing else while the weights stream.
    """

    def stream(dtype: torch.dtype) -> WeightStream:
        while (head := channel.receive()) != _END:
            yield _received(head, channel)

    formats = loaded_formats(source, config)
    return dataclasses.replace(source, formats=formats, stream=stream, stream_slices=None, unrounded=None)


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor of any dtype; torch pickles numbers of 8 bits wrongly, but saves them right."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def tensor_of(message: bytes) -> Tensor:
    """Undoes `tensor_bytes`."""
    tensor = torch.load(io.BytesIO(message), weights_only=True)
    assert isinstance(tensor, Tensor), tensor
    return tensor


_END = b""


def _messages(name: str, tensor: Tensor) -> Iterator[bytes]:
    """A head, and the tensor's bytes in pieces."""
    yield json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]).encode()
    data = _bytes_of(tensor).numpy().data
    for start in range(0, len(data), _PIECE):
        yield bytes(data[start : start + _PIECE])


def _received(head: bytes, channel: RankChannel) -> tuple[str, Tensor]:
    name, dtype, shape = json.loads(head)
    tensor = torch.empty(shape, dtype=getattr(torch, dtype))
    data = _bytes_of(tensor).numpy().data
    for start in range(0, len(data), _PIECE):
        data[start : start + _PIECE] = channel.receive()
    return name, tensor


def _bytes_of(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, uint8 [size_bytes]."""
    return tensor.contiguous().view(-1).view(torch.uint8)
