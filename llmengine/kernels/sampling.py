"""Token choice on the device, inside a step: no sort of the vocabulary, no wait for the host.

The distribution is that of transformers' warpers in their usual order: temperature, then top_k, then top_p over the
renormalised probabilities of what top_k left, then min_p relative to the likeliest. Among equal logits the lower ids
come first, as in a stable sort. The token is found by inverting the cumulative distribution of the kept tokens, in
vocabulary order, at one uniform number that is a function of (seed, position).

`sample` reads the logits once. `_summarize` leaves the maximum and the mass of each segment of `_SEGMENT` tokens;
`_choose`, one program a row, then works on segments: for a draw from the whole vocabulary it finds the segment and
reads only that; with top_k, top_p or min_p the summaries bound the threshold from below, so only segments whose maximum
is above that bound can hold kept tokens, and the exact threshold is searched among those. If the distribution is flat,
these are all segments, and a row takes 12 to 17 reads of its logits (twice that with both).

Masses that are compared or inverted are fixed-point integers, 2**44 for the likeliest token. Their sums are exact in
any order, so a row's token depends only on its own logits, parameters, seed and position. Tokens that are less likely
than the likeliest by more than that factor are never drawn.

Masks of allowed tokens, which apply wherever logits are read, and `EditTables` come before all of this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.logit_edits import EditTables, edit_logits, undo_and_count
from llmengine.kernels.sampling_search import NO_ID, invert, lower_bound, search, total_above
from llmengine.kernels.sampling_values import fixed, key_of, load_allowed, load_logits, scale_of, uniform, value_of
from llmengine.kernels.step import NUM_SAMPLES

MAX_VOCAB = 400_000
"""So that a row's mass, of 2**44 for each token at most, fits into an int64 with room for rounding."""

_SEGMENT = 64
_SEGMENTS_PER_PROGRAM = 32
_GREEDY_BLOCK = 2048
_GREEDY_PROGRAMS = 2048
"""Programs of a greedy step that fill the device; with more rows than that, one program a row."""

_ID_BITS = tl.constexpr(31)
_KEY_OF_MINUS_INF = tl.constexpr(-0x7F800001)


@dataclass(frozen=True, slots=True)
class SlotParams:
    """Sampling parameters of every slot, [num_slots + 1] each; may change between steps.

    Attributes:
        temperature: fp32; 0 is greedy.
        top_k: int32; 0 keeps all tokens.
        top_p: fp32; 1 keeps all tokens.
        min_p: fp32 in [0, 1], relative to the likeliest token; 0 keeps all tokens.
        seed: int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Tokens that each slot may choose; they may change between steps.

    Attributes:
        lines: int32 [num_slots + 1], each slot's line of `words`.
        words: int32 [num_lines, ceil(vocab / 32)]; id t is allowed if bit t % 32 of word t // 32 is set.
    """

    lines: Tensor
    words: Tensor


@dataclass(frozen=True, slots=True)
class SamplingWorkspace:
    """Scratch memory of steps that run one after the other. `best` and `arrived` are 0 between steps.

    Attributes:
        best: int64 [max_samples].
        arrived: int32 [max_samples].
        maxima: fp32 [max_samples, num_segments].
        masses: fp32 [max_samples, num_segments].
        candidates: int32 [max_samples, num_segments].
    """

    best: Tensor
    arrived: Tensor
    maxima: Tensor
    masses: Tensor
    candidates: Tensor


def sampling_workspace(max_samples: int, vocab: int, device: torch.device | str) -> SamplingWorkspace:
    """Allocate what `sample_greedy` and `sample` need for up to `max_samples` rows."""
    shape = max_samples, triton.cdiv(vocab, _SEGMENT)
    return SamplingWorkspace(
        best=torch.zeros(max_samples, dtype=torch.int64, device=device),
        arrived=torch.zeros(max_samples, dtype=torch.int32, device=device),
        maxima=torch.empty(shape, dtype=torch.float32, device=device),
        masses=torch.empty(shape, dtype=torch.float32, device=device),
        candidates=torch.empty(shape, dtype=torch.int32, device=device),
    )


def sample_greedy(
    logits: Tensor, counts: Tensor, out_ids: Tensor, out_failed: Tensor, workspace: SamplingWorkspace
) -> None:
    """Write the lowest id among each row's largest logits, in one read of the logits.

    Args:
        logits: [max_samples, vocab], contiguous, fp32 or bf16; rows from counts[NUM_SAMPLES] on are left alone.
        counts: `DeviceStep.counts`.
        out_ids: int32 [max_samples]; 0 where failed.
        out_failed: int32 [max_samples]; 1 if the row holds NaN or inf, or nothing but -inf.
    """
    max_samples, vocab = logits.shape
    assert logits.is_contiguous()
    num_blocks = triton.cdiv(vocab, _GREEDY_BLOCK)
    blocks_per_program = triton.cdiv(num_blocks, max(1, min(num_blocks, _GREEDY_PROGRAMS // max_samples)))
    num_programs = triton.cdiv(num_blocks, blocks_per_program)
    _argmax[(num_programs, max_samples)](
        logits,
        counts,
        out_ids,
        out_failed,
        workspace.best,
        workspace.arrived,
        vocab,
        blocks_per_program,
        NUM_SAMPLES=NUM_SAMPLES,
        BLOCK=_GREEDY_BLOCK,
        num_warps=4,
    )


def sample(
    logits: Tensor,
    counts: Tensor,
    sample_slots: Tensor,
    sample_positions: Tensor,
    params: SlotParams,
    out_ids: Tensor,
    out_failed: Tensor,
    workspace: SamplingWorkspace,
    edits: EditTables | None = None,
    masks: TokenMasks | None = None,
) -> None:
    """Draw a token for each row by its slot's parameters, and record it in `edits`; rows may be greedy.

    Args:
        logits: [max_samples, vocab], contiguous, fp32 or bf16, vocab <= `MAX_VOCAB`, restored in the end; rows from
            counts[NUM_SAMPLES] on are left alone.
        counts: `DeviceStep.counts`.
        sample_slots: int32 [max_samples].
        sample_positions: int32 [max_samples], the positions that the tokens take.
        out_ids: int32 [max_samples]; 0 where failed.
        out_failed: int32 [max_samples]; 1 if the row holds NaN or inf, or only -inf is left of it.
    """
    if edits is not None:
        edit_logits(logits, counts, sample_slots, sample_positions, edits)
    summarize(logits, counts, sample_slots, params, workspace, masks)
    choose(logits, counts, sample_slots, sample_positions, params, out_ids, out_failed, workspace, edits, masks)


def summarize(
    logits: Tensor,
    counts: Tensor,
    sample_slots: Tensor,
    params: SlotParams,
    workspace: SamplingWorkspace,
    masks: TokenMasks | None,
) -> None:
    """Leave what `choose` needs in `workspace`; see `sample`, of which it is the second part."""
    max_samples, vocab = logits.shape
    assert logits.is_contiguous()
    mask_lines, mask_words = (None, None) if masks is None else (masks.lines, masks.words)
    num_segments = triton.cdiv(vocab, _SEGMENT)
    assert workspace.maxima.shape[1] == num_segments
    _summarize[(triton.cdiv(num_segments, _SEGMENTS_PER_PROGRAM), max_samples)](
        logits,
        counts,
        sample_slots,
        params.temperature,
        mask_lines,
        mask_words,
        workspace.maxima,
        workspace.masses,
        vocab,
        num_segments,
        NUM_SAMPLES=NUM_SAMPLES,
        SEGMENT=_SEGMENT,
        SEGMENTS=_SEGMENTS_PER_PROGRAM,
        num_warps=4,
    )


def choose(
    logits: Tensor,
    counts: Tensor,
    sample_slots: Tensor,
    sample_positions: Tensor,
    params: SlotParams,
    out_ids: Tensor,
    out_failed: Tensor,
    workspace: SamplingWorkspace,
    edits: EditTables | None,
    masks: TokenMasks | None,
) -> None:
    """Draw from what `summarize` has left; see `sample`, of which it is the last part."""
    max_samples, vocab = logits.shape
    assert vocab <= MAX_VOCAB
    mask_lines, mask_words = (None, None) if masks is None else (masks.lines, masks.words)
    num_segments = triton.cdiv(vocab, _SEGMENT)
    _choose[(max_samples,)](
        logits,
        counts,
        sample_slots,
        sample_positions,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.seed,
        mask_lines,
        mask_words,
        out_ids,
        out_failed,
        workspace.maxima,
        workspace.masses,
        workspace.candidates,
        *_undo_arguments(edits),
        vocab,
        num_segments,
        NUM_SAMPLES=NUM_SAMPLES,
        SEGMENT=_SEGMENT,
        ALL_SEGMENTS=triton.next_power_of_2(num_segments),
        BLOCK=min(4096, triton.next_power_of_2(vocab)),
        num_warps=16,
    )


def _undo_arguments(edits: EditTables | None) -> tuple[Tensor | int | None, ...]:
    """Arguments that `_choose` passes on to `undo_and_count`."""
    if edits is None:
        return (None,) * 12 + (0,) * 4
    return (
        edits.counting,
        edits.num_entries,
        edits.entry_ids,
        edits.entry_states,
        edits.entry_biases,
        edits.entry_logits,
        edits.num_words,
        edits.word_tokens,
        edits.word_ends,
        edits.word_logits,
        edits.ring_masks,
        edits.ring,
        edits.entry_ids.shape[1],
        edits.word_ends.shape[1],
        edits.word_tokens.shape[1],
        edits.ring.shape[1],
    )


@triton.jit(do_not_specialize=["blocks_per_program"])
def _argmax(
    logits,
    counts,
    out_ids,
    out_failed,
    best,
    arrived,
    vocab,
    blocks_per_program,
    NUM_SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1)
    if row < tl.load(counts + NUM_SAMPLES):
        lanes = tl.arange(0, BLOCK)
        begin = tl.program_id(0) * blocks_per_program * BLOCK
        line = logits + row.to(tl.int64) * vocab
        largest = load_logits(line + begin + lanes, begin + lanes < vocab)
        at = begin + lanes
        for block in range(1, blocks_per_program):
            ids = begin + block * BLOCK + lanes
            values = load_logits(line + ids, ids < vocab)
            at = tl.where(values > largest, ids, at)
            largest = tl.maximum(largest, values)
        # Key above, complement of the id below: the largest of these is the lowest id among the largest logits.
        packed = ((key_of(largest).to(tl.int64) + 0x80000000) << _ID_BITS) | (NO_ID - at)
        tl.atomic_max(best + row, tl.max(packed, 0))
        if tl.atomic_add(arrived + row, 1) == tl.num_programs(0) - 1:
            winner = tl.atomic_xchg(best + row, 0)
            tl.store(arrived + row, 0)
            value = value_of(((winner >> _ID_BITS) - 0x80000000).to(tl.int32))
            failed = tl.abs(value) == float("inf")
            tl.store(out_ids + row, tl.where(failed, 0, NO_ID - (winner & NO_ID)).to(tl.int32))
            tl.store(out_failed + row, failed.to(tl.int32))


@triton.jit
def _summarize(
    logits,
    counts,
    sample_slots,
    temperatures,
    mask_lines,
    mask_words,
    maxima,
    masses,
    vocab,
    num_segments,
    NUM_SAMPLES: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Write each segment's maximum, and its mass relative to that maximum."""
    row = tl.program_id(1)
    if row < tl.load(counts + NUM_SAMPLES):
        slot = tl.load(sample_slots + row)
        scale = scale_of(tl.load(temperatures + slot))
        segments = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
        ids = segments[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
        line = logits + row.to(tl.int64) * vocab
        if mask_words is not None:
            mask_words += tl.load(mask_lines + slot) * ((vocab + 31) // 32)
        values = load_allowed(line, mask_words, ids, ids < vocab)
        largest = tl.max(values, 1)
        reference = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
        mass = tl.sum(tl.exp2((values - reference[:, None]) * scale), 1)
        out = row.to(tl.int64) * num_segments + segments
        tl.store(maxima + out, largest, mask=segments < num_segments)
        tl.store(masses + out, mass, mask=segments < num_segments)


@triton.jit
def _choose(
    logits,
    counts,
    sample_slots,
    sample_positions,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    mask_lines,
    mask_words,
    out_ids,
    out_failed,
    maxima,
    masses,
    candidates,
    counting,
    num_entries,
    entry_ids,
    entry_states,
    entry_biases,
    entry_logits,
    num_words,
    word_tokens,
    word_ends,
    word_logits,
    ring_masks,
    ring,
    max_entries,
    max_words,
    max_word_tokens,
    max_ring,
    vocab,
    num_segments,
    NUM_SAMPLES: tl.constexpr,
    SEGMENT: tl.constexpr,
    ALL_SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    if row < tl.load(counts + NUM_SAMPLES):
        segments = tl.arange(0, ALL_SEGMENTS)
        summary = row.to(tl.int64) * num_segments
        largest = tl.load(maxima + summary + segments, mask=segments < num_segments, other=-float("inf"))
        reference = tl.max(largest, 0)
        failed = tl.abs(reference) == float("inf")
        chosen = 0
        slot = tl.load(sample_slots + row)
        position = tl.load(sample_positions + row)
        line = logits + row.to(tl.int64) * vocab
        if mask_words is not None:
            mask_words += tl.load(mask_lines + slot) * ((vocab + 31) // 32)
        if not failed:
            temperature = tl.load(temperatures + slot)
            top_k = tl.load(top_ks + slot)
            top_p = tl.load(top_ps + slot)
            min_p = tl.load(min_ps + slot)
            scale = scale_of(temperature)
            mass = tl.load(masses + summary + segments, mask=segments < num_segments, other=0.0)
            log_weights = (largest - reference) * scale
            share = uniform(tl.load(seeds + slot), position.to(tl.int64))
            listed = candidates + summary
            greedy = (temperature == 0.0) | (top_k == 1)
            top_k = tl.where(top_k < vocab, top_k, 0)
            filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
            # All candidates above the threshold are kept, and the first num_ties of those that equal it.
            threshold = tl.full([], _KEY_OF_MINUS_INF, tl.int64)
            num_ties = tl.full([], 0, tl.int64)
            single = tl.full([], -1, tl.int32)
            size = SEGMENT
            if greedy:
                single = tl.min(tl.where(largest == reference, segments, ALL_SEGMENTS), 0)
                threshold = key_of(reference).to(tl.int64)
                num_ties += 1
                share = share * 0.0
                min_p = 0.0
            elif filtered:
                bound = lower_bound(log_weights, mass, top_k, top_p, min_p, SEGMENT)
                wanted = (log_weights >= bound) & (segments < num_segments)
                places = tl.cumsum(wanted.to(tl.int32), 0) - 1
                tl.store(listed + places, segments, mask=wanted)
                size = tl.sum(wanted.to(tl.int32), 0) * SEGMENT
                tl.debug_barrier()
                # A little below the bound's value, so that rounding never puts it above the true threshold.
                lowest = reference + bound / scale
                lowest -= 1e-5 * (tl.abs(lowest) + tl.abs(reference))
                threshold = key_of(tl.where(lowest == 0.0, 0.0, lowest)).to(tl.int64)
                whole = tl.sum(fixed(mass * tl.exp2(log_weights)), 0)
                for stage in range(tl.where(top_k > 0, 0, 1), tl.where(top_p < 1.0, 2, 1)):
                    by_count = stage == 0
                    limit = tl.ceil(top_p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
                    needed = tl.where(by_count, top_k.to(tl.int64), tl.maximum(limit, 1))
                    searched = (line, mask_words, listed, single, size, vocab, reference, scale)
                    threshold = search(searched, threshold, needed, by_count, SEGMENT, BLOCK)
                    above, mass_above = total_above(searched, threshold, 0.0, SEGMENT, BLOCK)
                    tied = fixed(tl.exp2((value_of(threshold.to(tl.int32)) - reference) * scale))
                    missing = needed - mass_above
                    by_mass = (missing + tl.maximum(tied, 1) - 1) // tl.maximum(tied, 1)
                    num_ties = tl.maximum(tl.where(by_count, needed - above, by_mass), 0)
                    whole = mass_above + num_ties * tied
            else:
                amounts = fixed(mass * tl.exp2(log_weights))
                total = tl.sum(amounts, 0)
                target = share * total.to(tl.float64)
                below = tl.cumsum(amounts, 0)
                passed = below <= tl.minimum(target.to(tl.int64), total - 1)
                single = tl.sum(passed.to(tl.int32), 0)
                here = segments == single
                amount = tl.sum(tl.where(here, amounts, 0), 0).to(tl.float64)
                before = tl.sum(tl.where(here, below - amounts, 0), 0).to(tl.float64)
                share = tl.minimum(tl.maximum((target - before) / amount, 0.0), 1.0)
                reference = tl.sum(tl.where(here, largest, 0.0), 0)
            _, kept = total_above(
                (line, mask_words, listed, single, size, vocab, reference, scale), threshold, min_p, SEGMENT, BLOCK
            )
            tied_weight = tl.exp2((value_of(threshold.to(tl.int32)) - reference) * scale)
            kept += num_ties * tl.where((num_ties > 0) & (tied_weight >= min_p), fixed(tied_weight), 0)
            target = tl.minimum((share * kept.to(tl.float64)).to(tl.int64), kept - 1)
            chosen = invert(
                (line, mask_words, listed, single, size, vocab, reference, scale),
                threshold,
                num_ties,
                min_p,
                target,
                SEGMENT,
                BLOCK,
            )
        tl.store(out_ids + row, chosen)
        tl.store(out_failed + row, failed.to(tl.int32))
        if entry_ids is not None:
            undo_and_count(
                line,
                slot,
                position,
                chosen,
                counting,
                num_entries,
                entry_ids,
                entry_states,
                entry_biases,
                entry_logits,
                num_words,
                word_tokens,
                word_ends,
                word_logits,
                ring_masks,
                ring,
                max_entries,
                max_words,
                max_word_tokens,
                max_ring,
            )
