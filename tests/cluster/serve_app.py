"""A Serve application over fake engines, in a process of its own: `python -m tests.cluster.serve_app PORT`.

It says "ready" when it serves two replicas. Told "scale", it deploys itself anew with one to two replicas, by load, and
says "scaling". It ends with its standard input. The models say which process they run in.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

import ray
from ray import serve

from llmengine import LLM
from llmengine.batch import Batch
from llmengine.cluster.serve import ServeConfig, build_app
from llmengine.server import ServerConfig
from llmengine.testing import ChatByteTokenizer, FakeBackend

MODEL, KEY = "fake", "sesame"
MAX_MODEL_LEN = 8192
POISON = "\x07"
"""A prompt with this character kills the engine."""

STEP_S = 0.02


def name_process(token_ids: Sequence[int]) -> int:
    """The next character of this process's id, again and again."""
    if ord(POISON) in token_ids[:64]:
        raise RuntimeError("poisoned")
    text = f"{os.getpid()} "
    return ord(text[len(token_ids) % len(text)])


def slow_step(batch: Batch) -> None:
    """Take about as long as a step of a model does."""
    time.sleep(STEP_S)


async def load() -> LLM:
    """A fake model with a chat template."""

    def backend() -> FakeBackend:
        blocks = MAX_MODEL_LEN // 64 * 16
        return FakeBackend(
            name_process, num_blocks=blocks, block_size=64, max_model_len=MAX_MODEL_LEN, on_step=slow_step
        )

    return LLM.from_backend(backend, tokenizer=ChatByteTokenizer())


SERVER = ServerConfig(model_name=MODEL, api_keys=[KEY], drain_s=60.0)
SCALING = {
    **{"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2},
    **{"upscale_delay_s": 1, "downscale_delay_s": 1, "look_back_period_s": 10.1},
}


def main(port: int) -> None:
    """Serve until the standard input ends."""
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_app(load, ServeConfig(num_replicas=2, health_check_period_s=0.5), SERVER))
    print("ready", flush=True)
    for _ in sys.stdin:
        serve.run(build_app(load, ServeConfig(autoscaling=SCALING), SERVER))
        print("scaling", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
