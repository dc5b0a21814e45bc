"""`ModelFormats`: which matrix of a model has which weight format, and the layout of the whole model that follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Self

from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError, CorruptFileError
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.quant_config import QuantConfig
from llmengine.quantization.formats import DENSE, Shape, TensorSpec, WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.known_formats import format_from_json
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.stacked import Stacked

_EXCEPTIONS = "exceptions"


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """One format for the layers' matrices and the output matrix, and named exceptions.

    The embedding is dense unless it is an exception, since its rows are looked up.

    Attributes:
        exceptions: matrix -> format, by canonical name less ".weight" ("layers.3.down", "lm_head").
    """

    default: WeightFormat = DENSE
    exceptions: Mapping[str, WeightFormat] = field(default_factory=dict)

    def of(self, matrix: str) -> WeightFormat:
        """The format of a matrix, by canonical name less ".weight".

        With tied embeddings "lm_head" is the copy of the embedding that computes logits; it is not among the layout.
        """
        return self.exceptions.get(matrix, DENSE if matrix == "embed_tokens" else self.default)

    @classmethod
    def of_matrices(cls, formats: Mapping[str, WeightFormat]) -> Self:
        """The formats of a model whose matrices have these, by canonical name less ".weight".

        The default is what most matrices have that are in one format. With tied embeddings, `formats` has "lm_head"
        all the same.
        """
        items = ((name, item) for name, item in formats.items() if not isinstance(item, Stacked))
        counts = Counter(item for name, item in items if name != "embed_tokens")
        default = cls(counts.most_common(1)[0][0])
        return cls(default.default, {name: item for name, item in formats.items() if item != default.of(name)})

    @property
    def is_dense(self) -> bool:
        """Whether no matrix is quantized."""
        return self.in_use == {DENSE}

    @property
    def in_use(self) -> frozenset[WeightFormat]:
        """All formats of the model's matrices."""
        return frozenset((self.default, *self.exceptions.values()))

    @property
    def kinds(self) -> frozenset[WeightFormat]:
        """All formats of the model's matrices, or of their parts where these have formats of their own."""
        stacked = [item for item in self.in_use if isinstance(item, Stacked)]
        return frozenset((*self.in_use.difference(stacked), *(part.format for item in stacked for part in item.parts)))

    def layout(self, arch: ModelArch, dtype: ModelDType) -> dict[str, TensorSpec]:
        """Every stored tensor of a model whose weights are in `dtype` where they are not quantized, in stream order.

        The order is that of `canonical_shapes`, the further tensors of a matrix right behind its weight
        ("layers.0.qkv.weight", "layers.0.qkv.weight_scale"). Norms are float32 where `arch.float32_norms`.
        """
        layout: dict[str, TensorSpec] = {}
        for name, shape in canonical_shapes(arch).items():
            if len(shape) == 2:
                matrix = name.removesuffix(".weight")
                for suffix, spec in self.of(matrix).tensors((shape[0], shape[1]), dtype).items():
                    layout[f"{matrix}.{suffix}"] = spec
            else:
                is_float32 = arch.float32_norms and name.endswith("norm.weight")
                layout[name] = TensorSpec("float32" if is_float32 else dtype, shape)
        return layout

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads back equal; empty for a dense model, as manifests always had it."""
        values = {} if self.default == DENSE else self.default.to_json()
        if self.exceptions:
            values[_EXCEPTIONS] = {name: item.to_json() for name, item in self.exceptions.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], arch: ModelArch, where: str) -> ModelFormats:
        """The formats of a model of `arch`; raises as `format_from_json` does, and for exceptions without a matrix."""
        exceptions = values.get(_EXCEPTIONS, {})
        if not isinstance(exceptions, Mapping) or not all(isinstance(item, Mapping) for item in exceptions.values()):
            raise CorruptFileError(f"{where}: {_EXCEPTIONS}: expected an object of objects, found {exceptions!r}")
        unknown = sorted(exceptions.keys() - matrix_shapes(arch).keys() - {"lm_head"})
        if unknown:
            raise CorruptFileError(f"{where}: {_EXCEPTIONS}: the model has no matrix {', '.join(map(repr, unknown))}")
        default = {key: value for key, value in values.items() if key != _EXCEPTIONS}
        return cls(
            format_from_json(default, where),
            {name: format_from_json(item, f"{where}: {name}") for name, item in exceptions.items()},
        )

    def __str__(self) -> str:
        """For people: "int8", or "int8 but for 3 matrices"."""
        count = sum(item != self.default for item in self.exceptions.values())
        return str(self.default) + (f" but for {count} matri{'x' if count == 1 else 'ces'}" if count else "")


DENSE_MODEL = ModelFormats()
"""No matrix is quantized."""


def matrix_shapes(arch: ModelArch) -> dict[str, Shape]:
    """Shape of every stored matrix by canonical name less ".weight", in stream order."""
    shapes = canonical_shapes(arch).items()
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2}


def formats_in_use(stored: ModelFormats, config: QuantConfig, arch: ModelArch) -> ModelFormats:
    """The formats in which a backend holds weights that are `stored` so, with what a resolved `config` asks for.

    Stored formats stay. Beside formats of fewer than 8 bits and those that round activations, the output matrix is
    int8: logits feel its errors directly, and it is too large for 16 bits. Raises `ConfigError` if weights that are
    quantized would have to be quantized to another format, and for a pattern in `skip_layers` that fits no matrix.
    """
    wanted = _wanted_format(config)
    if wanted == DENSE:
        return stored
    if not stored.is_dense:
        if not _same_values(stored.default, wanted):
            raise ConfigError(
                f"quant_config asks for weights in format {str(wanted)!r}, but the model's are stored as "
                f"{str(stored)!r}; set quant_config.weights='none' to use them as they are"
            )
        return stored
    formats: dict[str, WeightFormat] = {} if wanted == INT8 else {"lm_head": INT8}
    for name in _skipped(config.skip_layers, arch):
        formats[name] = DENSE
    return ModelFormats(wanted, {**formats, **stored.exceptions})


def _wanted_format(config: QuantConfig) -> WeightFormat:
    scales, activations = config.scales, config.activations
    if config.weights == "int8":
        return INT8 if activations == "none" else Int8W8A8("tensor" if scales == "tensor" else "channel", activations)
    if config.weights == "int4":
        return Int4Groups(config.group_size if scales == "group" else -1, not config.symmetric)
    if config.weights == "fp8" and scales == "block":
        return Fp8("block", "none" if activations == "none" else "block")
    if config.weights == "fp8":
        return Fp8("tensor" if scales == "tensor" else "channel", activations)
    return Mxfp4() if config.weights == "mxfp4" else DENSE


def _same_values(one: WeightFormat, other: WeightFormat) -> bool:
    """Whether two formats differ at most in the order of columns, in factors of columns, and in the dtype of scales."""
    free = ("input_order", "input_scale", "scale_dtype")
    settings = [{key: value for key, value in item.to_json().items() if key not in free} for item in (one, other)]
    return settings[0] == settings[1]


def _skipped(patterns: Sequence[str], arch: ModelArch) -> list[str]:
    """The matrices that patterns name, in stream order."""
    names = [*matrix_shapes(arch), *(("lm_head",) if arch.tie_word_embeddings else ())]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"quant_config.skip_layers: {pattern!r} fits no matrix of the model; it has layers.0.qkv, layers.0.o, "
                f"layers.0.gate_up, layers.0.down, likewise up to layers.{arch.num_layers - 1}, and lm_head"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
