"""Linears of quantized checkpoints: the layouts that their tools write, and the weight formats that these become.

A layout knows the tensors of one linear. It checks them, says which `WeightFormat` has the same integers and scales,
and rearranges them into that format's tensors. Nothing is rounded.

======================  ===========================================================================================
`Awq`                   AutoAWQ: int32 words along the rows, eight outputs of a column in interleaved order
`AwqVector`             AutoAWQ's layout "gemv": int32 words along the columns
`Gptq`                  AutoGPTQ and GPTQModel: int32 words along the columns, stored column by column
`Packed`                compressed-tensors "pack-quantized": int32 words along the columns
`Integers`              compressed-tensors "int-quantized": int8 weights, perhaps with int8 activations
`Floats`                e4m3 weights of compressed-tensors, and of `quant_method` "fp8"
`Microscaled`           MXFP4: blocks of 32 with exponents
======================  ===========================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from llmengine.checkpoints.huggingface_tensors import StoredTensor
from llmengine.dtypes import DType, ModelDType
from llmengine.errors import ConfigError, CorruptFileError, UnsupportedModelError
from llmengine.quantization.formats import Shape, WeightFormat
from llmengine.quantization.fp8 import BLOCK as FP8_BLOCK
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import GROUP_SIZES, Int4Groups, pack_nibbles, unpack_nibbles
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import BLOCK as MXFP4_BLOCK
from llmengine.quantization.mxfp4 import Mxfp4

if TYPE_CHECKING:
    from torch import Tensor

_SCALE_DTYPES: tuple[ModelDType, ...] = ("float16", "bfloat16", "float32")
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of AutoAWQ's word that each of its eight outputs is in."""
_CHUNK_WEIGHTS = 1 << 24
"""Weights that are unpacked at a time, one byte each."""

Scales = Literal["tensor", "channel", "block"]
Activations = Literal["none", "token", "block", "tensor"]


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """One linear of a checkpoint.

    Attributes:
        name: its module, as transformers names it.
        shape: (out_features, in_features), by the architecture.
        where: the directory.
        tensors: its tensors by what follows the module's name ("qweight", "weight_scale").
        load: reads a tensor as it is stored.
    """

    name: str
    shape: Shape
    where: str
    tensors: Mapping[str, StoredTensor[Any]]
    load: Callable[[StoredTensor[Any]], Tensor]

    def has(self, suffix: str) -> bool:
        """Whether there is a tensor of this name that has elements."""
        return suffix in self.tensors and 0 not in self.tensors[suffix].shape

    def require(self, suffix: str, dtypes: tuple[DType, ...], *shapes: tuple[int, ...]) -> DType:
        """The dtype of a tensor that must be there with one of these dtypes and shapes.

        Raises `CorruptFileError` for one that is missing or misshapen, `UnsupportedModelError` for another dtype.
        """
        stored = self.tensors.get(suffix)
        if stored is None:
            found = ", ".join(sorted(self.tensors)) or "no tensor"
            raise CorruptFileError(
                f"{self.where}: layer {self.name!r}: tensor '{self.name}.{suffix}' is missing; the layer has {found}"
            )
        for dtype in dtypes:
            if stored.dtype == dtype:
                break
        else:
            raise UnsupportedModelError(
                f"{stored.path}: tensor {stored.name!r} has dtype {stored.dtype}, which is not supported; supported: "
                f"{', '.join(dtypes)}"
            )
        if stored.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise CorruptFileError(
                f"{stored.path}: tensor {stored.name!r} has shape {stored.shape}, expected {wanted} for a layer of "
                f"{self.shape[0]} x {self.shape[1]} weights"
            )
        return dtype

    def read(self, suffix: str) -> Tensor:
        """A tensor as it is stored."""
        return self.load(self.tensors[suffix])

    def damaged(self, suffix: str, reason: str) -> CorruptFileError:
        """The error for a tensor whose values cannot be right."""
        stored = self.tensors[suffix]
        return CorruptFileError(f"{stored.path}: tensor {stored.name!r} {reason}")

    def unsupported(self, reason: str) -> UnsupportedModelError:
        """The error for a linear that no format of ours has."""
        return UnsupportedModelError(f"{self.where}: layer {self.name!r}: {reason}")


class LinearLayout(Protocol):
    """How a tool stores a linear.

    Attributes:
        main: the tensor that has the weights; a linear without it is not quantized.
    """

    @property
    def main(self) -> str: ...

    def format(self, linear: StoredLinear) -> WeightFormat:
        """The weight format of a linear, whose tensors are checked."""

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        """The tensors of that format, new and contiguous."""

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        """Those that belong to no row; they must be equal for linears to become one matrix."""

    def by_row(self) -> Self:
        """The layout with a scale for each row where a linear has one, which it must have within a larger matrix."""


class _Grouped:
    """What layouts of integers in groups have in common."""

    __slots__ = ()

    def by_row(self) -> Self:
        return self

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, slots=True)
class Awq(_Grouped):
    """AutoAWQ's layout "gemm".

    ::

        qweight  int32 [in, out / 8]: eight outputs in the nibbles 0, 4, 1, 5, 2, 6, 3, 7 of a word
        qzeros   int32 [groups, out / 8], likewise
        scales   float16 [groups, out]

    A weight is (q - zero) * scale. Source: AutoAWQ, `awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.
    """

    main: ClassVar[str] = "qweight"
    group_size: int

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        groups = _num_groups(linear, self.group_size, divides=True)
        if rows % 8:
            raise linear.unsupported(f"AWQ stores 8 outputs in a word, but the layer has {rows}")
        linear.require("qweight", ("int32",), (columns, rows // 8))
        scale_dtype = linear.require("scales", _SCALE_DTYPES, (groups, rows))
        if has_zeros := linear.has("qzeros"):
            linear.require("qzeros", ("int32",), (groups, rows // 8))
        return _integer_format(linear, 4, self.group_size, has_zeros, False, scale_dtype)

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        rows, columns = linear.shape
        words = linear.read("qweight")
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
        step = max(8, _CHUNK_WEIGHTS // columns // 8 * 8)
        for begin in range(0, rows, step):
            part = _awq_codes(words[:, begin // 8 : (begin + step) // 8])
            packed[begin : begin + step] = pack_nibbles(part.t())
        tensors = {"weight": packed, "weight_scale": linear.read("scales").t().contiguous()}
        if linear.has("qzeros"):
            tensors["zero_point"] = _awq_codes(linear.read("qzeros")).t().contiguous()
        return tensors


@dataclass(frozen=True, slots=True)
class AwqVector(_Grouped):
    """AutoAWQ's layout "gemv".

    ::

        qweight  int32 [out, in / 8], columns from the lowest nibble on
        qzeros   int32 [out, width], likewise a group in each nibble; there are more than groups
        scales   float16 [out, 8 * width]

    Source: AutoAWQ, `awq/modules/linear/gemv.py`.
    """

    main: ClassVar[str] = "qweight"
    group_size: int

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        groups = _num_groups(linear, self.group_size, divides=True)
        if columns % 8:
            raise linear.unsupported(f"AWQ stores 8 inputs in a word, but the layer has {columns}")
        multiple = {64: 2, 32: 4}.get(self.group_size, 1)
        width = -(-groups // (8 * multiple)) * multiple
        linear.require("qweight", ("int32",), (rows, columns // 8))
        linear.require("qzeros", ("int32",), (rows, width))
        scale_dtype = linear.require("scales", _SCALE_DTYPES, (rows, 8 * width))
        return _integer_format(linear, 4, self.group_size, True, False, scale_dtype)

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        groups = _num_groups(linear, self.group_size, divides=True)
        return {
            "weight": _bytes_of(linear.read("qweight")),
            "weight_scale": linear.read("scales")[:, :groups].contiguous(),
            "zero_point": _codes(linear.read("qzeros"), 4)[:, :groups].contiguous(),
        }


@dataclass(frozen=True, slots=True)
class Gptq(_Grouped):
    """The layout of AutoGPTQ and GPTQModel.

    ::

        qweight  int32 [in * bits / 32, out]: consecutive inputs from the lowest bits on
        qzeros   int32 [groups, out * bits / 32], consecutive outputs; less 1 in the first version of the format
        scales   float16 [groups, out]
        g_idx    int32 [in], the group of each input; with act-order, groups are not consecutive

    A weight is (q - zero) * scale. Source: AutoGPTQ, `auto_gptq/nn_modules/qlinear`; GPTQModel, `FORMAT`.

    Attributes:
        symmetric: whether all zeros are the middle of the range.
        act_order: whether `g_idx` must be there; where it is, it holds.
        zero_offset: what `qzeros` lack.
    """

    main: ClassVar[str] = "qweight"
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    zero_offset: int

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        groups, in_word = _num_groups(linear, self.group_size), 32 // self.bits
        if rows % in_word or columns % in_word:
            raise linear.unsupported(
                f"GPTQ stores {in_word} weights in a word, which divides {rows} x {columns} weights in no way"
            )
        linear.require("qweight", ("int32",), (columns // in_word, rows))
        linear.require("qzeros", ("int32",), (groups, rows // in_word))
        scale_dtype = linear.require("scales", _SCALE_DTYPES, (groups, rows))
        if self.act_order or linear.has("g_idx"):
            linear.require("g_idx", ("int32", "int64"), (columns,))
        has_order = self._order(linear) is not None
        return _integer_format(linear, self.bits, self.group_size, not self.symmetric, has_order, scale_dtype)

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        order = self._order(linear)
        return {} if order is None else {"input_order": order}

    def _order(self, linear: StoredLinear) -> Tensor | None:
        return _input_order(linear, "g_idx", self.group_size)

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        packed = _bytes_of(linear.read("qweight").t().contiguous())
        return _integer_tensors(
            self.format(linear),
            packed,
            linear.read("scales").t().contiguous(),
            self._zeros(linear),
            self._order(linear),
        )

    def _zeros(self, linear: StoredLinear) -> Tensor:
        """Zero points, uint8 [out, groups]."""
        import torch

        zeros = _codes(linear.read("qzeros"), self.bits).t().to(torch.int16) + self.zero_offset
        middle = 1 << (self.bits - 1)
        if self.symmetric and not bool((zeros == middle).all()):
            raise linear.damaged(
                "qzeros",
                f"has zero points other than {middle}, although quantization_config has sym=true; set it to false to "
                "use them",
            )
        if int(zeros.max()) > 255:
            raise linear.damaged("qzeros", "has a zero point of 256, which is beyond 8 bits")
        return zeros.to(torch.uint8).contiguous()


@dataclass(frozen=True, slots=True)
class Packed(_Grouped):
    """compressed-tensors' format "pack-quantized".

    ::

        weight_packed      int32 [out, in * bits / 32]: consecutive inputs from the lowest bits on, 2^(bits - 1) added
        weight_scale       [out, groups], or [1] for strategy "tensor"
        weight_zero_point  int32 [out * bits / 32, groups], packed likewise along the outputs, or int8 [out, groups];
                           only if asymmetric
        weight_g_idx       int32 [in], the group of each input; only with act-order
        weight_shape       [2], (out, in)

    Source: compressed-tensors, `compressors/quantized_compressors/pack_quantized.py`.
    """

    main: ClassVar[str] = "weight_packed"
    bits: int
    group_size: int
    symmetric: bool
    one_scale: bool

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        groups, in_word = _num_groups(linear, self.group_size, divides=True), 32 // self.bits
        linear.require("weight_packed", ("int32",), (rows, -(-columns // in_word)))
        shapes = _scale_shapes("tensor" if self.one_scale else "channel", linear, groups)
        scale_dtype = linear.require("weight_scale", _SCALE_DTYPES, *shapes)
        if not self.symmetric and self.one_scale:
            raise linear.unsupported("one zero point for a whole matrix is not supported")
        if not self.symmetric:
            self._check_zeros(linear, groups, in_word)
        if linear.has("weight_shape"):
            linear.require("weight_shape", ("int64", "int32"), (2,))
            found = tuple(linear.read("weight_shape").tolist())
            if found != linear.shape:
                raise linear.damaged("weight_shape", f"says {found}, but the layer has {linear.shape} weights")
        if linear.has("weight_g_idx"):
            linear.require("weight_g_idx", ("int32", "int64"), (columns,))
        has_order = self._order(linear) is not None
        return _integer_format(linear, self.bits, self.group_size, not self.symmetric, has_order, scale_dtype)

    def _check_zeros(self, linear: StoredLinear, groups: int, in_word: int) -> None:
        rows = linear.shape[0]
        stored = linear.tensors.get("weight_zero_point")
        is_packed = stored is None or stored.dtype != "int8"
        shape = (-(-rows // in_word), groups) if is_packed else (rows, groups)
        linear.require("weight_zero_point", ("int32", "int8"), shape)

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        order = self._order(linear)
        return {} if order is None else {"input_order": order}

    def _order(self, linear: StoredLinear) -> Tensor | None:
        return _input_order(linear, "weight_g_idx", self.group_size)

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        rows, columns = linear.shape
        packed = _bytes_of(linear.read("weight_packed"))[:, : columns * self.bits // 8].contiguous()
        scale = linear.read("weight_scale").reshape(-1, _num_groups(linear, self.group_size))
        scale = scale.expand(rows, -1).contiguous()
        zeros = None if self.symmetric else self._zeros(linear)
        return _integer_tensors(self.format(linear), packed, scale, zeros, self._order(linear))

    def _zeros(self, linear: StoredLinear) -> Tensor:
        import torch

        stored = linear.read("weight_zero_point")
        if stored.dtype == torch.int8:
            return (stored.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)
        return _codes(stored.t().contiguous(), self.bits)[:, : linear.shape[0]].t().contiguous()


@dataclass(frozen=True, slots=True)
class Integers:
    """compressed-tensors' format "int-quantized".

    ::

        weight        int8 [out, in]
        weight_scale  [out, 1], [1] for scales="tensor", or [out, groups] with a group_size
        input_scale   [1], only with activations="tensor"

    Source: compressed-tensors, `compressors/quantized_compressors/naive_quantized.py`.

    Attributes:
        group_size: only for weights alone; -1 for a scale for each row.
        rows_scaled: whether a matrix with one scale gets one for each row.
    """

    main: ClassVar[str] = "weight"
    scales: Literal["channel", "tensor"]
    activations: Literal["none", "token", "tensor"]
    group_size: int = -1
    rows_scaled: bool = False

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        linear.require("weight", ("int8",), (rows, columns))
        groups = _num_groups(linear, self.group_size, divides=True)
        scale_dtype = linear.require("weight_scale", _SCALE_DTYPES, *_scale_shapes(self.scales, linear, groups))
        if self.activations == "none":
            return _integer_format(linear, 8, self.group_size, False, False, scale_dtype)
        if self.activations == "tensor":
            linear.require("input_scale", _SCALE_DTYPES, (1,), ())
        return Int8W8A8("channel" if self.rows_scaled else self.scales, self.activations)

    def by_row(self) -> Self:
        return dataclasses.replace(self, rows_scaled=True)

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return _activation_scale(linear) if self.activations == "tensor" else {}

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        stored = self.format(linear)
        weight, scale = linear.read("weight"), linear.read("weight_scale")
        if isinstance(stored, Int8Groups):
            return {"weight": weight.view(torch.uint8) ^ 0x80, "weight_scale": scale}
        scale = scale.float().reshape(-1)
        if stored == INT8 or (isinstance(stored, Int8W8A8) and stored.scales == "channel"):
            scale = scale.expand(linear.shape[0]).contiguous()
        return {"weight": weight, "weight_scale": scale, **self.shared(linear)}


@dataclass(frozen=True, slots=True)
class Floats:
    """e4m3 weights, of compressed-tensors ("float-quantized") and of `quant_method` "fp8".

    ::

        weight       float8_e4m3fn [out, in]
        SCALE        factors of the weights: [1], [out, 1], or [blocks of 128 rows, blocks of 128 columns]
        input_scale  [1], divisor of the activations; only with activations="tensor"

    Source: compressed-tensors, `naive_quantized.py`; the DeepSeek-V3 repository for `weight_scale_inv`, which despite
    its name is a factor too.

    Attributes:
        scale_name: "weight_scale" or "weight_scale_inv".
        rows_scaled: whether a matrix with one scale gets one for each row.
    """

    main: ClassVar[str] = "weight"
    scales: Scales
    activations: Activations
    scale_name: str = "weight_scale"
    rows_scaled: bool = False

    def format(self, linear: StoredLinear) -> WeightFormat:
        linear.require("weight", ("float8_e4m3fn",), linear.shape)
        linear.require(self.scale_name, _SCALE_DTYPES, *_scale_shapes(self.scales, linear))
        if self.activations == "tensor":
            linear.require("input_scale", _SCALE_DTYPES, (1,), ())
        return Fp8("channel" if self.rows_scaled and self.scales == "tensor" else self.scales, self.activations)

    def by_row(self) -> Self:
        return dataclasses.replace(self, rows_scaled=True)

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return _activation_scale(linear) if self.activations == "tensor" else {}

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        scale = linear.read(self.scale_name).float()
        if self.scales != "block":
            scale = scale.reshape(-1)
        if self.scales == "tensor" and self.rows_scaled:
            scale = scale.expand(linear.shape[0]).contiguous()
        return {"weight": linear.read("weight"), "weight_scale": scale, **self.shared(linear)}


@dataclass(frozen=True, slots=True)
class Microscaled:
    """MXFP4: e2m1 numbers, the first of two in the low nibble, and e8m0 exponents.

    ::

        BLOCKS  uint8 [out, blocks, 16], or [out, in / 2]
        SCALES  uint8 or float8_e8m0fnu [out, blocks]

    Source: OCP Microscaling Formats 1.0; the gpt-oss checkpoints for names and shapes.
    """

    main: str = "weight_blocks"
    scale_name: str = "weight_scales"

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        if columns % MXFP4_BLOCK:
            raise linear.unsupported(f"MXFP4 has blocks of {MXFP4_BLOCK} inputs, which do not divide {columns}")
        blocks = columns // MXFP4_BLOCK
        linear.require(self.main, ("uint8",), (rows, blocks, MXFP4_BLOCK // 2), (rows, columns // 2))
        linear.require(self.scale_name, ("uint8", "float8_e8m0fnu"), (rows, blocks))
        return Mxfp4()

    def by_row(self) -> Self:
        return self

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        return {}

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        scale = linear.read(self.scale_name).view(torch.uint8)
        return {"weight": linear.read(self.main).reshape(linear.shape[0], -1), "weight_scale": scale}


def _num_groups(linear: StoredLinear, group_size: int, *, divides: bool = False) -> int:
    """Groups of a row; raises `UnsupportedModelError` if the size must divide the number of inputs and does not."""
    columns = linear.shape[1]
    if group_size == -1:
        return 1
    if divides and columns % group_size:
        raise linear.unsupported(f"group_size={group_size} does not divide its {columns} inputs")
    return -(-columns // group_size)


def _scale_shapes(scales: Scales, linear: StoredLinear, groups: int = 1) -> list[tuple[int, ...]]:
    """Shapes in which files have scales."""
    rows, columns = linear.shape
    if scales == "tensor":
        return [(1,), (), (1, 1)]
    if scales == "block":
        return [(-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))]
    return [(rows, groups)] if groups > 1 else [(rows, 1), (rows,)]


def _activation_scale(linear: StoredLinear) -> dict[str, Tensor]:
    return {"activation_scale": linear.read("input_scale").float().reshape(1)}


def _integer_format(
    linear: StoredLinear, bits: int, group_size: int, zero_points: bool, has_order: bool, scale_dtype: DType
) -> WeightFormat:
    """The format of integers in groups; raises `UnsupportedModelError` for a group size that none has."""
    size = -1 if group_size not in GROUP_SIZES and group_size >= linear.shape[1] else group_size
    if bits == 8 and size == -1 and not zero_points:
        return INT8
    kind = Int4Groups if bits == 4 else Int8Groups
    dtype = next(dtype for dtype in _SCALE_DTYPES if dtype == scale_dtype)
    try:
        stored = kind(size, zero_points, has_order, scale_dtype=dtype)
        stored.tensors(linear.shape, "float32")
    except ConfigError as error:
        listed = ", ".join(map(str, GROUP_SIZES))
        raise linear.unsupported(f"group_size={group_size} is not supported; supported: {listed}") from error
    except UnsupportedModelError as error:
        raise linear.unsupported(str(error)) from error
    return stored


def _integer_tensors(
    stored: WeightFormat, packed: Tensor, scale: Tensor, zeros: Tensor | None, order: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of `stored`.

    Args:
        packed: uint8 [out, in * bits / 8], columns in the order of the file.
        scale: [out, groups].
        zeros: uint8 [out, groups]; left out where the format has none.
    """
    import torch

    if stored == INT8:
        return {"weight": (packed ^ 0x80).view(torch.int8), "weight_scale": scale.float().view(-1)}
    assert isinstance(stored, Int4Groups | Int8Groups), stored
    if order is not None:
        packed = _in_order(packed, order.long(), in_nibbles=isinstance(stored, Int4Groups))
    tensors = {"weight": packed, "weight_scale": scale}
    if stored.zero_points:
        assert zeros is not None
        tensors["zero_point"] = zeros
    if order is not None:
        tensors["input_order"] = order
    return tensors


def _in_order(packed: Tensor, order: Tensor, *, in_nibbles: bool) -> Tensor:
    """Packed rows whose columns are in another order, some rows at a time."""
    if not in_nibbles:
        return packed.index_select(1, order)
    for rows in packed.split(max(1, _CHUNK_WEIGHTS // len(order))):
        rows.copy_(pack_nibbles(unpack_nibbles(rows).index_select(1, order)))
    return packed


def _input_order(linear: StoredLinear, suffix: str, group_size: int) -> Tensor | None:
    """The columns sorted by their groups, int32; None if there are no groups or they are consecutive as they are."""
    import torch

    columns = linear.shape[1]
    if group_size == -1 or group_size >= columns or not linear.has(suffix):
        return None
    groups = linear.read(suffix).long()
    consecutive = torch.arange(columns) // group_size
    if torch.equal(groups, consecutive):
        return None
    order = torch.argsort(groups, stable=True)
    if int(groups.min()) < 0 or int(groups.max()) > int(consecutive[-1]):
        raise linear.damaged(suffix, f"names groups outside [0, {int(consecutive[-1])}]")
    if not torch.equal(groups[order], consecutive):
        raise linear.unsupported(f"{suffix} makes groups of other sizes than group_size={group_size}")
    return order.to(torch.int32)


def _bytes_of(words: Tensor) -> Tensor:
    """The bytes of int32 words [rows, words], lowest first: uint8 [rows, 4 * words]."""
    import torch

    return words.contiguous().view(torch.uint8)


def _codes(words: Tensor, bits: int) -> Tensor:
    """The integers of 4 or 8 bits in int32 words [rows, words], lowest first: uint8 [rows, words * 32 / bits]."""
    return unpack_nibbles(_bytes_of(words)) if bits == 4 else _bytes_of(words)


def _awq_codes(words: Tensor) -> Tensor:
    """The integers in AutoAWQ's words [columns, rows / 8]: uint8 [columns, rows]."""
    return _codes(words, 4).view(words.shape[0], -1, 8)[:, :, list(_AWQ_PLACES)].flatten(1)
