"""The KV blocks of paged attention on a CPU in float32: written, gathered, and read in place by decodes.

`KvStore` is what attention needs of blocks in any number format; `byte_kv.ByteKv` is the one with 8 bits.

A block's keys are stored transposed, [num_kv_heads, head_dim, block_size], so one block's scores of one head are a
weighted sum of head_dim rows of the pool, weighted by q; the output of a head is a weighted sum of value rows, weighted
by the probabilities. Both sums are `embedding_bag` with weights per sample, which reads rows wherever they are: no
gather, half the time of gathering blocks and SDPA at 16 requests, a third at 64. Index tensors are built once a step
and serve all layers.

Rows that were never written, or whose block a former request left behind, are never multiplied, not even by zero
(0 * NaN is NaN): scores are overwritten beyond the context, values are taken from `NULL_BLOCK`, which stays zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.kv_layout import KvPool
from llmengine.batch import NULL_BLOCK


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes and factors that every layer shares.

    Attributes:
        score_scale: what scores are multiplied by.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for no cap.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    score_scale: float
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where a step's tokens are written.

    Attributes:
        blocks: int64 [num_tokens].
        offsets: int64 [num_tokens], within the block.
        rows: int64 [num_tokens], block * block_size + offset.
    """

    blocks: Tensor
    offsets: Tensor
    rows: Tensor


class DecodeReads(Protocol):
    """What a group of decodes reads, for all layers with the same window."""

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """The attention [rows, num_heads * head_dim] of scaled q [rows, num_heads, head_dim]."""


class KvStore(Protocol):
    """KV blocks of all layers."""

    def write(self, layer: int, places: TokenPlaces, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [num_tokens, num_kv_heads, head_dim]; both are returned as the cache now holds them."""

    def gathered(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks, int64 [n], in float32: [n * block_size, num_kv_heads, head_dim] each."""

    def decode_reads(self, table: NDArray[np.int32], beyond: NDArray[np.bool_]) -> DecodeReads:
        """What decodes read.

        Args:
            table: blocks [rows, num_blocks].
            beyond: [rows, num_blocks * block_size], positions that a row does not attend to.
        """

    def addresses(self, layer: int) -> dict[str, int]:
        """Where the layer's tensors lie, by their names in the layout."""


class FloatKv:
    """Blocks of `split_kv_layout`: zeros that the system maps on first touch."""

    def __init__(self, shape: AttentionShape, pool: KvPool) -> None:
        self.shape = shape
        self.block_size = size = pool.layout.block_size
        heads, dim = shape.num_kv_heads, shape.head_dim
        num_layers = pool.layout.num_layers
        self._keys = [lazy_zeros(pool, "keys") for _ in range(num_layers)]
        self._values = [lazy_zeros(pool, "values") for _ in range(num_layers)]
        # Views made once: (written keys [blocks, size, heads, dim], key rows, written values, value rows).
        self._views = [
            (key.permute(0, 3, 1, 2), key.view(-1, size), value.view(-1, heads, dim), value.view(-1, dim))
            for key, value in zip(self._keys, self._values, strict=True)
        ]
        num_rows = pool.num_blocks * heads * max(dim, size)
        self._index_type: type[np.signedinteger] = np.int32 if num_rows < 2**31 else np.int64

    def write(self, layer: int, places: TokenPlaces, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `KvStore.write`."""
        keys, _, values, _ = self._views[layer]
        keys.index_put_((places.blocks, places.offsets), k)
        values.index_copy_(0, places.rows, v)
        return k, v

    def gathered(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """See `KvStore.gathered`."""
        heads, dim = self.shape.num_kv_heads, self.shape.head_dim
        k = self._keys[layer].index_select(0, blocks).permute(0, 3, 1, 2).reshape(-1, heads, dim)
        return k, self._values[layer].index_select(0, blocks).view(-1, heads, dim)

    def decode_reads(self, table: NDArray[np.int32], beyond: NDArray[np.bool_]) -> _RowsInPlace:
        """See `KvStore.decode_reads`."""
        shape, index, size = self.shape, self._index_type, self.block_size
        heads, dim, repeat = shape.num_kv_heads, shape.head_dim, shape.num_heads // shape.num_kv_heads
        rows, num_blocks = table.shape
        table, head = table.astype(index), np.arange(heads, dtype=index)
        key_rows = (table[:, None, None, :, None] * heads + head[:, None, None, None]) * dim + np.arange(
            dim, dtype=index
        )
        key_rows = np.broadcast_to(key_rows, (rows, heads, repeat, num_blocks, dim)).flatten()
        slots = (table[:, :, None] * size + np.arange(size, dtype=index)).reshape(rows, -1)
        slots[beyond] = NULL_BLOCK * size
        value_rows = slots[:, None, None, :] * heads + head[:, None, None]
        value_rows = np.broadcast_to(value_rows, (rows, heads, repeat, num_blocks * size)).flatten()
        return _RowsInPlace(
            store=self,
            num_blocks=num_blocks,
            key_rows=torch.from_numpy(key_rows),
            key_bags=torch.from_numpy(np.arange(0, len(key_rows), dim, dtype=index)),
            value_rows=torch.from_numpy(value_rows),
            value_bags=torch.from_numpy(np.arange(0, len(value_rows), num_blocks * size, dtype=index)),
            beyond=torch.from_numpy(beyond)[:, None, :],
        )

    def addresses(self, layer: int) -> dict[str, int]:
        """See `KvStore.addresses`."""
        return {"keys": self._keys[layer].data_ptr(), "values": self._values[layer].data_ptr()}

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys as rows [.., block_size], and its values as rows [.., head_dim]."""
        return self._views[layer][1], self._views[layer][3]


@dataclass(frozen=True, slots=True)
class _RowsInPlace:
    """`DecodeReads` of a `FloatKv`; `num_blocks` blocks of each row are read.

    Attributes:
        key_rows: [rows * num_heads * num_blocks * head_dim], rows of the keys [.., block_size].
        key_bags: where each bag of head_dim rows begins.
        value_rows: [rows * num_heads * num_blocks * block_size], rows of the values [.., head_dim].
        value_bags: where each bag of num_blocks * block_size rows begins.
        beyond: bool [rows, 1, num_blocks * block_size], positions that are not in the context.
    """

    store: FloatKv
    num_blocks: int
    key_rows: Tensor
    key_bags: Tensor
    value_rows: Tensor
    value_bags: Tensor
    beyond: Tensor

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """See `DecodeReads.attend`."""
        num_rows, num_heads = q.shape[:2]
        keys, values = self.store.rows(layer)
        weights = q[:, :, None].expand(-1, -1, self.num_blocks, -1).reshape(-1)
        scores = _bag(keys, self.key_rows, self.key_bags, weights).view(num_rows, num_heads, -1)
        if self.store.shape.soft_cap is not None:
            cap(scores, self.store.shape.soft_cap)
        probabilities = torch.softmax(scores.masked_fill_(self.beyond, -torch.inf), dim=-1)
        return _bag(values, self.value_rows, self.value_bags, probabilities.view(-1)).view(num_rows, -1)


def cap(scores: Tensor, soft_cap: float) -> Tensor:
    """Soft-cap `scores` in place and return them."""
    return scores.div_(soft_cap).tanh_().mul_(soft_cap)


def lazy_zeros(pool: KvPool, name: str) -> Tensor:
    """One layer's tensor of the pool. numpy asks the system for zeroed pages; torch.zeros would write them all."""
    tensor = pool.layout.tensors[name]
    pages = np.zeros(pool.num_blocks * tensor.size_bytes, dtype=np.uint8)
    return torch.from_numpy(pages).view(tensor.dtype).view(pool.layer_shape(name))


def _bag(rows: Tensor, indices: Tensor, bags: Tensor, weights: Tensor) -> Tensor:
    """[num_bags, columns]: the sum of each bag's rows times their weights."""
    return torch.embedding_bag(rows, indices, bags, False, 0, False, weights, False)[0]
