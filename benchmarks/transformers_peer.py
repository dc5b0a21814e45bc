"""transformers on the same weights: `generate`, a static batch, and its continuous batching.

llmengine's loader reads the weights, and transformers' own model class receives them: transformers reads GGUF files
only with the package accelerate, and its conversion could differ.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmengine.checkpoints.dequantized_source import without_blocks
from llmengine.checkpoints.opening import open_model
from llmengine.models.arch import ModelArch, fused_parts


class Variant(NamedTuple):
    """A way to run transformers: its attention implementation and, for continuous batching, the tokens per step."""

    attention: str
    max_batch_tokens: int = 0


VARIANTS = {
    "generate": (Variant("sdpa"), Variant("eager")),
    "continuous": (Variant("sdpa", 512), Variant("sdpa", 2048), Variant("paged|eager", 512)),
}
"""Variants to try of each kind. Without a GPU, continuous batching in transformers 5 accepts sdpa and paged|eager."""

_TRIAL_TOKENS = 8
_PAGE_SIZE = 256
_HF_NAMES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_HF_MODULES = {
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


class Transformers:
    """A transformers model in float32 that generates greedily and exactly as many tokens as requested."""

    def __init__(self, model_path: Path) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.model: PreTrainedModel = load_model(model_path)
        self._chosen: dict[tuple[str, int, int, int], Variant] = {}

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        """Run `model.generate` over all prompts, which must be equally long, as one static batch."""
        inputs = torch.tensor(prompts)
        with torch.inference_mode():
            output = self.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_config=_exactly(num_tokens)
            )
        assert output.shape == (len(prompts), len(prompts[0]) + num_tokens), tuple(output.shape)

    def generate_continuously(self, prompts: Sequence[Sequence[int]], num_tokens: int, max_batch_tokens: int) -> None:
        """Run `model.generate_batch`, transformers' continuous batching, including the start and end of its manager.

        The cache has as many blocks as the workload needs; by default it would fill 90 % of the memory in each call.
        """
        blocks_each = -(-(len(prompts[0]) + num_tokens) // _PAGE_SIZE)
        outputs = self.model.generate_batch(
            [list(prompt) for prompt in prompts],
            generation_config=_exactly(num_tokens),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=_PAGE_SIZE, num_blocks=len(prompts) * blocks_each + 1, max_batch_tokens=max_batch_tokens
            ),
            progress_bar=False,
            warmup=False,
        )
        lengths = {len(output.generated_tokens) for output in outputs.values()}
        assert len(outputs) == len(prompts), (len(outputs), len(prompts))
        assert lengths == {num_tokens}, lengths

    def choose_variant(self, kind: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> Variant:
        """The variant that is fastest for a few tokens of this workload. The first call tries all, as a warm-up."""
        key = (kind, len(prompts), len(prompts[0]), num_tokens)
        if key not in self._chosen:
            times = {}
            for variant in VARIANTS[kind]:
                self._time(kind, variant, prompts[:1], 1)
                times[variant] = self._time(kind, variant, prompts, min(num_tokens, _TRIAL_TOKENS))
            self._chosen[key] = min(times, key=lambda variant: times[variant])
        return self._chosen[key]

    def run(self, kind: str, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        """Seconds of one run; kind: "generate" or "continuous"."""
        return self._time(kind, self.choose_variant(kind, prompts, num_tokens), prompts, num_tokens)

    def _time(self, kind: str, variant: Variant, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        self.model.set_attn_implementation(variant.attention)
        began = time.perf_counter()
        if kind == "continuous":
            self.generate_continuously(prompts, num_tokens, variant.max_batch_tokens)
        else:
            self.generate(prompts, num_tokens)
        return time.perf_counter() - began


def _exactly(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=num_tokens, min_new_tokens=None, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
    )


def load_model(path: Path) -> PreTrainedModel:
    """transformers' Llama in float32 with the weights that llmengine reads from `path`."""
    source = without_blocks(open_model(path))
    model = LlamaForCausalLM(_hf_config(source.arch))
    state = dict(_hf_weights(source.arch, source.weights(torch.float32)))
    if source.arch.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    model.generation_config.eos_token_id = None
    return model.eval()


def _hf_config(arch: ModelArch) -> LlamaConfig:
    if arch.rope.type != "default":
        raise SystemExit(
            f"rope scaling of type {arch.rope.type!r} is not supported in this comparison; use another --model"
        )
    return LlamaConfig(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_heads,
        num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        max_position_embeddings=arch.max_position_embeddings,
        rms_norm_eps=arch.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": arch.rope.theta},
        tie_word_embeddings=arch.tie_word_embeddings,
        attention_bias=arch.attention_bias,
        mlp_bias=arch.mlp_bias,
        dtype="float32",
    )


def _hf_weights(arch: ModelArch, weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and tensors of transformers for llmengine's fused ones."""
    fused = fused_parts(arch)
    for name, tensor in weights:
        row = 0
        for part, shape in fused[name]:
            yield _hf_name(part), tensor[row : row + shape[0]]
            row += shape[0]


def _hf_name(name: str) -> str:
    if name in _HF_NAMES:
        return _HF_NAMES[name]
    layers, index, module, kind = name.split(".")
    return f"model.{layers}.{index}.{_HF_MODULES[module]}.{kind}"
