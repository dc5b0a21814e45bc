"""The error tree.

::

    LLMEngineError
    ├── RequestError                the caller's fault: an HTTP server answers 4xx
    │   ├── InvalidRequestError     (ValueError) a prompt or parameter is malformed or out of range      400
    │   │   └── PromptTooLongError  the prompt leaves no room for a single new token                     400
    │   └── QueueFullError          the queue is full; try again later                                   429
    └── EngineError                 our fault or the operator's: an HTTP server answers 5xx
        ├── ConfigError             (ValueError) a configuration that cannot be served                   500
        ├── ModelLoadError          a checkpoint or engine directory cannot be read                      500
        │   ├── UnsupportedModelError  readable, but of an architecture or format that is not supported  500
        │   └── CorruptFileError       truncated, altered or inconsistent file                           500
        ├── QualityError            a quantized model is worse than the configuration allows                 500
        ├── OutOfMemoryError        weights, buffers or the KV cache do not fit in memory                500
        ├── PlacementError          no node of a Ray cluster had room for a replica in time              503
        ├── RequestFailedError      the engine failed one request and lives on                           500
        ├── EngineClosedError       `close()` was called                                                 503
        └── EngineDeadError         the engine stopped because of a fault, which is ``__cause__``        503
            └── ReplicaDeadError    one engine of a cluster did; the others live on                      503
"""

from __future__ import annotations

import traceback


class LLMEngineError(Exception):
    """Base of every error that llmengine raises on purpose.

    Attributes:
        status: the matching HTTP status.
        request_id: the request that the error ended; None if none had been submitted.
    """

    status: int = 500
    request_id: int | str | None = None


class RequestError(LLMEngineError):
    """The request cannot be served as the caller made it."""

    status = 400


class InvalidRequestError(RequestError, ValueError):
    """A prompt or a parameter is malformed or out of range; the message names the value and the range."""


class PromptTooLongError(InvalidRequestError):
    """The prompt leaves no room for one new token in the context."""


class QueueFullError(RequestError):
    """An admission limit of the engine is reached; nothing was queued."""

    status = 429


class EngineError(LLMEngineError):
    """The engine, its configuration or its files are at fault."""


class ConfigError(EngineError, ValueError):
    """A configuration value is out of range, contradicts another, or is not available here."""


class ModelLoadError(EngineError):
    """A checkpoint, tokenizer or engine directory cannot be loaded; the message names the file."""


class UnsupportedModelError(ModelLoadError):
    """The files are sound but hold an architecture, option or format that is not supported."""


class CorruptFileError(ModelLoadError):
    """A file is truncated, altered or inconsistent with the others; the message names file and mismatch."""


class QualityError(EngineError):
    """A quantized model is worse than `QuantConfig.max_perplexity_increase` allows; names the figure and the limit."""


class OutOfMemoryError(EngineError):
    """A component does not fit in memory; the message names it, the free memory, and the setting to change."""


class PlacementError(EngineError):
    """Ray did not start a replica in time; the message names the resources it asks for, and those that there are."""

    status = 503


class RequestFailedError(EngineError):
    """The engine failed this request alone (non-finite logits, say) and goes on serving others."""


class EngineClosedError(EngineError):
    """The engine was closed: it aborted its requests and accepts no new ones."""

    status = 503


class EngineDeadError(EngineError):
    """The engine stopped because of a fault, which is ``__cause__``."""

    status = 503


class ReplicaDeadError(EngineDeadError):
    """The replica of a cluster that ran the request has died; the cluster goes on with the others."""


def clear_frames(failure: BaseException | None) -> None:
    """Release what was loaded before a failure: whoever holds that may try again with a smaller model."""
    left, seen = [failure], set[int]()
    while left:
        failure = left.pop()
        if failure is not None and id(failure) not in seen:
            seen.add(id(failure))
            traceback.clear_frames(failure.__traceback__)
            left += (failure.__cause__, failure.__context__)  # what was raised meanwhile may have another cause
