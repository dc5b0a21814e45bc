"""GPTQ against its definition in float64, and against rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmengine.quantization.gptq import DAMPING, rounded_columns
from llmengine.quantization.int4 import Int4Groups, in_groups


def activations(columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations, some of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(400, columns, generator=generator) @ mixing * (1 + torch.arange(columns) % 7)


def by_definition(
    weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, size: int
) -> bytes:
    """Integers of the optimal brain quantizer: the inverse of what is left is computed anew for each column."""
    hessian, w = gram.double().numpy().copy(), weight.double().numpy().copy()
    hessian[np.diag_indices_from(hessian)] += DAMPING * np.diag(hessian).mean()
    left = list(np.argsort(-gram.diagonal().numpy(), kind="stable"))
    values = np.zeros(w.shape, dtype=np.uint8)
    while left:
        column = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        step, middle = scale.double().numpy()[:, column // size], zero.double().numpy()[:, column // size]
        values[:, column] = np.clip(np.round(w[:, column] / step) + middle, 0, 15)
        error = (w[:, column] - (values[:, column] - middle) * step) / inverse[0, 0]
        w[:, left] -= np.outer(error, inverse[0])
        left.pop(0)
    return values.tobytes()


@pytest.mark.parametrize("format", [Int4Groups(16), Int4Groups(16, zero_points=False), Int4Groups(-1)], ids=str)
@pytest.mark.parametrize("columns", [40, 160])
def test_integers_are_those_of_the_definition(format: Int4Groups, columns: int) -> None:
    weight, x = torch.randn(12, columns, generator=torch.Generator().manual_seed(1)), activations(columns)
    gram, size = x.t() @ x / len(x), format.columns_of_group(columns)
    groups = in_groups(weight, size)
    scale, zero = format.grid(groups.amin(dim=2), groups.amax(dim=2))
    values = rounded_columns(weight, gram, scale, zero, format)
    expected = np.frombuffer(by_definition(weight, gram, scale, zero, size), dtype=np.uint8).reshape(weight.shape)
    # A float32 tie may fall to the other side, and changes what follows in its row.
    same_rows = (values.numpy() == expected).all(axis=1)
    assert same_rows.mean() > 0.8
    fitted = format.dequantize(format.stored(values, scale, zero))
    nearest = format.dequantize(format.quantize(weight))
    assert (x @ (fitted - weight).t()).norm() < 0.8 * (x @ (nearest - weight).t()).norm()


def test_activations_that_are_always_zero() -> None:
    format, weight, x = Int4Groups(16), torch.randn(8, 32), activations(32)
    x[:, 5] = 0.0
    groups = in_groups(weight, 16)
    scale, zero = format.grid(groups.amin(dim=2), groups.amax(dim=2))
    values = rounded_columns(weight, x.t() @ x / len(x), scale, zero, format)
    assert torch.equal(values[:, 5].float(), zero[:, 0])
