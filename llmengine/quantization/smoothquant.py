"""SmoothQuant (Xiao et al., arXiv 2211.10438): factors that move outliers from activations into weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ALPHA = 0.5
"""How much of the difference goes to the weights where each token has a scale of its own: 0 none of it, 1 all."""

STATIC_ALPHA = 0.9
"""Likewise where all activations share a scale, which outliers widen for every token."""

_TINY = 1e-5


def column_factors(weight: Tensor, largest: Tensor, alpha: float) -> Tensor:
    """Factors of the columns, float32 [in_features]; activations are divided by them.

    Args:
        weight: float32 [out_features, in_features].
        largest: largest magnitude of each activation, [in_features].
    """
    columns = weight.abs().amax(dim=0).clamp_(min=_TINY)
    factors: Tensor = largest.clamp(min=_TINY) ** alpha / columns ** (1.0 - alpha)
    return factors
