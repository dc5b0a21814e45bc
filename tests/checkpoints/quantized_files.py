"""Quantized Hugging Face directories, packed here by the published descriptions of their layouts.

A packer draws the integers and scales of a linear and gives both its tensors and its weights in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Packed = tuple[dict[str, torch.Tensor], np.ndarray]
"""Tensors of a linear by suffix, and its weights, float32 [out, in]."""

Packer = Callable[[np.random.Generator, int, int], Packed]
"""(source of random numbers, outputs, inputs) -> what a tool writes for such a linear."""


def words(codes: np.ndarray, bits: int = 4, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """int32 words along the last axis; the integer `order[i]` of each word is in its i-th lowest bits."""
    count = 32 // bits
    padded = np.pad(codes.astype(np.uint32), [(0, 0), (0, -codes.shape[1] % count)])
    packed = np.zeros((padded.shape[0], padded.shape[1] // count), np.uint32)
    for place, item in enumerate(order or range(count)):
        packed |= padded[:, item::count] << np.uint32(bits * place)
    return torch.from_numpy(packed.view(np.int32).copy())


def scales_of(rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(rng.uniform(0.005, 0.02, shape).astype(np.float32)).to(dtype)


def repeated(entries: np.ndarray, size: int, columns: int) -> np.ndarray:
    """[rows, groups] as [rows, columns]."""
    return np.repeat(entries.astype(np.float32), size, axis=1)[:, :columns]


def dequantized(codes: np.ndarray, zeros: np.ndarray, scale: torch.Tensor, group: np.ndarray) -> np.ndarray:
    """(q - zero) * scale, where `group[i]` is the group of column i; zeros and scale are [out, groups]."""
    difference = codes.astype(np.float32) - zeros.astype(np.float32)[:, group]
    return difference * scale.float().numpy()[:, group]


def awq(group_size: int = 32) -> Packer:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        size = columns if group_size == -1 else group_size
        groups = columns // size
        codes, zeros = rng.integers(0, 16, (rows, columns)), rng.integers(0, 16, (rows, groups))
        scale = scales_of(rng, rows, groups)
        tensors = {
            "qweight": words(codes.T, 4, order),
            "qzeros": words(zeros.T, 4, order),
            "scales": scale.T.contiguous(),
        }
        return tensors, dequantized(codes, zeros, scale, np.arange(columns) // size)

    return pack


def awq_gemv(group_size: int = 32) -> Packer:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        groups = columns // group_size
        multiple = {64: 2, 32: 4}.get(group_size, 1)
        width = ceil(ceil(groups / 8) / multiple) * multiple
        codes, zeros = rng.integers(0, 16, (rows, columns)), rng.integers(0, 16, (rows, groups))
        scale = scales_of(rng, rows, groups)
        tensors = {
            "qweight": words(codes),
            "qzeros": words(np.pad(zeros, [(0, 0), (0, 8 * width - groups)])),
            "scales": torch.nn.functional.pad(scale, (0, 8 * width - groups)),
        }
        return tensors, dequantized(codes, zeros, scale, np.arange(columns) // group_size)

    return pack


def gptq(
    bits: int = 4,
    group_size: int = 32,
    *,
    symmetric: bool = False,
    act_order: str = "",
    offset: int = 1,
    scale_dtype: torch.dtype = torch.float16,
) -> Packer:
    """act_order: "" for none, "shared" for one order of all linears with as many inputs, "own" for one of each."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        size = columns if group_size == -1 else group_size
        groups = -(-columns // size)
        codes = rng.integers(0, 1 << bits, (rows, columns))
        zeros = np.full((rows, groups), 1 << (bits - 1)) if symmetric else rng.integers(1, 1 << bits, (rows, groups))
        scale = scales_of(rng, rows, groups, dtype=scale_dtype)
        group = np.arange(columns) // size
        if act_order:
            group = group[(np.random.default_rng(columns) if act_order == "shared" else rng).permutation(columns)]
        tensors = {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words(zeros.T - offset, bits),
            "scales": scale.T.contiguous(),
            "g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        return tensors, dequantized(codes, zeros, scale, group)

    return pack


def compressed(
    bits: int = 4,
    group_size: int = 32,
    *,
    symmetric: bool = True,
    act_order: bool = False,
    zeros_packed: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Packer:
    """compressed-tensors' "pack-quantized"; group_size=0 stands for one scale for the matrix."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        size = group_size if group_size > 0 else columns
        groups, middle = columns // size, 1 << (bits - 1)
        codes = rng.integers(-middle, middle, (rows, columns))
        zeros = np.zeros((rows, groups)) if symmetric else rng.integers(-middle, middle, (rows, groups))
        scale = scales_of(rng, 1 if group_size == 0 else rows, groups, dtype=scale_dtype)
        group = np.arange(columns) // size
        if act_order:
            group = np.random.default_rng(columns).permutation(group)
        tensors = {
            "weight_packed": words(codes + middle, bits),
            "weight_scale": scale.view(1) if group_size == 0 else scale,
            "weight_shape": torch.tensor([rows, columns]),
        }
        if not symmetric and zeros_packed:
            tensors["weight_zero_point"] = words((zeros + middle).astype(int).T, bits).T.contiguous()
        elif not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(group.astype(np.int32))
        return tensors, dequantized(codes, zeros, scale, group)

    return pack


def int8(scales: str = "channel", *, input_scale: bool = False, symmetric: bool = True) -> Packer:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
        size = 32 if scales == "group" else columns
        scale = scales_of(rng, 1 if scales == "tensor" else rows, columns // size, dtype=torch.bfloat16)
        scale *= 0.1
        tensors = {"weight": torch.from_numpy(codes), "weight_scale": scale[0] if scales == "tensor" else scale}
        if input_scale:
            tensors["input_scale"] = torch.tensor([0.03])
        zeros = np.zeros(tuple(scale.shape), np.int8)
        if not symmetric:
            zeros = rng.integers(-128, 128, tuple(scale.shape)).astype(np.int8)
            tensors["weight_zero_point"] = torch.from_numpy(zeros[0] if scales == "tensor" else zeros)
        difference = codes.astype(np.float32) - repeated(zeros, size, columns)
        return tensors, difference * repeated(scale.float().numpy(), size, columns)

    return pack


def fp8(
    scales: str = "channel", *, name: str = "weight_scale", input_scale: str = "", input_name: str = "input_scale"
) -> Packer:
    """input_scale: "" for none, "shared" for one of all linears, "own" for one of each."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        weight = torch.from_numpy(rng.uniform(-448, 448, (rows, columns)).astype(np.float32)).to(torch.float8_e4m3fn)
        shape = {"tensor": (1, 1), "channel": (rows, 1), "block": (-(-rows // 128), -(-columns // 128))}[scales]
        scale = scales_of(rng, *shape, dtype=torch.float32) * 0.02
        tensors = {"weight": weight, name: scale[0, 0] if scales == "tensor" else scale}
        if input_scale:
            tensors[input_name] = torch.tensor(0.02 if input_scale == "shared" else rng.uniform(0.01, 0.02))
        by_row = np.repeat(scale.numpy(), 128 if scales == "block" else rows, axis=0)[:rows]
        factors = np.repeat(by_row, 128 if scales == "block" else columns, axis=1)[:, :columns]
        if scales == "channel":
            factors = np.repeat(scale.numpy(), columns, axis=1)
        return tensors, weight.float().numpy() * factors

    return pack


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def mxfp4(blocks: str = "weight_blocks", scale_name: str = "weight_scales") -> Packer:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes, exponents = rng.integers(0, 16, (rows, columns)), rng.integers(118, 124, (rows, columns // 32))
        packed = torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8))
        if blocks == "weight_blocks":
            packed = packed.view(rows, -1, 16)
        tensors = {blocks: packed, scale_name: torch.from_numpy(exponents.astype(np.uint8))}
        return tensors, E2M1[codes] * repeated(2.0 ** (exponents - 127.0), 32, columns)

    return pack


def nvfp4(main: str = "weight_packed", name: str = "weight_global_scale", *, is_divisor: bool = True) -> Packer:
    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = rng.integers(0, 16, (rows, columns))
        scale = scales_of(rng, rows, columns // 16, dtype=torch.float32).mul(5000).to(torch.float8_e4m3fn)
        factor = np.float32(rng.uniform(1e-4, 2e-4))
        whole = np.float32(1) / factor if is_divisor else factor
        tensors = {
            main: torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)),
            "weight_scale": scale,
            name: torch.tensor([whole]) if is_divisor else torch.tensor(whole),
        }
        used = np.float32(1) / whole if is_divisor else factor
        return tensors, E2M1[codes] * repeated(scale.float().numpy() * used, 16, columns)

    return pack


NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4 = np.array([*_FP4, *(-value for value in _FP4)], np.float32)


def bnb4(
    quant_type: str = "nf4", block: int = 64, *, nested: bool = False, storage: torch.dtype = torch.uint8
) -> Packer:
    """What a `Params4bit` of bitsandbytes 0.43 and later saves; nested stands for its double quantization."""
    table = {"nf4": NF4, "fp4": FP4}[quant_type]

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = rng.integers(0, 16, rows * columns)
        count = -(-codes.size // block)
        absmax = rng.uniform(0.01, 0.05, count).astype(np.float32)
        state: dict[str, Any] = {"quant_type": quant_type, "blocksize": block, "dtype": "float16"}
        state["shape"] = [rows, columns]
        tensors = {
            "weight": torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8)).view(storage)[:, None],
            "weight.absmax": torch.from_numpy(absmax),
            "weight.quant_map": torch.from_numpy(table.copy()),
        }
        if nested:
            numbers = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
            indices = rng.integers(0, 256, count).astype(np.uint8)
            whole = rng.uniform(0.01, 0.02, -(-count // 256)).astype(np.float32)
            offset = float(np.float32(0.03))
            absmax = numbers[indices] * np.repeat(whole, 256)[:count] + np.float32(offset)
            tensors["weight.absmax"] = torch.from_numpy(indices)
            tensors["weight.nested_absmax"] = torch.from_numpy(whole)
            tensors["weight.nested_quant_map"] = torch.from_numpy(numbers)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{quant_type}"] = encoded
        return tensors, (table[codes] * np.repeat(absmax, block)[: codes.size]).reshape(rows, columns)

    return pack


def bnb8() -> Packer:
    """What an `Int8Params` of bitsandbytes saves."""

    def pack(rng: np.random.Generator, rows: int, columns: int) -> Packed:
        codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
        largest = rng.uniform(0.1, 0.2, rows).astype(np.float32)
        tensors = {
            "weight": torch.from_numpy(codes),
            "SCB": torch.from_numpy(largest),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
        return tensors, codes.astype(np.float32) * (largest / np.float32(127))[:, None]

    return pack


@dataclass(frozen=True)
class QuantizedFiles:
    """A tool's way to store a model.

    Attributes:
        config: the `quantization_config`.
        pack: the packer of all linears, but for
        exceptions: pattern of modules -> another packer, or None for linears that stay dense.
    """

    config: Mapping[str, Any]
    pack: Packer
    exceptions: Mapping[str, Packer | None] = field(default_factory=dict)

    def packer(self, module: str) -> Packer | None:
        for pattern, packer in self.exceptions.items():
            if re.search(pattern, module):
                return packer
        return None if module == "lm_head" else self.pack


def write_quantized(
    directory: Path, model: Any, files: QuantizedFiles, *, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Write a model's linears quantized, the rest in `dtype`; the dense state dict that it stands for.

    Tensors of linears are random, those of embeddings, norms and biases are the model's.
    """
    rng = np.random.default_rng(7)
    directory.mkdir(exist_ok=True)
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    stored: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        packer = files.packer(module) if module in linears and kind == "weight" else None
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if packer is None:
            stored[name] = tensor.to(dtype)
            dense[name] = stored[name].float()
            continue
        tensors, weight = packer(rng, *tensor.shape)
        stored |= {f"{module}.{suffix}": item.contiguous() for suffix, item in tensors.items()}
        dense[name] = torch.from_numpy(np.ascontiguousarray(weight))
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    config = {**model.config.to_dict(), "dtype": str(dtype).removeprefix("torch."), "quantization_config": files.config}
    config["architectures"] = [type(model).__name__]
    (directory / "config.json").write_text(json.dumps(config))
    return dense


def write_dense(directory: Path, model: Any, dense: Mapping[str, torch.Tensor]) -> None:
    """The same model with its weights dequantized to float32."""
    directory.mkdir(exist_ok=True)
    save_file(dict(dense), directory / "model.safetensors", {"format": "pt"})
    config = {**model.config.to_dict(), "dtype": "float32", "architectures": [type(model).__name__]}
    (directory / "config.json").write_text(json.dumps(config))
