"""What the files beside a tokenizer say: tokenizer_config.json, special_tokens_map.json and added_tokens.json.

Precedence follows transformers: `added_tokens_decoder` in tokenizer_config.json replaces the two other, older files;
without it, special_tokens_map.json takes precedence over tokenizer_config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from llmengine.errors import CorruptFileError, ModelLoadError, UnsupportedModelError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
_DEFAULT_TOKENS = {
    "LlamaTokenizer": _LLAMA_TOKENS,
    "CodeLlamaTokenizer": _LLAMA_TOKENS,
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>"},
}
"""Class -> its BOS and EOS if the files name neither."""

_CLASSES = {
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2Tokenizer"),
    **dict.fromkeys(("granite", "olmo2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    "smollm3": "PreTrainedTokenizerFast",
}
"""`model_type` in config.json -> the class that transformers uses if none is named; Llama's for other types."""

_FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens")


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """The files beside a tokenizer, read and checked.

    Attributes:
        path: path of tokenizer_config.json, for messages.
        tokenizer_class: the class in transformers, without "Fast": the class named here or in config.json, or
            else the one that the model's type implies; "" if there is neither.
        named: role ("bos_token") -> token; None if the file says that there is none.
        unnamed: special tokens without a role.
        end_tokens: the EOS of either file; if they differ, both end an answer.
        added: id -> token, for tokens that the model's vocabulary may lack.
        flags: `legacy` and similar flags that the file has and that are not null.
        values: all of tokenizer_config.json.
    """

    path: Path
    tokenizer_class: str
    named: Mapping[str, AddedToken | None]
    unnamed: tuple[AddedToken, ...]
    end_tokens: frozenset[str]
    added: Mapping[int, AddedToken]
    flags: Mapping[str, bool]
    values: Mapping[str, Any] = field(repr=False)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Role -> text of the token."""
        return {role: token.content for role, token in self.named.items() if token is not None}

    def with_defaults(self, id_of: Callable[[str], int | None]) -> TokenizerConfig:
        """A copy with the default BOS and EOS of its class where none are named and the vocabulary has them."""
        defaults = {
            role: AddedToken(text, normalized=False, special=True)
            for role, text in _DEFAULT_TOKENS.get(self.tokenizer_class, {}).items()
            if role not in self.named and id_of(text) is not None
        }
        return replace(self, named={**self.named, **defaults})

    def end_ids(self, id_of: Callable[[str], int | None]) -> frozenset[int]:
        """Ids of `end_tokens`."""
        found = map(id_of, self.end_tokens)
        return frozenset(token_id for token_id in found if token_id is not None)


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """The settings in the files of `directory`; missing files are skipped.

    Raises `CorruptFileError` naming the file and the entry that is malformed, `UnsupportedModelError` for a flag that
    is not supported.
    """
    path = directory / "tokenizer_config.json"
    values = read_json(path)
    try:
        flags = {name: _checked_flag(name, values[name]) for name in _FLAGS if values.get(name) is not None}
        if flags.pop("split_special_tokens", False):
            raise UnsupportedModelError(f"{path}: split_special_tokens=true is not supported; pass LLM(tokenizer=...)")
        entries = values.get("added_tokens_decoder")
        older = read_json(directory / "special_tokens_map.json")
        named = values if entries is not None else {**values, **older}
        roles = {role: _named_token(role, named[role]) for role in NAMED_TOKENS if role in named}
        ends = [_named_token("eos_token", file.get("eos_token")) for file in (values, older)]
        unnamed = tuple(token for key in _LISTS for token in _token_list(key, named.get(key)))
        if entries is not None:
            added = {
                int(token_id): _as_added_token("added_tokens_decoder", entry) for token_id, entry in entries.items()
            }
        else:
            special = {token.content for token in (*roles.values(), *unnamed) if token is not None}
            added = _older_added_tokens(directory / "added_tokens.json", special)
        tokenizer_class = _tokenizer_class(directory, values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path}: malformed entry: {error}") from error
    end_tokens = frozenset(token.content for token in ends if token is not None)
    return TokenizerConfig(path, tokenizer_class, roles, unnamed, end_tokens, added, flags, values)


def _tokenizer_class(directory: Path, values: Mapping[str, Any]) -> str:
    name = values.get("tokenizer_class")
    if not name:
        model = read_json(directory / "config.json")
        implied = _CLASSES.get(str(model["model_type"]), "LlamaTokenizer") if "model_type" in model else ""
        name = model.get("tokenizer_class") or implied
    return str(name) if name == "PreTrainedTokenizerFast" else str(name).removesuffix("Fast")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise CorruptFileError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: the content must be a JSON object, not {value!r:.80}")
    return value


def read_text(path: Path) -> str:
    """The text in `path`; raises `CorruptFileError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path}: not valid UTF-8: {error}") from error
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error


def _checked_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, not {value!r:.80}")
    return value


def _named_token(role: str, value: Any) -> AddedToken | None:
    return None if value is None else _as_added_token(role, value, is_special=True)


def _token_list(key: str, value: Any) -> list[AddedToken]:
    if value is None:
        return []
    if not isinstance(value, list | Mapping):
        raise TypeError(f"{key} must be a list or an object of tokens, not {value!r:.80}")
    return [
        _as_added_token(key, token, is_special=True)
        for token in (value.values() if isinstance(value, Mapping) else value)
    ]


def _as_added_token(where: str, entry: Any, is_special: bool = False) -> AddedToken:
    """The token that a string, or an object with flags, describes."""
    if isinstance(entry, str):
        return AddedToken(entry, normalized=False, special=is_special)
    content = entry.get("content") if isinstance(entry, Mapping) else None
    if not isinstance(content, str):
        raise TypeError(f'{where} must be a string or an object with a string "content", not {entry!r:.80}')
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = {name: _checked_flag(f"{name} of {where} {content!r}", entry[name]) for name in names if name in entry}
    return AddedToken(content, **{**flags, "special": is_special or flags.get("special", False)})


def _older_added_tokens(path: Path, special: set[str]) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    for token, token_id in read_json(path).items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise CorruptFileError(f"{path}: the id of {token!r} must be an integer of at least 0, not {token_id!r}")
        if token_id in added:
            raise CorruptFileError(
                f"{path}: tokens {added[token_id].content!r} and {token!r} have the same id {token_id}"
            )
        is_special = token in special
        added[token_id] = AddedToken(token, normalized=not is_special, special=is_special)
    return added
