"""Shared by the tests of segments: families as tiny architectures, random weights, segments in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmengine.backends.tensorrt.library import Library, load_library
from llmengine.backends.tensorrt.model_segments import segments_of
from llmengine.backends.tensorrt.network import RawArray, define_segment
from llmengine.backends.tensorrt.spec import PlacedSegment, WeightSpec, make_profiles
from llmengine.errors import ConfigError
from llmengine.models.arch import ModelArch, RopeConfig, canonical_shapes
from llmengine.quantization.formats import TensorSpec
from tests.backends.tensorrt.interpreter import Interpreter

PROFILES = make_profiles(max_batch_size=4, max_tokens_per_step=16)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True, "tie_word_embeddings": True},
    "all_biases": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "gemma2": {
        "norm_placement": "both",
        "hidden_act": "gelu_tanh",
        "logit_soft_cap": 2.0,
        "float32_norms": True,
        "tie_word_embeddings": True,
    },
    "olmo2": {"norm_placement": "post"},
    "granite": {"logit_scale": 0.25},
}


def library_or_skip() -> Library:
    """Return the TensorRT library; skips the test where there is none."""
    try:
        return load_library()
    except ConfigError as error:
        pytest.skip(str(error))


def tiny_arch(**changes: Any) -> ModelArch:
    """Return an architecture of three layers whose sizes are all different."""
    sizes = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 72,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "rope": RopeConfig(theta=10000.0, original_max_position_embeddings=64),
    }
    return ModelArch(**{**sizes, **changes})


def random_weights(arch: ModelArch, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Return canonical weights that keep activations around 1; norms are not 1, biases not small."""
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            return (1 + 0.3 * noise).to(torch.float32 if arch.float32_norms else dtype)
        return (noise * (shape[1] ** -0.5 if len(shape) == 2 else 0.5)).to(dtype)

    return {name: make(name, shape) for name, shape in canonical_shapes(arch).items()}


def raw(tensor: Tensor) -> RawArray:
    """Return a tensor's bytes as the network takes them."""
    return np.array(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def placed(arch: ModelArch, dtype: str, mode: Any, kind: str) -> PlacedSegment:
    """Return the first segment of a kind; `mid` is the second one, so that layer indices matter."""
    found = [segment for segment in segments_of(arch, dtype, PROFILES, mode) if segment.spec.kind == kind]  # type: ignore[arg-type]
    return found[-1]


def interpreted(library: Library, segment: PlacedSegment, weights: Mapping[str, Tensor]) -> Interpreter:
    """Return a segment's network with its constants, ready to run; weight inputs are left to the caller."""
    names = segment.weight_names()
    constants = {
        weight.name: raw(weights[names[weight.name]]) for weight in segment.spec.weights if weight.source == "constant"
    }
    return Interpreter(library, define_segment(library, library.create_builder(), segment.spec, constants))


def weight_feeds(segment: PlacedSegment, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that are bound to a segment's weight inputs."""
    names = segment.weight_names()
    return {weight.name: as_in_plan(weight, weights[names[weight.name]]) for weight in segment.spec.weight_inputs}


def as_in_plan(weight: WeightSpec, tensor: Tensor) -> Tensor:
    """Return a tensor in the shape that it has in a plan; 4 bits stay two in a byte."""
    assert TensorSpec.of(tensor) == weight.stored, weight.name
    return tensor if weight.dtype == "int4" else tensor.view(weight.plan_shape)


class ReferenceSegments:
    """`models.decoder.Segments` in float64, written down from the papers' formulas."""

    def __init__(self, arch: ModelArch, weights: Mapping[str, Tensor]) -> None:
        self._arch = arch
        self._weights = {name: tensor.double() for name, tensor in weights.items()}
        self.num_layers = arch.num_layers

    def first(self, x: Tensor) -> Tensor:
        return self._qkv(0, x.double())

    def mid(self, layer: int, attended: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self._after_attention(layer, attended.double(), x.double())
        return x, self._qkv(layer + 1, x)

    def last(self, attended: Tensor, x: Tensor, sample_tokens: Tensor) -> Tensor:
        rows = sample_tokens.long()
        x = self._after_attention(self.num_layers - 1, attended[rows].double(), x[rows].double())
        head = "embed_tokens" if self._arch.tie_word_embeddings else "lm_head"
        logits = self._linear(self._norm(x, "final_norm"), head) * self._arch.logit_scale
        cap = self._arch.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _qkv(self, layer: int, x: Tensor) -> Tensor:
        return self._linear(self._norm(x, f"layers.{layer}.input_norm"), f"layers.{layer}.qkv")

    def _after_attention(self, layer: int, attended: Tensor, x: Tensor) -> Tensor:
        prefix = f"layers.{layer}."
        x = x + self._norm(self._linear(attended, prefix + "o"), prefix + "attention_out_norm")
        gate, up = self._linear(self._norm(x, prefix + "post_attention_norm"), prefix + "gate_up").chunk(2, -1)
        activated = F.silu(gate) if self._arch.hidden_act == "silu" else F.gelu(gate, approximate="tanh")
        return x + self._norm(self._linear(activated * up, prefix + "down"), prefix + "mlp_out_norm")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weights.get(f"{name}.weight")
        if weight is None:
            return x
        return x / (x.square().mean(-1, keepdim=True) + self._arch.rms_norm_eps).sqrt() * weight

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))
