"""Layouts of bitsandbytes: rows of 8 bits, and NF4 or FP4 in blocks that run on from row to row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import TYPE_CHECKING, Any

from llmengine.checkpoints.huggingface_tensors import WEIGHT_DTYPES, StoredTensor
from llmengine.checkpoints.metadata_fields import Fields
from llmengine.checkpoints.quantized_linears import SCALE_DTYPES, Layout, StoredLinear
from llmengine.dtypes import DType, item_bytes
from llmengine.quantization.bnb4 import TABLES, Bnb4Bit, BnbTable
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.int8 import INT8

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = 127
_STORAGE_DTYPES: tuple[DType, ...] = ("uint8", "int8", "bfloat16", "float16", "float32", "float64")
_STATE = "weight.quant_state.bitsandbytes__"
_TABLE_TOLERANCE = 1e-6
_LARGEST_BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class Bnb8BitRows(Layout):
    """LLM.int8() (arXiv 2208.07339).

    ::

        weight         int8 [out, in]
        SCB            float32 [out], the largest magnitude of each row
        weight_format  uint8 (), 0 for rows as they are

    A weight is q * SCB / 127. Source: bitsandbytes, `nn/modules.py`.
    """

    def format(self, linear: StoredLinear) -> WeightFormat:
        linear.require("weight", ("int8",), linear.shape)
        linear.require("SCB", SCALE_DTYPES, (linear.shape[0],), (linear.shape[0], 1))
        if linear.has("weight_format"):
            linear.require("weight_format", ("uint8",), (), (1,))
            if (found := int(linear.read("weight_format"))) != 0:
                raise linear.unsupported(f"weight_format={found} is not supported; supported: 0, rows as they are")
        return INT8

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        scale = linear.read_scale("SCB").float().reshape(-1) / _LARGEST
        return {"weight": linear.read("weight"), "weight_scale": scale}


@dataclass(frozen=True, slots=True)
class Bnb4BitBlocks(Layout):
    """NF4 and FP4 of QLoRA (arXiv 2305.14314).

    ::

        weight                                    [bytes, 1]: two codes in a byte, the first in its high nibble; uint8,
                                                  or the same bytes as numbers of another dtype
        weight.absmax                             float32 [blocks], or uint8 if they are quantized themselves
        weight.quant_map                          float32 [16], the table
        weight.nested_absmax                      float32 [blocks of absmax]
        weight.nested_quant_map                   float32 [256], numbers of absmax
        weight.quant_state.bitsandbytes__nf4      uint8, JSON: shape, block sizes, offset of absmax; or ..._fp4

    Weights are in the order of rows, and blocks are of consecutive ones: with rows that are no multiple of a block, a
    block runs on into the next row, and each of its parts gets the scale of the whole. Source: bitsandbytes,
    `functional.py` (`QuantState`).

    Attributes:
        quant_type: the table that config.json names, None if it names none.
    """

    quant_type: BnbTable | None

    def stores(self, tensors: Mapping[str, StoredTensor[Any]]) -> bool:
        weight = tensors.get("weight")
        is_packed = weight is not None and weight.dtype not in WEIGHT_DTYPES
        return is_packed or any(suffix.startswith("weight.") for suffix in tensors)

    def format(self, linear: StoredLinear) -> WeightFormat:
        state = _State.of(linear)
        if self.quant_type not in (None, state.quant_type):
            raise linear.damaged(
                _STATE + state.quant_type,
                f"is of {state.quant_type}, although quantization_config has bnb_4bit_quant_type={self.quant_type!r}",
            )
        self._check_bytes(linear)
        blocks = -(-prod(linear.shape) // state.block_size)
        nested = state.nested_block_size is not None
        linear.require("weight.absmax", ("uint8",) if nested else SCALE_DTYPES, (blocks,))
        linear.require("weight.quant_map", ("float32",), (len(TABLES[state.quant_type]),))
        if state.nested_block_size is not None:
            linear.require("weight.nested_absmax", ("float32",), (-(-blocks // state.nested_block_size),))
            linear.require("weight.nested_quant_map", ("float32",), (256,))
        return Bnb4Bit(state.quant_type, gcd(linear.shape[1], state.block_size))

    def _check_bytes(self, linear: StoredLinear) -> None:
        rows, columns = linear.shape
        if columns % 2:
            raise linear.unsupported(f"bitsandbytes stores 2 inputs in a byte here, but the layer has {columns}")
        stored = linear.tensors.get("weight")
        width = next((item_bytes(dtype) for dtype in _STORAGE_DTYPES if stored and stored.dtype == dtype), 1)
        count = -(-rows * columns // 2 // width)
        linear.require("weight", _STORAGE_DTYPES, (count, 1), (1, count), (count,))

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        state = _State.of(linear)
        table = torch.tensor(TABLES[state.quant_type])
        if not torch.allclose(linear.read("weight.quant_map"), table, rtol=0.0, atol=_TABLE_TOLERANCE):
            raise linear.damaged("weight.quant_map", f"is not the table of {state.quant_type}")
        rows, columns = linear.shape
        packed = linear.read("weight").reshape(-1).view(torch.uint8)[: rows * columns // 2].view(rows, -1)
        scale, size = self._scales(linear, state), gcd(columns, state.block_size)
        firsts = torch.arange(0, rows * columns, size)
        return {
            "weight": packed >> 4 | packed << 4,
            "weight_scale": scale[firsts // state.block_size].view(rows, -1),
        }

    def _scales(self, linear: StoredLinear, state: _State) -> Tensor:
        """The scales of all blocks, float32 [blocks]."""
        if state.nested_block_size is None:
            return linear.read_scale("weight.absmax").float()
        codes, numbers = linear.read("weight.absmax").long(), linear.read_scale("weight.nested_quant_map")
        whole = linear.read_scale("weight.nested_absmax").repeat_interleave(state.nested_block_size)
        return numbers[codes] * whole[: len(codes)] + state.nested_offset


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON tensor of a linear says.

    Attributes:
        nested_block_size: scales that share a scale of their own; None if scales are not quantized.
        nested_offset: is added to scales that are quantized.
    """

    quant_type: BnbTable
    block_size: int
    nested_block_size: int | None
    nested_offset: float

    @classmethod
    def of(cls, linear: StoredLinear) -> _State:
        """Raises `CorruptFileError` for a state that is missing, malformed or of another matrix."""
        names = [name for name in TABLES if _STATE + name in linear.tensors]
        suffix = _STATE + (names[0] if names else "nf4")
        stored = linear.tensors.get(suffix)
        linear.require(suffix, ("uint8",), () if stored is None else (prod(stored.shape),))
        try:
            fields = Fields(json.loads(bytes(linear.read(suffix).tolist())), f"{linear.where}: {linear.name}.{suffix}")
        except (ValueError, RecursionError) as error:
            raise linear.damaged(suffix, f"is not valid JSON: {error}") from error
        if fields.sizes("shape") != linear.shape:
            raise linear.damaged(
                suffix, f"has shape {fields.values['shape']}, but the layer has {linear.shape} weights"
            )
        if (table := fields.string("quant_type", names[0])) != names[0]:
            raise linear.damaged(suffix, f"has quant_type={table!r}")
        nested = fields.optional_integer("nested_blocksize", low=1, high=_LARGEST_BLOCK)
        return cls(
            quant_type=names[0],
            block_size=fields.integer("blocksize", low=1, high=_LARGEST_BLOCK),
            nested_block_size=nested,
            nested_offset=0.0 if nested is None else fields.number("nested_offset"),
        )
