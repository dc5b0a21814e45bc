"""Weights in the blocks of ggml's tensor types, byte for byte as a GGUF file has them.

A block is a run of consecutive columns of a row with its scales, as ggml's `block_q*` structs lay it out. Rows are
whole numbers of blocks, so a matrix is cut along its columns only between blocks. The bytes stay what they are in
files and in `Matrix`; a backend that multiplies faster by another arrangement makes that for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError, UnsupportedModelError
from llmengine.quantization.formats import Along, Shape, TensorSpec, WeightFormat

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_SIZES: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ1_S": (256, 50),
    "IQ1_M": (256, 56),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98),
    "IQ3_S": (256, 110),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
}
"""Tensor types of GGUF that can be read -> weights per block, bytes per block."""

SCALE_OFFSETS: Mapping[str, tuple[int, ...]] = {
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
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Where a block has float16 scales and minima, by type; the other types have none that are whole."""

DENSE_TYPES: Mapping[str, ModelDType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Those of them that are not quantized."""


class GgufBlocks(WeightFormat):
    """`weight`, uint8 [out, in / block_size, block_bytes]: the blocks of each row.

    There is a subclass for each quantized type in `BLOCK_SIZES`, and an instance of it in `GGUF_BLOCKS`.

    Attributes:
        type_name: ggml's name of the type, a key of `BLOCK_SIZES`.
        block_size: columns of a block.
        block_bytes: bytes of a block.
    """

    __slots__ = ()

    type_name: ClassVar[str]
    block_size: ClassVar[int]
    block_bytes: ClassVar[int]

    def tensors(self, shape: Shape, dtype: ModelDType) -> dict[str, TensorSpec]:
        if shape[1] % self.block_size:
            raise UnsupportedModelError(
                f"a matrix of {shape[0]} x {shape[1]} weights cannot be stored as {self.name!r}, whose blocks have "
                f"{self.block_size} columns: the number of columns must be a multiple of {self.block_size}"
            )
        blocks = Along("in", self.block_size)
        return {"weight": TensorSpec.of_matrix("uint8", shape, Along("out"), blocks, self.block_bytes)}

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """The blocks that ggml's reference makes without data; `ConfigError` for types that need ggml's own search."""
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        rows, columns = weight.shape
        specs = self.tensors((rows, columns), "float32")
        try:
            blocks = quantize(weight.float().contiguous().numpy(), GGMLQuantizationType[self.type_name])
        except NotImplementedError as error:
            raise ConfigError(
                f"weights cannot be quantized to {self.name!r} here; make the file with llama.cpp's llama-quantize and "
                "load that"
            ) from error
        return {"weight": torch.from_numpy(blocks).view(specs["weight"].shape)}

    def dequantize(self, tensors: Mapping[str, Tensor]) -> Tensor:
        import torch

        from llmengine.quantization.gguf_dequantize import dequantize

        blocks = tensors["weight"].contiguous()
        weight = torch.empty(blocks.shape[0], blocks.shape[1] * self.block_size)
        dequantize(blocks.flatten(1).cpu().numpy(), self.type_name, weight.numpy())
        return weight.to(blocks.device)


def _blocks_of(type_name: str) -> GgufBlocks:
    block_size, block_bytes = BLOCK_SIZES[type_name]
    facts = {
        "__doc__": f"Blocks of ggml's type {type_name}: {block_size} weights in {block_bytes} bytes.",
        "__module__": __name__,
        "name": f"gguf-{type_name.lower()}",
        "type_name": type_name,
        "block_size": block_size,
        "block_bytes": block_bytes,
    }
    kind: type[GgufBlocks] = dataclass(frozen=True)(type(f"Gguf{type_name}", (GgufBlocks,), facts))
    return kind()


GGUF_BLOCKS: Mapping[str, GgufBlocks] = {name: _blocks_of(name) for name in BLOCK_SIZES if name not in DENSE_TYPES}
"""The formats of matrices that are quantized in GGUF, by ggml's name of the type."""
