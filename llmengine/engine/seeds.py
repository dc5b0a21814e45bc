"""Seeds of several outputs of one prompt."""

from __future__ import annotations

_MASK = 2**64 - 1


def child_seed(seed: int, index: int) -> int:
    """Seed of a prompt's output `index`, in [0, 2**63): `seed` itself for the first.

    For the others it is splitmix64 (Steele, Lea and Flood, 2014) of both, since callers count their seeds up, and the
    seeds of different prompts must not meet.
    """
    if index == 0:
        return seed
    state = _splitmix64(_splitmix64(seed) ^ index)
    return _splitmix64(state) >> 1


def _splitmix64(state: int) -> int:
    mixed = (state + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
