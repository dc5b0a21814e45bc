"""Rows of a quantized embedding, looked up for the tokens of a step."""

from __future__ import annotations

from torch import Tensor

from llmengine.kernels.packed_linear import gather_packed_rows
from llmengine.kernels.packed_weights import PackedMatrix
from llmengine.kernels.quantized_matrix import QuantizedMatrix
from llmengine.kernels.scaled_linear import gather_scaled_rows
from llmengine.kernels.scaled_weights import ScaledMatrix


def has_rows(matrix: QuantizedMatrix) -> bool:
    """Whether `look_up` can read a matrix."""
    return isinstance(matrix, PackedMatrix | ScaledMatrix)


def look_up(matrix: QuantizedMatrix, ids: Tensor, out: Tensor) -> None:
    """Write the rows that `ids` names to `out`, dequantized; a CUDA graph can hold it.

    Args:
        ids: int32 [num_rows], each a row of the matrix.
        out: [num_rows, in_features] in the dtype of the activations, contiguous.
    """
    if isinstance(matrix, PackedMatrix):
        gather_packed_rows(matrix, ids, out)
    else:
        assert isinstance(matrix, ScaledMatrix), matrix
        gather_scaled_rows(matrix, ids, out)
