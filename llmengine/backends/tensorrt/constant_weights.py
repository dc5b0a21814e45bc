"""Weights that plans contain, on their way from the checkpoint to the processes that build: one file for each plan.

A file is written while the checkpoint streams and mapped by the process that builds from it. So the process that asks
for plans holds one tensor at a time, and a building process the constants of one plan: a layer, or the last layer and
the LM head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmengine.backends.tensorrt.graph import RawArray
from llmengine.backends.tensorrt.spec import PlacedSegment, SegmentSpec, WeightSpec
from llmengine.errors import EngineError
from llmengine.quantization.formats import TensorSpec

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 256


def constant_offsets(spec: SegmentSpec) -> dict[str, int]:
    """Offset in bytes of each constant weight in the segment's file, by the weight's name in the plan."""
    offsets = {}
    end = 0
    for weight in spec.constant_weights:
        offsets[weight.name] = end
        end += math.ceil(weight.size_bytes / _ALIGNMENT) * _ALIGNMENT
    return offsets


def spool_constants(
    segments: Sequence[PlacedSegment], stream: Iterable[tuple[str, torch.Tensor]], directory: Path
) -> Iterator[tuple[PlacedSegment, Path]]:
    """Write the constants of each segment to a file in `directory` and yield it as soon as it is complete.

    At most one tensor is in memory. On disk are the files being written (three with tied embeddings, else two) and
    those that were yielded and not deleted.

    Args:
        stream: canonical weights, in any order.

    Raises:
        EngineError: the stream ends early, or a weight has another dtype or shape than the spec.
    """
    uses: dict[str, list[tuple[PlacedSegment, WeightSpec]]] = {}
    num_missing: dict[str, int] = {}
    for segment in segments:
        num_missing[segment.plan_name] = len(segment.spec.constant_weights)
        for weight in segment.spec.constant_weights:
            uses.setdefault(weight.canonical(segment.layer), []).append((segment, weight))
    for name, tensor in stream:
        for segment, weight in uses.pop(name, []):
            path = directory / f"{segment.plan_name}.weights"
            _write_constant(path, constant_offsets(segment.spec)[weight.name], weight, tensor)
            num_missing[segment.plan_name] -= 1
            if not num_missing[segment.plan_name]:
                yield segment, path
        if not uses:
            return
    raise EngineError(f"the checkpoint ended before these weights: {', '.join(uses)}")


def map_constants(spec: SegmentSpec, path: Path | None) -> dict[str, RawArray]:
    """Views of the mapped file, by name in the plan; empty for a segment without constants."""
    if not spec.constant_weights:
        return {}
    assert path is not None, f"constant weights of {spec.kind!r} without a file"
    mapped = np.memmap(path, np.uint8, "r")
    offsets = constant_offsets(spec)
    return {
        weight.name: mapped[offsets[weight.name] : offsets[weight.name] + weight.size_bytes]
        for weight in spec.constant_weights
    }


def _write_constant(path: Path, offset: int, weight: WeightSpec, tensor: torch.Tensor) -> None:
    import torch

    found = TensorSpec.of(tensor)
    if found != weight.stored:
        raise EngineError(
            f"weight {weight.role!r} is {found.dtype} {list(found.shape)}, but the plan needs {weight.dtype} "
            f"{list(weight.shape)}"
        )
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.seek(offset)
        file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
