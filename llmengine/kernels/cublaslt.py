"""Matrix products by a named algorithm of cuBLASLt: its ranking is good, but its first is not always the fastest.

torch takes the first algorithm that the library proposes (or asks cuBLAS, which proposes another one). Here each
proposal can be tried, and also tiles that the library does not propose. The library is the one that torch has loaded.
Calls keep the interpreter lock, since each takes only a few microseconds.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_WORKSPACE_BYTES = 32 << 20
_MAX_ALGORITHMS = 8

# cublasLt.h, library_types.h
_COMPUTE_32F, _OP_T = 68, 1
_REAL_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28}
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER, _DESC_BIAS_TYPE = 3, 7, 8, 26
_DESC_WEIGHT_SCALE, _DESC_X_SCALE, _DESC_WEIGHT_SCALE_MODE, _DESC_X_SCALE_MODE = 17, 18, 31, 32
_ONE_SCALE, _SCALE_OF_EACH_ROW = 0, 3
_EPILOGUE_DEFAULT, _EPILOGUE_BIAS = 1, 4
_NOT_SUPPORTED = 15
_PREFERENCE_MAX_WORKSPACE = 1
_CONFIG_TILE, _CONFIG_SPLIT_K, _CONFIG_REDUCTION, _CONFIG_SWIZZLE, _CONFIG_CUSTOM, _CONFIG_CLUSTER = 1, 2, 3, 4, 5, 8

TILES = {
    (16, 64): 47, (32, 64): 12, (48, 64): 92, (64, 64): 15, (80, 64): 134, (96, 64): 27, (112, 64): 164,
    (128, 64): 18, (144, 64): 183, (160, 64): 193, (176, 64): 200, (192, 64): 208, (208, 64): 214, (224, 64): 220,
    (240, 64): 226, (256, 64): 21, (32, 128): 14, (48, 128): 93, (64, 128): 17, (80, 128): 135, (96, 128): 28,
    (112, 128): 165, (128, 128): 20, (144, 128): 184, (160, 128): 30, (176, 128): 201, (192, 128): 31,
    (208, 128): 215, (224, 128): 221, (240, 128): 227, (256, 128): 24,
}  # fmt: skip
"""cublasLtMatmulTile_t by (outputs, rows) of a program: those with 64 and 128 rows that Hopper's kernels have."""

CLUSTERS = {(1, 1): 2, (2, 1): 3, (4, 1): 4, (1, 2): 5}
"""cublasLtClusterShape_t by (outputs, rows): programs beside each other that read what they share once."""


class _Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_size", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class CublasConfig:
    """A proposal of cuBLASLt; without the library (on a CPU), torch's product.

    Attributes:
        index: place in the library's ranking for `num_rows` rows.
        num_rows: 0 stands for the product's own number of rows.
    """

    index: int = 0
    num_rows: int = 0

    def __str__(self) -> str:
        """A short name: cublas3m64."""
        return f"cublas{self.index}m{self.num_rows}"


@dataclass(frozen=True, slots=True)
class TileConfig:
    """A kernel of cuBLASLt with a given tile, proposed or not; if it cannot run, the library's first proposal.

    Attributes:
        tile: outputs and rows of a program, one of `TILES`.
        cluster: one of `CLUSTERS`.
    """

    tile: tuple[int, int]
    cluster: tuple[int, int]

    def __str__(self) -> str:
        """A short name: tile96x128c2x1."""
        return f"tile{self.tile[0]}x{self.tile[1]}c{self.cluster[0]}x{self.cluster[1]}"


@dataclass(frozen=True, slots=True)
class Product:
    """out [m, n] = x [m, k] @ weight [n, k].T (+ out) (+ bias [n]), all row-major; accumulated in fp32.

    Attributes:
        dtype: of x and the weights. Those in e4m3 have float32 scales besides, [m] and [n], or one each.
        accumulate: add to what `out` holds.
        bias: its dtype, None: there is no bias. The library adds no float32 bias to a product of e4m3 numbers, whatever
            the result's dtype.
        out_stride: elements from one row of `out` to the next; 0 stands for n.
        one_scale: each operand in e4m3 has a single scale.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    accumulate: bool
    bias: torch.dtype | None
    out_stride: int = 0
    one_scale: bool = False

    @property
    def has_scales(self) -> bool:
        """Whether the operands have scales."""
        return self.dtype == torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class _Plan:
    """The library's descriptors of a product and its proposals, best first."""

    desc: ctypes.c_void_p
    weight: ctypes.c_void_p
    x: ctypes.c_void_p
    out: ctypes.c_void_p
    beta: ctypes.c_float
    algorithms: tuple[_Algorithm, ...]
    chosen: dict[CublasConfig | TileConfig, _Algorithm]


class CublasLt:
    """The library on one device, for one stream at a time (products share a workspace).

    Raises `OSError` if the library is not there.
    """

    def __init__(self, device: torch.device | str) -> None:
        major = (torch.version.cuda or "").split(".")[0]
        self._library = ctypes.PyDLL(f"libcublasLt.so.{major}")
        self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._handle = ctypes.c_void_p()
        self._one = ctypes.c_float(1.0)
        self._plans: dict[Product, _Plan] = {}
        self._check(self._library.cublasLtCreate(ctypes.byref(self._handle)), "cublasLtCreate")
        weakref.finalize(self, self._library.cublasLtDestroy, self._handle)

    def num_algorithms(self, product: Product) -> int:
        """Number of algorithms that the library proposes, at most 8; 0: it cannot compute such a product."""
        return len(self._plan(product).algorithms)

    def run(
        self,
        product: Product,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        config: CublasConfig | TileConfig = CublasConfig(),
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Queue the product in torch's current stream.

        Args:
            config: the algorithm; if it cannot compute the product, the library's first proposal does.
            scales: of x and of the weights, where they have any.

        Raises:
            RuntimeError: the library cannot compute such a product.
        """
        plan = self._plan(product)
        if not plan.algorithms:
            raise RuntimeError(f"cuBLASLt has no algorithm for {product}")
        if config not in plan.chosen:
            wanted = self._tiled(plan, config) if isinstance(config, TileConfig) else self._proposed(product, config)
            running = (algorithm for algorithm in wanted if self._runs(plan, algorithm))
            plan.chosen[config] = next(running, plan.algorithms[0])
        if bias is not None:
            self._set(plan.desc, _DESC_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        if scales is not None:
            self._set(plan.desc, _DESC_X_SCALE, ctypes.c_void_p(scales[0].data_ptr()))
            self._set(plan.desc, _DESC_WEIGHT_SCALE, ctypes.c_void_p(scales[1].data_ptr()))
        algorithm = plan.chosen[config]
        status = self._library.cublasLtMatmul(
            self._handle,
            plan.desc,
            ctypes.byref(self._one),
            ctypes.c_void_p(weight.data_ptr()),
            plan.weight,
            ctypes.c_void_p(x.data_ptr()),
            plan.x,
            ctypes.byref(plan.beta),
            ctypes.c_void_p(out.data_ptr()),
            plan.out,
            ctypes.c_void_p(out.data_ptr()),
            plan.out,
            ctypes.byref(algorithm.algo),
            ctypes.c_void_p(self._workspace.data_ptr()),
            ctypes.c_size_t(_WORKSPACE_BYTES),
            ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        )
        self._check(status, f"cublasLtMatmul of {product}")

    def _plan(self, product: Product) -> _Plan:
        plan = self._plans.get(product)
        if plan is None:
            plan = self._plans[product] = self._new_plan(product)
        return plan

    def _proposed(self, product: Product, config: CublasConfig) -> list[_Algorithm]:
        """The named proposal, in a list; empty if the library has fewer."""
        num_rows = config.num_rows or product.m
        algorithms = self._plan(replace(product, m=num_rows)).algorithms
        return list(algorithms[config.index : config.index + 1])

    def _tiled(self, plan: _Plan, config: TileConfig) -> list[_Algorithm]:
        """The plan's proposals with this tile, as far as they can have one."""
        settings: tuple[tuple[int, ctypes.c_uint32 | ctypes.c_uint16], ...] = (
            (_CONFIG_TILE, ctypes.c_uint32(TILES[config.tile])),
            (_CONFIG_CLUSTER, ctypes.c_uint16(CLUSTERS[config.cluster])),
            (_CONFIG_SPLIT_K, ctypes.c_uint32(1)),
            *((name, ctypes.c_uint32(0)) for name in (_CONFIG_REDUCTION, _CONFIG_SWIZZLE, _CONFIG_CUSTOM)),
        )
        tiled = [_Algorithm.from_buffer_copy(proposed) for proposed in plan.algorithms]
        return [
            algorithm for algorithm in tiled if all(self._configure(algorithm, name, value) for name, value in settings)
        ]

    def _configure(self, algorithm: _Algorithm, name: int, value: ctypes.c_uint32 | ctypes.c_uint16) -> bool:
        """Set an attribute of the algorithm; return False if it has no such attribute or value."""
        status = self._library.cublasLtMatmulAlgoConfigSetAttribute(
            ctypes.byref(algorithm.algo),
            ctypes.c_int(name),
            ctypes.byref(value),
            ctypes.c_size_t(ctypes.sizeof(value)),
        )
        return not status

    def _runs(self, plan: _Plan, algorithm: _Algorithm) -> bool:
        checked = _Algorithm()
        status = self._library.cublasLtMatmulAlgoCheck(
            self._handle,
            plan.desc,
            plan.weight,
            plan.x,
            plan.out,
            plan.out,
            ctypes.byref(algorithm.algo),
            ctypes.byref(checked),
        )
        return not status and int(checked.workspace_size) <= _WORKSPACE_BYTES

    def _new_plan(self, product: Product) -> _Plan:
        # The library is column-major: to it, out is [n, m], and weight [k, n] is transposed.
        desc = ctypes.c_void_p()
        status = self._library.cublasLtMatmulDescCreate(
            ctypes.byref(desc), ctypes.c_int(_COMPUTE_32F), ctypes.c_int(_REAL_TYPES[torch.float32])
        )
        self._check(status, "cublasLtMatmulDescCreate")
        self._set(desc, _DESC_TRANSA, ctypes.c_int(_OP_T))
        has_bias = product.bias is not None
        self._set(desc, _DESC_EPILOGUE, ctypes.c_int(_EPILOGUE_BIAS if has_bias else _EPILOGUE_DEFAULT))
        if product.bias is not None:
            self._set(desc, _DESC_BIAS_TYPE, ctypes.c_int(_REAL_TYPES[product.bias]))
        adds_bias = not product.has_scales or product.bias != torch.float32
        if not adds_bias or (product.has_scales and not self._set_scale_modes(desc, product)):
            layouts = (ctypes.c_void_p(),) * 3
            return _Plan(desc, *layouts, ctypes.c_float(), (), {})
        weight = self._layout(product.dtype, product.k, product.n)
        x = self._layout(product.dtype, product.k, product.m)
        out = self._layout(product.out_dtype, product.n, product.m, product.out_stride)
        algorithms = self._propose(product, desc, weight, x, out)
        return _Plan(desc, weight, x, out, ctypes.c_float(float(product.accumulate)), algorithms, {})

    def _propose(
        self,
        product: Product,
        desc: ctypes.c_void_p,
        weight: ctypes.c_void_p,
        x: ctypes.c_void_p,
        out: ctypes.c_void_p,
    ) -> tuple[_Algorithm, ...]:
        preference, num_found = ctypes.c_void_p(), ctypes.c_int()
        status = self._library.cublasLtMatmulPreferenceCreate(ctypes.byref(preference))
        self._check(status, "cublasLtMatmulPreferenceCreate")
        limit = ctypes.c_size_t(_WORKSPACE_BYTES)
        status = self._library.cublasLtMatmulPreferenceSetAttribute(
            preference,
            ctypes.c_int(_PREFERENCE_MAX_WORKSPACE),
            ctypes.byref(limit),
            ctypes.c_size_t(ctypes.sizeof(limit)),
        )
        self._check(status, "cublasLtMatmulPreferenceSetAttribute")
        found = (_Algorithm * _MAX_ALGORITHMS)()
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle,
            desc,
            weight,
            x,
            out,
            out,
            preference,
            ctypes.c_int(_MAX_ALGORITHMS),
            found,
            ctypes.byref(num_found),
        )
        self._library.cublasLtMatmulPreferenceDestroy(preference)
        if status == _NOT_SUPPORTED:
            return ()
        self._check(status, f"cublasLtMatmulAlgoGetHeuristic for {product}")
        return tuple(found[index] for index in range(num_found.value) if found[index].state == 0)

    def _set_scale_modes(self, desc: ctypes.c_void_p, product: Product) -> bool:
        """Say how the operands' scales lie; False if the library knows no such scales (before CUDA 12.9)."""
        for pointer in (_DESC_X_SCALE, _DESC_WEIGHT_SCALE):  # for proposals; `run` sets the right ones
            self._set(desc, pointer, ctypes.c_void_p(self._workspace.data_ptr()))
        mode = ctypes.c_int(_ONE_SCALE if product.one_scale else _SCALE_OF_EACH_ROW)
        return product.one_scale or all(
            self._try_set(desc, name, mode) == 0 for name in (_DESC_X_SCALE_MODE, _DESC_WEIGHT_SCALE_MODE)
        )

    def _layout(self, dtype: torch.dtype, rows: int, columns: int, stride: int = 0) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        status = self._library.cublasLtMatrixLayoutCreate(
            ctypes.byref(layout),
            ctypes.c_int(_REAL_TYPES[dtype]),
            ctypes.c_uint64(rows),
            ctypes.c_uint64(columns),
            ctypes.c_int64(stride or rows),
        )
        self._check(status, "cublasLtMatrixLayoutCreate")
        return layout

    def _set(self, desc: ctypes.c_void_p, attribute: int, value: ctypes.c_int | ctypes.c_void_p) -> None:
        self._check(self._try_set(desc, attribute, value), "cublasLtMatmulDescSetAttribute")

    def _try_set(self, desc: ctypes.c_void_p, attribute: int, value: ctypes.c_int | ctypes.c_void_p) -> int:
        status: int = self._library.cublasLtMatmulDescSetAttribute(
            desc, ctypes.c_int(attribute), ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
        )
        return status

    @staticmethod
    def _check(status: int, call: str) -> None:
        if status:
            raise RuntimeError(f"{call}: cuBLAS status {status}")
