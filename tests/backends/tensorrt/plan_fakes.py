"""Plans without a TensorRT library: models to build, and a builder whose plans record what they were built from."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmengine.backends.tensorrt.builder import BuiltPlan, PlanJob
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.backends.tensorrt.obtain import PlanRequest, obtain_plans
from llmengine.backends.tensorrt.plan_set import PlanSet, Producer
from llmengine.backends.tensorrt.spec import BuildTarget
from llmengine.checkpoints.dummy_weights import stream_dummy
from llmengine.checkpoints.source import ModelSource
from llmengine.models.arch import ModelArch
from tests.models.arch_helpers import SMALL_ARCH

ARCH = replace(SMALL_ARCH, num_layers=4, tie_word_embeddings=True, attention_bias=False)
RTX_89 = Producer("tensorrt_rtx", "1.7.1", BuildTarget((89,)))


@dataclass
class FakeBuild:
    """Stands for `build_plans`. As with TensorRT, no two builds give the same bytes.

    Attributes:
        fail_after: how many plans are built before `failure` is raised.
        built: names of the plans that were built.
    """

    fail_after: int = 1 << 30
    failure: BaseException = field(default_factory=KeyboardInterrupt)
    built: list[str] = field(default_factory=list)

    def __call__(self, jobs: Iterable[PlanJob], num_processes: int) -> Iterator[BuiltPlan]:
        for job in jobs:
            if len(self.built) >= self.fail_after:
                job.output.write_bytes(b"half a pl")
                raise self.failure
            self.built.append(job.name)
            job.output.write_bytes(fake_plan(job))
            yield BuiltPlan(job.name, job.output, 0.25, job.output.stat().st_size, 1 << 20, "fake 1")


def fake_plan(job: PlanJob) -> bytes:
    """Return a plan that records what it was built from."""
    constants = None if job.weights is None else hashlib.sha256(job.weights.read_bytes()).hexdigest()
    content = {
        "fingerprint": job.spec.fingerprint(),
        "target": list(job.target.compute_capabilities),
        "constants": constants,
        "build": secrets.token_hex(32),
    }
    return json.dumps(content).encode()


def content_of(plan_set: PlanSet) -> dict[str, Mapping[str, Any]]:
    """Return the records of a set's fake plans, after checking that the plans are of its segments."""
    contents = {name: json.loads(plan.read()) for name, plan in plan_set.plans.items()}
    for segment in plan_set.segments:
        assert contents[segment.plan_name]["fingerprint"] == segment.spec.fingerprint()
    return contents


def make_source(arch: ModelArch = ARCH, path: Path = Path("model"), **changes: Any) -> ModelSource:
    """Return a model with random weights, the same each time."""
    values: dict[str, Any] = {
        "kind": "dummy",
        "path": path,
        "arch": arch,
        "checkpoint_dtype": "float16",
        "generation_config": {},
        "eos_token_ids": (2,),
        "bos_token_id": 1,
        "tokenizer_path": path,
        "stream": lambda dtype: stream_dummy(arch, dtype),
    }
    return ModelSource(**{**values, **changes})


def make_request(**changes: Any) -> PlanRequest:
    """Return a request for `ARCH`, float16, small limits and `RTX_89`, with `changes`."""
    values: dict[str, Any] = {
        "arch": ARCH,
        "dtype": "float16",
        "max_batch_size": 4,
        "max_tokens_per_step": 16,
        "producer": RTX_89,
    }
    return PlanRequest(**{**values, **changes})


def get(
    cache: Path, build: FakeBuild, request: PlanRequest | None = None, source: ModelSource | None = None
) -> PlanSet:
    """Return plans through a cache directory."""
    return obtain_plans(request or make_request(), source or make_source(), 2, cache=PlanCache(cache), build=build)
