"""Grammars over tokens: the tokens that a `StructuredOutput` allows next, computed by llguidance.

llguidance (an optional dependency, imported on first use) walks an Earley parser over derivatives of regexes through a
trie of the vocabulary. Each mask is computed when its token is due, so compiling costs little. All work uses fuel: a
hostile grammar runs out of fuel and fails within a bounded time, without holding the interpreter lock.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llmengine.errors import InvalidRequestError
from llmengine.structured.unique_keys import KeyTracker, QuoteTokens, UniqueKeys
from llmengine.structured_output import StructuredOutput

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

    from llmengine.tokenizer.protocol import Tokenizer

_NUM_CACHED = 32
_MAX_CACHED_S = 8.0
"""Most compile time of all cached grammars together, which also bounds their memory: about 40 MB a second."""

_MAX_STEP_S = 0.25
"""Computing time of one grammar step above which its request fails. Fuel usually ends a step far earlier."""


_ESCAPES = 'nrbtf\\"'
"""Characters that may follow a backslash in JSON. `u` is not among them: with it a key would have several spellings,
and a spelling that is not ruled out could replace a property that has a type of its own."""

_UNWRITABLE = re.compile(r"(?<!\\)(\\\\)*\\u00|\x7f")
"""Matches characters in JSON text that can only be written with a `u` escape."""

_STOP_REASONS = dict.fromkeys(("NoExtension", "NoExtensionBias"), "no text can come next")
"""Name of a state that llguidance reports as an error -> the error in words."""


class Grammar:
    """The position of a request in its grammar. Used by one thread at a time.

    Attributes:
        mask: the tokens that may come next, 4 * ceil(vocab / 32) bytes: id t if bit t % 8 of byte t // 8 is set.
            Stop tokens are among them exactly where the text may end.
        is_complete: the text is complete and nothing can follow it.
        error: why the grammar cannot go on; None while it can.
        step_s: computing time of the last `advance`, in seconds.
    """

    __slots__ = ("_end_ids", "_executor", "_forbidden", "_keys", "_matcher", "error", "is_complete", "mask", "step_s")

    def __init__(
        self,
        matcher: LLMatcher,
        executor: LLExecutor,
        forbidden: Sequence[int],
        num_bytes: int,
        keys: UniqueKeys | None = None,
    ) -> None:
        """Begin at the start of the grammar of `matcher`.

        `forbidden` ids are never text. With `keys`, no JSON object gets a key twice while another key is possible.
        """
        self._keys = keys
        self._matcher = matcher
        self._executor = executor
        self._forbidden = forbidden
        self._end_ids: tuple[int, ...] = ()
        self.mask = bytes(num_bytes)
        self.is_complete = False
        self.error: str | None = None
        self.step_s = 0.0
        self._update_mask()

    def fork(self, stop_token_ids: Iterable[int]) -> Grammar:
        """A grammar at the same position for a request that `stop_token_ids` end."""
        other = object.__new__(Grammar)
        for name in ("_executor", "_forbidden", "_keys", "is_complete", "error", "step_s"):
            setattr(other, name, getattr(self, name))
        other._matcher = self._matcher.deep_copy()
        other._end_ids = tuple(stop_token_ids)
        other.mask = self.mask
        other.mask = other._with_end_tokens(self.mask)
        return other

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """Number of the tokens that may come next as text, in order; takes as long as `advance`."""
        text = list(itertools.takewhile(lambda token_id: token_id not in self._end_ids, token_ids))
        num_allowed = self._matcher.validate_tokens(text)
        return num_allowed if self._keys is None else self._keys.num_allowed(text[:num_allowed])

    def advance(self, token_ids: Sequence[int]) -> None:
        """Advance past tokens and set all attributes. Takes milliseconds a token at worst, mostly without the GIL."""
        began = time.thread_time()
        try:
            for token_id in token_ids:
                # The executor releases the GIL, unlike the matcher's own method.
                if self._executor.consume_token_par([(self._matcher, token_id)]) != [True]:
                    self.error = _error_reason(self._matcher) or f"token {token_id} is not in the grammar"
                    break
                if self._keys is not None and token_id not in self._end_ids:
                    self._keys = self._keys.after(token_id)
            else:
                self._update_mask()
        except Exception as fault:  # an error of the library ends only this request
            self.error = repr(fault)
        self.step_s = time.thread_time() - began
        if self.step_s > _MAX_STEP_S:
            self.error = f"a step of the grammar took {self.step_s:.2f} s; the limit is {_MAX_STEP_S} s"

    def _update_mask(self) -> None:
        """Compute the tokens that may come next."""
        matcher = self._matcher
        self.is_complete = matcher.is_stopped() and matcher.is_accepting()
        if not self.is_complete:
            mask = matcher.compute_bitmask()
            if not matcher.is_error():
                self.mask = self._with_end_tokens(self._without_repeated_keys(mask))
                # Computing the mask may have shown that nothing can follow.
                self.is_complete = matcher.is_stopped() and matcher.is_accepting()
        if matcher.is_error():
            self.error = _error_reason(matcher)

    def _without_repeated_keys(self, mask: bytes) -> bytes:
        """The mask without tokens that would repeat a key, unless nothing else can come next."""
        repeating = [] if self._keys is None else self._keys.repeating_tokens()
        if not repeating:
            return mask
        bits = bytearray(mask)
        for token_id in repeating:
            bits[token_id // 8] &= ~(1 << token_id % 8)
        if any(bits) or self._matcher.is_accepting():
            return bytes(bits)
        assert self._keys is not None
        if self._keys.must_differ:
            self.error = (
                "only a key that the object already has can come next, and minProperties does not count it again"
            )
        return mask

    def _with_end_tokens(self, mask: bytes) -> bytes:
        bits = bytearray(mask[: len(self.mask)].ljust(len(self.mask), b"\0"))
        for token_id in (*self._forbidden, *self._end_ids):
            bits[token_id // 8] &= ~(1 << token_id % 8)
        if self._matcher.is_accepting():
            for token_id in self._end_ids:
                bits[token_id // 8] |= 1 << token_id % 8
        return bytes(bits)


class GrammarCompiler:
    """Makes grammars for one tokenizer. Every method may be called from any thread.

    If llguidance is installed, the vocabulary is read in the constructor. Reading holds the GIL for 2 us a token,
    which is too long while other requests are served.

    Args:
        tokenizer: has `token_bytes()`, the bytes of each id, or `tokenizer_json()`, the text of a tokenizer.json.
        vocab_size: number of the model's logits.
        eos_token_ids: end tokens of the model.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._num_bytes = 4 * -(-vocab_size // 32)
        self._forbidden: Sequence[int] = ()
        self._lock = threading.Lock()
        self._cache: OrderedDict[StructuredOutput, tuple[Grammar, float]] = OrderedDict()
        self._vocabulary: LLTokenizer
        self._executor: LLExecutor
        self._quotes: QuoteTokens | None = None
        self._fault: str | None = None
        if tokenizer is None:
            self._fault = "needs a tokenizer, which this LLM does not have (enable_tokenizer=False)"
        elif importlib.util.find_spec("llguidance") is None:
            self._fault = "needs the package llguidance; run pip install 'llmengine[structured]'"
        else:
            self._read_vocabulary(tokenizer, vocab_size, frozenset(eos_token_ids))

    def check(self) -> None:
        """Raise `InvalidRequestError` if structured output is not possible at all; takes no time."""
        if self._fault is not None:
            raise InvalidRequestError(f"structured output {self._fault}")

    def has(self, spec: StructuredOutput) -> bool:
        """True if the grammar is in the cache of `compile`."""
        return spec in self._cache

    def compile(self, spec: StructuredOutput, stop_token_ids: Iterable[int]) -> Grammar:
        """A grammar at its start for a request that `stop_token_ids` end; takes up to seconds without the GIL.

        Raises `InvalidRequestError` for a schema, regex or grammar that is malformed, not supported, too complex, or
        matches no text. The grammars used last stay cached.
        """
        self.check()
        with self._lock:
            cached = self._cache.get(spec)
        if cached is None:
            began = time.thread_time()
            start = self._compile(spec)
            cached = start, time.thread_time() - began
        with self._lock:  # a matcher is copied by one thread at a time
            self._cache[spec] = cached
            self._cache.move_to_end(spec)
            while len(self._cache) > 1 and (
                len(self._cache) > _NUM_CACHED or sum(seconds for _, seconds in self._cache.values()) > _MAX_CACHED_S
            ):
                self._cache.popitem(last=False)
            return cached[0].fork(stop_token_ids)

    def _compile(self, spec: StructuredOutput) -> Grammar:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, _grammar_source(spec), log_level=0, limits=_parser_limits())
        if matcher.is_error():
            raise _refusal(_error_reason(matcher))
        grammar = Grammar(matcher, self._executor, self._forbidden, self._num_bytes, self._unique_keys(spec))
        if grammar.error is not None:
            raise _refusal(grammar.error)
        if grammar.is_complete or not any(grammar.mask):
            raise _refusal("it matches nothing but the empty text")
        return grammar

    def _unique_keys(self, spec: StructuredOutput) -> UniqueKeys | None:
        if spec.json_schema is None:
            return None
        if self._quotes is None:  # at worst, two threads make it twice
            self._quotes = QuoteTokens(
                lambda token_id: self._vocabulary.decode_bytes([token_id]), self._vocabulary.vocab_size
            )
        return UniqueKeys(self._quotes, KeyTracker(), '"minProperties"' in str(spec.json_schema))

    def _read_vocabulary(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        from llguidance import LLExecutor, LLTokenizer

        special: frozenset[int] = getattr(tokenizer, "special_ids", frozenset())
        # llguidance needs one end token; the tokens that really end the text are decided in `Grammar`.
        candidates = sorted(eos_token_ids & special) or sorted(eos_token_ids) or sorted(special)
        if not candidates:
            self._fault = "needs a tokenizer with a special token to end the text"
            return
        end_id = candidates[0]
        try:
            source = _vocabulary_source(tokenizer, special, end_id)
            self._vocabulary = LLTokenizer(source, n_vocab=max(vocab_size, _vocab_size(tokenizer)), eos_token=end_id)
        except Exception as error:  # the library's errors have no common base, and the tokenizer belongs to the caller
            self._fault = f"is not possible with this tokenizer: {error}"
            return
        self._executor = LLExecutor(1)
        never = (*sorted({*eos_token_ids, end_id}), *range(vocab_size, 8 * self._num_bytes))
        self._forbidden = tuple(token_id for token_id in never if token_id < 8 * self._num_bytes)


class _Vocabulary:
    """A tokenizer in the form that llguidance accepts, with llguidance's own names."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokens: Sequence[bytes], special_ids: Iterable[int], end_id: int) -> None:
        self.tokens = list(tokens)
        self.special_token_ids = sorted(special_ids)
        self.eos_token_id = end_id
        self._ids = {token: token_id for token_id, token in enumerate(tokens) if token_id not in special_ids}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids of `text` by greedy longest match."""
        data = text.encode() if isinstance(text, str) else text
        ids = []
        begin = 0
        while begin < len(data):
            ends = range(min(len(data), begin + self._longest), begin, -1)
            end = next(end for end in ends if data[begin:end] in self._ids)
            ids.append(self._ids[data[begin:end]])
            begin = end
        return ids


def _vocabulary_source(tokenizer: Any, special_ids: frozenset[int], end_id: int) -> Any:
    """The tokenizer in a form that `LLTokenizer` accepts."""
    if hasattr(tokenizer, "token_bytes"):
        return _Vocabulary(tokenizer.token_bytes(), special_ids, end_id)
    if hasattr(tokenizer, "tokenizer_json"):
        return _with_known_decoder(tokenizer.tokenizer_json())
    raise TypeError(f"{type(tokenizer).__name__} must have tokenizer_json() or token_bytes()")


def _with_known_decoder(source: str) -> str:
    """A tokenizer.json whose tokens llguidance can read; it does not know the Metaspace decoder.

    It asks the decoder only which characters stand for bytes and spaces, so others may be left out.
    """
    content = json.loads(source)
    decoder = content.get("decoder") or {}
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    spaces = [step["replacement"] for step in steps if step.get("type") == "Metaspace"]
    if not spaces:
        return source
    replaces = [{"type": "Replace", "pattern": {"String": space}, "content": " "} for space in spaces]
    content["decoder"] = {"type": "Sequence", "decoders": [*replaces, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps(content)


def _vocab_size(tokenizer: Any) -> int:
    size: int = getattr(tokenizer, "vocab_size", 0)
    return size


def _parser_limits() -> LLParserLimits:
    """Fuel for about 3 s of compiling and 0.1 s a token. Ordinary schemas take milliseconds and 50 us."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=1_000,
        initial_lexer_fuel=200_000,
        step_lexer_fuel=100_000,
        step_max_items=30_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _grammar_source(spec: StructuredOutput) -> str:
    """The grammar in llguidance's own form."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark, is_lark_syntax

    if spec.json_schema is not None:
        defaults: Any = {"whitespace_pattern": " "}
        if _UNWRITABLE.search(str(spec.json_schema)):
            raise _refusal(
                r"the schema has control characters other than \b, \t, \n, \f and \r, which the output cannot contain"
            )
        overrides: Any = {"json_allowed_escapes": _ESCAPES, "lenient": False}
        try:
            return LLMatcher.grammar_from_json_schema(str(spec.json_schema), defaults=defaults, overrides=overrides)
        except ValueError as error:
            raise _refusal(str(error)) from error
    if spec.regex is not None:
        return LLMatcher.grammar_from_regex(spec.regex)
    if spec.choice is not None:
        return LLMatcher.grammar_from_lark("start: TEXT\nTEXT: " + " | ".join(map(json.dumps, spec.choice)))
    assert spec.grammar is not None
    if is_lark_syntax(spec.grammar) or "::=" not in spec.grammar:
        return LLMatcher.grammar_from_lark(spec.grammar)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(spec.grammar))
    except (GbnfToLarkError, ValueError, LookupError, RecursionError) as error:
        raise _refusal(str(error)) from error


def _error_reason(matcher: LLMatcher) -> str:
    reason = matcher.get_error().replace("<non-verbose/>", "").strip()
    return _STOP_REASONS.get(reason, reason)


def _refusal(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"the structured output cannot be used: {reason:.2000}")
