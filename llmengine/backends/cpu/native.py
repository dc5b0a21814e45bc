"""The native decoder: a step as one call into a compiled library, if the installation has it.

Steps that it does not run go through torch's operators. Of these it computes the products with quantized weights in
the formats that it has (`native_packing.packing_of`).

The library computes on the same weights and KV blocks as the torch path, on threads of its own, which give their cores
up when they have to wait. `native.cpp` is its source; `native_library` loads it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.cpu.attention import PagedAttention
from llmengine.backends.cpu.linear import CpuLinear, StackedLinear
from llmengine.backends.cpu.native_library import (
    MAX_PARTS,
    InputsStruct,
    LayerStruct,
    LinearStruct,
    MatrixStruct,
    ModelStruct,
    NativeLibrary,
    NativeUnavailableError,
    ProductStruct,
    StepStruct,
    find_native_library,
)
from llmengine.backends.cpu.native_packing import PANEL_ROWS, PackedMatrix, pack_matrix, packing_of
from llmengine.backends.cpu.openmp import torch_function
from llmengine.backends.cpu.sampler import Logits
from llmengine.backends.cpu.step_inputs import StepInputs
from llmengine.models.arch import ModelArch
from llmengine.quantization.formats import DENSE, WeightFormat
from llmengine.quantization.fp8 import BLOCK, Fp8
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.matrix import Matrix
from llmengine.quantization.stacked import Stacked

MAX_FEW_TOKENS = 128
"""In steps of more tokens, attention takes tiles of tokens, and products with row-major weights need MKL."""

_DENSE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

BYTE_KV_MULTIPLE = 32
"""Blocks and heads of an int8 KV cache have a multiple of so many tokens and dimensions in the native decoder."""

MAX_BYTE_HEAD_DIM = 256
"""Most dimensions of a head with an int8 KV cache."""


class NativeLinear:
    """`linear.CpuLinear` of a matrix that has a `Packing`.

    A token's result does not depend on the tokens beside it. Activations are rounded as the format says. Where it says
    nothing, they get 16 bits with one scale for each token for int8 weights, else 8 bits with one scale for each 32
    columns.

    Args:
        bias: float32 [out_features] or None.
    """

    def __init__(self, library: NativeLibrary, matrix: Matrix, bias: Tensor | None) -> None:
        self._library = library
        packed, memory = pack_matrix(matrix, int(library.library.llmengine_byte_offset())), library.weight_memory
        self._packed = replace(packed, codes=memory.copy(packed.codes), scales=memory.copy(packed.scales))
        self.bias = bias
        self._bias = None if bias is None else padded_bias(bias)
        self.struct = _matrix_struct(self._packed, self._bias)
        self._linear = LinearStruct(1, (MatrixStruct * MAX_PARTS)(self.struct))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """float32 x @ weight.T + bias + residual, which overwrites `residual`."""
        x = x.contiguous()
        num_tokens, functions = len(x), self._library.library
        out = x.new_empty(num_tokens, self.struct.rows) if residual is None else residual.contiguous()
        size = functions.llmengine_product_workspace_size(self._library.pool, ctypes.byref(self._linear), num_tokens)
        workspace = torch.empty(size)
        product = ProductStruct(
            linear=self._linear,
            num_tokens=num_tokens,
            accumulate=residual is not None,
            x=x.data_ptr(),
            out=out.data_ptr(),
            workspace=workspace.data_ptr(),
        )
        functions.llmengine_multiply(self._library.pool, ctypes.byref(product))
        return out

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows: float32 [len(indices), in_features]; `indices` are int64.

        Only of bfloat16 matrices and of those in a format that the library `looks_up`.
        """
        assert self.format == DENSE or looks_up(self.format), self.format
        indices = indices.contiguous()
        out = torch.empty(len(indices), self.struct.columns)
        self._library.library.llmengine_dequantize_rows(
            ctypes.byref(self.struct), len(indices), indices.data_ptr(), out.data_ptr()
        )
        return out

    @property
    def format(self) -> WeightFormat:
        """Of the matrix as it is stored."""
        return self._packed.format

    @property
    def size_bytes(self) -> int:
        """Resident bytes."""
        return self._packed.size_bytes

    @property
    def matrix(self) -> Matrix:
        """The matrix as it is stored, a copy."""
        return self._packed.unpacked()


def padded_bias(bias: Tensor) -> Tensor:
    """Float32, with zeros to the end of the last panel."""
    return F.pad(bias.float(), (0, -len(bias) % PANEL_ROWS))


def _matrix_struct(packed: PackedMatrix, bias: Tensor | None) -> MatrixStruct:
    rows, columns = packed.shape
    return MatrixStruct(
        format=packed.packing.number,
        weight=packed.codes.data_ptr(),
        scale=packed.scales.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        rows=rows,
        columns=columns,
        group_shift=packed.packing.group_shift,
        first_row=0,
        out_rows=rows,
        inputs=_inputs_struct(packed),
    )


def _inputs_struct(packed: PackedMatrix) -> InputsStruct:
    def address(suffix: str, dtype: torch.dtype) -> int | None:
        tensor = packed.kept.get(suffix)
        if tensor is None:
            return None
        assert tensor.dtype == dtype, suffix
        assert tensor.is_contiguous(), suffix
        return tensor.data_ptr()

    return InputsStruct(
        kind=packed.packing.input_kind,
        factors=address("input_scale", torch.float32),
        order=address("input_order", torch.int32),
        scale=address("activation_scale", torch.float32),
        scale_columns=BLOCK if getattr(packed.format, "activations", None) == "block" else packed.shape[1],
    )


def multiplies(weight_format: WeightFormat) -> bool:
    """Whether the native decoder multiplies by matrices in a format."""
    if isinstance(weight_format, Stacked):
        parts = weight_format.parts
        return len(parts) <= MAX_PARTS and all(multiplies(part.format) for part in parts)
    return weight_format == DENSE or packing_of(weight_format) is not None


def why_not_multiplied(weight_format: WeightFormat) -> str | None:
    """Why this installation's library does not multiply by quantized matrices in a format; None if it does."""
    if packing_of(weight_format) is None:
        return "no native product"
    try:
        find_native_library()
    except NativeUnavailableError as error:
        return f"no native library: {error}"
    return None


def looks_up(weight_format: WeightFormat) -> bool:
    """Whether the library looks up rows of quantized matrices in a format."""
    if weight_format == INT8 or isinstance(weight_format, Int8W8A8 | Fp8):
        return False
    if getattr(weight_format, "input_order", False) or getattr(weight_format, "input_scale", False):
        return False
    return packing_of(weight_format) is not None


def _matrices(layer: LayerStruct) -> Iterator[MatrixStruct]:
    for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
        yield from linear.parts[: linear.num_parts]


def _takes_many(matrix_format: int, has_blas: bool) -> bool:
    """Whether products of this format with many tokens are as fast as torch's."""
    if matrix_format == _DENSE_FORMATS[torch.bfloat16] and torch.cpu._is_amx_tile_supported():
        return False
    return has_blas or matrix_format not in _DENSE_FORMATS.values()


class NativeDecoder:
    """`models.decoder.forward` with its embedding and attention, for steps of at most `max_tokens` tokens.

    Weights in panels have no limit (`max_tokens` is None), nor do row-major ones where torch brings MKL along. The
    exception is bfloat16 on a processor with tile units, with which torch's products are far faster.

    Weights and the attention's KV pools are used where they are.

    Args:
        embedding: [vocab, hidden], dense or in a format that the library `looks_up`.
        norms: weight [size] of each norm by canonical name less ".weight".
        linears: a layer's matrices by canonical name less ".weight": `NativeLinear`, dense and row-major, or a
            `StackedLinear` of such.
        lm_head: the output matrix, as `linears`.
        max_context: tokens of the longest request.
    """

    def __init__(
        self,
        library: NativeLibrary,
        arch: ModelArch,
        embedding: Matrix | NativeLinear,
        norms: Mapping[str, Tensor],
        linears: Mapping[str, CpuLinear],
        lm_head: CpuLinear,
        attention: PagedAttention,
        max_context: int,
    ) -> None:
        self._kept: list[object] = [attention]
        self._vocab_size = arch.vocab_size
        sgemm, set_thread_limit = (torch_function(name) for name in ("sgemm_", "MKL_Set_Num_Threads_Local"))
        self._library = library.library
        layers = (LayerStruct * arch.num_layers)(
            *(self._layer(norms, linears, attention, index) for index in range(arch.num_layers))
        )
        block_size = attention.block_size
        self._model = ModelStruct(
            pool=library.pool,
            sgemm=sgemm,
            set_thread_limit=set_thread_limit,
            num_layers=arch.num_layers,
            num_heads=arch.num_heads,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            block_size=block_size,
            max_context=-(-max_context // block_size) * block_size,
            layers=ctypes.addressof(layers),
            embedding=self._part(embedding),
            lm_head=self._linear(lm_head),
            final_norm=self._vector(norms["final_norm"]),
            norm_eps=arch.rms_norm_eps,
            rope=self._vector(attention.rope_table),
        )
        head = self._model.lm_head
        matrices = [*head.parts[: head.num_parts], *(matrix for layer in layers for matrix in _matrices(layer))]
        has_blas = sgemm is not None and set_thread_limit is not None
        self.max_tokens = None if all(_takes_many(matrix.format, has_blas) for matrix in matrices) else MAX_FEW_TOKENS
        self._workspace = self._new_workspace(MAX_FEW_TOKENS)
        self._kept += [layers, library]

    def forward(self, inputs: StepInputs, block_tables: NDArray[np.int32]) -> Logits | None:
        """Write the KV of all tokens and return the logits of those that sample, None without such."""
        num_tokens, num_logits = len(inputs.token_ids), len(inputs.sample_tokens)
        assert self.max_tokens is None or num_tokens <= self.max_tokens
        logits = torch.empty(num_logits, self._vocab_size)
        likeliest = np.empty(num_logits, dtype=np.int64)
        workspace = self._workspace if num_tokens <= MAX_FEW_TOKENS else self._new_workspace(num_tokens)
        step = StepStruct(
            num_tokens=num_tokens,
            num_logits=num_logits,
            table_stride=block_tables.shape[1],
            token_ids=inputs.token_ids.ctypes.data,
            positions=inputs.positions.ctypes.data,
            token_slots=inputs.token_slots.ctypes.data,
            logit_tokens=inputs.sample_tokens.ctypes.data,
            block_tables=block_tables.ctypes.data,
            workspace=workspace.data_ptr(),
            logits=logits.data_ptr(),
            likeliest=likeliest.ctypes.data,
        )
        self._library.llmengine_forward(ctypes.byref(self._model), ctypes.byref(step))
        return Logits(logits, likeliest) if num_logits else None

    def _new_workspace(self, num_tokens: int) -> Tensor:
        return torch.empty(self._library.llmengine_workspace_size(ctypes.byref(self._model), num_tokens))

    def _layer(
        self, norms: Mapping[str, Tensor], linears: Mapping[str, CpuLinear], attention: PagedAttention, index: int
    ) -> LayerStruct:
        prefix = f"layers.{index}."
        return LayerStruct(
            input_norm=self._vector(norms[prefix + "input_norm"]),
            post_attention_norm=self._vector(norms[prefix + "post_attention_norm"]),
            qkv=self._linear(linears[prefix + "qkv"]),
            o=self._linear(linears[prefix + "o"]),
            gate_up=self._linear(linears[prefix + "gate_up"]),
            down=self._linear(linears[prefix + "down"]),
            **attention.store.addresses(index),
        )

    def _linear(self, linear: CpuLinear) -> LinearStruct:
        """Parts of the linear, one above the other."""
        parts = linear.parts if isinstance(linear, StackedLinear) else [linear]
        structs = [self._part(part if isinstance(part, NativeLinear) else part.matrix) for part in parts]
        first, out_rows = 0, sum(struct.rows for struct in structs)
        for struct in structs:
            struct.first_row, struct.out_rows = first, out_rows
            if linear.bias is not None:
                struct.bias = self._vector(padded_bias(linear.bias[first : first + struct.rows]))
            first += struct.rows
        return LinearStruct(len(structs), (MatrixStruct * MAX_PARTS)(*structs))

    def _part(self, part: Matrix | NativeLinear) -> MatrixStruct:
        """A matrix without its bias."""
        if isinstance(part, NativeLinear):
            self._kept.append(part)
            struct = MatrixStruct.from_buffer_copy(part.struct)
            struct.bias = None
            return struct
        assert part.format == DENSE, part.format
        weight = part.weight
        assert weight.is_contiguous()
        self._kept.append(weight)
        rows, columns = weight.shape
        return MatrixStruct(
            format=_DENSE_FORMATS[weight.dtype], weight=weight.data_ptr(), rows=rows, columns=columns, out_rows=rows
        )

    def _vector(self, tensor: Tensor) -> int:
        """The address of `tensor` as contiguous float32."""
        tensor = tensor.float().contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
