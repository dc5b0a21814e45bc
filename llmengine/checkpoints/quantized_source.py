"""A checkpoint as a source of quantized weights: what `quant_config` asks for happens to the stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from llmengine.checkpoints.source import ModelSource, WeightStream
from llmengine.dtypes import model_dtype_name
from llmengine.models.arch import ModelArch
from llmengine.quant_config import QuantConfig
from llmengine.quantization.calibration import PromptTokenizer, calibrated_formats, calibrated_weights
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import ModelFormats, formats_in_use, matrix_shapes

if TYPE_CHECKING:
    import torch


def loaded_formats(source: ModelSource, config: QuantConfig) -> ModelFormats:
    """The formats in which backends hold the weights of `source` with a resolved `config`; see `formats_in_use`."""
    formats = formats_in_use(source.formats, config, source.arch)
    if formats == source.formats or config.method in (None, "rtn"):
        return formats
    return calibrated_formats(formats, config, source.arch)


def quantized_source(
    source: ModelSource,
    config: QuantConfig,
    get_tokenizer: Callable[[], PromptTokenizer | None] = lambda: None,
    check: Callable[[], None] = lambda: None,
) -> ModelSource:
    """`source` with the weights that a resolved `config` asks for; `source` itself if they are stored like that.

    Streaming quantizes: a matrix at a time by rounding to nearest, or on data (`calibrated_weights`). The weights are
    the same however often they are streamed. Raises as `formats_in_use` does.

    Args:
        get_tokenizer: as for `calibrated_weights`.
        check: called again and again while weights are quantized; what it raises ends that.
    """
    formats = loaded_formats(source, config)
    if formats == source.formats:
        return source
    unrounded = _checked(source, check) if config.method == "rtn" else None

    def stream(dtype: torch.dtype) -> WeightStream:
        if unrounded is not None:
            return rounded_weights(source.arch, formats, unrounded.weights(dtype))
        dense, name = partial(source.weights, dtype), model_dtype_name(dtype)
        return calibrated_weights(config, source.arch, formats, name, dense, get_tokenizer, check)

    return dataclasses.replace(source, formats=formats, stream=stream, stream_slices=None, unrounded=unrounded)


def _checked(source: ModelSource, check: Callable[[], None]) -> ModelSource:
    """`source`, whose streams end with what `check`, called for each tensor, raises."""

    def checked(weights: WeightStream) -> WeightStream:
        for item in weights:
            check()
            yield item

    slices = source.stream_slices
    return dataclasses.replace(
        source,
        stream=lambda dtype: checked(source.stream(dtype)),
        stream_slices=None if slices is None else lambda dtype, cuts: checked(slices(dtype, cuts)),
    )


def rounded_weights(arch: ModelArch, formats: ModelFormats, dense: WeightStream) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield canonical weights in `formats`, each matrix rounded to nearest as it comes from `dense`."""
    matrices = matrix_shapes(arch).keys()
    for name, tensor in dense:
        prefix, _, suffix = name.rpartition(".")
        if suffix == "weight" and prefix in matrices:
            yield from Matrix.dense(tensor).quantized(formats.of(prefix)).named_tensors(prefix)
        else:
            yield name, tensor
