"""Layouts that pack integers into int32 words: AutoAWQ's, GPTQ's, and that of compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmengine.checkpoints.quantized_linears import (
    SCALE_DTYPES,
    Layout,
    StoredLinear,
    integer_format,
    num_groups,
    scale_shapes,
)
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.int4 import Int4Groups, pack_nibbles, unpack_nibbles
from llmengine.quantization.int8 import INT8
from llmengine.quantization.int8_groups import Int8Groups

if TYPE_CHECKING:
    from torch import Tensor

_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Nibble of AutoAWQ's word that each of its eight outputs is in."""
_CHUNK_WEIGHTS = 1 << 20
"""Weights that are unpacked at a time, one byte each: few enough to stay in the cache."""


@dataclass(frozen=True, slots=True)
class Awq(Layout):
    """AutoAWQ's layout "gemm".

    ::

        qweight  int32 [in, out / 8]: eight outputs in the nibbles 0, 4, 1, 5, 2, 6, 3, 7 of a word
        qzeros   int32 [groups, out / 8], likewise
        scales   float16 [groups, out]

    A weight is (q - zero) * scale. Source: AutoAWQ, `awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.

    Attributes:
        has_zero_points: whether `qzeros` must be there; where it is, it holds.
    """

    group_size: int
    has_zero_points: bool = False

    @property
    def main(self) -> str:
        return "qweight"

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        groups = num_groups(linear, self.group_size, divides=True)
        if rows % 8:
            raise linear.unsupported(f"AWQ stores 8 outputs in a word, but the layer has {rows}")
        linear.require("qweight", ("int32",), (columns, rows // 8))
        scale_dtype = linear.require("scales", SCALE_DTYPES, (groups, rows))
        if has_zeros := self.has_zero_points or linear.has("qzeros"):
            linear.require("qzeros", ("int32",), (groups, rows // 8))
        return integer_format(linear, 4, self.group_size, has_zeros, False, scale_dtype)

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        import torch

        rows, columns = linear.shape
        words = linear.read("qweight")
        packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
        step = max(8, _CHUNK_WEIGHTS // columns // 8 * 8)
        for begin in range(0, rows, step):
            packed[begin : begin + step] = _awq_rows(words[:, begin // 8 : (begin + step) // 8])
        tensors = {"weight": packed, "weight_scale": linear.read_scale("scales").t().contiguous()}
        if linear.has("qzeros"):
            tensors["zero_point"] = _awq_codes(linear.read("qzeros")).t().contiguous()
        return tensors


@dataclass(frozen=True, slots=True)
class AwqVector(Layout):
    """AutoAWQ's layout "gemv".

    ::

        qweight  int32 [out, in / 8], columns from the lowest nibble on
        qzeros   int32 [out, width], likewise a group in each nibble; there are more than groups
        scales   float16 [out, 8 * width]

    Source: AutoAWQ, `awq/modules/linear/gemv.py`.
    """

    group_size: int

    @property
    def main(self) -> str:
        return "qweight"

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        groups = num_groups(linear, self.group_size, divides=True)
        if columns % 8:
            raise linear.unsupported(f"AWQ stores 8 inputs in a word, but the layer has {columns}")
        multiple = {64: 2, 32: 4}.get(self.group_size, 1)
        width = -(-groups // (8 * multiple)) * multiple
        linear.require("qweight", ("int32",), (rows, columns // 8))
        linear.require("qzeros", ("int32",), (rows, width))
        scale_dtype = linear.require("scales", SCALE_DTYPES, (rows, 8 * width))
        return integer_format(linear, 4, self.group_size, True, False, scale_dtype)

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        groups = num_groups(linear, self.group_size, divides=True)
        return {
            "weight": _bytes_of(linear.read("qweight")),
            "weight_scale": linear.read_scale("scales")[:, :groups].contiguous(),
            "zero_point": _codes(linear.read("qzeros"), 4)[:, :groups].contiguous(),
        }


@dataclass(frozen=True, slots=True)
class Gptq(Layout):
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

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    zero_offset: int

    @property
    def main(self) -> str:
        return "qweight"

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        groups, in_word = num_groups(linear, self.group_size), 32 // self.bits
        if rows % in_word or columns % in_word:
            raise linear.unsupported(
                f"GPTQ stores {in_word} weights in a word; outputs and inputs must be multiples of that, not "
                f"{rows} and {columns}"
            )
        linear.require("qweight", ("int32",), (columns // in_word, rows))
        linear.require("qzeros", ("int32",), (groups, rows // in_word))
        scale_dtype = linear.require("scales", SCALE_DTYPES, (groups, rows))
        if self.act_order or linear.has("g_idx"):
            linear.require("g_idx", ("int32", "int64"), (columns,))
        has_order = self._order(linear) is not None
        return integer_format(linear, self.bits, self.group_size, not self.symmetric, has_order, scale_dtype)

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
            linear.read_scale("scales").t().contiguous(),
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
class Packed(Layout):
    """compressed-tensors' format "pack-quantized".

    ::

        weight_packed      int32 [out, in * bits / 32]: consecutive inputs from the lowest bits on, 2^(bits - 1) added
        weight_scale       [out, groups], or [1] for strategy "tensor"
        weight_zero_point  int32 [out * bits / 32, groups], packed likewise along the outputs, or int8 [out, groups];
                           only if asymmetric
        weight_g_idx       int32 [in], the group of each input; only with act-order
        weight_shape       [2], (out, in)

    Source: compressed-tensors, `compressors/pack_quantized`.

    Attributes:
        act_order: whether `weight_g_idx` must be there; where it is, it holds.
    """

    bits: int
    group_size: int
    symmetric: bool
    one_scale: bool
    act_order: bool = False

    @property
    def main(self) -> str:
        return "weight_packed"

    def format(self, linear: StoredLinear) -> WeightFormat:
        rows, columns = linear.shape
        groups, in_word = num_groups(linear, self.group_size, divides=True), 32 // self.bits
        linear.require("weight_packed", ("int32",), (rows, -(-columns // in_word)))
        shapes = scale_shapes("tensor" if self.one_scale else "channel", linear, groups)
        scale_dtype = linear.require("weight_scale", SCALE_DTYPES, *shapes)
        if not self.symmetric:
            self._check_zeros(linear, groups, in_word)
        if linear.has("weight_shape"):
            linear.require("weight_shape", ("int64", "int32"), (2,))
            found = tuple(linear.read("weight_shape").tolist())
            if found != linear.shape:
                raise linear.damaged("weight_shape", f"says {found}, but the layer has {linear.shape} weights")
        if self.act_order or linear.has("weight_g_idx"):
            linear.require("weight_g_idx", ("int32", "int64"), (columns,))
        has_order = self._order(linear) is not None
        return integer_format(linear, self.bits, self.group_size, not self.symmetric, has_order, scale_dtype)

    def _check_zeros(self, linear: StoredLinear, groups: int, in_word: int) -> None:
        rows = linear.shape[0]
        stored = linear.tensors.get("weight_zero_point")
        if stored is not None and stored.dtype == "int8":
            shapes = scale_shapes("tensor" if self.one_scale else "channel", linear, groups)
            linear.require("weight_zero_point", ("int8",), *shapes)
        else:
            linear.require("weight_zero_point", ("int32",), (-(-rows // in_word), groups))

    def shared(self, linear: StoredLinear) -> dict[str, Tensor]:
        order = self._order(linear)
        return {} if order is None else {"input_order": order}

    def _order(self, linear: StoredLinear) -> Tensor | None:
        return _input_order(linear, "weight_g_idx", self.group_size)

    def read(self, linear: StoredLinear) -> dict[str, Tensor]:
        rows, columns = linear.shape
        packed = _bytes_of(linear.read("weight_packed"))[:, : columns * self.bits // 8].contiguous()
        scale = linear.read_scale("weight_scale").reshape(-1, num_groups(linear, self.group_size))
        scale = scale.expand(rows, -1).contiguous()
        zeros = None
        if self.symmetric:
            require_no_zero_points(linear, self.bits)
        else:
            zeros = self._zeros(linear)
        return _integer_tensors(self.format(linear), packed, scale, zeros, self._order(linear))

    def _zeros(self, linear: StoredLinear) -> Tensor:
        """Zero points, uint8 [out, groups]."""
        import torch

        stored = linear.read("weight_zero_point")
        if stored.dtype != torch.int8:
            return _codes(stored.t().contiguous(), self.bits)[:, : linear.shape[0]].t().contiguous()
        return shifted_zero_points(linear, stored, self.bits, num_groups(linear, self.group_size))


def shifted_zero_points(linear: StoredLinear, stored: Tensor, bits: int, groups: int) -> Tensor:
    """Signed zero points of compressed-tensors, int8 of a matrix or of rows, as uint8 [out, groups]."""
    import torch

    middle = 1 << (bits - 1)
    zeros = stored.to(torch.int16).reshape(-1, groups) + middle
    if bool(((zeros < 0) | (zeros >= 2 * middle)).any()):
        raise linear.damaged("weight_zero_point", f"has zero points beyond {bits} bits")
    return zeros.to(torch.uint8).expand(linear.shape[0], -1).contiguous()


def require_no_zero_points(linear: StoredLinear, bits: int) -> None:
    """Raise unless a symmetric linear's zero points, where a file has them all the same, do nothing."""
    if not linear.has("weight_zero_point"):
        return
    stored = linear.read("weight_zero_point")
    codes = _codes(stored.reshape(1, -1), bits) if linear.tensors["weight_zero_point"].dtype == "int32" else stored
    idle = (codes == 0) | (codes == 1 << (bits - 1)) if codes is not stored else codes == 0
    if not bool(idle.all()):
        raise linear.damaged(
            "weight_zero_point",
            "has zero points other than 0, although quantization_config has symmetric=true; set it to false to use "
            "them",
        )


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
    import torch

    places = order.numpy()
    for rows in packed.split(max(1, _CHUNK_WEIGHTS // len(order))):
        codes = unpack_nibbles(rows) if in_nibbles else rows
        codes = torch.from_numpy(codes.numpy().take(places, 1))  # in half the time of torch's index_select
        rows.copy_(pack_nibbles(codes) if in_nibbles else codes)
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
        raise linear.unsupported(f"the groups in {suffix} have other sizes than group_size={group_size}")
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


def _awq_rows(words: Tensor) -> Tensor:
    """AutoAWQ's words [columns, rows / 8] as rows of ours, uint8 [rows, columns / 2]."""
    import torch

    transposed = words.t()
    even, odd = transposed[:, 0::2].contiguous(), transposed[:, 1::2].contiguous()
    packed = torch.empty(even.shape[0], 8, even.shape[1], dtype=torch.uint8)
    for row, place in enumerate(_AWQ_PLACES):
        packed[:, row] = even >> 4 * place & 15 | (odd >> 4 * place & 15) << 4
    return packed.flatten(0, 1)
