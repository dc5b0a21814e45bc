"""What a matrix product is, and the ways of computing it, each with a short name that is kept on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal, Protocol

import torch

from llmengine.kernels.cublaslt import CLUSTERS, TILES, CublasConfig, TileConfig
from llmengine.kernels.hopper_few import Cut
from llmengine.kernels.hopper_packed import EVENLY
from llmengine.kernels.packed_weights import TILE_ROWS, PackedLayout
from llmengine.kernels.scaled_weights import has_scaled_products
from llmengine.quantization.formats import DENSE, Shape, WeightFormat

_MAX_GATED_ROWS = 32
_SCALED_BLOCK_K = 128

Operation = Literal["norm_linear", "linear_add", "norm_linear_silu", "linear", "linear_silu"]
"""A product of normalized rows, one that is added to what is there, and a gated pair of normalized rows; one of rows as
they are, and a gated pair of those."""


GATED: Sequence[Operation] = ("norm_linear_silu", "linear_silu")


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """How `linear`'s own kernel cuts a product up.

    Attributes:
        block_m: rows of x; 1 multiplies without tensor cores, else a power of two from 16 on. With 1, let block_k be
            256 * num_warps: then x and weights are laid out alike, and threads do not wait for each other in a turn.
        block_n: outputs of a program, a power of two.
        block_k: inputs of one turn, a power of two.
        num_stages: turns whose loads are in flight at once, through shared memory; 1 loads into registers.
        split_k: programs that share the K of one tile; only for `linear_add` and `linear`.
        fuse_norm: normalize on the way, else by a kernel before; only where there is a norm.
        any_rows: programs for each block_m rows, as many as there are; else x has at most block_m rows.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    fuse_norm: bool = True
    any_rows: bool = False

    def __str__(self) -> str:
        """A short name: m16n32k128w4s4, then x2 for split_k, -norm for a norm of its own, -any for any_rows."""
        name = f"m{self.block_m}n{self.block_n}k{self.block_k}w{self.num_warps}s{self.num_stages}"
        name += (f"x{self.split_k}" if self.split_k > 1 else "") + ("" if self.fuse_norm else "-norm")
        return name + ("-any" if self.any_rows else "")


@dataclass(frozen=True, slots=True)
class PackedConfig:
    """How the kernels of `packed_linear` and `scaled_linear` cut up a product with quantized weights.

    Any number of rows can be computed, with programs for each block_m of them.

    Attributes:
        block_m: rows of x, a power of two from 8 on.
        block_n: outputs of a program, 64 or 128; of a gated pair as many of each.
        num_stages: turns, of a block of columns each, whose loads are in flight at once.
        split_k: programs that share the K of one tile, at most.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split_k: int = 1

    def __str__(self) -> str:
        """A short name: packed-m8n64w4s4, then x2 for split_k."""
        name = f"packed-m{self.block_m}n{self.block_n}w{self.num_warps}s{self.num_stages}"
        return name + (f"x{self.split_k}" if self.split_k > 1 else "")


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """How `hopper_packed` cuts up a product with packed weights.

    Attributes:
        block_m: rows of x that a program has, one of `hopper_packed.ROWS`.
        programs: that share a multiprocessor, one of `hopper_packed.PROGRAMS[block_m]`.
        split_k: programs that share the K of one tile, or `EVENLY`; one of `hopper_packed.SPLITS`.
    """

    block_m: int
    programs: int
    split_k: int = 1

    def __str__(self) -> str:
        """A short name: hopper-m64p2, then x2 for split_k, or e for `EVENLY`."""
        split = "e" if self.split_k == EVENLY else f"x{self.split_k}" if self.split_k > 1 else ""
        return f"hopper-m{self.block_m}p{self.programs}{split}"


@dataclass(frozen=True, slots=True)
class HopperFewConfig:
    """How `hopper_few` cuts up a product with packed weights."""

    cut: Cut

    def __str__(self) -> str:
        """A short name: hopper-m8s14c2w8p1, the cut's attributes in their order."""
        return "hopper-" + "".join(f"{letter}{value}" for letter, value in zip("mscwp", astuple(self.cut), strict=True))


@dataclass(frozen=True, slots=True)
class HopperScaledConfig:
    """How `hopper_scaled` cuts up a product whose operands both have 8 bits.

    Attributes:
        block_m: rows of x that a program has, a key of `hopper_scaled.OUTPUTS`.
        block_n: outputs of a program, one of `hopper_scaled.OUTPUTS[block_m]`.
        split_k: programs that share the K of one tile, one of `hopper_scaled.SPLITS`.
    """

    block_m: int
    block_n: int
    split_k: int = 1

    def __str__(self) -> str:
        """A short name: hopper-m256n128, then x2 for split_k."""
        return f"hopper-m{self.block_m}n{self.block_n}" + (f"x{self.split_k}" if self.split_k > 1 else "")


LinearConfig = (
    SkinnyConfig | PackedConfig | HopperConfig | HopperFewConfig | HopperScaledConfig | CublasConfig | TileConfig
)
"""A dense matrix is multiplied by a `SkinnyConfig` or cuBLASLt; a packed one by a `PackedConfig`, a `HopperConfig`, a
`HopperFewConfig`, or cuBLASLt, for which it is dequantized first; one with scaled products by a `PackedConfig` or a
`HopperScaledConfig`, and in FP8 by cuBLASLt."""


def parse_config(name: str) -> LinearConfig:
    """The configuration of this name; raises ValueError."""
    match = re.fullmatch(r"cublas(\d+)m(\d+)", name)
    if match is not None:
        return CublasConfig(int(match[1]), int(match[2]))
    match = re.fullmatch(r"tile(\d+)x(\d+)c(\d+)x(\d+)", name)
    if match is not None:
        outputs, rows, *cluster = map(int, match.groups())
        tiled = TileConfig((outputs, rows), (cluster[0], cluster[1]))
        if tiled.tile not in TILES or tiled.cluster not in CLUSTERS:
            raise ValueError(f"{name!r} is none of cuBLASLt's tiles")
        return tiled
    match = re.fullmatch(r"packed-m(\d+)n(\d+)w(\d+)s(\d+)(?:x(\d+))?", name)
    if match is not None:
        *sizes, split_k = match.groups()
        block_m, block_n, num_warps, num_stages = map(int, sizes)
        return PackedConfig(block_m, block_n, num_warps, num_stages, int(split_k or 1))
    match = re.fullmatch(r"hopper-m(\d+)n(\d+)(?:x(\d+))?", name)
    if match is not None:
        return HopperScaledConfig(int(match[1]), int(match[2]), int(match[3] or 1))
    match = re.fullmatch(r"hopper-m(\d+)s(\d+)c(\d+)w(\d+)p(\d+)", name)
    if match is not None:
        return HopperFewConfig(Cut(*map(int, match.groups())))
    match = re.fullmatch(r"hopper-m(\d+)p(\d+)(?:x(\d+)|(e))?", name)
    if match is not None:
        return HopperConfig(int(match[1]), int(match[2]), EVENLY if match[4] else int(match[3] or 1))
    match = re.fullmatch(r"m(\d+)n(\d+)k(\d+)w(\d+)s(\d+)(?:x(\d+))?(-norm)?(-any)?", name)
    if match is None:
        raise ValueError(
            f"{name!r} is not like m16n32k128w4s4x2-norm, packed-m8n64w4s4x2, hopper-m64p2x2, hopper-m8s14c2w8p1, "
            "hopper-m256n128, cublas3m64 or tile96x128c2x1"
        )
    *sizes, split_k, own_norm, any_rows = match.groups()
    block_m, block_n, block_k, num_warps, num_stages = map(int, sizes)
    return SkinnyConfig(
        block_m, block_n, block_k, num_warps, num_stages, int(split_k or 1), own_norm is None, any_rows is not None
    )


class StoredMatrix(Protocol):
    """What a product's shape asks of a matrix, wherever that is and however it lies there."""

    @property
    def format(self) -> WeightFormat: ...

    @property
    def shape(self) -> Shape: ...


@dataclass(frozen=True, slots=True)
class GemmShape:
    """What a choice of implementation depends on.

    Attributes:
        n: outputs; the matrix of a gated pair has 2 * n rows.
        k: inputs.
        dtype: of x, and of weights that are not quantized.
    """

    operation: Operation
    num_rows: int
    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    weight_format: WeightFormat = DENSE

    @classmethod
    def of(
        cls, operation: Operation, num_rows: int, matrix: StoredMatrix, dtype: torch.dtype, out_dtype: torch.dtype
    ) -> GemmShape:
        """The shape of a product with `matrix`."""
        rows, k = matrix.shape
        n = rows // 2 if operation in GATED else rows
        return cls(operation, num_rows, n, k, dtype, out_dtype, matrix.format)

    @property
    def matrix_shape(self) -> Shape:
        """Of the matrix."""
        return (2 * self.n if self.is_gated else self.n, self.k)

    @property
    def is_gated(self) -> bool:
        """Whether silu of one half of the outputs multiplies the other."""
        return self.operation in GATED

    @property
    def adds(self) -> bool:
        """Whether the result is added to what is there."""
        return self.operation == "linear_add"

    @property
    def has_norm(self) -> bool:
        """Whether rows are normalized first."""
        return self.operation in ("norm_linear", "norm_linear_silu")

    @property
    def splits_k(self) -> bool:
        """Whether several programs may share the inputs."""
        return self.operation in ("linear_add", "linear")

    @property
    def layout(self) -> PackedLayout | None:
        """Of a packed matrix; None if it is another."""
        return PackedLayout.of(self.weight_format, self.matrix_shape, self.dtype)

    @property
    def is_scaled(self) -> bool:
        """Whether activations are quantized too."""
        return has_scaled_products(self.weight_format)

    @property
    def is_quantized(self) -> bool:
        """Whether the matrix is not dense."""
        return self.is_scaled or self.layout is not None

    @property
    def num_turns(self) -> int:
        """Turns in which a kernel of quantized weights walks the inputs."""
        layout = self.layout
        return -(-self.k // _SCALED_BLOCK_K) if layout is None else layout.num_blocks


Choose = Callable[[GemmShape], LinearConfig]


def shared_bytes(shape: GemmShape, config: LinearConfig) -> int:
    """The bytes of shared memory that a program needs for its loads in flight, as Triton's compiler takes them.

    Kernels without such loads, of one row, take a few KiB besides for their sums.
    """
    num_weights = 2 if shape.is_gated else 1
    if isinstance(config, PackedConfig):
        return _quantized_shared_bytes(shape, config)
    if not isinstance(config, SkinnyConfig):
        return 0
    turn = (config.block_m + num_weights * config.block_n) * config.block_k * shape.dtype.itemsize
    return (config.num_stages - 1) * turn


def _quantized_shared_bytes(shape: GemmShape, config: PackedConfig) -> int:
    # A product of eight rows copies its operands to registers at once; others read them where they are, meanwhile.
    held = config.num_stages if config.block_m >= 16 else config.num_stages - 1
    layout = shape.layout
    if layout is None:
        return held * (config.block_m + config.block_n) * _SCALED_BLOCK_K
    num_weights = 2 if shape.is_gated and fuses_gate(config, shape.n) else 1
    zeros = max(4, 2 * layout.num_groups) if layout.has_zeros else 0
    num_planes = sum(bits > 0 for bits in layout.planes)
    words = num_weights * config.block_n * (num_planes * layout.slice_columns * 2 + zeros)
    words += config.block_n * 4 * layout.num_shared_planes
    x = config.block_m * layout.block_columns * shape.dtype.itemsize
    return held * x + (config.num_stages - 1) * words


def fuses_gate(config: LinearConfig, num_outputs: int) -> bool:
    """Whether one kernel computes gate and up of a packed matrix.

    Both must begin with a tile, and many rows of both would take too many registers.
    """
    has_half = isinstance(config, HopperConfig) or (isinstance(config, HopperFewConfig) and config.cut.strips % 2 == 0)
    fits = has_half or (isinstance(config, PackedConfig) and config.block_m <= _MAX_GATED_ROWS)
    return fits and num_outputs % TILE_ROWS == 0


def fixed_config(shape: GemmShape, max_shared: int) -> SkinnyConfig | PackedConfig:
    """A configuration that adds every row up in the same order, whatever the number of rows and the device.

    Args:
        max_shared: see `limits.max_shared_bytes`; less of it leaves fewer loads in flight, in the same order.
    """
    if shape.is_scaled:
        return PackedConfig(32, 64, num_warps=4, num_stages=5)
    if shape.layout is not None:
        return PackedConfig(32, 64, num_warps=4, num_stages=3 if shape.dtype.itemsize == 2 else 2)
    if shape.dtype == torch.float32:
        return SkinnyConfig(32, 32, 32, num_warps=4, num_stages=3, fuse_norm=False, any_rows=True)
    config = SkinnyConfig(64, 64, 128, num_warps=4, num_stages=4, fuse_norm=False, any_rows=True)
    return config if shared_bytes(shape, config) <= max_shared else replace(config, num_stages=3)
