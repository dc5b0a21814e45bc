"""A tool's description of a quantized model for every layout, with the weight format that it is read into."""

from __future__ import annotations

from typing import Any

import torch

from llmengine.quantization.bnb4 import Bnb4Bit
from llmengine.quantization.formats import WeightFormat
from llmengine.quantization.fp8 import Fp8
from llmengine.quantization.int4 import Int4Groups
from llmengine.quantization.int8 import INT8, Int8W8A8
from llmengine.quantization.int8_groups import Int8Groups
from llmengine.quantization.mxfp4 import Mxfp4
from llmengine.quantization.nvfp4 import Nvfp4
from tests.checkpoints import quantized_files as files
from tests.checkpoints.quantized_files import QuantizedFiles
from tests.models.family_helpers import make_family


def group(kind: str = "int", bits: int = 4, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    return {
        "targets": ["Linear"],
        "weights": {"type": kind, "num_bits": bits, "symmetric": True, "dynamic": False, **weights},
        "input_activations": inputs,
    }


def compressed(name: str, *groups: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": item for index, item in enumerate(groups)},
        "ignore": ["lm_head"],
        **values,
    }


def gptq(bits: int = 4, group_size: int = 32, **values: Any) -> dict[str, Any]:
    usual = {"desc_act": False, "sym": False, "checkpoint_format": "gptq"}
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **usual, **values}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
TOKEN = {"type": "float", "num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}
TENSOR = {"type": "float", "num_bits": 8, "dynamic": False, "strategy": "tensor", "symmetric": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
BLOCKS = {**FP8, "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
NVFP4 = group("float", 4, strategy="tensor_group", group_size=16)
BNB8 = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0}


def bnb4(quant_type: str = "nf4", **values: Any) -> dict[str, Any]:
    usual = {"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16"}
    return {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": quant_type, **usual, **values}


def modelopt(algorithm: str, **values: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"], **values}


def auto_round(packing: str, **values: Any) -> dict[str, Any]:
    usual = {"bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    return {"quant_method": "auto-round", "packing_format": f"auto_round:{packing}", **usual, **values}


LAYOUTS: dict[str, tuple[QuantizedFiles, WeightFormat]] = {
    "awq": (QuantizedFiles(AWQ, files.awq()), Int4Groups(32)),
    "awq-row": (QuantizedFiles({**AWQ, "group_size": -1}, files.awq(-1)), Int4Groups(-1)),
    "awq-gemv": (QuantizedFiles({**AWQ, "version": "GEMV"}, files.awq_gemv()), Int4Groups(32)),
    "gptq": (QuantizedFiles(gptq(), files.gptq()), Int4Groups(32)),
    "gptq-v2": (QuantizedFiles(gptq(checkpoint_format="gptq_v2"), files.gptq(offset=0)), Int4Groups(32)),
    "gptq-sym": (QuantizedFiles(gptq(sym=True), files.gptq(symmetric=True)), Int4Groups(32, False)),
    "gptq-short": (QuantizedFiles(gptq(4, 64), files.gptq(4, 64)), Int4Groups(64)),
    "gptq-order": (
        QuantizedFiles(gptq(desc_act=True), files.gptq(act_order="shared")),
        Int4Groups(32, input_order=True),
    ),
    "gptq-row": (QuantizedFiles(gptq(4, -1, desc_act=True), files.gptq(4, -1)), Int4Groups(-1)),
    "gptq-bf16": (
        QuantizedFiles(gptq(), files.gptq(scale_dtype=torch.bfloat16)),
        Int4Groups(32, scale_dtype="bfloat16"),
    ),
    "gptq-8": (QuantizedFiles(gptq(8), files.gptq(8)), Int8Groups(32)),
    "gptq-8-order": (
        QuantizedFiles(gptq(8, sym=True, desc_act=True), files.gptq(8, symmetric=True, act_order="shared")),
        Int8Groups(32, False, input_order=True),
    ),
    "gptq-8-row": (QuantizedFiles(gptq(8, -1, sym=True), files.gptq(8, -1, symmetric=True)), INT8),
    "w4a16": (
        QuantizedFiles(compressed("pack-quantized", group(strategy="group", group_size=32)), files.compressed()),
        Int4Groups(32, False, scale_dtype="bfloat16"),
    ),
    "w4a16-asym": (
        QuantizedFiles(
            compressed("pack-quantized", group(strategy="group", group_size=32, symmetric=False)),
            files.compressed(symmetric=False),
        ),
        Int4Groups(32, scale_dtype="bfloat16"),
    ),
    "w4a16-old-zeros": (
        QuantizedFiles(
            compressed("pack-quantized", group(strategy="group", group_size=32, symmetric=False)),
            files.compressed(symmetric=False, zeros_packed=False, scale_dtype=torch.float16),
        ),
        Int4Groups(32),
    ),
    "w4a16-order": (
        QuantizedFiles(
            compressed("pack-quantized", group(strategy="group", group_size=32, actorder="group")),
            files.compressed(act_order=True),
        ),
        Int4Groups(32, False, input_order=True, scale_dtype="bfloat16"),
    ),
    "w4a16-tensor": (
        QuantizedFiles(compressed("pack-quantized", group(strategy="tensor")), files.compressed(4, 0)),
        Int4Groups(-1, False, scale_dtype="bfloat16"),
    ),
    "w8a16": (
        QuantizedFiles(compressed("pack-quantized", group(bits=8, strategy="channel")), files.compressed(8, -1)),
        INT8,
    ),
    "w8a16-groups": (
        QuantizedFiles(
            compressed("pack-quantized", group(bits=8, strategy="group", group_size=32)), files.compressed(8)
        ),
        Int8Groups(32, False, scale_dtype="bfloat16"),
    ),
    "int8-weights": (QuantizedFiles(compressed("int-quantized", group(bits=8)), files.int8("tensor")), INT8),
    "int8-groups": (
        QuantizedFiles(
            compressed("naive-quantized", group(bits=8, strategy="group", group_size=32)), files.int8("group")
        ),
        Int8Groups(32, False, scale_dtype="bfloat16"),
    ),
    "w8a8": (
        QuantizedFiles(
            compressed("int-quantized", group(bits=8, strategy="channel", inputs={**TOKEN, "type": "int"})),
            files.int8(),
        ),
        Int8W8A8(),
    ),
    "w8a8-static": (
        QuantizedFiles(
            compressed("int-quantized", group(bits=8, strategy="channel", inputs={**TENSOR, "type": "int"})),
            files.int8(input_scale=True),
        ),
        Int8W8A8(activations="tensor"),
    ),
    "fp8-channel": (
        QuantizedFiles(compressed("float-quantized", group("float", 8, strategy="channel", inputs=TOKEN)), files.fp8()),
        Fp8("channel", "token"),
    ),
    "fp8-weights": (
        QuantizedFiles(compressed("float-quantized", group("float", 8, strategy="channel")), files.fp8()),
        Fp8("channel", "none"),
    ),
    "fp8-static": (
        QuantizedFiles(
            compressed("float-quantized", group("float", 8, strategy="tensor", inputs=TENSOR)),
            files.fp8("tensor", input_scale="shared"),
            {"o_proj": files.fp8("tensor", input_scale="shared")},
        ),
        Fp8("channel", "tensor"),
    ),
    "fp8": (QuantizedFiles(FP8, files.fp8("tensor")), Fp8("channel", "token")),
    "mxfp4": (QuantizedFiles({"quant_method": "mxfp4"}, files.mxfp4()), Mxfp4()),
    "mxfp4-compressed": (
        QuantizedFiles(
            compressed("mxfp4-pack-quantized", group("float", 4, strategy="group", group_size=32)),
            files.mxfp4("weight_packed", "weight_scale"),
        ),
        Mxfp4(),
    ),
    "int8-asym": (
        QuantizedFiles(
            compressed("int-quantized", group(bits=8, strategy="channel", symmetric=False)),
            files.int8(symmetric=False),
        ),
        Int8Groups(-1, scale_dtype="bfloat16"),
    ),
    "int8-asym-tensor": (
        QuantizedFiles(
            compressed("int-quantized", group(bits=8, strategy="tensor", symmetric=False)),
            files.int8("tensor", symmetric=False),
        ),
        Int8Groups(-1, scale_dtype="bfloat16"),
    ),
    "fp8-mistral": (
        QuantizedFiles(
            {**FP8, "activation_scheme": "static", "weight_block_size": None},
            files.fp8("tensor", name="weight_scale_inv", input_scale="shared", input_name="activation_scale"),
        ),
        Fp8("channel", "tensor"),
    ),
    "fp8-modelopt": (
        QuantizedFiles(modelopt("FP8"), files.fp8("tensor", input_scale="shared")),
        Fp8("channel", "tensor"),
    ),
    "fp8-modelopt-channel": (
        QuantizedFiles(modelopt("FP8_PER_CHANNEL_PER_TOKEN"), files.fp8()),
        Fp8("channel", "token"),
    ),
    "nvfp4": (QuantizedFiles(compressed("nvfp4-pack-quantized", NVFP4), files.nvfp4()), Nvfp4("channel")),
    "nvfp4-modelopt": (
        QuantizedFiles(
            modelopt("W4A16_NVFP4", group_size=16), files.nvfp4("weight", "weight_scale_2", is_divisor=False)
        ),
        Nvfp4("channel"),
    ),
    "auto-round": (QuantizedFiles(auto_round("auto_gptq"), files.gptq()), Int4Groups(32)),
    "auto-round-awq": (QuantizedFiles(auto_round("auto_awq"), files.awq()), Int4Groups(32)),
    "auto-round-old": (
        QuantizedFiles(
            {"quant_method": "intel/auto-round", "backend": "auto_round:awq:gemm", "bits": 4, "group_size": 32},
            files.awq(),
        ),
        Int4Groups(32),
    ),
    "bnb-8": (QuantizedFiles(BNB8, files.bnb8()), INT8),
    "bnb-nf4": (QuantizedFiles(bnb4(), files.bnb4()), Bnb4Bit("nf4", 64)),
    "bnb-fp4": (QuantizedFiles(bnb4("fp4"), files.bnb4("fp4", 32)), Bnb4Bit("fp4", 32)),
    "bnb-double": (
        QuantizedFiles(bnb4(bnb_4bit_use_double_quant=True), files.bnb4(nested=True)),
        Bnb4Bit("nf4", 64),
    ),
    "bnb-bf16": (
        QuantizedFiles(bnb4(bnb_4bit_quant_storage="bfloat16"), files.bnb4(storage=torch.bfloat16)),
        Bnb4Bit("nf4", 64),
    ),
}


def make(family: str = "mistral", **changes: Any) -> Any:
    """A model of a family whose columns come in groups of 32."""
    return make_family(family, **{"intermediate_size": 96, **changes})
