"""Quantized weights that are chosen on data: AWQ, GPTQ and SmoothQuant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError
from llmengine.models.arch import ModelArch
from llmengine.quant_config import QuantConfig
from llmengine.quantization.model_formats import ModelFormats

if TYPE_CHECKING:
    import torch

    WeightStream = Iterator[tuple[str, torch.Tensor]]


class PromptTokenizer(Protocol):
    """What calibrating needs of a model's tokenizer."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of `text`, with the special tokens that the model expects around a prompt."""


def calibrated_formats(formats: ModelFormats, config: QuantConfig, arch: ModelArch) -> ModelFormats:
    """The formats that `calibrated_weights` will yield, where `formats` are those that `config` asks for.

    They are known before any weight is read and depend on nothing else, so that a model's sizes and manifest do. They
    differ from `formats` in matrices that need factors for their columns (`input_scale`), or reorder them
    (`input_order`).
    """
    return formats


def calibrated_weights(
    config: QuantConfig,
    arch: ModelArch,
    formats: ModelFormats,
    dtype: ModelDType,
    dense_weights: Callable[[], WeightStream],
    get_tokenizer: Callable[[], PromptTokenizer | None],
) -> WeightStream:
    """Yield every canonical weight in the order of `formats.layout(arch, dtype)`, quantized by `config.method`.

    Norms, biases and matrices that stay dense come as well, since AWQ and SmoothQuant fold factors into them. A matrix
    with a format for which there is nothing to calibrate (int8, as that of `lm_head`) is rounded to nearest. With tied
    embeddings the output matrix is not among them; the backend makes it from the embedding, so no factor may be folded
    into the norm before it.

    Args:
        config: resolved; `method` is not "rtn".
        dense_weights: begins a new pass over the unquantized weights, in `dtype`, in the same order. Layers come one
            after the other, so that one pass needs host memory for about two of them.
        get_tokenizer: waits for the model's tokenizer, None if it has none; called only for prompts that are texts.

    Raises `ConfigError` for a method that this version does not have.
    """
    raise ConfigError(
        f"quant_config.method={config.method!r} is not in this version; set 'rtn', which rounds to nearest"
    )
