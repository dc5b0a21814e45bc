"""The dashboard and the documentation name the metrics that a scrape really has."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import pytest
from prometheus_client import CollectorRegistry

from llmengine.errors import PromptTooLongError
from llmengine.observability import EngineMetrics
from llmengine.observability.dashboard import ROWS, dashboard, dashboard_text
from llmengine.observability.doc import table
from llmengine.observability.http_metrics import http_metrics_of
from llmengine.observability.metric_list import METRICS
from tests import ROOT
from tests.engine.helpers import WAIT_S, make_llm, tokens
from tests.observability.scrapes import Scrape, scrape

_NAME = re.compile(r"llmengine_\w+")


@pytest.fixture(scope="module")
def seen() -> Scrape:
    """A scrape of an engine and a server that have done a bit of everything."""
    registry = CollectorRegistry()
    http = http_metrics_of(registry)
    http.began()
    http.ended("POST", "/v1/chat/completions", 200, 0.1, 0.2)
    with make_llm() as llm:
        EngineMetrics(llm, registry=registry)
        llm.generate([[1]], tokens(2))
        with pytest.raises(PromptTooLongError):
            llm.generate_async("x" * 500, tokens(4)).result(WAIT_S)
        return scrape(registry)


def test_every_expression_of_the_dashboard_names_series_that_exist(seen: Scrape) -> None:
    expressions = [query for _, row in ROWS for panel in row for query, _ in panel.queries]
    assert len(expressions) > 30
    for expression in expressions:
        names = set(_NAME.findall(expression))
        assert names, expression
        assert names <= seen.names, expression


def test_labels_of_the_dashboard_exist(seen: Scrape) -> None:
    for _, row in ROWS:
        for panel in row:
            for query, legend in panel.queries:
                name = _NAME.findall(query)[0]
                labels = {label for sample in seen.samples if sample.name == name for label in sample.labels}
                labels |= {"instance"}  # which Prometheus adds
                grouped = {label.strip() for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(",")}
                assert {*grouped, *re.findall(r"{{(\w+)}}", legend)} <= labels, query


def test_every_metric_of_an_engine_is_on_the_dashboard() -> None:
    text = dashboard_text()
    for metric in METRICS:
        assert metric.own_name in text, metric.name


def test_file_in_the_package_is_what_the_code_makes() -> None:
    stored = files("llmengine.observability").joinpath("grafana_dashboard.json").read_text(encoding="utf-8")
    assert stored == dashboard_text(), "python -m llmengine.observability.dashboard > the file"
    panels = json.loads(stored)["panels"]
    assert panels == dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places), "panels lie upon one another"


def test_table_of_the_page_is_what_the_code_makes() -> None:
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- metrics -->\n")
    assert rest.partition("<!-- end of metrics -->")[0] == table(), "python -m llmengine.observability.doc"


def test_every_series_is_in_the_table(seen: Scrape) -> None:
    documented = set(_NAME.findall(table()))
    for name in seen.names:
        stem = re.sub(r"_(bucket|sum|count|created)$", "", name)
        # A gauge that prometheus_client adds to each of its counters and histograms is named after them.
        assert {stem, f"{stem}_total"} & documented, name
