"""Tokenizers from a model's files: a Hugging Face directory, a GGUF file, an engine directory.

All three end in a `tokenizers.Tokenizer`, and transformers is not imported where it need not be: `AutoTokenizer` takes
3 s to import, tokenizers 0.07 s. `tokenizer.json` describes a tokenizer completely (normalizer, splits, merges, BOS),
so a directory with one is read without transformers, and so is one with a SentencePiece model of the usual kind; only
vocabularies in other formats go through `AutoTokenizer`.
The two agree except where `AutoTokenizer` builds the pipeline anew from the class that tokenizer_config.json names and
so drops parts of tokenizer.json, such as SmolLM2's split of digits: the file is what the model was trained with. Both
ignore `add_bos_token` in tokenizer_config.json then, because tokenizer.json says what is added.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import AddedToken, Tokenizer, processors

from llmengine.chat_template import ChatTemplate
from llmengine.errors import CorruptFileError, InvalidRequestError, ModelLoadError, UnsupportedModelError
from llmengine.tokenizer import added_end_ids, check_text, encode_with
from llmengine.tokenizer_sentencepiece import sentencepiece_metadata

if TYPE_CHECKING:
    from llmengine.models.fused import ModelSource

TokenizerKind = Literal["huggingface", "gguf", "engine", "dummy"]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULT, _TOOL_USE = "default", "tool_use"


class LoadedTokenizer:
    """A tokenizer with its special tokens and chat template; safe to use from several threads.

    Attributes:
        special_ids: ids left out of the text when `SamplingParams.skip_special_tokens` is set.
        bos_token_id: None where the model has none.
        eos_token_id: likewise.
        end_token_ids: ids that the files name as ends of an answer: EOS, and a GGUF file's ends of turn and of message.
        known_end_ids: ids of tokens that end one by their text, whatever the files say; see `llmengine.end_tokens`.
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
        self._special_tokens = dict(special_tokens or {})
        self._sources = dict(chat_templates or {})
        for name in self._sources:
            if not name.replace("-", "_").isidentifier():  # it becomes a file name in save()
                raise ModelLoadError(f"{source}: chat template name {name!r} is none of letters, digits, '_' and '-'")
        self._source = source
        self._templates: dict[str, ChatTemplate] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        eos = frozenset() if self.eos_token_id is None else frozenset({self.eos_token_id})
        self.end_token_ids: frozenset[int] = end_token_ids | eos
        self.known_end_ids = added_end_ids(added)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.has_chat_template = bool(self._sources)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; special tokens written out in it are recognised.

        With `add_special_tokens`, BOS and the like are added as the model's own tokenizer does; text from
        `apply_chat_template` brings them itself. Raises `InvalidRequestError` for text that UTF-8 cannot hold,
        `CorruptFileError` for a tokenizer that contradicts itself.
        """
        check_text(text)
        try:
            return encode_with(self._backend, text, add_special_tokens)
        except BaseException as error:
            if not _is_from_library(error):
                raise
            raise CorruptFileError(f"{self._source}: the tokenizer cannot encode {text[:80]!r:.80}: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text, special tokens included; ids outside the vocabulary have none."""
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
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt that the model's template makes of `messages`; `variables` are the template's own.

        Raises `InvalidRequestError` when there is no template, for malformed messages, and for what the template
        rejects; `ModelLoadError` when the template does not compile.
        """
        if not self._sources:
            raise InvalidRequestError(
                "this model has no chat template: send a prompt, or put a chat_template.jinja beside its tokenizer"
            )
        name = _TOOL_USE if tools and _TOOL_USE in self._sources else _DEFAULT
        if name not in self._sources:
            name = next(iter(self._sources))
        template = self._templates.get(name)
        if template is None:
            template = ChatTemplate(self._sources[name], self._special_tokens, self._source)
            self._templates[name] = template
        return template.render(messages, add_generation_prompt, tools, variables)

    def check_ends(self, vocab_size: int) -> None:
        """Raise `CorruptFileError` if the files name an end of text that a model with this vocabulary does not have."""
        for token_id in sorted(self.end_token_ids):
            if token_id >= vocab_size:
                token = self._backend.id_to_token(token_id)
                raise CorruptFileError(
                    f"{self._source}: eos_token {token!r} has id {token_id}, outside the model's vocabulary "
                    f"[0, {vocab_size})"
                )

    def tokenizer_json(self) -> str:
        """Return the text of its tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def save(self, directory: str | Path) -> list[Path]:
        """Write the files that `load_tokenizer` and transformers read, and return their paths."""
        directory = Path(directory)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        files = {
            "tokenizer.json": self.tokenizer_json(),
            "tokenizer_config.json": json.dumps({**config, **self._special_tokens}, indent=2, ensure_ascii=False),
        }
        for name, source in self._sources.items():
            file = "chat_template.jinja" if name == _DEFAULT else f"additional_chat_templates/{name}.jinja"
            files[file] = source
        paths = []
        for file, text in files.items():
            path = directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
            paths.append(path)
        return paths

    def _named_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        token_id: int | None = None if token is None else self._backend.token_to_id(token)
        return token_id


def load_tokenizer(path: str | Path, kind: TokenizerKind) -> LoadedTokenizer:
    """Return the tokenizer of the model at `path`.

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
        from llmengine.models.gguf_file import read_gguf

        return tokenizer_from_gguf(read_gguf(path).metadata, str(path))
    directory = path / "tokenizer" if kind == "engine" and (path / "tokenizer").is_dir() else path
    if not directory.is_dir():
        raise ModelLoadError(f"{directory}: no such directory, so there is no tokenizer to read")
    if (directory / "tokenizer.json").is_file():
        return _read_tokenizer_json(directory)
    if kind == "engine":
        raise ModelLoadError(f"{directory / 'tokenizer.json'}: no such file")
    if (directory / "tokenizer.model").is_file():
        tokenizer = _read_sentencepiece(directory)
        if tokenizer is not None:
            return tokenizer
    return _read_with_transformers(directory)


def source_tokenizer(source: ModelSource) -> LoadedTokenizer:
    """Return the tokenizer of an opened model; raises as `load_tokenizer` does."""
    if source.gguf is not None:
        return tokenizer_from_gguf(source.gguf.metadata, str(source.gguf.path))
    tokenizer = load_tokenizer(source.tokenizer_path, source.kind)
    tokenizer.check_ends(source.arch.vocab_size)
    return tokenizer


def tokenizer_to_save(source: ModelSource) -> LoadedTokenizer | None:
    """Return what writes a model's tokenizer into an engine directory, None if its files are copied.

    They are if they come from such a directory, or if no tokenizer can be made of them.
    """
    if source.kind == "engine":
        return None
    try:
        return source_tokenizer(source)
    except ModelLoadError:
        return None


def tokenizer_from_gguf(metadata: Mapping[str, Any], source: str) -> LoadedTokenizer:
    """Return the tokenizer in GGUF `metadata`, as `read_gguf` gives it; `source` names the file in messages."""
    from llmengine.models.end_ids import gguf_named_end_ids
    from llmengine.models.fields import Fields
    from llmengine.tokenizer_gguf import build_backend, token_ids

    backend = build_backend(metadata, source)
    ids = token_ids(metadata, source)
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[ids[key]] for name, key in names.items() if key in ids}
    templates = {}
    for key, value in metadata.items():
        if key.startswith("tokenizer.chat_template") and not isinstance(value, str):
            continue  # "tokenizer.chat_templates" lists the names of the others
        if key == "tokenizer.chat_template":
            templates[_DEFAULT] = value
        elif key.startswith("tokenizer.chat_template."):
            templates[key.removeprefix("tokenizer.chat_template.")] = value
    ends = frozenset(gguf_named_end_ids(Fields(metadata, source), len(tokens)))
    return LoadedTokenizer(backend, special, templates, ends, source)


def _read_tokenizer_json(directory: Path) -> LoadedTokenizer:
    path = directory / "tokenizer.json"
    try:
        backend = Tokenizer.from_file(str(path))
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_from_library(error):
            raise
        raise CorruptFileError(f"{path}: is no tokenizer: {error}") from error
    config = _read_json(directory / "tokenizer_config.json")
    return _configured(backend, _special_tokens(directory, config), config, directory)


def _read_sentencepiece(directory: Path) -> LoadedTokenizer | None:
    """Return the tokenizer of a tokenizer.model, None if it is not of a kind that can be read here.

    Unlike a tokenizer.json it does not say whether BOS and EOS are added: tokenizer_config.json does.
    """
    from llmengine.tokenizer_gguf import build_backend, token_ids

    path = directory / "tokenizer.model"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
    metadata = sentencepiece_metadata(data, str(path))
    if metadata is None:
        return None
    added = _read_json(directory / "added_tokens.json")  # of before there was an added_tokens_decoder
    decoder = {str(token_id): {"content": token, "normalized": False} for token, token_id in added.items()}
    config = {"added_tokens_decoder": decoder, **_read_json(directory / "tokenizer_config.json")}
    tokens, ids = metadata["tokenizer.ggml.tokens"], token_ids(metadata, str(path))
    special = {f"{name}_token": tokens[ids[name]] for name in ("bos", "eos") if name in ids}
    special |= _special_tokens(directory, config)
    backend = build_backend(metadata, str(path))
    tokenizer = _configured(backend, special, config, directory)
    adds = {"bos": config.get("add_bos_token", True), "eos": config.get("add_eos_token", False)}
    begin, end = ([special[f"{name}_token"]] if adds[name] and special.get(f"{name}_token") else [] for name in adds)
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys([*begin, *end])],
    )
    return tokenizer


def _configured(
    backend: Tokenizer, special: Mapping[str, str], config: Mapping[str, Any], directory: Path
) -> LoadedTokenizer:
    """Return the tokenizer with what tokenizer_config.json says, and the files beside it."""
    try:
        _mark_special(backend, special, config)
        templates = _chat_templates(directory, config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{directory / 'tokenizer_config.json'}: malformed entry: {error!r}") from error
    return LoadedTokenizer(backend, special, templates, _mapped_end_ids(backend, directory), str(directory))


def _mapped_end_ids(backend: Tokenizer, directory: Path) -> frozenset[int]:
    """Return the EOS of special_tokens_map.json: tokenizer_config.json may name another, and then both are ends."""
    token = _special_tokens(directory, {}).get("eos_token")
    token_id = None if token is None else backend.token_to_id(token)
    return frozenset() if token_id is None else frozenset({token_id})


def _is_from_library(error: BaseException) -> bool:
    """Say whether the tokenizers library failed: it raises bare Exception, and what is no Exception for its panics."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    named = {**_read_json(directory / "special_tokens_map.json"), **config}
    special = {}
    for name in _NAMED_TOKENS:
        value = named.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            special[name] = value
        elif value is not None:
            raise CorruptFileError(f"{directory / 'tokenizer_config.json'}: {name}={value!r} is not a string")
    return special


def _mark_special(backend: Tokenizer, special: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Add tokens that only the configuration names, and mark the named ones special, as transformers does."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    entries = config.get("added_tokens_decoder")
    if isinstance(entries, Mapping):
        for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
            if entry.get("content") not in added:
                token = AddedToken(**{name: entry[name] for name in entry if not name.startswith("_")})
                (backend.add_special_tokens if token.special else backend.add_tokens)([token])
                added[token.content] = token
    missing = [content for content in _unnamed_special_tokens(config) if content not in added]
    for content in (*special.values(), *missing):
        if content not in added or not added[content].special:
            backend.add_special_tokens([AddedToken(content, normalized=False, special=True)])


def _unnamed_special_tokens(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is listed under the old and the new key for special tokens beside those of `_NAMED_TOKENS`."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or []
        if not isinstance(listed, list | Mapping):
            raise TypeError(f"{key} must be a list of tokens or an object of them")
        for token in listed.values() if isinstance(listed, Mapping) else listed:
            content = token.get("content") if isinstance(token, Mapping) else token
            if not isinstance(content, str):
                raise TypeError(f"{key} holds {token!r:.80}, which is no token")
            yield content


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Files win over tokenizer_config.json, as in transformers."""
    templates: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates[_DEFAULT] = value
    elif isinstance(value, list):
        templates.update({entry["name"]: entry["template"] for entry in value})
    if not all(isinstance(text, str) for item in templates.items() for text in item):
        raise TypeError("chat_template must be a string or a list of objects with name and template, both strings")
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    files[_DEFAULT] = directory / "chat_template.jinja"
    for name, path in files.items():
        if path.is_file():
            templates[name] = _read_text(path)
    return templates


def _read_with_transformers(directory: Path) -> LoadedTokenizer:
    if not any(directory.glob("*token*")) and not any(directory.glob("vocab*")) and not any(directory.glob("*.model")):
        raise ModelLoadError(
            f"{directory}: has no tokenizer.json nor any other tokenizer file; "
            "LLM(..., tokenizer=...) takes another one, LLM(..., enable_tokenizer=False) works on token ids"
        )
    from transformers import AutoTokenizer

    try:
        wrapped = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # anything: the files are not ours, and neither is the reader
        raise ModelLoadError(f"{directory}: transformers cannot read the tokenizer: {error}") from error
    backend = getattr(wrapped, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UnsupportedModelError(
            f"{directory}: {type(wrapped).__name__} has no tokenizer.json form; pass LLM(tokenizer=...) instead"
        )
    special = {name: str(value) for name in _NAMED_TOKENS if (value := getattr(wrapped, name, None)) is not None}
    template = wrapped.chat_template
    templates = {_DEFAULT: template} if isinstance(template, str) else template
    return LoadedTokenizer(backend, special, templates, source=str(directory))


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in `path`, {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise CorruptFileError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path}: is not UTF-8: {error}") from error
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror or error}") from error
