"""docs/models.md, written from the data that the loaders use: `python -m llmengine.models.doc > docs/models.md`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from llmengine.checkpoints.gguf_file import BLOCK_SIZES
from llmengine.checkpoints.huggingface_arch import arch_from_hf_config
from llmengine.models.arch import ROPE_TYPES, ModelArch
from llmengine.models.families import FAMILIES, ModelFamily

_CONTEXT = 1024
_WIDTH = 120
_HEAD = """# Models

Written by `python -m llmengine.models.doc` from `models/families.py`; a test compares it.

A model is a directory with `config.json` and its weights (safetensors or `pytorch_model.bin`, one file or several), a
GGUF file, or a saved engine. Everything that is not in these tables raises `UnsupportedModelError`, which lists what
is: mixtures of experts, models that also read images or sound, other architectures, options of a known architecture
that are not computed.

Only the model's own weights are read and checked. Buffers, tensors of other types than floating point, other parts
beside the language model (they are named in a warning), copies in other formats, and what an index says beyond the
names of files do not matter; names may have a prefix (`module.`, `_orig_mod.`, `language_model.`) or lack `model.`, and
an embedding may have rows beyond the vocabulary.

An adapter in the directory (`adapter_config.json`, `adapter_model.*` and the like: LoRA, IA3, prompt tuning) raises
`UnsupportedModelError`, as do weights that were saved with one in them, and GGUF files of type `adapter`: merge it
first, with `merge_and_unload()` in peft. Adapters in subdirectories, such as a training run's `checkpoint-500`, are
named in a warning and not applied.

## Families

One decoder computes them all; a family is a row of data. What is not mentioned is as in Llama: RMSNorm before attention
and MLP, rotary grouped-query attention, SiLU-gated MLP.
"""
_WHERE = """
## Where they run

CPU and CUDA compute every family. "Native" is the CPU's compiled decoder, which knows Llama's computation; with another
one, torch's operators run every step. "Fused" are the CUDA backend's kernels around matrix products; "generic" are
cuBLAS and torch's functions one after another. Attention on CUDA is the same kernels for all.
"""
_NOTES = """
A sliding window matters to "native" only if a request may be longer: `max_model_len` up to the window keeps it.

## Rotary encodings

{ropes}. Where the frequencies would
depend on a request's length, they are a function of the model's limit or of the position instead, so that cached
prefixes stay exact: `longrope` takes its short factors if `max_model_len` is within the original context length and the
long ones otherwise, `dynamic` gives each position the frequencies of a context that ends there.

A model's limit is its `max_position_embeddings`. `linear`, `dynamic` and `yarn` are often added to a config.json that
keeps the original one there: `max_model_len` may then be up to `factor` times the original context length.

## GGUF

A model in several files (`NAME-00001-of-00003.gguf`, made by llama-gguf-split or the converter) is loaded by the path
of any of them, or of their directory; missing ones are named. In a directory, projectors (`mmproj`) and importance
matrices beside the model are passed over; of several models, give the path of one.

Tensor types:
{types}.

Tokenizers: `llama` and `t5` (SentencePiece BPE and unigrams), and `gpt2` (byte-level BPE) with the pre-tokenizers of
all these families; the error for an unknown one lists the known. A file that names none is split as llama.cpp does by
default, with a logged warning.

What the format has no key for is as in llama.cpp: files of Mistral are Llamas without a window, every fourth layer of
SmolLM3 does not rotate, Gemma's window pattern and score scale follow from the family and the number of layers.
"""
_PATTERNS = {
    "full": "",
    "all_sliding": "sliding window in all layers, where config.json has one",
    "upper_sliding": "sliding window in the upper layers with `use_sliding_window`",
    "nope": "every fourth layer does not rotate",
    "alternating": "sliding window in all but every {period}. layer",
}
_NORMS = {
    "pre": "",
    "post": "norms after attention and MLP, none before",
    "both": "norms before and after attention and MLP",
}
_QK_NORMS = {"none": "", "head": "norms of each head of q and k", "projection": "norms of all of q and all of k"}


def page() -> str:
    """Return docs/models.md."""
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
        arch = _sample(family)
        native = "native" if arch.is_llama(_CONTEXT) else "torch"
        yield family.title, native, "fused" if arch.has_llama_segments else "generic"


def _differences(family: ModelFamily) -> Iterator[str]:
    defaults = family.config_defaults
    texts = (
        family.qkv_bias and "biases of q, k and v",
        _QK_NORMS[family.qk_norm],
        _NORMS[family.norm_placement],
        family.norms_plus_one and "norms multiply by 1 + weight",
        family.hidden_act == "gelu_tanh" and "GELU (tanh) in place of SiLU",
        _PATTERNS[family.layer_pattern].format(period=defaults.get("sliding_window_pattern")),
        family.local_theta is not None and "windowed layers rotate with a base of their own",
        family.partial_rotary and "part of each head may rotate",
        family.stored_fused and "q, k and v, and gate and up, are stored as one tensor",
        "attn_logit_softcapping" in defaults and "scores and logits are soft-capped",
        "query_pre_attn_scalar" in defaults and "scores are scaled by `query_pre_attn_scalar`",
        family.scaled_embedding and "embeddings are scaled",
        "attention_multiplier" in defaults and "embeddings, scores, residuals and logits are scaled",
    )
    return (text for text in texts if text)


def _sample(family: ModelFamily) -> ModelArch:
    """Return a model of the family whose window, if it has one, is never left."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = {"architectures": [family.architecture], "num_hidden_layers": 12, "head_dim": 2, **dict.fromkeys(sizes, 8)}
    return arch_from_hf_config(config, family.architecture)


if __name__ == "__main__":
    print(page(), end="")
