"""Perplexity, agreement and divergence against transformers, and what a report does."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmengine import (
    LLM,
    ConfigError,
    CorruptFileError,
    EngineError,
    KvCacheConfig,
    ModelConfig,
    QualityError,
    QuantConfig,
    saved_engines,
)
from llmengine.model_quality import tokenize
from llmengine.quantization.evaluation import Window, WindowPlan, compare, evaluation_text, measure
from llmengine.quantization.quality_report import ModelFigures, QualityReport
from tests.backends.helpers import reference_logprobs, save_tiny
from tests.engine.helpers import make_llm

TEXT = random.Random(5).choices(range(3, 311), k=300)
KV = KvCacheConfig(max_bytes=8 << 20)


def load(directory: Path, **settings: Any) -> LLM:
    return LLM(ModelConfig(directory, kv_cache_config=KV, num_threads=1, **settings), enable_tokenizer=False)


def expected_likelihood(model: Any, windows: Sequence[Window]) -> tuple[float, list[torch.Tensor]]:
    """transformers' perplexity, and the log-probabilities [num_scored, vocab] of each window."""
    total, count, rows = 0.0, 0, []
    for window in windows:
        logprobs = reference_logprobs(model, window.token_ids)[window.first_scored - 1 : -1]
        targets = torch.tensor(window.token_ids[window.first_scored :])
        total -= float(logprobs.gather(1, targets[:, None]).double().sum())
        count += len(targets)
        rows.append(logprobs)
    return math.exp(total / count), rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Path, Any]:
    """Two models with one vocabulary, the second near the first."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    model, other = save_tiny(first), save_tiny(second)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    other.save_pretrained(second)
    return first, model, second, other


@pytest.mark.parametrize(("size", "stride"), [(64, 64), (100, 37), (250, 25)])
def test_perplexity_equals_transformers(models: tuple[Path, Any, Path, Any], size: int, stride: int) -> None:
    directory, model, _, _ = models
    windows = WindowPlan(size, stride, None).windows(TEXT)
    with load(directory) as llm:
        report = llm.evaluate(text=TEXT, windows=None, window_tokens=size, stride=stride, measure_speed=False)
    expected, _ = expected_likelihood(model, windows)
    assert report.model.perplexity == pytest.approx(expected, rel=1e-4)
    assert report.num_windows == len(windows)
    assert report.num_tokens == sum(window.num_scored for window in windows)
    assert (report.reference, report.perplexity_increase, report.mean_kl) == (None, None, None)


def test_agreement_and_divergence_equal_transformers(models: tuple[Path, Any, Path, Any]) -> None:
    first, model, second, other = models
    with load(second) as llm, load(first) as reference:
        report = llm.evaluate(reference, text=TEXT, windows=3, window_tokens=64, measure_speed=False)
    windows = WindowPlan(64, 64, 3).windows(TEXT)
    expected, p = expected_likelihood(model, windows)
    found, q = expected_likelihood(other, windows)
    log_p, log_q = torch.cat(p).double(), torch.cat(q).double()
    kl = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
    agreement = float((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).double().mean())
    assert 0.001 < kl < 1
    assert 0.2 < agreement < 0.9
    assert report.mean_kl == pytest.approx(kl, rel=1e-3)
    assert report.top1_agreement == agreement
    assert report.reference is not None
    assert report.reference.perplexity == pytest.approx(expected, rel=1e-4)
    assert report.perplexity_increase == pytest.approx(found / expected - 1, abs=2e-4)


def test_a_model_agrees_with_itself(models: tuple[Path, Any, Path, Any]) -> None:
    with load(models[0]) as llm:
        report = llm.evaluate(llm, text=TEXT, windows=2, window_tokens=32, measure_speed=False)
    assert (report.top1_agreement, report.mean_kl, report.perplexity_increase) == (1.0, 0.0, 0.0)


def test_quantized_weights_are_compared_with_the_unquantized_model(models: tuple[Path, Any, Path, Any]) -> None:
    with load(models[0], quant_config=QuantConfig(weights="int8")) as llm:
        report = llm.evaluate(text=TEXT, windows=2, window_tokens=64)
    assert report.reference is not None
    assert (report.model.weight_format, report.reference.weight_format) == ("int8", "none")
    assert report.model.weight_bytes < report.reference.weight_bytes
    assert report.model.file_bytes is not None
    assert report.reference.file_bytes is not None
    assert report.model.file_bytes < report.reference.file_bytes
    assert report.mean_kl is not None
    assert 0 < report.mean_kl < 0.05
    for side in (report.model, report.reference):
        assert sorted(side.tokens_per_s) == [1, 16]
        assert all(speed > 0 for speed in side.tokens_per_s.values())


class Bytes:
    """A tokenizer for the package's text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def save_bigrams(directory: Path) -> None:
    """A model whose next byte follows from the last one alone, as in the package's text; int8 makes it know nothing.

    Each row of its output matrix has a large weight that meets no activation, and is the scale of all others.
    """
    model = save_tiny(directory, hidden_size=320, intermediate_size=16, num_hidden_layers=1, tie_word_embeddings=False)
    text = torch.tensor(list(evaluation_text().encode()))
    counts = torch.full((311, 311), 0.01)
    counts.index_put_((text[1:], text[:-1]), torch.ones(len(text) - 1), accumulate=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:, :311] = torch.eye(311)
        model.model.norm.weight.fill_(320**-0.5)
        model.lm_head.weight[:, :311] = (counts / counts.sum(dim=0)).log()
        model.lm_head.weight[:, 319] = 1e4
    model.save_pretrained(directory)


def test_a_limit_on_the_increase_of_perplexity(tmp_path: Path) -> None:
    save_bigrams(tmp_path)

    def start(limit: float, weights: Any = "int8") -> LLM:
        quant_config = QuantConfig(weights=weights, max_perplexity_increase=limit)
        return LLM(ModelConfig(tmp_path, kv_cache_config=KV, num_threads=1, quant_config=quant_config), Bytes())

    message = r"rises by [0-9]+\.[0-9]{2}%, from [0-9.]+ to [0-9.]+, .*'int8'; the limit is 1\.00% \(quant_config\.max_"
    with pytest.raises(QualityError, match=message):
        start(0.01)
    with pytest.raises(ConfigError, match="weights are not quantized here"):
        start(0.5, "none")
    with pytest.raises(ConfigError, match=r"quant_config\.max_perplexity_increase must be"):
        start(-0.1)
    with start(100.0) as llm:
        llm.save(tmp_path / "engine")
    with load(tmp_path / "engine") as again:
        again.save(tmp_path / "copy")
    kept = [saved_engines.inspect(tmp_path / name)["quality"] for name in ("engine", "copy")]
    assert kept[0] == kept[1]
    assert kept[0]["model"]["weight_format"] == "int8"
    assert kept[0]["model"]["perplexity"] == pytest.approx(311, rel=0.02)
    assert kept[0]["reference"]["perplexity"] < 20


def test_windows_fit_the_shorter_context(models: tuple[Path, Any, Path, Any]) -> None:
    with load(models[0]) as llm, load(models[2], max_model_len=40) as reference:
        report = llm.evaluate(reference, text=TEXT, windows=2)
    assert (report.window_tokens, report.stride, report.num_tokens) == (40, 40, 2 * 39)


def test_what_cannot_be_evaluated_says_so(models: tuple[Path, Any, Path, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, vocab_size=200)
    with load(models[0]) as llm:
        with pytest.raises(ConfigError, match="vocabulary of 311 tokens, but the reference has one of 200"):
            llm.evaluate(tmp_path, text=[5] * 80, window_tokens=64, measure_speed=False)
        with pytest.raises(ConfigError, match=r"the text has token id 311, outside the model's vocabulary \[0, 311\)"):
            llm.evaluate(text=[*TEXT, 311], window_tokens=64)
        with pytest.raises(ConfigError, match="the text has 20 tokens, fewer than one window of window_tokens=64"):
            llm.evaluate(text=TEXT[:20], window_tokens=64)
        with pytest.raises(ConfigError, match=r"stride must be an integer in \[1, 64\], not 65"):
            llm.evaluate(text=TEXT, window_tokens=64, stride=65)
        with pytest.raises(ConfigError, match="windows must be an integer of at least 1, not 0"):
            llm.evaluate(text=TEXT, windows=0)
        with pytest.raises(ConfigError, match=r"needs a tokenizer; pass text=\[token ids\]"):
            llm.evaluate()
    with make_llm() as fake, pytest.raises(ConfigError, match=r"fake: the backend has no score\(\)"):
        fake.evaluate(text="abc" * 100, window_tokens=64, measure_speed=False)


@given(
    num_tokens=st.integers(2, 200),
    size=st.integers(2, 40),
    stride=st.integers(1, 40),
    prefix=st.integers(0, 2),
    limit=st.none() | st.integers(1, 9),
)
def test_windows_score_each_token_once(num_tokens: int, size: int, stride: int, prefix: int, limit: int | None) -> None:
    plan = WindowPlan(size, min(stride, size), limit)
    text, begin = list(range(num_tokens)), [-1] * prefix
    if size <= prefix or num_tokens < size - prefix:
        with pytest.raises(ConfigError, match="give a longer text or shorter windows"):
            plan.windows(text, begin)
        return
    windows = plan.windows(text, begin)
    assert limit is None or len(windows) <= limit
    scored = []
    for window in windows:
        assert len(window.token_ids) == size
        assert list(window.token_ids[:prefix]) == begin
        content = list(window.token_ids[prefix:])
        assert content == text[content[0] : content[0] + size - prefix]
        assert window.first_scored >= 1
        scored += window.token_ids[window.first_scored :]
    assert -1 not in scored
    assert len(set(scored)) == len(scored)
    if limit is None and prefix:
        assert scored == text[: len(scored)]


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_figures_do_not_depend_on_how_logits_are_cut(ours: list[int], theirs: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 90, 17, generator=generator)
    windows = [Window(list(range(17)) * 5 + [1] * 5, 7)]

    def scorer(logits: torch.Tensor, sizes: Sequence[int]) -> Callable[[Sequence[int], Callable[[Any], None]], None]:
        def score(token_ids: Sequence[int], take: Callable[[Any], None]) -> None:
            begin, number = 0, 0
            while begin < len(token_ids):
                piece = logits[begin : begin + sizes[number % len(sizes)]].clone()
                begin, number = begin + len(piece), number + 1
                take(piece)
                piece.fill_(torch.nan)  # what is valid only meanwhile

        return score

    found, expected, divergence = compare(windows, scorer(q, ours), scorer(p, theirs))
    log_p, log_q = torch.log_softmax(p.double(), -1)[6:89], torch.log_softmax(q.double(), -1)[6:89]
    targets = torch.tensor(windows[0].token_ids[7:])[:, None]
    assert found.num_tokens == expected.num_tokens == divergence.num_tokens == 83
    assert found.nll == pytest.approx(-float(log_q.gather(1, targets).sum()), rel=1e-5)
    assert expected.nll == pytest.approx(-float(log_p.gather(1, targets).sum()), rel=1e-5)
    assert divergence.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-4)
    assert measure(windows, scorer(q, ours)).nll == pytest.approx(found.nll, rel=1e-6)


def test_logits_that_are_not_finite_raise() -> None:
    def score(token_ids: Sequence[int], take: Callable[[Any], None]) -> None:
        take(torch.full((len(token_ids), 5), torch.nan))

    with pytest.raises(EngineError, match="not finite"):
        measure([Window([1, 2, 3], 1)], score)


def test_a_report_is_read_back_equal() -> None:
    figures = ModelFigures("cpu", "int8", 8.25, 100, None, 16, {1: 20.5, 16: 90.0}, "int8")
    alone = QualityReport("built-in", "0" * 64, 512, 512, 32, 16352, figures)
    beside = dataclasses.replace(alone, reference=figures, top1_agreement=1.0, mean_kl=0.0)
    for report in (alone, beside):
        values = json.loads(json.dumps(report.to_json()))
        assert QualityReport.from_json(values, "engine.json: quality") == report
        assert QualityReport.from_json({**values, "version": 2}, "engine.json: quality") is None
        for key in ("model", "reference", "num_tokens"):
            rest = {name: value for name, value in values.items() if name != key}
            with pytest.raises(CorruptFileError, match=r"^engine\.json: quality: not a quality report: "):
                QualityReport.from_json(rest, "engine.json: quality")
        del values["model"]["kv_dtype"]
        older = QualityReport.from_json(values, "engine.json: quality")
        assert older is not None
        assert older.model == dataclasses.replace(figures, kv_dtype="unknown")
        with pytest.raises(CorruptFileError):
            QualityReport.from_json({**values, "model": None}, "engine.json: quality")


def test_windows_begin_as_the_tokenizer_begins_a_text() -> None:
    """And do not end as it ends one."""

    class Framing:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            ids = list(text.encode())
            return [256, 7, *ids, 257] if add_special_tokens else ids

    found = tokenize(Framing(), "abcdefghij")
    assert (found.name, list(found.token_ids), list(found.prefix)) == ("text", list(b"abcdefghij"), [256, 7])
    windows = WindowPlan(6, 6, None).windows(found.token_ids, found.prefix)
    assert [(list(window.token_ids), window.first_scored) for window in windows] == [
        ([256, 7, *b"abcd"], 2),
        ([256, 7, *b"efgh"], 2),
    ]
    assert tokenize(Bytes(), "abc").prefix == ()
    assert tokenize(None, [1, 2, 3]).token_ids == [1, 2, 3]
    assert tokenize(Bytes(), None).name == "built-in"
