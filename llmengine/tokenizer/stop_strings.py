"""Stop strings in text that arrives piece by piece, with as little text held back as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class StopMatcher:
    """Reads an answer as it arrives and cuts it just before the first stop string.

    The answer consists of shown characters and hidden tokens (special tokens that are not shown). A stop is searched in

    - the shown text without the hidden tokens, so that the shown text never contains a stop; and
    - the text including the texts of hidden tokens, each as one unit: a stop may be, contain, begin or end with such a
      text, but not match a part of it. "<" does not end an answer at a hidden "<|im_start|>".

    Reading character by character, the first stop that is complete counts; of several that end at the same place, the
    one that begins first, then the longest. The text held back is always the longest suffix of the shown text that may
    still become part of a stop.
    """

    __slots__ = ("_automaton", "_held", "_hidden", "_num_since_hidden", "_state")

    def __init__(self, stops: Sequence[str]) -> None:
        self._automaton = _Automaton(stops)
        self._state = 0
        self._held = ""
        self._hidden: _HiddenMatch | None = None
        self._num_since_hidden = self._automaton.max_depth

    def feed(self, piece: str, check_stop: bool) -> tuple[str, str | None]:
        """Read `piece`; return the text that no stop can contain any more, and the stop now complete, or None."""
        text = self._held + piece
        automaton, state, hidden = self._automaton, self._state, self._hidden
        for end, char in enumerate(piece, len(self._held) + 1):
            state = automaton.step(state, char)
            stop = automaton.match[state]
            cut = 0 if stop is None else len(stop)
            if hidden is not None:
                hidden.step(char)
                cut, stop = max((cut, stop), hidden.match(), key=_match_order)
            if stop is not None and check_stop:
                self._reset()
                return text[: end - cut], stop
        self._state = automaton.open_state(state)
        self._num_since_hidden += len(piece)
        return self._release(text), None

    def feed_hidden(self, text: str, check_stop: bool) -> tuple[str, str | None]:
        """Read a token that is not shown; returns the same as `feed`."""
        if not text:
            return "", None
        if self._hidden is None:
            self._hidden = _HiddenMatch(self._automaton, self._state, self._num_since_hidden)
        self._hidden.step_token(text)
        self._num_since_hidden = 0
        cut, stop = self._hidden.match()
        if stop is not None and check_stop:
            shown = self._held[: len(self._held) - cut]
            self._reset()
            return shown, stop
        return self._release(self._held), None

    def flush(self) -> str:
        """End the text: return what is held, and hold nothing."""
        held = self._held
        self._reset()
        return held

    def _release(self, text: str) -> str:
        num_held = self._automaton.depth[self._state]
        if self._hidden is not None:
            self._hidden.close()
            if self._hidden.is_over:
                self._hidden = None
            else:
                num_held = max(num_held, self._hidden.num_shown)
        num_free = len(text) - num_held
        self._held = text[num_free:]
        return text[:num_free]

    def _reset(self) -> None:
        self._held, self._state, self._hidden = "", 0, None


class _HiddenMatch:
    """The longest suffix of the text, hidden tokens included, that begins a stop; kept while it has a hidden token."""

    __slots__ = ("_automaton", "_position", "_state", "_tokens")

    def __init__(self, automaton: _Automaton, state: int, num_since_hidden: int) -> None:
        """Begin with the suffix of the shown text that `state` stands for, as far as it has no hidden token."""
        while automaton.depth[state] > num_since_hidden:
            state = automaton.fail[state]
        self._automaton = automaton
        self._state = state
        self._position = automaton.depth[state]
        self._tokens: list[tuple[int, int]] = []  # where hidden tokens begin and end

    @property
    def is_over(self) -> bool:
        """True if the suffix has no hidden token any more."""
        return not self._tokens

    @property
    def num_shown(self) -> int:
        """Number of its characters that are shown."""
        return self._num_shown(self._automaton.depth[self._state])

    def step(self, char: str) -> None:
        """Read a character."""
        self._state = self._automaton.step(self._state, char)
        self._position += 1
        while self._state and self._begins_inside(self._automaton.depth[self._state]):
            self._state = self._automaton.fail[self._state]

    def step_token(self, text: str) -> None:
        """Read a hidden token."""
        self._tokens.append((self._position, self._position + len(text)))
        for char in text:
            self.step(char)

    def match(self) -> tuple[int, str | None]:
        """Number of shown characters of the stop that is complete here, and that stop; (0, None) if there is none."""
        state = self._state
        while (stop := self._automaton.match[state]) is not None:
            if not self._begins_inside(len(stop)):
                return self._num_shown(len(stop)), stop
            state = self._automaton.fail[self._automaton.at_depth(state, len(stop))]
        return 0, None

    def close(self) -> None:
        """Drop a complete stop that begins no longer one, and tokens that no stop can include any more."""
        self._state = self._automaton.open_state(self._state)
        while self._state and self._begins_inside(self._automaton.depth[self._state]):
            self._state = self._automaton.fail[self._state]
        begin = self._position - self._automaton.depth[self._state]
        self._tokens = [token for token in self._tokens if token[0] >= begin]

    def _begins_inside(self, length: int) -> bool:
        begin = self._position - length
        return any(first < begin < last for first, last in self._tokens)

    def _num_shown(self, length: int) -> int:
        begin = self._position - length
        return length - sum(last - first for first, last in self._tokens if first >= begin)


class _Automaton:
    """Aho-Corasick automaton over the stop strings (Aho and Corasick, 1975): one step for each character.

    A state is the longest suffix of the text that begins some stop, so its depth is exactly the number of characters to
    hold back.

    Attributes:
        depth: by state.
        fail: by state, the longest proper suffix of its text that begins a stop.
        match: by state, the longest stop that its text ends with, or None.
        max_depth: length of the longest stop.
    """

    __slots__ = ("_next", "depth", "fail", "match", "max_depth")

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            assert stop, "an empty stop string"
            self._add(stop)
        self.max_depth = max(self.depth)
        self.fail = [0] * len(self._next)
        for state, char, child in self._breadth_first():
            self.fail[child] = self.step(self.fail[state], char) if state else 0
            self.match[child] = self.match[child] or self.match[self.fail[child]]

    def step(self, state: int, char: str) -> int:
        """State after one more character."""
        while True:
            child = self._next[state].get(char)
            if child is not None:
                return child
            if not state:
                return 0
            state = self.fail[state]

    def open_state(self, state: int) -> int:
        """State of the longest suffix of the state's text that begins a longer stop."""
        while state and not self._next[state]:
            state = self.fail[state]
        return state

    def at_depth(self, state: int, depth: int) -> int:
        """State of the suffix of length `depth` of the state's text, which must begin a stop."""
        while self.depth[state] > depth:
            state = self.fail[state]
        return state

    def _add(self, stop: str) -> None:
        state = 0
        for depth, char in enumerate(stop, 1):
            child = self._next[state].get(char)
            if child is None:
                child = self._next[state][char] = len(self._next)
                self._next.append({})
                self.depth.append(depth)
                self.match.append(None)
            state = child
        self.match[state] = stop

    def _breadth_first(self) -> Iterator[tuple[int, str, int]]:
        """Edges as (state, char, child), shallow states first, so that a child's fail state is complete before it."""
        level = [0]
        while level:
            edges = [(state, char, child) for state in level for char, child in self._next[state].items()]
            yield from edges
            level = [child for _, _, child in edges]


def _match_order(found: tuple[int, str | None]) -> tuple[int, int]:
    """Sort key: the stop that begins first among the shown characters, then the longest."""
    cut, stop = found
    return cut, 0 if stop is None else len(stop)
