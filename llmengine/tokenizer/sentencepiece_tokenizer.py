"""Ids of SentencePiece models, from the sentencepiece library itself.

The library defines the ids of a model: normalization tables, the order of merges among equal scores, unused pieces,
words and characters as pieces. Conversions to other tokenizers lose some of this. The library does not know what
transformers adds around it: tokens that are matched before SentencePiece sees the text, and a space before each
stretch between them or only before the first. `SentencePieceCodec` adds that part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models

from llmengine.errors import CorruptFileError, UnsupportedModelError
from llmengine.tokenizer.files import TokenizerConfig
from llmengine.tokenizer.sentencepiece_model import PieceType, SentencePieceModel, check_charsmap, with_dummy_prefix

Prefix = Literal["always", "first", "never"]
"""Where a space is added: before each stretch of text between added tokens, before the whole text only, or nowhere."""

SPACE = "\u2581"

_CLASSES = frozenset(
    {"", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizer", "PreTrainedTokenizerFast"}
    | {"TokenizersBackend", "SentencePieceBackend", "MistralTokenizer", "InternLM2Tokenizer", "YiTokenizer"}
)
"""Classes that encode with the model and only add tokens, BOS and EOS around the text."""


class SentencePieceCodec:
    """Text to ids and back with the sentencepiece library, around added tokens, which are matched first.

    Safe to use from several threads. The library releases the interpreter lock while it encodes.

    Attributes:
        vocab_size: one above the highest id.
        special_ids: ids of the added tokens that are special.
    """

    def __init__(
        self,
        model: SentencePieceModel,
        added: Mapping[int, AddedToken],
        prefix: Prefix,
        source: str,
        begin_ids: Sequence[int] = (),
        end_ids: Sequence[int] = (),
    ) -> None:
        """Build a codec for `model` with the `added` tokens by id, which may rename pieces.

        `begin_ids` and `end_ids` are added around a text by `encode(..., add_special_tokens=True)`. Raises
        `CorruptFileError` naming `source` for a model that the library refuses.
        """
        check_charsmap(model.charsmap, source)
        self.model = model
        self.added = dict(added)
        self.prefix = prefix
        self._begin, self._end = list(begin_ids), list(end_ids)
        # If the model adds a space but the files say otherwise, a leading space in the text is kept, as in
        # transformers, although SentencePiece drops leading spaces.
        self._keeps_space = prefix != "always" and model.add_dummy_prefix and model.remove_extra_whitespaces
        data = model.serialized()
        spaced = _processor(data, True, source) if prefix != "never" or self._keeps_space else None
        self._plain: Any = spaced if prefix == "always" else _processor(data, False, source)
        self._spaced: Any = self._plain if spaced is None else spaced
        self._texts: list[str | None] = [piece.text for piece in model.pieces]
        self._texts += [None] * (max(added, default=-1) + 1 - len(self._texts))
        for token_id, token in added.items():
            self._texts[token_id] = token.content
        self.vocab_size = len(self._texts)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._ids = {text: token_id for token_id, text in reversed([*enumerate(self._texts)]) if text is not None}
        keeps_text = model.byte_fallback and not model.charsmap and not model.remove_extra_whitespaces
        swallows = any(token.lstrip or token.rstrip for token in added.values())
        self._max_chars = max(map(len, self._ids), default=0) if keeps_text and not swallows else 0
        self._splitter, self._split_ids = _splitter(added)
        self._decoder = _decoder(model, prefix)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`."""
        ids: list[int] = list(self._begin) if add_special_tokens else []
        for start, end, token_id in self._stretches(text):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids += self._encode_stretch(text[start:end], is_first=start == 0)
        return ids + self._end if add_special_tokens else ids

    def min_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens in `text`; 0 if none is known.

        A token stands for at most as many characters as it has, unless text is normalized, a run of unknown characters
        becomes one token, or a token swallows the spaces beside it.
        """
        return math.ceil(len(text) / self._max_chars) if self._max_chars else 0

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, added and control tokens included; ids outside the vocabulary have none."""
        size, texts = self.vocab_size, self._texts
        tokens = [text for i in token_ids if 0 <= i < size and (text := texts[i]) is not None]
        decoded: str = self._decoder.decode(tokens)
        return decoded.removesuffix(" ") if self.model.treat_whitespace_as_suffix else decoded

    def token_to_id(self, token: str) -> int | None:
        """Id of a piece or added token; None if there is none."""
        return self._ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The piece or added token with this id; None if there is none."""
        return self._texts[token_id] if 0 <= token_id < self.vocab_size else None

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for inside a text."""
        found = []
        for token_id, text in enumerate(self._texts):
            if token_id not in self.added and self._is_byte(token_id):
                found.append(bytes((int(str(text)[3:5], 16),)))
            else:
                found.append((text or "").replace(SPACE, " ").encode())
        return found

    def flags(self) -> dict[str, Any]:
        """Content of a tokenizer_config.json from which `codec_of_directory` builds this codec again."""
        tokens = {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(self.added.items())
        }
        flags: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": False}
        flags |= {"add_bos_token": bool(self._begin), "add_eos_token": bool(self._end)}
        flags["legacy"] = self.prefix != "first"
        if self.model.add_dummy_prefix != (self.prefix != "never"):
            flags["add_prefix_space"] = self.prefix != "never"
        return {**flags, "added_tokens_decoder": tokens}

    def _is_byte(self, token_id: int) -> bool:
        return token_id < len(self.model.pieces) and self.model.pieces[token_id].type == PieceType.BYTE

    def _encode_stretch(self, text: str, is_first: bool) -> list[int]:
        spaced = self.prefix == "always" or (self.prefix == "first" and is_first)
        if not spaced and self._keeps_space:
            spaced = text.startswith((" ", SPACE))
        ids: list[int] = (self._spaced if spaced else self._plain).encode(text)
        return ids

    def _stretches(self, text: str) -> Iterator[tuple[int, int, int | None]]:
        """Start, end and id of each added token in `text`; id None for the text between them."""
        if self._splitter is None:
            if text:
                yield 0, len(text), None
            return
        (encoding,) = self._splitter.encode_batch([text], add_special_tokens=False)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if end > start:
                yield start, end, self._split_ids[token]


def codec_of_directory(
    model: SentencePieceModel, config: TokenizerConfig, source: str
) -> tuple[SentencePieceCodec, dict[str, str]]:
    """A codec for `model` with the settings of the files beside it, and the tokens by role.

    Control pieces and tokens that the files add are matched in the text. User-defined pieces are left to SentencePiece
    unless the files list them. Unlike a tokenizer.json, the model does not say whether BOS and EOS are added: the files
    do, and by default only BOS is added. `legacy` defaults to true, the behaviour before the flag existed.
    """
    if config.tokenizer_class not in _CLASSES:
        raise UnsupportedModelError(
            f"{config.path}: tokenizer_class={config.values.get('tokenizer_class')!r} is not supported with a "
            f"tokenizer.model; supported: {', '.join(sorted(_CLASSES - {''}))}; or pass LLM(tokenizer=...)"
        )
    legacy, prefix_space = config.flags.get("legacy", True), config.flags.get("add_prefix_space")
    if model.treat_whitespace_as_suffix and (prefix_space is not None or not legacy):
        raise UnsupportedModelError(
            f"{config.path}: legacy=false and add_prefix_space are not supported with treat_whitespace_as_suffix, "
            f"which {source} sets"
        )
    adds_space = model.add_dummy_prefix if prefix_space is None else prefix_space
    prefix: Prefix = "never" if not adds_space else "always" if legacy else "first"
    named = {f"{name}_token": model.pieces[token_id].text for name, token_id in model.special_ids.items()}
    named = {role: token for role, token in named.items() if role not in config.named} | config.special_tokens
    added = _added_tokens(model, config, named, source)
    ids = {token.content: token_id for token_id, token in added.items()}
    ends = []
    for role, default in (("bos_token", True), ("eos_token", False)):
        is_added = config.flags.get(f"add_{role}", default)
        if is_added and role not in named and f"add_{role}" in config.flags:
            raise CorruptFileError(f"{config.path}: add_{role} is true, but {role} is missing")
        ends.append([ids[named[role]]] if is_added and role in named else [])
    return SentencePieceCodec(model, added, prefix, source, *ends), named


def _added_tokens(
    model: SentencePieceModel, config: TokenizerConfig, named: Mapping[str, str], source: str
) -> dict[int, AddedToken]:
    """Tokens that are matched in the text before SentencePiece sees it, by id."""
    ids = {piece.text: token_id for token_id, piece in reversed([*enumerate(model.pieces)])}
    added = {
        token_id: AddedToken(piece.text, normalized=False, special=True)
        for token_id, piece in enumerate(model.pieces)
        if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
    }
    for token_id, token in sorted(config.added.items()):
        if ids.setdefault(token.content, token_id) != token_id:
            raise CorruptFileError(
                f"{config.path.parent}: token {token.content!r} has id {ids[token.content]} in {source}, expected "
                f"{token_id} as in the files beside it"
            )
        added[token_id] = token
    special = [config.named.get(role) or AddedToken(text, normalized=False) for role, text in named.items()]
    for token in (*special, *config.unnamed):
        known_id = ids.setdefault(token.content, max(len(model.pieces), max(added, default=-1) + 1))
        known = added.get(known_id, token)
        added[known_id] = AddedToken(
            known.content,
            single_word=known.single_word,
            lstrip=known.lstrip,
            rstrip=known.rstrip,
            normalized=known.normalized,
            special=True,
        )
    return added


def _processor(data: bytes, add_dummy_prefix: bool, source: str) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=with_dummy_prefix(data, add_dummy_prefix))
    except (RuntimeError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{source}: sentencepiece refuses the model: {error}") from error


def _splitter(added: Mapping[int, AddedToken]) -> tuple[Tokenizer | None, list[int | None]]:
    """A tokenizer that finds the added tokens, and the token that each of its ids stands for.

    The tokenizers library defines the flags of added tokens: its rules decide where tokens overlap, where words end and
    which spaces around a token belong to it.
    """
    if not added:
        return None, []
    splitter = Tokenizer(models.WordLevel(vocab={"": 0}, unk_token=""))
    meaning: list[int | None] = [None]
    for special in (True, False):
        chosen = [(token_id, token) for token_id, token in sorted(added.items()) if token.special == special]
        (splitter.add_special_tokens if special else splitter.add_tokens)([token for _, token in chosen])
        meaning += [token_id for token_id, _ in chosen]
    return splitter, meaning


def _decoder(model: SentencePieceModel, prefix: Prefix) -> Any:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix != "never" and not model.treat_whitespace_as_suffix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
