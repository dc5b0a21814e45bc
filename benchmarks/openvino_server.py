"""OpenVINO GenAI in a process that `benchmarks.contenders` starts with an interpreter that has the package.

    python openvino_server.py MODEL.gguf THREADS

It needs openvino-genai and openvino-tokenizers. Lines and answers are those of `llama_cpp_server.py`. It imports
nothing of this project.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import openvino
import openvino_genai

_CACHE_GB = 2


def main() -> None:
    """Load the model, then answer until standard input ends."""
    model, threads = sys.argv[1], int(sys.argv[2])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = _CACHE_GB
    scheduler.enable_prefix_caching = False
    properties = {"INFERENCE_NUM_THREADS": threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
    print("answer: ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = asked["num_tokens"]
        config.ignore_eos, config.do_sample = True, False
        inputs = [openvino.Tensor(np.array([prompt], np.int64)) for prompt in asked["prompts"]]
        began = time.perf_counter()
        results = pipeline.generate(inputs, [config] * len(inputs))
        seconds = time.perf_counter() - began
        found = {len(result.m_generation_ids[0]) for result in results}
        if found != {asked["num_tokens"]}:
            raise RuntimeError(f"{found} tokens were generated instead of {asked['num_tokens']}")
        print(f"answer: {seconds}", flush=True)


if __name__ == "__main__":
    main()
