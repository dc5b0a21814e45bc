"""llama.cpp in a process that `benchmarks.contenders` starts with an interpreter that has the package xllamacpp.

    python llama_cpp_server.py MODEL.gguf THREADS

Each input line is {"prompts": [[id, ...], ...], "num_tokens": n}. It generates greedily for all prompts at once and
prints the seconds that this took. It imports nothing of this project.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

_MAX_PROMPTS = 64
_NUM_TOKENS = 16 * 2048
"""KV cache in tokens, for all prompts together."""


def main() -> None:
    """Load the model, then answer until standard input ends."""
    model, threads = sys.argv[1], int(sys.argv[2])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = _MAX_PROMPTS
    params.n_ctx = _NUM_TOKENS
    params.kv_unified = True
    params.n_batch = params.n_ubatch = 1024
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = False
    server = xllamacpp.Server(params)

    def complete(prompt: list[int], num_tokens: int) -> None:
        request: dict[str, Any] = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "cache_prompt": False,
        }
        answer = server.handle_completions(request)
        found = answer.get("usage", {}).get("completion_tokens", answer.get("tokens_predicted"))
        if found != num_tokens:
            raise RuntimeError(f"{found} tokens were generated instead of {num_tokens}: {str(answer)[:500]}")

    print("answer: ready", flush=True)
    with ThreadPoolExecutor(_MAX_PROMPTS) as pool:
        for line in sys.stdin:
            asked = json.loads(line)
            began = time.perf_counter()
            list(pool.map(complete, asked["prompts"], [asked["num_tokens"]] * len(asked["prompts"])))
            print(f"answer: {time.perf_counter() - began}", flush=True)


if __name__ == "__main__":
    main()
