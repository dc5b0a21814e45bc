"""The model's weights among the tensors in a Hugging Face directory's files, and their names.

Files contain more than a model's weights, and name them in more than one way. Tensors that cannot change the result are
ignored: buffers, tensors of other types, parts of a larger model. Any other unknown tensor is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from llmengine.checkpoints.canonical_weights import check_tensors, stored_shapes
from llmengine.checkpoints.metadata_fields import read_json_object
from llmengine.checkpoints.unsupported_adapters import refuse_adapter_tensors
from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.models.arch import ModelArch
from llmengine.models.families import family_of

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
WEIGHT_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""Dtypes from which weights can be read."""

_STORED_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "input_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "attention_out_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_SANDWICH_NAMES = {"post_attention_norm": "pre_feedforward_layernorm"}
_FUSED_NAMES = {
    **dict.fromkeys("qkv", "self_attn.qkv_proj"),
    **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
}

_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.\w+|rope\.freqs|masked_bias|position_ids|attention_mask|causal_mask|[qkv]_scale|kv_scale|[qkv]_zero_point)$"
)
"""Names of buffers that older versions of libraries saved, and of scales for a quantized KV cache."""

_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|input_scale"
    r"|weight_scale_2|weight_global_scale|weight_blocks|weight_scales|SCB)$|\.weight\.(absmax|quant_map|quant_state)"
)
_EMBEDDING_END = re.compile(r"(?P<prefix>(.*\.)?)embed_tokens\.weight")

TensorT = TypeVar("TensorT")


@dataclass(frozen=True, slots=True)
class StoredTensor(Generic[TensorT]):
    """A tensor in a file: `name` is as in the file, `dtype` is torch's name where torch has that dtype."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    tensor: TensorT


def stored_names(arch: ModelArch) -> Callable[[str], str]:
    """A function from a part's canonical name to its name in Hugging Face's files.

    `layers.0.q.weight` is `model.layers.0.self_attn.q_proj.weight`; all parts of a fused tensor have that tensor's
    name.
    """
    names = dict(_STORED_NAMES)
    if arch.norm_placement == "both":
        names |= _SANDWICH_NAMES
    if family_of(arch).stored_fused:
        names |= _FUSED_NAMES

    def stored_name(part: str) -> str:
        *layer, module, kind = part.split(".")
        prefix = f"model.{'.'.join(layer)}." if layer else ""
        return f"{prefix}{names[module]}.{kind}"

    return stored_name


def indexed_shards(directory: Path, file_name: str) -> dict[str, set[str]]:
    """File -> names of the tensors that the index assigns to it; no names for a file without an index.

    The index decides which files to read. The tensors that it lists matter only if two files have a tensor of the same
    name: some indices list tensors that were later removed from the files, or omit some that exist.
    """
    if not file_name.endswith(".index.json"):
        return {file_name: set()}
    index = read_json_object(directory / file_name)
    weight_map = index.fields("weight_map")
    shards: dict[str, set[str]] = {}
    for tensor in weight_map.values:
        file = weight_map.string(tensor)
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise weight_map.error(tensor, "the name of a file in the same directory")
        shards.setdefault(file, set()).add(tensor)
    if not shards:
        raise index.error("weight_map", "at least one tensor")
    missing = [file for file in shards if not (directory / file).is_file()]
    if missing:
        raise CorruptFileError(f"{index.where}: weight_map names files that do not exist: {', '.join(sorted(missing))}")
    return shards


def merge_shards(
    directory: Path, shards: Mapping[str, set[str]], read: Callable[[Path], Iterable[StoredTensor[TensorT]]]
) -> dict[str, StoredTensor[TensorT]]:
    """The tensors of all files by name; the index decides between two of the same name."""
    found: dict[str, StoredTensor[TensorT]] = {}
    for file, indexed in shards.items():
        for tensor in read(directory / file):
            first = found.get(tensor.name)
            if first is None or tensor.name in indexed:
                found[tensor.name] = tensor
            elif tensor.name not in shards[first.path.relative_to(directory).as_posix()]:
                raise CorruptFileError(
                    f"{tensor.path}: tensor {tensor.name!r} is also in {first.path.name}, and the index names "
                    "neither file"
                )
    return found


def language_model_tensors(
    directory: Path, tensors: Mapping[str, StoredTensor[TensorT]]
) -> dict[str, StoredTensor[TensorT]]:
    """The language model's tensors among `tensors`, by the names that transformers gives them.

    Raises `UnsupportedModelError` for those of an adapter.
    """
    refuse_adapter_tensors(tensors, str(directory))
    inside = _canonical_names(tensors)
    others = [name for name in tensors if name not in inside and not is_buffer(tensors[name])]
    if others:
        logger.warning(
            "%s: ignoring tensors that are not part of the language model: %s", directory, _name_list(others)
        )
    return {inside[name]: tensor for name, tensor in tensors.items() if name in inside}


def check_weights(
    arch: ModelArch,
    directory: Path,
    named: Mapping[str, StoredTensor[TensorT]],
    quantized: Collection[str] = (),
    is_zero: Callable[[StoredTensor[TensorT]], bool] = lambda tensor: False,
) -> None:
    """Raise unless `named` has the weights of `arch` by the names of `stored_names`, and beyond only harmless tensors.

    Raises `CorruptFileError` for a missing or misshapen weight and for tensors that look like weights but have no place
    in the model, `UnsupportedModelError` for weights of another dtype, and for quantized ones that no
    `quantization_config` describes.

    Args:
        quantized: linears whose tensors are checked already.
        is_zero: whether all of a tensor's elements are 0. Some tools give every linear such a bias.
    """
    expected = stored_shapes(arch, stored_names(arch))
    expected = {name: shape for name, shape in expected.items() if name.removesuffix(".weight") not in quantized}
    others = {name: tensor for name, tensor in named.items() if not _belongs(name, quantized)}
    _refuse_quantized(directory, [name for name in expected if name not in others], others)
    for name in expected:
        if name in others and others[name].dtype not in WEIGHT_DTYPES:
            tensor = others[name]
            raise UnsupportedModelError(
                f"{tensor.path}: tensor {tensor.name!r} has dtype {tensor.dtype}, which is not supported; supported: "
                f"{', '.join(WEIGHT_DTYPES)}"
            )

    def is_harmless(name: str) -> bool:
        is_head = name == HEAD and arch.tie_word_embeddings
        is_bias = name.endswith(".bias") and name.removesuffix(".bias") in quantized
        return is_head or is_buffer(others[name]) or (is_bias and is_zero(others[name]))

    shapes = {name: tensor.shape for name, tensor in others.items()}
    check_tensors(
        expected,
        shapes,
        str(directory),
        is_harmless,
        lambda name: str(others[name].path),
        may_be_padded=(EMBEDDING, HEAD),
    )


def _belongs(name: str, quantized: Collection[str]) -> bool:
    """Whether a tensor is one of a quantized linear's, its bias aside."""
    module, suffix = module_and_suffix(name)
    return module in quantized and suffix != "bias"


def module_and_suffix(name: str) -> tuple[str, str]:
    """A tensor's module and what the tensor is there: "weight", or "weight.absmax" where a weight has parts."""
    module, dot, rest = name.partition(".weight.")
    if dot:
        return module, f"weight.{rest}"
    module, _, suffix = name.rpartition(".")
    return module, suffix


def is_buffer(tensor: StoredTensor[TensorT]) -> bool:
    """Whether a tensor that is not one of the model's weights can be ignored."""
    return _BUFFER.search(tensor.name) is not None or tensor.dtype not in WEIGHT_DTYPES or 0 in tensor.shape


def _canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Name in the files -> name as transformers writes it, for all tensors of the language model.

    The model may have been saved without its head (`layers.0...`) or as part of a larger one (`module.`, `_orig_mod.`,
    `language_model.`). The prefix of the embedding's name is the prefix of all names.
    """
    names = list(names)
    prefixes = [match["prefix"] for name in names if (match := _EMBEDDING_END.fullmatch(name))]
    if "model." in prefixes or len(prefixes) != 1:
        return {name: name for name in names if name.startswith(("model.", "lm_head."))}
    prefix = prefixes[0]
    outer = prefix.removesuffix("model.") if prefix == "model." or prefix.endswith(".model.") else ""
    canonical = {}
    for name in names:
        if name.startswith((f"{outer}lm_head.", "lm_head.")):
            canonical[name] = name[name.index("lm_head.") :]
        elif name.startswith(prefix):
            canonical[name] = f"model.{name.removeprefix(prefix)}"
    return canonical


def _refuse_quantized(directory: Path, missing: list[str], names: Iterable[str]) -> None:
    found = [name for name in names if _QUANTIZED.search(name)]
    if missing and found:
        raise UnsupportedModelError(
            f"{directory}: {_name_list(missing)} missing: weights are quantized ({_name_list(found)}) in a way that "
            "quantization_config in config.json does not describe; correct it, or load the unquantized checkpoint and "
            "set quant_config"
        )


def _name_list(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
