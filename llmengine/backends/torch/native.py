"""The native decoder: a step of few tokens as one call into a compiled library, if the installation has it.

Of larger steps the library computes the products with int8 weights, and torch the rest.

The library computes on the same weights and KV blocks as the torch path, on the threads of torch's own OpenMP pool.
`native.cpp` is its source; the structures here mirror those there.
"""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.inputs import StepInputs
from llmengine.backends.torch.attention import PagedAttention
from llmengine.models.arch import ModelArch

MAX_NATIVE_TOKENS = 128
"""Steps of more tokens go through torch's operators, whose matrix products are then as fast."""

NATIVE_DIRECTORY = Path(__file__).parent
"""Where the installation puts the library."""

_VERSION = 3
_VARIANTS = {"AVX512": "avx512", "AVX2": "avx2"}
"""What torch calls the processor's vector units -> variant of the library; any other processor: generic."""

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_PANEL_ROWS = 16
"""Rows of an int8 matrix that lie together."""

_POOL_FUNCTIONS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

_MAX_SHARED_HEADS = 3
"""Rows of scores that each thread needs."""

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


class NativeUnavailableError(Exception):
    """The native decoder cannot be used here; the message says why, for the backend's description."""


class _Matrix(ctypes.Structure):
    _fields_ = (
        ("format", _Int),
        ("weight", _Pointer),
        ("scale", _Pointer),
        ("bias", _Pointer),
        ("rows", _Int),
        ("columns", _Int),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", _Pointer),
        ("post_attention_norm", _Pointer),
        ("qkv", _Matrix),
        ("o", _Matrix),
        ("gate_up", _Matrix),
        ("down", _Matrix),
        ("keys", _Pointer),
        ("values", _Pointer),
    )


class _Pool(ctypes.Structure):
    _fields_ = (
        ("num_threads", _Int),
        ("parallel", _Pointer),
        ("barrier", _Pointer),
        ("thread_index", _Pointer),
        ("team_size", _Pointer),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("pool", _Pool),
        ("num_layers", _Int),
        ("num_heads", _Int),
        ("num_kv_heads", _Int),
        ("head_dim", _Int),
        ("block_size", _Int),
        ("max_context", _Int),
        ("layers", _Pointer),
        ("embedding", _Matrix),
        ("lm_head", _Matrix),
        ("final_norm", _Pointer),
        ("norm_eps", ctypes.c_float),
        ("rope", _Pointer),
    )


class _Step(ctypes.Structure):
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
    )


class _Product(ctypes.Structure):
    _fields_ = (
        ("matrix", _Matrix),
        ("num_tokens", _Int),
        ("accumulate", _Int),
        ("x", _Pointer),
        ("out", _Pointer),
        ("workspace", _Pointer),
    )


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The loaded library and the entry points of torch's OpenMP pool."""

    variant: str
    library: ctypes.CDLL
    pool_functions: tuple[int, ...]

    def pool(self) -> _Pool:
        """Return the pool with as many threads as torch uses."""
        return _Pool(torch.get_num_threads(), *self.pool_functions)


def load_native_library(directory: Path) -> NativeLibrary:
    """Load the variant for this processor from `directory`. Raises `NativeUnavailableError`."""
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
    return NativeLibrary(variant, library, _openmp_pool())


def _openmp_pool() -> tuple[int, ...]:
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        pointers = (ctypes.cast(getattr(torch_library, name), _Pointer).value for name in _POOL_FUNCTIONS)
        return tuple(pointer for pointer in pointers if pointer is not None)
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError("this build of torch does not use GNU OpenMP") from error


class Part(Protocol):
    """A norm, an embedding or a matrix that can give its canonical tensors."""

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("weight", ...), and ("bias", ...) where there is one."""


class NativeInt8Linear:
    """`linear.CpuLinear` of int8 weights with one scale for each output row; activations are rounded to 16 bits.

    A token's result does not depend on the tokens beside it.

    Args:
        weight: int8 [out_features, in_features].
        scale: fp32 [out_features].
        bias: fp32 [out_features] or None.
    """

    def __init__(self, library: NativeLibrary, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self._library = library
        self._function = library.library.llmengine_multiply_int8
        self._function.restype = None
        rows, columns = weight.shape
        missing = -rows % _PANEL_ROWS
        self._packed = F.pad(weight, (0, columns % 2, 0, missing)).view(-1, _PANEL_ROWS, (columns + 1) // 2, 2)
        self._packed = self._packed.transpose(1, 2).contiguous()
        self._scale = F.pad(scale.float(), (0, missing))
        self._bias = None if bias is None else F.pad(bias.float(), (0, missing))
        self.matrix = _Matrix(
            format=_FORMATS[torch.int8],
            weight=self._packed.data_ptr(),
            scale=self._scale.data_ptr(),
            bias=None if self._bias is None else self._bias.data_ptr(),
            rows=rows,
            columns=columns,
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return fp32 x @ weight.T + bias + residual; `residual` is overwritten by it."""
        x = x.contiguous()
        num_tokens = len(x)
        out = x.new_empty(num_tokens, self.matrix.rows) if residual is None else residual.contiguous()
        workspace = torch.empty(num_tokens * _quantized_size(self.matrix.columns))
        product = _Product(
            matrix=self.matrix,
            num_tokens=num_tokens,
            accumulate=residual is not None,
            x=x.data_ptr(),
            out=out.data_ptr(),
            workspace=workspace.data_ptr(),
        )
        self._function(ctypes.byref(self._library.pool()), ctypes.byref(product))
        return out

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        return self._packed.nbytes + self._scale.nbytes

    def canonical(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ("weight", a row-major copy), ("weight_scale", ...), and ("bias", ...) if there is one."""
        rows, columns = self.matrix.rows, self.matrix.columns
        weight = self._packed.transpose(1, 2).reshape(self._packed.shape[0] * _PANEL_ROWS, -1)
        yield "weight", weight[:rows, :columns].contiguous()
        yield "weight_scale", self._scale[:rows]
        if self._bias is not None:
            yield "bias", self._bias[:rows]


def _quantized_size(columns: int) -> int:
    """Return the floats that a token's 16-bit activations and their scale take."""
    return 1 + (columns + 1) // 2


class NativeDecoder:
    """`models.decoder.forward` with its embedding and attention, for steps of at most `max_tokens` tokens.

    Args:
        parts: by canonical name (less ".weight"); matrices are `NativeInt8Linear` or row-major float32, bfloat16 or
            float16. They are used where they are, as are the attention's KV pools.
        lm_head: the output matrix, which may be none of `parts`.
        max_context: tokens, of any request.
    """

    def __init__(
        self,
        library: NativeLibrary,
        arch: ModelArch,
        parts: Mapping[str, Part],
        lm_head: Part,
        attention: PagedAttention,
        max_context: int,
        max_tokens: int = MAX_NATIVE_TOKENS,
    ) -> None:
        self.max_tokens = max_tokens
        self._kept: list[object] = [attention]
        self._vocab_size = arch.vocab_size
        self._forward = library.library.llmengine_forward
        self._forward.restype = None
        layers = (_Layer * arch.num_layers)(
            *(self._layer(f"layers.{index}.", parts, attention, index) for index in range(arch.num_layers))
        )
        block_size = attention.shape.block_size
        self._model = _Model(
            pool=library.pool(),
            num_layers=arch.num_layers,
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            block_size=block_size,
            max_context=-(-max_context // block_size) * block_size,
            layers=ctypes.addressof(layers),
            embedding=self._matrix(parts["embed_tokens"]),
            lm_head=self._matrix(lm_head),
            final_norm=self._norm(parts["final_norm"]),
            norm_eps=arch.rms_norm_eps,
            rope=self._vector(attention.rope_table),
        )
        query_size, inner = arch.num_heads * arch.head_dim, arch.intermediate_size
        qkv_size = query_size + 2 * arch.num_kv_heads * arch.head_dim
        quantized_size = _quantized_size(max(arch.hidden_size, query_size, inner))
        per_token = 2 * arch.hidden_size + qkv_size + query_size + 3 * inner + quantized_size
        scores_size = self._model.pool.num_threads * _MAX_SHARED_HEADS * self._model.max_context
        self._workspace = torch.empty(max_tokens * per_token + scores_size)
        self._kept += [layers, library]

    def forward(self, inputs: StepInputs, block_tables: NDArray[np.int32]) -> Tensor | None:
        """Return fp32 logits [num_samples, vocab], None without samples; write the KV of all tokens."""
        num_tokens, num_logits = len(inputs.token_ids), len(inputs.sample_tokens)
        assert num_tokens <= self.max_tokens
        logits = torch.empty(num_logits, self._vocab_size)
        step = _Step(
            num_tokens=num_tokens,
            num_logits=num_logits,
            table_stride=block_tables.shape[1],
            token_ids=inputs.token_ids.ctypes.data,
            positions=inputs.positions.ctypes.data,
            token_slots=inputs.token_slots.ctypes.data,
            logit_tokens=inputs.sample_tokens.ctypes.data,
            block_tables=block_tables.ctypes.data,
            workspace=self._workspace.data_ptr(),
            logits=logits.data_ptr(),
        )
        self._forward(ctypes.byref(self._model), ctypes.byref(step))
        return logits if num_logits else None

    def _layer(self, prefix: str, parts: Mapping[str, Part], attention: PagedAttention, index: int) -> _Layer:
        return _Layer(
            input_norm=self._norm(parts[prefix + "input_norm"]),
            post_attention_norm=self._norm(parts[prefix + "post_attention_norm"]),
            qkv=self._matrix(parts[prefix + "qkv"]),
            o=self._matrix(parts[prefix + "o"]),
            gate_up=self._matrix(parts[prefix + "gate_up"]),
            down=self._matrix(parts[prefix + "down"]),
            keys=attention.keys[index].data_ptr(),
            values=attention.values[index].data_ptr(),
        )

    def _norm(self, part: Part) -> int:
        return self._vector(dict(part.canonical())["weight"])

    def _matrix(self, part: Part) -> _Matrix:
        self._kept.append(part)
        if isinstance(part, NativeInt8Linear):
            return part.matrix
        tensors = dict(part.canonical())
        weight, bias = tensors["weight"], tensors.get("bias")
        assert weight.is_contiguous()
        rows, columns = weight.shape
        bias_address = None if bias is None else self._vector(bias)
        return _Matrix(_FORMATS[weight.dtype], weight.data_ptr(), None, bias_address, rows, columns)

    def _vector(self, tensor: Tensor) -> int:
        """Return the address of `tensor` as contiguous fp32."""
        tensor = tensor.float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
