"""Token choice over a step's logits on the CPU, vectorised over rows.

A row's result depends on its own logits, parameters, seed and position alone, to the last bit: which algorithm a row
takes follows from its own parameters, and every reduction runs along its own vocabulary.

The distribution is that of transformers' warpers in their usual order: temperature, then top_k, then top_p within what
top_k left, then min_p. The token is found by inverting its cumulative distribution (in float64) at one uniform number.
Before them come the masks of allowed tokens, then the edits of single logits (`logit_editor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmengine.backends.cpu.logit_editor import LogitEditor
from llmengine.backends.logit_edits import NO_MASKS, Int32Array, slot_edits
from llmengine.batch import SlotInit, TokenLogprobs

IntArray = NDArray[np.int64]

_SMALL_K = 64
_LARGE_K = 1024
"""Widths of the partial sorts: fixed, so that ties do not fall differently when other rows want more."""

_SEGMENT = 128
"""Tokens that share one maximum or partial sum, so that what follows works on the few segments of a vocabulary."""


@dataclass(frozen=True, slots=True)
class Logits:
    """A step's logits.

    Attributes:
        values: float32 [num_rows, vocab], contiguous.
        likeliest: int64 [num_rows], the lowest id among each row's likeliest; -1 where the row's largest logit is
            infinite or any is NaN. None: not known yet.
    """

    values: Tensor
    likeliest: IntArray | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """What `Sampler.sample` chose, row by row.

    Attributes:
        token_ids: one for each row; meaningless where `failed`.
        failed: the row's logits hold NaN or infinity, or every token is forbidden.
        logprobs: row index -> log-probabilities, for rows that ask for them.
    """

    token_ids: list[int]
    failed: list[bool]
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Sampling parameters of every slot, and the choice of tokens."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._temperature = np.ones(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float64)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._greedy = np.ones(num_slots, dtype=np.bool_)
        self._seed = np.zeros(num_slots, dtype=np.uint64)
        self._num_logprobs = np.full(num_slots, -1, dtype=np.int64)
        self._wants_likeliest = np.ones(num_slots, dtype=np.bool_)
        self._editor = LogitEditor(num_slots)

    def init_slot(self, init: SlotInit) -> None:
        """Replace the parameters of `init.slot`."""
        params, slot = init.sampling_params, init.slot
        self._greedy[slot] = params.greedy
        self._temperature[slot] = params.temperature or 1.0
        self._top_k[slot] = params.top_k if params.top_k < self._vocab_size else 0
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seed[slot] = init.seed
        self._num_logprobs[slot] = -1 if params.logprobs is None else min(params.logprobs, self._vocab_size)
        self._wants_likeliest[slot] = params.greedy and params.logprobs is None
        self._editor.init_slot(slot, slot_edits(init, self._vocab_size))

    def sample(
        self,
        logits: Tensor,
        slots: IntArray,
        positions: IntArray,
        masks: Mapping[int, Int32Array] = NO_MASKS,
        likeliest: IntArray | None = None,
    ) -> Samples:
        """Choose a token for each row; the slots remember it for their penalties and bad words.

        Args:
            logits: fp32 [num_rows, vocab], contiguous; changed meanwhile.
            slots: int64 [num_rows], each once.
            positions: int64 [num_rows], the positions that the chosen tokens take.
            masks: slot -> int32 [ceil(vocab / 32)], the tokens that it may choose in this step: id t if bit t % 32 of
                word t // 32 is set.
            likeliest: as in `Logits`.
        """
        has_edits = self._editor.edits(slots)
        if likeliest is not None and not masks and not has_edits and self._wants_likeliest[slots].all():
            token_ids = likeliest.tolist()
            return Samples(token_ids=token_ids, failed=[token_id < 0 for token_id in token_ids], logprobs={})
        wanted = self._num_logprobs[slots]
        maxima = _segment_maxima(logits)
        failed = ~torch.isfinite(maxima.amax(dim=-1))
        log_totals, top = None, None
        if (wanted >= 0).any():
            log_totals = log_sum_exp(logits)
            if wanted.max() > 0:
                top = torch.topk(logits, int(wanted.max()), dim=-1)
        if masks or has_edits:
            allowed = _masked(logits, slots, masks) if masks else logits
            saved = self._editor.apply(allowed, slots, positions)
            maxima = _segment_maxima(allowed)
            failed |= ~torch.isfinite(maxima.amax(dim=-1))
            token_ids = self._choose(allowed, maxima, slots, positions)
            saved.restore()
            self._editor.record(slots, positions, token_ids.numpy())
        else:
            token_ids = self._choose(logits, maxima, slots, positions)
        chosen = token_ids.tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        if log_totals is not None:
            values = logits.gather(1, token_ids[:, None])[:, 0] - log_totals
            logprobs = _collect_logprobs(wanted, values, log_totals, top)
        return Samples(token_ids=chosen, failed=failed.tolist(), logprobs=logprobs)

    def _choose(self, logits: Tensor, maxima: Tensor, slots: IntArray, positions: IntArray) -> Tensor:
        """The chosen tokens, int64 [num_rows]."""
        greedy = self._greedy[slots]
        if greedy.all():
            return _first_argmax(logits, maxima)
        groups = self._by_algorithm(slots)
        if len(groups) == 1:
            return self._draw(logits, maxima, slots, positions, groups[0][1])
        result = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        for rows, width in groups:
            index = torch.from_numpy(rows).to(logits.device)
            result[index] = self._draw(logits[index], maxima[index], slots[rows], positions[rows], width)
        return result

    def _draw(self, logits: Tensor, maxima: Tensor, slots: IntArray, positions: IntArray, width: int) -> Tensor:
        """The chosen tokens, int64 [num_rows]; all rows take the algorithm of `width`."""
        if width == 1:
            return _first_argmax(logits, maxima)
        # Minus the maximum first: a tiny temperature then gives -inf and not NaN.
        scaled = (logits - maxima.amax(dim=-1, keepdim=True)).div_(
            self._tensor(self._temperature, slots, logits)[:, None]
        )
        uniforms = uniform(self._seed[slots], positions).to(logits.device)
        min_p = self._tensor(self._min_p, slots, logits)
        if width == 0:
            if self._min_p[slots].any():
                scaled.masked_fill_(scaled < min_p.log()[:, None], -torch.inf)
            return _invert_all(scaled, uniforms)
        top_k = self._tensor(self._top_k, slots, logits)
        top_p = self._tensor(self._top_p, slots, logits)
        return _invert_top(torch.softmax(scaled, dim=-1), top_k, top_p, min_p, uniforms, width)

    def _by_algorithm(self, slots: IntArray) -> list[tuple[IntArray, int]]:
        """Group the rows: width 1 greedy, 0 whole vocabulary in its own order, else that many likeliest tokens."""
        top_k = self._top_k[slots]
        width = np.full(len(slots), self._vocab_size, dtype=np.int64)
        width[top_k <= _LARGE_K] = _LARGE_K
        width[top_k <= _SMALL_K] = _SMALL_K
        width[(top_k == 0) & (self._top_p[slots] >= 1.0)] = 0
        width[self._greedy[slots]] = 1
        return [(np.flatnonzero(width == value), int(value)) for value in np.unique(width)]

    def _tensor(self, values: NDArray[np.generic], slots: IntArray, like: Tensor) -> Tensor:
        return torch.from_numpy(values[slots]).to(like.device)


def log_sum_exp(logits: Tensor) -> Tensor:
    """The logarithms of the rows' sums of exponentials, [num_rows].

    By segments: torch would cut the sum of a single long row among its threads, and add it up in another order.
    """
    maxima = logits.amax(dim=-1, keepdim=True)
    weights = (logits - maxima).exp_()
    padded = torch.nn.functional.pad(weights, (0, -weights.shape[1] % _SEGMENT))
    return maxima[:, 0] + padded.view(len(logits), -1, _SEGMENT).sum(dim=-1).sum(dim=-1).log()


def uniform(seeds: NDArray[np.uint64], positions: IntArray) -> Tensor:
    """float64 [n] in [0, 1), a pure function of (seed, position): splitmix64 over a mix of the two.

    Two rounds, since neighbouring seeds and neighbouring positions must not give related numbers.
    """
    state = _splitmix64(seeds) ^ positions.astype(np.uint64)
    return torch.from_numpy((_splitmix64(_splitmix64(state)) >> np.uint64(11)) * 2.0**-53)


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators (2014)."""
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _masked(logits: Tensor, slots: IntArray, masks: Mapping[int, Int32Array]) -> Tensor:
    """A copy of the logits [num_rows, vocab] with -inf where the slots' masks forbid."""
    rows = [row for row, slot in enumerate(slots.tolist()) if slot in masks]
    octets = np.stack([masks[slots[row]] for row in rows]).view(np.uint8)
    allowed = np.unpackbits(octets, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    masked = logits.clone()
    masked[rows] = masked[rows].masked_fill_(~torch.from_numpy(allowed), -torch.inf)
    return masked


def _segment_maxima(logits: Tensor) -> Tensor:
    """The segments' maxima [num_rows, num_segments]: the only pass over the logits that a greedy step needs.

    One segment a token if the vocabulary does not divide.
    """
    vocab = logits.shape[1]
    return logits if vocab % _SEGMENT else logits.view(-1, vocab // _SEGMENT, _SEGMENT).amax(dim=-1)


def _first_argmax(logits: Tensor, maxima: Tensor) -> Tensor:
    """The lowest id among each row's likeliest, int64 [num_rows], from the segments' maxima."""
    segment = maxima.argmax(dim=-1)
    if maxima.shape == logits.shape:
        return segment
    rows = torch.arange(len(logits), device=logits.device)
    return segment * _SEGMENT + logits.view(len(logits), -1, _SEGMENT)[rows, segment].argmax(dim=-1)


def _invert_all(scaled: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens int64 [num_rows], drawn from softmax(scaled) over all tokens without sorting them.

    Two levels: the segment of `_SEGMENT` tokens where the cumulative sum passes the drawn mass, then the token in it.
    """
    num_rows, vocab = scaled.shape
    weights = torch.softmax(scaled, dim=-1)
    if vocab % _SEGMENT:
        weights = torch.nn.functional.pad(weights, (0, -vocab % _SEGMENT))
    segments = weights.view(num_rows, -1, _SEGMENT)
    bounds = segments.sum(dim=-1).to(torch.float64).cumsum_(dim=-1)
    mass = uniforms * bounds[:, -1]
    segment = _first_above(bounds, mass)
    before = torch.where(segment > 0, bounds.gather(1, (segment - 1).clamp_(min=0)[:, None])[:, 0], 0.0)
    inner = segments[torch.arange(num_rows, device=scaled.device), segment].to(torch.float64)
    return segment * _SEGMENT + _first_above(inner.cumsum(dim=-1), mass - before)


def _invert_top(
    probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Tensor, width: int
) -> Tensor:
    """Tokens int64 [num_rows], drawn from the likeliest ones that top_k, top_p and min_p leave.

    Rows without top_k whose `width` likeliest tokens do not hold top_p are drawn again with more of them.
    """
    vocab = probabilities.shape[1]
    values, ids = torch.topk(probabilities, min(width, vocab), dim=-1)
    weights = values.to(torch.float64)
    rank = torch.arange(weights.shape[1], device=ids.device)
    weights.masked_fill_((top_k[:, None] > 0) & (rank >= top_k[:, None]), 0.0)
    cumulative = weights.cumsum(dim=-1)
    reached = cumulative[:, -1]
    whole = torch.where(top_k > 0, reached, 1.0)
    limit = top_p * whole
    # At least the likeliest token stays, and every token before which the mass is still short of the limit.
    kept = torch.where(cumulative - weights < limit[:, None], weights, 0.0)
    kept[:, 0] = weights[:, 0]
    kept.masked_fill_(weights < min_p[:, None] * weights[:, :1], 0.0)
    kept.cumsum_(dim=-1)
    chosen = ids.gather(1, _first_above(kept, uniforms * kept[:, -1])[:, None])[:, 0]
    short = torch.nonzero((reached < limit) & (top_k == 0))[:, 0] if width < vocab else ()
    if len(short):
        wider = _LARGE_K if width < _LARGE_K else vocab
        chosen[short] = _invert_top(
            probabilities[short], top_k[short], top_p[short], min_p[short], uniforms[short], wider
        )
    return chosen


def _first_above(cumulative: Tensor, mass: Tensor) -> Tensor:
    """The first index whose cumulative sum [num_rows, n] is above mass [num_rows], as int64 [num_rows].

    Rounding may leave none; then the last index that adds anything. Never one of weight zero.
    """
    last = cumulative[:, -1:]
    mass = torch.minimum(mass[:, None], torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cumulative, mass, right=True)[:, 0].clamp_(max=cumulative.shape[1] - 1)


def _collect_logprobs(
    wanted: IntArray, values: Tensor, log_totals: Tensor, top: Sequence[Tensor] | None
) -> dict[int, TokenLogprobs]:
    chosen = values.tolist()
    top_values = None if top is None else (top[0] - log_totals[:, None]).tolist()
    top_ids = None if top is None else top[1].tolist()
    result = {}
    for row, count in enumerate(wanted.tolist()):
        if count > 0 and top_ids is not None and top_values is not None:
            result[row] = TokenLogprobs(chosen[row], tuple(top_ids[row][:count]), tuple(top_values[row][:count]))
        elif count >= 0:
            result[row] = TokenLogprobs(chosen[row])
    return result
