"""KV blocks of 8 bits on a CPU, with torch's operators: the reference of the native decoder's attention over them.

Each token's key and value of each head has a scale of its own, from its largest element; nothing is calibrated. Blocks
are gathered and made float32 before they are multiplied. Attention sees a token only as the cache holds it, also in
the step that computes it, so results do not depend on how a prompt is cut into steps.

What a row does not attend to may hold anything, as a block that a former request left behind: scores are overwritten
there, and values are made zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.cpu.kv_store import AttentionShape, TokenPlaces, cap, lazy_zeros
from llmengine.backends.kv_layout import KV_QUAD, KvPool

_LEAST_SCALED = 1e-30
"""Vectors whose elements are all smaller are stored as if their largest were this."""

_GATHERED_NUMBERS = 4 << 20
"""Keys of decodes that are made float32 at a time, as far as whole rows allow."""

_SIGN_BIT = 0x80


@dataclass(frozen=True, slots=True)
class _Codes:
    """The number format of keys or of values.

    Attributes:
        largest: magnitude that the largest element of a vector is scaled to.
        flipped: bits that are inverted in memory. Keys of int8 are stored with 128 added, which inverts the sign bit:
            integer units multiply unsigned bytes by signed ones.
    """

    dtype: torch.dtype
    largest: float
    flipped: int = 0

    def stored(self, x: Tensor) -> Tensor:
        """uint8: scaled numbers, rounded to the nearest."""
        rounded = x.round() if self.dtype == torch.int8 else x
        return rounded.to(self.dtype).view(torch.uint8).bitwise_xor_(self.flipped)

    def numbers(self, stored: Tensor) -> Tensor:
        """float32: what `stored` gave."""
        return stored.bitwise_xor(self.flipped).view(self.dtype).float()


_CODES = {
    torch.int8: (_Codes(torch.int8, 127.0, _SIGN_BIT), _Codes(torch.int8, 127.0)),
    torch.float8_e4m3fn: (_Codes(torch.float8_e4m3fn, 448.0), _Codes(torch.float8_e4m3fn, 448.0)),
}
"""Of keys and of values, by the dtype of the values."""


class ByteKv:
    """Blocks of `byte_kv_layout`; implements `kv_store.KvStore`."""

    def __init__(self, shape: AttentionShape, pool: KvPool) -> None:
        self.shape = shape
        self.block_size = pool.layout.block_size
        self._key_codes, self._value_codes = _CODES[pool.layout.tensors["values"].dtype]
        self._layers = [
            {name: lazy_zeros(pool, name) for name in pool.layout.tensors} for _ in range(pool.layout.num_layers)
        ]
        self._keys = [layer["keys"].view(torch.uint8) for layer in self._layers]
        self._values = [layer["values"].view(torch.uint8) for layer in self._layers]

    def write(self, layer: int, places: TokenPlaces, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `kv_store.KvStore.write`."""
        tensors, blocks, offsets = self._layers[layer], places.blocks, places.offsets
        num_tokens, heads, dim = k.shape
        key_factors, key_scales = _factors(k, self._key_codes)
        value_factors, value_scales = _factors(v, self._value_codes)
        keys, values = self._key_codes.stored(k * key_factors), self._value_codes.stored(v * value_factors)
        tensors["key_scales"].transpose(1, 2).index_put_((blocks, offsets), key_scales[..., 0])
        tensors["value_scales"].transpose(1, 2).index_put_((blocks, offsets), value_scales[..., 0])
        quads = F.pad(keys, (0, -dim % KV_QUAD)).view(num_tokens, heads, -1, KV_QUAD)
        self._keys[layer].permute(0, 3, 1, 2, 4).index_put_((blocks, offsets), quads)
        by_position = self._values[layer].permute(0, 2, 4, 1, 3)
        by_position.index_put_((blocks, offsets // KV_QUAD, offsets % KV_QUAD), values)
        return self._key_codes.numbers(keys) * key_scales, self._value_codes.numbers(values) * value_scales

    def gathered(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `kv_store.KvStore.gathered`."""
        tensors, dim, size = self._layers[layer], self.shape.head_dim, self.block_size
        keys = self._keys[layer].index_select(0, blocks).permute(0, 3, 1, 2, 4).flatten(3)[..., :dim]
        values = self._values[layer].index_select(0, blocks).permute(0, 2, 4, 1, 3).flatten(1, 2)[:, :size]
        key_scales, value_scales = (
            tensors[name].index_select(0, blocks).transpose(1, 2)[..., None] for name in ("key_scales", "value_scales")
        )
        k = self._key_codes.numbers(keys.contiguous()).mul_(key_scales)
        return k.flatten(0, 1), self._value_codes.numbers(values.contiguous()).mul_(value_scales).flatten(0, 1)

    def decode_reads(self, table: NDArray[np.int32], beyond: NDArray[np.bool_]) -> _GatheredRows:
        """See `kv_store.KvStore.decode_reads`."""
        return _GatheredRows(self, torch.from_numpy(table.astype(np.int64)), torch.from_numpy(beyond))

    def addresses(self, layer: int) -> dict[str, int]:
        """See `kv_store.KvStore.addresses`."""
        return {name: tensor.data_ptr() for name, tensor in self._layers[layer].items()}


@dataclass(frozen=True, slots=True)
class _GatheredRows:
    """`kv_store.DecodeReads` of a `ByteKv`.

    Attributes:
        table: int64 [rows, num_blocks].
        beyond: bool [rows, num_blocks * block_size].
    """

    store: ByteKv
    table: Tensor
    beyond: Tensor

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """See `kv_store.DecodeReads.attend`."""
        shape, num_positions = self.store.shape, self.beyond.shape[1]
        rows = max(1, _GATHERED_NUMBERS // (num_positions * shape.num_kv_heads * shape.head_dim))
        parts = zip(q.split(rows), self.table.split(rows), self.beyond.split(rows), strict=True)
        return torch.cat([self._attended(layer, *part) for part in parts])

    def _attended(self, layer: int, q: Tensor, table: Tensor, beyond: Tensor) -> Tensor:
        shape, num_rows = self.store.shape, len(q)
        sizes = (num_rows, -1, shape.num_kv_heads, shape.head_dim)
        k, v = (x.view(sizes).transpose(1, 2) for x in self.store.gathered(layer, table.flatten()))
        grouped = q.reshape(num_rows, shape.num_kv_heads, -1, shape.head_dim)
        scores = torch.matmul(grouped, k.transpose(2, 3))
        if shape.soft_cap is not None:
            cap(scores, shape.soft_cap)
        probabilities = torch.softmax(scores.masked_fill_(beyond[:, None, None, :], -torch.inf), dim=-1)
        return torch.matmul(probabilities, v.masked_fill_(beyond[:, None, :, None], 0.0)).reshape(num_rows, -1)


def _factors(x: Tensor, codes: _Codes) -> tuple[Tensor, Tensor]:
    """What the vectors x [num_tokens, heads, dim] are multiplied by, and the inverse; [num_tokens, heads, 1] each.

    A vector that is not finite has a scale that is not finite, and with it what attends to it.
    """
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(_LEAST_SCALED)
    return codes.largest / largest, largest / codes.largest
