"""The page's files and the feed of its live view, without a browser."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from llmengine import SamplingParams
from llmengine.server import ServerConfig, create_app
from llmengine.server.playground.pages import PUBLIC_PATHS
from tests.engine.helpers import StepGate
from tests.server.helpers import WAIT_S, fake_llm, serving_llm


def get(url: str, **settings: Any) -> httpx.Response:
    return httpx.get(url, timeout=WAIT_S, **settings)


def test_the_page_and_its_files_load_nothing_from_elsewhere() -> None:
    with serving_llm(fake_llm()) as server:
        for path in PUBLIC_PATHS:
            response = get(server.url + path)
            assert response.status_code == 200, path
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "unsafe" not in response.headers["content-security-policy"]
            assert response.headers["x-content-type-options"] == "nosniff"
            assert not re.search(r"(https?:)?//\w+\.", response.text), path
            assert "innerHTML" not in response.text
            # What one file asks for, relative to itself, is one of the others.
            found = re.findall(r'(?:src|href|from|import)[= ]"([^":,]+)"', response.text)
            base = path.rpartition("/")[0]
            assert {f"{base}/{name.removeprefix('./')}" for name in found} <= PUBLIC_PATHS
        types = {path: get(server.url + path).headers["content-type"] for path in ("/", "/playground/app.js")}
        assert types == {"/": "text/html; charset=utf-8", "/playground/app.js": "text/javascript; charset=utf-8"}


@pytest.mark.parametrize("name", ["none.js", "index.html", "..%2Fpages.py", "pages.py"])
def test_other_names_are_not_files(name: str) -> None:
    with serving_llm(fake_llm()) as server:
        assert get(f"{server.url}/playground/{name}").status_code == 404


def test_the_feed_needs_a_key_and_the_page_does_not() -> None:
    with serving_llm(fake_llm(), ServerConfig(api_keys=["secret"])) as server:
        assert get(server.url + "/").status_code == 200
        assert get(server.url + "/playground/state").status_code == 401
        found = get(server.url + "/playground/state", headers={"authorization": "Bearer secret"})
        assert found.status_code == 200


def test_the_playground_can_be_left_out() -> None:
    with serving_llm(fake_llm(), ServerConfig(playground=False)) as server:
        assert {get(server.url + path).status_code for path in ("/", "/playground/state", "/playground/app.js")} == {
            404
        }


def test_the_playground_is_no_part_of_the_api() -> None:
    with fake_llm() as llm:
        assert not [path for path in create_app(llm).openapi()["paths"] if "playground" in path or path == "/"]


def test_the_feed_tells_of_the_batch_and_of_no_other_tenants_requests() -> None:
    gate = StepGate()
    llm = fake_llm(on_step=gate)
    config = ServerConfig(model_name="fake", api_keys={"a": "alice", "b": "bob"})
    with serving_llm(llm, config) as server:
        try:
            params = SamplingParams(max_new_tokens=1000, ignore_eos=True)
            handles = [
                llm.generate_async([1, 2, 3], params, tenant="alice", request_id="hers", metadata="private"),
                llm.generate_async([4, 5], params, tenant="bob", request_id="his"),
            ]
            gate.wait()
            if len(gate.batches[-1].rows) < 2:
                gate.step()
            response = get(server.url + "/playground/state", headers={"authorization": "Bearer a"})
        finally:
            gate.open()
        found = response.json()
        assert (found["model"], found["engine"]) == ("fake", "ready")
        assert (found["num_running"], found["num_waiting"]) == (2, 0)
        assert found["blocks"]["used"] >= 2
        assert sum(found["blocks"].values()) == llm.info.num_blocks - 1
        assert [(one["id"], one["state"], one["num_prompt_tokens"]) for one in found["requests"]] == [
            ("hers", "running", 3),
            (None, "running", 2),
        ]
        assert "his" not in response.text
        assert "private" not in response.text
        for handle in handles:
            handle.abort()
