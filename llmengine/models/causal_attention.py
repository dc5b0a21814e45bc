"""Attention over one whole text without a KV cache, in torch's own operators: for calibration and as a reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmengine.models.arch import ModelArch
from llmengine.models.decoder import Norm


@dataclass(frozen=True, slots=True)
class CausalAttention:
    """The attention of one layer over the tokens at positions 0, 1, 2 and so on of one text.

    Attributes:
        rope_table: of the layer, at least as long as the texts; see `models.rope`.
        q_norm: of q [num_tokens, num_heads, head_dim] before the rotation; None without, and then k_norm is too.
        k_norm: likewise of k.
        sliding_window: see `LayerArch`.
    """

    arch: ModelArch
    rope_table: Tensor
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    sliding_window: int | None = None

    def __call__(self, qkv: Tensor) -> Tensor:
        """[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] -> [num_tokens, num_heads * head_dim]."""
        arch, num_tokens = self.arch, qkv.shape[0]
        q, k, v = self.rotated(qkv)
        group = arch.num_heads // arch.num_kv_heads
        scores = torch.matmul(
            q.view(num_tokens, arch.num_kv_heads, group, arch.head_dim).permute(1, 2, 0, 3), k.permute(1, 2, 0)[:, None]
        ).mul_(arch.score_scale)
        if (cap := arch.attention_soft_cap) is not None:
            scores.div_(cap).tanh_().mul_(cap)
        positions = torch.arange(num_tokens, device=qkv.device)
        distance = positions[:, None] - positions
        hidden = distance < 0
        if self.sliding_window is not None:
            hidden |= distance >= self.sliding_window
        probabilities = torch.softmax(scores.masked_fill_(hidden, -torch.inf), dim=-1)
        return torch.matmul(probabilities, v.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).reshape(num_tokens, -1)

    def rotated(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised and rotated q [num_tokens, num_heads, head_dim] and k, and v as it is; k and v go to a cache."""
        arch = self.arch
        heads = qkv.view(qkv.shape[0], -1, arch.head_dim)
        q, k, v = heads.split((arch.num_heads, arch.num_kv_heads, arch.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = self.rope_table[: qkv.shape[0], None, :].chunk(2, dim=-1)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension j of each head rotates together with j + head_dim / 2."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
