"""Names of dtypes, as torch spells them: what files, configurations and weight formats say without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast, get_args

if TYPE_CHECKING:
    import torch

DType = Literal[
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
]
"""The dtype of a stored tensor."""

ModelDType = Literal["float32", "float16", "bfloat16"]
"""The dtype of a model's activations, and of its weights that are not quantized."""

DTypeChoice = Literal["auto", "float32", "float16", "bfloat16"]
"""What a user asks for: a `ModelDType`, or the checkpoint's."""

MODEL_DTYPES: tuple[ModelDType, ...] = get_args(ModelDType)

_ITEM_BYTES: dict[DType, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
}


def item_bytes(dtype: DType) -> int:
    """Bytes of one element."""
    return _ITEM_BYTES[dtype]


def torch_dtype(name: DType) -> torch.dtype:
    """The dtype of this name."""
    import torch

    return cast("torch.dtype", getattr(torch, name))


def dtype_name(dtype: torch.dtype) -> DType:
    """The name of a dtype. One that is not a `DType`, which only a file can bring, keeps torch's name for it."""
    return cast(DType, str(dtype).removeprefix("torch."))


def model_dtype_name(dtype: torch.dtype) -> ModelDType:
    """The name of a dtype that a model can have."""
    name = dtype_name(dtype)
    assert name in MODEL_DTYPES, f"{dtype} is not one of {MODEL_DTYPES}"
    return name
