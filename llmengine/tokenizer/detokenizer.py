"""Token ids to text: the rules for leading spaces, and incremental detokenization of generated ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from llmengine.tokenizer.stop_strings import StopMatcher

if TYPE_CHECKING:
    from llmengine.tokenizer.protocol import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD_CHARS = 3
_MAX_WINDOW = 16
_NUM_CONTEXT_TOKENS = 8
_LETTERS = "ae0."


class TokenTexts:
    """Texts of the tokens of one tokenizer, which depend on their position: the rules for leading spaces.

    SentencePiece tokenizers keep the space before a word in its token, and add one before a text that has none; so
    their decoders drop the first space of their input. The rules, for every tokenizer:

    - In a prompt, a text begins with the first token, and a new one after each special token. Only a token that begins
      a text loses its space, if its tokenizer drops it.
    - Generated text continues the text of the prompt. If the prompt ends with a special token (BOS alone, a chat's end
      of turn), a new text begins with the first generated token that is not special.
    - Structured output never begins a text: the form was matched with the bytes of the tokens, and these are the text.

    Safe to use from several threads.
    """

    __slots__ = ("_decode", "_encode", "_letter", "_special_ids")

    def __init__(self, tokenizer: Tokenizer, special_ids: frozenset[int] = frozenset()) -> None:
        """`special_ids` are special in addition to the tokenizer's own."""
        self._encode = tokenizer.encode
        self._decode = tokenizer.decode
        self._special_ids = special_ids.union(getattr(tokenizer, "special_ids", ()))
        self._letter: tuple[list[int], str] | None = None

    def is_special(self, token_id: int) -> bool:
        """True if a new text begins after this token in a prompt."""
        return token_id in self._special_ids

    def context(self, prompt_token_ids: Sequence[int], structured: bool) -> tuple[list[int], str]:
        """Ids to put before generated ids, so that these decode as after the prompt, and their text.

        There are none where the generated ids begin a text.
        """
        context = list(prompt_token_ids[-_NUM_CONTEXT_TOKENS:])
        for index in range(len(context) - 1, -1, -1):
            if context[index] in self._special_ids:
                del context[: index + 1]
                break
        text = self._decode(context) if context else ""
        if not text and not any(map(self.has_text, context)):
            context = []
        if text.endswith(_REPLACEMENT) or (structured and not context):
            letter, text = self._letter_context()
            return list(letter), text
        return context, text

    def read(self, token_id: int, begins: bool) -> str:
        """The text that the token adds where it begins or continues a text; U+FFFD for a part of a character."""
        text = self._decode([token_id])
        if begins or token_id in self._special_ids:
            return text
        letter, shown = self._letter_context()
        behind = self._decode([*letter, token_id])
        return behind[len(shown) :] if behind.startswith(shown) else text

    def reader(
        self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], structured: bool
    ) -> Callable[[int, int], str]:
        """A function of (position, token id) that returns the token's text at that position.

        Positions count the prompt and the ids generated after it, which may grow.
        """
        return partial(self._read_at, prompt_token_ids, token_ids, structured)

    def _read_at(
        self, prompt: Sequence[int], generated: Sequence[int], structured: bool, position: int, token_id: int
    ) -> str:
        if position > len(prompt):
            begins = not any(map(self.has_text, islice(generated, position - len(prompt))))
            position = len(prompt)
        else:
            begins = True
        if begins and position == len(prompt):
            begins = not structured
        while begins and position and prompt[position - 1] not in self._special_ids:
            begins = not self.has_text(prompt[position - 1])
            position -= 1
        return self.read(token_id, begins)

    def text(self, prompt_token_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text of ids that were generated after a prompt, without special tokens."""
        detokenizer = IncrementalDetokenizer(self, prompt_token_ids, self._special_ids)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.finish()

    def decode(self, token_ids: Sequence[int]) -> str:
        """The tokenizer's text for the ids."""
        return self._decode(token_ids)

    def has_text(self, token_id: int) -> bool:
        """True if the token has text: it is not special, and its id belongs to a token."""
        return token_id not in self._special_ids and self.read(token_id, begins=False) != ""

    def _letter_context(self) -> tuple[list[int], str]:
        """The ids and text of a token that is one letter; empty if the tokenizer has no such token."""
        if self._letter is None:
            self._letter = next(filter(None, map(self._find_letter, _LETTERS)), ([], ""))
        return self._letter

    def _find_letter(self, letter: str) -> tuple[list[int], str] | None:
        for token_id in reversed(self._encode(letter)):
            if token_id not in self._special_ids and self._decode([token_id]).strip() == letter:
                return [token_id], self._decode([token_id])
        return None


class IncrementalDetokenizer:
    """Turns generated ids, one at a time, into final pieces of text.

    The pieces concatenate to the final text: that of the generated ids in the context of the prompt, cut just before
    the stop string that matched. Each push decodes a bounded window (the ids of the last piece as context, then the ids
    not shown yet), so its cost does not depend on how much was generated.

    UTF-8: up to three U+FFFD characters at the end of the window may be an unfinished character and wait for the next
    ids; the text before them is emitted. So invalid bytes are delayed by at most three further ids that have text. For
    byte-level tokenizers the final text is exactly `decode(generated ids)`. If a decoder changes earlier text
    (SentencePiece turns a whole run of byte tokens into U+FFFD if one is invalid), text that was emitted stays.

    Leading spaces: see `TokenTexts`. A tokenizer that drops the first token's space sees the last prompt tokens before
    the first generated one, back to the latest special token.

    Stops: see `StopMatcher`; its hidden tokens are the ids in `skip_special_ids` and the token that ends the answer.
    Only generated text counts. The end of the text depends neither on token boundaries nor on the order of `stop`, and
    does not wait for a longer match once a stop has matched.

    Args:
        tokenizer: a tokenizer or its `TokenTexts`.
        skip_special_ids: ids that are not shown.
        structured: True for structured output.

    Attributes:
        stopped: the stop string that matched, or None.
    """

    __slots__ = ("_decode", "_ids", "_matcher", "_num_context", "_shown", "_skip_special_ids", "_texts", "stopped")

    def __init__(
        self,
        tokenizer: Tokenizer | TokenTexts,
        prompt_token_ids: Sequence[int],
        skip_special_ids: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        *,
        structured: bool = False,
    ) -> None:
        self.stopped: str | None = None
        self._texts = tokenizer if isinstance(tokenizer, TokenTexts) else TokenTexts(tokenizer, skip_special_ids)
        self._decode = tokenizer.decode
        self._skip_special_ids = skip_special_ids
        self._matcher = StopMatcher(stop) if stop else None
        # _ids[:_num_context] were shown completely; _shown is the emitted part of decode(_ids), context included.
        self._ids, self._shown = self._texts.context(prompt_token_ids, structured)
        self._num_context = len(self._ids)

    def push(self, token_id: int, check_stop: bool = True) -> str:
        """Append a generated id and return the text that is now final, "" while text is held back.

        With `check_stop=False` a stop that this id completes is ordinary text; a stop that only begins with it may
        still match later. Must not be called once `stopped` is set.
        """
        assert self.stopped is None, "push() after a stop string matched"
        if token_id in self._skip_special_ids:
            return self._push_hidden(token_id, check_stop)
        if not self._ids and self._texts.is_special(token_id):
            piece = self._decode([token_id])  # a special token does not begin a text
        else:
            piece = self._next_piece(token_id)
        if self._matcher is None or not piece:
            return piece
        piece, self.stopped = self._matcher.feed(piece, check_stop)
        return piece

    def end(self, token_id: int) -> str:
        """End the answer at an id that is not shown, and return the text that is now final.

        A stop string may end with the text of the id. Call `finish` next.
        """
        if self._matcher is None:
            return ""
        piece, self.stopped = self._matcher.feed(self._flush(), True)
        return piece if self.stopped is not None else piece + self._push_hidden(token_id, True)

    def finish(self) -> str:
        """The text that was held back, with unfinished characters as U+FFFD; a second call returns ""."""
        if self.stopped is not None:
            return ""
        piece = self._flush()
        if self._matcher is None:
            return piece
        piece, self.stopped = self._matcher.feed(piece, True)
        return piece if self.stopped is not None else piece + self._matcher.flush()

    def _push_hidden(self, token_id: int, check_stop: bool) -> str:
        if self._matcher is None:
            return ""
        piece, self.stopped = self._matcher.feed_hidden(self._decode([token_id]), check_stop)
        return piece

    def _flush(self) -> str:
        """Empty the window and return its text that was not emitted yet."""
        piece = self._decode(self._ids)[len(self._shown) :] if len(self._ids) > self._num_context else ""
        self._ids, self._shown, self._num_context = [], "", 0
        return piece

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
        """Drop the context, since the decoder changed text that was emitted, and return the text of the other ids.

        As much of this text counts as shown as was shown before, so that nothing is emitted twice.
        """
        context, self._ids = self._ids[: self._num_context], self._ids[self._num_context :]
        num_context_chars = len(self._decode(context)) if context else 0
        text = self._decode(self._ids)
        self._num_context, self._shown = 0, text[: max(0, len(self._shown) - num_context_chars)]
        return text

    def _start_window(self, text: str) -> None:
        """Start a new window after everything was shown: the ids since the context become the next context."""
        if text == self._shown and self._num_context == len(self._ids) - 1:
            if text or not self._texts.has_text(self._ids[-1]):
                self._ids.pop()  # an id without text is useless as context
            self._num_context = len(self._ids)  # but the token of a dropped first space is kept
            return
        del self._ids[: self._num_context]
        self._num_context = len(self._ids)
        self._shown = self._decode(self._ids)

    def _shrink_window(self, text: str, num_final: int) -> int:
        """Cut a window of invalid bytes at a character boundary and return how much of `text` is shown now.

        A cut is at a boundary if both sides, decoded separately, give the same text as together. Byte-level tokenizers
        have a boundary within the last four ids with text; ids without text in between are removed first. If a decoder
        has no boundary (none is known), everything is shown.
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
