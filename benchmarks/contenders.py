"""Contenders of a comparison, each in a process of its own.

OpenMP's threads belong to the thread that started them, and libgomp stops spinning once a process has more of them
than the machine has cores: two engines in one process would slow each other down even while one of them idles.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

Prompts = Sequence[Sequence[int]]

PEERS = ("generate", "continuous")


class EngineRunner:
    """llmengine without tokenizer and prefix cache."""

    def __init__(self, model: Path, threads: int, weights: str) -> None:
        from llmengine import LLM, KvCacheConfig, ModelConfig, QuantConfig, SchedulerConfig

        config = ModelConfig(
            model,
            device="cpu",
            quant_config=QuantConfig(weights=weights),  # type: ignore[arg-type]
            kv_cache_config=KvCacheConfig(enable_prefix_caching=False),
            # For throughput: nobody watches single tokens here, so prompts need not come in small pieces.
            scheduler_config=SchedulerConfig(max_tokens_per_step=1024, max_tokens_per_mixed_step=1024),
            num_threads=threads,
        )
        self.llm = LLM(config, enable_tokenizer=False)

    def warm_up(self, prompts: Prompts, num_tokens: int) -> str:
        """Run once, briefly; return what is worth knowing of the engine."""
        self.run(prompts, min(num_tokens, 8))
        return self.llm.info.description

    def run(self, prompts: Prompts, num_tokens: int) -> float:
        """Return the seconds that one `generate` call takes."""
        from llmengine import SamplingParams

        params = SamplingParams(max_new_tokens=num_tokens, ignore_eos=True)
        began = time.perf_counter()
        outputs = self.llm.generate(list(prompts), params)
        seconds = time.perf_counter() - began
        assert {output.num_tokens for output in outputs} == {num_tokens}, "a request ended early"
        return seconds

    def overhead(self, num_requests: int, num_tokens: int) -> tuple[float, float]:
        """Return the share of the step time outside the forward pass with that many requests, and ms a step of it."""
        vocab_size = self.llm.info.vocab_size
        prompts = [[(7919 * (i + 1) * (j + 1)) % vocab_size for j in range(16)] for i in range(num_requests)]
        before = self.llm.stats().counters
        self.run(prompts, num_tokens)
        after = self.llm.stats().counters
        step_s, forward_s = after.step_s - before.step_s, after.forward_s - before.forward_s
        return 1 - forward_s / step_s, 1e3 * (step_s - forward_s) / (after.num_steps - before.num_steps)


class TransformersRunner:
    """transformers on the same weights; kind: "generate" or "continuous"."""

    def __init__(self, model: Path, threads: int, kind: str) -> None:
        import torch

        from benchmarks.peers import Transformers

        torch.set_num_threads(threads)
        self._kind = kind
        self._transformers = Transformers(model)

    def warm_up(self, prompts: Prompts, num_tokens: int) -> str:
        """Find the fastest variant for this workload and return its name."""
        chosen = self._transformers.choose_variant(self._kind, prompts, num_tokens)
        limit = f" and {chosen.max_batch_tokens} tokens a step" if chosen.max_batch_tokens else ""
        return f"{chosen.attention} attention{limit}"

    def run(self, prompts: Prompts, num_tokens: int) -> float:
        """Return the seconds that one run takes."""
        return self._transformers.run(self._kind, prompts, num_tokens)


class Contender:
    """A runner in a worker process; close it when done."""

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_make, initargs=(make, *arguments)
        )

    def call(self, method: str, *arguments: Any) -> Any:
        """Return what the runner's method returns."""
        return self._pool.submit(_call, method, *arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def make_contender(name: str, model: Path, threads: int) -> Contender:
    """Return "llmengine", "llmengine int8" or one of `PEERS`."""
    if name in PEERS:
        return Contender(TransformersRunner, model, threads, name)
    return Contender(EngineRunner, model, threads, "int8" if "int8" in name else "none")


_runner: Any = None


def _make(make: Callable[..., Any], *arguments: Any) -> None:
    global _runner
    _runner = make(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_runner, method)(*arguments)
