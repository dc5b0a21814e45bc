"""The quality of an `LLM`'s model: the reference that it is compared with, and the limit that loading checks."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmengine.config import ModelConfig
from llmengine.generate_all import generate_all
from llmengine.llm_parts import LLMParts, LoadedModel, load_parts
from llmengine.request_options import RequestOptions
from llmengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from llmengine.model_quality import EvaluatedModel, EvaluationText
    from llmengine.quantization.evaluation import WindowPlan
    from llmengine.quantization.quality_report import QualityReport
    from llmengine.rank_hosts import RankHosts

_SPEED_TOKENS = 16 * 192
"""Tokens of the requests by which speed is measured, with blocks that are not full."""


def load_checked_parts(
    config: ModelConfig | str | Path, tokenizer: Any, enable_tokenizer: bool, rank_hosts: RankHosts | None = None
) -> LLMParts:
    """`load_parts`, and a quality report if `quant_config` limits the increase of perplexity.

    If the limit is exceeded or the evaluation fails, the engine is closed, and this raises what `LLM` raises.
    """
    parts = load_parts(config, tokenizer, enable_tokenizer, rank_hosts)
    limit = None if parts.model is None else parts.model.config.quant_config.max_perplexity_increase
    if limit is None:
        return parts
    from llmengine.model_quality import tokenize
    from llmengine.quantization.evaluation import WindowPlan

    try:
        text = tokenize(parts.intake.tokenizer, None)
        report = evaluate_parts(parts, None, text, WindowPlan(), measure_speed=False, progress=False)
        report.require(limit)
    except BaseException:
        parts.owner.close()
        raise
    return dataclasses.replace(parts, quality=report)


def evaluate_parts(
    parts: LLMParts,
    against: LLMParts | ModelConfig | str | Path | None,
    text: EvaluationText,
    plan: WindowPlan,
    *,
    measure_speed: bool,
    progress: bool,
) -> QualityReport:
    """The figures of a running model and of its reference, which is loaded if it is not running. See `LLM.evaluate`."""
    from llmengine.model_quality import evaluate

    with ExitStack() as stack:
        if not isinstance(against, LLMParts):
            config = _reference_config(parts.model, against, plan.window_tokens)
            against = None if config is None else load_checked_parts(config, None, enable_tokenizer=False)
            if against is not None:
                stack.callback(against.owner.close)
        reference = None if against is None else _evaluated(against)
        return evaluate(_evaluated(parts), reference, text, plan, measure_speed=measure_speed, progress=progress)


def _reference_config(
    model: LoadedModel | None, against: ModelConfig | str | Path | None, window_tokens: int
) -> ModelConfig | None:
    """What to load in order to compare a model with it; None if there is nothing.

    Args:
        against: as for `LLM.evaluate`.
        window_tokens: tokens of the longest text that the reference will see.
    """
    if isinstance(against, ModelConfig):
        return against
    if against is None:
        return None if model is None else model.unquantized(max(window_tokens, _SPEED_TOKENS))
    if model is None:
        return ModelConfig(against)
    return ModelConfig(against, device=model.config.device, num_threads=model.config.num_threads)


def _evaluated(parts: LLMParts) -> EvaluatedModel:
    """A running model, as an evaluation takes it."""
    from llmengine.model_quality import EvaluatedModel

    engine, model = parts.engine, parts.model

    def generate(prompts: list[list[int]], sampling_params: SamplingParams, /, *, cache_salt: str) -> None:
        options = RequestOptions(cache_salt=cache_salt, wait_for_admission=True)
        generate_all(parts, prompts, sampling_params, options)

    return EvaluatedModel(
        info=parts.info,
        weight_format="unknown" if model is None else str(model.formats),
        file_bytes=None if model is None else engine.call(model.file_bytes),
        score=engine.score,
        generate=generate,
    )
