"""The kernel that attends for decodes on CUDA: our Triton kernel, or FlashInfer's if it is installed and asked for."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from llmengine.config import ModelConfig
from llmengine.dtypes import dtype_name
from llmengine.errors import ConfigError
from llmengine.kernels.attention import AttentionConfig
from llmengine.kernels.flashinfer_attention import FlashInferDecode, is_installed, unsupported
from llmengine.kernels.step import NUM_DECODES, NUM_ROWS, NUM_TOKENS, DeviceStep
from llmengine.user_cache import cache_dir, read_choices, write_choices

_logger = logging.getLogger("llmengine.backends.cuda.backend")

ROW_BUCKETS = (1, 8, 32, 64, 128, 256)
"""Numbers of rows that are timed; each stands for those up to it, and the last for more as well."""

CONTEXT_TOKENS = 1024
"""Tokens of each row's context while it is timed, fewer where a model or its KV cache has fewer."""

_FILE_VERSION = 1
"""Part of the file: raise it when kernels change so much that old measurements mislead."""

TimeUs = Callable[[int, FlashInferDecode | None], float]
"""Microseconds of all layers' attention for a number of rows, by FlashInfer's kernel or by ours (None)."""


@dataclass(slots=True)
class DecodeChoice:
    """The kernel that attends for decodes, by the number of rows of a step.

    Attributes:
        flashinfer: FlashInfer's kernel; None if it never attends.
        faster: bucket of rows -> whether FlashInfer attends, ascending.
        missing: buckets that are not measured yet; our kernel attends until then.
        file: keeps measurements between processes.
        key: this model's key in the file.
    """

    flashinfer: FlashInferDecode | None = None
    faster: dict[int, bool] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    file: Path = Path()
    key: str = ""

    def of(self, num_rows: int) -> FlashInferDecode | None:
        """FlashInfer's kernel if it attends in steps of `num_rows` rows; None if ours does."""
        bucket = min((rows for rows in self.faster if rows >= num_rows), default=max(self.faster, default=0))
        return self.flashinfer if self.faster.get(bucket, False) else None

    @property
    def description(self) -> str:
        """Name of what attends, for people; empty if our kernel always does."""
        rows = [str(rows) for rows, faster in self.faster.items() if faster]
        if self.flashinfer is None or not rows:
            return ""
        return "FlashInfer attention" + (f" for {', '.join(rows)} rows" if len(rows) < len(self.faster) else "")

    def measure(self, time_us: TimeUs) -> None:
        """Measure the missing buckets and keep the results. Runs on the device and must not overlap a graph capture."""
        began = time.monotonic()
        for rows in self.missing:
            ours, theirs = time_us(rows, None), time_us(rows, self.flashinfer)
            self.faster[rows] = theirs < ours
            _logger.debug("decode attention, %d rows: Triton %.1f us, FlashInfer %.1f us", rows, ours, theirs)
        if self.missing:
            measured = {f"{self.key} {rows}": _NAMES[self.faster[rows]] for rows in self.missing}
            write_choices(self.file, _FILE_VERSION, read_choices(self.file, _FILE_VERSION) | measured)
            self.missing = []
            _logger.info("choosing the decode attention took %.1f s", time.monotonic() - began)
        self.faster = dict(sorted(self.faster.items()))


_NAMES = {False: "triton", True: "flashinfer"}


def choose_decode(
    config: ModelConfig,
    layers: Sequence[AttentionConfig],
    dtype: torch.dtype,
    limit: int,
    device: torch.device,
    num_sms: int,
) -> DecodeChoice:
    """Choose the kernel that attends for decodes in a model; what has to be measured is left to `DecodeChoice.measure`.

    FlashInfer is imported, and its kernels are compiled, only if it may attend.

    Args:
        layers: the attention of each layer.
        dtype: dtype of the activations.
        limit: most tokens of a request.
        num_sms: multiprocessors of the device.

    Raises:
        ConfigError: FlashInfer was chosen by name, but is not installed or cannot attend for this model and device.
    """
    backend, max_rows = config.attention_backend, config.scheduler_config.max_batch_size

    def compiled() -> FlashInferDecode:
        max_blocks = -(-limit // config.kv_cache_config.block_size)
        return _compiled(layers, dtype, max_rows, max_blocks, num_sms, device)

    if backend == "auto" or (backend == "measure" and config.tuning_budget_s == 0):
        return DecodeChoice()
    reason = _reason_against(config, layers, dtype, device)
    if backend == "flashinfer":
        if reason is not None:
            raise ConfigError(f"attention_backend='flashinfer': {reason}; use 'auto'")
        return DecodeChoice(compiled(), {max_rows: True})
    if reason is not None:
        _logger.info("attention_backend='measure': Triton attends, since %s", reason)
        return DecodeChoice()
    choice = _kept_choice(layers, dtype, max_rows, device)
    if choice.missing or any(choice.faster.values()):
        try:
            choice.flashinfer = compiled()
        except ConfigError as failure:
            _logger.warning("Triton attends: %s", failure)
            return DecodeChoice()
    return choice


def _reason_against(
    config: ModelConfig, layers: Sequence[AttentionConfig], dtype: torch.dtype, device: torch.device
) -> str | None:
    if config.deterministic:
        return "deterministic=True excludes it: the order in which it adds numbers depends on the number of rows"
    kv_cache = config.quant_config.kv_cache
    if kv_cache != "none":
        return f"quant_config.kv_cache={kv_cache!r} excludes it: it knows no scales of single tokens and heads"
    capability = torch.cuda.get_device_capability(device)
    reasons = (unsupported(layer, dtype, capability) for layer in layers)
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None and not is_installed():
        return "FlashInfer is not installed (pip install llmengine[flashinfer])"
    return reason


def _compiled(
    layers: Sequence[AttentionConfig],
    dtype: torch.dtype,
    max_rows: int,
    max_blocks: int,
    num_sms: int,
    device: torch.device,
) -> FlashInferDecode:
    """Compile FlashInfer's kernels; raises `ConfigError` if that fails."""
    began = time.monotonic()
    try:
        flashinfer = FlashInferDecode(layers[0], dtype, max_rows, max_blocks, num_sms, device)
        for layer in {bool(layer.sliding_window): layer for layer in layers}.values():
            flashinfer.compile(layer)
    except (ImportError, AttributeError, OSError, RuntimeError, ValueError) as failure:
        raise ConfigError(f"FlashInfer is installed but cannot be used: {failure!r}") from failure
    _logger.info("FlashInfer was ready after %.1f s", time.monotonic() - began)
    return flashinfer


def _kept_choice(
    layers: Sequence[AttentionConfig], dtype: torch.dtype, max_rows: int, device: torch.device
) -> DecodeChoice:
    """The choice that this machine has measured for such layers."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    name = f"{torch.cuda.get_device_name(device)}-triton{triton.__version__}-flashinfer{version}"
    file = cache_dir() / f"attention-{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}.json"
    kinds = sorted({str(replace(layer, scale=1.0)) for layer in layers})
    key = f"{dtype_name(dtype)} {' '.join(kinds)}"
    kept = read_choices(file, _FILE_VERSION)
    buckets = [rows for rows in ROW_BUCKETS if rows <= max_rows] or [max_rows]
    known = {rows: kept[f"{key} {rows}"] == _NAMES[True] for rows in buckets if f"{key} {rows}" in kept}
    return DecodeChoice(None, known, [rows for rows in buckets if rows not in known], file, key)


def decode_step(num_rows: int, like: Tensor, num_blocks: int, block_size: int) -> DeviceStep:
    """A step of decodes with scattered blocks, for measuring.

    Args:
        like: the block tables of the slots, [num_slots + 1, max_blocks], num_slots >= num_rows.
        num_blocks: blocks of the pool; rows share blocks if there are too few.
    """
    context = min(CONTEXT_TOKENS, like.shape[1] * block_size)
    used = -(-context // block_size)
    tables = torch.zeros_like(like)
    tables[:num_rows, :used] = (torch.randperm(num_rows * used) % (num_blocks - 1) + 1).view(num_rows, used).to(like)
    rows = torch.arange(num_rows, dtype=torch.int32, device=like.device)
    counts = torch.zeros(8, dtype=torch.int32)
    counts[[NUM_TOKENS, NUM_ROWS, NUM_DECODES]] = num_rows
    values = {
        "counts": counts.to(like.device),
        "positions": torch.full_like(rows, context - 1),
        "token_slots": rows,
        "row_slots": rows,
        "context_lens": torch.full_like(rows, context),
        "block_tables": tables,
    }
    return DeviceStep(**{field.name: values.get(field.name, rows[:0]) for field in fields(DeviceStep)})
