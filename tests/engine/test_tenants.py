"""Tenants, priorities and prefixes through the public interface."""

from __future__ import annotations

from typing import Any

import pytest

from llmengine.config import SchedulerConfig
from llmengine.errors import ConfigError, InvalidRequestError
from tests.engine.helpers import WAIT_S, StepGate, assert_idle, bounded, make_llm, tokens

PROMPT = list(range(17))


@pytest.mark.parametrize("shared", [False, True])
def test_prefixes_are_shared_within_a_tenant_and_across_where_allowed(shared: bool) -> None:
    with make_llm(scheduler=SchedulerConfig(share_prefixes_across_tenants=shared)) as llm:

        def num_cached(tenant: str | None, salt: object = None) -> int:
            handle = llm.generate_async(PROMPT, tokens(1), tenant=tenant, cache_salt=salt)
            return handle.result(WAIT_S).num_cached_tokens

        assert num_cached("a") == 0
        assert num_cached("a") == 16
        assert num_cached("b") == num_cached(None) == (16 if shared else 0)
        assert num_cached("b") == num_cached(None) == 16
        assert num_cached("a", "salt") == 0
        assert num_cached("b", "salt") == (16 if shared else 0)
        assert num_cached(None, ("a", None)) == 0, "no salt stands for a tenant"
        assert_idle(llm)


def test_tenants_take_turns_and_priorities_count_within_a_tenant() -> None:
    order: list[int] = []
    gate = StepGate()
    scheduler = SchedulerConfig(max_batch_size=1, max_tokens_per_step=64, max_tokens_per_mixed_step=64)
    with make_llm(on_step=gate, scheduler=scheduler) as llm:
        handles = [llm.generate_async([9], tokens(2))]
        gate.wait()
        for tenant, priority in (("a", 5), ("a", 5), ("a", 9), ("b", 0), ("b", 1)):
            handles.append(llm.generate_async([1], tokens(1), tenant=tenant, priority=priority))
        gate.open()
        outputs = [handle.result(WAIT_S) for handle in handles]
        outputs.sort(key=lambda output: output.timeline.first_scheduled or 0.0)
        order = [output.request_id for output in outputs]
        assert_idle(llm)
    assert order == [0, 3, 5, 1, 4, 2]


def test_generate_and_chat_take_a_tenant() -> None:
    with make_llm() as llm:
        for _ in range(2):
            (output,) = bounded(lambda: llm.generate([PROMPT], tokens(1), tenant="a"))
        assert output.num_cached_tokens == 16
        assert llm.generate_async(PROMPT, tokens(1), tenant="b").result(WAIT_S).num_cached_tokens == 0


def test_abort_forgets_what_it_computed_where_asked() -> None:
    gate = StepGate()
    with make_llm(on_step=gate) as llm:
        for keep_prefix in (False, True):
            handle = llm.generate_async(PROMPT, tokens(9))
            gate.wait()
            gate.step()
            handle.abort(keep_prefix=keep_prefix)
            gate.let_go()
            assert handle.result(WAIT_S).finish_reason == "abort"
            again = llm.generate_async(PROMPT, tokens(1))
            gate.wait()
            if keep_prefix:
                gate.open()
            else:
                gate.let_go()
            output = again.result(WAIT_S)
            assert output.num_cached_tokens == (16 if keep_prefix else 0)
        assert_idle(llm)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tenant": 7}, "tenant must be a string, not 7"),
        ({"priority": 10**400}, r"priority must be an integer in \[-1000000, 1000000\], not 1000.*\.\.\."),
        ({"priority": -1_000_001}, r"priority must be an integer in \[-1000000, 1000000\], not -1000001"),
        ({"first_token_deadline_s": 0}, "first_token_deadline_s must be a number above 0, not 0"),
        ({"first_token_deadline_s": "1"}, "first_token_deadline_s must be a number above 0, not '1'"),
        ({"deadline_s": -1}, "deadline_s must be a number above 0, not -1"),
    ],
    ids=lambda item: str(item)[:40],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with make_llm() as llm, pytest.raises(InvalidRequestError, match=named):
        llm.generate_async([1], **options)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_decode_latency_ms": 0}, "max_decode_latency_ms must be .*, not 0"),
        ({"max_decode_latency_ms": "20"}, "max_decode_latency_ms must be .*, not '20'"),
        ({"priority_ageing_s": float("inf")}, "priority_ageing_s must be .*, not inf"),
        ({"priority_ageing_s": float("nan")}, "priority_ageing_s must be .*, not nan"),
        ({"tenant_weights": {"a": 0.0}}, r"tenant_weights\['a'\] must be .*, not 0.0"),
        ({"tenant_weights": {"a": True}}, r"tenant_weights\['a'\] must be .*, not True"),
        ({"tenant_weights": {1: 1.0}}, "a tenant in .*tenant_weights must be a string, not 1"),
        ({"tenant_weights": [("a", 1.0)]}, r"tenant_weights must be a mapping, not \[\('a', 1.0\)\]"),
        ({"share_prefixes_across_tenants": 1}, "share_prefixes_across_tenants must be True or False, not 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SchedulerConfig(**settings).resolve()


def test_weights_are_copied_when_resolved() -> None:
    weights = {"a": 2.0}
    resolved = SchedulerConfig(tenant_weights=weights).resolve()
    weights["a"] = 3.0
    assert resolved.tenant_weights == {"a": 2.0}
    assert resolved.resolve() == resolved
    with pytest.raises(TypeError):
        resolved.tenant_weights["a"] = 4.0  # type: ignore[index]
