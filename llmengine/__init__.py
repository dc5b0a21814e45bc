"""llmengine: asyncio-first streaming inference for large language models, with in-flight batching.

Names are imported when first used: importing the package loads neither torch nor transformers and has no effects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmengine.batch import BackendInfo, TokenLogprobs
    from llmengine.beam_search import BeamOutput, BeamSearchOutput
    from llmengine.config import KvCacheConfig, ModelConfig, ParallelConfig, QuantConfig, SchedulerConfig
    from llmengine.engine.handle import RequestHandle
    from llmengine.engine.stats import EngineHealth, EngineStats, RequestStats
    from llmengine.errors import (
        ConfigError,
        CorruptFileError,
        EngineClosedError,
        EngineDeadError,
        EngineError,
        InvalidRequestError,
        LLMEngineError,
        ModelLoadError,
        OutOfMemoryError,
        PlacementError,
        PromptTooLongError,
        QualityError,
        QueueFullError,
        ReplicaDeadError,
        RequestError,
        RequestFailedError,
        UnsupportedModelError,
    )
    from llmengine.llm import LLM
    from llmengine.observer import (
        CachedBlock,
        EngineObserver,
        PrefixCacheChange,
        RequestEnd,
        StepRecord,
        SubmittedRequest,
    )
    from llmengine.outputs import FinishReason, GenerationOutput, Logprob, RequestTimeline
    from llmengine.quantization.quality_report import QualityReport
    from llmengine.request_options import ChatKeywords, RequestKeywords, RequestOptions
    from llmengine.sampling_params import SamplingParams
    from llmengine.structured_output import StructuredOutput

_HOMES = {
    "llmengine.batch": ("BackendInfo", "TokenLogprobs"),
    "llmengine.beam_search": ("BeamOutput", "BeamSearchOutput"),
    "llmengine.config": ("KvCacheConfig", "ModelConfig", "ParallelConfig", "QuantConfig", "SchedulerConfig"),
    "llmengine.engine.handle": ("RequestHandle",),
    "llmengine.engine.stats": ("EngineHealth", "EngineStats", "RequestStats"),
    "llmengine.errors": (
        "ConfigError",
        "CorruptFileError",
        "EngineClosedError",
        "EngineDeadError",
        "EngineError",
        "InvalidRequestError",
        "LLMEngineError",
        "ModelLoadError",
        "OutOfMemoryError",
        "PlacementError",
        "PromptTooLongError",
        "QualityError",
        "QueueFullError",
        "ReplicaDeadError",
        "RequestError",
        "RequestFailedError",
        "UnsupportedModelError",
    ),
    "llmengine.llm": ("LLM",),
    "llmengine.observer": (
        "CachedBlock",
        "EngineObserver",
        "PrefixCacheChange",
        "RequestEnd",
        "StepRecord",
        "SubmittedRequest",
    ),
    "llmengine.outputs": ("FinishReason", "GenerationOutput", "Logprob", "RequestTimeline"),
    "llmengine.quantization.quality_report": ("QualityReport",),
    "llmengine.request_options": ("ChatKeywords", "RequestKeywords", "RequestOptions"),
    "llmengine.sampling_params": ("SamplingParams",),
    "llmengine.structured_output": ("StructuredOutput",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BackendInfo",
    "BeamOutput",
    "BeamSearchOutput",
    "CachedBlock",
    "ChatKeywords",
    "ConfigError",
    "CorruptFileError",
    "EngineClosedError",
    "EngineDeadError",
    "EngineError",
    "EngineHealth",
    "EngineObserver",
    "EngineStats",
    "FinishReason",
    "GenerationOutput",
    "InvalidRequestError",
    "KvCacheConfig",
    "LLMEngineError",
    "Logprob",
    "ModelConfig",
    "ModelLoadError",
    "OutOfMemoryError",
    "ParallelConfig",
    "PlacementError",
    "PrefixCacheChange",
    "PromptTooLongError",
    "QualityError",
    "QualityReport",
    "QuantConfig",
    "QueueFullError",
    "RequestEnd",
    "ReplicaDeadError",
    "RequestError",
    "RequestFailedError",
    "RequestHandle",
    "RequestKeywords",
    "RequestOptions",
    "RequestStats",
    "RequestTimeline",
    "SamplingParams",
    "SchedulerConfig",
    "StepRecord",
    "StructuredOutput",
    "SubmittedRequest",
    "TokenLogprobs",
    "UnsupportedModelError",
]


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'llmengine' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
