"""The compiled library of the native decoder: found, loaded, and its structures, which mirror those of `native.cpp`."""

from __future__ import annotations

import ctypes
import logging
import sysconfig
import weakref
from pathlib import Path

import torch

from llmengine.backends.cpu.huge_pages import HugePages
from llmengine.backends.cpu.openmp import torch_function

NATIVE_DIRECTORY = Path(__file__).parent
"""Where the installation puts the library."""

_logger = logging.getLogger("llmengine.backends.cpu.native_library")

_VERSION = 9
_VARIANTS = {"AVX512": "avx512", "AVX2": "avx2"}
"""What torch calls the processor's vector units -> variant of the library; any other processor: generic."""

MAX_PARTS = 3
"""Matrices above each other that one product may have."""

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


class NativeUnavailableError(Exception):
    """The native decoder cannot be used here; the message says why, for the backend's description."""


class InputsStruct(ctypes.Structure):
    _fields_ = (
        ("kind", _Int),
        ("factors", _Pointer),
        ("order", _Pointer),
        ("scale", _Pointer),
        ("scale_columns", _Int),
    )


class MatrixStruct(ctypes.Structure):
    _fields_ = (
        ("format", _Int),
        ("weight", _Pointer),
        ("scale", _Pointer),
        ("bias", _Pointer),
        ("rows", _Int),
        ("columns", _Int),
        ("group_shift", _Int),
        ("first_row", _Int),
        ("out_rows", _Int),
        ("inputs", InputsStruct),
    )


class LinearStruct(ctypes.Structure):
    _fields_ = (("num_parts", _Int), ("parts", MatrixStruct * MAX_PARTS))


class LayerStruct(ctypes.Structure):
    _fields_ = (
        ("input_norm", _Pointer),
        ("post_attention_norm", _Pointer),
        ("qkv", LinearStruct),
        ("o", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("keys", _Pointer),
        ("values", _Pointer),
        ("key_scales", _Pointer),
        ("value_scales", _Pointer),
    )


class ModelStruct(ctypes.Structure):
    _fields_ = (
        ("pool", _Pointer),
        ("sgemm", _Pointer),
        ("set_thread_limit", _Pointer),
        ("num_layers", _Int),
        ("num_heads", _Int),
        ("num_kv_heads", _Int),
        ("head_dim", _Int),
        ("block_size", _Int),
        ("max_context", _Int),
        ("layers", _Pointer),
        ("embedding", MatrixStruct),
        ("lm_head", LinearStruct),
        ("final_norm", _Pointer),
        ("norm_eps", ctypes.c_float),
        ("rope", _Pointer),
    )


class StepStruct(ctypes.Structure):
    _fields_ = (
        ("num_tokens", _Int),
        ("num_logits", _Int),
        ("table_stride", _Int),
        ("token_ids", _Pointer),
        ("positions", _Pointer),
        ("token_slots", _Pointer),
        ("logit_tokens", _Pointer),
        ("block_tables", _Pointer),
        ("workspace", _Pointer),
        ("logits", _Pointer),
        ("likeliest", _Pointer),
    )


class ProductStruct(ctypes.Structure):
    _fields_ = (
        ("linear", LinearStruct),
        ("num_tokens", _Int),
        ("accumulate", _Int),
        ("x", _Pointer),
        ("out", _Pointer),
        ("workspace", _Pointer),
    )


class NativeLibrary:
    """The loaded library and the threads that it runs on, the caller among them; for one caller at a time.

    Attributes:
        weight_memory: for matrices that it multiplies.

    Args:
        variant: of the library.
        library: it.
        num_threads: how many.
        borrowed: whether they are torch's OpenMP threads, if it has these: for products between torch's operators.
            Otherwise they are the library's own, which end with `close()`.
    """

    def __init__(self, variant: str, library: ctypes.CDLL, num_threads: int, borrowed: bool) -> None:
        self.variant = variant
        self.library = library
        self.weight_memory = HugePages()
        library.llmengine_start_pool.restype = _Pointer
        library.llmengine_start_pool.argtypes = (_Int, _Pointer)
        library.llmengine_pool_size.restype = library.llmengine_workspace_size.restype = _Int
        library.llmengine_workspace_size.argtypes = (_Pointer, _Int)
        library.llmengine_forward.argtypes = (_Pointer, _Pointer)
        library.llmengine_multiply.argtypes = (_Pointer, _Pointer)
        library.llmengine_dequantize_rows.argtypes = (_Pointer, _Int, _Pointer, _Pointer)
        library.llmengine_product_workspace_size.restype = _Int
        library.llmengine_product_workspace_size.argtypes = (_Pointer, _Pointer, _Int)
        library.llmengine_forward.restype = library.llmengine_multiply.restype = None
        library.llmengine_dequantize_rows.restype = None
        library.llmengine_stop_pool.restype = None
        library.llmengine_pool_size.argtypes = library.llmengine_stop_pool.argtypes = (_Pointer,)
        parallel = torch_function("GOMP_parallel") if borrowed else None
        self.pool = library.llmengine_start_pool(num_threads, parallel)
        self.close = weakref.finalize(self, library.llmengine_stop_pool, self.pool)
        # At the interpreter's exit the engine that runs on the threads closes its backend, not this.
        self.close.atexit = False
        started = int(library.llmengine_pool_size(self.pool))
        if started < num_threads:
            _logger.warning("the system started only %d of %d threads", started, num_threads)


def load_native_library(directory: Path, *, borrowed_threads: bool = False) -> NativeLibrary:
    """Load the variant for this processor from `directory`, with as many threads as torch uses.

    `borrowed_threads`: see `NativeLibrary`. Raises `NativeUnavailableError`.
    """
    variant, library = find_native_library(directory)
    return NativeLibrary(variant, library, torch.get_num_threads(), borrowed_threads)


def find_native_library(directory: Path = NATIVE_DIRECTORY) -> tuple[str, ctypes.CDLL]:
    """The variant for this processor, and the library; starts no threads. Raises `NativeUnavailableError`."""
    variant = _VARIANTS.get(torch.backends.cpu.get_cpu_capability(), "generic")
    if variant == "avx512" and torch.cpu._is_vnni_supported():
        variant = "avx512vnni"
    path = directory / f"_native_{variant}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        raise NativeUnavailableError("it was not built when this package was installed")
    try:
        library = ctypes.CDLL(str(path))
        version = library.llmengine_native_version()
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"{path.name} cannot be loaded: {error}") from error
    if version != _VERSION:
        raise NativeUnavailableError(f"{path.name} is from another version: reinstall this package")
    return variant, library
