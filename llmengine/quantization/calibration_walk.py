"""Calibration texts on their way through the layers of a model, each of which is quantized when they have passed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from llmengine.models.arch import ModelArch
from llmengine.quantization.calibration_layer import (
    MATRICES,
    CountedLinear,
    LayerForward,
    QuantizedLayer,
    is_calibrated,
    quantized_layer,
)
from llmengine.quantization.input_statistics import InputStatistics

if TYPE_CHECKING:
    from torch import Tensor

    from llmengine.quant_config import QuantMethod
    from llmengine.quantization.formats import WeightFormat


class CalibrationWalk:
    """Hidden states of all texts after the layers that were quantized so far.

    They are those of the dense layers: each layer is fitted to what the unquantized model computes, and one forward
    pass a layer is enough.
    """

    def __init__(
        self,
        arch: ModelArch,
        method: QuantMethod,
        samples: Sequence[Sequence[int]],
        dtype: torch.dtype,
        check: Callable[[], None],
    ) -> None:
        """Args: dtype: of the hidden states that are kept. check: see `calibrated_weights`."""
        self._check = check
        self._arch = arch
        self._method: QuantMethod = method
        self._samples = samples
        self._forward = LayerForward(arch, max(map(len, samples)))
        self._num_layers = 0
        # One tensor: thousands of small ones that come and go would leave gaps in memory.
        self._hidden = torch.empty((sum(map(len, samples)), arch.hidden_size), dtype=dtype)

    def _texts(self) -> tuple[Tensor, ...]:
        """Views of the hidden states, [num_tokens, hidden] of each text."""
        texts: tuple[Tensor, ...] = self._hidden.split([len(ids) for ids in self._samples])
        return texts

    @torch.no_grad()
    def embed(self, embedding: Tensor) -> None:
        """Begin with the rows of the dense embedding, [vocab, hidden]."""
        for ids, hidden in zip(self._samples, self._texts(), strict=True):
            hidden.copy_(embedding.index_select(0, torch.tensor(ids)).float().mul_(self._arch.embedding_scale))

    @torch.no_grad()
    def quantize(self, tensors: Mapping[str, Tensor], formats: Mapping[str, WeightFormat]) -> QuantizedLayer:
        """The next layer with each matrix in its format of `formats`.

        Args:
            tensors: dense tensors of the layer by their names without the layer's.
        """
        statistics = {
            name: InputStatistics(tensors[f"{name}.weight"].shape[1], with_gram=self._method != "smoothquant")
            for name in MATRICES
            if is_calibrated(self._method, formats[name])
        }
        vectors = {name: tensor.float() for name, tensor in tensors.items() if tensor.ndim == 1}
        linears = {
            name: CountedLinear(tensors[f"{name}.weight"].float(), vectors.get(f"{name}.bias"), statistics.get(name))
            for name in MATRICES
        }
        function = self._forward.bind(self._num_layers, vectors, linears)
        for hidden in self._texts():
            self._check()
            hidden.copy_(function(hidden))
        self._num_layers += 1
        del function, linears
        return quantized_layer(self._arch, self._method, formats, tensors, statistics, self._check)
