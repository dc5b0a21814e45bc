"""Bias, penalties and forbidden words on the device, inside a step: logits of single tokens, no pass over a vocabulary.

`edit_logits` changes a step's logits in place and keeps the old values. When a row's token is chosen, `undo_and_count`
restores them, so that log-probabilities are the model's own. It also counts the token, so that the next step, which the
host may have launched already, finds it. `llmengine.backends.logit_edits` explains entries, words and rings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmengine.kernels.step import NUM_SAMPLES

_BLOCK = tl.constexpr(1024)
"""Entries or words that a program handles at once."""


@dataclass(frozen=True, slots=True)
class EditTables:
    """Edits of every slot, one line each; int32 unless another dtype is given. The last slot is padding without edits.

    Attributes:
        penalties: fp32 [3, num_slots + 1], repetition, frequency, presence.
        counting: [num_slots + 1]; 1 if chosen tokens become entries.
        num_entries: [num_slots + 1].
        entry_ids: [num_slots + 1, max_entries], distinct within a slot.
        entry_states: [num_slots + 1, max_entries], twice the count in the output, plus 1 for tokens of the prompt.
        entry_biases: fp32 [num_slots + 1, max_entries].
        entry_logits: fp32 [num_slots + 1, max_entries], logits before the edits of a step.
        num_words: [num_slots + 1].
        word_tokens: [num_slots + 1, max_word_tokens].
        word_ends: [num_slots + 1, max_words], where each word ends in `word_tokens`.
        word_lengths: [num_slots + 1, max_words].
        word_untils: [num_slots + 1, max_words], the first position at which the word is allowed.
        word_logits: fp32 [num_slots + 1, max_words], logits of the words' last tokens before the edits of a step.
        ring_masks: [num_slots + 1]; the token of position p is at p & mask.
        ring: [num_slots + 1, max_ring], the latest tokens.
    """

    penalties: Tensor
    counting: Tensor
    num_entries: Tensor
    entry_ids: Tensor
    entry_states: Tensor
    entry_biases: Tensor
    entry_logits: Tensor
    num_words: Tensor
    word_tokens: Tensor
    word_ends: Tensor
    word_lengths: Tensor
    word_untils: Tensor
    word_logits: Tensor
    ring_masks: Tensor
    ring: Tensor

    @staticmethod
    def empty(
        num_slots: int,
        max_entries: int,
        max_words: int,
        max_word_tokens: int,
        max_ring: int,
        device: torch.device | str,
    ) -> EditTables:
        """Tables without edits."""

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        lines = num_slots + 1
        return EditTables(
            penalties=table(3, lines, dtype=torch.float32),
            counting=table(lines),
            num_entries=table(lines),
            entry_ids=table(lines, max_entries),
            entry_states=table(lines, max_entries),
            entry_biases=table(lines, max_entries, dtype=torch.float32),
            entry_logits=table(lines, max_entries, dtype=torch.float32),
            num_words=table(lines),
            word_tokens=table(lines, max_word_tokens),
            word_ends=table(lines, max_words),
            word_lengths=table(lines, max_words),
            word_untils=table(lines, max_words),
            word_logits=table(lines, max_words, dtype=torch.float32),
            ring_masks=table(lines),
            ring=table(lines, max_ring),
        )


def edit_logits(
    logits: Tensor, counts: Tensor, sample_slots: Tensor, sample_positions: Tensor, tables: EditTables
) -> None:
    """Add biases and penalties and forbid words; NaN and inf stay. `undo_and_count` must follow in the same step.

    Args:
        logits: [max_samples, vocab], contiguous, fp32 or bf16; rows from counts[NUM_SAMPLES] on are left alone.
        counts: `DeviceStep.counts`.
        sample_slots: int32 [max_samples].
        sample_positions: int32 [max_samples], the positions that the chosen tokens will take.
    """
    max_samples, vocab = logits.shape
    assert logits.is_contiguous()
    _edit[(max_samples,)](
        logits,
        counts,
        sample_slots,
        sample_positions,
        tables.penalties,
        tables.num_entries,
        tables.entry_ids,
        tables.entry_states,
        tables.entry_biases,
        tables.entry_logits,
        tables.num_words,
        tables.word_tokens,
        tables.word_ends,
        tables.word_lengths,
        tables.word_untils,
        tables.word_logits,
        tables.ring_masks,
        tables.ring,
        vocab,
        tables.penalties.shape[1],
        tables.entry_ids.shape[1],
        tables.word_ends.shape[1],
        tables.word_tokens.shape[1],
        tables.ring.shape[1],
        NUM_SAMPLES=NUM_SAMPLES,
        num_warps=8,
    )


@triton.jit
def _edit(
    logits,
    counts,
    sample_slots,
    sample_positions,
    penalties,
    num_entries,
    entry_ids,
    entry_states,
    entry_biases,
    entry_logits,
    num_words,
    word_tokens,
    word_ends,
    word_lengths,
    word_untils,
    word_logits,
    ring_masks,
    ring,
    vocab,
    num_lines,
    max_entries,
    max_words,
    max_word_tokens,
    max_ring,
    NUM_SAMPLES: tl.constexpr,
):
    row = tl.program_id(0)
    if row < tl.load(counts + NUM_SAMPLES):
        slot = tl.load(sample_slots + row)
        entries = tl.load(num_entries + slot)
        words = tl.load(num_words + slot)
        line = logits + row.to(tl.int64) * vocab
        word_tokens += slot * max_word_tokens
        # A word's last token may also be an entry or end another word, so all logits are kept before any is changed.
        for begin in range(0, words, _BLOCK):
            lanes = begin + tl.arange(0, _BLOCK)
            used = lanes < words
            ends = tl.load(word_ends + slot * max_words + lanes, mask=used, other=1)
            lasts = tl.load(word_tokens + ends - 1, mask=used, other=0)
            values = tl.load(line + lasts, mask=used, other=0.0).to(tl.float32)
            tl.store(word_logits + slot * max_words + lanes, values, mask=used)
        tl.debug_barrier()
        repetition = tl.load(penalties + slot)
        frequency = tl.load(penalties + num_lines + slot)
        presence = tl.load(penalties + 2 * num_lines + slot)
        for begin in range(0, entries, _BLOCK):
            lanes = begin + tl.arange(0, _BLOCK)
            used = lanes < entries
            lanes += slot * max_entries
            ids = tl.load(entry_ids + lanes, mask=used, other=0)
            states = tl.load(entry_states + lanes, mask=used, other=0)
            values = tl.load(line + ids, mask=used, other=0.0).to(tl.float32)
            tl.store(entry_logits + lanes, values, mask=used)
            values += tl.load(entry_biases + lanes, mask=used, other=0.0)
            # Slots without penalties have a repetition penalty of 0, by which nothing may be divided.
            penalized = tl.where(values < 0.0, values * repetition, tl.div_rn(values, tl.maximum(repetition, 0.01)))
            values = tl.where(states > 0, penalized, values)
            in_output = (states >> 1).to(tl.float32)
            values = values - frequency * in_output - tl.where(in_output > 0.0, presence, 0.0)
            tl.store(line + ids, values, mask=used)
        tl.debug_barrier()
        position = tl.load(sample_positions + row)
        ring_mask = tl.load(ring_masks + slot)
        for begin in range(0, words, _BLOCK):
            lanes = begin + tl.arange(0, _BLOCK)
            used = lanes < words
            lanes += slot * max_words
            ends = tl.load(word_ends + lanes, mask=used, other=1)
            lengths = tl.load(word_lengths + lanes, mask=used, other=0)
            matched = (used & (position < tl.load(word_untils + lanes, mask=used, other=0))).to(tl.int32)
            for back in range(1, tl.max(lengths, 0)):
                within = back < lengths
                wanted = tl.load(word_tokens + ends - 1 - back, mask=within, other=-1)
                latest = tl.load(ring + slot * max_ring + ((position - back) & ring_mask))
                matched = tl.where(within & (wanted != latest), 0, matched)
            lasts = tl.load(word_tokens + ends - 1, mask=used, other=0)
            values = tl.load(word_logits + lanes, mask=used, other=float("inf"))
            tl.store(line + lasts, -float("inf"), mask=(matched != 0) & (values < float("inf")))


@triton.jit
def undo_and_count(
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
):
    """Restore a row's logits at `line` and record the token that was `chosen` for `position`.

    A full table of entries takes no more; its owner widens it in time.
    """
    entries = tl.load(num_entries + slot)
    words = tl.load(num_words + slot)
    ids = entry_ids + slot * max_entries
    tl.debug_barrier()  # now every thread has read the logits and the number of entries
    place = entries
    for begin in range(0, entries, _BLOCK):
        lanes = begin + tl.arange(0, _BLOCK)
        used = lanes < entries
        tokens = tl.load(ids + lanes, mask=used, other=-1)
        values = tl.load(entry_logits + slot * max_entries + lanes, mask=used, other=0.0)
        tl.store(line + tokens, values, mask=used)
        place = tl.minimum(place, tl.min(tl.where(tokens == chosen, lanes, entries), 0))
    for begin in range(0, words, _BLOCK):
        lanes = begin + tl.arange(0, _BLOCK)
        used = lanes < words
        ends = tl.load(word_ends + slot * max_words + lanes, mask=used, other=1)
        lasts = tl.load(word_tokens + slot * max_word_tokens + ends - 1, mask=used, other=0)
        values = tl.load(word_logits + slot * max_words + lanes, mask=used, other=0.0)
        tl.store(line + lasts, values, mask=used)
    tl.store(ring + slot * max_ring + (position & tl.load(ring_masks + slot)), chosen)
    if (tl.load(counting + slot) != 0) & (place < max_entries):
        state = tl.load(entry_states + slot * max_entries + place)
        tl.debug_barrier()
        tl.store(entry_states + slot * max_entries + place, tl.where(place < entries, state, 0) + 2)
        if place == entries:
            tl.store(ids + place, chosen)
            tl.store(entry_biases + slot * max_entries + place, 0.0)
            tl.store(num_entries + slot, entries + 1)


def edit_logits_reference(logits: Tensor, slot: int, position: int, tables: EditTables) -> Tensor:
    """One row's logits [vocab] as `edit_logits` leaves them, in fp32."""
    values = logits.float().clone()
    number = int(tables.num_entries[slot])
    ids, states = tables.entry_ids[slot, :number].long(), tables.entry_states[slot, :number]
    repetition, frequency, presence = tables.penalties[:, slot].tolist()
    edited = values[ids] + tables.entry_biases[slot, :number]
    penalized = torch.where(edited < 0, edited * repetition, edited / max(repetition, 0.01))
    edited = torch.where(states > 0, penalized, edited)
    values[ids] = edited - frequency * (states // 2) - presence * (states > 1)
    ring, mask = tables.ring[slot].tolist(), int(tables.ring_masks[slot])
    for word in range(int(tables.num_words[slot])):
        end, length = int(tables.word_ends[slot, word]), int(tables.word_lengths[slot, word])
        *before, last = tables.word_tokens[slot, end - length : end].tolist()
        latest = [ring[(position - back) & mask] for back in range(length - 1, 0, -1)]
        if position < tables.word_untils[slot, word] and before == latest and logits[last] < torch.inf:
            values[last] = -torch.inf
    return values
