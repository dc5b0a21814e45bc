"""Divisions that round in the same way on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def quotient(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, rounded once.

    By a Python number torch divides on a CPU, but multiplies by its reciprocal on a GPU, which may differ in the last
    bit. Weights that are rounded on a GPU must be those that are rounded on a CPU.
    """
    return x / x.new_full((), divisor)
