"""The native decoder: a step of few tokens as one call into a compiled library, if the installation has it.

Where the library does not know the weights' format, it still computes the attention.

The library computes on the same weights and KV blocks as the torch path, on the threads of torch's own OpenMP pool.
`native.cpp` is its source; the structures here mirror those there.
"""

from __future__ import annotations

import ctypes
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.inputs import StepInputs
from llmengine.backends.torch.attention import PagedAttention
from llmengine.models.arch import ModelArch

MAX_NATIVE_TOKENS = 128
"""Steps of more tokens go through torch's operators, whose matrix products are then as fast."""

NATIVE_DIRECTORY = Path(__file__).parent
"""Where the installation puts the library."""

_VERSION = 2
_VARIANTS = {"AVX512": "avx512", "AVX2": "avx2"}
"""What torch calls the processor's vector units -> variant of the library; any other processor: generic."""

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POOL_FUNCTIONS = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")

_MAX_SHARED_HEADS = 3
"""Rows of scores that each thread needs."""

_Pointer = ctypes.c_void_p
_Int = ctypes.c_int64


class NativeUnavailableError(Exception):
    """The native decoder cannot be used here; the message says why, for the backend's description."""


class _Matrix(ctypes.Structure):
    _fields_ = (("weight", _Pointer), ("bias", _Pointer), ("rows", _Int), ("columns", _Int))


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


class _Model(ctypes.Structure):
    _fields_ = (
        ("num_layers", _Int),
        ("num_heads", _Int),
        ("num_kv_heads", _Int),
        ("head_dim", _Int),
        ("block_size", _Int),
        ("num_threads", _Int),
        ("max_context", _Int),
        ("layers", _Pointer),
        ("embedding", _Matrix),
        ("lm_head", _Matrix),
        ("final_norm", _Pointer),
        ("norm_eps", ctypes.c_float),
        ("rope", _Pointer),
        ("parallel", _Pointer),
        ("barrier", _Pointer),
        ("thread_index", _Pointer),
        ("team_size", _Pointer),
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


class _Attention(ctypes.Structure):
    _fields_ = (("layer", _Int), ("qkv", _Pointer), ("attended", _Pointer))


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """The loaded library and the entry points of torch's OpenMP pool."""

    variant: str
    library: ctypes.CDLL
    pool: tuple[int, ...]


def load_native_library(directory: Path) -> NativeLibrary:
    """Load the variant for this processor from `directory`. Raises `NativeUnavailableError`."""
    variant = _VARIANTS.get(torch.backends.cpu.get_cpu_capability(), "generic")
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


class NativeAttention:
    """`PagedAttention` in the native library, on its KV pools, for steps of at most `max_tokens` tokens.

    For matrices that the library does not know: `plan` once a step, then `attend` once a layer.

    Args:
        max_context: tokens, of any request.
    """

    def __init__(
        self,
        library: NativeLibrary,
        arch: ModelArch,
        attention: PagedAttention,
        max_context: int,
        max_tokens: int = MAX_NATIVE_TOKENS,
    ) -> None:
        self.max_tokens = max_tokens
        self._function = library.library.llmengine_attend
        self._function.restype = None
        self._columns = arch.num_heads * arch.head_dim
        layers = (_Layer * arch.num_layers)(
            *(
                _Layer(keys=keys.data_ptr(), values=values.data_ptr())
                for keys, values in zip(attention.keys, attention.values, strict=True)
            )
        )
        rope = attention.rope_table.contiguous()
        self._model = _describe(library, arch, attention, max_context)
        self._model.layers, self._model.rope = ctypes.addressof(layers), rope.data_ptr()
        self._workspace = torch.empty(_scores_size(self._model))
        self._step = _Step()
        self._inputs: tuple[StepInputs, NDArray[np.int32]] | None = None
        self._kept = (attention, layers, rope, library)

    def plan(self, inputs: StepInputs, block_tables: NDArray[np.int32]) -> None:
        """Take over a step's rows; both must stay as they are until its last `attend`."""
        assert len(inputs.token_ids) <= self.max_tokens
        self._inputs = inputs, block_tables
        self._step = _Step(
            num_tokens=len(inputs.token_ids),
            table_stride=block_tables.shape[1],
            positions=inputs.positions.ctypes.data,
            token_slots=inputs.token_slots.ctypes.data,
            block_tables=block_tables.ctypes.data,
            workspace=self._workspace.data_ptr(),
        )

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """`models.decoder.Attend`: rotate in place, write keys and values, attend."""
        qkv = qkv.contiguous()
        attended = torch.empty(len(qkv), self._columns)
        attention = _Attention(layer, qkv.data_ptr(), attended.data_ptr())
        self._function(ctypes.byref(self._model), ctypes.byref(self._step), ctypes.byref(attention))
        return attended


def _describe(library: NativeLibrary, arch: ModelArch, attention: PagedAttention, max_context: int) -> _Model:
    """Return the model without weights and tables."""
    block_size = attention.shape.block_size
    parallel, barrier, thread_index, team_size = library.pool
    return _Model(
        num_layers=arch.num_layers,
        num_heads=arch.num_heads,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        block_size=block_size,
        num_threads=torch.get_num_threads(),
        max_context=-(-max_context // block_size) * block_size,
        norm_eps=arch.rms_norm_eps,
        parallel=parallel,
        barrier=barrier,
        thread_index=thread_index,
        team_size=team_size,
    )


def _scores_size(model: _Model) -> int:
    """Return the floats that the threads' scores take."""
    return int(model.num_threads * _MAX_SHARED_HEADS * model.max_context)


class NativeDecoder:
    """`models.decoder.forward` with its attention, for steps of at most `max_tokens` tokens.

    Args:
        weights: canonical weights (`canonical_shapes`), matrices of one dtype: float32, bfloat16 or float16. They are
            used where they are, as are the attention's KV pools.
        max_context: tokens, of any request.
    """

    def __init__(
        self,
        library: NativeLibrary,
        arch: ModelArch,
        weights: Mapping[str, Tensor],
        attention: PagedAttention,
        max_context: int,
        max_tokens: int = MAX_NATIVE_TOKENS,
    ) -> None:
        self.max_tokens = max_tokens
        self._kept: list[object] = [attention]
        self._vocab_size = arch.vocab_size
        dtype = weights["layers.0.qkv.weight"].dtype
        self._forward = getattr(library.library, f"llmengine_forward_{_DTYPES[dtype]}")
        self._forward.restype = None
        layers = (_Layer * arch.num_layers)(
            *(self._layer(f"layers.{index}.", weights, attention, index) for index in range(arch.num_layers))
        )
        self._model = _describe(library, arch, attention, max_context)
        self._model.layers = ctypes.addressof(layers)
        self._model.embedding = self._matrix("embed_tokens", weights)
        self._model.lm_head = self._matrix("embed_tokens" if arch.tie_word_embeddings else "lm_head", weights)
        self._model.final_norm = self._vector(weights["final_norm.weight"])
        self._model.rope = self._vector(attention.rope_table)
        qkv_size = (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim
        per_token = 2 * arch.hidden_size + qkv_size + arch.num_heads * arch.head_dim + 3 * arch.intermediate_size
        self._workspace = torch.empty(max_tokens * per_token + _scores_size(self._model))
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

    def _layer(self, prefix: str, weights: Mapping[str, Tensor], attention: PagedAttention, index: int) -> _Layer:
        return _Layer(
            input_norm=self._vector(weights[prefix + "input_norm.weight"]),
            post_attention_norm=self._vector(weights[prefix + "post_attention_norm.weight"]),
            qkv=self._matrix(prefix + "qkv", weights),
            o=self._matrix(prefix + "o", weights),
            gate_up=self._matrix(prefix + "gate_up", weights),
            down=self._matrix(prefix + "down", weights),
            keys=attention.keys[index].data_ptr(),
            values=attention.values[index].data_ptr(),
        )

    def _matrix(self, name: str, weights: Mapping[str, Tensor]) -> _Matrix:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        assert weight.is_contiguous()
        self._kept.append(weight)
        rows, columns = weight.shape
        return _Matrix(weight.data_ptr(), None if bias is None else self._vector(bias), rows, columns)

    def _vector(self, tensor: Tensor) -> int:
        """Return the address of `tensor` as contiguous fp32."""
        tensor = tensor.float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
