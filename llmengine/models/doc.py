"""Generator of docs/models.md from the data that the loaders use: `python -m llmengine.models.doc > docs/models.md`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from llmengine.checkpoints.huggingface_arch import arch_from_hf_config
from llmengine.models.arch import ROPE_TYPES, ModelArch
from llmengine.models.families import FAMILIES, ModelFamily
from llmengine.quantization.gguf_blocks import BLOCK_SIZES

_CONTEXT = 1024
_WIDTH = 120
_HEAD = """# Models

This page is generated from `models/families.py` by `python -m llmengine.models.doc`; a test keeps the two equal.

A model is a directory with `config.json` and weights (safetensors or `pytorch_model.bin`, one file or several), a GGUF
file, or a saved engine. Anything else raises `UnsupportedModelError` with a list of what is supported: mixtures of
experts, models that also read images or sound, other architectures, and options of a supported architecture that are
not in these tables.

Only the model's own weights are read and checked. These are ignored: buffers; tensors that are not floating point;
parts of a model other than the language model, with a warning that names them; copies in other formats; and anything in
an index except the names of files. Tensor names may have a prefix (`module.`, `_orig_mod.`, `language_model.`) or lack
`model.`, and an embedding may have more rows than the vocabulary.

Weights that tools for AWQ, GPTQ, AutoRound, compressed-tensors, FP8, MXFP4, NVFP4 or bitsandbytes quantized load as
they are, on CPUs ([which ones](quantization.md#checkpoints-that-are-quantized-already)). Others raise
`UnsupportedModelError`.

Adapters (LoRA, IA3, prompt tuning) are not supported. A directory that contains one (`adapter_config.json`,
`adapter_model.*` and the like), weights that were saved with one, and GGUF files of type `adapter` raise
`UnsupportedModelError`; merge the adapter into the weights first, with peft's `merge_and_unload()`. Adapters in
subdirectories, such as a training run's `checkpoint-500`, are ignored with a warning that names them.

## Families

One decoder computes all of them; a family is a row of data. Whatever a row does not mention is as in Llama: RMSNorm
before attention and MLP, rotary grouped-query attention, SiLU-gated MLP.
"""
_WHERE = """
## Where they run

Both CPU and CUDA run every family. "Native" is the CPU's compiled decoder, which only knows Llama's computation; for
other families torch's operators run every step. "Fused" means the CUDA backend's own kernels around the matrix
products, "generic" means cuBLAS and torch's functions one after another. On CUDA all families use the same attention
kernels.
"""
_NOTES = """
A "native" model with a sliding window runs natively only if `max_model_len` does not exceed the window.

## Rotary encodings

Supported types: {ropes}.

Cached prefixes must stay exact, so frequencies never depend on a request's length. `longrope` uses its short factors if
`max_model_len` is within the original context length, and its long factors otherwise. `dynamic` gives each position the
frequencies of a context that ends there.

`max_position_embeddings` limits the context of a model. `linear`, `dynamic` and `yarn` are often added to a config.json
that keeps the original value there; `max_model_len` may then be up to `factor` times the original context length.

## GGUF

For a model in several files (`NAME-00001-of-00003.gguf`, made by llama-gguf-split or the converter), give the path of
any of them or of their directory; an error names missing files. In a directory, projectors (`mmproj`) and importance
matrices beside the model are ignored. If a directory contains several models, give the path of one.

Tensor types:
{types}.

On a CPU, quantized tensors stay as they are where the native decoder multiplies them: a file of 4 bits takes 4 bits of
memory. [Quantization](quantization.md#gguf) says which types these are and how to choose otherwise. Elsewhere they are
dequantized to the model's dtype while they load.

Tokenizers: `llama` and `t5` (SentencePiece BPE and unigrams), and `gpt2` (byte-level BPE) with the pre-tokenizers of
all these families; the error for an unknown pre-tokenizer lists the known ones. If a file names no pre-tokenizer, text
is split by llama.cpp's default, with a logged warning.

Where the format has no key, the behaviour is llama.cpp's: Mistral files are Llamas without a window, every fourth layer
of SmolLM3 does not rotate, and Gemma's window pattern and score scale follow from the family and the number of layers.
"""
_PATTERNS = {
    "full": "",
    "all_sliding": "sliding window in all layers if config.json has one",
    "upper_sliding": "sliding window in the upper layers with `use_sliding_window`",
    "nope": "every fourth layer does not rotate",
    "alternating": "sliding window in all layers except one in {period}",
}
_NORMS = {
    "pre": "",
    "post": "norms after attention and MLP instead of before",
    "both": "norms before and after attention and MLP",
}
_QK_NORMS = {"none": "", "head": "norms over each head of q and k", "projection": "norms over all of q and all of k"}


def page() -> str:
    """The text of docs/models.md."""
    parts = [_HEAD, *_table(("Models", "config.json", "GGUF", "Differences"), _family_rows())]
    parts += [_WHERE, *_table(("Models", "CPU", "CUDA"), _backend_rows())]
    notes = _NOTES.format(
        ropes=", ".join(f"`{name}`" for name in ROPE_TYPES),
        types=textwrap.fill(", ".join(BLOCK_SIZES), _WIDTH),
    )
    return "\n".join(parts) + "\n" + notes


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _family_rows() -> Iterator[tuple[str, ...]]:
    for family in FAMILIES:
        gguf = f"`{family.gguf_architecture}`"
        yield family.title, f"`{family.architecture}`", gguf, "; ".join(_differences(family)) or "none"


def _backend_rows() -> Iterator[tuple[str, ...]]:
    for family in FAMILIES:
        arch = _example_arch(family)
        native = "native" if arch.is_llama(_CONTEXT) else "torch"
        yield family.title, native, "fused" if arch.has_llama_segments else "generic"


def _differences(family: ModelFamily) -> Iterator[str]:
    defaults = family.config_defaults
    texts = (
        family.qkv_bias and "biases of q, k and v",
        _QK_NORMS[family.qk_norm],
        _NORMS[family.norm_placement],
        family.norms_plus_one and "norms multiply by 1 + weight",
        family.hidden_act == "gelu_tanh" and "GELU (tanh) instead of SiLU",
        _PATTERNS[family.layer_pattern].format(period=defaults.get("sliding_window_pattern")),
        family.local_theta is not None and "layers with a window rotate with their own base",
        family.partial_rotary and "only part of each head may rotate",
        family.stored_fused and "q, k and v are stored as one tensor, gate and up as another",
        "attn_logit_softcapping" in defaults and "scores and logits are soft-capped",
        "query_pre_attn_scalar" in defaults and "scores are scaled by `query_pre_attn_scalar`",
        family.scaled_embedding and "embeddings are scaled",
        "attention_multiplier" in defaults and "embeddings, scores, residuals and logits are scaled",
    )
    return (text for text in texts if text)


def _example_arch(family: ModelFamily) -> ModelArch:
    """A small model of the family with the family's default options."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = {"architectures": [family.architecture], "num_hidden_layers": 12, "head_dim": 2, **dict.fromkeys(sizes, 8)}
    return arch_from_hf_config(config, family.architecture)


if __name__ == "__main__":
    print(page(), end="")
