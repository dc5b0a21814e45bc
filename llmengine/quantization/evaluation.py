"""How good a model still is: perplexity of held-out text, and how its predictions differ from a reference's.

Every figure follows from the logits of windows of a text, taken by the model as prompts are, a bounded number of
tokens at a time: at most one window's logits of the reference are kept.

- Perplexity: exp of the mean negative log-likelihood of the scored tokens, each given those before it in its window.
- Top-1 agreement: share of the scored tokens at which both models find the same token likeliest.
- KL divergence: mean over the scored tokens of the sum over the vocabulary of p * (log p - log q), in nats, with p of
  the reference and q of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Protocol

from llmengine.checks import require_int
from llmengine.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64
"""Rows of logits that a comparison looks at at once."""


def evaluation_text() -> str:
    """The held-out text that comes with the package: prose, speeches, source code and chats; see `texts/README.md`."""
    return resources.files("llmengine.quantization").joinpath("texts/evaluation.txt").read_text(encoding="utf-8")


class Scorer(Protocol):
    """A model whose logits can be had."""

    def __call__(self, token_ids: Sequence[int], take: Callable[[Tensor], None]) -> None:
        """Compute the tokens' logits and hand them to `take`, fp32 [n, vocab] at a time, in order.

        A tensor is valid during the call of `take`.
        """


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that a model takes as one text.

    Attributes:
        token_ids: with the special tokens that begin a text.
        first_scored: index of the first token whose probability counts; all after it count too. At least 1.
    """

    token_ids: Sequence[int]
    first_scored: int

    @property
    def num_scored(self) -> int:
        """Tokens whose probability counts."""
        return len(self.token_ids) - self.first_scored


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How a text is cut into windows.

    Attributes:
        window_tokens: tokens of a window, special ones included.
        stride: tokens between the beginnings of two windows. Where windows overlap, tokens that an earlier window has
            scored are context only.
        max_windows: most windows; if the text has more, they are taken from all over it at equal distances. None: all.
    """

    window_tokens: int = 512
    stride: int = 512
    max_windows: int | None = 32

    def __post_init__(self) -> None:
        require_int("window_tokens", self.window_tokens, 2, error=ConfigError)
        require_int("stride", self.stride, 1, self.window_tokens, error=ConfigError)
        if self.max_windows is not None:
            require_int("windows", self.max_windows, 1, error=ConfigError)

    def within(self, max_tokens: int) -> WindowPlan:
        """This plan with windows of at most `max_tokens` tokens, and a stride that leaves no gap between them."""
        size = min(self.window_tokens, max_tokens)
        return WindowPlan(size, min(self.stride, size), self.max_windows)

    def windows(self, token_ids: Sequence[int], prefix: Sequence[int] = ()) -> list[Window]:
        """The windows of a text.

        Args:
            token_ids: without special tokens.
            prefix: special tokens that every window begins with.

        Raises `ConfigError` for a text that is shorter than a window.
        """
        size = self.window_tokens - len(prefix)
        stride = min(self.stride, size)
        if size < 1 or len(token_ids) < size:
            raise ConfigError(
                f"the text has {len(token_ids)} tokens, fewer than one window of window_tokens={self.window_tokens}; "
                "give a longer text or shorter windows"
            )
        begins = range(0, len(token_ids) - size + 1, stride)
        count = len(begins) if self.max_windows is None else min(len(begins), self.max_windows)
        windows = []
        for number in range(count):
            index = number * len(begins) // count
            tokens = [*prefix, *token_ids[begins[index] : begins[index] + size]]
            seen = 0 if index == 0 else size - stride
            windows.append(Window(tokens, max(1, len(prefix) + seen)))
        return windows


@dataclass(slots=True)
class Likelihood:
    """Sums over scored tokens, of one model.

    Attributes:
        nll: negative log-likelihood in nats.
    """

    num_tokens: int = 0
    nll: float = 0.0

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; infinite where that overflows."""
        mean = self.nll / self.num_tokens
        return math.exp(mean) if mean < 700 else math.inf


@dataclass(slots=True)
class Divergence:
    """Sums over scored tokens, of a model beside its reference."""

    num_tokens: int = 0
    num_agreeing: int = 0
    kl: float = 0.0

    @property
    def top1_agreement(self) -> float:
        """Share of tokens at which both find the same token likeliest."""
        return self.num_agreeing / self.num_tokens

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence in nats."""
        return self.kl / self.num_tokens


def measure(windows: Sequence[Window], scorer: Scorer, on_window: Callable[[], None] = lambda: None) -> Likelihood:
    """Score the windows with one model. `on_window` is called after each of them.

    Raises `EngineError` for logits that are not finite, and what `scorer` raises.
    """
    found = Likelihood()
    for window in windows:
        _score(scorer, window, found)
        on_window()
    return found


def compare(
    windows: Sequence[Window], scorer: Scorer, reference: Scorer, on_window: Callable[[], None] = lambda: None
) -> tuple[Likelihood, Likelihood, Divergence]:
    """Score the windows with a model and with its reference, which must have the same vocabulary.

    Returns the model's likelihood, the reference's, and the divergence between them. The reference's logits of one
    window are kept on its device. Raises as `measure` does.
    """
    found, expected, divergence = Likelihood(), Likelihood(), Divergence()
    for window in windows:
        kept = _KeptLogits(window.num_scored)
        _score(reference, window, expected, kept.keep)
        _score(scorer, window, found, partial(_add_divergence, divergence, kept))
        on_window()
    return found, expected, divergence


class _KeptLogits:
    """A window's logits, those alone that scored tokens follow from."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._logits: Tensor | None = None

    def keep(self, begin: int, rows: Tensor) -> None:
        """Copy the rows [begin, begin + len(rows))."""
        if self._logits is None:
            self._logits = rows.new_empty((self._num_rows, rows.shape[1]))
        self._logits[begin : begin + len(rows)] = rows

    def rows(self, begin: int, like: Tensor) -> Tensor:
        """As many rows as `like` has, from `begin` on, on its device."""
        assert self._logits is not None
        return self._logits[begin : begin + len(like)].to(like.device)


def _score(
    scorer: Scorer, window: Window, found: Likelihood, take: Callable[[int, Tensor], None] = lambda begin, rows: None
) -> None:
    """Add a window's likelihood to `found`; hand the logits that scored tokens follow from to `take`, a few at a time.

    `take` gets the number of such rows before those, and the rows.
    """
    import torch

    targets = torch.tensor(window.token_ids)
    first, last = window.first_scored - 1, len(window.token_ids) - 1
    position = 0

    def look(logits: Tensor) -> None:
        nonlocal position
        begin, position = position, position + len(logits)
        with torch.inference_mode():
            at = max(first, begin)
            for rows in logits[at - begin : max(last - begin, 0)].split(_ROWS):
                following = targets[at + 1 : at + 1 + len(rows)].to(rows.device)
                picked = torch.log_softmax(rows, dim=-1).gather(1, following[:, None])
                found.nll -= float(picked.double().sum())
                found.num_tokens += len(rows)
                take(at - first, rows)
                at += len(rows)

    scorer(window.token_ids, look)
    assert position == len(window.token_ids), "a scorer gives the logits of every token"
    if not math.isfinite(found.nll):
        raise EngineError("the model's logits are not finite, or give a token of the text no probability at all")


def _add_divergence(divergence: Divergence, reference: _KeptLogits, begin: int, rows: Tensor) -> None:
    import torch

    log_p = torch.log_softmax(reference.rows(begin, rows), dim=-1)
    log_q = torch.log_softmax(rows, dim=-1)
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0.0)
    divergence.num_tokens += len(rows)
    divergence.num_agreeing += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
    divergence.kl += float(terms.sum(dim=-1).double().sum())
