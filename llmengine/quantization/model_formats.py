"""`ModelFormats`: which matrix of a model has which weight format, and the layout of the whole model that follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from llmengine.config import QuantConfig
from llmengine.dtypes import ModelDType
from llmengine.errors import ConfigError, CorruptFileError
from llmengine.models.arch import ModelArch, canonical_shapes
from llmengine.quantization.formats import DENSE, Shape, TensorSpec, WeightFormat
from llmengine.quantization.int8 import INT8
from llmengine.quantization.known_formats import format_from_json
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
        count = len(self.exceptions)
        return str(self.default) + (f" but for {count} matri{'x' if count == 1 else 'ces'}" if count else "")


DENSE_MODEL = ModelFormats()
"""No matrix is quantized."""


def matrix_shapes(arch: ModelArch) -> dict[str, Shape]:
    """Shape of every stored matrix by canonical name less ".weight", in stream order."""
    shapes = canonical_shapes(arch).items()
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes if len(shape) == 2}


def formats_in_use(stored: ModelFormats, config: QuantConfig) -> ModelFormats:
    """The formats in which a backend holds weights that are `stored` so, with what `config` asks for.

    Stored formats stay; "stored" asks for nothing else. Raises `ConfigError` for a format that this version does not
    have, or if weights that are quantized would have to be quantized to another format.
    """
    if config.weights in ("none", "stored"):
        return stored
    wanted = _WANTED.get(config.weights)
    if wanted is None:
        raise ConfigError(
            f"quant_config.weights={config.weights!r} is not in this version; there are 'none', 'stored' "
            "and, on a CPU, 'int8'"
        )
    if stored.is_dense:
        return ModelFormats(wanted, stored.exceptions)
    if stored.default != wanted:
        raise ConfigError(
            f"quant_config.weights={config.weights!r}, but the model's weights are stored as {stored}; "
            "set 'none' to use them as they are"
        )
    return stored


_WANTED: Mapping[str, WeightFormat] = {"int8": INT8}
"""What `QuantConfig.weights` names."""
