"""The parts of the Serve application that need no Ray cluster."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from llmengine import LLM, ConfigError, EngineDeadError, SamplingParams
from llmengine.batch import Batch
from llmengine.cluster.router import CHUNK_CHARS, PrefixKeys
from llmengine.server import ServerConfig
from llmengine.testing import FakeBackend
from llmengine.tokenizer.protocol import ByteTokenizer
from tests import ROOT
from tests.cluster import serve_helpers
from tests.engine.helpers import StepGate

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python"),
    # Ray's, when it is imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

WAIT_S = 60.0


def alphabet(token_ids: Sequence[int]) -> int:
    """The letter at the end of the context."""
    return ord("a") + len(token_ids) % 26


async def make_replica(backend: FakeBackend) -> Any:
    """A replica as Serve makes it."""
    llm = LLM.from_backend(lambda: backend, tokenizer=ByteTokenizer())
    return await serve_helpers.make_replica(llm, ServerConfig(metrics=False))


def forwarded(path: str, **fields: Any) -> Any:
    """A request as a gateway forwards it."""
    from llmengine.cluster.serve.forwarded import ForwardedRequest

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    return ForwardedRequest.of({**scope, "app": object()}, json.dumps(fields).encode())


async def test_a_replica_answers_and_says_that_its_engine_is_dead() -> None:
    def fail(batch: Batch) -> None:
        if is_broken.is_set():
            raise RuntimeError("the device is lost")

    is_broken = threading.Event()
    replica = await make_replica(FakeBackend(alphabet, on_step=fail))
    request = forwarded("/v1/completions", model="default", prompt="xyz", max_tokens=4)
    messages = [message async for batch in replica.answer(request) for message in batch]
    assert messages[0]["status"] == 200
    assert json.loads(messages[1]["body"])["choices"][0]["text"] == "defg"
    replica.check_health()
    is_broken.set()
    messages = [message async for batch in replica.answer(request) for message in batch]
    assert messages[0]["status"] == 503
    with pytest.raises(EngineDeadError, match="the device is lost"):
        replica.check_health()
    replica.__del__()


async def test_a_replica_whose_engine_hangs_fails_its_check() -> None:
    gate = StepGate()
    llm = LLM.from_backend(lambda: FakeBackend(alphabet, on_step=gate), tokenizer=ByteTokenizer())
    replica = await serve_helpers.make_replica(llm, ServerConfig(metrics=False), step_timeout_s=1e-6)
    replica.check_health()
    handle = llm.generate_async("xyz", SamplingParams(max_new_tokens=2))
    await asyncio.to_thread(gate.wait)
    replica.check_health()
    with pytest.raises(EngineDeadError, match="requests are running, but no step has ended for"):
        replica.check_health()
    gate.open()
    await handle
    replica.check_health()
    replica.__del__()


async def test_what_a_stream_has_put_out_while_nobody_took_it_is_one_message() -> None:
    replica = await make_replica(FakeBackend(alphabet))
    request = forwarded("/v1/completions", model="default", prompt="xyz", max_tokens=60, stream=True)
    answer = replica.answer(request)
    batches = [await anext(answer)]
    async with asyncio.timeout(WAIT_S):
        while replica._llm.stats().num_running:  # noqa: ASYNC110  # the engine's thread
            await asyncio.sleep(0.01)
    batches += [batch async for batch in answer]
    assert len(batches) <= 4
    text = b"".join(message.get("body", b"") for batch in batches for message in batch)
    assert text.endswith(b"data: [DONE]\n\n")
    replica.__del__()


async def test_an_answer_that_is_not_wanted_any_more_ends_in_the_engine() -> None:
    gate = StepGate()
    replica = await make_replica(FakeBackend(alphabet, on_step=gate))
    gate.let_go()
    request = forwarded("/v1/completions", model="default", prompt="xyz", max_tokens=200, stream=True)
    answer = replica.answer(request)
    await anext(answer)
    assert replica._llm.stats().num_running == 1
    await answer.aclose()
    gate.open()
    async with asyncio.timeout(WAIT_S):
        while replica._llm.stats().num_running:  # noqa: ASYNC110  # the engine's thread
            await asyncio.sleep(0.01)
    assert replica._llm.stats().counters.num_generated_tokens < 200
    replica.__del__()


def num_shared(first: PrefixKeys, second: PrefixKeys) -> int:
    """Chunks at the beginning that two prompts share."""
    return len({*first.chunks} & {*second.chunks})


def test_keys_are_those_of_the_prompt_in_any_api() -> None:
    from llmengine.cluster.serve.forwarded import body_fields, prompt_keys

    def keys(**fields: Any) -> PrefixKeys:
        return prompt_keys(body_fields(json.dumps(fields).encode()))

    text = "x" * CHUNK_CHARS * 3
    system, other = {"role": "system", "content": text}, {"role": "user", "content": "y" * CHUNK_CHARS}
    assert num_shared(keys(prompt=text), keys(prompt=text + "more", n=2)) == 3
    assert num_shared(keys(prompt=[text, "z"]), keys(prompt=text)) == 3
    assert num_shared(keys(prompt=text), keys(prompt=text, cache_salt="a")) == 0
    assert num_shared(keys(prompt=[1] * 64), keys(prompt=[[1] * 128])) == 1
    assert num_shared(keys(messages=[system]), keys(messages=[system, other], temperature=0)) >= 3
    assert num_shared(keys(system=text, messages=[other]), keys(system=text, messages=[])) >= 3
    assert num_shared(keys(messages=[system]), keys(messages=[other])) == 0
    for body in (b"", b"{", b"[]", b'{"prompt": 3}', b'{"prompt": [[], []]}'):
        assert prompt_keys(body_fields(body)) == PrefixKeys((), 0)


def test_the_replica_that_keeps_a_response_is_in_its_id() -> None:
    keeping = "resp_" + "0" * 32 + "_k1"
    assert forwarded("/v1/responses", input="And then?", previous_response_id=keeping).keeper == "k1"
    assert forwarded("/v1/responses/input_tokens", input="", previous_response_id=keeping).keeper == "k1"
    for path in ("", "/cancel", "/input_items"):
        assert forwarded(f"/v1/responses/{keeping}{path}").keeper == "k1"
    for named in ({}, {"previous_response_id": 3}, {"previous_response_id": "resp_0"}, {"previous_response_id": "x"}):
        assert forwarded("/v1/responses", **named).keeper is None
    assert forwarded(f"/v1/completions/{keeping}").keeper is None


def test_a_forwarded_request_has_no_objects_of_its_process() -> None:
    assert forwarded("/v1/completions").scope.keys() == {"type", "method", "path", "headers", "query_string"}


def test_metrics_of_replicas_have_their_names() -> None:
    from llmengine.cluster.serve.merged_metrics import merged_metrics

    texts = {
        name: f'# HELP steps_total Steps.\n# TYPE steps_total counter\nsteps_total{{kind="a"}} {count}\n'
        for name, count in (("one", "1.0"), ("two", "2.0"))
    }
    assert merged_metrics(texts).decode() == (
        "# HELP steps_total Steps.\n# TYPE steps_total counter\n"
        'steps_total{kind="a",replica="one"} 1.0\nsteps_total{kind="a",replica="two"} 2.0\n'
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_replicas": 0}, "num_replicas must be an integer of at least 1, not 0"),
        ({"autoscaling": 3}, "autoscaling must be a mapping, not 3"),
        ({"num_replicas": 2, "autoscaling": {}}, "num_replicas cannot be set together with autoscaling"),
        ({"health_check_period_s": 0}, "health_check_period_s must be a number"),
        ({"step_timeout_s": 0}, "step_timeout_s must be a number"),
        ({"actor_options": []}, "actor_options must be a mapping"),
        ({"ranks_per_host": 0}, "ranks_per_host must be an integer of at least 1, not 0"),
        ({"placement_strategy": "NEAR"}, "placement_strategy must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    from llmengine.cluster.serve import ServeConfig

    with pytest.raises(ConfigError, match=message):
        ServeConfig(**settings)


def test_arguments_of_configuration_files_are_checked() -> None:
    from llmengine.cluster.serve import app_from_args

    with pytest.raises(ConfigError, match="not \\['modle'\\]"):
        app_from_args({"modle": {}})
    with pytest.raises(ConfigError, match="args\\['model'\\] is missing"):
        app_from_args({})


def engine_of(app: Any) -> Any:
    """The deployment of engines in an application."""
    return app._bound_deployment.init_args[0]._bound_deployment


def test_a_replica_takes_the_gpus_of_all_its_ranks() -> None:
    from llmengine.cluster.serve import app_from_args

    model = {"model_dir": "model", "device": "cuda", "parallel_config": {"tp_size": 2, "pp_size": 2}}
    serve = {"actor_options": {"num_cpus": 3}, "autoscaling": {"min_replicas": 1, "max_replicas": 5}}
    engine = engine_of(app_from_args({"model": model, "serve": serve, "server": {"model_name": "m"}}))
    assert engine.ray_actor_options["num_gpus"] == 4
    assert engine.ray_actor_options["num_cpus"] == 3
    cpu = engine_of(app_from_args({"model": {**model, "device": "cpu"}}))
    assert cpu.ray_actor_options["num_gpus"] == 0


def test_ranks_on_several_hosts_are_a_placement_group() -> None:
    from llmengine.cluster.serve import app_from_args

    model = {"model_dir": "model", "device": "cuda", "parallel_config": {"tp_size": 2, "pp_size": 2}}
    serve = {"ranks_per_host": 2, "placement_strategy": "STRICT_SPREAD", "actor_options": {"num_cpus": 3}}
    engine = engine_of(app_from_args({"model": model, "serve": serve}))
    assert engine.ray_actor_options["num_gpus"] == 2
    placed = engine._replica_config
    assert placed.placement_group_bundles == [{"CPU": 3, "GPU": 2}] * 2
    assert placed.placement_group_strategy == "STRICT_SPREAD"
    with pytest.raises(ConfigError, match="ranks_per_host=3 must divide the 4 ranks of a replica"):
        app_from_args({"model": model, "serve": {"ranks_per_host": 3}})
    together = engine_of(app_from_args({"model": model, "serve": {"ranks_per_host": 4}}))
    assert together._replica_config.placement_group_bundles is None


def test_the_example_for_kuberay_is_what_serve_and_build_app_take() -> None:
    import yaml
    from ray._common.utils import import_attr
    from ray.serve.schema import ServeDeploySchema

    service = yaml.safe_load((ROOT / "docs" / "examples" / "rayservice.yaml").read_text())
    (described,) = ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"])).applications
    engine = engine_of(import_attr(described.import_path)(described.args))
    (workers,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == engine.ray_actor_options["num_gpus"] == 2
