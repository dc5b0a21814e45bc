"""`PrefixRequestRouter` on Serve's interface for routers, without Serve."""

from __future__ import annotations

import importlib.util
import types
from typing import Any, ClassVar

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray has no package for this Python"),
    # Ray's, when it is imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pydantic.warnings.PydanticDeprecatedSince20"),
]

LONG = "x" * 1024


def make_router(loads: dict[str, int | None]) -> tuple[Any, list[Any]]:
    """A router, and the replicas that it knows, with the requests that each has; None: nothing was heard of it."""
    from ray.serve._private.common import DeploymentID
    from ray.serve.request_router import ReplicaID

    from llmengine.cluster.serve.routing import PrefixRequestRouter

    replicas = [
        types.SimpleNamespace(replica_id=ReplicaID(name, DeploymentID("engine")), max_ongoing_requests=8)
        for name in loads
    ]

    class Router(PrefixRequestRouter):
        replica_queue_len_cache: ClassVar = {each.replica_id: loads[each.replica_id.unique_id] for each in replicas}

        def __init__(self) -> None:
            self.initialize_state()

        async def _probe_queue_lens(self, replicas: list[Any], backoff_index: int) -> list[Any]:
            return []

    return Router(), replicas


def pending(path: str = "/v1/completions", body: bytes = b"{}") -> Any:
    """A request that a replica is wanted for."""
    from ray.serve.request_router import PendingRequest

    from llmengine.cluster.serve.forwarded import ForwardedRequest

    return PendingRequest(args=[ForwardedRequest.of({"path": path}, body)], kwargs={}, metadata=None)


async def ranks(router: Any, replicas: list[Any], request: Any) -> list[list[str]]:
    """Names of the replicas, those that are tried first before the others."""
    chosen = await router.choose_replicas(replicas, request)
    return [[replica.replica_id.unique_id for replica in rank] for rank in chosen]


async def test_the_least_loaded_is_first_unless_another_has_seen_the_prompt() -> None:
    router, replicas = make_router({"a": 2, "b": 1, "c": None})
    assert await ranks(router, replicas, pending()) == [["b"], ["a", "c"]]
    prompt = b'{"prompt": "' + LONG.encode() + b'"}'
    assert await ranks(router, replicas, pending(body=prompt)) == [["b"], ["a", "c"]]
    router.replica_queue_len_cache[replicas[1].replica_id] = 3
    assert await ranks(router, replicas, pending()) == [["a"], ["b", "c"]]
    again = await ranks(router, replicas, pending(body=prompt))
    assert again == [["b"], ["a", "c"]], "one more request costs less than the prompt"


async def test_requests_on_their_way_count_until_they_are_accepted_or_given_up() -> None:
    router, replicas = make_router({"a": 0, "b": 0})
    first, second = pending(), pending()
    assert await ranks(router, replicas, first) == [["a"], ["b"]]
    assert await ranks(router, replicas, second) == [["b"], ["a"]]
    third = pending()
    assert await ranks(router, replicas, third) == [["a"], ["b"]]
    router.on_request_routed(first, replicas[0].replica_id, None)
    del third
    assert await ranks(router, replicas, pending()) == [["a"], ["b"]]


async def test_a_request_that_names_a_response_goes_where_that_is_kept() -> None:
    router, replicas = make_router({"a": 0, "b": 7})
    kept = "resp_" + "0" * 32 + "_b"
    assert await ranks(router, replicas, pending(f"/v1/responses/{kept}")) == [["b"]]
    body = b'{"input": "And then?", "previous_response_id": "' + kept.encode() + b'"}'
    assert await ranks(router, replicas, pending("/v1/responses", body)) == [["b"]]
    gone = pending(f"/v1/responses/{kept[:-1]}z")
    assert await ranks(router, replicas, gone) == [["a"], ["b"]], "any replica can say that it is not there"


async def test_calls_that_are_no_requests_go_anywhere() -> None:
    from ray.serve.request_router import PendingRequest

    router, replicas = make_router({"a": 0, "b": 0})
    assert await ranks(router, replicas, PendingRequest(args=[], kwargs={}, metadata=None)) == [["a", "b"]]
