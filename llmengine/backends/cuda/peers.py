"""A rank's place among those that share a model's matrices: what they add up, gather and tell each other on devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmengine.kernels.embedding import look_up
from llmengine.kernels.peer_sum import RowNorm
from llmengine.kernels.quantized_matrix import QuantizedMatrix
from llmengine.models.arch import ModelArch
from llmengine.models.sharding import Shard, vocabulary_range
from llmengine.quantization.matrix import Matrix

InPlace = Callable[[Tensor], None]
"""Replaces a tensor [num_tokens, columns of this rank]; all ranks call it."""


class DeviceCollectives(Protocol):
    """What ranks do together, queued in the current stream of each; all ranks call the same in the same order.

    A CUDA graph can hold every operation, once it has run with tensors of the same sizes.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def description(self) -> str:
        """Name of what adds up, for people."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace the contiguous tensor, of one shape on all ranks, by its sum over them."""

    def add_sum(self, part: Tensor, x: Tensor, norm: RowNorm | None) -> None:
        """Add to x [num_rows, hidden], the same on all ranks, the sum of `part` over them, and write its norm.

        `part` is of the same shape, and holds junk afterwards.
        """

    def choose(self, logits: Tensor, counts: Tensor, ids: Tensor, failed: Tensor, start: int) -> None:
        """See `kernels.peer_sum.choose_over_peers`."""

    def broadcast(self, tensor: Tensor) -> None:
        """Replace the contiguous tensor, of one shape on all ranks, by that of rank 0."""

    def gather(self, tensor: Tensor, parts: Tensor | None) -> None:
        """Write the tensors of all ranks, of one shape, to `parts` [size, ...] on rank 0; None on the others."""


@dataclass(frozen=True, slots=True)
class Peers:
    """One rank of several that compute each step, or their stage of it, together.

    Attributes:
        rows: of the vocabulary that each rank has.
        qk_columns: of q and of k, over the heads of all ranks, each counted once.
        counts_keys: whether this rank is the first that has its heads of keys.
        logits: fp32 [size * max_batch_size * most rows], scratch of rank 0 of the last stage; None on the others.
    """

    collectives: DeviceCollectives
    rows: Sequence[range]
    qk_columns: tuple[int, int]
    counts_keys: bool
    logits: Tensor | None

    @classmethod
    def of(
        cls, collectives: DeviceCollectives, arch: ModelArch, counts_keys: bool, max_rows: int, device: torch.device
    ) -> Peers:
        """Peers that share the model `arch`, for steps of up to `max_rows` rows of logits, with scratch on `device`.

        `arch` may be a stage of a model, whose scratch is needed in the last one only.
        """
        rows = [vocabulary_range(arch, Shard(rank, collectives.size)) for rank in range(collectives.size)]
        size = len(rows) * max_rows * max(map(len, rows))
        has_scratch = arch.has_head and not collectives.rank
        scratch = torch.zeros(size, dtype=torch.float32, device=device) if has_scratch else None
        qk_columns = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        return cls(collectives, rows, qk_columns, counts_keys, scratch)

    @property
    def is_first(self) -> bool:
        """Whether this is the first of them, whose terms of sums hold the residuals and biases, if any do.

        In the last stage it is the one that samples.
        """
        return self.collectives.rank == 0

    @property
    def vocab_size(self) -> int:
        """Rows of the vocabulary that all ranks have together."""
        return self.rows[-1].stop

    def choose(self, own: Tensor, counts: Tensor, ids: Tensor, failed: Tensor) -> None:
        """Replace what each rank chose among its logits by the choice among all; see `DeviceCollectives.choose`."""
        self.collectives.choose(own, counts, ids, failed, self.rows[self.collectives.rank].start)

    def head_norms(self, q_norm: Tensor, k_norm: Tensor, eps: float) -> tuple[InPlace, InPlace]:
        """RMSNorms of q and of k over the heads of all ranks, in place.

        Args:
            q_norm: weights of this rank's heads, [num_heads * head_dim]; `k_norm` likewise, [num_kv_heads * head_dim].
        """

        def bound(weight: Tensor, columns: int, counts: bool) -> InPlace:
            def apply(x: Tensor) -> None:
                exact = x.float()
                squares = exact.square().sum(-1, keepdim=True) if counts else exact.new_zeros(len(x), 1)
                self.collectives.all_reduce(squares)
                x.copy_(exact * torch.rsqrt(squares / columns + eps) * weight.float())

            return apply

        columns = self.qk_columns
        return bound(q_norm, columns[0], counts=True), bound(k_norm, columns[1], counts=self.counts_keys)

    def embed(self, embedding: Matrix | QuantizedMatrix, token_ids: Tensor, out: Tensor) -> None:
        """Write the rows of `token_ids` to out [num_tokens, hidden]; `embedding` has the rows of this rank."""
        own = self.rows[self.collectives.rank]
        index = token_ids - own.start
        is_other = (index < 0) | (index >= len(own))
        index.masked_fill_(is_other, 0)
        if isinstance(embedding, QuantizedMatrix):
            look_up(embedding, index, out)
        else:
            torch.index_select(embedding.weight, 0, index, out=out)
        out.masked_fill_(is_other[:, None], 0.0)
        self.collectives.all_reduce(out)

    def gather_logits(self, own: Tensor, whole: Tensor) -> None:
        """Write the logits of all ranks to whole [num_rows, vocab] on rank 0.

        Args:
            own: fp32 [num_rows, rows of this rank], the front of a tensor of as many rows as the widest rank has.
            whole: on the other ranks, `own` itself.
        """
        widest = max(map(len, self.rows))
        if own.shape[1] < widest:
            own = torch.nn.functional.pad(own, (0, widest - own.shape[1]))
        if self.logits is None:
            self.collectives.gather(own, None)
            return
        parts = self.logits[: len(self.rows) * own.numel()].view(len(self.rows), *own.shape)
        self.collectives.gather(own, parts)
        for part, rows in zip(parts, self.rows, strict=True):
            whole[:, rows.start : rows.stop].copy_(part[:, : len(rows)])
