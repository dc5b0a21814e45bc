"""Matrices of a quantized Hugging Face checkpoint: fused from linears that were quantized one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmengine.checkpoints.canonical_weights import ReadPart, StoredPart, stored_parts, stored_shapes
from llmengine.checkpoints.huggingface_descriptions import LayoutChoice, Module
from llmengine.checkpoints.huggingface_tensors import (
    StoredTensor,
    TensorT,
    is_buffer,
    module_and_suffix,
    stored_names,
)
from llmengine.checkpoints.quantized_linears import LinearLayout, StoredLinear
from llmengine.dtypes import model_dtype_name
from llmengine.errors import CorruptFileError
from llmengine.models.arch import ModelArch, fused_parts, head_order
from llmengine.quantization.formats import DENSE, Along, WeightFormat
from llmengine.quantization.model_formats import ModelFormats
from llmengine.quantization.stacked import Stacked, stacked_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_EMBEDDING = "model.embed_tokens"
_KNOWN = frozenset(
    (
        *("weight", "bias", "qweight", "qzeros", "scales", "g_idx"),
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"),
        *("weight_zero_point", "weight_g_idx", "weight_shape", "input_scale", "input_global_scale"),
        *("input_zero_point", "activation_scale", "output_scale", "output_zero_point"),
        *("weight_blocks", "weight_scales", "SCB", "weight_format"),
        *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
    )
)
"""Tensors of quantized linears. Layouts leave out those that concern only what is not rounded here."""


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A linear of a checkpoint, how it is stored, and the weight format that it is read into."""

    stored: StoredLinear
    layout: LinearLayout
    format: WeightFormat

    @classmethod
    def of(cls, stored: StoredLinear, layout: LinearLayout) -> QuantizedLinear:
        """Raises as `LinearLayout.format` does."""
        return cls(stored, layout, layout.format(stored))

    def read(self) -> dict[str, Tensor]:
        """The tensors of the format, in its order."""
        tensors = self.layout.read(self.stored)
        return {suffix: tensors[suffix] for suffix in self.format.tensors(self.stored.shape, "float32")}

    def by_row(self) -> QuantizedLinear:
        """The same linear with a scale for each row, where it has one for all."""
        return QuantizedLinear.of(self.stored, self.layout.by_row())

    @property
    def rows_in_step(self) -> int:
        """The fewest rows that share an entry, 1 for most formats; an entry for all rows does not count."""
        specs = self.format.tensors(self.stored.shape, "float32").values()
        return max(along.step for spec in specs for along in spec.along if along is not None and along.axis == "out")


def quantized_linears(
    arch: ModelArch,
    where: str,
    named: Mapping[str, StoredTensor[TensorT]],
    layouts: LayoutChoice,
    load: Callable[[StoredTensor[TensorT]], Tensor],
) -> dict[str, QuantizedLinear]:
    """Every linear among the tensors `named` that is quantized, by its module, checked.

    Raises `CorruptFileError` for a tensor that is missing or misshapen, `UnsupportedModelError` for a linear that no
    format of ours has; both name layer and file.
    """
    by_module: dict[str, dict[str, StoredTensor[Any]]] = {}
    for name, tensor in named.items():
        module, suffix = module_and_suffix(name)
        by_module.setdefault(module, {})[suffix] = tensor
    linears = {}
    for name, shape in stored_shapes(arch, stored_names(arch)).items():
        module = name.removesuffix(".weight")
        tensors = by_module.get(module, {})
        layout = layouts(_described(module, tensors)) if len(shape) == 2 else None
        if layout is None or not layout.stores(tensors):
            continue
        linear = QuantizedLinear.of(StoredLinear(module, (shape[0], shape[1]), where, tensors, load), layout)
        _refuse_unknown(linear.stored)
        if module == _EMBEDDING and linear.rows_in_step > 1:
            raise linear.stored.unsupported(
                "rows of an embedding are looked up one by one, so they must not share scales"
            )
        linears[module] = linear
    return linears


def _described(module: str, tensors: Mapping[str, StoredTensor[Any]]) -> Module:
    """What a description may call a module: as this model has it, as the file, or as a larger model around it."""
    names = [module]
    for suffix, tensor in tensors.items():
        in_file = tensor.name.removesuffix(f".{suffix}")
        if in_file not in names:
            inside = module.removeprefix("model.")
            names += [in_file, f"model.language_model.{inside}", f"language_model.{module}"]
            break
    return Module(tuple(dict.fromkeys(names)), "Embedding" if module == _EMBEDDING else "Linear")


def _refuse_unknown(linear: StoredLinear) -> None:
    """Raise for tensors of a quantized linear that might change its result in a way that nothing here knows."""
    unknown = [suffix for suffix, tensor in linear.tensors.items() if suffix not in _KNOWN and not is_buffer(tensor)]
    if unknown:
        raise CorruptFileError(
            f"{linear.where}: layer {linear.name!r}: tensors are left over that its quantization does not have: "
            f"{', '.join(unknown)}"
        )


@dataclass(frozen=True, slots=True)
class QuantizedMatrices:
    """The canonical matrices that quantized linears make.

    Attributes:
        linears: module -> linear, in the layout that its matrix needs.
        formats: of all matrices of the model.
        places: where the parts of matrices are stored.
    """

    arch: ModelArch
    linears: Mapping[str, QuantizedLinear]
    formats: ModelFormats
    places: Mapping[str, StoredPart]

    def reader(self, dtype: torch.dtype, read_part: ReadPart) -> Callable[[str], dict[str, Tensor] | None]:
        """`read_matrix` of `stream_fused`. Memory peaks at twice a matrix.

        Args:
            dtype: of parts that are not quantized.
            read_part: fills the rows of such a part.
        """
        parts = fused_parts(self.arch)

        def read_matrix(matrix: str) -> dict[str, Tensor] | None:
            shapes = dict(parts[f"{matrix}.weight"]) if f"{matrix}.weight" in parts else {}
            stored = self.formats.of(matrix)
            if stored == DENSE or not shapes or len(next(iter(shapes.values()))) != 2:
                return None
            modules = {self._module(part) for part in shapes}
            if len(modules) == 1 and not self._reorders(shapes):
                return self.linears[modules.pop()].read()
            pieces = [self._part(part, shape, dtype, read_part) for part, shape in shapes.items()]
            if isinstance(stored, Stacked):
                return stacked_tensors(pieces)
            sizes = list(shapes.values())
            return stored.join(pieces, (sum(shape[0] for shape in sizes), sizes[0][1]), "out")

        return read_matrix

    def _module(self, part: str) -> str:
        return self.places[part].tensor.removesuffix(".weight")

    def _reorders(self, parts: Mapping[str, tuple[int, ...]]) -> bool:
        return head_order(self.arch) is not None and any(map(_is_rotated, parts))

    def _part(self, part: str, shape: tuple[int, ...], dtype: torch.dtype, read_part: ReadPart) -> dict[str, Tensor]:
        """The tensors of one part, its heads in canonical order."""
        import torch

        place, linear, order = self.places[part], self.linears.get(self._module(part)), head_order(self.arch)
        stored = DENSE if linear is None else linear.format
        if linear is None:
            tensors = {"weight": torch.empty(shape, dtype=dtype)}
            read_part(part, tensors["weight"])
        else:
            first = place.first_row
            tensors = stored.cut(linear.read(), linear.stored.shape, "out", first, first + place.num_rows)
        if order is None or not _is_rotated(part):
            return tensors
        rows = torch.arange(shape[0]).view(-1, self.arch.head_dim)[:, list(order)].flatten()
        specs = stored.tensors((shape[0], shape[1]), model_dtype_name(dtype))
        has_rows = {suffix for suffix, spec in specs.items() if any(map(_is_row, spec.along))}
        return {suffix: item.index_select(0, rows) if suffix in has_rows else item for suffix, item in tensors.items()}


def quantized_matrices(arch: ModelArch, linears: Mapping[str, QuantizedLinear]) -> QuantizedMatrices:
    """The matrices that `linears`, and the dense linears beside them, are parts of.

    Parts that are quantized alike make one matrix. Others, and parts whose act-order or activation scale differ, are
    stacked in their own formats. Raises `UnsupportedModelError` naming the layer for what cannot be put together.
    """
    places, used = stored_parts(arch, stored_names(arch)), dict(linears)
    formats: dict[str, WeightFormat] = {}
    for name, parts in fused_parts(arch).items():
        if len(parts[0][1]) != 2:
            continue
        modules = [places[part].tensor.removesuffix(".weight") for part, _ in parts]
        for (part, _), module in zip(parts, modules, strict=True):
            if module in linears:
                _check_cuts(arch, part, places[part], linears[module])
        stored, by_row = _fused(modules, [shape[0] for _, shape in parts], linears)
        formats[name.removesuffix(".weight")] = stored
        used |= by_row
    if arch.tie_word_embeddings:
        formats["lm_head"] = formats["embed_tokens"]
    return QuantizedMatrices(arch, used, ModelFormats.of_matrices(formats), places)


def _check_cuts(arch: ModelArch, part: str, place: StoredPart, linear: QuantizedLinear) -> None:
    """Raise unless the rows of a part can be taken out of a linear, and those of its heads reordered.

    Rows that share an entry may be reordered among themselves.
    """
    step = linear.rows_in_step
    if step == 1 or head_order(arch) is None:
        return
    is_cut = place.num_rows != place.total_rows and (place.first_row % step or place.num_rows % step)
    if is_cut or (_is_rotated(part) and step % arch.head_dim):
        raise linear.stored.unsupported(
            f"{step} rows share a scale, so its rows cannot be reordered; heads of which only {arch.rope.rotary_dim} "
            "dimensions rotate need that"
        )


def _fused(
    modules: Sequence[str], rows: Sequence[int], linears: Mapping[str, QuantizedLinear]
) -> tuple[WeightFormat, dict[str, QuantizedLinear]]:
    """The format of a matrix of these parts, and the linears that it needs with a scale for each row."""
    found = [linears.get(module) for module in modules]
    if len(set(modules)) == 1:
        return (DENSE if found[0] is None else found[0].format), {}
    if all(linear is None for linear in found):
        return DENSE, {}
    whole = [linear for linear in found if linear is not None]
    if len(whole) == len(found):
        by_row = [linear.by_row() for linear in whole]
        is_even = all(count % by_row[0].rows_in_step == 0 for count in rows[:-1])
        if is_even and len({linear.format for linear in by_row}) == 1 and _share(by_row):
            return by_row[0].format, dict(zip(modules, by_row, strict=True))
    own = [DENSE if linear is None else linear.format for linear in found]
    return Stacked.of_rows(list(zip(rows, own, strict=True))), {}


def _share(linears: Sequence[QuantizedLinear]) -> bool:
    """Whether linears have the same tensors that belong to no row."""
    import torch

    first, *others = (linear.layout.shared(linear.stored) for linear in linears)
    return all(
        first.keys() == other.keys() and all(torch.equal(first[suffix], other[suffix]) for suffix in first)
        for other in others
    )


def _is_rotated(part: str) -> bool:
    return part.split(".")[-2] in ("q", "k")


def _is_row(along: Along | None) -> bool:
    return along is not None and along.axis == "out" and along.step == 1
