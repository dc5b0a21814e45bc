"""Captured steps: when a graph is captured and replayed, and that capturing in a quiet moment changes no result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmengine.backends.cuda import graphs as cuda_graphs
from llmengine.backends.cuda.buckets import Bucket, BucketSizes
from llmengine.backends.cuda.graphs import GraphCache
from llmengine.backends.cuda.step_program import StepProgram
from llmengine.backends.cuda.stream import HostStream
from llmengine.backends.cuda.warmup import GraphWarmup
from llmengine.config import SchedulerConfig
from llmengine.sampling_params import SamplingParams
from tests.backends.cuda.helpers import load_cuda
from tests.backends.helpers import BackendDriver, save_tiny

CPU = torch.device("cpu")


class Recorder(HostStream):
    """Records what was captured and what was replayed; captures fail with the given errors first."""

    def __init__(self, *failures: Exception) -> None:
        self.log: list[str] = []
        self._failures = list(failures)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        if self._failures:
            raise self._failures.pop(0)
        return lambda: self.log.append("replay")

    def step(self) -> None:
        self.log.append("eager")


def test_a_step_is_captured_when_it_comes_again() -> None:
    stream = Recorder()
    graphs: GraphCache[int] = GraphCache(CPU, stream)
    for _ in range(3):
        graphs.run(8, stream.step)
    assert stream.log == ["eager", "eager", "capture", "replay"]
    assert list(graphs.seen()) == []
    graphs.drop(lambda key: key == 8)
    assert list(graphs.seen()) == [8]


def test_a_quiet_moment_saves_later_steps_the_capture() -> None:
    stream = Recorder()
    graphs: GraphCache[int] = GraphCache(CPU, stream)
    graphs.run(8, stream.step)
    graphs.capture(8, stream.step)
    graphs.run(8, stream.step)
    assert stream.log == ["eager", "eager", "capture", "replay"]


def test_a_full_device_runs_steps_eagerly_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    stream = Recorder(torch.OutOfMemoryError("full"))
    graphs: GraphCache[int] = GraphCache(CPU, stream)
    for key in (1, 1, 1, 2, 2, 2):
        graphs.run(key, stream.step)
    assert stream.log == ["eager", "eager", "capture", *["eager"] * 4]
    assert not graphs.may_capture_ahead
    assert "runs eagerly from now on" in caplog.text


def test_a_capture_that_another_thread_disturbed_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    stream = Recorder(RuntimeError("operation not permitted when stream is capturing"))
    graphs: GraphCache[int] = GraphCache(CPU, stream)
    for _ in range(4):
        graphs.run(1, stream.step)
    assert stream.log == ["eager", "eager", "capture", "eager", "capture", "replay"]
    assert graphs.may_capture_ahead
    assert "will be tried again" in caplog.text


def test_captures_that_always_fail_are_given_up(caplog: pytest.LogCaptureFixture) -> None:
    stream = Recorder(*[RuntimeError("no")] * 20)
    graphs: GraphCache[int] = GraphCache(CPU, stream)
    for _ in range(20):
        graphs.run(1, stream.step)
    assert 2 <= stream.log.count("capture") < 10
    assert not graphs.may_capture_ahead
    assert "runs eagerly from now on" in caplog.text


def test_preparing_ends_on_a_full_device(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    backend = load_cuda(tmp_path, device)
    driver = BackendDriver(backend)
    driver.step((driver.add(0, [5, 6, 7]), 3))

    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as full:
        full.setattr(StepProgram, "run", run_out)
        assert backend.prepare()
        assert not backend.prepare()
    assert caplog.text.count("no memory to capture") == 1
    backend.close()


@pytest.mark.parametrize(("budget_s", "may_go_on"), [(60.0, True), (1e-9, False)])
def test_captures_end_with_their_budget(monkeypatch: pytest.MonkeyPatch, budget_s: float, may_go_on: bool) -> None:
    monkeypatch.setattr(cuda_graphs, "CAPTURE_BUDGET_S", budget_s)
    stream = Recorder()
    graphs: GraphCache[int] = GraphCache(CPU, stream)
    graphs.capture(1, stream.step)
    assert graphs.may_capture_ahead is may_go_on
    graphs.capture(2, stream.step)
    assert (2 in graphs) is may_go_on
    graphs.run(1, stream.step)
    assert stream.log[-1] == "replay"


@pytest.mark.parametrize("deterministic", [False, True])
def test_preparing_between_steps_changes_no_token(tmp_path: Path, device: str, deterministic: bool) -> None:
    save_tiny(tmp_path, vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    drawn = SamplingParams(temperature=1.2, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.5)

    def generate(num_prepared: int) -> list[list[int]]:
        backend = load_cuda(tmp_path, device, deterministic=deterministic)
        driver = BackendDriver(backend)
        requests = [driver.add(0, [5, 6, 7, 8, 9]), driver.add(2, [11, 12, 13], drawn, seed=4)]
        for chunks in ((3, 3), (2, 1), (1, 1), (1, 1)):
            driver.step(*zip(requests, chunks, strict=True))
            for _ in range(num_prepared):
                assert backend.prepare()
        backend.close()
        return [request.output_ids for request in requests]

    assert generate(1) == generate(0)


def test_preparing_ends(tmp_path: Path, device: str) -> None:
    save_tiny(tmp_path, vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    backend = load_cuda(tmp_path, device, max_tokens_per_step=16)
    num_prepared = 0
    while backend.prepare():
        num_prepared += 1
        assert num_prepared < 20
    # Decodes of 1, 2 and 4 rows, 16 tokens with 1 and with 4 samples; without and with draws.
    assert num_prepared == 10 if device == "cpu" else 5 <= num_prepared < 10
    backend.close()


def test_captures_that_are_broken_off_leave_no_graph() -> None:
    """A traceback keeps what began to load, and NCCL would not end while a graph holds an operation of it."""
    stream = Recorder()
    graphs: GraphCache[Bucket] = GraphCache(CPU, stream)
    sizes = BucketSizes.of(SchedulerConfig(max_batch_size=4), only_mixed=False)

    def run(bucket: Bucket) -> None:
        if len(graphs) == 2:
            raise KeyboardInterrupt

    program: Any = SimpleNamespace(run=run)
    with pytest.raises(KeyboardInterrupt):
        GraphWarmup(program, graphs, sizes, stream).capture_first()
    assert stream.log == ["capture", "capture"]
    assert len(graphs) == 0
