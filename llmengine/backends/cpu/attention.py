"""Paged attention with torch's own CPU operators, over the blocks of a `KvStore`.

Decode. Rows of one token are grouped by how many blocks they read; the store attends for a group, see `kv_store` and
`byte_kv`.

Prefill. One request after another through SDPA, causal on the keys and values of the step, or over its gathered
context.

A sliding window reads only the blocks that it touches. Layers with the same window share what is planned for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.cpu.byte_kv import ByteKv
from llmengine.backends.cpu.kv_store import AttentionShape, DecodeReads, FloatKv, KvStore, TokenPlaces, cap
from llmengine.backends.cpu.step_inputs import StepInputs
from llmengine.backends.kv_layout import KvPool
from llmengine.models.decoder import Norm

_MAX_PADDING = 1.5
"""Decodes share one group while the longest context has at most this many times the blocks of the shortest."""


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What a layer's attention has of its own.

    Attributes:
        rope_table: see `models.rope`.
        sliding_window: a token attends to this many tokens, itself included; None for all before it.
        q_norm: of q [num_tokens, num_heads, head_dim] before the rotation; None without, and then k_norm is too.
        k_norm: likewise of k.
    """

    rope_table: Tensor
    sliding_window: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Rows [begin, end) of one token each, which read a similar number of blocks."""

    begin: int
    end: int
    reads: DecodeReads


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Tokens [begin, end) of one request; they attend to the keys of positions [first_key, context_len).

    Attributes:
        blocks: of these positions, None if they are all in the step.
        mask: what is added to the scores, None for a causal mask over the step's own tokens.
    """

    begin: int
    end: int
    first_key: int
    context_len: int
    blocks: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a step's rows read, for all layers with the same window."""

    groups: list[_DecodeGroup]
    prefills: list[_Prefill]


class PagedAttention:
    """KV blocks of all layers, and attention over them.

    `plan` once a step, then `attend` once a layer.
    """

    def __init__(self, shape: AttentionShape, pool: KvPool, layers: Sequence[LayerAttention]) -> None:
        assert len(layers) == pool.layout.num_layers
        self.shape = shape
        self.layers = layers
        self.block_size = pool.layout.block_size
        self.store: KvStore = ByteKv(shape, pool) if "key_scales" in pool.layout.tensors else FloatKv(shape, pool)
        num_rotated = shape.num_heads + shape.num_kv_heads
        self._head_scales = torch.ones(num_rotated, 1)
        self._head_scales[: shape.num_heads] = shape.score_scale
        self._tables = {id(layer.rope_table): layer.rope_table for layer in layers}
        self._windows = {layer.sliding_window for layer in layers}

    @property
    def rope_table(self) -> Tensor:
        """The first layer's, where all have the same."""
        return self.layers[0].rope_table

    def plan(self, inputs: StepInputs, block_tables: NDArray[np.int32]) -> None:
        """Prepare for one step: rotations, where keys and values go, and what each row reads."""
        size = self.block_size
        positions = torch.from_numpy(inputs.positions)
        self._rotations = {key: self._rotation(table[positions]) for key, table in self._tables.items()}
        blocks = block_tables[inputs.token_slots, inputs.positions // size].astype(np.int64)
        offsets = inputs.positions % size
        self._places = TokenPlaces(*map(torch.from_numpy, (blocks, offsets, blocks * size + offsets)))
        self._plans = {window: self._plan_window(inputs, block_tables, window) for window in self._windows}

    def _rotation(self, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of q and k and of their rotary partners; those of q include the scale of the scores."""
        cos, sin = cos_sin[:, None, :].chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1) * self._head_scales, torch.cat((-sin, sin), dim=-1) * self._head_scales

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """`models.decoder.Attend`: rotate, write keys and values, attend."""
        shape = self.shape
        num_tokens, num_heads, num_kv = qkv.shape[0], shape.num_heads, shape.num_kv_heads
        heads = qkv.view(num_tokens, num_heads + 2 * num_kv, shape.head_dim)
        unrotated, own = heads[:, : num_heads + num_kv], self.layers[layer]
        if own.q_norm is not None and own.k_norm is not None:
            unrotated = torch.cat((own.q_norm(unrotated[:, :num_heads]), own.k_norm(unrotated[:, num_heads:])), dim=1)
        cos, sin = self._rotations[id(own.rope_table)]
        rotated = torch.addcmul(unrotated * cos, unrotated.roll(shape.head_dim // 2, -1), sin)
        q, k, v = rotated[:, :num_heads], rotated[:, num_heads:], heads[:, num_heads + num_kv :]
        k, v = self.store.write(layer, self._places, k, v)
        plan = self._plans[own.sliding_window]
        if len(plan.groups) == 1 and not plan.prefills:
            return plan.groups[0].reads.attend(layer, q)
        result = qkv.new_empty(num_tokens, num_heads * shape.head_dim)
        for group in plan.groups:
            result[group.begin : group.end] = group.reads.attend(layer, q[group.begin : group.end])
        for prefill in plan.prefills:
            part = slice(prefill.begin, prefill.end)
            result[part] = self._prefill(q[part], k[part], v[part], layer, prefill)
        return result

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, layer: int, prefill: _Prefill) -> Tensor:
        shape = self.shape
        if prefill.blocks is not None:
            k, v = self.store.gathered(layer, prefill.blocks)
            num_keys = prefill.context_len - prefill.first_key
            k, v = k[:num_keys], v[:num_keys]
        if shape.soft_cap is not None:
            assert prefill.mask is not None
            return _capped_attention(q, k, v, prefill.mask, shape.soft_cap)
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=prefill.mask,
            is_causal=prefill.mask is None,
            scale=1.0,
            enable_gqa=shape.num_heads != shape.num_kv_heads,
        )
        return attended[0].transpose(0, 1).reshape(q.shape[0], -1)

    def _plan_window(self, inputs: StepInputs, block_tables: NDArray[np.int32], window: int | None) -> _Plan:
        rows = range(inputs.num_decodes, len(inputs.row_slots))
        prefills = [self._plan_prefill(inputs, block_tables, row, window) for row in rows]
        return _Plan(self._plan_decodes(inputs, block_tables, window), prefills)

    def _plan_decodes(
        self, inputs: StepInputs, block_tables: NDArray[np.int32], window: int | None
    ) -> list[_DecodeGroup]:
        """Cut the decodes, which come by growing context, into groups that read a similar number of blocks."""
        size, context_lens = self.block_size, inputs.context_lens[: inputs.num_decodes]
        ends = -(-context_lens // size)
        # A window touches at most so many blocks, however it lies.
        num_blocks = ends if window is None else np.minimum(ends, (window + 2 * size - 2) // size)
        groups, begin = [], 0
        while begin < inputs.num_decodes:
            end = int(np.searchsorted(num_blocks, max(num_blocks[begin] * _MAX_PADDING, 4), side="right"))
            first = (ends - num_blocks)[begin:end, None]
            columns = first + np.arange(num_blocks[end - 1])
            slots = inputs.row_slots[begin:end, None]
            table = block_tables[slots, np.minimum(columns, block_tables.shape[1] - 1)]
            positions = (columns[:, :, None] * size + np.arange(size)).reshape(len(table), -1)
            beyond = positions >= context_lens[begin:end, None]
            if window is not None:
                beyond |= positions < context_lens[begin:end, None] - window
            groups.append(_DecodeGroup(begin, end, self.store.decode_reads(table, beyond)))
            begin = end
        return groups

    def _plan_prefill(
        self, inputs: StepInputs, block_tables: NDArray[np.int32], row: int, window: int | None
    ) -> _Prefill:
        size = self.block_size
        begin, end = int(inputs.row_starts[row]), int(inputs.row_starts[row + 1])
        context_len = int(inputs.context_lens[row])
        start = context_len - (end - begin)
        if start == 0:
            needs_mask = self.shape.soft_cap is not None or (window is not None and window < context_len)
            mask = _mask(0, context_len, 0, window) if needs_mask else None
            return _Prefill(begin, end, 0, context_len, None, mask)
        first_block = 0 if window is None else max(0, start - window + 1) // size
        table = block_tables[inputs.row_slots[row], first_block : -(-context_len // size)]
        mask = _mask(start, context_len, first_block * size, window)
        return _Prefill(begin, end, first_block * size, context_len, torch.from_numpy(table.astype(np.int64)), mask)


def _mask(start: int, end: int, first_key: int, window: int | None) -> Tensor:
    """float32 [end - start, end - first_key]: -inf where a query at [start, end) does not attend to a key."""
    mask = torch.full((end - start, end - first_key), -torch.inf).triu_(start - first_key + 1)
    if window is not None:
        before = torch.ones(mask.shape, dtype=torch.bool).tril_(start - first_key - window)
        mask.masked_fill_(before, -torch.inf)
    return mask


def _capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, soft_cap: float) -> Tensor:
    """The attention [num_queries, heads * dim] of scaled q [num_queries, heads, dim], KV head after KV head.

    `scaled_dot_product_attention` has no soft cap.
    """
    result = q.new_empty(q.shape)
    group = q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        scores = torch.matmul(q[:, heads].transpose(0, 1), k[:, head].t())
        probabilities = torch.softmax(cap(scores, soft_cap).add_(mask), dim=-1)
        result[:, heads] = torch.matmul(probabilities, v[:, head]).transpose(0, 1)
    return result.flatten(1)
