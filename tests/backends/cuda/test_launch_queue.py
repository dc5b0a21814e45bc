"""A rank that queues more than its GPU takes waits for the GPU, which must not look as if it slept: it is no hang."""

from __future__ import annotations

import select
import subprocess
import sys
import time

import pytest

from llmengine.backends.ranks.process_state import Activity

LOOK_S = 0.5
QUEUES = """
import sys
import torch

x = torch.zeros(8, device="cuda")
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(100):
            x.add_(1)
    graph.replay()
    stream.synchronize()
    print(flush=True)
    torch.cuda._sleep(10 * 10**9)  # cycles: about 5 s
    for _ in range(20_000):
        graph.replay() if sys.argv[1] == "graphs" else x.add_(1)
    print(flush=True)
    stream.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kernels", "graphs"])
def test_a_full_queue_is_no_sleep(device: str, what: str) -> None:
    if device == "cpu":
        pytest.skip("on a GPU only")
    with subprocess.Popen([sys.executable, "-c", QUEUES, what], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        activity, asleep = Activity(process.pid), []
        activity.sleeps()
        time.sleep(LOOK_S)
        while not select.select([process.stdout], [], [], 0)[0]:
            asleep.append(activity.sleeps())
            time.sleep(LOOK_S)
        process.kill()
    assert len(asleep) >= 4, "the queue was not full"
    assert asleep.count(True) <= 1, asleep
