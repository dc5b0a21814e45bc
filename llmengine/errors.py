"""The error tree.

::

    LLMEngineError
    ├── RequestError                the caller's fault: an HTTP server answers 4xx
    │   ├── InvalidRequestError     (ValueError) a prompt or parameter is malformed or out of range      400
    │   │   └── PromptTooLongError  the prompt leaves no room for a single new token                     400
    │   └── QueueFullError          admission limit reached; try again later                             429
    └── EngineError                 ours or the operator's: an HTTP server answers 5xx
        ├── ConfigError             (ValueError) a configuration that cannot be served                   500
        ├── ModelLoadError          a checkpoint or engine directory cannot be read                      500
        │   ├── UnsupportedModelError  readable, but of an architecture or format that is not supported  500
        │   └── CorruptFileError       truncated, altered or inconsistent file                           500
        ├── OutOfMemoryError        a component does not fit; names it, the memory and the knob          500
        ├── RequestFailedError      the engine failed one request and lives on                           500
        ├── EngineClosedError       `close()` was called                                                 503
        └── EngineDeadError         the engine stopped for a fault; ``__cause__`` is that fault          503
"""

from __future__ import annotations


class LLMEngineError(Exception):
    """Base of every error that llmengine raises on purpose.

    Attributes:
        status: the HTTP status that fits it.
        request_id: of the request that it ended; None where none had been submitted.
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
    """The engine's admission limit is reached; nothing was queued."""

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


class OutOfMemoryError(EngineError):
    """A component does not fit in memory; the message names it, what is free, and the knob to turn."""


class RequestFailedError(EngineError):
    """The engine failed this request alone (non-finite logits, say) and goes on serving others."""


class EngineClosedError(EngineError):
    """The engine was closed; it accepts no request, and those it held were aborted."""

    status = 503


class EngineDeadError(EngineError):
    """The engine stopped for a fault of its own; ``__cause__`` holds it."""

    status = 503
