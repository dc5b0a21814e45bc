"""Evaluation of loaded models: the figures of a `QualityReport`, measured on a model and on its reference.

**Speed** is that of a short run: output tokens a second, prompts included, of 1 request after another (the median of
three) and of 16 requests at once. Each has a prompt of 128 tokens of the text and 32 output tokens, fewer where the
context is shorter. It tells formats apart on one machine; it is no benchmark.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmengine.batch import BackendInfo
from llmengine.errors import ConfigError
from llmengine.quantization.evaluation import Likelihood, Scorer, WindowPlan, compare, evaluation_text, measure
from llmengine.quantization.quality_report import ModelFigures, QualityReport
from llmengine.sampling_params import SamplingParams
from llmengine.terminal_progress import TerminalProgress

BUILT_IN = "built-in"

CONCURRENT = (1, 16)
"""Requests at a time whose speed is measured."""

_PROMPT_TOKENS, _OUTPUT_TOKENS = 128, 32
_REPEATS = 3
"""Runs of a single request, of which the median counts."""


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """A text to evaluate on: its token ids, the special tokens that each window begins with, and a name for people."""

    name: str
    token_ids: Sequence[int]
    prefix: Sequence[int] = ()

    @property
    def sha256(self) -> str:
        """Hash of all token ids."""
        return hashlib.sha256(array("q", [*self.prefix, *self.token_ids]).tobytes()).hexdigest()


def tokenize(tokenizer: Any, text: str | Sequence[int] | None, name: str | None = None) -> EvaluationText:
    """Tokens of a text; None for the package's; token ids are taken as they are.

    Raises `ConfigError` without a tokenizer, and what the tokenizer raises.
    """
    if text is not None and not isinstance(text, str):
        return EvaluationText(name or "token ids", list(text))
    if tokenizer is None:
        raise ConfigError("evaluation on a text needs a tokenizer; pass text=[token ids]")
    name = name or (BUILT_IN if text is None else "text")
    text = evaluation_text() if text is None else text
    try:
        plain, sample = (
            tokenizer.encode(text, add_special_tokens=False),
            tokenizer.encode("a", add_special_tokens=False),
        )
    except TypeError:  # the tokenizer adds nothing that it could leave out
        return EvaluationText(name, tokenizer.encode(text))
    whole = tokenizer.encode("a")
    begins = (begin for begin in range(len(whole)) if whole[begin : begin + len(sample)] == sample)
    return EvaluationText(name, plain, whole[: next(begins, 0)])


class Generate(Protocol):
    """`LLM.generate`, as far as a measurement of speed needs it."""

    def __call__(self, prompts: list[list[int]], sampling_params: SamplingParams, /, *, cache_salt: str) -> object:
        """Generate for all prompts at once and wait for them."""


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A loaded model, as far as an evaluation needs it.

    Attributes:
        weight_format: for people.
        file_bytes: of the weights as they are saved, None for a model that cannot be.
    """

    info: BackendInfo
    weight_format: str
    file_bytes: int | None
    score: Scorer
    generate: Generate


def evaluate(
    model: EvaluatedModel,
    reference: EvaluatedModel | None,
    text: EvaluationText,
    plan: WindowPlan,
    *,
    measure_speed: bool,
    progress: bool,
) -> QualityReport:
    """The figures of a model, and of its reference; blocks. See `LLM.evaluate` for what is raised."""
    models = [model] if reference is None else [model, reference]
    _check_vocabulary(models, text.token_ids)
    plan = plan.within(min(side.info.max_model_len for side in models))
    windows = plan.windows(text.token_ids, text.prefix)
    with TerminalProgress("evaluating", len(windows) + len(models) * measure_speed, enabled=progress) as bar:
        if reference is None:
            likelihoods, divergence = [measure(windows, model.score, bar.advance)], None
        else:
            found, expected, divergence = compare(windows, model.score, reference.score, bar.advance)
            likelihoods = [found, expected]
        figures = []
        for side, likelihood in zip(models, likelihoods, strict=True):
            speeds = _speeds(side, text.token_ids) if measure_speed else {}
            figures.append(_figures(side, likelihood, speeds))
            if measure_speed:
                bar.advance()
    return QualityReport(
        text=text.name,
        text_sha256=text.sha256,
        window_tokens=plan.window_tokens,
        stride=plan.stride,
        num_windows=len(windows),
        num_tokens=likelihoods[0].num_tokens,
        model=figures[0],
        reference=figures[1] if len(figures) > 1 else None,
        top1_agreement=None if divergence is None else divergence.top1_agreement,
        mean_kl=None if divergence is None else divergence.mean_kl,
    )


def _check_vocabulary(models: Sequence[EvaluatedModel], token_ids: Sequence[int]) -> None:
    sizes = [model.info.vocab_size for model in models]
    if sizes[0] != sizes[-1]:
        raise ConfigError(
            f"the model has a vocabulary of {sizes[0]} tokens, but the reference has one of {sizes[-1]}; compare "
            "models that have the same tokenizer"
        )
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < sizes[0]), None)
    if wrong is not None:
        raise ConfigError(f"the text has token id {wrong}, outside the model's vocabulary [0, {sizes[0]})")


def _figures(model: EvaluatedModel, likelihood: Likelihood, speeds: dict[int, float]) -> ModelFigures:
    return ModelFigures(
        description=model.info.description,
        weight_format=model.weight_format,
        perplexity=likelihood.perplexity,
        weight_bytes=model.info.weight_bytes,
        file_bytes=model.file_bytes,
        kv_bytes_per_token=model.info.kv_bytes_per_block // model.info.block_size,
        tokens_per_s=speeds,
        kv_dtype=model.info.kv_dtype,
    )


def _speeds(model: EvaluatedModel, token_ids: Sequence[int]) -> dict[int, float]:
    """Output tokens/s by the number of concurrent requests; no prompt comes from the prefix cache."""
    prompt_tokens = min(_PROMPT_TOKENS, model.info.max_model_len // 2, len(token_ids))
    output_tokens = min(_OUTPUT_TOKENS, model.info.max_model_len - prompt_tokens)
    params = SamplingParams(max_new_tokens=output_tokens, ignore_eos=True, temperature=0.0)
    single, many = CONCURRENT
    distance = (len(token_ids) - prompt_tokens) // many
    begins = [distance * index for index in range(many)]
    prompts = [list(token_ids[begin : begin + prompt_tokens]) for begin in begins]

    def run(number: int, count: int) -> float:
        begin = time.perf_counter()
        model.generate(prompts[:count], params, cache_salt=f"speed {number}")
        return count * output_tokens / (time.perf_counter() - begin)

    run(0, single)
    speed = statistics.median(run(number, single) for number in range(1, _REPEATS + 1))
    return {single: speed, many: run(_REPEATS + 1, many)}
