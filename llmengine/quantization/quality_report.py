"""QualityReport: the figures of a model, and what they are against those of the model that it was quantized from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llmengine.errors import ConfigError, CorruptFileError, QualityError

_VERSION = 1
"""Of the object that `to_json` gives; what another version wrote is not read."""


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """What was measured of one model.

    Attributes:
        description: backend, device and formats, for people.
        weight_format: "none" for weights that are not quantized.
        perplexity: of the text.
        weight_bytes: of the weights in memory.
        file_bytes: of the weights as `LLM.save` writes them; None for a model that cannot be saved.
        kv_bytes_per_token: of the KV cache.
        kv_dtype: of the keys and values in the cache; "unknown" in reports that were written without it.
        tokens_per_s: number of concurrent requests -> output tokens/s of a short run, see `model_quality`; empty where
            speed was not measured.
    """

    description: str
    weight_format: str
    perplexity: float
    weight_bytes: int
    file_bytes: int | None
    kv_bytes_per_token: int
    tokens_per_s: Mapping[int, float]
    kv_dtype: str = "unknown"


@dataclass(frozen=True, slots=True)
class QualityReport:
    """A model's quality on a text, and its differences from a reference; see `evaluation` for the definitions.

    Attributes:
        text: where the text came from; "built-in" for the package's.
        text_sha256: of its token ids, so that figures of the same text and tokenizer can be told.
        num_tokens: tokens whose probability counted.
        reference: the unquantized model, or another that was asked for; None where the model was evaluated alone.
        top1_agreement: in [0, 1]; None without a reference.
        mean_kl: in nats; None without a reference.
    """

    text: str
    text_sha256: str
    window_tokens: int
    stride: int
    num_windows: int
    num_tokens: int
    model: ModelFigures
    reference: ModelFigures | None = None
    top1_agreement: float | None = None
    mean_kl: float | None = None

    @property
    def perplexity_increase(self) -> float | None:
        """The model's perplexity over the reference's, less 1: 0.01 is 1 %. None without a reference."""
        return None if self.reference is None else self.model.perplexity / self.reference.perplexity - 1.0

    def require(self, max_perplexity_increase: float) -> None:
        """Raise `QualityError` if the perplexity rises by more than this share, `ConfigError` without a reference."""
        increase = self.perplexity_increase
        if increase is None or self.reference is None:
            raise ConfigError(
                f"quant_config.max_perplexity_increase={max_perplexity_increase!r} needs an unquantized model to "
                "compare with, but the weights are not quantized here; leave it None"
            )
        if not increase <= max_perplexity_increase:
            raise QualityError(
                f"the perplexity rises by {increase:.2%}, from {self.reference.perplexity:.4f} to "
                f"{self.model.perplexity:.4f}, with a KV cache in {self.model.kv_dtype} and weights in format "
                f"{self.model.weight_format!r}; the limit is "
                f"{max_perplexity_increase:.2%} (quant_config.max_perplexity_increase={max_perplexity_increase!r}): "
                "choose a format with more bits, or raise the limit"
            )

    def to_json(self) -> dict[str, Any]:
        """The report as an object of JSON values."""
        values = dataclasses.asdict(self)
        for side in filter(None, (values["model"], values["reference"])):
            side["tokens_per_s"] = {str(number): speed for number, speed in side["tokens_per_s"].items()}
        return {"version": _VERSION, **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> Self | None:
        """The report that `to_json` gave; None if it is of another version.

        `where` names the file and key in messages. Raises `CorruptFileError` for anything else.
        """
        if values.get("version") != _VERSION:
            return None
        try:
            rest = {name: value for name, value in values.items() if name not in ("version", "model", "reference")}
            reference = None if values["reference"] is None else _figures(values["reference"])
            return cls(**rest, model=_figures(values["model"]), reference=reference)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CorruptFileError(f"{where}: not a quality report: {error}") from error


def _figures(values: Mapping[str, Any]) -> ModelFigures:
    speeds = {int(number): float(speed) for number, speed in values["tokens_per_s"].items()}
    return ModelFigures(**{**values, "tokens_per_s": speeds})
