"""Changes that the files beside a tokenizer.json make to it.

A tokenizer.json describes a tokenizer completely, so it takes precedence over what transformers' classes would build.
Tokens that only the other files have are added, as in every version of transformers. Some classes always obeyed
`add_bos_token`, `add_eos_token` and `add_prefix_space`, others always ignored them; transformers 5 ignores the first
two in all classes, so DeepSeek's distilled models lose their BOS. Here, a flag that is set applies to the classes that
obeyed it when the models were made.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.tokenizer.files import TokenizerConfig

_ADDING_ENDS = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer"})
"""Classes that put BOS and EOS where `add_bos_token` and `add_eos_token` say.
Without either flag the file's own rule stays; if one is set, the other defaults to true for BOS and false for EOS."""

_SENTENCEPIECE = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer"})
_BYTE_LEVEL = frozenset({"GPT2Tokenizer", "Qwen2Tokenizer"})
"""Classes that obey `add_prefix_space`; byte-level ones default to false."""


def apply_tokenizer_config(backend: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer with the tokens and flags of `config`: `backend` itself, changed in place, or a replacement.

    Raises `CorruptFileError` if a token gets another id than the files say, `UnsupportedModelError` for
    a flag that cannot be obeyed.
    """
    backend = _with_prefix_space(backend, config)
    _add_tokens(backend, config)
    _add_end_tokens(backend, config)
    return backend


def _add_tokens(backend: Tokenizer, config: TokenizerConfig) -> None:
    """Add the tokens that only the configuration has, in the order of their ids, and mark the named tokens special."""
    special = {token.content for token in (*config.named.values(), *config.unnamed) if token is not None}
    for token_id, token in sorted(config.added.items()):
        token = _as_special(token) if token.content in special else token
        if repr(backend.get_added_tokens_decoder().get(token_id)) != repr(token):
            _add_token(backend, token)
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise CorruptFileError(
                f"{config.path.parent}: token {token.content!r} has id {found} in tokenizer.json, expected {token_id} "
                "as in the files beside it"
            )
    for named in (*config.named.values(), *config.unnamed):
        if named is None:
            continue
        known = next((t for t in backend.get_added_tokens_decoder().values() if t.content == named.content), None)
        if known is None or (not known.special and named in config.named.values()):
            _add_token(backend, named if known is None else _as_special(known))


def _add_token(backend: Tokenizer, token: AddedToken) -> None:
    (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _as_special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _add_end_tokens(backend: Tokenizer, config: TokenizerConfig) -> None:
    flags = config.flags
    if config.tokenizer_class not in _ADDING_ENDS or not {"add_bos_token", "add_eos_token"} & flags.keys():
        return
    begin = _added_end(backend, config, "bos_token", flags.get("add_bos_token", True))
    end = _added_end(backend, config, "eos_token", flags.get("add_eos_token", False))
    backend.post_processor = processors.TemplateProcessing(
        single=[*(token for token, _ in begin), "$A", *(token for token, _ in end)],
        special_tokens=list(dict.fromkeys([*begin, *end])),
    )


def _added_end(backend: Tokenizer, config: TokenizerConfig, role: str, is_added: bool) -> list[tuple[str, int]]:
    token = config.special_tokens.get(role)
    token_id: int | None = None if token is None else backend.token_to_id(token)
    if not is_added:
        return []
    if token is None or token_id is None:
        if config.flags.get(f"add_{role}"):
            raise CorruptFileError(f"{config.path}: add_{role} is true, but {role} is missing")
        return []
    return [(token, token_id)]


def _with_prefix_space(backend: Tokenizer, config: TokenizerConfig) -> Tokenizer:
    wanted = config.flags.get("add_prefix_space")
    if wanted is None and config.tokenizer_class in _BYTE_LEVEL:
        wanted = False
    if wanted is None or config.tokenizer_class not in _BYTE_LEVEL | _SENTENCEPIECE:
        return backend
    state = json.loads(backend.to_str())
    pre = state["pre_tokenizer"] or {}
    if config.tokenizer_class in _BYTE_LEVEL and pre.get("type") == "ByteLevel":
        if pre["add_prefix_space"] == wanted:
            return backend
        pre["add_prefix_space"] = wanted
    elif config.tokenizer_class in _SENTENCEPIECE and _adds_prefix_space(state):
        if wanted:
            return backend
        _drop_prefix_space(state)
    elif config.tokenizer_class in _SENTENCEPIECE and wanted and not _is_byte_level(state):
        raise UnsupportedModelError(
            f"{config.path}: add_prefix_space=true contradicts tokenizer.json, which adds no space before a text; "
            "correct one of them, or pass LLM(tokenizer=...)"
        )
    else:
        return backend
    return Tokenizer.from_str(json.dumps(state))


def _pipeline_steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if not part:
        return []
    found: list[dict[str, Any]] = part[key] if part["type"] == "Sequence" else [part]
    return found


def _is_byte_level(state: dict[str, Any]) -> bool:
    return any(step["type"] == "ByteLevel" for step in _pipeline_steps(state["pre_tokenizer"], "pretokenizers"))


def _adds_prefix_space(state: dict[str, Any]) -> bool:
    """True if a SentencePiece-like pipeline puts a space before the text."""
    prepends = any(step["type"] == "Prepend" for step in _pipeline_steps(state["normalizer"], "normalizers"))
    metaspaces = (
        step for step in _pipeline_steps(state["pre_tokenizer"], "pretokenizers") if step["type"] == "Metaspace"
    )
    return prepends or any(step["prepend_scheme"] != "never" for step in metaspaces)


def _drop_prefix_space(state: dict[str, Any]) -> None:
    steps = [step for step in _pipeline_steps(state["normalizer"], "normalizers") if step["type"] != "Prepend"]
    state["normalizer"] = {"type": "Sequence", "normalizers": steps} if steps else None
    for step in _pipeline_steps(state["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    decoder = state["decoder"]
    for step in _pipeline_steps(decoder, "decoders"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    if decoder and decoder["type"] == "Sequence":
        decoder["decoders"] = [step for step in decoder["decoders"] if step["type"] != "Strip"]
