"""cuBLASLt's matrix products with the algorithm named: its ranking is good, but the first is not always the fastest.

torch takes the first algorithm that the library proposes (or asks cuBLAS, which proposes another). Here the proposals
can be tried one by one. The library is the one that torch has loaded; calls keep the interpreter lock, since each is a
few microseconds long.
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
_REAL_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER, _DESC_BIAS_TYPE = 3, 7, 8, 26
_EPILOGUE_DEFAULT, _EPILOGUE_BIAS = 1, 4
_PREFERENCE_MAX_WORKSPACE = 1


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
class Product:
    """out [m, n] = x [m, k] @ weight [n, k].T (+ out) (+ bias [n]), all row-major; accumulated in fp32.

    Attributes:
        accumulate: add to what `out` holds.
        bias: there is one, in x's dtype.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    accumulate: bool
    bias: bool


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the library needs for a product: its descriptors and its proposals, best first."""

    desc: ctypes.c_void_p
    weight: ctypes.c_void_p
    x: ctypes.c_void_p
    out: ctypes.c_void_p
    beta: ctypes.c_float
    algorithms: tuple[_Algorithm, ...]
    chosen: dict[tuple[int, int], _Algorithm]


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
        """Return how many algorithms the library proposes, at most 8."""
        return len(self._plan(product).algorithms)

    def run(
        self,
        product: Product,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        index: int = 0,
        num_rows: int = 0,
    ) -> None:
        """Queue the product in torch's current stream.

        Args:
            index: which of the library's proposals for a product of `num_rows` rows (0: of product.m) computes it. The
                library's first for product.m does where there are fewer, or where that one cannot.
        """
        plan = self._plan(product)
        key = (index, num_rows or product.m)
        if key not in plan.chosen:
            plan.chosen[key] = self._choose(product, plan, *key)
        if bias is not None:
            self._set(plan.desc, _DESC_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        algorithm = plan.chosen[key]
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

    def _choose(self, product: Product, plan: _Plan, index: int, num_rows: int) -> _Algorithm:
        proposed = self._plan(replace(product, m=num_rows)).algorithms
        if index >= len(proposed):
            return plan.algorithms[0]
        if num_rows == product.m:
            return proposed[index]
        checked = _Algorithm()
        status = self._library.cublasLtMatmulAlgoCheck(
            self._handle,
            plan.desc,
            plan.weight,
            plan.x,
            plan.out,
            plan.out,
            ctypes.byref(proposed[index].algo),
            ctypes.byref(checked),
        )
        fits = status == 0 and checked.workspace_size <= _WORKSPACE_BYTES
        return proposed[index] if fits else plan.algorithms[0]

    def _new_plan(self, product: Product) -> _Plan:
        # The library thinks in columns: there out is [n, m], and weight [k, n] is transposed.
        desc = ctypes.c_void_p()
        status = self._library.cublasLtMatmulDescCreate(
            ctypes.byref(desc), ctypes.c_int(_COMPUTE_32F), ctypes.c_int(_REAL_TYPES[torch.float32])
        )
        self._check(status, "cublasLtMatmulDescCreate")
        self._set(desc, _DESC_TRANSA, ctypes.c_int(_OP_T))
        self._set(desc, _DESC_EPILOGUE, ctypes.c_int(_EPILOGUE_BIAS if product.bias else _EPILOGUE_DEFAULT))
        if product.bias:
            self._set(desc, _DESC_BIAS_TYPE, ctypes.c_int(_REAL_TYPES[product.dtype]))
        weight = self._layout(product.dtype, product.k, product.n)
        x = self._layout(product.dtype, product.k, product.m)
        out = self._layout(product.out_dtype, product.n, product.m)
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
        self._check(status, f"cublasLtMatmulAlgoGetHeuristic for {product}")
        algorithms = tuple(found[index] for index in range(num_found.value) if found[index].state == 0)
        if not algorithms:
            raise RuntimeError(f"cuBLASLt has no algorithm for {product}")
        return algorithms

    def _layout(self, dtype: torch.dtype, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        status = self._library.cublasLtMatrixLayoutCreate(
            ctypes.byref(layout),
            ctypes.c_int(_REAL_TYPES[dtype]),
            ctypes.c_uint64(rows),
            ctypes.c_uint64(columns),
            ctypes.c_int64(rows),
        )
        self._check(status, "cublasLtMatrixLayoutCreate")
        return layout

    def _set(self, desc: ctypes.c_void_p, attribute: int, value: ctypes.c_int | ctypes.c_void_p) -> None:
        status = self._library.cublasLtMatmulDescSetAttribute(
            desc, ctypes.c_int(attribute), ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value))
        )
        self._check(status, "cublasLtMatmulDescSetAttribute")

    @staticmethod
    def _check(status: int, call: str) -> None:
        if status:
            raise RuntimeError(f"{call}: cuBLAS status {status}")
