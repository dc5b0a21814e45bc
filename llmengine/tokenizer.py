"""Text to token ids and back: what a tokenizer must offer, and how generated ids become text while they arrive.

Importing this module loads no tokenizer library; `llmengine.tokenizer_loading` reads tokenizers from files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llmengine.end_tokens import END_TOKENS, known_end_ids
from llmengine.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from llmengine.chat_template import ChatTemplates

_REPLACEMENT = "\ufffd"
_MAX_HELD_CHARS = 3
_MAX_WINDOW = 16
_NUM_CONTEXT_TOKENS = 8

_FEW_CHARS = 1024
"""Text that is tokenized within half a millisecond."""

_MANY_CHARS = 2**20
"""Text that UTF-8 is made of within a millisecond."""


@runtime_checkable
class Tokenizer(Protocol):
    """The two methods that `LLM(tokenizer=...)` needs; `adapt_tokenizer` makes other known kinds fit.

    Optional attributes are used where present: `special_ids` (ids left out of the text when
    `SamplingParams.skip_special_tokens` is set), `end_token_ids` (those that end an answer, beside the model's own; in
    its absence `eos_token_id`); for structured output `tokenizer_json()`, the text of a tokenizer.json, or
    `token_bytes()`, the bytes of each id.
    """

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with the special tokens that the model expects around a prompt."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens included; incomplete UTF-8 becomes U+FFFD."""


@runtime_checkable
class ChatTokenizer(Tokenizer, Protocol):
    """A tokenizer with a chat template."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; text from the template has its special tokens and needs no others."""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt text of `messages`; `variables` are passed on to the template.

        Raises `InvalidRequestError` for messages that do not fit it.
        """


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 is BOS and 257 EOS; for tests and demonstrations.

    `encode` adds neither BOS nor EOS. `decode` gives no text for ids above 255. An LLM does not end at EOS because of
    this tokenizer: a `FakeBackend` may generate any id.
    """

    bos_token_id = 256
    eos_token_id = 257
    vocab_size = 258
    special_ids = frozenset({256, 257})
    end_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`; raises `InvalidRequestError` for lone surrogates."""
        check_text(text)
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the bytes; each maximal invalid sequence becomes one U+FFFD."""
        return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        """Return the bytes of each id."""
        return [*(bytes((value,)) for value in range(256)), b"<bos>", b"<eos>"]


def check_text(text: str) -> None:
    """Raise `InvalidRequestError` unless `text` is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise InvalidRequestError(f"the text to tokenize is a {type(text).__name__}, not a str")
    if text.isascii():
        return  # known without a look at the text
    for begin in range(0, len(text), _MANY_CHARS):  # other threads get on in between
        try:
            text[begin : begin + _MANY_CHARS].encode()
        except UnicodeEncodeError as error:
            index = begin + error.start
            raise InvalidRequestError(
                f"the text holds a lone surrogate at index {index} ({text[index]!r}), which is no character"
            ) from None


def encode_with(backend: Any, text: str, add_special_tokens: bool = True) -> list[int]:
    """Return the ids that a `tokenizers.Tokenizer` gives `text`.

    Its `encode` keeps the interpreter lock, so that a megabyte would stop every thread for a second. Its form for
    batches gives the lock up, and runs a batch of one on this thread.
    """
    if len(text) <= _FEW_CHARS:
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
    else:
        ids = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def added_end_ids(added: Mapping[int, Any]) -> frozenset[int]:
    """Return which of a tokenizer's added tokens, by id as `AddedToken`s, are known to end an answer."""
    found = {token.content: token_id for token_id, token in added.items() if token.content in END_TOKENS}
    return known_end_ids(found, {token.content for token in added.values() if token.special})


class IncrementalDetokenizer:
    """Turns generated ids, one at a time, into pieces of text that are final.

    The pieces concatenate to the final text: that of the generated ids in the context of the prompt, cut just before
    the stop string that matched. Each push decodes a bounded window (the ids of the last piece as context, then those
    not yet shown), so its cost does not depend on how much was generated.

    UTF-8: the last U+FFFD characters of the window, at most three, may be an unfinished character and wait for the
    next ids; whatever stands before them is given out, so invalid bytes are delayed by at most three further ids that
    have text. For byte-level tokenizers the final text is exactly `decode(generated ids)`. Where a decoder looks
    further back (SentencePiece turns a whole run of byte tokens into U+FFFD when one is invalid), what was given out
    stays.

    Leading spaces: tokenizers that drop the first token's space see the last prompt tokens before the first generated
    one, back to the latest special token (after which a text starts anew) or an unfinished character.

    Stops: the text ends before the first stop to be complete, reading character by character; among those that
    complete at the same character, before the longest. This depends on neither token borders nor the order of
    `stop`, and never waits for a longer match once the text holds one. Only generated text counts. The text held
    back is always the longest suffix of the text that begins some stop.

    Attributes:
        stopped: the stop string that matched, or None.
    """

    __slots__ = ("_decode", "_ids", "_matcher", "_num_context", "_shown", "_skip_special_ids", "stopped")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        skip_special_ids: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
    ) -> None:
        self.stopped: str | None = None
        self._decode = tokenizer.decode
        self._skip_special_ids = skip_special_ids
        self._matcher = _StopMatcher(stop) if stop else None
        # _ids[:_num_context] were shown entirely; _shown is what was given out of decode(_ids), context included.
        self._ids = _prompt_context(prompt_token_ids, skip_special_ids)
        self._shown = self._decode(self._ids) if self._ids else ""
        if self._shown.endswith(_REPLACEMENT):
            self._ids, self._shown = [], ""
        self._num_context = len(self._ids)

    def push(self, token_id: int, check_stop: bool = True) -> str:
        """Append a generated id and return the text that is final now, "" while it is held back.

        With `check_stop=False` a stop that becomes complete with this id is ordinary text; one that only begins with
        it may still match later. Must not be called once `stopped` is set.
        """
        assert self.stopped is None, "push() after a stop string matched"
        if token_id in self._skip_special_ids:
            return ""
        piece = self._next_piece(token_id)
        if self._matcher is None or not piece:
            return piece
        piece, self.stopped = self._matcher.feed(piece, check_stop)
        return piece

    def finish(self) -> str:
        """Return what was held back, with unfinished characters as U+FFFD; a second call returns ""."""
        if self.stopped is not None:
            return ""
        piece = self._decode(self._ids)[len(self._shown) :] if len(self._ids) > self._num_context else ""
        self._ids, self._shown, self._num_context = [], "", 0
        if self._matcher is None:
            return piece
        piece, self.stopped = self._matcher.feed(piece, True)
        return piece if self.stopped is not None else piece + self._matcher.flush()

    def _next_piece(self, token_id: int) -> str:
        """Append to the window and return the text that later ids cannot change."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.startswith(self._shown):
            text = self._drop_context()
        num_shown = len(self._shown)
        num_final = len(text)
        floor = max(num_shown, num_final - _MAX_HELD_CHARS)
        while num_final > floor and text[num_final - 1] == _REPLACEMENT:
            num_final -= 1
        if num_final == len(text):
            self._start_window(text)
        elif len(self._ids) - self._num_context > _MAX_WINDOW:
            num_final = self._shrink_window(text, num_final)
        else:
            self._shown = text[:num_final]
        return text[num_shown:num_final]

    def _drop_context(self) -> str:
        """The decoder rewrote text that was given out: return the text of the other ids, less the context.

        As much of it counts as shown as was shown of them before, so that nothing is given out twice.
        """
        context, self._ids = self._ids[: self._num_context], self._ids[self._num_context :]
        num_context_chars = len(self._decode(context)) if context else 0
        text = self._decode(self._ids)
        self._num_context, self._shown = 0, text[: max(0, len(self._shown) - num_context_chars)]
        return text

    def _start_window(self, text: str) -> None:
        """Everything is shown: the ids since the context become the next context."""
        if text == self._shown and 0 < self._num_context == len(self._ids) - 1:
            self._ids.pop()  # an id without text is no context
            return
        del self._ids[: self._num_context]
        self._num_context = len(self._ids)
        self._shown = self._decode(self._ids)

    def _shrink_window(self, text: str, num_final: int) -> int:
        """Cut a window of invalid bytes at a character border and return how much of `text` is shown now.

        A cut where both sides decode to what they were together is a border. Byte-level tokenizers have one within
        the last four ids with text, unless ids without text stand between: those go first. A decoder without such a
        border (none is known) gets everything shown.
        """
        ids = [token_id for token_id in self._ids if self._decode([token_id])]
        if self._decode(ids) != text:
            ids = self._ids
        for cut in range(len(ids) - 1, 0, -1):
            head, tail = self._decode(ids[:cut]), self._decode(ids[cut:])
            if tail and head + tail == text:
                num_final = max(num_final, len(head))
                self._ids, self._num_context = ids[cut:], 0
                self._shown = text[len(head) : num_final]
                return num_final
        if len(ids) < len(self._ids):
            self._ids, self._num_context = ids, 0
            self._shown = text[:num_final]
            return num_final
        self._start_window(text)
        return len(text)


def _prompt_context(prompt_token_ids: Sequence[int], special_ids: frozenset[int]) -> list[int]:
    context = list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:])
    for index in range(len(context) - 1, -1, -1):
        if context[index] in special_ids:
            return context[index + 1 :]
    return context


class _StopMatcher:
    """Aho-Corasick automaton over the stop strings (Aho and Corasick, 1975): one step for each character.

    A state is the longest suffix of the text that is a prefix of some stop, so its depth is exactly the number of
    characters that must be held back.
    """

    __slots__ = ("_depth", "_fail", "_held", "_match", "_next", "_state")

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            assert stop, "an empty stop string"
            self._add(stop)
        self._fail = [0] * len(self._next)
        for state, char, child in self._breadth_first():
            self._fail[child] = self._step(self._fail[state], char) if state else 0
            self._match[child] = self._match[child] or self._match[self._fail[child]]
        self._state = 0
        self._held = ""

    def feed(self, piece: str, check_stop: bool) -> tuple[str, str | None]:
        """Return the text that cannot be part of a stop any more, and the stop that became complete if any."""
        text = self._held + piece
        state = self._state
        for end, char in enumerate(piece, len(self._held) + 1):
            state = self._step(state, char)
            match = self._match[state]
            if match is not None and check_stop:
                self._held, self._state = "", 0
                return text[: end - len(match)], match
        while state and not self._next[state]:  # a complete stop that does not count and begins no longer one
            state = self._fail[state]
        self._state = state
        num_free = len(text) - self._depth[state]
        self._held = text[num_free:]
        return text[:num_free], None

    def flush(self) -> str:
        """Return the held text and forget it."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for depth, char in enumerate(stop, 1):
            child = self._next[state].get(char)
            if child is None:
                child = self._next[state][char] = len(self._next)
                self._next.append({})
                self._depth.append(depth)
                self._match.append(None)
            state = child
        self._match[state] = stop

    def _step(self, state: int, char: str) -> int:
        while True:
            child = self._next[state].get(char)
            if child is not None:
                return child
            if not state:
                return 0
            state = self._fail[state]

    def _breadth_first(self) -> Iterator[tuple[int, str, int]]:
        """Yield (state, char, child), shallow states first, so that a child's fail state is complete before it."""
        level = [0]
        while level:
            edges = [(state, char, child) for state in level for char, child in self._next[state].items()]
            yield from edges
            level = [child for _, _, child in edges]


class TransformersTokenizer:
    """A transformers tokenizer as a `ChatTokenizer`: special tokens stay in the text, spaces are not cleaned up."""

    def __init__(self, tokenizer: Any) -> None:
        self._wrapped = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token_id for token_id, token in added.items() if token.special}
        self.special_ids = frozenset(special.union(tokenizer.all_special_ids))
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.known_end_ids = added_end_ids(added)
        self._known_templates: tuple[dict[str, str], dict[str, Any], ChatTemplates] | None = None
        # The first call undoes stored truncation and padding, which must not happen while another thread encodes.
        tokenizer.encode("")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with BOS and the like when `add_special_tokens`."""
        check_text(text)
        return list(self._wrapped.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text, special tokens included."""
        text: str = self._wrapped.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt that the tokenizer's own template makes of `messages`, by the rules of `ChatTemplate`.

        A class with an `apply_chat_template` of its own, rather than transformers', is left to do it. Raises
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
        """Return the names of the variables that its template reads, None where that cannot be told."""
        templates = self._templates()
        return None if templates is None else templates.choose(chat_template, has_tools=has_tools).variables

    def _templates(self) -> ChatTemplates | None:
        """Return the templates that the tokenizer has now; None: it does not use them in the usual way."""
        from llmengine.chat_template import ChatTemplates

        method = getattr(type(self._wrapped).apply_chat_template, "__module__", None)
        if method != "transformers.tokenization_utils_base":
            return None
        given = self._wrapped.chat_template
        if given is None:
            raise InvalidRequestError("the tokenizer has no chat template: send a prompt, or set its chat_template")
        sources = {"default": given} if isinstance(given, str) else dict(given)
        special_tokens = dict(self._wrapped.special_tokens_map)
        if self._known_templates is None or self._known_templates[:2] != (sources, special_tokens):
            templates = ChatTemplates(sources, special_tokens, "tokenizer")
            self._known_templates = (sources, special_tokens, templates)
        return self._known_templates[2]

    def tokenizer_json(self) -> str:
        """Return the text of its tokenizer.json; raises `AttributeError` where it has no such form."""
        text: str = self._wrapped.backend_tokenizer.to_str()
        return text

    def save(self, directory: str | Path) -> list[Path]:
        """Write the files that transformers writes for it, and return their paths."""
        return [Path(path) for path in self._wrapped.save_pretrained(str(directory))]


class _EncodingTokenizer:
    """A `tokenizers.Tokenizer`, whose `encode` returns an object with `ids`, as a `Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._wrapped = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.known_end_ids = added_end_ids(added)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, with what the post-processor adds."""
        check_text(text)
        return encode_with(self._wrapped, text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text, special tokens included."""
        text: str = self._wrapped.decode(list(token_ids), skip_special_tokens=False)
        return text

    def tokenizer_json(self) -> str:
        """Return the text of its tokenizer.json."""
        text: str = self._wrapped.to_str()
        return text

    def save(self, directory: str | Path) -> list[Path]:
        """Write tokenizer.json, and return its path."""
        path = Path(directory) / "tokenizer.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._wrapped.save(str(path))
        return [path]


def adapt_tokenizer(tokenizer: Any) -> Tokenizer:
    """Return `tokenizer` as a `Tokenizer`: wrapped if it is of transformers or tokenizers, else itself.

    Raises `ConfigError` naming the methods that are missing.
    """
    missing = [name for name in ("encode", "decode") if not callable(getattr(tokenizer, name, None))]
    if missing or isinstance(tokenizer, type):
        fault = f"has no {' and no '.join(missing)}" if missing else "is a class, not an instance"
        raise ConfigError(
            f"tokenizer={tokenizer!r:.200} {fault}: "
            "pass an object with encode(text) -> list[int] and decode(token_ids) -> str"
        )
    if hasattr(tokenizer, "all_special_ids") and hasattr(tokenizer, "convert_ids_to_tokens"):
        return TransformersTokenizer(tokenizer)
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        return _EncodingTokenizer(tokenizer)
    adapted: Tokenizer = tokenizer
    return adapted
