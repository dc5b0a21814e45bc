"""The playground in a real browser."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from llmengine import LLM
from llmengine.batch import Batch
from llmengine.server import ServerConfig
from llmengine.server.playground import pages
from llmengine.server.service import Service
from tests.server.helpers import RunningServer, fake_llm, scripted, serving, serving_llm

PATIENCE_S = 60


class Page:
    """The page of one server, in the browser."""

    def __init__(self, browser: Chrome, server: RunningServer) -> None:
        self.browser = browser
        self.url = server.url
        browser.get(server.url + "/")

    def __getitem__(self, element_id: str) -> WebElement:
        return self.browser.find_element(By.ID, element_id)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Texts of elements, read at one moment, since the live view replaces its rows."""
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
        found: list[str] = self.browser.execute_script(script, selector)
        return found

    def wait(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.browser, PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())

    def ask(self, text: str) -> None:
        """Send a message, once the answer to an earlier one has ended."""
        self.wait(self["send"].is_enabled)
        self["message"].send_keys(text + Keys.ENTER)

    def errors(self) -> list[str]:
        """What the browser complained of, such as a violation of the content security policy."""
        log = self.browser.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE" and self.url in entry["message"]]


class Gate:
    """Holds an engine in the first step for which `when` holds, until `open`."""

    def __init__(self, when: Callable[[Batch], bool]) -> None:
        self._when = when
        self._opened = threading.Event()
        self.largest = 0

    def __call__(self, batch: Batch) -> None:
        self.largest = max(self.largest, len(batch.rows))
        if self._when(batch):
            self._opened.wait()

    def open(self) -> None:
        self._opened.set()


@contextmanager
def held(gate: Gate, llm: LLM, config: ServerConfig | None = None) -> Iterator[RunningServer]:
    """Serve a model; its steps go on at the end, so that it can close."""
    with serving_llm(llm, config) as server:
        try:
            yield server
        finally:
            gate.open()


def test_an_answer_streams_and_is_only_ever_text(chromium: Chrome) -> None:
    answer = "<img src=x onerror=alert(1)> <b>bold</b> & 2 < 3\nend"
    with serving_llm(fake_llm(scripted(answer)), ServerConfig(model_name="a <i>model</i>")) as server:
        page = Page(chromium, server)
        page.ask("Hello <script>alert(2)</script>")
        page.wait(lambda: any("finished" in text for text in page.texts(".facts")))
        assert page.texts("#conversation .text") == ["Hello <script>alert(2)</script>", answer]
        assert not page.all("#conversation img, #conversation b, #conversation script, #model i")
        page.wait(lambda: page.texts("#model") == ["a <i>model</i>"])
        assert f"{len(answer) + 1} tokens" in page.texts(".facts")[-2] + page.texts(".facts")[0]
        page.ask("And again?")
        page.wait(
            lambda: len(page.texts("#conversation .text")) == 4 and page.texts("#conversation .text")[3] == answer
        )
        assert page.errors() == []


def test_stop_ends_the_request_in_the_engine(chromium: Chrome) -> None:
    gate = Gate(lambda batch: batch.step >= 6)
    llm = fake_llm(lambda token_ids: ord("a"), on_step=gate)
    with held(gate, llm) as server:
        page = Page(chromium, server)
        page.ask("Go on for ever")
        page.wait(lambda: "aaa" in "".join(page.texts("#conversation .turn.assistant .text")))
        page.wait(
            lambda: page.texts("#num-running") == ["1"] and any("yours" in text for text in page.texts("#rows li"))
        )
        assert page.texts("#queue") == ["empty"]
        page["stop"].click()
        page.wait(lambda: any("stopped" in text for text in page.texts("#conversation .facts")))
        assert page["send"].is_enabled()
        assert not page["stop"].is_enabled()
        gate.open()
        page.wait(lambda: llm.stats().num_running == 0)
        assert llm.stats().counters.num_generated_tokens < 200, "it went on without its reader"
        page.wait(lambda: page.texts("#num-running") == ["0"] and page.texts("#rows li") == ["idle"])
        assert page.errors() == []


def test_prompts_side_by_side_share_a_batch(chromium: Chrome) -> None:
    gate = Gate(lambda batch: len(batch.rows) == 4)
    llm = fake_llm(lambda token_ids: ord("a") + len(token_ids) % 26, on_step=gate)
    with held(gate, llm) as server:
        page = Page(chromium, server)
        page["tab-compare"].click()
        page["add-lane"].click()
        lanes = page.all(".lane textarea")
        lanes[3].send_keys("The fourth")
        page["max_tokens"].clear()
        page["max_tokens"].send_keys("1000")
        page["run-all"].click()
        page.wait(lambda: page.texts("#num-running") == ["4"])
        assert len(page.texts("#rows li")) == 4
        gate.open()
        page.wait(lambda: sum("most tokens reached" in text for text in page.texts(".lane .facts")) == 4)
        assert [len(text) for text in page.texts(".lane .text")] == [1000] * 4
        assert gate.largest == 4

        def num_blocks() -> int:
            """As the page shows it, which may be renewed between two looks."""
            return sum(int(page.texts(f"#blocks-{part}")[0]) for part in ("used", "cached", "free"))

        page.wait(lambda: num_blocks() == llm.info.num_blocks - 1)
        assert page.errors() == []


def test_a_key_is_asked_for_and_used(chromium: Chrome) -> None:
    with serving_llm(fake_llm(scripted("Welcome.")), ServerConfig(api_keys=["secret"])) as server:
        page = Page(chromium, server)
        page.wait(lambda: "needs an API key" in page.texts("#live-error")[0])
        page.ask("Hello")
        page.wait(lambda: any("needs an API key" in text for text in page.texts("#conversation .error")))
        page["key"].send_keys("secret" + Keys.TAB)
        page.wait(lambda: page.texts("#engine-state") == ["ready"])
        page.ask("Hello again")
        page.wait(lambda: "Welcome." in page.texts("#conversation .text"))
        assert not page["live-error"].is_displayed()


def test_settings_and_keys_of_the_keyboard(chromium: Chrome) -> None:
    with serving_llm(fake_llm(scripted("one two three"))) as server:
        page = Page(chromium, server)
        page["stop_text"].send_keys(" three")
        page["message"].send_keys("first", Keys.SHIFT + Keys.ENTER, Keys.NULL, "second", Keys.ENTER)
        page.wait(lambda: page.texts("#conversation .text") == ["first\nsecond", "one two"])
        page["top_p"].send_keys("3")
        page.ask("Too much?")
        page.wait(lambda: any(text.startswith("top_p") for text in page.texts("#conversation .error")))
        page["tab-chat"].send_keys(Keys.ARROW_RIGHT)
        assert page["panel-compare"].is_displayed()
        assert not page["panel-chat"].is_displayed()
        unlabelled = [
            one.get_attribute("id")
            for one in page.all("input, textarea")
            if not chromium.execute_script("return arguments[0].labels.length", one)
        ]
        assert unlabelled == []


def known_probabilities() -> FastAPI:
    """The page, beside an endpoint that answers any chat with two tokens whose probabilities are known."""
    tokens = [
        {"token": "Yes", "logprob": -0.105, "top_logprobs": [{"token": "No", "logprob": -2.996}]},
        {"token": "\n", "logprob": -2.2, "top_logprobs": [{"token": ".", "logprob": -0.511}]},
    ]
    app = FastAPI()
    app.include_router(pages.router)

    @app.post("/v1/chat/completions")
    async def answer() -> StreamingResponse:
        async def events() -> Any:
            for token in tokens:
                choice = {"index": 0, "delta": {"content": token["token"]}, "logprobs": {"content": [token]}}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def test_probabilities_show_on_hover_and_by_arrow_keys(chromium: Chrome) -> None:
    app = known_probabilities()
    with fake_llm() as llm, serving(app) as server:
        app.state.service = Service(llm, ServerConfig().resolve())
        page = Page(chromium, server)
        page["logprobs"].click()
        page.ask("Well?")
        page.wait(lambda: page.texts(".token") == ["Yes", "\n"])
        assert [one.get_attribute("class") for one in page.all(".token")] == ["token p3", "token p1"]
        page.all(".turn.assistant .text")[0].send_keys(Keys.ARROW_RIGHT)
        assert page["token-card"].is_displayed()
        assert page.texts("#token-card td") == ["Yes", "90.03 %", "-0.105", "No", "5.00 %", "-2.996"]
        page.all(".turn.assistant .text")[0].send_keys(Keys.ARROW_RIGHT)
        assert page.texts("#token-card td:first-child") == [".", "⏎"]
        assert page.texts("#token-card tr.chosen td:first-child") == ["⏎"]
        assert page.errors() == []


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 900)])
def test_nothing_is_wider_than_the_screen(chromium: Chrome, width: int, height: int) -> None:
    answer = "word " * 30 + "x" * 200
    with serving_llm(fake_llm(scripted(answer)), ServerConfig(model_name="a-model-with-a-long-name" * 3)) as server:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            page = Page(chromium, server)
            page.ask("Hello")
            page.wait(lambda: any("xxxx" in text for text in page.texts(".turn.assistant .text")))
            for tab in ("tab-compare", "tab-chat"):
                page[tab].click()
                assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
        finally:
            chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
