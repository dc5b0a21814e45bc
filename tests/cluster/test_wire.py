"""What cannot travel between a cluster and its replicas is one request's fault, and no other's."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from llmengine.cluster import Cluster
from llmengine.cluster.wire import Fault
from llmengine.errors import ConfigError, EngineClosedError, InvalidRequestError, RequestFailedError
from tests.cluster.test_cluster import Pickling, make_cluster, read_some
from tests.engine.helpers import StepGate, make_llm, oracle, timeout, tokens


class Text(str):
    """A string that may hold anything."""

    attached: Any


class OnlyHere:
    """A value that can be pickled, but that another process would not know."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_unknown_class, ())


def _unknown_class() -> None:
    raise AttributeError("module '__main__' has no attribute 'OnlyHere'")


def with_lock(text: str) -> Text:
    """A prompt that holds a lock."""
    prompt = Text(text)
    prompt.attached = threading.Lock()
    return prompt


@pytest.mark.parametrize(
    ("prompt", "options", "name"),
    [
        ("a", {"cache_salt": lambda: None}, "cache_salt"),
        ("a", {"request_id": with_lock("mine")}, "request_id"),
        (with_lock("a"), {}, "the prompt"),
    ],
)
async def test_a_value_that_cannot_be_pickled_is_its_callers_error(
    prompt: str, options: dict[str, Any], name: str
) -> None:
    gate = StepGate()
    async with timeout(), await make_cluster(lambda _: make_llm(on_step=gate), num_replicas=1) as cluster:
        running = cluster.generate_async([1], tokens(30), streaming=True)
        with pytest.raises(InvalidRequestError, match=f"{name} cannot be sent to a replica: .*pickle"):
            cluster.generate_async(prompt, tokens(3), **options)
        with pytest.raises(InvalidRequestError, match=f"{name} cannot be sent to a replica"):
            await cluster.generate([[2], prompt], tokens(3), **options)
        gate.open()
        assert await read_some(running, 30) == oracle([1], 30)
        assert list(cluster.stats()) == [0], "the replica was replaced"


async def test_a_value_that_a_replica_does_not_know_fails_its_request_only() -> None:
    async with timeout(), await Cluster.from_transports(lambda _: Pickling(make_llm)) as cluster:
        with pytest.raises(RequestFailedError, match="OnlyHere"):
            await cluster.generate_async([1], tokens(3), cache_salt=OnlyHere())
        assert (await cluster.generate_async([1], tokens(3))).token_ids == oracle([1], 3)
        assert list(cluster.stats()) == [0], "the replica was replaced"


def test_errors_of_other_classes_travel_as_those_that_they_specialize() -> None:
    class Refused(InvalidRequestError):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.lock = threading.Lock()

    arrived = pickle.loads(pickle.dumps(Fault.of(Refused("no swearing")))).restore()
    assert type(arrived) is InvalidRequestError
    assert str(arrived) == "no swearing"
    assert "Refused: no swearing" in str(arrived.__cause__)
    for error in (ConfigError("a"), EngineClosedError("b")):
        assert type(Fault.of(error).restore()) is type(error)
