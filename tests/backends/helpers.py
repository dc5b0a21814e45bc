"""Drives the `Backend` protocol directly: tiny checkpoints, hand-made block tables, greedy generation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmengine.backends.blocks_in_use import source_in_use
from llmengine.backends.cpu.backend import CpuBackend
from llmengine.backends.cpu.loading import load_cpu_backend
from llmengine.backends.cpu.native_library import NATIVE_DIRECTORY, NativeUnavailableError
from llmengine.batch import Backend, Batch, BatchRow, SlotInit, StepResult
from llmengine.checkpoints.opening import open_model
from llmengine.checkpoints.quantized_source import quantized_source
from llmengine.config import KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig
from llmengine.sampling_params import SamplingParams

NO_NATIVE = Path("/nonexistent")

TINY = {
    "vocab_size": 311,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_tiny(directory: Path, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Save a random Llama with `TINY` sizes and `changes` as a checkpoint; return the transformers model."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**TINY, **changes})
    # A large head spreads the logits, so that greedy choices are not near-ties.
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    return model


def load_tiny(
    directory: Path,
    *,
    block_size: int = 8,
    quant: Any = "none",
    max_batch_size: int = 8,
    native_directory: Path = NATIVE_DIRECTORY,
    **settings: Any,
) -> CpuBackend:
    """Return the CPU backend for a directory's checkpoint; `native_directory=NO_NATIVE` leaves all steps to torch."""
    config = ModelConfig(
        model_dir=directory,
        device="cpu",
        kv_cache_config=KvCacheConfig(block_size=block_size, max_bytes=16 << 20),
        quant_config=quant if isinstance(quant, QuantConfig) else QuantConfig(weights=quant),
        scheduler_config=SchedulerConfig(
            max_batch_size=max_batch_size, max_tokens_per_step=128, max_tokens_per_mixed_step=64
        ),
        **settings,
    ).resolve()
    source = source_in_use(config, open_model(directory))
    return load_cpu_backend(config, quantized_source(source, config.quant_config), native_directory)


def leave_products_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have engines run as where the native library is not built: activations are multiplied as they are."""

    def find(*_: object) -> None:
        raise NativeUnavailableError("the test has none")

    for module in ("native", "native_library"):
        monkeypatch.setattr(f"llmengine.backends.cpu.{module}.find_native_library", find)


@dataclass
class DrivenRequest:
    """One request as the engine would hold it."""

    slot: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)
    started: bool = False

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


class BackendDriver:
    """Hands out blocks in a shuffled order and turns `step` calls into batches."""

    def __init__(self, backend: Backend, seed: int = 0) -> None:
        self.backend = backend
        self._free = list(range(1, backend.info.num_blocks))
        random.Random(seed).shuffle(self._free)
        self._step = 0
        self._params: dict[int, tuple[SamplingParams, int, frozenset[int]]] = {}

    def add(
        self,
        slot: int,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        seed: int = 0,
        stop_token_ids: Sequence[int] = (),
    ) -> DrivenRequest:
        """Return a request for `slot`; the slot is initialised in its first step."""
        self._params[slot] = (params or SamplingParams(), seed, frozenset(stop_token_ids))
        return DrivenRequest(slot, list(prompt), len(prompt))

    def release(self, request: DrivenRequest) -> None:
        """Give the request's blocks back; they are handed out again first."""
        self._free[:0] = request.blocks
        request.blocks = []

    def step(self, *parts: tuple[DrivenRequest, int]) -> StepResult:
        """Compute the next n tokens of each (request, n); sample for those that reach their last known token."""
        self.backend.launch(self.batch(*parts))
        result = self.backend.collect()
        assert result.step == self._step
        for request, _ in parts:
            if request.slot in result.token_ids:
                request.token_ids.extend(result.token_ids[request.slot])
        return result

    def batch(self, *parts: tuple[DrivenRequest, int]) -> Batch:
        """Return the step that computes the next n tokens of each (request, n)."""
        inits = [self._init(request) for request, _ in parts if not request.started]
        rows = [self._row(request, num_tokens) for request, num_tokens in parts]
        self._step += 1
        return Batch(self._step, rows, inits)

    def generate(self, requests: Sequence[DrivenRequest], num_tokens: int, chunk: int = 64) -> list[list[int]]:
        """Run all requests together, prompts in chunks, until each has `num_tokens` new ones."""
        while True:
            parts = [
                (request, min(chunk, len(request.token_ids) - request.num_computed_tokens))
                for request in requests
                if len(request.output_ids) < num_tokens
            ]
            if not parts:
                return [request.output_ids for request in requests]
            self.step(*parts)

    def _init(self, request: DrivenRequest) -> SlotInit:
        request.started = True
        params, seed, stop_token_ids = self._params[request.slot]
        return SlotInit(request.slot, tuple(request.token_ids), request.num_prompt_tokens, params, seed, stop_token_ids)

    def _row(self, request: DrivenRequest, num_tokens: int) -> BatchRow:
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        needed = -(-end // self.backend.info.block_size) - len(request.blocks)
        new = [self._free.pop() for _ in range(needed)]
        request.blocks += new
        ids = request.token_ids[start:end]
        if end > request.num_prompt_tokens:
            ids = ids[:-1]  # the backend sampled it and knows it
        request.num_computed_tokens = end
        return BatchRow(request.slot, start, num_tokens, ids, new, int(end == len(request.token_ids)))


@torch.no_grad()
def reference_greedy(model: LlamaForCausalLM, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return the tokens that transformers chooses, computed without a cache."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def reference_logprobs(model: LlamaForCausalLM, token_ids: Sequence[int]) -> torch.Tensor:
    """Return transformers' log-probabilities after each token, fp32 [num_tokens, vocab]."""
    return torch.log_softmax(model(torch.tensor([list(token_ids)])).logits[0].float(), dim=-1)
