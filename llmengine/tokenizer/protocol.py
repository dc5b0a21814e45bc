"""Text to token ids and back: what a tokenizer must offer, and adapters for tokenizers of other libraries.

Importing this module loads no tokenizer library; `llmengine.tokenizer.loading` reads tokenizers from files, and
`llmengine.tokenizer.detokenizer` turns generated ids into text as they arrive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llmengine.checks import requirement
from llmengine.errors import ConfigError, InvalidRequestError
from llmengine.tokenizer.bounds import TextBound
from llmengine.tokenizer.detokenizer import IncrementalDetokenizer as IncrementalDetokenizer
from llmengine.tokenizer.end_tokens import END_TOKENS, known_end_ids

if TYPE_CHECKING:
    from llmengine.chat.template import ChatTemplates

_FEW_CHARS = 1024
"""Characters that are tokenized within half a millisecond."""

_MANY_CHARS = 2**20
"""Characters that are encoded as UTF-8 within a millisecond."""


@runtime_checkable
class Tokenizer(Protocol):
    """The two methods that `LLM(tokenizer=...)` needs; `adapt_tokenizer` wraps other known kinds.

    Optional attributes are used where present: `special_ids` (ids left out of the text when
    `SamplingParams.skip_special_tokens` is set), `end_token_ids` (ids that end an answer, in addition to the model's
    own; without it, `eos_token_id`); for structured output `token_bytes()`, the bytes of each id, or
    `tokenizer_json()`, the text of a tokenizer.json.
    """

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with the special tokens that the model expects around a prompt."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, special tokens included; incomplete UTF-8 becomes U+FFFD."""


@runtime_checkable
class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer with a chat template.

    Optional: `chat_template_variables(chat_template, *, has_tools)`, the names of the variables that the template
    reads. Without it, keywords of a chat that `apply_chat_template` does not name are passed on only if it raises for
    unknown ones. `chat_template_source(chat_template, *, has_tools)`, the text of the template, shows how the model
    marks reasoning and tool calls. Without it, answers are text only, unless a chat names a `tool_format`.
    """

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; text from a template already has its special tokens."""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text for `messages`; `variables` are passed on to the template.

        Raises `InvalidRequestError` for messages that the template rejects.
        """


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 is BOS and 257 EOS; for tests and demonstrations.

    `encode` adds neither BOS nor EOS. `decode` gives no text for ids above 255. It names no end
    tokens, since a `FakeBackend` may generate any id.
    """

    bos_token_id = 256
    eos_token_id = 257
    vocab_size = 258
    special_ids = frozenset({256, 257})
    end_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`; raises `InvalidRequestError` for lone surrogates."""
        check_text(text)
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the bytes; each maximal invalid sequence becomes one U+FFFD."""
        return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id."""
        return [*(bytes((value,)) for value in range(256)), b"<bos>", b"<eos>"]


def check_text(text: str) -> None:
    """Raise `InvalidRequestError` unless `text` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise requirement(InvalidRequestError, "the text to tokenize", "a string", text)
    if text.isascii():
        return  # a flag of the string, known without reading it
    for begin in range(0, len(text), _MANY_CHARS):  # lets other threads run in between
        try:
            text[begin : begin + _MANY_CHARS].encode()
        except UnicodeEncodeError as error:
            index = begin + error.start
            raise InvalidRequestError(
                f"the text has a lone surrogate at index {index} ({text[index]!r}), which UTF-8 cannot encode"
            ) from None


def encode_with(backend: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Ids of `text` from a `tokenizers.Tokenizer`."""
    ids: list[int] = _encoding(backend, text, add_special_tokens).ids
    return ids


def encode_with_limit(
    backend: Any, bound: TextBound, text: str, max_tokens: int, add_special_tokens: bool = True
) -> list[int] | int:
    """The ids as from `encode_with`; for more than `max_tokens`, a lower bound of their number instead.

    Text that is certain to be longer is not tokenized.
    """
    if len(text) > max_tokens and (least := bound.min_tokens(text)) > max_tokens:
        return least
    check_text(text)
    encoding = _encoding(backend, text, add_special_tokens)
    ids: list[int] | int = len(encoding) if len(encoding) > max_tokens else encoding.ids
    return ids


def _encoding(backend: Any, text: str, add_special_tokens: bool) -> Any:
    """The library's encoding of `text`.

    Its `encode` holds the interpreter lock, so a megabyte would stop every thread for a second. Its batch method
    releases the lock, and runs a batch of one on this thread.
    """
    if len(text) <= _FEW_CHARS:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]


def added_end_ids(added: Mapping[int, Any]) -> frozenset[int]:
    """Ids of the added tokens (id -> `AddedToken`) that are known to end an answer."""
    found = {token.content: token_id for token_id, token in added.items() if token.content in END_TOKENS}
    return known_end_ids(found, {token.content for token in added.values() if token.special})


def without_second_bos(tokenizer: Tokenizer, text: str, token_ids: list[int]) -> list[int]:
    """Ids of `text` with one BOS where `text` begins with its own and the tokenizer added another.

    Text from a chat template often begins with BOS; models answer worse with two of them.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None or token_ids[:2] != [bos, bos]:
        return token_ids
    written = tokenizer.decode([bos])
    return token_ids[1:] if text.startswith(written) and not text.startswith(2 * written) else token_ids


class TransformersTokenizer:
    """A transformers tokenizer as a `ChatTokenizer`: special tokens stay in the text, spaces are not cleaned up."""

    def __init__(self, tokenizer: Any) -> None:
        self._wrapped = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(special.union(tokenizer.all_special_ids))
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.known_end_ids = added_end_ids(added)
        self._known_templates: tuple[dict[str, str], dict[str, Any], ChatTemplates] | None = None
        # The first call resets stored truncation and padding, which must not happen while another thread encodes.
        tokenizer.encode("")
        self._bound = _transformers_bound(tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, with BOS and the like when `add_special_tokens`."""
        check_text(text)
        return list(self._wrapped.encode(text, add_special_tokens=add_special_tokens))

    def encode_with_limit(self, text: str, max_tokens: int, add_special_tokens: bool = True) -> list[int] | int:
        """The ids, or a lower bound of their number that is above `max_tokens`."""
        if self._bound is not None and (least := self._bound.min_tokens(text)) > max_tokens:
            return least
        return self.encode(text, add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens included."""
        text: str = self._wrapped.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt that the tokenizer's own template makes from `messages`, by the rules of `ChatTemplate`.

        A class that overrides transformers' `apply_chat_template` renders the prompt itself. Raises
        `InvalidRequestError` when there is no template or it rejects the messages.
        """
        templates = self._templates()
        if templates is not None:
            return templates.render(messages, add_generation_prompt, tools, variables)
        adds = not variables.get("continue_final_message") if add_generation_prompt is None else add_generation_prompt
        try:
            text: str = self._wrapped.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=adds, tokenize=False, **variables
            )
        except Exception as error:  # the template's and transformers' own errors have no common base
            raise InvalidRequestError(f"the chat template rejects the messages: {error}") from error
        return text

    def chat_template_variables(
        self, chat_template: str | None = None, *, has_tools: bool = False
    ) -> frozenset[str] | None:
        """Names of the variables that its template reads; None if they are not known."""
        templates = self._templates()
        return None if templates is None else templates.choose(chat_template, has_tools=has_tools).variables

    def chat_template_source(self, chat_template: str | None = None, *, has_tools: bool = False) -> str | None:
        """The text of its template; None if it is not known."""
        templates = self._templates()
        return None if templates is None else templates.source(chat_template, has_tools=has_tools)

    def _templates(self) -> ChatTemplates | None:
        """The templates that the tokenizer has now; None if it does not use them in the usual way."""
        from llmengine.chat.template import ChatTemplates

        method = getattr(type(self._wrapped).apply_chat_template, "__module__", None)
        if method != "transformers.tokenization_utils_base":
            return None
        given = self._wrapped.chat_template
        if given is None:
            raise InvalidRequestError("the tokenizer has no chat template; send a prompt, or set its chat_template")
        sources = {"default": given} if isinstance(given, str) else dict(given)
        special_tokens = dict(self._wrapped.special_tokens_map)
        if self._known_templates is None or self._known_templates[:2] != (sources, special_tokens):
            templates = ChatTemplates(sources, special_tokens, "tokenizer")
            self._known_templates = (sources, special_tokens, templates)
        return self._known_templates[2]

    def tokenizer_json(self) -> str:
        """The text of its tokenizer.json; raises `AttributeError` where it has no such form."""
        text: str = self._wrapped.backend_tokenizer.to_str()
        return text

    def save(self, directory: str | Path) -> list[Path]:
        """Write the files that transformers writes for it, and return their paths."""
        return [Path(path) for path in self._wrapped.save_pretrained(str(directory))]


def _transformers_bound(tokenizer: Any) -> TextBound | None:
    """The bound for a transformers tokenizer; None if its class overrides how text is encoded."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    encoders = [getattr(type(tokenizer), name, None) for name in ("encode", "__call__", "_encode_plus")]
    if not hasattr(backend, "get_added_tokens_decoder") or not all(
        getattr(encoder, "__module__", "").startswith("transformers.tokenization_utils") for encoder in encoders
    ):
        return None
    return TextBound(backend, backend.get_vocab())


class _EncodingTokenizer:
    """A `tokenizers.Tokenizer`, whose `encode` returns an object with `ids`, as a `Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._wrapped = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.known_end_ids = added_end_ids(added)
        self._bound = TextBound(tokenizer, tokenizer.get_vocab())

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with what the post-processor adds."""
        check_text(text)
        return encode_with(self._wrapped, text)

    def encode_with_limit(self, text: str, max_tokens: int) -> list[int] | int:
        """The ids, or a lower bound of their number that is above `max_tokens`."""
        return encode_with_limit(self._wrapped, self._bound, text, max_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text, special tokens included."""
        text: str = self._wrapped.decode(list(token_ids), skip_special_tokens=False)
        return text

    def tokenizer_json(self) -> str:
        """The text of its tokenizer.json."""
        text: str = self._wrapped.to_str()
        return text

    def save(self, directory: str | Path) -> list[Path]:
        """Write tokenizer.json, and return its path."""
        path = Path(directory) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._wrapped.save(str(path))
        return [path]


def adapt_tokenizer(tokenizer: Any) -> Tokenizer:
    """The `tokenizer` as a `Tokenizer`: wrapped if it comes from transformers or tokenizers, else unchanged.

    Raises `ConfigError` naming the methods that are missing.
    """
    missing = [name for name in ("encode", "decode") if not callable(getattr(tokenizer, name, None))]
    if missing or isinstance(tokenizer, type):
        fault = f"lacks {' and '.join(missing)}" if missing else "is a class, not an instance"
        raise ConfigError(
            f"tokenizer={tokenizer!r:.200} {fault}; "
            "pass an object with encode(text) -> list[int] and decode(token_ids) -> str"
        )
    if hasattr(tokenizer, "all_special_ids") and hasattr(tokenizer, "convert_ids_to_tokens"):
        return TransformersTokenizer(tokenizer)
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        return _EncodingTokenizer(tokenizer)
    adapted: Tokenizer = tokenizer
    return adapted
