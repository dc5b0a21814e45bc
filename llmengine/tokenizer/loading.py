"""Tokenizers from a model's files: a Hugging Face directory, a GGUF file, an engine directory.

One of two libraries encodes text: tokenizers, for a tokenizer.json and for formats that are converted to one, and
sentencepiece, for a SentencePiece model wherever it is stored. transformers reads only the other formats, because
`AutoTokenizer` takes 3 s to import (tokenizers takes 0.07 s) and drops what its classes do not know, such as SmolLM2's
splitting of digits or the normalizer of a SentencePiece model. The files beside a tokenizer are read in `files`;
`json_tokenizer` applies them to a tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer

from llmengine.chat.template import ChatTemplates
from llmengine.errors import CorruptFileError, ModelLoadError, UnsupportedModelError
from llmengine.tokenizer.bounds import TextBound
from llmengine.tokenizer.files import NAMED_TOKENS, TokenizerConfig, read_text, read_tokenizer_config
from llmengine.tokenizer.json_tokenizer import apply_tokenizer_config
from llmengine.tokenizer.protocol import added_end_ids, check_text, encode_with, encode_with_limit
from llmengine.tokenizer.sentencepiece_model import read_sentencepiece
from llmengine.tokenizer.sentencepiece_tokenizer import SentencePieceCodec, codec_of_directory

if TYPE_CHECKING:
    from llmengine.checkpoints.source import ModelSource

TokenizerKind = Literal["huggingface", "gguf", "engine", "dummy"]

_DEFAULT = "default"


class LoadedTokenizer:
    """A tokenizer with its special tokens and chat template; safe to use from several threads.

    Attributes:
        special_ids: ids left out of the text when `SamplingParams.skip_special_tokens` is set.
        bos_token_id: None if the model has none.
        eos_token_id: None if the model has none.
        end_token_ids: ids that the files name as ends of an answer: EOS, and a GGUF file's ends of turn and of message.
        known_end_ids: ids of tokens whose text is known to end an answer, whatever the files say; see `end_tokens.py`.
        vocab_size: one above the highest id.
        has_chat_template: whether `apply_chat_template` can work.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        end_token_ids: frozenset[int] = frozenset(),
        source: str = "tokenizer",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.known_end_ids = added_end_ids(added)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values(), default=-1) + 1
        self._bound = TextBound(backend, vocab)
        self._set_common_parts(special_tokens or {}, backend.token_to_id, chat_templates or {}, end_token_ids, source)

    def _set_common_parts(
        self,
        special_tokens: Mapping[str, str],
        id_of: Callable[[str], int | None],
        chat_templates: Mapping[str, str],
        end_token_ids: frozenset[int],
        source: str,
    ) -> None:
        """Set the attributes that do not depend on the library that encodes."""
        self._special_tokens = dict(special_tokens)
        self._templates = ChatTemplates(chat_templates, self._special_tokens, source)
        for name in self._templates.sources:
            if not name.replace("-", "_").isidentifier():  # it becomes a file name in save()
                raise ModelLoadError(
                    f"{source}: the name of a chat template must consist of letters, digits, '_' and '-', not {name!r}"
                )
        self._source = source
        named = (self._special_tokens.get(role) for role in ("bos_token", "eos_token"))
        self.bos_token_id, self.eos_token_id = (None if token is None else id_of(token) for token in named)
        eos = frozenset() if self.eos_token_id is None else frozenset({self.eos_token_id})
        self.end_token_ids: frozenset[int] = end_token_ids | eos
        self.has_chat_template = bool(self._templates.sources)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written out in it are recognised.

        With `add_special_tokens`, BOS and the like are added as the model's own tokenizer does; text from
        `apply_chat_template` brings them itself. Raises `InvalidRequestError` for text that UTF-8 cannot encode,
        `CorruptFileError` for an inconsistent tokenizer.
        """
        check_text(text)
        with self._encoding(text):
            return encode_with(self._backend, text, add_special_tokens)

    def encode_with_limit(self, text: str, max_tokens: int, add_special_tokens: bool = True) -> list[int] | int:
        """The ids as from `encode`, or, for more than `max_tokens`, possibly a lower bound of their number instead."""
        with self._encoding(text):
            return encode_with_limit(self._backend, self._bound, text, max_tokens, add_special_tokens)

    @contextmanager
    def _encoding(self, text: str) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not _is_from_library(error):
                raise
            raise CorruptFileError(f"{self._source}: the tokenizer cannot encode {text[:80]!r:.80}: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens included; ids outside the vocabulary have no text."""
        try:
            text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        except BaseException as error:
            if not _is_from_library(error):
                raise
            raise CorruptFileError(f"{self._source}: the tokenizer cannot decode {token_ids!r:.80}: {error}") from error
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt that the model's template makes from `messages`; see `ChatTemplate.render`.

        `variables` may also have `chat_template`, the name of another template of the model's or a template. Raises
        `InvalidRequestError` when there is no template, for malformed messages, and for what the template rejects or
        ignores; `ModelLoadError` when the template does not compile.
        """
        return self._templates.render(messages, add_generation_prompt, tools, variables)

    def chat_template_variables(self, chat_template: str | None = None, *, has_tools: bool = False) -> frozenset[str]:
        """Names of the variables that the template for such a conversation reads."""
        return self._templates.choose(chat_template, has_tools=has_tools).variables

    def chat_template_source(self, chat_template: str | None = None, *, has_tools: bool = False) -> str:
        """The text of the template for such a conversation."""
        return self._templates.source(chat_template, has_tools=has_tools)

    def check_ends(self, vocab_size: int) -> None:
        """Raise `CorruptFileError` if the files name an end of text that a model with this vocabulary does not have."""
        for token_id in sorted(self.end_token_ids):
            if token_id >= vocab_size:
                token = self._token_of(token_id)
                raise CorruptFileError(
                    f"{self._source}: eos_token {token!r} has id {token_id}, which is outside the model's vocabulary "
                    f"[0, {vocab_size})"
                )

    def tokenizer_json(self) -> str:
        """The text of its tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def save(self, directory: str | Path) -> list[Path]:
        """Write the files that `load_tokenizer` and transformers read, and return their paths."""
        files = self._files()
        for name, source in self._templates.sources.items():
            file = "chat_template.jinja" if name == _DEFAULT else f"additional_chat_templates/{name}.jinja"
            files[file] = source.encode()
        paths = []
        for file, data in files.items():
            path = Path(directory) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            paths.append(path)
        return paths

    def _token_of(self, token_id: int) -> str | None:
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def _files(self) -> dict[str, bytes]:
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return {
            "tokenizer.json": self.tokenizer_json().encode(),
            "tokenizer_config.json": _json_bytes({**config, **self._special_tokens}),
        }


class SentencePieceTokenizer(LoadedTokenizer):
    """A `LoadedTokenizer` whose ids are those of the sentencepiece library."""

    def __init__(
        self,
        codec: SentencePieceCodec,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        end_token_ids: frozenset[int] = frozenset(),
        source: str = "tokenizer",
    ) -> None:
        self._codec = codec
        self.special_ids = codec.special_ids
        self.known_end_ids = added_end_ids(codec.added)
        self.vocab_size = codec.vocab_size
        self._set_common_parts(special_tokens or {}, codec.token_to_id, chat_templates or {}, end_token_ids, source)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, as `LoadedTokenizer.encode` does; other threads run meanwhile."""
        check_text(text)
        return self._codec.encode(text, add_special_tokens)

    def encode_with_limit(self, text: str, max_tokens: int, add_special_tokens: bool = True) -> list[int] | int:
        """The ids as from `encode`, or, for more than `max_tokens`, possibly a lower bound of their number instead."""
        least = self._codec.min_tokens(text)
        return least if least > max_tokens else self.encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens included; ids outside the vocabulary have no text."""
        return self._codec.decode(token_ids)

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for inside a text."""
        return self._codec.token_bytes()

    def tokenizer_json(self) -> str:
        """Raise `UnsupportedModelError`, since no tokenizer.json gives the same ids; see `token_bytes`."""
        raise UnsupportedModelError(
            f"{self._source}: a SentencePiece model cannot be written as a tokenizer.json; use token_bytes()"
        )

    def _token_of(self, token_id: int) -> str | None:
        return self._codec.id_to_token(token_id)

    def _files(self) -> dict[str, bytes]:
        return {
            "tokenizer.model": self._codec.model.serialized(),
            "tokenizer_config.json": _json_bytes({**self._codec.flags(), **self._special_tokens}),
        }


def load_tokenizer(path: str | Path, kind: TokenizerKind) -> LoadedTokenizer:
    """The tokenizer of the model at `path`.

    Args:
        path: "huggingface": a directory with tokenizer.json, tokenizer.model or, read by transformers from local files
            and without running code from them, another format; "gguf": the file; "engine": the directory that
            `LLM.save` wrote, or the `tokenizer` directory in it; "dummy": as "huggingface", beside weights that are not
            read.
        kind: which of them.

    Raises `ModelLoadError` naming what is missing, `CorruptFileError` naming the file that is damaged,
    `UnsupportedModelError` for a tokenizer that cannot be built.
    """
    path = Path(path)
    if kind == "gguf":
        from llmengine.checkpoints.gguf_split import read_split_gguf

        return tokenizer_from_gguf(read_split_gguf(path).metadata, str(path))
    directory = path / "tokenizer" if kind == "engine" and (path / "tokenizer").is_dir() else path
    if not directory.is_dir():
        raise ModelLoadError(f"{directory}: no such directory to read a tokenizer from")
    if (directory / "tokenizer.json").is_file():
        return _read_tokenizer_json(directory)
    if (directory / "tokenizer.model").is_file():
        tokenizer = _read_sentencepiece(directory)
        if tokenizer is not None:
            return tokenizer
    if kind == "engine":
        raise ModelLoadError(f"{directory / 'tokenizer.json'}: no such file, nor a tokenizer.model beside it")
    return _read_with_transformers(directory)


def source_tokenizer(source: ModelSource) -> LoadedTokenizer:
    """The tokenizer of an opened model; raises as `load_tokenizer` does."""
    if source.kind == "gguf":
        return tokenizer_from_gguf(source.tokenizer_metadata, str(source.tokenizer_path))
    tokenizer = load_tokenizer(source.tokenizer_path, source.kind)
    tokenizer.check_ends(source.arch.vocab_size)
    return tokenizer


def tokenizer_to_save(source: ModelSource) -> LoadedTokenizer | None:
    """The tokenizer to write into an engine directory; None if its files are to be copied.

    Files are copied if they come from such a directory, or if no tokenizer can be built from them.
    """
    if source.kind == "engine":
        return None
    try:
        return source_tokenizer(source)
    except ModelLoadError:
        return None


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> LoadedTokenizer:
    """The tokenizer in GGUF `metadata`, as `read_gguf` returns it; `source` names the file in messages."""
    from llmengine.checkpoints.end_token_ids import gguf_named_end_ids
    from llmengine.checkpoints.metadata_fields import Fields
    from llmengine.tokenizer.gguf_tokenizer import build_backend, token_ids

    backend = build_backend(metadata, source)
    ids = token_ids(metadata, source)
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[ids[key]] for name, key in names.items() if key in ids}
    templates = {}
    for key, value in metadata.items():
        if key.startswith("tokenizer.chat_template") and not isinstance(value, str):
            continue  # "tokenizer.chat_templates" lists the names of the other templates
        if key == "tokenizer.chat_template":
            templates[_DEFAULT] = value
        elif key.startswith("tokenizer.chat_template."):
            templates[key.removeprefix("tokenizer.chat_template.")] = value
    ends = frozenset(gguf_named_end_ids(Fields(metadata, source), len(tokens)))
    if isinstance(backend, SentencePieceCodec):
        return SentencePieceTokenizer(backend, special, templates, ends, source)
    return LoadedTokenizer(backend, special, templates, ends, source)


def _read_tokenizer_json(directory: Path) -> LoadedTokenizer:
    path = directory / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_from_library(error):
            raise
        raise CorruptFileError(f"{path}: not a valid tokenizer: {error}") from error
    config = read_tokenizer_config(directory).with_defaults(backend.token_to_id)
    try:
        backend = apply_tokenizer_config(backend, config)
    except BaseException as error:
        if not _is_from_library(error):
            raise
        raise CorruptFileError(f"{path}: the tokenizer contradicts {config.path.name}: {error}") from error
    ends = config.end_ids(backend.token_to_id)
    return LoadedTokenizer(backend, config.special_tokens, _chat_templates(directory, config), ends, str(directory))


def _read_sentencepiece(directory: Path) -> SentencePieceTokenizer | None:
    """The tokenizer in a tokenizer.model; None if the file is not a SentencePiece model."""
    path = directory / "tokenizer.model"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    model = read_sentencepiece(data, str(path))
    if model is None:
        return None
    config = read_tokenizer_config(directory)
    codec, special = codec_of_directory(model, config, str(path))
    ends = config.end_ids(codec.token_to_id)
    return SentencePieceTokenizer(codec, special, _chat_templates(directory, config), ends, str(directory))


def _is_from_library(error: BaseException) -> bool:
    """True if the tokenizers library failed: it raises a bare Exception, or for a panic a class outside Exception."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _chat_templates(directory: Path, config: TokenizerConfig) -> dict[str, str]:
    """Files win over tokenizer_config.json, as in transformers."""
    templates: dict[str, str] = {}
    value = config.values.get("chat_template")
    try:
        if isinstance(value, str):
            templates[_DEFAULT] = value
        elif isinstance(value, list):
            templates.update({entry["name"]: entry["template"] for entry in value})
        if not all(isinstance(text, str) for item in templates.items() for text in item):
            raise TypeError(
                'chat_template must be a string or a list of objects with the strings "name" and "template"'
            )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{config.path}: malformed entry: {error!r}") from error
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    files[_DEFAULT] = directory / "chat_template.jinja"
    for name, path in files.items():
        if path.is_file():
            templates[name] = read_text(path)
    return templates


def _read_with_transformers(directory: Path) -> LoadedTokenizer:
    if not any(directory.glob("*token*")) and not any(directory.glob("vocab*")) and not any(directory.glob("*.model")):
        raise ModelLoadError(
            f"{directory}: no tokenizer.json or other tokenizer file; pass LLM(..., tokenizer=...), or "
            "LLM(..., enable_tokenizer=False) to work with token ids"
        )
    for path in sorted(directory.glob("*.model")):
        if path.name != "tokenizer.model" and read_sentencepiece(path.read_bytes(), str(path)) is not None:
            raise UnsupportedModelError(
                f"{path}: a SentencePiece model of this name is not supported, because its token ids may follow other "
                "rules; supported: tokenizer.model; pass LLM(tokenizer=...)"
            )
    from transformers import AutoTokenizer

    try:
        wrapped = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # any exception: neither the files nor the reader are ours
        raise ModelLoadError(f"{directory}: transformers cannot read the tokenizer: {error}") from error
    backend = getattr(wrapped, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UnsupportedModelError(
            f"{directory}: {type(wrapped).__name__} cannot be written as a tokenizer.json; pass LLM(tokenizer=...)"
        )
    special = {name: str(value) for name in NAMED_TOKENS if (value := getattr(wrapped, name, None)) is not None}
    template = wrapped.chat_template
    templates = {_DEFAULT: template} if isinstance(template, str) else template
    return LoadedTokenizer(backend, special, templates, source=str(directory))


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
