"""Quantized weights that are chosen on data: AWQ, GPTQ and SmoothQuant, one layer of the model after the other.

::

    dense weights, as a stream ─▶ layer i ─▶ its forward pass on all texts, which counts the activations of each matrix
                                   │
                                   ├─▶ factors, grids, integers (`calibration_layer.quantized_layer`) ─▶ yielded
                                   └─▶ the texts' hidden states after the layer ─▶ layer i + 1

Beside what its consumer keeps, that takes memory for one layer (dense, in float32 and quantized), the Gram matrices of
its activations, and the texts' hidden states: num_calibration_samples * 512 * hidden_size numbers in the model's dtype.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from llmengine.dtypes import ModelDType, torch_dtype
from llmengine.models.arch import ModelArch
from llmengine.quant_config import QuantConfig
from llmengine.quantization.calibration_samples import PromptTokenizer as PromptTokenizer
from llmengine.quantization.calibration_samples import calibration_samples
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import Int8W8A8
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.model_formats import ModelFormats, matrix_shapes
from llmengine.terminal_progress import TerminalProgress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmengine.quantization.calibration_walk import CalibrationWalk

    WeightStream = Iterator[tuple[str, torch.Tensor]]

OUTLIER = 5.0
"""A matrix whose relative error is more than this many times the median of its kind is named in a warning."""

_logger = logging.getLogger(__name__)


def calibrated_formats(formats: ModelFormats, config: QuantConfig, arch: ModelArch) -> ModelFormats:
    """The formats that `calibrated_weights` will yield, where `formats` are those that `config` asks for.

    They are known before any weight is read and depend on nothing else, so that a model's sizes and manifest do. They
    differ from `formats` in matrices that need factors for their columns (`input_scale`): qkv and gate_up where no norm
    precedes them, into which factors could be folded.
    """
    if config.method == "gptq" or arch.norm_placement != "post":
        return formats
    exceptions = dict(formats.exceptions)
    for index, name in itertools.product(range(arch.num_layers), ("qkv", "gate_up")):
        matrix = f"layers.{index}.{name}"
        wanted = formats.of(matrix)
        if isinstance(wanted, Int4Groups | Int8W8A8):
            exceptions[matrix] = dataclasses.replace(wanted, input_scale=True)
    return ModelFormats(formats.default, exceptions)


def calibrated_weights(
    config: QuantConfig,
    arch: ModelArch,
    formats: ModelFormats,
    dtype: ModelDType,
    dense_weights: Callable[[], WeightStream],
    get_tokenizer: Callable[[], PromptTokenizer | None],
    check: Callable[[], None] = lambda: None,
) -> WeightStream:
    """Yield every canonical weight in the order of `formats.layout(arch, dtype)`, quantized by `config.method`.

    Norms, biases and matrices that stay dense come as well, since AWQ and SmoothQuant fold factors into them. A matrix
    with a format for which there is nothing to calibrate (int8, as that of `lm_head`) is rounded to nearest. With tied
    embeddings the output matrix is not among them; the backend makes it from the embedding, so no factor may be folded
    into the norm before it.

    Logs a warning that names matrices whose error is far above that of the others (`OUTLIER`).

    Args:
        config: resolved; `method` is not "rtn".
        dense_weights: begins a new pass over the unquantized weights, in `dtype`, in the same order. Layers come one
            after the other, so that one pass needs host memory for about two of them.
        get_tokenizer: waits for the model's tokenizer, None if it has none; called only for prompts that are texts.
        check: called for each text in each layer, and for each matrix; what it raises ends the stream.

    Raises `ConfigError` for prompts that do not do; see `calibration_samples`.
    """
    # Before any weight is read, and before whatever is slow.
    samples = calibration_samples(config, arch.vocab_size, arch.max_position_embeddings, get_tokenizer)
    return _calibrated(config, arch, formats, dtype, dense_weights(), samples, check)


def _calibrated(
    config: QuantConfig,
    arch: ModelArch,
    formats: ModelFormats,
    dtype: ModelDType,
    dense: WeightStream,
    samples: Sequence[Sequence[int]],
    check: Callable[[], None],
) -> WeightStream:
    from llmengine.quantization.calibration_walk import CalibrationWalk

    assert config.method in ("awq", "gptq", "smoothquant")
    walk = CalibrationWalk(arch, config.method, samples, torch_dtype(dtype), check)
    matrices, layout = matrix_shapes(arch).keys(), list(formats.layout(arch, dtype))
    errors: dict[str, float] = {}
    with TerminalProgress(f"calibrating ({config.method})", arch.num_layers) as progress:
        for prefix, group in itertools.groupby(dense, key=_part):
            if not prefix.startswith("layers."):
                yield from _rounded(group, matrices, formats, walk)
                continue
            tensors = {name.removeprefix(prefix): tensor for name, tensor in group}
            own = {name: formats.of(prefix + name) for name in ("qkv", "o", "gate_up", "down")}
            layer = walk.quantize(tensors, own)
            errors |= {prefix + name: error for name, error in layer.errors.items()}
            del tensors
            for name in (name for name in layout if name.startswith(prefix)):
                yield name, layer.pop(name.removeprefix(prefix))
            progress.advance()
    _warn_of_outliers(errors)


def _part(item: tuple[str, Tensor]) -> str:
    """ "layers.3." for tensors of layer 3, else the tensor's name."""
    name, _ = item
    return ".".join(name.split(".")[:2]) + "." if name.startswith("layers.") else name


def _rounded(
    tensors: Iterable[tuple[str, Tensor]], matrices: Iterable[str], formats: ModelFormats, walk: CalibrationWalk
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        prefix = name.rpartition(".")[0]
        if prefix == "embed_tokens":
            walk.embed(tensor)
        if prefix in matrices:
            yield from Matrix.dense(tensor).quantized(formats.of(prefix)).named_tensors(prefix)
        else:
            yield name, tensor


def _warn_of_outliers(errors: Mapping[str, float]) -> None:
    for kind in ("qkv", "o", "gate_up", "down"):
        found = {name: error for name, error in errors.items() if name.endswith(f".{kind}")}
        median = statistics.median(found.values()) if found else 0.0
        for name, error in found.items():
            if error > OUTLIER * median:
                _logger.warning(
                    "quantizing %s changes its product by %.1f %%, the median of such matrices is %.1f %%; "
                    "quant_config.skip_layers=[%r] keeps it as it is",
                    *(name, 100 * error, 100 * median, name),
                )
