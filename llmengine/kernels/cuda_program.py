"""CUDA C++ compiled when it is needed: by NVRTC, for one GPU architecture, kept in the user's cache.

`cuda.bindings` comes with torch's builds for CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from llmengine.user_cache import cache_dir, replace_file

_logger = logging.getLogger("llmengine.kernels.cuda_program")

_LEAST_NVRTC = (12, 3)


@functools.cache
def can_compile() -> bool:
    """Whether `cuda.bindings` is installed, with an NVRTC that it finds."""
    try:
        if importlib.util.find_spec("cuda.bindings") is None:
            return False
        _nvrtc_version()
    except Exception as error:
        _logger.info("no CUDA C++ is compiled: %r", error)
        return False
    return True


def compile_cubin(source: str, options: Sequence[str]) -> bytes:
    """Machine code of CUDA C++ that includes nothing; from the cache if it was compiled before.

    Args:
        options: NVRTC's, such as "-arch=sm_90a".

    Raises:
        RuntimeError: the source does not compile; says what NVRTC said.
    """
    key = hashlib.sha256("\0".join([source, *options, str(_nvrtc_version())]).encode()).hexdigest()
    file = cache_dir() / "cubins" / f"{key}.cubin"
    try:
        return file.read_bytes()
    except OSError:
        pass
    cubin = _compile(source, options)
    try:
        replace_file(file, cubin)
    except OSError as error:
        _logger.warning("compiled code could not be kept in %s: %r", file, error)
    return cubin


@dataclass(frozen=True, slots=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        grid: programs in x, y and z.
        threads: of a program.
        shared_bytes: of a program.
        cluster: programs beside each other in x that run together.
        pdl: see `linear.LinearKernels`.
    """

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    cluster: int = 1
    pdl: bool = False


class CudaFunction:
    """A kernel, loaded on the device that is current for torch; on any thread.

    Args:
        cubin: machine code.
        name: of the kernel, declared `extern "C"`.
        shared_bytes: the most that a program of it uses.
    """

    def __init__(self, cubin: bytes, name: str, shared_bytes: int) -> None:
        from cuda.bindings import driver

        # A thread has no context until it runs something.
        _checked(driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(torch.cuda.current_device()))))
        self._module = _checked(driver.cuModuleLoadData(cubin))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))

    def launch(self, launch: Launch, arguments: Sequence[int]) -> None:
        """Queue the kernel on torch's current stream.

        Args:
            arguments: addresses of the kernel's parameters on the host, which are copied.
        """
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        attributes = _launch_attributes(launch.cluster, launch.pdl)
        config.attrs, config.numAttrs = attributes, len(attributes)
        pointers = (ctypes.c_void_p * len(arguments))(*arguments)
        _checked(driver.cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))


def box_map(tensor: Tensor, box_rows: int, box_columns: int) -> Any:
    """A `CUtensorMap` of a contiguous tensor [rows, columns], for copies of boxes to shared memory.

    Numbers have 8 or 16 bits, a row whole 16 bytes. A row of a box is 32, 64 or 128 bytes, and swizzled over as many.
    What lies beyond the tensor is copied as zeros. `getPtr()` is the map's address; it holds the tensor's address, and
    does not keep the tensor.
    """
    from cuda.bindings import driver

    rows, columns = tensor.shape
    size = tensor.dtype.itemsize
    assert tensor.is_contiguous()
    types = driver.CUtensorMapDataType
    dtype = {1: types.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: types.CU_TENSOR_MAP_DATA_TYPE_UINT16}[size]
    swizzle = getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{size * box_columns}B")
    u64, u32 = driver.cuuint64_t, driver.cuuint32_t
    return _checked(
        driver.cuTensorMapEncodeTiled(
            dtype,
            2,
            tensor.data_ptr(),
            [u64(columns), u64(rows)],
            [u64(size * columns)],
            [u32(box_columns), u32(box_rows)],
            [u32(1), u32(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def max_program_bytes() -> int:
    """The shared memory that a program can have on the device that is current for torch."""
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.shared_memory_per_block_optin)


def program_text(*names: str) -> str:
    """The files of these names in this package, one after the other."""
    return "\n".join((files(__package__) / name).read_text() for name in names)


def defines(macros: Mapping[str, int | str]) -> str:
    """The preprocessor's lines for macros."""
    return "".join(f"#define {name} {value}\n" for name, value in macros.items())


@functools.cache
def _launch_attributes(cluster: int, pdl: bool) -> list[Any]:
    from cuda.bindings import driver

    kinds = driver.CUlaunchAttributeID
    attributes = []
    if cluster > 1:
        one = driver.CUlaunchAttribute()
        one.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        one.value.clusterDim.x, one.value.clusterDim.y, one.value.clusterDim.z = cluster, 1, 1
        attributes.append(one)
    if pdl:
        one = driver.CUlaunchAttribute()
        one.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        one.value.programmaticStreamSerializationAllowed = 1
        attributes.append(one)
    return attributes


@functools.cache
def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    _checked((status,))
    return int(major), int(minor)


def _compile(source: str, options: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"program.cu", 0, [], []))
    try:
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if int(status) != 0:
            log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC: {status}: {log.decode(errors='replace')}")
        cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of `cuda.bindings` returned; raises RuntimeError if it failed."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"{type(status).__name__}: {getattr(status, 'name', status)}")
    return values[0] if values else None
