"""GGUF's blocks as codes and factors, and back, to the last bit, on any device. See `gguf_dequantize` for layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """What codes are multiplied by, and what is added.

    Attributes:
        scales: [rows, groups] in the packing's dtype; of 256 columns where there are `steps`.
        minima: float16 alike, or zero points, uint8; None if there are none.
        steps: uint8 [rows, groups, 1 or 2], of scales and minima.
    """

    scales: Tensor
    minima: Tensor | None = None
    steps: Tensor | None = None


def as_bytes(tensor: Tensor) -> Tensor:
    """[rows, n] as uint8 [rows, n, bytes of an entry]."""
    return tensor.contiguous().view(torch.uint8).view(*tensor.shape, tensor.element_size())


def _halves(blocks: Tensor, begin: int) -> Tensor:
    """The float16 at a byte of each block: [rows, blocks]."""
    return blocks[:, :, begin : begin + 2].contiguous().view(torch.float16).squeeze(2)


def _runs(nibbles: Tensor, size: int) -> Tensor:
    """Codes of bytes [rows, blocks, n], of each run of `size` bytes the low nibbles, then the high ones."""
    runs = nibbles.unflatten(2, (-1, 1, size))
    return torch.cat((runs & 15, runs >> 4), 3).flatten(2)


def _from_runs(codes: Tensor, size: int) -> Tensor:
    """Undoes `_runs`."""
    low, high = codes.view(*codes.shape[:2], -1, 2, size).unbind(3)
    return (low & 15 | high << 4).flatten(2)


@functools.cache
def _bits(device: torch.device) -> Tensor:
    """Numbers of the bits of a byte, by which bytes are shifted."""
    return torch.arange(8, dtype=torch.uint8, device=device)


def _pairs_of_bits(packed: Tensor) -> Tensor:
    """Numbers of 2 bits [rows, blocks, 4 n] of bytes [rows, blocks, n], of each 32 bytes the lowest bits first."""
    numbers: Tensor = packed.unflatten(2, (-1, 1, 32)) >> _bits(packed.device)[::2, None] & 3
    return numbers.flatten(2)


def _from_pairs_of_bits(numbers: Tensor) -> Tensor:
    """Undoes `_pairs_of_bits`."""
    shifted: Tensor = numbers.unflatten(2, (-1, 4, 32)) << _bits(numbers.device)[::2, None]
    return shifted.sum(3, dtype=torch.uint8).flatten(2)


def _from_bits_of_runs(bits: Tensor) -> Tensor:
    """Bytes [rows, blocks, 32] of single bits [rows, blocks, 256], the first run of 32 in the lowest bits."""
    shifted: Tensor = bits.unflatten(2, (8, 32)) << _bits(bits.device)[:, None]
    return shifted.sum(2, dtype=torch.uint8)


def from_blocks(type_name: str, blocks: Tensor, byte_offset: int) -> tuple[Tensor, Factors]:
    """Codes [rows, blocks, columns of a block] and factors of GGUF blocks."""
    if type_name == "Q8_0":
        return blocks[:, :, 2:] ^ byte_offset, Factors(_halves(blocks, 0))
    if type_name in _LOW_BIT_TYPES:
        return _LOW_BIT_TYPES[type_name].unpack(blocks)
    if type_name == "Q6_K":
        codes = _runs(blocks[:, :, :128], 64) | _pairs_of_bits(blocks[:, :, 128:192]) << 4
        steps = (blocks[:, :, 192:208] ^ 128).reshape(blocks.shape[0], -1, 1)
        return codes, Factors(_halves(blocks, 208), steps=steps)
    if type_name in ("Q4_K", "Q5_K"):
        factors = Factors(_halves(blocks, 0), _negative(_halves(blocks, 2)), _k_steps(blocks[:, :, 4:16]))
        if type_name == "Q4_K":
            return _runs(blocks[:, :, 16:], 32), factors
        fifth = blocks[:, :, None, 16:48] >> _bits(blocks.device)[:, None] & 1
        return _runs(blocks[:, :, 48:], 32) | fifth.flatten(2) << 4, factors
    has_minima = type_name.endswith("_1")
    factors = Factors(_halves(blocks, 0), _halves(blocks, 2) if has_minima else None)
    begin = 4 if has_minima else 2
    if type_name.startswith("Q4"):
        return _runs(blocks[:, :, begin:], 16), factors
    fifth = blocks[:, :, begin : begin + 4, None] >> _bits(blocks.device) & 1
    return _runs(blocks[:, :, begin + 4 :], 16) | fifth.flatten(2) << 4, factors


def to_blocks(type_name: str, codes: Tensor, factors: Factors, byte_offset: int) -> Tensor:
    """Undoes `from_blocks`."""
    scales = as_bytes(factors.scales)
    if type_name == "Q8_0":
        return torch.cat((scales, codes ^ byte_offset), 2)
    if type_name in _LOW_BIT_TYPES:
        return _LOW_BIT_TYPES[type_name].pack(codes, factors)
    if type_name == "Q6_K":
        assert factors.steps is not None
        steps = (factors.steps ^ 128).view(*codes.shape[:2], 16)
        return torch.cat((_from_runs(codes, 64), _from_pairs_of_bits(codes >> 4), steps, scales), 2)
    if type_name in ("Q4_K", "Q5_K"):
        assert factors.minima is not None
        assert factors.steps is not None
        steps = _from_k_steps(factors.steps, codes.shape[1])
        pieces = [scales, as_bytes(_negative(factors.minima)), steps]
        if type_name == "Q5_K":
            pieces.append(_from_bits_of_runs(codes >> 4))
        return torch.cat((*pieces, _from_runs(codes, 32)), 2)
    pieces = [scales] if factors.minima is None else [scales, as_bytes(factors.minima)]
    if type_name.startswith("Q5"):
        fifth = (codes >> 4).unflatten(2, (4, 8)) << _bits(codes.device)
        pieces.append(fifth.sum(3, dtype=torch.uint8))
    return torch.cat((*pieces, _from_runs(codes, 16)), 2)


def _negative(halves: Tensor) -> Tensor:
    """-x, NaN included, bit for bit."""
    return (halves.contiguous().view(torch.int16) ^ -0x8000).view(torch.float16)


def _k_steps(packed: Tensor) -> Tensor:
    """Steps of Q4_K and Q5_K, uint8 [rows, blocks * 8, 2], of their 12 bytes for each block."""
    first, second, rest = packed.split(4, dim=2)
    scales = torch.cat((first & 63, rest & 15 | first >> 2 & 48), 2)
    minima = torch.cat((second & 63, rest >> 4 | second >> 2 & 48), 2)
    return torch.stack((scales, minima), 3).reshape(packed.shape[0], -1, 2)


def _from_k_steps(steps: Tensor, num_blocks: int) -> Tensor:
    """Undoes `_k_steps`."""
    scales, minima = steps.view(steps.shape[0], num_blocks, 8, 2).unbind(3)
    first = scales[:, :, :4] | (scales[:, :, 4:] & 48) << 2
    second = minima[:, :, :4] | (minima[:, :, 4:] & 48) << 2
    return torch.cat((first, second, scales[:, :, 4:] & 15 | (minima[:, :, 4:] & 15) << 4), 2)


def _from_q2_k(blocks: Tensor) -> tuple[Tensor, Factors]:
    steps = torch.stack((blocks[:, :, :16] & 15, blocks[:, :, :16] >> 4), 3).reshape(blocks.shape[0], -1, 2)
    return _pairs_of_bits(blocks[:, :, 16:80]), Factors(_halves(blocks, 80), _negative(_halves(blocks, 82)), steps)


def _to_q2_k(codes: Tensor, factors: Factors) -> Tensor:
    assert factors.minima is not None
    assert factors.steps is not None
    scales, minima = factors.steps.view(*codes.shape[:2], 16, 2).unbind(3)
    halves = (as_bytes(factors.scales), as_bytes(_negative(factors.minima)))
    return torch.cat((scales | minima << 4, _from_pairs_of_bits(codes), *halves), 2)


_STEP_OFFSET = 128 - 32
"""What a byte of a scale has on top of 6 bits that stand for numbers from -32 on."""


def _from_q3_k(blocks: Tensor) -> tuple[Tensor, Factors]:
    bits = _bits(blocks.device)
    third = (blocks[:, :, None, :32] >> bits[:, None] & 1).flatten(2)
    low, high = blocks[:, :, 96:104], blocks[:, :, 104:108]
    steps = torch.cat((low & 15, low >> 4), 2) | (high[:, :, None] >> bits[::2, None] & 3).flatten(2) << 4
    factors = Factors(_halves(blocks, 108), steps=(steps + _STEP_OFFSET).reshape(blocks.shape[0], -1, 1))
    return _pairs_of_bits(blocks[:, :, 32:96]) | third << 2, factors


def _to_q3_k(codes: Tensor, factors: Factors) -> Tensor:
    assert factors.steps is not None
    third = _from_bits_of_runs(codes >> 2)
    steps = factors.steps.view(*codes.shape[:2], 16) - _STEP_OFFSET
    low = steps[:, :, :8] & 15 | (steps[:, :, 8:] & 15) << 4
    high = ((steps >> 4).unflatten(2, (4, 4)) << _bits(codes.device)[::2, None]).sum(2, dtype=torch.uint8)
    return torch.cat((third, _from_pairs_of_bits(codes & 3), low, high, as_bytes(factors.scales)), 2)


def _from_iq4_xs(blocks: Tensor) -> tuple[Tensor, Factors]:
    high = (blocks[:, :, 2:4, None] >> _bits(blocks.device)[::2] & 3).flatten(2)
    low = blocks[:, :, 4:8, None]
    steps = torch.cat((low & 15, low >> 4), 3).flatten(2) | high << 4
    factors = Factors(_halves(blocks, 0), steps=(steps + _STEP_OFFSET).reshape(blocks.shape[0], -1, 1))
    return _runs(blocks[:, :, 8:], 16), factors


def _to_iq4_xs(codes: Tensor, factors: Factors) -> Tensor:
    assert factors.steps is not None
    steps = factors.steps.view(*codes.shape[:2], 8) - _STEP_OFFSET
    high = ((steps >> 4).unflatten(2, (2, 4)) << _bits(codes.device)[::2]).sum(3, dtype=torch.uint8)
    low = steps[:, :, 0::2] & 15 | (steps[:, :, 1::2] & 15) << 4
    return torch.cat((as_bytes(factors.scales), high, low, _from_runs(codes, 16)), 2)


@dataclass(frozen=True, slots=True)
class _BlockType:
    """How blocks of a type become codes and factors, and back."""

    unpack: Callable[[Tensor], tuple[Tensor, Factors]]
    pack: Callable[[Tensor, Factors], Tensor]


_LOW_BIT_TYPES = {
    "IQ4_NL": _BlockType(
        lambda blocks: (_runs(blocks[:, :, 2:], 16), Factors(_halves(blocks, 0))),
        lambda codes, factors: torch.cat((as_bytes(factors.scales), _from_runs(codes, 16)), 2),
    ),
    "MXFP4": _BlockType(
        lambda blocks: (_runs(blocks[:, :, 1:], 16), Factors(blocks[:, :, 0])),
        lambda codes, factors: torch.cat((as_bytes(factors.scales), _from_runs(codes, 16)), 2),
    ),
    "NVFP4": _BlockType(
        lambda blocks: (_runs(blocks[:, :, 4:], 8), Factors(blocks[:, :, :4].reshape(blocks.shape[0], -1))),
        lambda codes, factors: torch.cat((factors.scales.view(*codes.shape[:2], 4), _from_runs(codes, 8)), 2),
    ),
    "TQ2_0": _BlockType(
        lambda blocks: (_pairs_of_bits(blocks[:, :, :64]), Factors(_halves(blocks, 64))),
        lambda codes, factors: torch.cat((_from_pairs_of_bits(codes), as_bytes(factors.scales)), 2),
    ),
    "Q2_K": _BlockType(_from_q2_k, _to_q2_k),
    "Q3_K": _BlockType(_from_q3_k, _to_q3_k),
    "IQ4_XS": _BlockType(_from_iq4_xs, _to_iq4_xs),
}
