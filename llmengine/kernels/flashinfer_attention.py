"""Decode attention by FlashInfer's XQA kernel on our pool, where FlashInfer is installed.

`flashinfer.xqa.xqa` is FlashInfer's entry point that needs no plan by the host. It reads block tables and lengths from
the device when it runs, so a CUDA graph can replay it for steps that the host does not know yet. (The wrappers with
`plan()` cut contexts into pieces on the host before each step.) Apart from what `unsupported` checks, it needs tables
and lengths by row of the step instead of by slot, and q packed and rotated, apart from k and v. So a step begins with
one small kernel that gathers tables and lengths, and each layer begins with `rope_and_write`.

FlashInfer compiles the kernel with nvcc when a machine first needs it, once for each combination of dtype, block size,
head size, group and whether there is a window. That takes ten seconds or more; FlashInfer keeps the result in its own
cache directory.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.dtypes import dtype_name
from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.attention_prefill import rope_and_write
from llmengine.kernels.kv_blocks import KvBlocks
from llmengine.kernels.step import NUM_DECODES, DeviceStep

_NUM_DECODES = tl.constexpr(NUM_DECODES)

CAPABILITIES = (9, 10, 12)
"""Major compute capabilities that the kernel is written for."""
DTYPES = (torch.float16, torch.bfloat16)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
MAX_GROUP = 32
"""Query heads that share a KV head."""

_WORKSPACE_BYTES = 8 << 20
"""Splits meet there: at most one an SM, of at most `MAX_GROUP` heads."""
_COPY_BLOCKS = 512


def is_installed() -> bool:
    """Whether FlashInfer is installed, without importing it."""
    spec = importlib.util.find_spec("flashinfer")
    # A folder of that name on the path also has a spec, but no origin.
    return spec is not None and spec.origin is not None


def unsupported(config: AttentionConfig, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Reason why FlashInfer's kernel cannot compute this on a GPU of that compute capability; None if it can."""
    if capability[0] not in CAPABILITIES:
        return f"compute capability {capability[0]}.{capability[1]}; there are kernels for {_listed(CAPABILITIES)} only"
    if dtype not in DTYPES:
        return f"dtype {dtype_name(dtype)}; there are kernels for {_listed(map(dtype_name, DTYPES))} only"
    if config.block_size not in BLOCK_SIZES:
        return f"block_size={config.block_size}; there are kernels for {_listed(BLOCK_SIZES)} only"
    if config.head_dim > MAX_HEAD_DIM or config.head_dim % 16:
        return f"head_dim={config.head_dim}; there are kernels for multiples of 16 up to {MAX_HEAD_DIM} only"
    if config.group > MAX_GROUP:
        return f"{config.group} query heads for each KV head; its kernels take {MAX_GROUP} at most"
    if config.soft_cap:
        return f"attention scores are capped at {config.soft_cap:g}, which it does not support"
    return None


class FlashInferDecode:
    """Decode attention of all layers, with buffers for the largest step; graphs that never run at once share one.

    Imports FlashInfer.

    Args:
        config: the attention of any layer; layers differ in their windows only.
        dtype: dtype of q, k, v and the result.
        max_rows: rows of the largest step.
        max_blocks: most blocks of a row.
        num_sms: decides how far contexts are split.
    """

    def __init__(
        self,
        config: AttentionConfig,
        dtype: torch.dtype,
        max_rows: int,
        max_blocks: int,
        num_sms: int,
        device: torch.device | str,
    ) -> None:
        self._xqa: Callable[..., None] = importlib.import_module("flashinfer.xqa").xqa
        self._num_sms, self._block_size = num_sms, config.block_size
        self._q = torch.zeros((max_rows, config.num_heads * config.head_dim), dtype=dtype, device=device)
        self._tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._lens = torch.ones(max_rows, dtype=torch.int32, device=device)
        semaphores = torch.zeros(max_rows * config.num_kv_heads, dtype=torch.int32, device=device)
        self._semaphores = semaphores.view(torch.uint32)  # the kernel leaves them at zero
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def begin(self, step: DeviceStep, num_rows: int) -> None:
        """Gather what `attend` reads from the step, once for all layers.

        Rows from NUM_DECODES on get one token of block 0, which is zeros, since `attend` computes them as well.
        """
        _gather_kernel[(num_rows,)](
            step.counts,
            step.row_slots,
            step.context_lens,
            step.block_tables,
            self._tables,
            self._lens,
            MAX_BLOCKS=step.block_tables.shape[1],
            TABLE_BLOCKS=self._tables.shape[1],
            COPY_BLOCKS=min(_COPY_BLOCKS, triton.next_power_of_2(self._tables.shape[1])),
            BLOCK_SIZE=self._block_size,
            num_warps=4,
        )

    def attend(
        self,
        step: DeviceStep,
        qkv: Tensor,
        kv: KvBlocks,
        rope_table: Tensor,
        config: AttentionConfig,
        out: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
        pdl: bool = False,
    ) -> None:
        """Do what `rope_and_write` does for all tokens of the step, then attend for the rows [0, NUM_DECODES).

        The arguments are those of `decode_attention`. The other rows of `out` that were given to `begin` are
        overwritten with finite values, so chunks of prompts must attend after this.
        """
        rope_and_write(step, qkv, kv, rope_table, config, q_norm, k_norm, eps, pdl, self._q)
        self._run(kv.numbers, config, out, min(qkv.shape[0], step.row_slots.shape[0]), pdl)

    def compile(self, config: AttentionConfig) -> None:
        """Let FlashInfer compile its kernel for `config`, unless it has done so before, and load it.

        Must be called from one thread, outside a capture. Raises whatever FlashInfer raises.
        """
        pool = (1, 2, config.num_kv_heads, config.block_size, config.head_dim)
        self._run(self._q.new_zeros(pool), config, torch.empty_like(self._q[:1]), 1, pdl=False)

    def _run(self, kv: Tensor, config: AttentionConfig, out: Tensor, num_rows: int, pdl: bool) -> None:
        shape = (num_rows, 1, config.num_heads, config.head_dim)
        self._xqa(
            self._q[:num_rows].view(shape),
            kv[:, 0],
            kv[:, 1],
            self._tables[:num_rows],
            self._lens[:num_rows].view(torch.uint32).view(num_rows, 1),
            out[:num_rows].view(shape),
            self._workspace,
            self._semaphores,
            config.num_kv_heads,
            config.block_size,
            q_scale=config.scale * config.head_dim**0.5,  # the kernel itself divides by the root
            sliding_win_size=config.sliding_window,
            kv_layout="HND",
            sm_count=self._num_sms,
            enable_pdl=pdl,
        )


@triton.jit
def _gather_kernel(
    counts_ptr,
    row_slots_ptr,
    context_lens_ptr,
    block_tables_ptr,
    tables_ptr,
    lens_ptr,
    MAX_BLOCKS: tl.constexpr,
    TABLE_BLOCKS: tl.constexpr,
    COPY_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Program (row)."""
    row = tl.program_id(0)
    num_decodes = tl.load(counts_ptr + _NUM_DECODES)
    table_ptr = tables_ptr + row.to(tl.int64) * TABLE_BLOCKS
    if row >= num_decodes:
        tl.store(lens_ptr + row, 1)
        tl.store(table_ptr, 0)
        return
    length = tl.load(context_lens_ptr + row)
    slot = tl.load(row_slots_ptr + row)
    tl.store(lens_ptr + row, length)
    num_blocks = tl.cdiv(length, BLOCK_SIZE)
    for start in tl.range(0, num_blocks, COPY_BLOCKS):
        blocks = start + tl.arange(0, COPY_BLOCKS)
        used = blocks < num_blocks
        found = tl.load(block_tables_ptr + slot.to(tl.int64) * MAX_BLOCKS + blocks, mask=used, other=0)
        tl.store(table_ptr + blocks, found, mask=used)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
