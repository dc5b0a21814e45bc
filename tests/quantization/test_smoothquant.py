"""SmoothQuant's factors: the formula, and a product that stays the same."""

from __future__ import annotations

import pytest
import torch

from llmengine.quantization.int8 import Int8W8A8
from llmengine.quantization.smoothquant import ALPHA, column_factors


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_factors_are_those_of_the_formula(alpha: float) -> None:
    weight, x = torch.randn(8, 12), torch.randn(50, 12)
    expected = x.double().abs().amax(dim=0) ** alpha / weight.double().abs().amax(dim=0) ** (1 - alpha)
    factors = column_factors(weight, x.abs().amax(dim=0), alpha)
    torch.testing.assert_close(factors, expected.float())
    torch.testing.assert_close((x / factors) @ (weight * factors).t(), x @ weight.t())


def test_outliers_of_activations_cost_less() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 64, generator=generator), torch.randn(200, 64, generator=generator)
    x[:, 7] *= 100.0
    factors = column_factors(weight, x.abs().amax(dim=0), ALPHA)

    def error(weight: torch.Tensor, x: torch.Tensor) -> float:
        format = Int8W8A8()
        tensors = format.quantize(weight)
        found = format.rounded_activations(x, tensors) @ format.dequantize(tensors).t()
        return float((found - x @ weight.t()).norm())

    assert error(weight * factors, x / factors) < 0.3 * error(weight, x)


def test_features_that_are_always_zero() -> None:
    factors = column_factors(torch.zeros(4, 6), torch.zeros(6), ALPHA)
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()
